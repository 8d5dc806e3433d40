"""Figures of runs: learning curves, and how the flow critic's value z_k moves from noise to its answer in K steps."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastflow import agents
from fastflow.atomic import atomic_write
from fastflow.errors import UserError, missing_extra
from fastflow.record import Run, load_agent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_flow_paths", "draw_losses", "draw_success", "flow_paths", "plot_overview", "plot_runs", "save_figure"]

# Okabe and Ito's palette: told apart with any colour vision, and in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
_STYLE: dict[str, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "font.size": 9,
    "legend.frameon": False,
    "figure.dpi": 150,
}
_STATES = 6
_NOISES = 9


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise missing_extra("plot", "matplotlib") from error
    return matplotlib


def figure_style() -> Any:
    """A context in which figures have the house's style."""
    return _matplotlib().rc_context(_STYLE)


def new_figure(columns: int, width: float = 5.0, height: float = 3.8, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure with `columns` panels side by side in each of `rows`, each `width` by `height` inches; row by
    row."""
    matplotlib = _matplotlib()
    with figure_style():
        # The object, not pyplot: no window, no global state, any thread.
        figure = matplotlib.figure.Figure(figsize=(width * columns, height * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flat
    return figure, list(axes)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes a figure as PNG, atomically, and returns where.

    Raises:
        UserError: the disk is full or the file cannot be written.
    """
    path = Path(path)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot make this folder ({error.strerror})") from error
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return path


def _label(run: Run) -> str:
    return f"seed {run.config['seed']}"


def labels_of(runs: Sequence[Run]) -> list[str]:
    """The shortest names that tell the runs apart."""
    for labels in ([_label(run) for run in runs], [run.path.resolve().name for run in runs]):
        if len(set(labels)) == len(runs):
            return labels
    return [str(run.path) for run in runs]


def column(rows: Sequence[Mapping[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    found = [(row["step"], row[name]) for row in rows if name in row]
    steps, values = np.array(found, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def updates_axis(axis: Axes, runs: Sequence[Run] = ()) -> None:
    """The axis of steps, with a line where runs went online."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    turns = {run.config["steps"] for run in runs if run.config.get("online_steps")}
    for turn in turns:
        axis.axvline(turn, color="#888888", linewidth=1, linestyle=":")
    axis.set_xlabel("updates, then environment steps" if turns else "updates")
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def draw_success(axis: Axes, runs: Sequence[Run]) -> None:
    """Success over updates, one line per run; with several runs of the same evaluations also their mean."""
    curves = []
    for i, (run, label) in enumerate(zip(runs, labels_of(runs), strict=True)):
        steps, values = column(run.eval.rows(), "evaluation/success")
        curves.append((steps, values))
        several = len(runs) > 1
        axis.plot(
            steps,
            values,
            color=COLORS[i % len(COLORS)],
            marker="o",
            markersize=3 if several else 4.5,
            linewidth=1.1 if several else 2,
            alpha=0.75 if several else 1,
            label=label,
            clip_on=False,
        )
    first = curves[0][0]
    if len(curves) > 1 and len(first) and all(np.array_equal(first, steps) for steps, _ in curves):
        axis.plot(first, np.mean([v for _, v in curves], 0), color="black", linewidth=2.4, label="mean", clip_on=False)
    if not any(len(steps) for steps, _ in curves):
        axis.text(0.5, 0.5, "no evaluations yet", transform=axis.transAxes, ha="center", color="#888888")
    axis.set_ylim(0, 1.02)
    axis.set_ylabel("success rate")
    axis.set_title("Success")
    updates_axis(axis, runs)
    if len(runs) > 1:
        axis.legend(ncols=2 if len(runs) > 4 else 1, fontsize=8)


def draw_losses(axis: Axes, runs: Sequence[Run]) -> None:
    """Training losses over updates: every loss of one run, or the critic's of several. Decades make the axis a log."""
    labels = labels_of(runs)
    lines: list[tuple[np.ndarray, np.ndarray, str]] = []
    names_drawn: list[str] = []
    for run, label in zip(runs, labels, strict=True):
        rows = run.train.rows()
        names = list(dict.fromkeys(name for row in rows for name in row if name.startswith("training/")))
        losses = [name for name in names if name.endswith("_loss") and not _is_sum(name, names)]
        if len(runs) > 1:
            critic = [name for name in losses if name.startswith("training/critic/")]
            losses = (critic or [name for name in names if name == "training/loss"] or losses)[:1]
        for name in losses:
            steps, values = column(rows, name)
            names_drawn.append(name)
            lines.append((steps, values, label if len(runs) > 1 else name.removeprefix("training/")))
    positive = [line for line in lines if len(line[1]) and (line[1] > 0).all()]
    for i, (steps, values, label) in enumerate(positive):
        axis.plot(steps, values, color=COLORS[i % len(COLORS)], linewidth=1.6, label=label)
    if positive:
        if max(v.max() for _, v, _ in positive) > 10 * min(v.min() for _, v, _ in positive):
            axis.set_yscale("log")
        axis.legend(fontsize=8)
    else:
        axis.text(0.5, 0.5, "no rows in train.csv yet", transform=axis.transAxes, ha="center", color="#888888")
    axis.set_ylabel("loss")
    of_critic = any("/critic/" in name for name in names_drawn)
    axis.set_title("Training losses" if len(runs) == 1 else "Loss of the critic" if of_critic else "Training loss")
    updates_axis(axis, runs)


def _is_sum(name: str, names: Sequence[str]) -> bool:
    """Whether a loss is the total of its group (critic/critic_loss), shown by its parts instead."""
    group = name.split("/")[-2]  # "training" for a loss without one
    losses = [n for n in names if n.startswith(f"training/{group}/") and n.endswith("_loss")]
    return name.endswith(f"{group}/{group}_loss") and len(losses) > 1


def flow_paths(run: Run, step: int | None = None, device: str = "cpu") -> tuple[np.ndarray, int]:
    """The critic's flow from noise to value, for a few dataset rows of different value.

    Args:
        run: an open run folder.
        step: checkpoint; None takes the newest.
        device: where to compute.

    Returns:
        z_k as [rows, noises, K + 1] of the first ensemble member, rows by ascending value; and the checkpoint's step.

    Raises:
        UserError: no checkpoint or samples in the folder.
    """
    agent, checkpoint = load_agent(run, step, device)
    samples = {name: value.to(agent.device) for name, value in run.load_samples().items()}
    count = len(samples["observations"])
    # Evenly spaced quantiles instead of random draws: the figure shows the whole range of the noise, and is repeatable.
    noise = torch.linspace(0, 1, _NOISES, device=agent.device).expand(count, _NOISES).contiguous()
    with torch.no_grad():
        paths = agent.flow_paths(samples["observations"], samples["actions"], noise)[0].float().cpu().numpy()
    order = np.argsort(paths[:, :, -1].mean(1))
    chosen = order[np.linspace(0, count - 1, min(_STATES, count)).round().astype(int)]
    return paths[chosen], checkpoint.step


def draw_flow_paths(axis: Axes, paths: np.ndarray, step: int) -> None:
    """z_k over k.

    Args:
        axis: where.
        paths: [rows, noises, K + 1], one colour per row and one line per noise.
        step: updates done, for the title.
    """
    matplotlib = _matplotlib()
    rows, _, times = paths.shape
    colors = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.85, rows))
    k = np.arange(times)
    for row in range(rows):
        axis.plot(k, paths[row].T, color=colors[row], linewidth=0.8, alpha=0.45)
        mean = paths[row].mean(0)
        axis.plot(k, mean, color=colors[row], linewidth=2.2)
        axis.annotate(
            f"{mean[-1]:.3g}",
            (k[-1], mean[-1]),
            xytext=(5, 0),
            textcoords="offset points",
            color=colors[row],
            va="center",
            fontsize=8,
        )
    note = "thin: one line per noise, thick: their mean"
    axis.text(0.02, 0.02, note, transform=axis.transAxes, fontsize=8, color="#666666")
    axis.set_xlim(0, times - 1)
    axis.set_xticks(k if times <= 12 else k[:: (times + 9) // 10])
    axis.margins(x=0)
    axis.set_xlabel(f"integration step k of K = {times - 1}")
    axis.set_ylabel("z_k (discounted return)")
    axis.set_title(f"Critic's flow paths of {rows} state-action pairs, update {step:,}")


def plot_overview(runs: Sequence[Run], path: str | Path) -> Path:
    """One figure with success, losses and the flow paths of the first run; returns where it was written.

    Raises:
        UserError: a run without a checkpoint, or the file cannot be written.
    """
    figure, axes = new_figure(3)
    with figure_style():
        draw_success(axes[0], runs)
        draw_losses(axes[1], runs)
        draw_flow_paths(axes[2], *flow_paths(runs[0]))
        return save_figure(figure, path)


def plot_runs(
    paths: Sequence[str | Path], *, output: str | Path | None = None, checkpoint: int | None = None
) -> list[Path]:
    """Draws learning_curve.png, and flow_paths.png where the critic is a flow to one value (floq), of one or more runs;
    what `fastflow plot` does.

    Args:
        paths: run folders. Several share one learning curve; the flow paths are the first one's.
        output: folder for the figures; by default RUN/figures of the first run.
        checkpoint: step of the checkpoint for the flow paths; None takes the newest.

    Returns:
        The files written.

    Raises:
        UserError: not a run folder, no such checkpoint, a checkpoint of an agent without flow paths, matplotlib is not
            installed, a file cannot be written.
    """
    if not paths:
        raise UserError("plot: expected at least one run folder")
    _matplotlib()
    runs = [Run.open(path) for path in paths]
    agent = runs[0].config["agent_name"]
    has_paths = hasattr(agents.agent_class(agent), "flow_paths")
    if checkpoint is not None and not has_paths:
        raise UserError(f"plot: a checkpoint is chosen for the critic's flow paths, and agent {agent} has none")
    folder = runs[0].path / "figures" if output is None else Path(output)
    written = []
    with figure_style():
        figure, axes = new_figure(2)
        draw_success(axes[0], runs)
        draw_losses(axes[1], runs)
        figure.suptitle(" / ".join(dict.fromkeys(run.config["env"] for run in runs)), x=0.01, ha="left")
        written.append(save_figure(figure, folder / "learning_curve.png"))
        if has_paths and (runs[0].checkpoint_steps() or checkpoint is not None):
            figure, axes = new_figure(1, 6.4, 4.6)
            draw_flow_paths(axes[0], *flow_paths(runs[0], checkpoint))
            written.append(save_figure(figure, folder / "flow_paths.png"))
    return written
