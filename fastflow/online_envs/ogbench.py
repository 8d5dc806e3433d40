"""OGBench's environments for learning online: `online-ant-v0`, `online-humanoid-v0` and its singletask environments."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np

from fastflow import envs
from fastflow.online_envs.names import singletask

__all__ = ["EpisodeSeeds", "import_online", "is_singletask", "make_singletask", "quiet_simulator"]


def import_online() -> None:
    """Registers OGBench's `online-*` environments with Gymnasium.

    Raises:
        MissingExtra: the "rl" extra is not installed.
    """
    envs.import_ogbench()
    with quiet_simulator():
        importlib.import_module("ogbench.online_locomotion")


def is_singletask(name: str) -> bool:
    """Whether `name` is a singletask environment, with or without the type of a dataset."""
    return name in singletask() or name in envs.known_names()


def make_singletask(name: str, **kwargs: Any) -> gymnasium.Env:
    """Makes a singletask environment by `fastflow.envs.make_env`, whose episodes are numbered by seeds."""
    return EpisodeSeeds(envs.make_env(singletask().get(name, name), **kwargs))


class EpisodeSeeds(gymnasium.Wrapper):
    """Draws a seed for every episode that is begun without one.

    OGBench draws start positions from NumPy's global generator, which `fastflow.envs` replaces by a stream of the
    environment's own. With a seed for each episode nothing of that stream outlives one, so that a snapshot needs this
    wrapper's generator alone.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self.generator = np.random.default_rng()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begins an episode; `seed` also decides the episodes after it."""
        if seed is not None:
            self.generator = np.random.default_rng(seed)
        return self.env.reset(seed=int(self.generator.integers(1 << 63)), options=options)


@contextlib.contextmanager
def quiet_simulator() -> Iterator[None]:
    """Hides the warnings that are known and harmless for state observations, as `fastflow.envs` does."""
    with warnings.catch_warnings():
        # mujoco.viewer initialises GLFW when it is imported, on machines without a display too.
        warnings.filterwarnings("ignore", message=r".*\(65550\) b'(X11|Wayland): ")
        warnings.filterwarnings("ignore", message=r".*The DISPLAY environment variable is missing")
        warnings.filterwarnings("ignore", message=r".*Box (low|high)'s precision lowered by casting")
        yield
