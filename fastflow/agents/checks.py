"""What every agent checks the same way: its configuration, the tensors it is given and the states it takes over."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastflow.agents.descent import hold_rates

__all__ = ["check_config", "check_int", "check_state", "check_tensor", "check_widths", "copy_state", "ready_moments"]

Range = tuple[Callable[[float], bool], str]


def check_int(owner: str, name: str, value: object, least: int) -> None:
    """Raises TypeError or ValueError unless `value` is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{owner}: {name} must be at least {least}, got {value}")


def check_widths(config: Any, *names: str) -> None:
    """Turns the fields `names` of a frozen dataclass into tuples of at least one positive int."""
    owner = type(config).__name__
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, (tuple, list)):
            raise TypeError(f"{owner}: {name} must be a tuple of ints, got {value!r}")
        object.__setattr__(config, name, tuple(value))
        if not value:
            raise ValueError(f"{owner}: {name} must name at least one width, got ()")
        for width in value:
            check_int(owner, name, width, 1)


def check_config(
    config: Any,
    least: Mapping[str, int],
    ranges: Mapping[str, Range],
    choices: Mapping[str, tuple[object, ...]],
) -> None:
    """Checks the fields of a configuration dataclass.

    Args:
        config: an instance.
        least: ints and their smallest value.
        ranges: numbers, each with a test and what it expects in words.
        choices: fields and what they may be. Fields whose default is a bool are checked to be one.

    Raises:
        ValueError: a value outside its range. TypeError: a value of another type. Both name the field.
    """
    owner = type(config).__name__
    for name, bound in least.items():
        check_int(owner, name, getattr(config, name), bound)
    for name, (test, expected) in ranges.items():
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{owner}: {name} must be a number, got {value!r}")
        if not (math.isfinite(value) and test(value)):
            raise ValueError(f"{owner}: {name} must be {expected}, got {value}")
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{owner}: {name} must be one of {allowed}, got {getattr(config, name)!r}")
    for field in dataclasses.fields(config):
        if isinstance(field.default, bool) and not isinstance(getattr(config, field.name), bool):
            raise TypeError(f"{owner}: {field.name} must be True or False, got {getattr(config, field.name)!r}")


def check_tensor(
    owner: str, name: str, tensor: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Raises ValueError or TypeError unless `tensor` has this shape (None is any length), dtype and device.

    Values are not looked at: that would wait for the device.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{owner}: {name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dim() != len(shape) or any(n is not None and n != m for n, m in zip(shape, tensor.shape, strict=True)):
        expected = ", ".join("N" if n is None else str(n) for n in shape)
        raise ValueError(f"{owner}: {name} must be [{expected}], got {list(tensor.shape)}")
    if tensor.dtype != dtype:
        raise TypeError(f"{owner}: {name} must be {dtype}, got {tensor.dtype}")
    if tensor.device.type != device.type or device.index not in (None, tensor.device.index):
        raise ValueError(f"{owner}: {name} must be on {device}, got {tensor.device}")


def check_state(owner: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raises ValueError or TypeError unless `given` has the names, shapes and dtypes of the agent's `own` state."""
    missing, unexpected = sorted(set(own) - set(given)), sorted(set(given) - set(own))
    if missing or unexpected:
        raise ValueError(f"{owner}.load_state_dict: missing {_some(missing)}; unexpected {_some(unexpected)}")
    for name, expected in own.items():
        tensor = given[name]
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{owner}.load_state_dict: {name} must be a Tensor, got {type(tensor).__name__}")
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            raise ValueError(
                f"{owner}.load_state_dict: {name} must be {list(expected.shape)} {expected.dtype}, "
                f"got {list(tensor.shape)} {tensor.dtype}"
            )
    if int(given["step"]) < 0:
        raise ValueError(f"{owner}.load_state_dict: step must be at least 0, got {int(given['step'])}")


def copy_state(agent: Any, tensors: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Puts a checked state into an agent: its `generator`, `step`, Adam's step counts and `tensors`, in place.

    Raises:
        ValueError: the generator's state is of another kind of device; the agent is then as it was.
    """
    try:
        agent.generator.set_state(given["generator"].cpu())
    except RuntimeError as error:
        owner = type(agent).__name__
        raise ValueError(f"{owner}.load_state_dict: generator does not fit {agent.device}: {error}") from error
    agent.step = int(given["step"])
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(given[name])
        for moments in agent.optimizer.state.values():
            moments["step"].fill_(agent.step)


def ready_moments(optimizer: torch.optim.Adam, device: torch.device) -> None:
    """Makes what Adam would make at its first step, so that every state of an agent has the same tensors.

    All step counts lie side by side, so that one operation counts them all (`fastflow.agents.descent`). On CUDA the
    learning rates become tensors: updates round them alike, be they captured in a graph or not.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    counts = torch.zeros(len(parameters), dtype=torch.float32, device=device)
    for parameter, count in zip(parameters, counts.unbind(), strict=True):
        optimizer.state[parameter] = {
            "step": count,
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    if device.type == "cuda":
        hold_rates(optimizer, device)


def _some(names: list[str]) -> str:
    """Names for an error message, not hundreds of them."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "nothing"
