"""The figure of a scaling run: time over the axis by everyone, the floor, and how many times as long as fastflow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.curves import logarithmic
from fastflow.atomic import atomic_write

# Okabe and Ito's palette, and marks of their own: told apart with any colour vision, and in print.
_STYLES = (
    ("#0072B2", "o"),
    ("#D55E00", "v"),
    ("#009E73", "^"),
    ("#E69F00", "D"),
    ("#CC79A7", "s"),
    ("#56B4E9", "P"),
    ("#888888", "X"),
    ("#000000", "d"),
)
_LABELS = {"steps": "K, steps of the walk", "rows": "rows of cond", "width": "width of the hidden layers"}


def draw(results: Mapping[str, Any], path: Path) -> Path:
    """Write the figure; its format is that of the path's suffix. Returns the path.

    Raises:
        ImportError: no matplotlib.
        ValueError: nothing was timed.
    """
    import matplotlib
    import matplotlib.figure

    points = [point for point in results["points"] if point["entrants"]]
    if not points:
        raise ValueError("nothing to draw: no point was timed")
    names = list(dict.fromkeys(name for point in points for name in point["entrants"]))
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9.5}):
        figure = matplotlib.figure.Figure(figsize=(10.5, 4.6), layout="constrained")
        time, times = figure.subplots(1, 2)
        for (color, mark), name in zip(_STYLES, names, strict=False):
            there = [point for point in points if name in point["entrants"]]
            n = [point["n"] for point in there]
            line = {"color": color, "marker": mark, "markersize": 4.5, "linewidth": 1.4}
            for ax, key, scale in ((time, "us", 1e-3), (times, "times", 1.0)):
                values = [point["entrants"][name][key] for point in there]
                low, high = ([scale * value[end] for value in values] for end in ("low", "high"))
                ax.plot(n, [scale * value["middle"] for value in values], label=name, **line)
                ax.fill_between(n, low, high, color=color, alpha=0.15, lw=0)
        ticks = [point["n"] for point in points]
        time.plot(ticks, [1e-3 * point["floor_us"] for point in points], color="#888888", ls=":", label="floor")
        time.set_ylabel("milliseconds per call (median, 95 % interval)")
        times.set_ylabel("times as long as fastflow")
        for ax in (time, times):
            logarithmic(ax, _LABELS[results["axis"]], ticks)
        figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
        figure.suptitle(f"{results['case']}: {results['title']}\n{place(results)}", fontsize=10)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, dpi=150, format=path.suffix[1:])
    return path


def place(results: Mapping[str, Any]) -> str:
    """Where and of what commit a result is."""
    hardware, software, repository = results["hardware"], results["software"], results["repository"]
    device = hardware.get("gpu") or f"{hardware['cpu']}, {results['threads']} of {hardware['cpu_cores']} cores"
    commit = f"{repository['commit'] or repository['sources']}{' and changes' if repository['dirty'] else ''}"
    return f"{device}; {results['precision']} products; torch {software['torch']}; commit {commit}"
