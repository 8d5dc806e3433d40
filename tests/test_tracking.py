"""Tracking: intervals, counts that no machine changes, and the comparison of two versions of the code."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import compare, counts, history
from benchmarks.intervals import Interval, launches_interval, median_interval
from benchmarks.tracked import TRACKED, Tracked

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
# As they are before other tests add some, as docs/benchmarks.md does.
NAMES = tuple(TRACKED)


# Intervals ------------------------------------------------------------------------------------------------------------


def test_a_median_s_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [median_interval(rng.lognormal(0, 0.2, 21).tolist(), resamples=400) for _ in range(200)]
    held = np.mean([interval.low <= 1 <= interval.high for interval in found])
    assert 0.88 <= held <= 1.0
    assert all(interval.low <= interval.middle <= interval.high for interval in found)


def test_launches_that_differ_alike_are_no_difference():
    """Each launch has a bias of its own that its rounds all share: the rounds alone would call it a difference."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        bias = rng.normal(0, 0.03, (5, 1))
        held += launches_interval(np.exp(bias + rng.normal(0, 0.01, (5, 15))).tolist()).says_nothing
    assert 0.9 <= held / 200 <= 0.99


def test_a_difference_is_seen():
    rng = np.random.default_rng(0)
    interval = launches_interval(np.exp(math.log(1.2) + rng.normal(0, 0.02, (5, 15))).tolist())
    assert not interval.says_nothing
    assert interval.middle == pytest.approx(1.2, rel=0.03)
    assert str(Interval(1.0, 0.9, 1.1)).endswith("no difference")


def test_what_memory_layout_does_is_no_difference():
    outcome = compare.Outcome("name", "title")
    outcome.old = [[1.0, 1.0, 1.0]] * 5
    outcome.new = [[1.015 + i / 1000] * 3 for i in range(5)]
    assert outcome.ratio is not None and not outcome.ratio.says_nothing
    assert outcome.same and outcome.verdict(1.1) == "no difference"
    outcome.resolution = 1.0
    assert not outcome.same and outcome.verdict(1.1) == "slower, within the threshold"
    assert not outcome.slower(1.1) and outcome.slower(1.005)
    assert compare.Outcome("name", "title").same is False


def test_a_single_launch_has_no_ends():
    assert launches_interval([[2.0, 2.0, 8.0]]) == (2.0, 0.0, math.inf)


def test_no_values_are_refused():
    with pytest.raises(ValueError, match="values must be at least one"):
        median_interval([])
    with pytest.raises(ValueError, match="at least one launch"):
        launches_interval([[1.0], []])


def test_a_resolution_below_1_is_refused(capsys):
    with pytest.raises(SystemExit):
        compare.main(["HEAD", "--resolution", "0.98"])
    assert "--resolution must be at least 1, got 0.98" in capsys.readouterr().err


# Counts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_those_recorded(name):
    """After a change that is meant: python -m benchmarks.counts --record."""
    recorded = counts.read()
    found = counts.count_all(CPU, [name])[name]
    assert set(found) == {"operators", "native", "allocated"}
    if recorded["torch"] != counts.torch_version():
        pytest.skip(f"the counts are those of torch {recorded['torch']}")
    assert found == recorded["cases"][name]


def test_every_tracked_case_is_recorded_and_no_other():
    assert set(counts.read()["cases"]) == set(NAMES)


def test_counts_see_a_slowed_operator(monkeypatch):
    from fastflow import cpu

    before = counts.count(TRACKED["policy-call"].prepare(CPU), CPU)
    walk = cpu.plain_walk

    def slowed(key, parameters, x, *arguments):
        return walk(key, parameters, x + 0.0, *arguments)

    monkeypatch.setattr(cpu, "plain_walk", slowed)
    after = counts.count(TRACKED["policy-call"].prepare(CPU), CPU)
    assert after["operators"] > before["operators"]
    assert after["allocated"] > before["allocated"]


# The comparison -------------------------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A repository with this tree's code as its only commit."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("fastflow", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "old")
    return folder


OPTIONS = ["--only", "^policy-frozen$|^policy-call$", "--launches", "3", "--rounds", "5"]


def test_a_slowed_operator_is_caught(repository, tmp_path, capsys):
    """A twin of the tree whose walk is done eight times over, except in a frozen copy."""
    tree = tmp_path / "tree"
    shutil.copytree(repository, tree)
    path = tree / "fastflow" / "cpu.py"
    path.write_text(
        path.read_text(encoding="utf-8")
        + "\n\n_once = plain_walk\n\n\ndef plain_walk(*arguments):\n"
        + "    for _ in range(7):\n        _once(*arguments)\n    return _once(*arguments)\n",
        encoding="utf-8",
    )
    report = tmp_path / "report.json"
    assert compare.main(["HEAD", *OPTIONS, "--threshold", "1.3", "--tree", str(tree), "--json", str(report)]) == 1
    printed = capsys.readouterr().out
    assert "slower than 1.3 times or failing: policy-call\n" in printed
    cases = json.loads(report.read_text(encoding="utf-8"))["cases"]
    assert cases["policy-call"]["ratio"]["middle"] > 1.3
    assert [len(launch) for launch in cases["policy-call"]["new"]] == [5, 5, 5]


