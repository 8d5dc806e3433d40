"""The grid world of the FPO paper: a point walks over 25 x 25 cells to a goal that pays once.

The observation is the cell relative to the centre, (cell - 12) / 12 in [-1, 1]^2. An action in [-1, 1]^2 is clipped
and rounded per axis, so that a number beyond ±1/2 moves one cell along its axis. Walls block (`GridWorldMap.moves`
says how). A goal pays 20 and ends the episode, a death costs 10 and ends it, every other step pays nothing, and after
100 steps the episode is truncated. Start cells are uniform over those that are no wall, goal or death; the released
code draws them a second time, walls included, which is not repeated here.

Source: FPO (arXiv:2507.21053), section 4.1, and the facts of its released code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from fastflow.online_envs.generators import generator_state, set_generator_state
from fastflow.online_envs.gridworld_maps import FIGURE_STARTS, SIZE, GridWorldMap, grid_map
from fastflow.online_envs.vector import OnlineEnvs, Step

__all__ = [
    "DEATH",
    "FIGURE_STARTS",
    "MAX_STEPS",
    "NO_END",
    "GridWorld",
    "GridWorldMap",
    "GridWorlds",
    "Played",
    "grid_map",
    "play",
]

MAX_STEPS = 100
GOAL_REWARD = 20.0
DEATH_REWARD = -10.0
NO_END = -1
"""In place of a goal's number: the episode did not end on a cell."""
DEATH = -2
"""In place of a goal's number: the episode ended in death."""

_CENTRE = SIZE // 2
# Pixels of a cell in pictures, and colours of what is on it.
_PIXELS = 16
_COLOURS = {
    "free": (247, 247, 247),
    "wall": (110, 110, 110),
    "death": (178, 24, 43),
    "goal": (27, 120, 55),
    "agent": (33, 102, 172),
}


