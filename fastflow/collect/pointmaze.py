"""Scripted policies for OGBench's point mazes: walk along the shortest path of cells, with Gaussian noise on the
action."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from fastflow.collect.recipes import Recipe
from fastflow.envs import NumpyStream, make_core_env

__all__ = ["PointMazeCollector"]

Cell = tuple[int, int]
_NEIGHBOURS = ((-1, 0), (0, -1), (1, 0), (0, 1))


class PointMazeCollector:
    """Collects episodes of a point maze as OGBench does (data_gen_scripts/generate_locomaze.py).

    navigate: walk to a random crossing, corner or dead end, then to the next one. stitch: walk to a cell four cells
    away and stay. explore: a random direction, anew every 10 steps.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._env: Any = make_core_env(recipe.env_id, terminate_at_goal=False)
        self._maze = Maze(self._env.maze_map)

    def episode(self, seed: np.random.SeedSequence) -> dict[str, np.ndarray]:
        """One episode of T rows: observations [T, 2], actions [T, 2], qpos [T, 2], qvel [T, 2] float32, terminals [T]
        bool."""
        recipe, env, maze = self._recipe, self._env, self._maze
        choices_seed, stream_seed, env_seed = seed.spawn(3)
        rng = np.random.default_rng(choices_seed)
        stream = NumpyStream(stream_seed)

        def pick(cells: list[Cell]) -> Cell:
            return cells[rng.integers(len(cells))]

        start = pick(maze.cells)
        if recipe.kind == "stitch":
            goal = pick(maze.cells_at(start, 4) or [start])
        else:
            goal = pick(maze.vertices)
        task = {"init_ij": start, "goal_ij": goal}
        observation, _ = env.reset(options={"task_info": task}, seed=int(env_seed.generate_state(1)[0]))
        goal = env.xy_to_ij(env.cur_goal_xy)

        steps = recipe.steps
        noise = rng.normal(0.0, recipe.noise, (steps, 2))
        directions = rng.normal(size=((steps + 9) // 10, 2))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True) + 1e-6
        rows: dict[str, np.ndarray] = {
            "observations": np.empty((steps, observation.shape[0]), np.float32),
            "actions": np.empty((steps, 2), np.float32),
            "terminals": np.zeros(steps, bool),
            "qpos": np.empty((steps, env.model.nq), np.float32),
            "qvel": np.empty((steps, env.model.nv), np.float32),
        }
        rows["terminals"][-1] = True
        for i in range(steps):
            if recipe.kind == "explore":
                direction = directions[i // 10]
            else:
                xy = env.data.qpos
                subgoal = env.ij_to_xy(maze.next_cell(env.xy_to_ij(xy), goal))
                x, y = subgoal[0] - xy[0], subgoal[1] - xy[1]
                direction = np.array((x, y)) / ((x * x + y * y) ** 0.5 + 1e-6)
            action = (direction + noise[i]).clip(-1.0, 1.0)
            rows["observations"][i] = observation
            rows["actions"][i] = action
            observation, _, _, _, info = env.step(action)
            rows["qpos"][i] = info["prev_qpos"]
            rows["qvel"][i] = info["prev_qvel"]
            if recipe.kind == "navigate" and info["success"]:
                with stream:
                    goal_xy = env.add_noise(env.ij_to_xy(pick(maze.vertices)))
                env.set_goal(goal_xy=goal_xy)
                goal = env.xy_to_ij(goal_xy)
        return rows


class Maze:
    """The graph of a maze's free cells.

    Args:
        walls: [rows, columns], 0 where a cell is free; the border is wall.
    """

    def __init__(self, walls: np.ndarray) -> None:
        self._free = {(int(i), int(j)) for i, j in np.argwhere(walls == 0)}
        self._towards: dict[Cell, dict[Cell, Cell]] = {}
        self.cells: list[Cell] = sorted(self._free)
        """The free cells [(row, column), ...], by row and column."""
        self.vertices: list[Cell] = [cell for cell in self.cells if not self._is_hallway(cell)]
        """The free cells except those in the middle of a straight corridor."""

    def cells_at(self, start: Cell, distance: int) -> list[Cell]:
        """The cells whose shortest path from `start` has `distance` steps."""
        return [cell for cell, steps in self._distances(start).items() if steps == distance]

    def next_cell(self, start: Cell, goal: Cell) -> Cell:
        """The cell after `start` on a shortest path to `goal`; `start` itself at the goal or if there is no path."""
        if goal not in self._towards:
            self._towards[goal] = self._step_towards(goal)
        return self._towards[goal].get(start, start)

    def _neighbours(self, cell: Cell) -> list[Cell]:
        return [n for di, dj in _NEIGHBOURS if (n := (cell[0] + di, cell[1] + dj)) in self._free]

    def _is_hallway(self, cell: Cell) -> bool:
        (i, j), neighbours = cell, self._neighbours(cell)
        return neighbours in ([(i - 1, j), (i + 1, j)], [(i, j - 1), (i, j + 1)])

    def _distances(self, start: Cell) -> dict[Cell, int]:
        distances, queue = {start: 0}, deque([start])
        while queue:
            cell = queue.popleft()
            for neighbour in self._neighbours(cell):
                if neighbour not in distances:
                    distances[neighbour] = distances[cell] + 1
                    queue.append(neighbour)
        return distances

    def _step_towards(self, goal: Cell) -> dict[Cell, Cell]:
        distances = self._distances(goal)
        # Of several shortest paths, OGBench's oracle takes the first neighbour in this order.
        return {
            cell: min(self._neighbours(cell), key=lambda n: distances[n]) for cell, steps in distances.items() if steps
        }
