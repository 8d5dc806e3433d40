"""The exact state of one environment, where it is known what that is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.classic_control.pendulum import PendulumEnv
from gymnasium.wrappers import OrderEnforcing, TimeLimit

from fastflow.online_envs.generators import generator_state, set_generator_state
from fastflow.online_envs.ogbench import EpisodeSeeds
from fastflow.online_envs.simulator import set_simulator_state, simulator_state

__all__ = ["capture", "reinstate"]

# Environments whose state is their simulator's, their generator's and numbers in attributes of their own.
_MUJOCO = ("gymnasium.envs.mujoco.", "ogbench.online_locomotion.", "ogbench.locomaze.", "ogbench.manipspace.envs.")


def capture(env: gymnasium.Env) -> dict[str, np.ndarray] | None:
    """State of an environment that has been reset, its wrappers included; None where one of them is unknown.

    An environment of another kind can take part with methods `snapshot()` and `restore(state)` of its own, whose keys
    start with "core.".
    """
    state: dict[str, np.ndarray] = {}
    for wrapper in _wrappers(env):
        if type(wrapper) is TimeLimit:
            state["time_limit"] = np.array(wrapper._elapsed_steps, dtype=np.int64)
        elif type(wrapper) is EpisodeSeeds:
            words = generator_state(wrapper.generator)
            assert words is not None
            state["episode_seeds"] = words
        elif type(wrapper) is not OrderEnforcing:
            return None
    core: Any = env.unwrapped
    if hasattr(core, "snapshot"):
        own = core.snapshot()
        return None if own is None else {**state, **own}
    generator = generator_state(core.np_random)
    if generator is None:
        return None
    state["generator"] = generator
    if type(core) is PendulumEnv:
        last_u = np.nan if core.last_u is None else core.last_u
        return {**state, "core.state": np.array(core.state), "core.last_u": np.array(last_u, dtype=np.float64)}
    if not _is_mujoco(core):
        return None
    state |= simulator_state(core.model, core.data)
    return {**state, **{f"core.{name}": np.array(value) for name, value in _numbers(core)}}


def reinstate(env: gymnasium.Env, state: dict[str, np.ndarray]) -> None:
    """Gives an environment that has been reset the state that `capture` returned for another of its kind."""
    for wrapper in _wrappers(env):
        if type(wrapper) is TimeLimit:
            wrapper._elapsed_steps = int(state["time_limit"])  # type: ignore[assignment]
        elif type(wrapper) is EpisodeSeeds:
            set_generator_state(wrapper.generator, state["episode_seeds"])
    core: Any = env.unwrapped
    if hasattr(core, "restore"):
        core.restore(state)
        return
    set_generator_state(core.np_random, state["generator"])
    if type(core) is PendulumEnv:
        core.state = np.array(state["core.state"])
        core.last_u = None if np.isnan(state["core.last_u"]) else np.float64(state["core.last_u"])
        return
    set_simulator_state(core.model, core.data, state)
    for name, value in _numbers(core):
        # In its own type: Python's numbers and NumPy's do not compute alike in single precision.
        new = state[f"core.{name}"]
        setattr(core, name, np.array(new) if isinstance(value, np.ndarray) else type(value)(new.item()))


def _wrappers(env: gymnasium.Env) -> Iterator[gymnasium.Wrapper]:
    while isinstance(env, gymnasium.Wrapper):
        yield env
        env = env.env


def _is_mujoco(core: Any) -> bool:
    modules = [kind.__module__ for kind in type(core).__mro__]
    if type(core).__module__ == "fastflow.envs":
        modules = modules[1:]
    # A teleport's exit is drawn within an episode, from a stream that fastflow.envs keeps to itself.
    return modules[0].startswith(_MUJOCO) and getattr(core, "_teleport_info", None) is None


def _numbers(core: Any) -> Iterator[tuple[str, Any]]:
    """Attributes of an environment that are numbers or arrays of numbers."""
    for name, value in sorted(vars(core).items()):
        is_array = isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.number)
        if is_array or (isinstance(value, bool | int | float | np.number | np.bool_) and name != "_np_random_seed"):
            yield name, value
