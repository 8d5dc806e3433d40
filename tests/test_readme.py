"""What the README and the pages show: every Python block runs, in its page's order, and every command line parses."""

from __future__ import annotations

import ast
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from fastflow import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# A `fastflow` that is run, as opposed to one that is installed or named.
RUNS_FASTFLOW = re.compile(r"(?:^|&&|;)\s*(?:\$ )?(?:\w+=\S*\s+)*(?:\S*python3? -m |\S*/)?fastflow\s")


def blocks(page: Path, *languages: str) -> list[str]:
    """Code blocks of a page, those inside of lists included."""
    found = re.findall(r"^([ ]*)```(\w+)[^\n]*\n(.*?)^\1```", page.read_text(encoding="utf-8"), re.S | re.M)
    return [re.sub(f"^{indent}", "", code, flags=re.M) for indent, language, code in found if language in languages]


def imported(page: Path) -> set[str]:
    """Packages that the Python blocks of a page import."""
    found = set()
    for node in ast.walk(ast.parse("\n".join(blocks(page, "python", "py")))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


WITH_PYTHON = [page for page in PAGES if blocks(page, "python", "py")]
COMMANDS = [
    pytest.param(line, id=f"{page_id(page)}: {line.split('#')[0].strip()}")
    for page in PAGES
    for block in blocks(page, "sh", "bash", "console", "shell")
    for line in re.sub(r"\\\n\s*", " ", block).splitlines()
    if RUNS_FASTFLOW.search(line.split("#")[0])
]


@pytest.fixture
def run_page(tmp_path, monkeypatch):
    """Run the Python blocks of a page in one namespace, in an empty folder; returns the namespace."""

    def run(page: Path) -> dict:
        for package in sorted(imported(page) - sys.stdlib_module_names - {"fastflow"}):
            pytest.importorskip(package, reason=f"{page.name} needs the package {package}")
        monkeypatch.chdir(tmp_path)
        # Not "__main__": a whole script is defined, and run by a test of its own.
        names: dict = {"__name__": "page"}
        for i, block in enumerate(blocks(page, "python", "py")):
            exec(compile(block, f"{page.name}, block {i + 1}", "exec"), names)
        return names

    return run


@pytest.mark.parametrize("page", WITH_PYTHON, ids=page_id)
def test_the_python_blocks_of_a_page_run_one_after_the_other(page, run_page):
    names = run_page(page)
    check = CHECKS.get(page.name)
    assert len(names) > 1
    if check:
        check(names)


def check_readme(names):
    assert names["q"].shape == (2, 256, 1)
    assert names["z"].shape == (2, 256, 8, 1)
    assert names["loss"].dim() == 0
    assert all(p.grad is not None for p in names["critic"].parameters())
    assert all(p.grad is not None for p in names["flow_policy"].parameters())


def check_td2_cfm(names):
    assert names["future"].shape == (3, 8, 4)
    assert names["q"].shape == names["log_m"].shape == (3,)


def check_fpo(names):
    assert names["found"].ratio.unique().tolist() == [1.0]
    assert float(names["found"].clip_fraction) == 0


# What a page says of its results.
CHECKS = {"README.md": check_readme, "td2_cfm.md": check_td2_cfm, "fpo.md": check_fpo}


def test_the_pages_with_examples_are_found():
    assert {"README.md", "docs/td2_cfm.md", "docs/fpo.md", "docs/index.md", "docs/from_modules.md"} <= set(
        map(page_id, WITH_PYTHON)
    )
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_line_parses(line, monkeypatch, capsys):
    """As far as the work, which is not begun."""
    pytest.importorskip("tyro", reason="the command line needs the extra rl")
    words = shlex.split(line, comments=True)
    start = next(i for i, word in enumerate(words) if os.path.basename(word) == "fastflow")
    end = next((i for i, word in enumerate(words) if i > start and word in ("&&", "|", ";", "&", ">")), len(words))
    command, *arguments = words[start + 1 : end]
    assert command in cli._COMMANDS
    if command == "train":
        from fastflow.agents import NAMES
        from fastflow.experiments.seeds import split
        from fastflow.train import parse

        assert arguments[0] in NAMES
        _, arguments[1:] = split(arguments[1:])
        if "--resume" not in arguments:  # which reads the run
            assert parse(arguments[0], arguments[1:]).env
        return

    class Parsed(Exception):
        """Everything was understood."""

    parse_arguments = cli._parse

    def parse_alone(*given):
        raise Parsed(parse_arguments(*given))

    monkeypatch.setattr(cli, "_parse", parse_alone)
    if command == "info":
        assert cli.main(["info", "--help"]) == 0 and not arguments
        return
    with pytest.raises(Parsed) as found:
        cli.main([command, *arguments])
    if command == "experiment":
        from fastflow.experiments import NAMES

        assert found.value.args[0]["name"] in NAMES


def test_the_table_of_commands_is_the_command_line_s():
    shown = set(re.findall(r"^\| `fastflow (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.M))
    assert (
        shown
        == {"collect", "train", "evaluate", "plot", "relabel", "info", "experiment", "convert"}
        == set(cli._COMMANDS)
    )
