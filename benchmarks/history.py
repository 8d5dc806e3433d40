"""python -m benchmarks.history FILE: a machine's measurements over commits, as a figure.

Every run of `benchmarks.cpu` and `benchmarks.gpu` adds one line of JSON to history-<machine>.jsonl beside its own file:
when, which commit (and whether there were changes), versions, and fastflow's medians in microseconds by measurement and
entrant. Lines of different machines are never in one file, because nothing follows from comparing them; lines of
different days say little more, because a shared machine drifts by tens of percent. They show where to look;
`benchmarks.compare` tells whether there is something to see.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from fastflow.atomic import atomic_write


def line_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a run's report (of `cpu` or `gpu`)."""
    medians: dict[str, float] = {}
    for name, measured in (*report.get("measurements", {}).items(), *report.get("curves", {}).items()):
        for entrant in measured["entrants"]:
            if entrant["rival"] == "fastflow" and "median_us" in entrant:
                medians[f"{name} {entrant['name'].removeprefix('fastflow ')}"] = entrant["median_us"]
    for name, case in (*report.get("cases", {}).items(), *report.get("updates", {}).items()):
        for row in case["results"]:
            if row["rival"] == "fused" and row.get("median_us"):
                medians[f"{name} {row['precision']} {row['mode']}"] = row["median_us"]
    return {
        "started": report["started"],
        "commit": report["repository"]["commit"] or report["repository"]["sources"],
        "dirty": report["repository"]["dirty"],
        "torch": report["software"]["torch"],
        "medians_us": medians,
    }


def append(report: Mapping[str, Any], folder: Path) -> Path | None:
    """Adds the run's line to its machine's file; returns the file, or None where nothing of fastflow was measured."""
    line = line_of(report)
    if not line["medians_us"]:
        return None
    path = folder / f"history-{machine.name_of(report['hardware'])}.jsonl"
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    with atomic_write(path) as temporary:
        temporary.write_text(before + json.dumps(line) + "\n", encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """The lines, oldest first.

    Raises:
        ValueError: a line that is no JSON object of a run, with its number.
    """
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            float(sum(line["medians_us"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not a run's line ({error})") from error
        lines.append(line)
    return sorted(lines, key=lambda line: line["started"])


def draw(lines: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Medians over runs, each relative to its first; measurements that occur in two runs or more.

    Raises:
        ValueError: nothing was measured twice.
    """
    import matplotlib.figure
    import matplotlib.ticker

    names = sorted({name for line in lines for name in line["medians_us"]})
    curves = {name: [line["medians_us"].get(name, math.nan) for line in lines] for name in names}
    curves = {name: values for name, values in curves.items() if sum(not math.isnan(v) for v in values) > 1}
    if not curves:
        raise ValueError("nothing to draw: no measurement occurs in two runs")
    figure = matplotlib.figure.Figure(figsize=(10, 5.2), layout="constrained")
    ax = figure.subplots()
    for name, values in curves.items():
        first = next(v for v in values if not math.isnan(v))
        ax.plot(range(len(lines)), [v / first for v in values], marker="o", markersize=3.5, linewidth=1.2, label=name)
    ax.axhline(1.0, color="#888888", linewidth=0.8)
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda y, _: f"{y:g}"))
    labels = [f"{line['commit']}{'*' if line['dirty'] else ''}\n{line['started'][:10]}" for line in lines]
    ax.set_xticks(range(len(lines)), labels, fontsize=8)
    ax.set_ylabel("median, relative to the first run (below 1: faster)")
    ax.set_title(title, loc="left", fontsize=10.5)
    ax.grid(True, color="#e6e6e6")
    figure.legend(loc="outside right upper", frameon=False, fontsize=7)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.history", description="Measurements over commits.")
    parser.add_argument("file", type=Path, help="history-<machine>.jsonl")
    parser.add_argument("--output", type=Path, default=None, help="by default FILE with .png")
    given = parser.parse_args(arguments)
    target = given.output or given.file.with_suffix(".png")
    try:
        draw(read(given.file), target, given.file.stem.removeprefix("history-"))
    except (OSError, ValueError) as error:
        print(f"python -m benchmarks.history: {error}", file=sys.stderr)
        return 2
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
