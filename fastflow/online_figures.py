"""Figures of on-policy runs: returns over environment steps, and what the time was spent on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastflow.errors import UserError
from fastflow.experiments.report import estimate, finished, run_path
from fastflow.plot import COLORS, column, figure_style, labels_of, new_figure, save_figure
from fastflow.record import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fastflow.experiments.declare import Experiment

__all__ = ["draw_experiment", "draw_returns", "draw_time", "plot_runs"]

_PARTS = ("env", "sampling", "update", "evaluation")
_NAMES = {"env": "environments", "sampling": "sampling actions", "update": "updates", "evaluation": "evaluations"}


def draw_returns(axis: Axes, runs: Sequence[Run]) -> None:
    """Returns over environment steps: evaluations without noise (solid), with noise (dashed), rollouts (faint)."""
    drawn = False
    for i, (run, label) in enumerate(zip(runs, labels_of(runs), strict=True)):
        color = COLORS[i % len(COLORS)]
        steps, values = column(run.train.rows(), "rollout/episode.return")
        axis.plot(steps, values, color=color, alpha=0.25, linewidth=1)
        rows = run.eval.rows()
        for name, style in (("evaluation/episode.return.random", "--"), ("evaluation/episode.return", "-")):
            steps, values = column(rows, name)
            drawn = drawn or bool(len(steps))
            text = f"{label}, with noise" if style == "--" else label
            axis.plot(steps, values, style, color=color, linewidth=1.1 if style == "--" else 2, label=text)
    if drawn:
        axis.legend(fontsize=8)
    else:
        axis.text(0.5, 0.5, "no evaluations yet", transform=axis.transAxes, ha="center", color="#888888")
    axis.set_title("Return (faint: in rollouts)")
    axis.set_ylabel("undiscounted return of an episode")
    steps_axis(axis)


def draw_time(axis: Axes, runs: Sequence[Run]) -> None:
    """Seconds of each run by what they were spent on, one bar per run."""
    left = np.zeros(len(runs))
    for part, color in zip(_PARTS, COLORS, strict=False):
        seconds = np.array([_seconds(run, part) for run in runs])
        axis.barh(range(len(runs)), seconds, left=left, color=color, label=_NAMES[part])
        left += seconds
    axis.set_yticks(range(len(runs)), labels_of(runs))
    axis.set_ylim(len(runs) + 0.4, -0.6)  # room for the legend below the bars
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("seconds")
    axis.set_title("Where the time went")
    axis.legend(fontsize=8, loc="lower left", ncols=2)


def steps_axis(axis: Axes) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.set_xlabel("environment steps")
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def plot_runs(
    paths: Sequence[str | Path], *, output: str | Path | None = None, checkpoint: int | None = None
) -> list[Path]:
    """Draws learning_curve.png: returns, and where the time went; what `fastflow plot` does with on-policy runs.

    Args:
        paths: run folders. output: folder for the figure; by default RUN/figures of the first run. checkpoint: unused.

    Raises:
        UserError: not a run folder, matplotlib is not installed, a file cannot be written.
    """
    if not paths:
        raise UserError("plot: expected at least one run folder")
    runs = [Run.open(path) for path in paths]
    folder = runs[0].path / "figures" if output is None else Path(output)
    with figure_style():
        figure, axes = new_figure(2)
        draw_returns(axes[0], runs)
        draw_time(axes[1], runs)
        figure.suptitle(" / ".join(dict.fromkeys(run.config["env"] for run in runs)), x=0.01, ha="left")
        return [save_figure(figure, folder / "learning_curve.png")]


def draw_experiment(experiment: Experiment, seeds: Sequence[int], folder: Path) -> list[Path]:
    """Draws curves.png of an experiment: returns over environment steps without and with noise, interquartile mean and
    interval over seeds for each arm, and the median seconds of a run by what they were spent on.

    Args:
        experiment: whose finished runs lie in `folder`. seeds: of the report.
    """
    found = [
        (arm.label, [run for seed in seeds if (run := finished(run_path(folder, arm, seed))) is not None])
        for arm in experiment.arms
    ]
    runs = {label: some for label, some in found if some}
    if not runs:
        return []
    with figure_style():
        figure, axes = new_figure(3, 4.6, 3.6)
        for axis, name, title in (
            (axes[0], "evaluation/episode.return", "Return without noise"),
            (axes[1], "evaluation/episode.return.random", "Return with noise"),
        ):
            for color, (label, some) in zip(COLORS, runs.items(), strict=False):
                _draw_interval(axis, [column(run.eval.rows(), name) for run in some], color, label)
            axis.set_title(title)
            steps_axis(axis)
        axes[0].legend(fontsize=8)
        left = np.zeros(len(runs))
        for part, color in zip(_PARTS, COLORS[3:], strict=False):
            seconds = np.array([np.median([_seconds(run, part) for run in some]) for some in runs.values()])
            axes[2].barh(range(len(runs)), seconds, left=left, color=color, label=_NAMES[part])
            left += seconds
        axes[2].set_yticks(range(len(runs)), list(runs))
        axes[2].set_ylim(len(runs) + 0.9, -0.6)  # room for the legend below the bars
        axes[2].grid(axis="y", visible=False)
        axes[2].set_xlabel("seconds of a run, median over seeds")
        axes[2].set_title("Where the time went")
        axes[2].legend(fontsize=8, loc="lower left", ncols=2)
        count = ", ".join(f"{label}: {len(some)}" for label, some in runs.items())
        figure.suptitle(f"{experiment.title} (seeds: {count})", x=0.01, ha="left", fontsize=10.5)
        return [save_figure(figure, folder / "curves.png")]


def _draw_interval(axis: Axes, curves: Sequence[tuple[np.ndarray, np.ndarray]], color: str, label: str) -> None:
    """The runs as thin lines; their interquartile mean and interval where all have been evaluated."""
    for steps, values in curves:
        axis.plot(steps, values, color=color, linewidth=0.7, alpha=0.35)
    common = sorted(set.intersection(*(set(steps.tolist()) for steps, _ in curves)))
    rows = [[float(values[steps == step][0]) for steps, values in curves] for step in common]
    estimates = [estimate(row) for row in rows]
    axis.plot(common, [e.center for e in estimates], color=color, linewidth=2, label=label)
    axis.fill_between(
        common, [e.low for e in estimates], [e.high for e in estimates], color=color, alpha=0.18, linewidth=0
    )


def _seconds(run: Run, part: str) -> float:
    rows = run.eval.rows() if part == "evaluation" else run.train.rows()
    return float(column(rows, f"time/{part}")[1].sum())
