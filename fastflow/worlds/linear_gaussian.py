"""A linear system with Gaussian noise, whose successor measure, optimal velocity field and values are closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fastflow.worlds.base import World, check_gamma, geometric, terms

__all__ = ["LinearGaussian"]

_GAIN = 0.2  # B = _GAIN I
_RADIUS, _ANGLE = 0.98, 0.15  # of the closed loop A + B K = rho R(theta)
_NOISE = 0.05  # of the transitions
_START = 0.7  # standard deviation of the states that data starts from
_EXPLORE = 0.3  # noise of the behaviour's actions
_TAIL = 1e-6  # mass of the mixture that is left out
_ELEMENTS = 1 << 20  # of a block of rows times components

# Gaussian bumps exp(-|x - c|^2 / (2 w^2)): name -> (c, w).
_BUMPS = {
    "bump-right": ((0.6, 0.0), 0.3),
    "bump-up": ((0.0, 0.6), 0.3),
    "bump-centre": ((0.0, 0.0), 0.2),
}


class LinearGaussian(World):
    """s' = s + 0.2 a + 0.05 eps in the plane, with the policy a = K s that makes the closed loop a slow spiral inwards:
    I + 0.2 K = 0.98 R(0.15).

    The k-th state after (s, a) is Gaussian with mean mu_k = M^(k-1) (s + 0.2 a) and covariance var_k I, var_k = 0.05^2
    (1 - 0.98^2k) / (1 - 0.98^2), so that the successor measure is a mixture of these with weights (1 - gamma)
    gamma^(k-1). Closed forms leave out a tail of mass 1e-6 and compute in float64; they are differentiable in x.

    Data are single transitions from s ~ N(0, 0.49 I) with a = K s + 0.3 N(0, I).
    """

    name = "linear-gaussian"
    state_dim = 2
    action_dim = 2
    policy_dim = 0
    policies: Mapping[str, tuple[float, ...]] = MappingProxyType({"spiral": ()})
    tasks = tuple(_BUMPS)
    bounds = ((-2.0, 2.0), (-2.0, 2.0))
    horizon = 1
    exact = True

    def act(self, state: Tensor, w: Tensor | None = None) -> Tensor:
        self._check_state(state)
        self._embedding(w, state)
        along, across = _RADIUS * math.cos(_ANGLE) - 1.0, _RADIUS * math.sin(_ANGLE)
        return (along * state + across * _turn(state)) / _GAIN

    def behave(self, state: Tensor, memory: Any, generator: torch.Generator) -> tuple[Tensor, Any]:
        return self.act(state) + _EXPLORE * _normal(state, generator), None

    def step(self, state: Tensor, action: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        self._check_step(state, action)
        if generator is None:
            raise ValueError(f"generator: expected a torch.Generator, for {self.name} is stochastic, got None")
        moved = state + _GAIN * action + _NOISE * _normal(state, generator)
        return moved, torch.zeros(len(state), dtype=torch.bool, device=state.device)

    def starts(self, num: int, generator: torch.Generator) -> Tensor:
        return _START * torch.randn(num, 2, generator=generator, device=generator.device)

    def reward(self, task: str, state: Tensor) -> Tensor:
        self._check_task(task)
        centre, width = _BUMPS[task]
        return torch.exp((state - state.new_tensor(centre)).square().sum(-1) / (-2.0 * width**2))

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
        """As `World.futures`, in closed form: no tail is left out."""
        self._check(state, action, w, gamma, num)
        times = geometric((len(state), num), gamma, generator, state.device)
        cosine, sine, variance = _components(times)
        first = (state + _GAIN * action).double()[:, None]
        mean = cosine[..., None] * first + sine[..., None] * _turn(first)
        draws = mean + variance.sqrt()[..., None] * _normal(mean, generator)
        return draws.to(state.dtype)

    def values(
        self,
        task: str,
        state: Tensor,
        action: Tensor,
        w: Tensor | None,
        gamma: float,
        generator: torch.Generator | None = None,
        num: int = 1,
    ) -> Tensor:
        """As `World.values`, in closed form: `generator` and `num` are not used."""
        self._check(state, action, w, gamma)
        self._check_task(task)
        centre, width = _BUMPS[task]

        def block(first: Tensor) -> Tensor:
            weight, cosine, sine, variance = _mixture(gamma, first.device)
            offset = first.new_tensor(centre)
            spread = width**2 + variance
            return (
                weight
                * width**2
                / spread
                * torch.exp(_distance(offset.expand_as(first), first, 1.0, cosine, sine) / (-2.0 * spread))
            ).sum(1)

        first = (state + _GAIN * action).double()
        return (_in_blocks(block, gamma, first) / (1.0 - gamma)).to(state.dtype)

    def moments(self, state: Tensor, action: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
        """Mean [N, 2] and covariance [N, 2, 2] of the successor measure."""
        self._check(state, action, None, gamma)
        weight, cosine, sine, variance = _mixture(gamma, state.device)
        first = (state + _GAIN * action).double()
        frame = torch.stack([first, _turn(first)], 2)  # [N, 2, 2]: mu_k = frame (cosine_k, sine_k)
        path = torch.stack([cosine, sine])
        mean = path @ weight
        spread = (path * weight) @ path.T - torch.outer(mean, mean)
        covariance = frame @ spread @ frame.mT + (weight @ variance) * torch.eye(2).to(frame)
        return (frame @ mean).to(state.dtype), covariance.to(state.dtype)

    def log_density(self, x: Tensor, state: Tensor, action: Tensor, gamma: float) -> Tensor:
        """log m(x | s, a).

        Args:
            x: [N, 2] or [N, S, 2].
            state, action: [N, 2] each.
            gamma: discount in [0, 1).

        Returns:
            [N] or [N, S], in the dtype of x.
        """

        def block(x: Tensor, first: Tensor) -> Tensor:
            weight, cosine, sine, variance = _mixture(gamma, x.device)
            distance = _distance(x, first, 1.0, cosine, sine)
            return (weight.log() - variance.log() - distance / (2.0 * variance)).logsumexp(1) - math.log(2.0 * math.pi)

        rows, first = self._rows(x, state, action, gamma)
        return _in_blocks(block, gamma, rows, first).view(x.shape[:-1]).to(x.dtype)

    def velocity(self, x: Tensor, t: Tensor, state: Tensor, action: Tensor, gamma: float) -> Tensor:
        """The optimal velocity v*_t(x | s, a) = E[X_1 - X_0 | X_t = x] of straight paths from N(0, I) to m(. | s, a):
        sum_k r_k(x) [mu_k + (t var_k - (1 - t)) / (t^2 var_k + (1 - t)^2) (x - t mu_k)], with r_k the share of
        component k in the density of X_t at x.

        Args:
            x: [N, 2] or [N, S, 2].
            t: in [0, 1], 0 is noise: one for every x ([N] or [N, S]), or any shape that broadcasts to that.
            state, action: [N, 2] each.
            gamma: discount in [0, 1).

        Returns:
            The shape and dtype of x.

        Raises:
            ValueError: shapes that do not fit together, values that are not finite, or gamma outside [0, 1).
        """

        def block(x: Tensor, t: Tensor, first: Tensor) -> Tensor:
            weight, cosine, sine, variance = _mixture(gamma, x.device)
            blurred = t.square() * variance + (1.0 - t).square()
            distance = _distance(x, first, t, cosine, sine)
            share = (weight.log() - blurred.log() - distance / (2.0 * blurred)).softmax(1)
            slope = (t * variance - (1.0 - t)) / blurred
            pull = share * (1.0 - t * slope)
            along, across = pull @ cosine, pull @ sine
            inwards = (share * slope).sum(1, keepdim=True)
            return inwards * x + along[:, None] * first + across[:, None] * _turn(first)

        rows, first = self._rows(x, state, action, gamma)
        try:
            times = torch.as_tensor(t).to(rows).expand(x.shape[:-1])
        except RuntimeError:
            raise ValueError(
                f"t: expected a shape that broadcasts to {list(x.shape[:-1])}, got {list(t.shape)}"
            ) from None
        return _in_blocks(block, gamma, rows, times.reshape(-1, 1), first).view(x.shape).to(x.dtype)

    def _rows(self, x: Tensor, state: Tensor, action: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
        """x and the mean of the first state as float64 [rows, 2] each."""
        self._check(state, action, None, gamma)
        if x.dim() not in (2, 3) or len(x) != len(state) or x.shape[-1] != 2:
            raise ValueError(f"x: expected shape [{len(state)}, 2] or [{len(state)}, S, 2], got {list(x.shape)}")
        first = (state + _GAIN * action).double()
        if x.dim() == 3:
            first = first[:, None].expand_as(x).reshape(-1, 2)
        return x.double().reshape(-1, 2), first


def _turn(x: Tensor) -> Tensor:
    """x [..., 2] a quarter turn to the left."""
    return torch.stack([-x[..., 1], x[..., 0]], -1)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def _components(times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rho^(k-1) cos((k-1) theta), rho^(k-1) sin((k-1) theta) and var_k of times k, float64."""
    k = times.double()
    shrink, angle = _RADIUS ** (k - 1.0), _ANGLE * (k - 1.0)
    variance = _NOISE**2 * (1.0 - _RADIUS ** (2.0 * k)) / (1.0 - _RADIUS**2)
    return shrink * angle.cos(), shrink * angle.sin(), variance


def _mixture(gamma: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of the components [K], which sum to one, and `_components` of 1..K."""
    times = torch.arange(1, terms(gamma, _TAIL) + 1, device=device)
    weight = gamma ** (times.double() - 1.0)
    return weight / weight.sum(), *_components(times)


def _distance(x: Tensor, first: Tensor, t: Tensor | float, cosine: Tensor, sine: Tensor) -> Tensor:
    """|x - t mu_k|^2, [rows, K], for x and mu_1 [rows, 2]."""
    along = torch.stack([(x * first).sum(1), (x * _turn(first)).sum(1)], 1) @ torch.stack([cosine, sine])
    length = first.square().sum(1, keepdim=True) * (cosine.square() + sine.square())
    return (x.square().sum(1, keepdim=True) - 2.0 * t * along + t**2 * length).clamp_min(0.0)


def _in_blocks(function: Callable[..., Tensor], gamma: float, *rows: Tensor) -> Tensor:
    """`function` of blocks of rows, so that memory does not grow with rows times components."""
    check_gamma(gamma)
    size = max(1, _ELEMENTS // terms(gamma, _TAIL))
    return torch.cat([function(*block) for block in zip(*(part.split(size) for part in rows), strict=True)])
