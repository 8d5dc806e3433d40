"""The algorithms: one file says all of one algorithm. They are found here by name, and imported only when asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

__all__ = ["NAMES", "Entry", "agent_class", "command", "config_class", "make", "module", "settings_class", "task_class"]


class Entry(NamedTuple):
    """Where the parts of an algorithm are, as (module, name)."""

    config: tuple[str, str]
    """The configuration class; its module has `PRESETS`, `LOOP_PRESETS` and `preset_for` too."""
    agent: tuple[str, str]
    settings: tuple[str, str]
    """Settings of its training: a subclass of `fastflow.settings.LoopSettings`."""
    task: tuple[str, str]
    """What it is trained on: a `fastflow.train.Task`."""
    evaluate: tuple[str, str]
    plot: tuple[str, str]
    """What `fastflow evaluate` and `fastflow plot` do with its runs."""


def _offline(module: str, stem: str) -> Entry:
    """An agent with FQL's actor: they share the task and the commands."""
    where = f"fastflow.agents.{module}"
    return Entry(
        (where, f"{stem}Config"),
        (where, f"{stem}Agent"),
        ("fastflow.offline", "TrainSettings"),
        ("fastflow.offline", "OfflineTask"),
        ("fastflow.evaluate", "evaluate_runs"),
        ("fastflow.plot", "plot_runs"),
    )


NAMES: dict[str, Entry] = {
    "floq": _offline("floq", "Floq"),
    "fql": _offline("fql", "Fql"),
    "fql-iqn": _offline("fql_iqn", "FqlIqn"),
    "value-flows": _offline("value_flows", "ValueFlows"),
    "td2-cfm": Entry(
        ("fastflow.agents.td2_cfm", "Td2CfmConfig"),
        ("fastflow.agents.td2_cfm", "Td2CfmAgent"),
        ("fastflow.horizon", "HorizonSettings"),
        ("fastflow.horizon", "HorizonTask"),
        ("fastflow.horizon", "evaluate_runs"),
        ("fastflow.horizon_figures", "plot_runs"),
    ),
    "fb": Entry(
        ("fastflow.agents.forward_backward", "ForwardBackwardConfig"),
        ("fastflow.agents.forward_backward", "ForwardBackwardAgent"),
        ("fastflow.family", "FamilySettings"),
        ("fastflow.family", "FamilyTask"),
        ("fastflow.family", "evaluate_runs"),
        ("fastflow.family", "plot_runs"),
    ),
    "fpo": Entry(
        ("fastflow.agents.fpo", "FpoConfig"),
        ("fastflow.agents.fpo", "FpoAgent"),
        ("fastflow.online", "OnlineSettings"),
        ("fastflow.online", "OnlineTask"),
        ("fastflow.online", "evaluate_runs"),
        ("fastflow.online_figures", "plot_runs"),
    ),
    "dppo": Entry(
        ("fastflow.agents.dppo", "DppoConfig"),
        ("fastflow.agents.dppo", "DppoAgent"),
        ("fastflow.online", "OnlineSettings"),
        ("fastflow.online", "OnlineTask"),
        ("fastflow.online", "evaluate_runs"),
        ("fastflow.online_figures", "plot_runs"),
    ),
    "ppo": Entry(
        ("fastflow.agents.ppo", "PpoConfig"),
        ("fastflow.agents.ppo", "PpoAgent"),
        ("fastflow.online", "OnlineSettings"),
        ("fastflow.online", "OnlineTask"),
        ("fastflow.online", "evaluate_runs"),
        ("fastflow.online_figures", "plot_runs"),
    ),
}
"""The algorithms by the names that the command line knows."""


def module(name: str) -> ModuleType:
    """The module of the algorithm `name`.

    Raises:
        ValueError: there is no such algorithm.
    """
    return importlib.import_module(_entry(name).config[0])


def config_class(name: str) -> type:
    """The configuration dataclass of the algorithm `name`.

    Raises:
        ValueError: there is no such algorithm.
    """
    return _load(_entry(name).config)


def agent_class(name: str) -> type:
    """The class of the agents of the algorithm `name`.

    Raises:
        ValueError: there is no such algorithm.
    """
    return _load(_entry(name).agent)


def settings_class(name: str) -> type:
    """The settings dataclass that `fastflow train` fills for the algorithm `name`.

    Raises:
        ValueError: there is no such algorithm.
    """
    return _load(_entry(name).settings)


def task_class(name: str) -> Any:
    """The class of what the algorithm `name` is trained on.

    Raises:
        ValueError: there is no such algorithm.
    """
    return _load(_entry(name).task)


def command(name: str, which: str) -> Callable[..., Any]:
    """What the command `which` ("evaluate" or "plot") does with runs of the algorithm `name`.

    Raises:
        ValueError: there is no such algorithm.
    """
    return _load(getattr(_entry(name), which))


def make(name: str, config: Any, **arguments: Any) -> Any:
    """A new agent of the algorithm `name`.

    Args:
        name: one of `NAMES`.
        config: of `config_class(name)`.
        **arguments: of the agent class, such as obs_dim, action_dim, device, seed.

    Raises:
        ValueError: there is no such algorithm, or an argument that cannot be.
        TypeError: `config` is another algorithm's.
    """
    return agent_class(name)(config, **arguments)


def _entry(name: str) -> Entry:
    if name not in NAMES:
        raise ValueError(f"agent: expected one of {sorted(NAMES)}, got {name!r}")
    return NAMES[name]


def _load(where: tuple[str, str]) -> Any:
    return getattr(importlib.import_module(where[0]), where[1])
