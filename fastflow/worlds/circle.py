"""Rotation of a circle: the smallest deterministic world, whose futures are points at equal angles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fastflow.worlds.base import World, geometric

__all__ = ["Circle"]

_REACH = 0.25  # of the behaviour's rotations
_WIDTH = 0.3  # of the tasks
_PLACES = {"near-east": (1.0, 0.0), "near-north": (0.0, 1.0)}


class Circle(World):
    """States are points (cos, sin) of the unit circle, an action turns one by that many radians, and a policy w turns
    by w at every step. Nothing is random but where data start and what the behaviour does: U(-0.25, 0.25).

    Points off the circle are turned as well and keep their radius. Tasks are exp(-|x - c|^2 / (2 0.3^2)).
    """

    name = "circle"
    state_dim = 2
    action_dim = 1
    policy_dim = 1
    policies: Mapping[str, tuple[float, ...]] = MappingProxyType(
        {"forward": (0.02,), "backward": (-0.02,), "fast": (0.1,)}
    )
    tasks = tuple(_PLACES)
    bounds = ((-1.0, 1.0), (-1.0, 1.0))
    horizon = 256
    deterministic = True

    def act(self, state: Tensor, w: Tensor | None = None) -> Tensor:
        self._check_state(state)
        action = self._embedding(w, state)
        assert action is not None
        return action

    def behave(self, state: Tensor, memory: Any, generator: torch.Generator) -> tuple[Tensor, Any]:
        self._check_state(state)
        uniform = torch.rand(len(state), 1, generator=generator, dtype=state.dtype, device=state.device)
        return _REACH * (2.0 * uniform - 1.0), None

    def step(self, state: Tensor, action: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        self._check_step(state, action)
        return _turned(state, action[:, 0]), torch.zeros(len(state), dtype=torch.bool, device=state.device)

    def starts(self, num: int, generator: torch.Generator) -> Tensor:
        angle = 2.0 * math.pi * torch.rand(num, generator=generator, device=generator.device)
        return torch.stack([angle.cos(), angle.sin()], 1)

    def reward(self, task: str, state: Tensor) -> Tensor:
        self._check_task(task)
        return torch.exp((state - state.new_tensor(_PLACES[task])).square().sum(-1) / (-2.0 * _WIDTH**2))

    @torch.no_grad()
    def futures(
        self,
        state: Tensor,
        action: Tensor,
        w: Tensor | None,
        gamma: float,
        num: int,
        generator: torch.Generator,
    ) -> Tensor:
        """As `World.futures`, in closed form."""
        w = self._check(state, action, w, gamma, num)
        assert w is not None
        times = geometric((len(state), num), gamma, generator, state.device)
        angle = action.double() + (times - 1).double() * w.double()
        return _turned(state.double()[:, None], angle).to(state.dtype)


def _turned(state: Tensor, angle: Tensor) -> Tensor:
    """Points [..., 2] turned by angles [...]."""
    x, y = state.unbind(-1)
    cosine, sine = angle.cos(), angle.sin()
    return torch.stack([cosine * x - sine * y, sine * x + cosine * y], -1)
