"""The figure of the CPU table: what a walk takes over K and over rows, by everyone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import curves
from benchmarks.cpu_rows import CURVE_FROM_TABLE

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


def series(report: Mapping[str, Any], axis: str) -> dict[str, list[curves.Point]]:
    """By rival and precision: (n, median, p20, p80) in milliseconds, in order of n; its fastest variant at each n."""
    prefix, table = f"curve-{axis}-", report["measurements"]
    points = {int(name[len(prefix) :]): point for name, point in report["curves"].items() if name.startswith(prefix)}
    points |= {n: table[name] for n, name in CURVE_FROM_TABLE[axis].items() if name in table}
    out: dict[str, list[curves.Point]] = {}
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
    panels = [
        curves.Panel(label, title, base, [base**i for i in range(7)], series(report, axis))
        for axis, (label, title, base) in PANELS.items()
    ]
    hardware, software = report["hardware"], report["software"]
    versions = f"torch {software['torch']}, jax {software['jax']}"
    place = f"{hardware['cpu']}, {hardware['cpu_cores']} cores; {versions}"
    curves.draw(panels, LINES, f"floq critic walk, 4 x 512, HL-Gauss: {place}", 4.6, path)
