"""python -m benchmarks.cpu: the table of a CPU, fastflow beside JAX, torch.compile and eager PyTorch.

Prints the table with every goal beside what was measured, and writes it with all that was measured into results/:
cpu-<machine>-<date>.json, .md and .png. Every measurement is a process of its own (`cpu_row`); the files are written
anew after each, and those of --quick and --only have names of their own. Exit code 0: measured, whether goals are met
or not. 1: fastflow was wrong, or nothing could be measured.

    --quick         the table without torch.compile, within 3 minutes: what that is too short for is left out by name
    --only NAME     only measurements whose name the regular expression matches; no figure unless it matches "curve"
    --threads N     all on so many processors, those that have a number of their own excepted
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Seconds of a profile as a whole, behind which nothing is prepared, and shares of a measurement's time.
FULL_SECONDS, QUICK_SECONDS = 840.0, 150.0
FULL_SHARE, QUICK_SHARE = 1.0, 0.25
# Seconds that each panel of the figure may take; points are measured in order until then.
CURVE_SECONDS = 75.0
# What a measurement takes besides torch.compile and the clock: imports, the check in float64, XLA.
CHECK_SECONDS = 75.0
# A process that does not end by itself is given so much more.
PATIENCE_SECONDS = 45.0


class Run:
    """One run of the command.

    Args:
        arguments: the parsed command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        from benchmarks import cpu_report

        self.arguments, self.began = arguments, time.monotonic()
        self.limit = QUICK_SECONDS if arguments.quick else FULL_SECONDS
        self.without = ["compile", "eager baddbmm"] if arguments.quick else []
        profile = "quick" if arguments.quick else "full"
        self.report = cpu_report.new(f"{profile}, only {arguments.only.pattern}" if arguments.only else profile)

    def left(self) -> float:
        """Seconds until the run should be over."""
        return self.limit - (time.monotonic() - self.began)

    def write(self) -> Path:
        """Both files as of now; returns the JSON file's path."""
        from benchmarks import cpu_report

        self.report["seconds"] = round(time.monotonic() - self.began, 1)
        self.report["table"] = cpu_report.table(self.report["measurements"])
        return cpu_report.write(self.report, self.arguments.output)

    def skip(self, where: str, reason: str) -> None:
        """Record what was left out, and say so."""
        self.report["skipped"].append({"where": where, "reason": reason})
        print(f"  left out {where}: {reason}", flush=True)

    def measure(self, name: str, threads: int | None, seconds: float) -> list[dict[str, Any]]:
        """What `cpu_row` measures under this name within `seconds`, or what is left of the run, as far as it comes."""
        seconds = min(seconds, self.left())
        if seconds < 5:
            self.skip(name, f"the {self.limit:.0f} s of this run are over")
            return []
        print(f"[{time.monotonic() - self.began:4.0f} s] {name}", flush=True)
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        share = QUICK_SHARE if self.arguments.quick else FULL_SHARE
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "results.json"
            command = [sys.executable, "-m", "benchmarks.cpu_row", name, "--output", str(path), "--share", str(share)]
            command += ["--seconds", str(seconds)]
            command += ["--threads", str(threads)] if threads else []
            command += ["--without", *self.without] if self.without else []
            options: dict[str, Any] = {"cwd": ROOT, "env": environment, "stdin": subprocess.DEVNULL, "check": False}
            try:
                done = subprocess.run(command, timeout=seconds + PATIENCE_SECONDS, **options)
            except subprocess.TimeoutExpired:
                self.skip(name, f"not done within {seconds:.0f} s")
            else:
                if done.returncode:
                    self.skip(name, f"ended with exit code {done.returncode}")
            results: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        for result in results:
            for skipped in result["skipped"]:
                self.skip(f"{result['name']} {skipped['entrant']}", skipped["reason"])
        return results


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="without torch.compile and the figure, few rounds")
    parser.add_argument("--only", type=_pattern, metavar="NAME", help="a regular expression of measurements")
    parser.add_argument("--threads", type=_count, metavar="N", help="use so many processors")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="where the files go")
    return parser.parse_args(arguments)


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"--only must be a regular expression, got {text!r}: {error}") from error


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"--threads must be a positive number, got {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    from benchmarks import cpu_figure, cpu_report, history
    from benchmarks.cpu_rows import LAST, MEASUREMENTS

    given = parse(arguments)
    run = Run(given)
    wanted = [m for m in MEASUREMENTS.values() if given.only is None or given.only.search(m.name)]
    curves = [f"curve-{axis}" for axis in cpu_figure.PANELS]
    curves = [name for name in curves if (given.only.search(name) if given.only else not given.quick)]
    if not wanted and not curves:
        names = ", ".join([*MEASUREMENTS, "curve-steps", "curve-rows"])
        print(f"benchmarks.cpu: --only matches none of {names}", file=sys.stderr)
        return 2
    last = [m for m in wanted if m.name == LAST]
    for task in (*(m for m in wanted if m.name != LAST), *curves, *last):
        if isinstance(task, str):
            results = run.measure(task, given.threads, CURVE_SECONDS)
            run.report["curves"] |= {result["name"]: result for result in results}
        else:
            compilers = sum(way[0] == "compile" and way[0] not in run.without for way in task.ways)
            seconds = CHECK_SECONDS + 2 * task.seconds + compilers * task.prepare_seconds
            results = run.measure(task.name, task.threads or given.threads, seconds)
            run.report["measurements"] |= {result["name"]: result for result in results}
        run.write()
    run.report["complete"] = True
    path = run.write()
    if run.report["curves"]:
        try:
            cpu_figure.draw(run.report, path.with_suffix(".png"))
        except ImportError as error:
            run.skip("figure", str(error))
            run.write()
    history.append(run.report, path.parent)
    print("\n" + cpu_report.markdown(run.report) + f"\n{path}", flush=True)
    ours = [e for m in run.report["measurements"].values() for e in m["entrants"] if e["rival"] == "fastflow"]
    if wanted and not ours:
        print("benchmarks.cpu: nothing of fastflow could be measured", file=sys.stderr)
        return 1
    wrong = [e["name"] for e in ours if not e["accurate"]]
    if wrong:
        print(f"benchmarks.cpu: {len(wrong)} results of fastflow are wrong, see the file", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
