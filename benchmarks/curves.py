"""Panels of time over an axis, by everyone, on logarithmic axes: what the figures of a CPU's and a GPU's run share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastflow.atomic import atomic_write

Point = tuple[int, float, float, float]  # n, median, p20, p80 in milliseconds


class Panel(NamedTuple):
    """One pair of axes.

    Args:
        label: of its axis. title: what is the same for all its points. ticks: from 1 on, each `base` times the one
            before.
        series: points by names of `draw`'s lines. floor: milliseconds by n.
    """

    label: str
    title: str
    base: int
    ticks: Sequence[int]
    series: Mapping[str, Sequence[Point]]
    floor: Mapping[int, float] = {}


def draw(
    panels: Sequence[Panel], lines: Mapping[str, tuple[str, str, str, str]], title: str, height: float, path: Path
) -> None:
    """Write the figure; its format is that of the path's suffix.

    Args:
        lines: by name: label, colour, mark, and style of the line.
        title: above everything. height: in inches.

    Raises:
        ImportError: no matplotlib.
    """
    import matplotlib
    import matplotlib.figure

    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "font.size": 9.5}
    with matplotlib.rc_context(style):
        figure = matplotlib.figure.Figure(figsize=(10.5, height), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True)
        for ax, panel in zip(axes, panels):
            for name, (text, color, mark, line) in lines.items():
                if panel.series.get(name):
                    n, median, p20, p80 = zip(*panel.series[name])
                    options = {"color": color, "marker": mark, "linestyle": line, "markersize": 4.5, "linewidth": 1.4}
                    ax.plot(n, median, label=text, **options)
                    ax.fill_between(n, p20, p80, color=color, alpha=0.15, lw=0)
            if panel.floor:
                ax.plot(panel.floor.keys(), panel.floor.values(), color="#888888", linewidth=1.0, label="floor")
            logarithmic(ax, panel.label, panel.ticks, panel.base)
            ax.set_title(panel.title)
        axes[0].set_ylabel("milliseconds per walk (median, 20th to 80th percentile)")
        axes[1].tick_params(labelleft=True)
        handles = {line.get_label(): line for ax in axes for line in ax.get_lines()}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False)
        figure.suptitle(title, fontsize=10.5)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, dpi=150, format=path.suffix[1:])


def logarithmic(ax: Any, label: str, ticks: Sequence[int], base: int = 2) -> None:
    """Both axes logarithmic, with plain numbers at the ticks."""
    import matplotlib.ticker

    ax.set_xscale("log", base=base)
    ax.set_yscale("log")
    ax.set_xticks(ticks)
    ax.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
    ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    ax.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda y, _: f"{y:g}"))
    ax.grid(True, color="#e6e6e6")
    ax.set_xlabel(label)
