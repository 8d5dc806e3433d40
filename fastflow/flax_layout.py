"""The networks of the published JAX code of floq and FQL: what flax calls their parameters, which of fastflow's those
are, and which architecture their shapes tell.

Both keep a Dense kernel as [in, out] and an ensemble as a leading axis E, and feed a network with the observation, the
action and then the flow's state and time in the same order. So every array is taken as it is; only names differ.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fastflow.errors import UserError

__all__ = ["AGENTS", "Layout", "Network", "export_names", "read_layout"]


class Network(NamedTuple):
    """Where one network is."""

    root: str
    """Its layers in flax's tree, under `modules_<name>`."""
    module: str
    """Its layers among fastflow's parameters, under `<name>`."""
    ensemble: bool = False
    main: bool = False
    """The critic that learns from rewards, or its target: the one that `use_resnets` makes residual."""


_ACTORS = {"actor_bc_flow": Network("mlp", "field"), "actor_onestep_flow": Network("mlp", "network")}
_FLOW_CRITIC = Network("mlp", "field", ensemble=True, main=True)
_CRITIC = Network("value_net", "network", ensemble=True, main=True)
AGENTS: dict[str, dict[str, Network]] = {
    "floq": {"floq": _FLOW_CRITIC, "target_floq": _FLOW_CRITIC, "critic": _CRITIC._replace(main=False), **_ACTORS},
    "fql": {"critic": _CRITIC, "target_critic": _CRITIC, **_ACTORS},
}
"""The networks of each agent by the name that the published code and fastflow share."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the names and shapes of a checkpoint tell.

    Attributes:
        agent: "floq" or "fql".
        obs_dim, action_dim: O and A.
        settings: the fields of the agent's configuration that the shapes fix, each with its value and the entry that
            tells it.
        features: width of what the flow critic's first layer takes besides observation and action, HL-Gauss features of
            the state and those of time; None for FQL.
        names: fastflow's names of all parameters, by flax's.
    """

    agent: str
    obs_dim: int
    action_dim: int
    settings: dict[str, tuple[Any, str]]
    features: int | None
    names: dict[str, str]


@dataclasses.dataclass(frozen=True)
class _Stack:
    """One network as its shapes tell it."""

    prefix: str
    names: dict[str, str]  # flax's after the prefix -> fastflow's after the module
    members: int | None
    inputs: int
    hidden: tuple[int, ...]
    outputs: int
    norm: bool
    block_depth: int | None  # layers per residual block
    first: str  # flax's name of the first kernel
    head: str


def read_layout(parameters: Mapping[str, np.ndarray]) -> Layout:
    """Tells what agent and architecture the parameters of a checkpoint are.

    Args:
        parameters: arrays by flax's names, `modules_<network>/.../kernel`.

    Raises:
        UserError: they are of no such agent, or of an architecture that fastflow's agent of that name does not have;
            the message names the entry, what was expected and what came.
    """
    agent = _agent(parameters)
    stacks = {name: _read_stack(parameters, name, network) for name, network in AGENTS[agent].items()}
    _check_targets(parameters, stacks)
    flow, onestep, critic = (stacks[name] for name in ("actor_bc_flow", "actor_onestep_flow", "critic"))
    a = onestep.outputs
    o = onestep.inputs - a
    if o < 1:
        raise UserError(f"{onestep.first}: expected more inputs than the {a} of the noise, got {onestep.inputs}")
    _expect(flow.head, "outputs (the actions)", a, flow.outputs)
    _expect(flow.first, f"inputs ({o} observations, {a} actions, 1 time)", o + a + 1, flow.inputs)
    _expect(flow.first, "hidden layers, as the one-step actor's", onestep.hidden, flow.hidden)
    _expect(flow.prefix, "LayerNorm, as in the one-step actor", onestep.norm, flow.norm)
    _expect(critic.first, f"inputs ({o} observations, {a} actions)", o + a, critic.inputs)
    _expect(critic.head, "output (the value)", 1, critic.outputs)
    settings: dict[str, tuple[Any, str]] = {
        "num_ensembles": (critic.members, critic.first),
        "layer_norm": (critic.norm, critic.prefix),
        "actor_hidden_dims": (onestep.hidden, onestep.prefix),
        "actor_layer_norm": (onestep.norm, onestep.prefix),
    }
    features = None
    if agent == "floq":
        floq = stacks["floq"]
        _expect(floq.head, "output (the velocity)", 1, floq.outputs)
        _expect(floq.prefix, "LayerNorm, as in the distilled critic", critic.norm, floq.norm)
        features = floq.inputs - o - a
        if features < 2:
            raise UserError(
                f"{floq.first}: expected inputs for {o} observations, {a} actions, the state and the time, "
                f"got {floq.inputs}"
            )
        settings |= {"flow_num_ensembles": (floq.members, floq.first), **_block_settings(floq)}
    elif critic.block_depth is None:
        settings["use_resnets"] = (False, critic.prefix)
    else:
        settings |= _block_settings(critic)
    if critic.block_depth is None:
        settings["value_hidden_dims"] = (critic.hidden, critic.prefix)
    return Layout(agent, o, a, settings, features, _full_names(agent, stacks))


