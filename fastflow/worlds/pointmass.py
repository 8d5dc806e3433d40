"""The point-mass maze of unsupervised reinforcement learning: four rooms about a cross of walls, with inertia."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fastflow.worlds.base import World

__all__ = ["PointMass"]

# dm_control's point mass: motors of gear 0.1 on slides with damping 1 within +-0.29, for a ball of 0.3 kg.
_TIMESTEP, _FORCE, _DAMPING, _MASS = 0.02, 0.1, 1.0, 0.3
_RANGE, _BALL = 0.29, 0.01
_LENGTH, _WIDTH = 0.18 + _BALL, 0.02 + _BALL  # half sizes of the walls, for the centre of the ball
_SPEED = _FORCE / _DAMPING  # that the full force leads to
_GAP = 0.24  # distance from the origin to the middle of a gap

_STIFFNESS, _BRAKE = 20.0, 6.0  # of the controllers, near critical damping
_BEYOND = 0.06  # how far behind a gap they aim
_TOLERANCE = 0.015  # of the tasks; also their margin
_BAND = 0.03  # of the task "loop"
_RENEWAL = 0.01  # chance per step that the behaviour wants something else
_NOISE = 0.5  # of its actions

_CORNERS = {
    "reach_top_left": (-0.15, 0.15),
    "reach_top_right": (0.15, 0.15),
    "reach_bottom_left": (-0.15, -0.15),
    "reach_bottom_right": (0.15, -0.15),
}


class PointMass(World):
    """States (x, y, velocity) of a ball that actions in [-1, 1]^2 (others are clipped) push by 0.1 a, at 50 Hz.

    v' = (m v + h f) / (m + h d) and x' = x + h v', as MuJoCo's semi-implicit Euler method with implicit damping. Walls
    are simpler than MuJoCo's soft contacts: a ball (radius 0.01) that overlaps the cross (two boxes of half sizes 0.18
    and 0.02) or leaves +-0.29 is set back to the nearest face and loses its velocity into it. Nothing ends an episode.

    A policy w = (goal x, goal y, loop) is a controller with position and velocity feedback. It goes to the goal, room
    by room through the gaps at the ends of the cross (left or right first, then up or down); or, if loop is over 0.5,
    clockwise along the diamond |x| + |y| = 0.24, through all gaps, at speed 0.1.

    Tasks: "reach_..." is dm_control's tolerance of the distance to a corner (+-0.15, +-0.15): 1 within 0.015, then a
    Gaussian that is 0.1 at another 0.015; its small-control factor is left out. "loop" is exp(-e^2 / (2 0.03^2)) times
    the velocity along the diamond clockwise over 0.1, within [0, 1], with e the distance to the nearest side's line.

    Data start at rest in the top left room. The behaviour seeks a random place or pushes in a random direction, chosen
    anew with chance 0.01 per step, with noise 0.5 on the actions.
    """

    name = "pointmass-maze"
    state_dim = 4
    action_dim = 2
    policy_dim = 3
    policies: Mapping[str, tuple[float, ...]] = MappingProxyType(
        {**{name: (*goal, 0.0) for name, goal in _CORNERS.items()}, "loop": (0.0, 0.0, 1.0)}
    )
    tasks = (*_CORNERS, "loop")
    bounds = ((-_RANGE, _RANGE), (-_RANGE, _RANGE), (-_SPEED, _SPEED), (-_SPEED, _SPEED))
    boxes = ((-_LENGTH, _LENGTH, -_WIDTH, _WIDTH), (-_WIDTH, _WIDTH, -_LENGTH, _LENGTH))
    horizon = 1000
    deterministic = True

    def act(self, state: Tensor, w: Tensor | None = None) -> Tensor:
        self._check_state(state)
        w = self._embedding(w, state)
        assert w is not None
        place, velocity = state.split(2, 1)
        goal = w[:, :2]
        side, wanted = _signs(place), _signs(goal)
        other = side != wanted
        # In the next room left or right it goes through the gap above or below, in the one above or below through the
        # gap left or right.
        through_x = torch.stack([_BEYOND * wanted[:, 0], _GAP * side[:, 1]], 1)
        through_y = torch.stack([_GAP * side[:, 0], _BEYOND * wanted[:, 1]], 1)
        target = torch.where(other[:, :1], through_x, torch.where(other[:, 1:], through_y, goal))
        reach = _STIFFNESS * (target - place) - _BRAKE * velocity

        tangent, outwards = _diamond(place)
        off = (place * outwards).sum(1, keepdim=True) - _GAP / math.sqrt(2.0)
        course = _SPEED * tangent - 1.5 * off * outwards
        loop = course / _SPEED + _BRAKE * (course - velocity)
        return torch.where(w[:, 2:] > 0.5, loop, reach).clamp(-1.0, 1.0)

    def behave(self, state: Tensor, memory: Any, generator: torch.Generator) -> tuple[Tensor, Any]:
        self._check_state(state)

        def draw(columns: int) -> Tensor:
            return torch.rand(len(state), columns, generator=generator, dtype=state.dtype, device=state.device)

        # A goal, an angle, and which of the two counts.
        wish = draw(4)
        if memory is not None:
            wish = torch.where(draw(1) < _RENEWAL, wish, memory)
        goal = _RANGE * (2.0 * wish[:, :2] - 1.0)
        angle = 2.0 * math.pi * wish[:, 2]
        seek = self.act(state, torch.cat([goal, torch.zeros_like(goal[:, :1])], 1))
        push = torch.stack([angle.cos(), angle.sin()], 1)
        noise = torch.randn(push.shape, generator=generator, dtype=state.dtype, device=state.device)
        action = torch.where(wish[:, 3:] < 0.5, seek, push) + _NOISE * noise
        return action.clamp(-1.0, 1.0), wish

    def step(self, state: Tensor, action: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        self._check_step(state, action)
        place, velocity = state.split(2, 1)
        momentum = _MASS * velocity + _TIMESTEP * _FORCE * action.clamp(-1.0, 1.0)
        velocity = momentum / (_MASS + _TIMESTEP * _DAMPING)
        place = place + _TIMESTEP * velocity
        for half in ((_LENGTH, _WIDTH), (_WIDTH, _LENGTH)):
            place, velocity = _out_of_box(place, velocity, place.new_tensor(half))
        limited = place.clamp(-_RANGE, _RANGE)
        velocity = torch.where((limited != place) & (velocity * place > 0.0), 0.0, velocity)
        return torch.cat([limited, velocity], 1), torch.zeros(len(state), dtype=torch.bool, device=state.device)

    def starts(self, num: int, generator: torch.Generator) -> Tensor:
        off = torch.rand(num, 2, generator=generator, device=generator.device)
        low = torch.tensor((-_RANGE, 0.15), device=generator.device)
        place = low + (_RANGE - 0.15) * off
        return torch.cat([place, torch.zeros_like(place)], 1)

    def reward(self, task: str, state: Tensor) -> Tensor:
        self._check_task(task)
        place, velocity = state[..., :2], state[..., 2:]
        if task == "loop":
            tangent, outwards = _diamond(place)
            off = (place * outwards).sum(-1) - _GAP / math.sqrt(2.0)
            along = (velocity * tangent).sum(-1) / _SPEED
            return torch.exp(off.square() / (-2.0 * _BAND**2)) * along.clamp(0.0, 1.0)
        excess = (place - place.new_tensor(_CORNERS[task])).norm(dim=-1) - _TOLERANCE
        return torch.exp(math.log(0.1) * (excess.clamp_min(0.0) / _TOLERANCE).square())


def _signs(x: Tensor) -> Tensor:
    """-1 or 1; 0 counts as positive."""
    return torch.where(x < 0.0, -1.0, 1.0).to(x.dtype)


def _diamond(place: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors [..., 2] clockwise along, and straight out of, the diamond's side in the quadrant of `place`."""
    outwards = _signs(place) / math.sqrt(2.0)
    return torch.stack([outwards[..., 1], -outwards[..., 0]], -1), outwards


def _out_of_box(place: Tensor, velocity: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """Sets points within +-half back to the nearest face, and takes away their velocity into it."""
    depth = half - place.abs()
    inside = (depth > 0.0).all(1, keepdim=True)
    nearest = torch.nn.functional.one_hot(depth.argmin(1), 2).bool() & inside
    side = _signs(place)
    into = nearest & (velocity * side < 0.0)
    return torch.where(nearest, side * half, place), torch.where(into, 0.0, velocity)