class _Tables:
    """A map by the numbers of its cells: observations [625, 2], rewards [625], `ends` [625] (goal, DEATH or NO_END)."""

    def __init__(self, grid: GridWorldMap) -> None:
        cells = np.indices((SIZE, SIZE)).reshape(2, -1).T
        self.moves = grid.moves
        self.observations = ((cells - _CENTRE) / _CENTRE).astype(np.float32)
        self.ends = np.where(grid.deaths, DEATH, grid.goals).ravel()
        self.over = self.ends != NO_END
        self.success = (self.ends >= 0).astype(np.float32)
        self.rewards = np.where(self.ends >= 0, GOAL_REWARD, np.where(self.ends == DEATH, DEATH_REWARD, 0.0))
        self.rewards = self.rewards.astype(np.float32)
        self.free = grid.free @ np.array([SIZE, 1])

    def walk(self, cells: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Numbers of the cells that actions [..., 2] lead to from `cells` [...]."""
        moves = np.rint(np.clip(actions, -1.0, 1.0)).astype(np.int64) + 1
        return self.moves[cells, moves[..., 0] * 3 + moves[..., 1]]


class GridWorlds(OnlineEnvs):
    """N grid worlds in arrays. They share one random generator, for where the next episodes start.

    Args:
        grid: the map.
        num_envs: N.
        name: of the environment.
    """

    def __init__(self, grid: GridWorldMap, num_envs: int, name: str = "") -> None:
        super().__init__(name or f"gridworld-{grid.name}", num_envs, 2, -np.ones(2), np.ones(2))
        self.map = grid
        self._tables = _Tables(grid)
        self._generator = np.random.default_rng(0)
        self._cells = np.zeros(num_envs, dtype=np.int64)
        self._steps = np.zeros(num_envs, dtype=np.int64)

    @property
    def cells(self) -> np.ndarray:
        """Where the agents are now, int64 [N, 2] as (x, y)."""
        return np.stack((self._cells // SIZE, self._cells % SIZE), axis=-1)

    def close(self) -> None:
        """Does nothing: there is nothing to close."""

    def _reset(self, seeds: np.random.SeedSequence) -> np.ndarray:
        self._generator = np.random.default_rng(seeds)
        self._cells = self._draw(self.num_envs)
        self._steps = np.zeros(self.num_envs, dtype=np.int64)
        return self._tables.observations[self._cells]

    def _step(self, actions: np.ndarray) -> Step:
        tables = self._tables
        cells = tables.walk(self._cells, actions)
        steps = self._steps + 1
        terminated = tables.over[cells]
        truncated = (steps >= MAX_STEPS) & ~terminated
        final_obs = tables.observations[cells]
        rewards, success = tables.rewards[cells], tables.success[cells]
        over = np.flatnonzero(terminated | truncated)
        if len(over):
            cells[over] = self._draw(len(over))
            steps[over] = 0
        self._cells, self._steps = cells, steps
        obs = tables.observations[cells]
        return Step(obs, rewards, terminated, truncated, final_obs, success, np.zeros(self.num_envs, dtype=bool))

    def _draw(self, count: int) -> np.ndarray:
        free = self._tables.free
        return free[self._generator.integers(len(free), size=count)]

    def _snapshot(self) -> dict[str, np.ndarray] | None:
        generator = generator_state(self._generator)
        assert generator is not None
        return {"cells": self._cells.copy(), "steps": self._steps.copy(), "generator": generator}

    def _restore(self, state: dict[str, np.ndarray]) -> np.ndarray:
        self._cells = np.array(state["cells"], dtype=np.int64)
        self._steps = np.array(state["steps"], dtype=np.int64)
        set_generator_state(self._generator, state["generator"])
        return self._tables.observations[self._cells]


class GridWorld(gymnasium.Env):
    """One grid world, for evaluation and pictures; the same rules as `GridWorlds`.

    `info["cell"]` is where the agent is, (x, y); `info["success"]` says whether it is on a goal, and `info["goal"]`
    which one by number, or `NO_END` or `DEATH`.

    Args:
        grid: the map.
        render_mode: None, or "rgb_array" for pictures uint8 [400, 400, 3] with y upwards.

    Raises:
        ValueError: another `render_mode`.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (Gymnasium's)

    def __init__(self, grid: GridWorldMap, render_mode: str | None = None) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f'render_mode: expected None or "rgb_array", got {render_mode!r}')
        self.map = grid
        self.render_mode = render_mode
        self.observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self._tables = _Tables(grid)
        self._cell = int(self._tables.free[0])
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins an episode at a random free cell, or at `options["cell"]`, (x, y).

        Raises:
            ValueError: that cell is not a free one.
        """
        super().reset(seed=seed)
        free = self._tables.free
        self._cell = int(free[self.np_random.integers(len(free))])
        if options and "cell" in options:
            self._cell = int(_numbers(self.map, np.array([options["cell"]]), "cell")[0])
        self._steps = 0
        return self._tables.observations[self._cell].copy(), self._info()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Moves by `action` [2]."""
        self._cell = int(self._tables.walk(np.array(self._cell), np.asarray(action)))
        self._steps += 1
        terminated = bool(self._tables.over[self._cell])
        truncated = self._steps >= MAX_STEPS and not terminated
        observation = self._tables.observations[self._cell].copy()
        return observation, float(self._tables.rewards[self._cell]), terminated, truncated, self._info()

    def render(self) -> np.ndarray | None:
        """A picture of the map and the agent, uint8 [400, 400, 3], or None without a render mode."""
        if self.render_mode is None:
            return None
        picture = np.empty((SIZE, SIZE, 3), dtype=np.uint8)
        picture[:] = _COLOURS["free"]
        for kind, cells in (("wall", self.map.walls), ("death", self.map.deaths), ("goal", self.map.goals >= 0)):
            picture[cells] = _COLOURS[kind]
        picture[divmod(self._cell, SIZE)] = _COLOURS["agent"]
        picture = picture.transpose(1, 0, 2)[::-1]
        return picture.repeat(_PIXELS, axis=0).repeat(_PIXELS, axis=1)

    def _info(self) -> dict[str, Any]:
        goal = int(self._tables.ends[self._cell])
        return {"cell": divmod(self._cell, SIZE), "goal": goal, "success": goal >= 0}


class Played(NamedTuple):
    """What `play` returns.

    Attributes:
        ends: int64 [N], number of the goal that was reached, `NO_END` or `DEATH`.
        trajectories: int64 [N, steps + 1, 2], cells (x, y) from the start on; the last cell repeats after the end.
    """

    ends: np.ndarray
    trajectories: np.ndarray


def play(
    grid: GridWorldMap, act: Callable[[np.ndarray], np.ndarray], starts: np.ndarray, steps: int = MAX_STEPS
) -> Played:
    """Plays one episode from each of N start cells, all at once: which goals does a policy reach from where?

    Args:
        grid: the map.
        act: actions [N, 2] for observations float32 [N, 2]; asked for all N at every step, ended episodes included.
        starts: int [N, 2], free cells (x, y), which may repeat.
        steps: length at which episodes are cut off.

    Raises:
        ValueError: a start is not a free cell, or actions of another shape.
    """
    tables = _Tables(grid)
    cells = _numbers(grid, np.asarray(starts), "starts")
    visited = [cells]
    for _ in range(steps):
        if tables.over[cells].all():
            break
        actions = np.asarray(act(tables.observations[cells]))
        if actions.shape != (len(cells), 2):
            raise ValueError(f"act: expected actions of shape {(len(cells), 2)}, got {actions.shape}")
        cells = np.where(tables.over[cells], cells, tables.walk(cells, actions))
        visited.append(cells)
    visited += [cells] * (steps + 1 - len(visited))
    numbers = np.stack(visited, axis=1)
    return Played(tables.ends[cells], np.stack((numbers // SIZE, numbers % SIZE), axis=-1))


def _numbers(grid: GridWorldMap, cells: np.ndarray, argument: str) -> np.ndarray:
    """Numbers of free cells [N, 2]."""
    if cells.ndim != 2 or cells.shape[1] != 2 or not np.issubdtype(cells.dtype, np.integer):
        raise ValueError(f"{argument}: expected integer cells (x, y), got {cells.dtype} of shape {cells.shape}")
    free = {tuple(cell) for cell in grid.free.tolist()}
    for cell in cells.tolist():
        if tuple(cell) not in free:
            raise ValueError(f"{argument}: expected free cells of {grid.name}, got {tuple(cell)}")
    return (cells @ np.array([SIZE, 1])).astype(np.int64)
