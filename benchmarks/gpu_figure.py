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

from benchmarks.cases import NUM_ROWS, NUM_STEPS
from benchmarks.gpu_goals import PRECISION
from fastflow.atomic import atomic_write

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
Point = tuple[int, float, float, float]


def points(report: Mapping[str, Any], axis: str) -> dict[int, Mapping[str, Any]]:
    """The measured cases of a panel, by K or rows."""
    _, _, ticks, name = PANELS[axis]
    names = {n: "walk-2x2048" if axis == "steps" and n == 8 else name.format(n) for n in ticks}
    return {n: report["cases"][key] for n, key in names.items() if report["cases"].get(key, {}).get("results")}


def series(report: Mapping[str, Any], axis: str) -> dict[str, list[Point]]:
    """By rival and mode: (n, median, p20, p80) in milliseconds, in order of n; the last measurement of each."""
    out: dict[str, list[Point]] = {}
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
    import matplotlib
    import matplotlib.figure
    import matplotlib.ticker

    found = {axis: series(report, axis) for axis in PANELS}
    if not any(found.values()):
        raise ValueError("nothing to draw: no walk over K or rows was measured")
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "font.size": 9.5}
    with matplotlib.rc_context(style):
        figure = matplotlib.figure.Figure(figsize=(10.5, 4.8), layout="constrained")
        axes = figure.subplots(1, len(PANELS), sharey=True)
        for ax, (axis, (label, title, ticks, _)) in zip(axes, PANELS.items()):
            for name, (text, color, mark, line) in LINES.items():
                if name in found[axis]:
                    n, median, p20, p80 = zip(*found[axis][name])
                    options = {"color": color, "marker": mark, "linestyle": line, "markersize": 4.5, "linewidth": 1.4}
                    ax.plot(n, median, label=text, **options)
                    ax.fill_between(n, p20, p80, color=color, alpha=0.15, lw=0)
            floors = {n: case["floor_us"].get(PRECISION) for n, case in points(report, axis).items()}
            floors = {n: 1e-3 * us for n, us in floors.items() if us}
            ax.plot(floors.keys(), floors.values(), color="#888888", linewidth=1.0, label="floor")
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.set_xticks(ticks)
            ax.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
            ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
            ax.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda y, _: f"{y:g}"))
            ax.grid(True, color="#e6e6e6")
            ax.set_xlabel(label)
            ax.set_title(title)
        axes[0].set_ylabel("milliseconds per walk (median, 20th to 80th percentile)")
        axes[1].tick_params(labelleft=True)
        handles = {line.get_label(): line for ax in axes for line in ax.get_lines()}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False)
        figure.suptitle(_title(report), fontsize=10.5)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, dpi=150, format=path.suffix[1:])
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
