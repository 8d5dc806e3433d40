"""python -m benchmarks.tables: puts the tables of committed results into README.md and docs/.

Between `<!-- table: benchmarks/results/NAME.md -->` and `<!-- end of table -->` stands the first table of that file,
word for word; a second word in the comment, `columns=1,2,4`, takes only these. Between `<!-- tables of GPUs -->` and
`<!-- end of tables -->` stands the table of goals of the newest whole run of `make gpu` on every GPU that is among the
results, or while there is none what a model predicts, which says so. A test sees to it that none is out of date.

    --check     change nothing; exit code 1 and the names of the files if a table differs
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_goals

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(
    r"(?P<begin><!-- table: (?P<source>\S+\.md)(?: columns=(?P<columns>[\d,]+))? -->\n)"
    r"(?P<table>.*?)(?P<end><!-- end of table -->)",
    re.DOTALL,
)
_GPUS = re.compile(r"(?P<begin><!-- tables of GPUs -->\n)(?P<tables>.*?)(?P<end><!-- end of tables -->)", re.DOTALL)
RESULTS = "benchmarks/results"
PREDICTIONS = f"{RESULTS}/predictions-h200.md"
# What a row is, what it should take, the floor, and a goal that names no rival.
PREDICTED_COLUMNS = (1, 2, 3, 5, 6)


def pages(root: Path = ROOT) -> Iterator[Path]:
    """The files that may hold tables."""
    yield root / "README.md"
    yield from sorted((root / "docs").glob("*.md"))


def first_table(text: str, columns: Sequence[int] = ()) -> str:
    """The first table of a Markdown text, of all columns or of these (from 1).

    Raises:
        ValueError: there is no table, or no such column.
    """
    found = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    if found is None:
        raise ValueError("expected a table, got none")
    lines = found[0].splitlines()
    if not columns:
        return "\n".join(lines) + "\n"
    cells = [line.strip("|").split("|") for line in lines]
    width = len(cells[0])
    if max(columns) > width or min(columns) < 1:
        raise ValueError(f"columns: expected numbers from 1 to {width}, got {list(columns)}")
    return "".join("|" + "|".join(row[column - 1] for column in columns) + "|\n" for row in cells)


def gpu_runs(root: Path = ROOT) -> dict[Path, Mapping[str, Any]]:
    """The newest whole run on every GPU: file and report, in order of the GPUs' names."""
    newest: dict[str, tuple[Path, Mapping[str, Any]]] = {}
    # Their names begin with the time.
    for path in sorted((root / RESULTS).glob("[0-9]*-[0-9]*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        whole = report.get("complete") and report.get("goals") and not (report.get("small") or report.get("only"))
        gpu = report.get("hardware", {}).get("gpu")
        if whole and gpu and (gpu not in newest or report["started"] >= newest[gpu][1]["started"]):
            newest[gpu] = path, report
    return dict(newest[gpu] for gpu in sorted(newest))


def gpu_tables(root: Path = ROOT) -> str:
    """What stands between the marks of GPUs' tables.

    Raises:
        ValueError: no run on a GPU and no predictions.
    """
    parts = []
    for path, report in gpu_runs(root).items():
        page = path.with_suffix(".md").relative_to(root).as_posix()
        commit = report["repository"]["commit"] or report["repository"]["sources"]
        head = f"**{report['hardware']['gpu']}**, {report['started'][:10]}, commit {commit} ([all of it]({page})):"
        figure = path.with_suffix(".png")
        drawn = f"\n![time of a walk over K and over rows]({figure.relative_to(root).as_posix()})\n"
        table = first_table(gpu_goals.markdown(report))
        parts.append(f"{head}\n\n{table}" + (drawn if figure.is_file() else ""))
    if parts:
        return "\n".join(parts)
    note = "**Predictions of a model, not measurements: nothing has been run on a GPU.**"
    try:
        table = first_table((root / PREDICTIONS).read_text(encoding="utf-8"), PREDICTED_COLUMNS)
    except (OSError, ValueError) as error:
        raise ValueError(f"{PREDICTIONS}: {error}") from error
    return f"{note} [What it assumes]({PREDICTIONS}).\n\n{table}"


def filled(text: str, root: Path = ROOT) -> str:
    """The text with every marked table as its source has it.

    Raises:
        ValueError: a source that is not there or has no such table; it names the source.
    """

    def fill(block: re.Match[str]) -> str:
        columns = [int(column) for column in (block["columns"] or "").split(",") if column]
        try:
            table = first_table((root / block["source"]).read_text(encoding="utf-8"), columns)
        except (OSError, ValueError) as error:
            raise ValueError(f"{block['source']}: {error}") from error
        return block["begin"] + table + block["end"]

    text = _BLOCK.sub(fill, text)
    return _GPUS.sub(lambda block: block["begin"] + gpu_tables(root) + block["end"], text)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description="Tables of results in the docs.")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args(arguments)
    changed = []
    for page in pages(root):
        text = page.read_text(encoding="utf-8")
        new = filled(text, root)
        if new != text:
            changed.append(page.relative_to(root))
            if not given.check:
                from fastflow.atomic import atomic_write

                with atomic_write(page) as temporary:
                    temporary.write_text(new, encoding="utf-8")
    print("\n".join(map(str, changed)) or "all tables are those of benchmarks/results")
    return int(given.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
