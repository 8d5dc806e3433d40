"""python -m benchmarks.gpu_figure FILE.json: the figure of a GPU's run: what a walk takes over K and over rows.

By fastflow and every rival, in milliseconds on logarithmic axes, with the floor that FLOPs and bytes leave. It is drawn
from a file of `make gpu`, which draws it too, and written beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import curves
from benchmarks.cases import NUM_ROWS, NUM_STEPS
from benchmarks.gpu_goals import PRECISION

# Okabe and Ito's palette, and marks of their own: told apart with any colour vision, and in print.
LINES = {
    "fused graph": ("fastflow, CUDA graph", "#0072B2", "o", "-"),
    "fused call": ("fastflow", "#56B4E9", "s", "-"),
    "compile max-autotune call": ("torch.compile, max-autotune", "#E69F00", "D", "--"),
    "compile reduce-overhead call": ("torch.compile, CUDA graph", "#CC79A7", "P", "--"),
    "compile call": ("torch.compile", "#F0E442", "X", "--"),
    "jax call": ("JAX jit, scan", "#009E73", "^", "--"),
    "jax unrolled call": ("JAX jit, unrolled", "#000000", "d", "--"),
    "eager graph": ("eager PyTorch, CUDA graph", "#888888", "v", ":"),
    "eager call": ("eager PyTorch", "#D55E00", "v", "--"),
}
# By axis: its label, what is the same for all its points, its ticks, and the case of each.
PANELS = {
    "steps": ("K, steps of the walk", "2 nets x 2,048 rows", NUM_STEPS, "walk-2x2048-k{}"),
    "rows": ("rows per net", "2 nets, K = 8", NUM_ROWS, "walk-2x{}"),
}


def points(report: Mapping[str, Any], axis: str) -> dict[int, Mapping[str, Any]]:
    """The measured cases of a panel, by K or rows."""
    _, _, ticks, name = PANELS[axis]
    names = {n: "walk-2x2048" if axis == "steps" and n == 8 else name.format(n) for n in ticks}
    return {n: report["cases"][key] for n, key in names.items() if report["cases"].get(key, {}).get("results")}


def series(report: Mapping[str, Any], axis: str) -> dict[str, list[curves.Point]]:
    """By rival and mode: (n, median, p20, p80) in milliseconds, in order of n; the last measurement of each."""
    out: dict[str, list[curves.Point]] = {}
    for n, case in points(report, axis).items():
        latest = {}
        for row in case["results"]:
            if row["precision"] == PRECISION and row["accurate"]:
                latest[f"{row['rival']} {row['mode']}"] = row
        for name, row in latest.items():
            median, p20, p80 = (1e-3 * row[f"{key}_us"] for key in ("median", "p20", "p80"))
            out.setdefault(name, []).append((n, median, p20, p80))
    return out


def draw(report: Mapping[str, Any], path: Path) -> Path:
    """Write the figure; its format is that of the path's suffix. Returns the path.

    Raises:
        ImportError: no matplotlib.
        ValueError: nothing was measured.
    """
    panels = []
    for axis, (label, title, ticks, _) in PANELS.items():
        floors = {n: case["floor_us"].get(PRECISION) for n, case in points(report, axis).items()}
        floor = {n: 1e-3 * us for n, us in floors.items() if us}
        panels.append(curves.Panel(label, title, 2, ticks, series(report, axis), floor))
    if not any(panel.series for panel in panels):
        raise ValueError("nothing to draw: no walk over K or rows was measured")
    curves.draw(panels, LINES, _title(report), 4.8, path)
    return path


def _title(report: Mapping[str, Any]) -> str:
    hardware, software, repository = report["hardware"], report["software"], report["repository"]
    device = hardware.get("gpu") or "a CPU, for trying the program"
    small = "small sizes, no measurement; " if report.get("small") else ""
    versions = f"torch {software['torch']}, triton {software['triton']}"
    commit = repository["commit"] or repository["sources"]
    return f"floq critic walk, 4 x 512, HL-Gauss, {PRECISION} products: {small}{device}; {versions}; commit {commit}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_figure", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="of make gpu")
    parser.add_argument("--output", type=Path, help="by default FILE with .png")
    given = parser.parse_args(arguments)
    try:
        report = json.loads(given.file.read_text(encoding="utf-8"))
        print(draw(report, given.output or given.file.with_suffix(".png")))
    except (OSError, ValueError, KeyError, ImportError) as error:
        print(f"python -m benchmarks.gpu_figure: {given.file}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
