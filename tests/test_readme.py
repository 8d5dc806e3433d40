"""What the README shows runs."""

from __future__ import annotations

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_examples_run_one_after_the_other():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 2
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert names["q"].shape == (2, 256, 1)
    assert names["z"].shape == (2, 256, 8, 1)
    assert names["loss"].dim() == 0
    assert all(p.grad is not None for p in names["critic"].parameters())
    assert all(p.grad is not None for p in names["flow_policy"].parameters())


def test_the_examples_of_the_pages_run():
    page = (ROOT / "docs" / "td2_cfm.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert names["future"].shape == (3, 8, 4)
    assert names["q"].shape == names["log_m"].shape == (3,)
    page = (ROOT / "docs" / "fpo.md").read_text()
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(block, names)
    assert names["found"].ratio.unique().tolist() == [1.0]
    assert float(names["found"].clip_fraction) == 0


def test_the_table_of_commands_is_the_command_line_s():
    from fastflow import cli

    shown = set(re.findall(r"^\| `fastflow (\w+)", README, re.M))
    assert shown == {"collect", "train", "evaluate", "plot", "relabel", "info", "experiment"} == set(cli._COMMANDS)
