"""Figures of a policy's modes: actions at the saddle over training, moves and goals over environment steps, paths on
the map, and actions over the bandit's reward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastflow.experiments.declare import Arm, Experiment
from fastflow.experiments.report import finished, run_path
from fastflow.multimodality import (
    PRIOR,
    SADDLE,
    TABLE,
    Moves,
    acting,
    actions_at,
    agents_over_training,
    bandit_actions,
    bumps,
    moves,
    raw_actions_at,
)
from fastflow.online_envs import bandit
from fastflow.online_envs.gridworld import FIGURE_STARTS, GridWorldMap, grid_map, play
from fastflow.online_figures import steps_axis
from fastflow.plot import COLORS, column, figure_style, new_figure, save_figure
from fastflow.record import MetricTable, Run, load_agent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_map", "plot_actions", "plot_bandit", "plot_ends", "plot_moves", "plot_paths"]

_LIMIT = 4.0
_BINS = 65
_EDGE = 5.0
_POINTS = 1500
_EPISODES = 25
_KINDS = (
    ("p_up", "P(up)", COLORS[0], "-"),
    ("p_down", "P(down)", COLORS[1], "-"),
    ("p_stay", "P(stay)", "#999999", "-"),
    ("goal_entropy", "entropy of the goal (nats)", "#000000", ":"),
)


def runs_of(arm: Arm, seeds: Sequence[int], folder: Path) -> list[tuple[int, Run]]:
    """Seeds and finished runs of an arm."""
    found = [(seed, finished(run_path(folder, arm, seed))) for seed in seeds]
    return [(seed, run) for seed, run in found if run is not None]


def chosen(experiment: Experiment, names: Sequence[str]) -> list[Arm]:
    """Those arms of an experiment, in the order of `names`."""
    by_name = {arm.name: arm for arm in experiment.arms}
    return [by_name[name] for name in names if name in by_name]


def _steps(step: int) -> str:
    return f"{step / 1e6:.2g}M steps" if step >= 1_000_000 else f"{round(step / 1000)}k steps"


def _numbers(at: Moves) -> str:
    return f"up {at.up:.2f}  down {at.down:.2f}  stay {at.stay:.2f}"


# Actions --------------------------------------------------------------------------------------------------------------


def draw_actions(axis: Axes, raw: np.ndarray, at: Moves) -> None:
    """Density of actions [S, 2] before they are brought into bounds, darker where there are more (of its square root;
    what lies outside the panel is left out); the lines are where rounding changes the move."""
    inside = raw[(np.abs(raw) < _LIMIT).all(-1)]
    edges = np.linspace(-_LIMIT, _LIMIT, _BINS + 1)
    counts, _, _ = np.histogram2d(inside[:, 0], inside[:, 1], bins=[edges, edges])
    # A step of smoothing along each axis: a few thousand samples are spread over thousands of bins.
    kernel = np.array([1.0, 2.0, 3.0, 2.0, 1.0]) / 9.0
    for direction in (0, 1):
        counts = np.apply_along_axis(np.convolve, direction, counts, kernel, "same")
    extent = (-_LIMIT, _LIMIT, -_LIMIT, _LIMIT)
    axis.imshow(np.sqrt(counts.T), origin="lower", extent=extent, cmap="Blues", interpolation="bilinear")
    for y in (-0.5, 0.5):
        axis.axhline(y, color="#D55E00", linewidth=0.8)
    axis.set_xlim(-_LIMIT, _LIMIT)
    axis.set_ylim(-_LIMIT, _LIMIT)
    axis.set_xticks([-3, 0, 3])
    axis.set_yticks([-3, 0, 3])
    axis.grid(False)
    axis.text(0.5, 0.015, _numbers(at), transform=axis.transAxes, ha="center", va="bottom", fontsize=7.5)


def plot_actions(arms: Sequence[Arm], seed: int, folder: Path, path: Path, title: str) -> Path | None:
    """Action density at the saddle: one row per arm, columns for the prior, early, midway and the end; None if no run
    is finished."""
    rows = [(arm, runs[0][1]) for arm in arms if (runs := runs_of(arm, [seed], folder))]
    if not rows:
        return None
    figure, axes = new_figure(4, 2.3, 2.3, rows=len(rows))
    prior = np.random.default_rng(seed).standard_normal((20_000, 2))
    with figure_style():
        for i, (arm, run) in enumerate(rows):
            every = list(agents_over_training(run))[1:]
            picked = [every[0], every[(len(every) - 1) // 2], every[-1]]
            draw_actions(axes[4 * i], prior, PRIOR)
            axes[4 * i].set_ylabel(f"{arm.label}\naction along y", fontsize=8)
            for axis, (step, agent) in zip(axes[4 * i + 1 :], picked, strict=False):
                draw_actions(axis, raw_actions_at(agent, SADDLE, 8000), moves(actions_at(agent, SADDLE)))
                axis.set_title(_steps(step), fontsize=9)
            axes[4 * i].set_title("prior, N(0, 1)", fontsize=9)
        for axis in axes[-4:]:
            axis.set_xlabel("action along x", fontsize=8)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        return save_figure(figure, path)


def plot_ends(arms: Sequence[Arm], seeds: Sequence[int], folder: Path, path: Path, title: str) -> Path | None:
    """Distribution of the action along y at the saddle at the end of training, what is beyond the axis at its ends: one
    row per arm, one column per seed."""
    rows = [(arm, dict(found)) for arm in arms if (found := runs_of(arm, seeds, folder))]
    if not rows:
        return None
    figure, axes = new_figure(len(seeds), 1.9, 1.25, rows=len(rows))
    edges = np.linspace(-_EDGE, _EDGE, 81)
    middle = (edges[1:] + edges[:-1]) / 2
    normal = np.exp(-(middle**2) / 2) / np.sqrt(2 * np.pi)
    with figure_style():
        for i, (arm, runs) in enumerate(rows):
            for j, seed in enumerate(seeds):
                axis = axes[i * len(seeds) + j]
                if seed not in runs:
                    axis.axis("off")
                    continue
                agent, _ = load_agent(runs[seed], None, "cpu")
                at = moves(actions_at(agent, SADDLE))
                y = np.clip(raw_actions_at(agent, SADDLE, 8000)[:, 1], -_EDGE, _EDGE)
                heights, _ = np.histogram(y, edges, density=True)
                for low, high, color in ((-9, -0.5, COLORS[1]), (-0.5, 0.5, "#999999"), (0.5, 9, COLORS[0])):
                    here = (middle > low) & (middle < high)
                    axis.bar(middle[here], heights[here], width=edges[1] - edges[0], color=color, linewidth=0)
                axis.plot(middle, normal, color="black", linewidth=0.7, linestyle=":")
                axis.set_title(f"{at.down:.2f} | {at.stay:.2f} | {at.up:.2f}", fontsize=7.5, loc="center", pad=2)
                axis.set_yticks([])
                axis.set_xticks([-3, 0, 3], ["-3", "0", "3"] if i == len(rows) - 1 else [""] * 3)
                axis.grid(False)
                if i == len(rows) - 1:
                    axis.set_xlabel(f"seed {seed}", fontsize=8)
                if j == 0:
                    axis.set_ylabel(arm.label, fontsize=7, rotation=0, ha="right", va="center")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        return save_figure(figure, path)


def plot_moves(arms: Sequence[Arm], seeds: Sequence[int], folder: Path, path: Path, title: str) -> Path | None:
    """P(up), P(down), P(stay) and the entropy of the goal reached from the saddle over environment steps: one panel per
    arm, one thin line per seed."""
    rows = [(arm, runs) for arm in arms if (runs := runs_of(arm, seeds, folder))]
    if not rows:
        return None
    columns = min(4, len(rows))
    count = -(-len(rows) // columns)
    figure, axes = new_figure(columns, 2.9, 2.3, rows=count)
    with figure_style():
        for axis, (arm, runs) in zip(axes, rows, strict=False):
            for _, run in runs:
                table = MetricTable(run.path / TABLE).rows()
                for name, label, color, style in _KINDS:
                    steps, values = column(table, name)
                    axis.plot(steps, values, style, color=color, linewidth=0.9, alpha=0.85, label=label)
            axis.axhline(0.2, color="#666666", linewidth=0.7, linestyle="--")
            axis.set_ylim(-0.02, 1.02)
            axis.set_title(arm.label, fontsize=8.5)
            steps_axis(axis)
            axis.set_xlabel("")
        for axis in axes[len(rows) :]:
            axis.axis("off")
        for axis in axes[max(0, len(rows) - columns) : len(rows)]:
            axis.set_xlabel("environment steps", fontsize=8)
        handles, labels = axes[0].get_legend_handles_labels()
        first = dict(zip(labels, handles, strict=True))
        figure.legend(first.values(), first.keys(), loc="outside lower center", ncols=len(first), fontsize=8)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        return save_figure(figure, path)


# Paths ----------------------------------------------------------------------------------------------------------------


def draw_map(axis: Axes, grid: GridWorldMap) -> None:
    """Walls (grey), deaths (red) and goals (green) of a map."""
    size = len(grid.walls)
    picture = np.full((size, size, 3), 247, dtype=np.uint8)
    for cells, color in (
        (grid.walls, (140, 140, 140)),
        (grid.deaths, (214, 96, 77)),
        (grid.goals >= 0, (166, 219, 160)),
    ):
        picture[cells] = color
    axis.imshow(picture.transpose(1, 0, 2), origin="lower", interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)


def draw_paths(axis: Axes, agent: Any, grid: GridWorldMap, starts: Sequence[tuple[int, int]], seed: int) -> None:
    """Episodes from each start, a colour each, over the map."""
    draw_map(axis, grid)
    jitter = np.random.default_rng(seed)
    cells = np.asarray(starts).repeat(_EPISODES, axis=0)
    played = play(grid, acting(agent, seed), cells)
    for k, trajectory in enumerate(played.trajectories):
        # Paths on the same cells would hide each other.
        line = trajectory + jitter.uniform(-0.3, 0.3, size=2)
        axis.plot(line[:, 0], line[:, 1], color=COLORS[k // _EPISODES], linewidth=0.6, alpha=0.5)
    for start, color in zip(starts, COLORS, strict=False):
        axis.plot(*start, marker="o", markersize=5, color=color, markeredgecolor="black", markeredgewidth=0.7)
    size = len(grid.walls)
    axis.set_xlim(-0.5, size - 0.5)
    axis.set_ylim(-0.5, size - 0.5)


def plot_paths(
    arms: Sequence[Arm],
    seeds: Sequence[int],
    folder: Path,
    path: Path,
    title: str,
    starts: Sequence[tuple[int, int]] = FIGURE_STARTS,
) -> Path | None:
    """Episodes by the last checkpoint, with noise: one row per arm, one column per seed."""
    rows = [(arm, dict(found)) for arm in arms if (found := runs_of(arm, seeds, folder))]
    if not rows:
        return None
    figure, axes = new_figure(len(seeds), 2.1, 2.15, rows=len(rows))
    with figure_style():
        for i, (arm, runs) in enumerate(rows):
            for j, seed in enumerate(seeds):
                axis = axes[i * len(seeds) + j]
                if seed not in runs:
                    axis.axis("off")
                    continue
                run = runs[seed]
                name = run.config["env"].removeprefix("gridworld-")
                draw_paths(axis, load_agent(run, None, "cpu")[0], grid_map(name), starts, seed)
                if i == 0:
                    axis.set_title(f"seed {seed}", fontsize=8.5)
                if j == 0:
                    axis.set_ylabel(arm.label, fontsize=8)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        return save_figure(figure, path)


# The bandit -----------------------------------------------------------------------------------------------------------


def plot_bandit(arms: Sequence[Arm], seeds: Sequence[int], folder: Path, path: Path, title: str) -> Path | None:
    """Actions at the end of training over contours of the reward: one row per arm, one column per seed."""
    rows = [(arm, dict(found)) for arm in arms if (found := runs_of(arm, seeds, folder))]
    if not rows:
        return None
    figure, axes = new_figure(len(seeds), 2.1, 2.1, rows=len(rows))
    ticks = np.linspace(-1, 1, 101)
    surface = bandit.reward(np.stack(np.meshgrid(ticks, ticks), axis=-1))
    with figure_style():
        for i, (arm, runs) in enumerate(rows):
            for j, seed in enumerate(seeds):
                axis = axes[i * len(seeds) + j]
                if seed not in runs:
                    axis.axis("off")
                    continue
                actions = bandit_actions(load_agent(runs[seed], None, "cpu")[0])
                share = bumps(actions)
                axis.contour(ticks, ticks, surface, levels=[0.1, 0.5, 0.9], colors="#888888", linewidths=0.7)
                axis.scatter(actions[:_POINTS, 0], actions[:_POINTS, 1], s=3, color=COLORS[0], alpha=0.35, linewidths=0)
                text = f"{share.left:.2f} | {share.right:.2f}   reward {share.reward:.2f}"
                axis.text(0.5, 0.02, text, transform=axis.transAxes, ha="center", fontsize=7.5)
                axis.set_xlim(-1.05, 1.05)
                axis.set_ylim(-1.05, 1.05)
                axis.set_aspect("equal")
                axis.set_xticks([-0.5, 0.5])
                axis.set_yticks([0])
                axis.tick_params(labelsize=7)
                if i == 0:
                    axis.set_title(f"seed {seed}", fontsize=8.5)
                if j == 0:
                    axis.set_ylabel(arm.label, fontsize=8)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        return save_figure(figure, path)
