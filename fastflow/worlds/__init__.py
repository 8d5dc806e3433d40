"""Small worlds with a known or cheap truth, in torch, where successor measures and values can be judged."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fastflow.envs import nearest
from fastflow.errors import UserError
from fastflow.worlds.base import World, from_trajectories
from fastflow.worlds.circle import Circle
from fastflow.worlds.linear_gaussian import LinearGaussian
from fastflow.worlds.pointmass import PointMass
from fastflow.worlds.pointmaze import MAZES, PointMaze

__all__ = ["WORLDS", "World", "from_trajectories", "make_world"]

_MAKERS: dict[str, Callable[[], World]] = {
    "linear-gaussian": LinearGaussian,
    "circle": Circle,
    **{f"pointmaze-{size}": partial(PointMaze, size) for size in MAZES},
    "pointmass-maze": PointMass,
}

WORLDS: tuple[str, ...] = tuple(_MAKERS)
"""Names that `make_world` takes."""


def make_world(name: str) -> World:
    """Makes the world of a name in `WORLDS`.

    Raises:
        UserError: there is no such world; the message suggests the nearest one.
    """
    if name not in _MAKERS:
        raise UserError(f"{name}: unknown world{nearest(name, list(WORLDS))} (known: {', '.join(WORLDS)})")
    return _MAKERS[name]()
