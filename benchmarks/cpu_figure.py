"""The figure of the CPU table: what a walk takes over K and over rows, by everyone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.cpu_rows import CURVE_FROM_TABLE
from fastflow.atomic import atomic_write

# Okabe and Ito's palette, and marks of their own: told apart with any colour vision, and in print.
LINES = {
    "fastflow bf16": ("fastflow, bf16", "#0072B2", "o", "-"),
    "fastflow fp32": ("fastflow, fp32", "#56B4E9", "s", "-"),
    "jax fp32": ("JAX jit, fp32", "#009E73", "^", "--"),
    "compile fp32": ("torch.compile, fp32", "#E69F00", "D", "--"),
    "eager fp32": ("eager PyTorch, fp32", "#D55E00", "v", "--"),
}
# By axis: its label, what is the same for all its points, and the base of its seven ticks.
PANELS = {
    "steps": ("K, steps of the walk", "2 nets x 256 rows", 2),
    "rows": ("rows per net", "2 nets, K = 8", 4),
}


def series(report: Mapping[str, Any], axis: str) -> dict[str, list[tuple[int, float, float, float]]]:
    """By rival and precision: (n, median, p20, p80) in milliseconds, in order of n; its fastest variant at each n."""
    prefix, table = f"curve-{axis}-", report["measurements"]
    points = {int(name[len(prefix) :]): point for name, point in report["curves"].items() if name.startswith(prefix)}
    points |= {n: table[name] for n, name in CURVE_FROM_TABLE[axis].items() if name in table}
    out: dict[str, list[tuple[int, float, float, float]]] = {}
    for n, measured in sorted(points.items()):
        fastest: dict[str, tuple[float, float, float]] = {}
        for entrant in measured["entrants"]:
            name = f"{entrant['rival']} {entrant['precision']}"
            if "median_us" in entrant:
                median, p20, p80 = (1e-3 * entrant[f"{key}_us"] for key in ("median", "p20", "p80"))
                fastest[name] = min((median, p20, p80), fastest.get(name, (math.inf, 0.0, 0.0)))
        for name, times in fastest.items():
            out.setdefault(name, []).append((n, *times))
    return out


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Write the figure; its format is that of the path's suffix.

    Raises:
        ImportError: no matplotlib.
    """
    import matplotlib
    import matplotlib.figure
    import matplotlib.ticker

    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "font.size": 9.5}
    with matplotlib.rc_context(style):
        figure = matplotlib.figure.Figure(figsize=(10.5, 4.6), layout="constrained")
        axes = figure.subplots(1, len(PANELS), sharey=True)
        for ax, (axis, (label, title, base)) in zip(axes, PANELS.items()):
            found = series(report, axis)
            for name, (text, color, mark, line) in LINES.items():
                points = found.get(name, [])
                if points:
                    n, median, p20, p80 = zip(*points)
                    options = {"color": color, "marker": mark, "linestyle": line, "markersize": 4.5, "linewidth": 1.4}
                    ax.plot(n, median, label=text, **options)
                    ax.fill_between(n, p20, p80, color=color, alpha=0.15, lw=0)
            ax.set_xscale("log", base=base)
            ax.set_yscale("log")
            ax.set_xticks([base**i for i in range(7)])
            ax.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
            ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
            ax.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
            ax.grid(True, color="#e6e6e6")
            ax.set_xlabel(label)
            ax.set_title(title)
        axes[0].set_ylabel("milliseconds per walk (median, 20th to 80th percentile)")
        axes[1].tick_params(labelleft=True)
        handles = {line.get_label(): line for ax in axes for line in ax.get_lines()}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(LINES), frameon=False)
        hardware, software = report["hardware"], report["software"]
        versions = f"torch {software['torch']}, jax {software['jax']}"
        figure.suptitle(
            f"floq critic walk, 4 x 512, HL-Gauss: {hardware['cpu']}, {hardware['cpu_cores']} cores; {versions}",
            fontsize=10.5,
        )
        with atomic_write(path) as temporary:
            figure.savefig(temporary, dpi=150)
