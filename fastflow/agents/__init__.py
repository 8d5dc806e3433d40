"""The algorithms: one file says all of one algorithm. They are found here by name, and imported only when asked for."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

__all__ = ["NAMES", "config_class", "make", "module"]

NAMES: dict[str, tuple[str, str, str]] = {
    "floq": ("fastflow.agents.floq", "FloqConfig", "FloqAgent"),
}
"""Name of an algorithm: its module (which has `PRESETS` and `preset_for` too), configuration class and agent class."""


def module(name: str) -> ModuleType:
    """The module of the algorithm `name`.

    Raises:
        ValueError: there is no such algorithm.
    """
    if name not in NAMES:
        raise ValueError(f"agent: expected one of {sorted(NAMES)}, got {name!r}")
    return importlib.import_module(NAMES[name][0])


def config_class(name: str) -> type:
    """The configuration dataclass of the algorithm `name`.

    Raises:
        ValueError: there is no such algorithm.
    """
    return getattr(module(name), NAMES[name][1])


def make(name: str, config: Any, **arguments: Any) -> Any:
    """A new agent of the algorithm `name`.

    Args:
        name: one of `NAMES`.
        config: of `config_class(name)`.
        **arguments: of the agent class: obs_dim, action_dim, reward_range, device, seed, observation_statistics.

    Raises:
        ValueError: there is no such algorithm, or an argument that cannot be.
        TypeError: `config` is another algorithm's.
    """
    return getattr(module(name), NAMES[name][2])(config, **arguments)
