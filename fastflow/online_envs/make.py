"""From a name to environments."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastflow.errors import UserError, missing_extra
from fastflow.online_envs.names import BANDIT, DM_CONTROL, GRIDWORLDS, ONLINE, check_name
from fastflow.online_envs.vector import OnlineEnvs

if TYPE_CHECKING:
    import gymnasium

__all__ = ["make_envs", "make_single"]


def make_envs(name: str, num_envs: int, *, asynchronous: bool = False) -> OnlineEnvs:
    """Makes N environments that step together.

    Args:
        name: see `check_name`.
        num_envs: N.
        asynchronous: each environment in a process of its own, with one thread; pays where a step takes longer than
            about 0.1 ms. Grid worlds and bandits are arrays in this process either way.

    Raises:
        ValueError: num_envs < 1.
        UserError: unknown name, or not an environment with vectors of numbers as observations and bounded ones as
            actions, or it cannot be made.
        MissingExtra: what it needs is not installed, or in a version that does not serve.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs: expected at least 1, got {num_envs}")
    check_name(name)
    _import_gymnasium()
    if name in GRIDWORLDS:
        from fastflow.online_envs.gridworld import GridWorlds, grid_map

        return GridWorlds(grid_map(GRIDWORLDS[name]), num_envs, name)
    if name == BANDIT:
        from fastflow.online_envs.bandit import Bandits

        return Bandits(num_envs, name)
    from fastflow.online_envs.simulated import InProcesses, InTurn

    return (InProcesses if asynchronous else InTurn)(name, num_envs, _recipe(name))


def make_single(name: str, **kwargs: Any) -> gymnasium.Env:
    """Makes one environment, as `make_envs` does but without the guard: a Gymnasium environment that is reset by hand.

    Args:
        name: see `check_name`.
        **kwargs: passed on to the environment, such as `render_mode`.

    Raises:
        UserError, MissingExtra: as `make_envs`.
    """
    check_name(name)
    _import_gymnasium()
    return _recipe(name)(**kwargs)


def _import_gymnasium() -> None:
    try:
        import gymnasium  # noqa: F401
    except ImportError as error:
        raise missing_extra("rl", error.name or "gymnasium") from error


def _recipe(name: str) -> Callable[..., gymnasium.Env]:
    """A function that makes one environment of a known name, in this or in another process.

    What is registered here need not be there, hence Gymnasium's specification instead of its id.
    """
    if name in GRIDWORLDS or name == BANDIT:
        return functools.partial(_make_native, name)
    if name in DM_CONTROL:
        from fastflow.online_envs.dm_control import check_versions, make_task

        check_versions()
        return functools.partial(make_task, *DM_CONTROL[name])
    import gymnasium

    from fastflow.online_envs.ogbench import import_online, is_singletask, make_singletask

    if is_singletask(name):
        return functools.partial(make_singletask, name)
    if name in ONLINE:
        import_online()
    return functools.partial(_make_registered, gymnasium.spec(name))


def _make_native(name: str, **kwargs: Any) -> gymnasium.Env:
    from fastflow.online_envs.bandit import Bandit
    from fastflow.online_envs.gridworld import GridWorld, grid_map

    return Bandit(**kwargs) if name == BANDIT else GridWorld(grid_map(GRIDWORLDS[name]), **kwargs)


def _make_registered(spec: Any, **kwargs: Any) -> gymnasium.Env:
    import gymnasium

    from fastflow.online_envs.ogbench import quiet_simulator
    from fastflow.online_envs.simulator import quiet_deprecations

    # Gymnasium's checker compares every observation with its space; the guard looks for what does harm.
    kwargs.setdefault("disable_env_checker", True)
    # Importing MuJoCo takes a while, and not every environment needs it.
    quiet_models = quiet_deprecations() if "mujoco" in str(spec.entry_point) else contextlib.nullcontext()
    try:
        with quiet_simulator(), quiet_models:
            return gymnasium.make(spec, **kwargs)
    except gymnasium.error.DependencyNotInstalled as error:
        if importlib.util.find_spec("mujoco") is None:
            raise missing_extra("rl", "mujoco") from error
        raise UserError(f"{spec.id}: {error}") from error
    except Exception as error:
        raise UserError(f"{spec.id} cannot be made: {type(error).__name__}: {error}") from error
