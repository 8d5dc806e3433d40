"""Figures of successor models: samples beside true futures, value maps, and errors over training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastflow.errors import UserError
from fastflow.horizon import make_truth, world_of
from fastflow.plot import COLORS, column, draw_losses, figure_style, labels_of, new_figure, save_figure, updates_axis
from fastflow.record import Run, load_agent
from fastflow.successor import SuccessorFlow
from fastflow.worlds import World

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_errors", "draw_futures", "draw_values", "plot_runs"]

_STATES, _POINTS = 4, 512
_GRID = 40
_SEED = 7


def draw_errors(axis: Axes, runs: Sequence[Run], metric: str, floor: str | None, title: str) -> None:
    """A metric of eval.csv over updates, one line per run, with the floor that true samples have as a dashed line."""
    for i, (run, label) in enumerate(zip(runs, labels_of(runs), strict=True)):
        steps, values = column(run.eval.rows(), f"evaluation/{metric}")
        axis.plot(steps, values, color=COLORS[i % len(COLORS)], marker="o", markersize=4, label=label)
        if floor and i == 0:
            steps, values = column(run.eval.rows(), f"evaluation/{floor}")
            axis.plot(steps, values, color="#666666", linestyle="--", linewidth=1.2, label="two true samples")
    axis.set_yscale("log")
    axis.set_title(title)
    updates_axis(axis)
    if len(runs) > 1 or floor:
        axis.legend(fontsize=8)


def draw_futures(axis: Axes, world: World, state: Tensor, points: Tensor, color: str, title: str) -> None:
    """The first two numbers of the states `points` [n, D] that follow `state` [D]."""
    draw_walls(axis, world)
    axis.scatter(points[:, 0].numpy(), points[:, 1].numpy(), s=4, color=color, alpha=0.5, linewidths=0)
    axis.plot(*state[:2].tolist(), marker="*", markersize=10, color="black", linestyle="none")
    _frame(axis, world)
    axis.set_title(title, fontsize=9)


def draw_values(axis: Axes, world: World, values: np.ndarray, title: str, limits: tuple[float, float]) -> None:
    """Values over the first two numbers of the state, [rows, columns] with NaN where there is none."""
    assert world.bounds is not None
    (left, right), (bottom, top) = world.bounds[:2]
    image = axis.imshow(
        values, origin="lower", extent=(left, right, bottom, top), cmap="viridis", vmin=limits[0], vmax=limits[1]
    )
    draw_walls(axis, world)
    axis.grid(False)
    _frame(axis, world)
    axis.set_title(title, fontsize=9)
    axis.figure.colorbar(image, ax=axis, shrink=0.8)


def draw_walls(axis: Axes, world: World) -> None:
    """The world's walls, if it has any."""
    from matplotlib.patches import Rectangle

    for left, right, bottom, top in world.boxes:
        axis.add_patch(Rectangle((left, bottom), right - left, top - bottom, facecolor="#d9d9d9", linewidth=0))


def _frame(axis: Axes, world: World) -> None:
    if world.bounds is not None:
        axis.set_xlim(*world.bounds[0])
        axis.set_ylim(*world.bounds[1])
    axis.set_aspect("equal")
    axis.set_xticks([])
    axis.set_yticks([])


@torch.no_grad()
def value_maps(
    model: SuccessorFlow, world: World, task: str, w: Tensor | None, samples: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    """V of a task on a grid over the first two numbers of the state (the others zero): true and by the model, NaN in
    walls."""
    assert world.bounds is not None
    axes = [torch.linspace(low, high, 2 * _GRID + 1)[1::2] for low, high in world.bounds[:2]]
    y, x = torch.meshgrid(axes[1], axes[0], indexing="ij")
    states = torch.zeros(_GRID * _GRID, world.state_dim)
    states[:, 0], states[:, 1] = x.flatten(), y.flatten()
    free = torch.ones(len(states), dtype=torch.bool)
    for left, right, bottom, top in world.boxes:
        inside = (states[:, 0] >= left) & (states[:, 0] <= right) & (states[:, 1] >= bottom) & (states[:, 1] <= top)
        free &= ~inside
    actions = world.act(states[free], w)
    generator = torch.Generator().manual_seed(_SEED)
    out = []
    for values in (
        world.values(task, states[free], actions, w, model.gamma, generator),
        model.value(
            lambda s: world.reward(task, s),
            states[free],
            actions,
            samples,
            w=w if model.policy_dim else None,
            generator=generator,
        ),
    ):
        grid = torch.full((len(states),), float("nan"))
        grid[free] = values
        out.append(grid.view(_GRID, _GRID).numpy())
    return out[0], out[1]


def plot_runs(
    paths: Sequence[str | Path], *, output: str | Path | None = None, checkpoint: int | None = None
) -> list[Path]:
    """Draws learning_curve.png of one or more runs, and futures.png and value_map.png of the first; what `fastflow
    plot` does with such runs.

    Args:
        paths: run folders.
        output: folder for the figures; by default RUN/figures of the first run.
        checkpoint: step of the checkpoint; None takes the newest.

    Returns:
        The files written.

    Raises:
        UserError: not a run folder, no such checkpoint, a run without true futures, matplotlib is not installed.
    """
    if not paths:
        raise UserError("plot: expected at least one run folder")
    runs = [Run.open(path) for path in paths]
    run = runs[0]
    folder = run.path / "figures" if output is None else Path(output)
    agent, saved = load_agent(run, checkpoint, "cpu")
    family = run.config["policies"]
    model, world = agent.model, world_of(run.config["env"], None if family is None else Path(family))
    name = run.config["dataset"]["policy"]
    if name == "behaviour":
        raise UserError(
            f"{run.path}: policy behaviour cannot be asked for actions, so there is nothing to compare with"
        )
    w = world.w(None if name == "all" else name)
    variant = run.config["agent"]["variant"]
    written = []
    with figure_style():
        figure, axes = new_figure(3)
        draw_errors(axes[0], runs, "emd", "emd_floor", "EMD to true futures")
        draw_errors(axes[1], runs, "value_mse", None, "Squared error of values")
        draw_losses(axes[2], runs)
        written.append(save_figure(figure, folder / "learning_curve.png"))

        truth = make_truth(world, w, model.gamma, _STATES, _POINTS, _SEED)
        generator = torch.Generator().manual_seed(_SEED)
        samples = model.sample(
            truth.states, truth.actions, _POINTS, w=truth.policies if model.policy_dim else None, generator=generator
        )
        figure, axes = new_figure(_STATES, 2.6, 2.7, rows=2)
        for i, state in enumerate(truth.states):
            draw_futures(axes[i], world, state, truth.futures[i], "#666666", "true futures")
            draw_futures(axes[_STATES + i], world, state, samples[i].detach(), COLORS[0], variant)
        figure.suptitle(
            f"{world.name}, gamma = {model.gamma:g}, policy {name}, update {saved.step:,}", x=0.01, ha="left"
        )
        written.append(save_figure(figure, folder / "futures.png"))

        if world.bounds is not None:
            task = world.tasks[0]
            maps = value_maps(model, world, task, w)
            limits = (float(np.nanmin(maps)), float(np.nanmax(maps)))
            figure, axes = new_figure(2, 4.2, 3.6)
            for axis, values, title in zip(axes, maps, ("true value", f"by {variant}")):
                draw_values(axis, world, values, f"{title}, task {task}", limits)
            written.append(save_figure(figure, folder / "value_map.png"))
    return written