def export_names(agent: str, parameters: Mapping[str, Any], block_depth: int | None = None) -> dict[str, str]:
    """Flax's names of an agent's parameters.

    Args:
        agent: "floq" or "fql".
        parameters: by fastflow's names, those of all networks.
        block_depth: layers per residual block of the main critic; None for an MLP.

    Returns:
        Fastflow's names by flax's.
    """
    names = {}
    for name, network in AGENTS[agent].items():
        ours = f"{name}.{network.module}."
        count = sum(key.startswith(f"{ours}layers.") and key.endswith(".weight") for key in parameters)
        norm = f"{ours}norms.0.weight" in parameters
        depth = block_depth if network.main else None
        for flax, own in _stack_names(count, norm, depth).items():
            names[f"modules_{name}/{network.root}/{flax}"] = ours + own
    return names


def _agent(parameters: Mapping[str, np.ndarray]) -> str:
    found = {name.split("/")[0].removeprefix("modules_") for name in parameters}
    for agent, networks in AGENTS.items():
        if found == set(networks):
            return agent
    expected = "; or ".join(f"{', '.join(sorted(networks))} ({agent})" for agent, networks in AGENTS.items())
    raise UserError(
        f"networks of the checkpoint: expected {expected}; got {', '.join(sorted(found)) or 'none'}. It is of another "
        "algorithm"
    )


def _stack_names(layers: int, norm: bool, block_depth: int | None) -> dict[str, str]:
    """Parameters of a stack of `layers` Dense layers, the head included: fastflow's names by flax's."""
    names: dict[str, str] = {}
    for i in range(layers):
        dense, group = i, ""
        if block_depth is not None:
            block, place = divmod(i - 1, block_depth)
            dense, group = (0, "initial_block/") if i == 0 else (place, f"hidden_blocks_{block}/")
            if i == layers - 1:
                dense, group = 0, "final_block/"
        names |= {
            f"{group}Dense_{dense}/kernel": f"layers.{i}.weight",
            f"{group}Dense_{dense}/bias": f"layers.{i}.bias",
        }
        if norm and i < layers - 1:
            names[f"{group}LayerNorm_{dense}/scale"] = f"norms.{i}.weight"
            names[f"{group}LayerNorm_{dense}/bias"] = f"norms.{i}.bias"
    return names