def test_what_fails_or_is_missing_is_named(repository, tmp_path, capsys):
    tree = tmp_path / "tree"
    shutil.copytree(repository, tree)
    frozen = tree / "fastflow" / "frozen.py"
    text = frozen.read_text(encoding="utf-8")
    frozen.write_text("raise RuntimeError('broken')\n", encoding="utf-8")
    assert compare.main(["HEAD", *OPTIONS, "--launches", "1", "--tree", str(tree)]) == 1
    assert "fails: RuntimeError: broken" in capsys.readouterr().out
    git(tree, "commit", "--quiet", "--all", "--message", "broken")
    frozen.write_text(text, encoding="utf-8")
    assert compare.main(["HEAD", *OPTIONS, "--launches", "1", "--threshold", "100", "--tree", str(tree)]) == 0
    assert "only new: RuntimeError: broken" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-ref"], "BASE must be a commit"),
        (["HEAD", "--only", "nothing-like-it"], "--only matches none of"),
        (["HEAD", "--only", "("], "--only is no regular expression"),
        (["HEAD", "--launches", "0"], "--launches must be at least 1, got 0"),
        (["HEAD", "--threshold", "0.5"], "--threshold must be at least 1, got 0.5"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, repository, capsys):
    try:
        code = compare.main([*arguments, "--tree", str(repository)])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_a_case_is_added_in_ten_lines(monkeypatch):
    """The example of docs/benchmarks.md."""
    from benchmarks import tracked

    monkeypatch.setattr(tracked, "TRACKED", {})

    @tracked.tracked("one product of 64 x 64")
    def product(device):
        a = torch.randn(64, 64, device=device)
        return lambda: a @ a

    (case,) = tracked.TRACKED.values()
    assert isinstance(case, Tracked) and case.name == "product"
    assert counts.count(case.prepare(CPU), CPU)["allocated"] == 64 * 64 * 4


# History --------------------------------------------------------------------------------------------------------------


def run_of(day: int, microseconds: float) -> dict:
    """What `history` reads of a report of `benchmarks.cpu`."""
    entrants = [
        {"name": "fastflow bf16", "rival": "fastflow", "median_us": microseconds},
        {"name": "fastflow fp32", "rival": "fastflow"},
        {"name": "eager fp32", "rival": "eager", "median_us": 9.0},
    ]
    return {
        "started": f"2026-01-{day:02}T00:00:00+00:00",
        "hardware": {"cpu": "Some(R) Processor 7", "cpu_cores": 2},
        "software": {"torch": "2.13"},
        "repository": {"commit": f"c{day}", "dirty": day > 1, "sources": "s"},
        "measurements": {"walk": {"entrants": entrants}},
    }


def test_history_keeps_a_line_per_run_and_draws_them(tmp_path, capsys):
    for day, time in ((2, 50.0), (1, 100.0)):
        path = history.append(run_of(day, time), tmp_path)
    assert path is not None and path.name == "history-some-7-2-cores.jsonl"
    lines = history.read(path)
    assert [line["commit"] for line in lines] == ["c1", "c2"]
    assert [line["medians_us"] for line in lines] == [{"walk bf16": 100.0}, {"walk bf16": 50.0}]
    assert history.main([str(path)]) == 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert history.append({**run_of(3, 1.0), "measurements": {}}, tmp_path) is None


def test_history_reads_a_gpu_s_report():
    row = {"rival": "fused", "precision": "bf16", "mode": "graph", "median_us": 3.0}
    report = {**run_of(1, 1.0), "measurements": {}, "cases": {"walk": {"results": [row, {**row, "rival": "jax"}]}}}
    assert history.line_of(report)["medians_us"] == {"walk bf16 graph": 3.0}


def test_history_names_what_it_cannot_read(tmp_path, capsys):
    path = history.append(run_of(1, 2.0), tmp_path)
    assert history.main([str(path)]) == 2
    assert "no measurement occurs in two runs" in capsys.readouterr().err
    path.write_text("{}\n", encoding="utf-8")
    assert history.main([str(path)]) == 2
    assert "line 1: not a run's line" in capsys.readouterr().err
    assert history.main([str(tmp_path / "missing")]) == 2


def test_a_turn_behind_one_s_own_does_not_count():
    """Old and new take a second each, and the second of two turns in a row two thirds of it."""
    outcome = compare.Outcome("case", "a case")
    for _ in range(3):
        order = [side for i in range(7) for side in ((0, 1) if i % 2 == 0 else (1, 0))]
        times = ([], [])
        for last, side in zip([None, *order], order, strict=False):
            times[side].append(2 / 3 if last == side else 1.0)
        outcome.old.append(times[0])
        outcome.new.append(times[1])
    assert outcome.ratio.middle == pytest.approx(1.0) and outcome.verdict(1.1) == "no difference"
