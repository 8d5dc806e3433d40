"""The five maps of the FPO paper's grid world (arXiv:2507.21053, section 4.1), written down from the facts of its
released code."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

__all__ = ["FIGURE_STARTS", "MAP_NAMES", "SIZE", "GridWorldMap", "grid_map"]

SIZE = 25
"""Cells along each side."""

FIGURE_STARTS = ((17, 12), (11, 13), (6, 9), (20, 17))
"""Cells (x, y) from which the paper's figure of trajectories on "two-walls" starts."""


@dataclasses.dataclass(frozen=True, eq=False)
class GridWorldMap:
    """What is where. Arrays are indexed [x, y]; y grows upwards in pictures.

    Attributes:
        name: as in the environment's name after "gridworld-".
        walls: bool [25, 25], cells that cannot be entered.
        deaths: bool [25, 25], cells that end an episode with the penalty.
        goals: int64 [25, 25], number of the goal that a cell belongs to, -1 for none.
        goal_names: a word for each goal, in the order of their numbers.

    Raises:
        ValueError: an array of another shape, overlapping kinds of cells, a goal without a name or no free cell.
    """

    name: str
    walls: np.ndarray
    deaths: np.ndarray
    goals: np.ndarray
    goal_names: tuple[str, ...]

    def __post_init__(self) -> None:
        for field in ("walls", "deaths", "goals"):
            if getattr(self, field).shape != (SIZE, SIZE):
                raise ValueError(f"{field}: expected shape {(SIZE, SIZE)}, got {getattr(self, field).shape}")
        kinds = self.walls.astype(int) + self.deaths + (self.goals >= 0)
        if kinds.max() > 1:
            x, y = np.argwhere(kinds > 1)[0]
            raise ValueError(f"walls, deaths, goals: expected one kind per cell, got several at {(int(x), int(y))}")
        if self.goals.max() >= len(self.goal_names):
            raise ValueError(f"goal_names: expected {self.goals.max() + 1} names, got {len(self.goal_names)}")
        if kinds.min() > 0:
            raise ValueError("walls, deaths, goals: expected at least one free cell to start in, got none")

    @functools.cached_property
    def free(self) -> np.ndarray:
        """Cells to start in, int64 [F, 2] as (x, y): no wall, goal or death."""
        return np.argwhere(~(self.walls | self.deaths | (self.goals >= 0)))

    @functools.cached_property
    def moves(self) -> np.ndarray:
        """Where each of nine moves leads from each cell, both as numbers: int64 [625, 9].

        Cell (x, y) is number 25 x + y, move (i, j) in {-1, 0, 1}^2 is number 3 (i + 1) + j + 1. As in the released
        code, the border stops each axis by itself, so that a diagonal move slides along it, but a move whose target
        is a wall does nothing at all, and between two walls that touch at their corners one can pass.
        """
        cells = np.stack(np.meshgrid(np.arange(SIZE), np.arange(SIZE), indexing="ij"), axis=-1)
        moves = np.stack(np.meshgrid((-1, 0, 1), (-1, 0, 1), indexing="ij"), axis=-1).reshape(9, 2)
        targets = np.clip(cells[:, :, None] + moves, 0, SIZE - 1)
        blocked = self.walls[targets[..., 0], targets[..., 1]]
        targets = np.where(blocked[..., None], cells[:, :, None], targets)
        return (targets[..., 0] * SIZE + targets[..., 1]).reshape(SIZE * SIZE, 9)


def _cells(x: range, y: range) -> np.ndarray:
    """bool [25, 25], a rectangle of cells."""
    cells = np.zeros((SIZE, SIZE), dtype=bool)
    cells[x.start : x.stop, y.start : y.stop] = True
    return cells


def _around(x: int, y: int, radius: int) -> np.ndarray:
    return _cells(range(x - radius, x + radius + 1), range(y - radius, y + radius + 1))


_ALL = range(SIZE)
_NONE = np.zeros((SIZE, SIZE), dtype=bool)


def _map(
    name: str, goals: dict[str, np.ndarray], walls: np.ndarray = _NONE, deaths: np.ndarray = _NONE
) -> GridWorldMap:
    numbers = np.full((SIZE, SIZE), -1, dtype=np.int64)
    for i, cells in enumerate(goals.values()):
        numbers[cells] = i
    return GridWorldMap(name, walls.copy(), deaths.copy(), numbers, tuple(goals))


def _two_walls() -> GridWorldMap:
    """Two goals, the two lowest and the two highest rows. Despite the name it has no walls; row y = 12 is halfway."""
    return _map("two-walls", {"bottom": _cells(_ALL, range(2)), "top": _cells(_ALL, range(SIZE - 2, SIZE))})


def _three_goals() -> GridWorldMap:
    """Three goals of 3 x 3 cells around a deadly centre of 3 x 3."""
    goals = {"top": _around(12, 18, 1), "bottom left": _around(7, 7, 1), "bottom right": _around(17, 7, 1)}
    return _map("three-goals", goals, deaths=_around(12, 12, 1))


def _tree_in_the_middle() -> GridWorldMap:
    """A deadly block of 5 x 5 right of the centre, and behind it, at the right border, a goal as high as it is."""
    height = range(10, 15)
    return _map("tree-in-the-middle", {"right": _cells(range(23, 25), height)}, deaths=_cells(range(13, 18), height))


def _two_slits() -> GridWorldMap:
    """The right border is the goal, behind a wall with two openings of four cells."""
    walls = _cells(range(15, 16), _ALL)
    walls &= ~_cells(_ALL, range(4, 8)) & ~_cells(_ALL, range(17, 21))
    return _map("two-slits", {"right": _cells(range(24, 25), _ALL)}, walls)


def _cshape() -> GridWorldMap:
    """A goal of 5 x 5 at the centre, with walls above, below and to the right of it; the way in is from the left."""
    reach = range(7, 18)
    walls = _cells(reach, range(7, 8)) | _cells(reach, range(17, 18)) | _cells(range(17, 18), reach)
    return _map("cshape", {"centre": _around(12, 12, 2)}, walls)


_MAKERS = {
    "two-walls": _two_walls,
    "three-goals": _three_goals,
    "tree-in-the-middle": _tree_in_the_middle,
    "two-slits": _two_slits,
    "cshape": _cshape,
}

MAP_NAMES = tuple(_MAKERS)
"""Names of the maps."""


@functools.cache
def grid_map(name: str) -> GridWorldMap:
    """The map called `name`, one of `MAP_NAMES`.

    Raises:
        ValueError: there is no such map.
    """
    if name not in _MAKERS:
        raise ValueError(f"name: expected one of {', '.join(MAP_NAMES)}, got {name!r}")
    return _MAKERS[name]()
