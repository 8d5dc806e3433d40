"""Names of environments: which there are, and what to say about one that there is not."""

from __future__ import annotations

import importlib
import re

from fastflow import envs
from fastflow.errors import UserError, missing_extra
from fastflow.online_envs.gridworld_maps import MAP_NAMES

__all__ = ["BANDIT", "DM_CONTROL", "GRIDWORLDS", "ONLINE", "check_name", "known_names", "singletask"]

GRIDWORLDS = {f"gridworld-{name}": name for name in MAP_NAMES}
"""Name of the environment -> name of its map."""

BANDIT = "bandit-two-modes"

DM_CONTROL = {
    f"dmc-{domain}-{task}": (domain, task)
    for domain, task in (
        ("ball_in_cup", "catch"),
        ("cartpole", "balance"),
        ("cheetah", "run"),
        ("finger", "spin"),
        ("finger", "turn_easy"),
        ("finger", "turn_hard"),
        ("fish", "swim"),
        ("point_mass", "easy"),
        ("reacher", "easy"),
        ("reacher", "hard"),
    )
}
"""The ten tasks of the FPO paper: name of the environment -> domain and task of the suite."""

ONLINE = ("online-ant-v0", "online-humanoid-v0")
"""OGBench's environments for online learning. Its third, online-antball-v0, cannot be made without a renderer."""

_GYMNASIUM = ("HalfCheetah-v5", "Hopper-v5", "Pendulum-v1", "Reacher-v5", "Walker2d-v5")


def singletask() -> dict[str, str]:
    """OGBench's singletask environments, without the type of a dataset that nobody needs here -> with one.

    The environment is the same for each type: "pointmaze-arena-singletask-v0" is made as
    "pointmaze-arena-navigate-singletask-v0".
    """
    return {re.sub(r"-[a-z]+(?=-singletask)", "", name): name for name in envs.known_names()}


def known_names() -> list[str]:
    """Names that have a meaning here, sorted: everything but Gymnasium's ids, of which those that the tests use."""
    return sorted([*GRIDWORLDS, BANDIT, *DM_CONTROL, *ONLINE, *singletask(), *_GYMNASIUM])


def check_name(name: str) -> None:
    """Checks an environment's name without making the environment.

    Known are `known_names()`, the names of `fastflow.envs`, and what is registered with Gymnasium ("module:id" imports
    the module first, as `gymnasium.make` does).

    Raises:
        UserError: there is no such name; the message suggests the nearest one.
        MissingExtra: Gymnasium, which would have to know, is not installed.
    """
    names = known_names()
    if name in names or name in envs.known_names():
        return
    registered: list[str] = []
    if not name.startswith(("gridworld-", "bandit-", "dmc-")):
        try:
            import gymnasium
        except ImportError as error:
            raise missing_extra("rl", error.name or "gymnasium") from error
        module, _, env_id = name.rpartition(":")
        if module:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise UserError(f"{name}: the module {module} cannot be imported: {error}") from error
        if env_id in gymnasium.registry:
            return
        registered = list(gymnasium.registry)
    raise UserError(
        f"{name}: unknown environment{envs.nearest(name, names + registered)} "
        "(known are gridworld-*, bandit-two-modes, dmc-*, OGBench's and what is registered with Gymnasium)"
    )
