"""OGBench's point mazes without a simulator: many points at once, with MuJoCo's contacts worked out for a ball between
boxes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastflow.collect.pointmaze import Maze
from fastflow.worlds.base import World

__all__ = ["MAZES", "PointMaze"]

# OGBench's maps: # is a wall. Cell (i, j) has its centre at x = 4 j - 4, y = 4 i - 4.
_MAPS = {
    "arena": """
        ########
        #......#
        #......#
        #......#
        #......#
        #......#
        #......#
        ########
    """,
    "medium": """
        ########
        #..##..#
        #..#...#
        ##...###
        #..#...#
        #.#..#.#
        #...#..#
        ########
    """,
    "large": """
        ############
        #....#.....#
        #.##.#.#.#.#
        #......#...#
        #.####.###.#
        #..#.#.....#
        ##.#.#.#.###
        #..#...#...#
        ############
    """,
    "giant": """
        ################
        #.#......##....#
        #.#.##.#.#..##.#
        #...#..#...#...#
        #.###.######.#.#
        #...#...#....#.#
        ###.#.#..#.#.###
        #...#..#...#...#
        #.#.#.######.#.#
        #.###...#...##.#
        #.....#...#....#
        ################
    """,
}
# Goal cells of the tasks 1 to 5: OGBench's, and in the arena, where it has one, those of `fastflow.envs`.
_GOALS = {
    "arena": ((6, 6), (1, 6), (3, 3), (6, 3), (2, 5)),
    "medium": ((6, 6), (1, 6), (4, 2), (6, 1), (1, 1)),
    "large": ((7, 10), (7, 1), (1, 10), (5, 4), (5, 4)),
    "giant": ((10, 14), (10, 1), (1, 1), (5, 12), (3, 8)),
}
_STEPS = {"arena": 1000, "medium": 1000, "large": 1000, "giant": 2000}  # transitions of a trajectory of "navigate"

MAZES: tuple[str, ...] = tuple(_MAPS)
"""Sizes of maze."""

_CELL, _OFFSET = 4.0, 4.0
_STRIDE = 0.2  # displacement by an action of length one
_TOLERANCE = 1.0  # distance to a goal that is reached
_SPREAD = 1.0  # starts and goals are off the centre of their cell by up to this
_NOISE = 0.5  # of the behaviour's actions

# MuJoCo's contact between the ball and a wall.
_BALL = 0.7  # its radius
_TIMESTEP, _SUBSTEPS = 0.02, 5
_TIME_CONSTANT = 2 * _TIMESTEP  # solref, raised to twice the time step as MuJoCo does
_IMPEDANCE = (0.9, 0.95, 0.001)  # solimp: at no depth, at full depth, full depth
_DAMPING = 2.0 / (_IMPEDANCE[1] * _TIME_CONSTANT)
_STIFFNESS = 1.0 / (_IMPEDANCE[1] * _TIME_CONSTANT) ** 2
# Regularisation of an edge of a friction pyramid with friction 1, times the ball's mass: 2 (1 + 1) 2/3, where 2/3 is
# what is left of the inverse mass on average over three directions of which the ball can move in two.
_REGULARISATION = 8.0 / 3.0
_NEWTON_STEPS = 10


class PointMaze(World):
    """A ball of radius 0.7 that actions in [-1, 1]^2 (others are clipped) move by 0.2 a, in a maze of cells 4 wide.

    Walls push the ball out as MuJoCo's soft contacts do: five Runge-Kutta steps of 0.02 s from rest, each of whose four
    stages minimises MuJoCo's convex contact problem, friction included, for the boxes that the ball overlaps. In
    float64 it agrees with MuJoCo to 1e-7, the accuracy of its solver. A step that ends clear of walls is a plain sum.
    Nothing ends an episode.

    A policy w is a goal (x, y): it walks along the shortest path of cells, aiming at the next cell's centre, and within
    the goal's cell at the goal, where it comes to rest. Any goal will do; those named are centres of the cells that are
    not in the middle of a straight corridor.

    Tasks: "reach-taskN" is 1 within 1.0 of the goal of OGBench's task N, else 0 (OGBench's own reward is this minus 1,
    and ends the episode). "near-I-J" is exp(-|x - c|^2 / 2) with c midway between two free cells, where no named
    policy goes. "patrol" is such a bump at either end of the longest shortest path, minus one in its middle.

    Data are as OGBench's "navigate": walk to a random place in such a cell, with noise 0.5 on the actions, then to the
    next one.

    Args:
        size: one of `MAZES`.
    """

    state_dim = 2
    action_dim = 2
    policy_dim = 2
    deterministic = True

    def __init__(self, size: str) -> None:
        if size not in _MAPS:
            raise ValueError(f"size: expected one of {', '.join(MAZES)}, got {size!r}")
        self.name = f"pointmaze-{size}"
        self.horizon = _STEPS[size]
        self.walls = np.array([[mark == "#" for mark in row] for row in _MAPS[size].split()])
        """[rows, columns], where cells are wall."""
        rows, columns = self.walls.shape
        low = -_OFFSET - _CELL / 2
        self.bounds = ((low, low + _CELL * columns), (low, low + _CELL * rows))
        self.boxes = tuple(
            (low + _CELL * j, low + _CELL * (j + 1), low + _CELL * i, low + _CELL * (i + 1))
            for i, j in np.argwhere(self.walls).tolist()
        )
        maze = Maze(self.walls)
        self._cells, self._vertices = _centres(maze.cells), _centres(maze.vertices)

        def xy(cell: tuple[float, float]) -> tuple[float, float]:
            return _CELL * cell[1] - _OFFSET, _CELL * cell[0] - _OFFSET

        goals = _GOALS[size]
        named = sorted(maze.vertices, key=lambda cell: cell != goals[0])
        self.policies: Mapping[str, tuple[float, ...]] = {f"goal-{i}-{j}": xy((i, j)) for i, j in named}
        self._reach = {f"reach-task{i + 1}": xy(goal) for i, goal in enumerate(goals)}
        gaps = [
            (i + di / 2, j + dj / 2)
            for i, j in maze.cells
            for di, dj in ((0, 1), (1, 0))
            if not self.walls[i + di, j + dj]
        ]
        self._bumps = {
            f"near-{gap[0]:g}-{gap[1]:g}": [(1.0, xy(gap))] for gap in (gaps[0], gaps[len(gaps) // 2], gaps[-1])
        }
        path = _longest_path(maze)
        self._bumps["patrol"] = [(1.0, xy(path[0])), (1.0, xy(path[-1])), (-1.0, xy(path[len(path) // 2]))]
        self.tasks = (*self._reach, *self._bumps)

        # For every cell and every goal cell, the cell to walk to, all as row * columns + column; walls stand for the
        # free cell nearest to them.
        free = np.array(maze.cells)
        grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 1, 2)
        nearest = np.square(grid - free).sum(-1).argmin(1)
        steps = np.array([[maze.next_cell(start, goal) for goal in maze.cells] for start in maze.cells])
        steps = steps[nearest][:, nearest]
        blocked = self.walls.ravel()
        steps[blocked] = free[nearest[blocked]][:, None]
        self._towards = torch.from_numpy(steps[..., 0] * columns + steps[..., 1])
        self._blocked = torch.from_numpy(blocked)
        self._stands_for = torch.from_numpy(free[nearest] @ np.array([columns, 1]))

    def act(self, state: Tensor, w: Tensor | None = None) -> Tensor:
        self._check_state(state)
        goal = self._embedding(w, state)
        assert goal is not None
        self._tables_to(state.device)
        here, there = self._cell(state), self._stands_for[self._cell(goal)]
        way = torch.where((here == there)[:, None], goal, self._next(state, here, there)) - state
        length = way.norm(dim=1, keepdim=True)
        return way / length.clamp_min(_STRIDE)

    def behave(self, state: Tensor, memory: Any, generator: torch.Generator) -> tuple[Tensor, Any]:
        self._check_state(state)
        goal = self._places(self._vertices, len(state), generator).to(state)
        if memory is not None:
            goal = torch.where(((state - memory).norm(dim=1) <= _TOLERANCE)[:, None], goal, memory)
        way = self._next(state, self._cell(state), self._cell(goal)) - state
        noise = torch.randn(way.shape, generator=generator, dtype=way.dtype, device=way.device)
        action = way / (way.norm(dim=1, keepdim=True) + 1e-6) + _NOISE * noise
        return action.clamp(-1.0, 1.0), goal

    def step(self, state: Tensor, action: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        self._check_step(state, action)
        moved = state + _STRIDE * action.clamp(-1.0, 1.0)
        touching = (self._contacts(moved)[0] > 0.0).any(1).nonzero().squeeze(1)
        if len(touching):
            moved[touching] = self._pushed_out(moved[touching].double()).to(moved)
        return moved, torch.zeros(len(state), dtype=torch.bool, device=state.device)

    def starts(self, num: int, generator: torch.Generator) -> Tensor:
        return self._places(self._cells, num, generator)

    def reward(self, task: str, state: Tensor) -> Tensor:
        self._check_task(task)
        if task in self._reach:
            return ((state - state.new_tensor(self._reach[task])).norm(dim=-1) <= _TOLERANCE).to(state.dtype)
        total = torch.zeros_like(state[..., 0])
        for sign, centre in self._bumps[task]:
            total = total + sign * torch.exp((state - state.new_tensor(centre)).square().sum(-1) / -2.0)
        return total

    def _places(self, centres: Tensor, num: int, generator: torch.Generator) -> Tensor:
        """Points of random cells, off the centre by up to 1 along either axis; [num, 2]."""
        device = generator.device
        cells = torch.randint(len(centres), (num,), generator=generator, device=device)
        off = torch.rand(num, 2, generator=generator, device=device)
        return centres.to(device)[cells] + _SPREAD * (2.0 * off - 1.0)

    def _cell(self, xy: Tensor) -> Tensor:
        """Number [N] of the cell that points [N, 2] are in; of the nearest one outside the map."""
        rows, columns = self.walls.shape
        index = ((xy + (_OFFSET + _CELL / 2)) / _CELL).floor().long()
        return index[:, 1].clamp(0, rows - 1) * columns + index[:, 0].clamp(0, columns - 1)

    def _tables_to(self, device: torch.device) -> None:
        # They stay on the device that asked last, so that steps there copy nothing.
        if self._blocked.device != device:
            self._towards, self._blocked = self._towards.to(device), self._blocked.to(device)
            self._stands_for = self._stands_for.to(device)

    def _next(self, like: Tensor, here: Tensor, there: Tensor) -> Tensor:
        """Centre [N, 2] of the cell to walk to from cells `here` towards cells `there`, both [N]."""
        self._tables_to(like.device)
        cell = self._towards[here, there]
        columns = self.walls.shape[1]
        return _CELL * torch.stack([cell % columns, cell // columns], 1).to(like) - _OFFSET

    # --- contacts -----------------------------------------------------------------------------------------------------

    def _contacts(self, xy: Tensor) -> tuple[Tensor, Tensor]:
        """Depths [N, 4] of the overlap of balls at [N, 2] with the walls about them, 0 where there is none, and unit
        normals [N, 4, 2] that point out of the walls."""
        rows, columns = self.walls.shape
        place = (xy + (_OFFSET + _CELL / 2)) / _CELL
        home = place.floor()
        # Of the cells about, a ball narrower than a cell reaches the nearest neighbour along either axis and the one
        # between these two.
        side = torch.where(place - home < 0.5, -1.0, 1.0).to(xy.dtype)
        x, y = torch.stack([home, home + side], 1).unbind(2)
        cells = torch.stack([x[:, [0, 1, 0, 1]], y[:, [0, 0, 1, 1]]], 2)  # [N, 4, 2]: home, beside, above, between
        index = cells.long()
        number = index[..., 1].clamp(0, rows - 1) * columns + index[..., 0].clamp(0, columns - 1)
        off = xy[:, None] - (_CELL * cells - _OFFSET)
        out = off - off.clamp(-_CELL / 2, _CELL / 2)
        distance = out.norm(dim=2)
        normal = out / distance.clamp_min(1e-12)[..., None]
        # A centre within a wall, which is the home cell, is pushed out through the nearest face.
        inside = distance[:, 0] <= 0.0
        face = torch.nn.functional.one_hot(off[:, 0].abs().argmax(1), 2) * off[:, 0].sign()
        normal[:, 0] = torch.where(inside[:, None], face.to(normal), normal[:, 0])
        distance[:, 0] = torch.where(inside, off[:, 0].abs().amax(1) - _CELL / 2, distance[:, 0])
        depth = (_BALL - distance).clamp_min(0.0)
        self._tables_to(xy.device)
        return depth * self._blocked[number], normal

    def _pushed_out(self, xy: Tensor) -> Tensor:
        """Where balls at [N, 2], at rest, are after MuJoCo's five Runge-Kutta steps."""
        velocity = torch.zeros_like(xy)
        h = _TIMESTEP
        for _ in range(_SUBSTEPS):
            v_1, a_1 = velocity, self._acceleration(xy, velocity)
            v_2 = velocity + h / 2 * a_1
            a_2 = self._acceleration(xy + h / 2 * v_1, v_2)
            v_3 = velocity + h / 2 * a_2
            a_3 = self._acceleration(xy + h / 2 * v_2, v_3)
            v_4 = velocity + h * a_3
            a_4 = self._acceleration(xy + h * v_3, v_4)
            xy = xy + h / 6 * (v_1 + 2 * v_2 + 2 * v_3 + v_4)
            velocity = velocity + h / 6 * (a_1 + 2 * a_2 + 2 * a_3 + a_4)
        return xy

    def _acceleration(self, xy: Tensor, velocity: Tensor) -> Tensor:
        """Minimiser a [N, 2] of |a|^2 + sum over edges e of min(0, J_e a - aref_e)^2 / R_e, by Newton's method.

        A contact with normal n and tangent u has the edges n + u, n - u and twice n of a friction pyramid, with
        aref = -damping J v + stiffness impedance depth and R = 8/3 (1 - impedance) / impedance over the mass, which
        cancels (MuJoCo's documentation, Computation: constraint model).
        """
        depth, normal = self._contacts(xy)
        low, high, full = _IMPEDANCE
        share = (depth / full).clamp_max(1.0)
        # A power-two spline from 0 to 1.
        bend = torch.where(share < 0.5, 2.0 * share.square(), 1.0 - 2.0 * (1.0 - share).square())
        impedance = low + (high - low) * bend
        stiff = impedance / ((1.0 - impedance) * _REGULARISATION) * (depth > 0.0)
        tangent = torch.stack([-normal[..., 1], normal[..., 0]], 2)
        edges = torch.cat([normal + tangent, normal - tangent, normal], 1)  # [N, 12, 2]
        weights = torch.cat([stiff, stiff, 2.0 * stiff], 1)
        wanted = (_STIFFNESS * impedance * depth).repeat(1, 3) - _DAMPING * (edges @ velocity[..., None])[..., 0]
        j, k = edges.unbind(2)
        moments = torch.stack([j * j, j * k, k * k, j * wanted, k * wanted], 2)
        pushing = torch.ones_like(weights, dtype=torch.bool)
        for _ in range(_NEWTON_STEPS):
            xx, cross, yy, x, y = ((weights * pushing)[:, None] @ moments)[:, 0].unbind(1)
            xx, yy = xx + 1.0, yy + 1.0
            acceleration = torch.stack([yy * x - cross * y, xx * y - cross * x], 1) / (xx * yy - cross * cross)[:, None]
            now = (edges @ acceleration[..., None])[..., 0] < wanted
            if torch.equal(now & (weights > 0), pushing & (weights > 0)):
                break
            pushing = now
        return acceleration


def _centres(cells: list[tuple[int, int]]) -> Tensor:
    return _CELL * torch.tensor(cells, dtype=torch.float32).flip(1) - _OFFSET


def _longest_path(maze: Maze) -> list[tuple[int, int]]:
    """The cells of a shortest path between two cells as far apart as any."""

    def path(start: tuple[int, int], goal: tuple[int, int]) -> list[tuple[int, int]]:
        cells = [start]
        while cells[-1] != goal:
            cells.append(maze.next_cell(cells[-1], goal))
        return cells

    return max((path(start, goal) for start in maze.cells for goal in maze.cells), key=len)