def _read_stack(parameters: Mapping[str, np.ndarray], name: str, network: Network) -> _Stack:
    prefix = f"modules_{name}/{network.root}"
    mine = {key: value for key, value in parameters.items() if key.startswith(f"modules_{name}/")}
    inner = {key.removeprefix(f"{prefix}/"): value for key, value in mine.items() if key.startswith(f"{prefix}/")}
    layers = len([key for key in inner if re.fullmatch(r"(.*/)?Dense_\d+/kernel", key)])
    block_depth = None
    if network.main and "initial_block/Dense_0/kernel" in inner:
        block_depth = max(len([key for key in inner if re.fullmatch(r"hidden_blocks_0/Dense_\d+/kernel", key)]), 1)
    norm = any("LayerNorm" in key for key in inner)
    # What a network of this kind consists of, against what is there.
    names = _stack_names(layers, norm, block_depth)
    for key in names:
        if key not in inner:
            raise UserError(f"{prefix}/{key}: expected among the {layers} layers of {prefix}, but the file has none")
    for key in mine:
        if key.removeprefix(f"{prefix}/") not in names:
            raise UserError(f"{key}: expected {', '.join(list(names)[:2])} and so on under {prefix}, got this name too")

    by_own = {own: key for key, own in names.items()}
    if layers < 2:
        raise UserError(f"{prefix}/Dense_{layers}/kernel: expected at least two layers in {prefix}, got {layers}")
    axes = "[E, in, out]" if network.ensemble else "[in, out]"
    first = inner[by_own["layers.0.weight"]]
    if first.ndim != 2 + network.ensemble:
        raise UserError(f"{prefix}/{by_own['layers.0.weight']}: expected {axes}, got {list(first.shape)}")
    lead = first.shape[:-2]
    width, widths = first.shape[-2], []
    for i in range(layers):
        key = by_own[f"layers.{i}.weight"]
        out = inner[key].shape[-1] if inner[key].ndim else 0
        _check_array(f"{prefix}/{key}", inner[key], (*lead, width, out))
        width = out
        widths.append(out)
        for own in (f"layers.{i}.bias", f"norms.{i}.weight", f"norms.{i}.bias"):
            if own in by_own:
                _check_array(f"{prefix}/{by_own[own]}", inner[by_own[own]], (*lead, width))
    return _Stack(
        prefix=prefix,
        names=names,
        members=lead[0] if lead else None,
        inputs=first.shape[-2],
        hidden=tuple(widths[:-1]),
        outputs=widths[-1],
        norm=norm,
        block_depth=block_depth,
        first=f"{prefix}/{by_own['layers.0.weight']}",
        head=f"{prefix}/{by_own[f'layers.{layers - 1}.weight']}",
    )


def _check_array(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape or 0 in shape:
        raise UserError(f"{name}: expected shape {list(shape)}, got {list(array.shape)}")
    if array.dtype != np.float32:
        raise UserError(f"{name}: expected float32, got {array.dtype}")
    if not np.isfinite(array).all():
        raise UserError(f"{name}: expected finite numbers, got NaN or infinity")


def _check_targets(parameters: Mapping[str, np.ndarray], stacks: Mapping[str, _Stack]) -> None:
    """A target network has the shapes of the network that it follows."""
    for name, stack in stacks.items():
        if not name.startswith("target_"):
            continue
        online = stacks[name.removeprefix("target_")]
        _expect(stack.prefix, f"layers, as {online.prefix}", sorted(online.names), sorted(stack.names))
        for key in stack.names:
            shape = parameters[f"{online.prefix}/{key}"].shape
            _check_array(f"{stack.prefix}/{key}", parameters[f"{stack.prefix}/{key}"], shape)


def _expect(entry: str, what: str, expected: Any, came: Any) -> None:
    if came != expected:
        raise UserError(f"{entry}: expected {expected} {what}, got {came}")


def _block_settings(critic: _Stack) -> dict[str, tuple[Any, str]]:
    """Width and depth of a critic whose hidden layers are of one width, and whether they are residual blocks."""
    width, layers = critic.hidden[0], len(critic.hidden)
    _expect(critic.prefix, "as the widths of its hidden layers", (width,) * layers, critic.hidden)
    found: dict[str, Any] = {"use_resnets": critic.block_depth is not None, "block_width": width}
    if critic.block_depth is None:
        found["block_depth"] = layers
    else:
        found |= {"block_depth": critic.block_depth, "num_transformations": (layers - 1) // critic.block_depth}
    return {name: (value, critic.prefix) for name, value in found.items()}


def _full_names(agent: str, stacks: Mapping[str, _Stack]) -> dict[str, str]:
    return {
        f"{stack.prefix}/{key}": f"{name}.{AGENTS[agent][name].module}.{own}"
        for name, stack in stacks.items()
        for key, own in stack.names.items()
    }
