"""python -m benchmarks.quality EXPERIMENT.csv --times BREAKDOWN.json: what another step buys, and what it costs.

One figure over K: a metric of an experiment's runs (interquartile mean over seeds and its 95 % bootstrap interval), and
the time of one update as `benchmarks.breakdown` measured it, by fastflow and by eager PyTorch.

    --metric success    a column of the experiment's file
    --label WORDS       what the figure calls it
    --group floq        only arms of this group
    --output FILE       by default the experiment's file with -cost.png
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.intervals import Interval
from benchmarks.scaling_figure import place
from fastflow.atomic import atomic_write
from fastflow.evaluate import bootstrap_interval, interquartile_mean

_COLORS = {"fastflow": "#0072B2", "eager": "#D55E00"}


def read(path: Path, metric: str, group: str | None) -> dict[int, Interval]:
    """By K, the metric of an experiment's runs.

    Raises:
        ValueError: no such column, or no run with a K.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and metric not in rows[0]:
        raise ValueError(f"--metric: expected a column of {path}, one of {', '.join(rows[0])}, got {metric!r}")
    values: dict[int, list[float]] = {}
    for row in rows:
        if row["x"] and row[metric] and group in (None, row["group"]):
            values.setdefault(round(float(row["x"])), []).append(float(row[metric]))
    if not values:
        raise ValueError(f"{path}: expected runs with a number of steps, got none")
    return {k: _interval(sample) for k, sample in sorted(values.items())}


def _interval(sample: list[float]) -> Interval:
    low, high = bootstrap_interval([sample], interquartile_mean)
    return Interval(float(interquartile_mean(sample)), low, high)


def draw(quality: Mapping[int, Interval], times: Mapping[str, Any], label: str, path: Path) -> Path:
    """Write the figure; returns its path.

    Raises:
        ImportError: no matplotlib.
    """
    import matplotlib.figure
    import matplotlib.ticker

    figure = matplotlib.figure.Figure(figsize=(8, 4.8), layout="constrained")
    ax = figure.subplots()
    cost = ax.twinx()
    k = list(quality)
    low, high = ([getattr(value, end) for value in quality.values()] for end in ("low", "high"))
    middle = [value.middle for value in quality.values()]
    bars = [[m - a for m, a in zip(middle, low)], [b - m for m, b in zip(middle, high)]]
    ax.errorbar(k, middle, bars, color="#009E73", marker="o", capsize=3, label=label)
    for name, color in _COLORS.items():
        points = [(bar["steps"], bar["update_ms"]) for bar in times["bars"] if bar["name"] == name]
        cost.plot(*zip(*points, strict=True), color=color, marker="s", ls="--", label=f"one update, {name}")
    ax.set_xscale("log", base=2)
    ax.set_xticks(sorted({*k, *(bar["steps"] for bar in times["bars"])}))
    ax.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    ax.set_xlabel("K, steps of the critic's walk")
    ax.set_ylabel(label)
    cost.set_ylabel("milliseconds of one update")
    cost.set_ylim(bottom=0)
    ax.grid(True, color="#e6e6e6")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"time: {times['update']}, {place(times)}", fontsize=9)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix[1:])
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__, formatter_class=style)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--times", type=Path, required=True)
    parser.add_argument("--metric", default="success")
    parser.add_argument("--label")
    parser.add_argument("--group")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args(arguments)
    try:
        quality = read(given.experiment, given.metric, given.group)
        times = json.loads(given.times.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"python -m benchmarks.quality: {error}", file=sys.stderr)
        return 2
    target = given.output or given.experiment.with_name(given.experiment.stem + "-cost.png")
    print(draw(quality, times, given.label or given.metric, target))
    return 0


if __name__ == "__main__":
    sys.exit(main())
