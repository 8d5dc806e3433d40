"""python -m benchmarks.compare BASE: is this tree slower or faster than another commit?

The same cases (`benchmarks.tracked`, as they are in this tree) run with the code of the git ref BASE and with the code
of this working tree, changes that are not committed included. Both are copied first, as they would be installed, so
that edits in the meantime do not matter. Two processes, one for each, take turns of about 20 ms, in changing order;
what the machine does in the meantime hits both. Because processes differ by more than their turns tell, several pairs
are started, and the interval is Student's over these pairs (`benchmarks.intervals`).

Prints, for each case, microseconds of old and new and their ratio, new / old, with its 95 % interval. Where the
interval comes within --resolution of 1.0 it says "no difference": code that is the same but lies elsewhere in memory
differs by a percent or two. Exit code 0: nothing is slower. 1: a case is slower by more than --threshold and differs,
or a case fails in this tree. 2: the arguments cannot be used.

    --only NAME       only cases whose name the regular expression matches
    --threshold 1.1   how many times as long a case may take
    --resolution 1.02 how many times as long is no difference yet
    --launches 5      pairs of processes
    --rounds 15       turns of each process per case
    --threads 1       of each process
    --json FILE       all ratios
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.intervals import Interval, launches_interval
from benchmarks.tracked import TRACKED, Tracked

ROOT = Path(__file__).resolve().parents[1]
BATCH_SECONDS = 0.02
# The same commit against itself, both copied anew: its cases' ratios lie within this.
RESOLUTION = 1.02


class Failed(Exception):
    """A message for the user."""


# Two trees ------------------------------------------------------------------------------------------------------------


def lay_out(files: Path, target: Path, benchmarks: Path) -> Path:
    """A folder to run from: `fastflow` with the kernels inside, as it is installed, and the frozen `benchmarks`."""
    shutil.copytree(files / "fastflow", target / "fastflow")
    shutil.copytree(files / "kernels", target / "fastflow" / "kernels", dirs_exist_ok=True)
    shutil.copytree(benchmarks, target / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__"))
    return target


def checkout(root: Path, ref: str, target: Path) -> str:
    """Writes `fastflow` and `kernels` of a commit under `target`; returns the commit's short name.

    Raises:
        Failed: no such commit, or it has no such folders.
    """
    commit = _git(root, "rev-parse", "--short=10", "--verify", "--quiet", f"{ref}^{{commit}}")
    if commit is None:
        raise Failed(f"BASE must be a commit of {root}, got {ref!r}")
    archive = target.with_suffix(".zip")
    if _git(root, "archive", "--format=zip", f"--output={archive}", commit, "fastflow", "kernels") is None:
        raise Failed(f"{ref!r} has no folders fastflow and kernels")
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(target)
    archive.unlink()
    return commit


def _git(root: Path, *arguments: str) -> str | None:
    return machine.run(["git", "-C", str(root), *arguments])


# Two processes --------------------------------------------------------------------------------------------------------


class Worker:
    """A process that runs the code of one folder.

    Args:
        folder: made by `lay_out`.
        device, threads: what it runs on.
    """

    def __init__(self, folder: Path, device: str, threads: int) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(folder),
            "OMP_NUM_THREADS": str(threads),
            # Threads that spin while the other process has its turn would take the machine from it.
            "OMP_WAIT_POLICY": "passive",
        }
        options = ["--device", device, "--threads", str(threads)]
        command = [sys.executable, "-m", "benchmarks.compare_worker", *options]
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request; {"error": ...} where the process is gone."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            return {"error": f"the process ended with exit code {self.process.wait()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


@contextlib.contextmanager
def _pair(folders: tuple[Path, Path], device: str, threads: int) -> Iterator[tuple[Worker, Worker]]:
    workers = [Worker(folder, device, threads) for folder in folders]
    try:
        yield workers[0], workers[1]
    finally:
        for worker in workers:
            worker.close()


# The comparison -------------------------------------------------------------------------------------------------------


class Outcome:
    """What was measured of one case.

    Attributes:
        old, new: seconds per call, by launch and round. errors: why there are none, of "old" or "new".
        resolution: how many times as long is no difference yet.
    """

    def __init__(self, name: str, title: str, resolution: float = RESOLUTION) -> None:
        self.name, self.title, self.resolution = name, title, resolution
        self.old: list[list[float]] = []
        self.new: list[list[float]] = []
        self.errors: dict[str, str] = {}

    @property
    def ratio(self) -> Interval | None:
        """New / old, or None where one of them did not run."""
        if self.errors or not self.old:
            return None
        return launches_interval([_quotients(*launch) for launch in zip(self.old, self.new, strict=True)])

    @property
    def same(self) -> bool:
        """Whether old and new were measured and no difference was seen."""
        ratio = self.ratio
        return ratio is not None and ratio.low <= self.resolution and ratio.high >= 1 / self.resolution

    def slower(self, threshold: float) -> bool:
        """Whether the new code takes more than `threshold` times as long, beyond chance."""
        ratio = self.ratio
        return ratio is not None and ratio.middle > threshold and not self.same

    def verdict(self, threshold: float) -> str:
        """In words."""
        ratio = self.ratio
        if "new" in self.errors:
            return f"fails: {self.errors['new']}"
        if ratio is None:
            return f"only new: {self.errors.get('old', 'not measured')}"
        if self.same:
            return "no difference"
        if self.slower(threshold):
            return "SLOWER"
        return "slower, within the threshold" if ratio.middle > 1 else "faster"

    def as_json(self) -> dict[str, Any]:
        """All that was measured."""
        found = None if self.ratio is None else self.ratio._asdict()
        if found is not None and math.isinf(found["high"]):
            found = {"middle": found["middle"]}
        return {"title": self.title, "ratio": found, "old": self.old, "new": self.new, "errors": self.errors}


def _quotients(old: Sequence[float], new: Sequence[float]) -> list[float]:
    """New / old of a launch, one for two rounds.

    Who goes first changes from round to round, so each has its turn directly behind its own last one once in two
    rounds, and finds its caches warm: a tenth to a third faster. The first round has no such turn and is left out.
    """
    if len(old) < 3:
        return [sum(new) / sum(old)]
    return [(new[i] + new[i + 1]) / (old[i] + old[i + 1]) for i in range(1, len(old) - 1, 2)]


def measure(workers: tuple[Worker, Worker], outcome: Outcome, rounds: int) -> None:
    """One launch of one case: both prepare, then take turns."""
    once = []
    for side, worker in zip(("old", "new"), workers, strict=True):
        answer = worker.ask(prepare=outcome.name)
        if "error" in answer:
            outcome.errors[side] = answer["error"]
            return
        once.append(answer["once"])
    # The same number of calls for both: a batch's fixed cost is shared alike.
    calls = max(1, min(5000, round(BATCH_SECONDS / max(min(once), 1e-9))))
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds):
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            answer = workers[side].ask(time=calls)
            if "error" in answer:
                outcome.errors["new" if side else "old"] = answer["error"]
                return
            times[side].append(answer["seconds"])
    outcome.old.append(times[0])
    outcome.new.append(times[1])


def compare(
    folders: tuple[Path, Path],
    cases: Sequence[Tracked],
    *,
    launches: int,
    rounds: int,
    device: str,
    threads: int,
    out: Callable[[str], None],
    resolution: float = RESOLUTION,
) -> list[Outcome]:
    """Old against new, all cases in every launch."""
    outcomes = [Outcome(case.name, case.title, resolution) for case in cases]
    for launch in range(launches):
        # The process that starts first may get the better memory: they take turns at it.
        flipped = launch % 2 == 1
        with _pair(folders[::-1] if flipped else folders, device, threads) as pair:
            workers = pair[::-1] if flipped else pair
            for outcome in outcomes:
                if not outcome.errors:
                    measure(workers, outcome, rounds)
        out(f"launch {launch + 1} of {launches}")
    return outcomes


def table(outcomes: Sequence[Outcome], threshold: float) -> str:
    """A line per case."""
    rows = [("case", "old, us", "new, us", "new / old (95 %)", "")]
    for outcome in outcomes:
        ratio = outcome.ratio
        if ratio is None:
            cells = ("", "", "")
        else:
            old, new = (statistics.median([s for each in side for s in each]) for side in (outcome.old, outcome.new))
            interval = f"{ratio.middle:.3f}"
            if not math.isinf(ratio.high):
                interval += f" ({ratio.low:.3f} to {ratio.high:.3f})"
            cells = (f"{1e6 * old:,.1f}", f"{1e6 * new:,.1f}", interval)
        rows.append((outcome.name, *cells, outcome.verdict(threshold)))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = []
    for name, old, new, interval, verdict in rows:
        numbers = f"{old:>{widths[1]}}  {new:>{widths[2]}}  {interval:<{widths[3]}}"
        lines.append(f"{name:<{widths[0]}}  {numbers}  {verdict}".rstrip())
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description="Is this tree slower?")
    parser.add_argument("base", metavar="BASE", help="git ref of the old code")
    parser.add_argument("--only", default="", help="regular expression for names")
    parser.add_argument("--threshold", type=float, default=1.1, help="how many times as long a case may take")
    parser.add_argument("--resolution", type=float, default=RESOLUTION, help="how many times as long is no difference")
    parser.add_argument("--launches", type=int, default=5, help="pairs of processes")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each process per case")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--device", default=None, help="by default cuda where there is one")
    parser.add_argument("--tree", type=Path, default=ROOT, help="checkout with the new code")
    parser.add_argument("--json", type=Path, default=None, help="file for all ratios")
    given = parser.parse_args(arguments)
    for name in ("launches", "rounds", "threads"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(given, name)}")
    for name in ("threshold", "resolution"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(given, name)}")
    try:
        cases = [case for name, case in TRACKED.items() if re.search(given.only, name)]
    except re.error as error:
        parser.error(f"--only is no regular expression: {error}")
    if not cases:
        parser.error(f"--only matches none of {', '.join(TRACKED)}")
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(prefix="fastflow-compare-") as folder:
        try:
            old = Path(folder) / "checkout"
            commit = checkout(given.tree, given.base, old)
            folders = (
                lay_out(old, Path(folder) / "old", ROOT / "benchmarks"),
                lay_out(given.tree, Path(folder) / "new", ROOT / "benchmarks"),
            )
        except (Failed, OSError) as error:
            print(f"python -m benchmarks.compare: {error}", file=sys.stderr)
            return 2
        print(f"old: {commit} ({given.base}); new: the working tree; {len(cases)} cases on {device}", flush=True)
        outcomes = compare(
            folders,
            cases,
            launches=given.launches,
            rounds=given.rounds,
            device=device,
            threads=given.threads,
            out=lambda text: print(text, flush=True),
            resolution=given.resolution,
        )
    print(table(outcomes, given.threshold))
    same = sum(o.same for o in outcomes)
    bad = [o.name for o in outcomes if o.slower(given.threshold) or "new" in o.errors]
    print(f"no difference in {same} of {len(outcomes)} cases", end="")
    print(f"; slower than {given.threshold:g} times or failing: {', '.join(bad)}" if bad else "")
    if given.json is not None:
        from fastflow.atomic import atomic_write

        with atomic_write(given.json) as temporary:
            report = {"base": commit, "cases": {o.name: o.as_json() for o in outcomes}}
            temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
