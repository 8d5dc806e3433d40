"""Log-densities of what a velocity field generates, by the instantaneous change of variables.

Along dx/dt = v(x, t) the density changes by d log p_t(x_t) / dt = -div v(x_t, t) (Chen et al., arXiv:1806.07366), so
log p_1(x_1) = log N(x_0; 0, I) - integral of div v from t = 0 (noise) to 1 (data), walked backwards from x_1.

Letters: N rows, D flow state, C cond.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastflow.reference import SCHEMES

__all__ = ["BETA_MAX", "BETA_MIN", "alpha_bar", "diffusion_velocity", "log_prob"]

BETA_MIN, BETA_MAX = 0.1, 20.0
"""The linear noise schedule of diffusions in continuous time (Song et al., arXiv:2011.13456, app. C)."""


def log_prob(
    velocity: Callable[..., Tensor],
    x_1: Tensor,
    *,
    num_steps: int,
    method: str = "midpoint",
    divergence: str = "exact",
    probes: int = 1,
    generator: torch.Generator | None = None,
    cond: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """log p_1(x_1) of the flow of `velocity` from x_0 ~ N(0, I), without gradient.

    Args:
        velocity: v(x [N, D], t [N]) -> [N, D], or v(x, t, cond) if `cond` is given (a `VelocityField` is one); each row
            on its own, and differentiable in x. Autograd is switched on while it is called, also under
            `torch.no_grad` and `torch.inference_mode`.
        x_1: [N, D], any floating dtype, which is also that of the arithmetic.
        num_steps: equal steps from t = 1 back to 0.
        method: "euler", "midpoint" or "heun".
        divergence: "exact" takes D vector-Jacobian products per evaluation; "hutchinson" (arXiv:1810.01367) takes
            `probes` and is right on average, with fresh Rademacher draws at every evaluation.
        generator: where those come from; the probes do not depend on `chunk`.
        cond: [N, C], handed to `velocity` with the rows it belongs to.
        chunk: rows that one graph is built for; None for all. A velocity that has rows of its own (through a closure)
            needs None.

    Returns:
        [N], in nats, in x_1's dtype.

    Raises:
        TypeError: x_1 is not a floating tensor.
        ValueError: an argument outside its range, hutchinson without a generator, a velocity of another shape or
            without a gradient to x.
    """
    _check(x_1, num_steps, method, divergence, probes, generator, cond, chunk)
    stages = ((0.0, 1.0),) if method == "euler" else _stages(*SCHEMES[method])
    h = 1.0 / num_steps
    # Under inference mode no tensor could have a gradient.
    with torch.inference_mode(False), torch.no_grad():
        x = x_1.detach().clone()
        # A copy, as autograd refuses to save inference tensors.
        cond = None if cond is None else cond.detach().clone()
        integral = x.new_zeros(len(x))
        for k in range(num_steps):
            slope, step = torch.zeros_like(x), torch.zeros_like(x)
            for offset, weight in stages:
                t = x.new_full((len(x),), 1.0 - (k + offset) / num_steps)
                signs = _rademacher(probes, x, generator) if weight and divergence == "hutchinson" else None
                slope, div = _evaluate(velocity, x - (offset * h) * slope, t, cond, signs, bool(weight), chunk)
                if weight:
                    step += weight * slope
                    integral += (weight * h) * div
            x = x - h * step
        return -0.5 * (x.square().sum(1) + x.shape[1] * math.log(2 * math.pi)) - integral


def _stages(a: float, b_1: float, b_2: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """When in the step, and with which weight, a scheme of `reference.SCHEMES` evaluates the field."""
    return (0.0, b_1), (a, b_2)


def _rademacher(probes: int, x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Fair signs [probes, N, D], a byte each."""
    assert generator is not None
    bits = torch.randint(2, (probes, *x.shape), generator=generator, dtype=torch.int8, device=generator.device)
    return (2 * bits - 1).to(x.device)


def _evaluate(
    velocity: Callable[..., Tensor],
    x: Tensor,
    t: Tensor,
    cond: Tensor | None,
    signs: Tensor | None,
    divergence: bool,
    chunk: int | None,
) -> tuple[Tensor, Tensor]:
    """The velocity [N, D], and with `divergence` its divergence [N], else zeros; estimated if there are `signs`."""
    values, divs = [], []
    rows = chunk or max(len(x), 1)
    for i in range(0, len(x), rows):
        part = slice(i, i + rows)
        x_part = x[part]
        given = (t[part],) if cond is None else (t[part], cond[part])
        if not divergence:
            v = velocity(x_part, *given)
            _check_velocity(v, x_part)
            divs.append(x_part.new_zeros(len(x_part)))
        else:
            with torch.enable_grad():
                x_part = x_part.detach().requires_grad_()
                v = velocity(x_part, *given)
                _check_velocity(v, x_part)
                divs.append(_trace(v, x_part) if signs is None else _estimate(v, x_part, signs[:, part]))
        values.append(v.detach())
    if not values:
        return torch.zeros_like(x), x.new_zeros(0)
    return torch.cat(values), torch.cat(divs)


def _trace(v: Tensor, x: Tensor) -> Tensor:
    """The trace of dv/dx in each row, one dimension at a time: [N, D] -> [N]."""
    total = x.new_zeros(len(x))
    last = x.shape[1] - 1
    for i in range(last + 1):
        total += _gradient(v[:, i].sum(), x, None, i < last)[:, i]
    return total


def _estimate(v: Tensor, x: Tensor, signs: Tensor) -> Tensor:
    """The mean over probes e of e^T (dv/dx) e in each row: [N, D], [P, N, D] -> [N]."""
    total = x.new_zeros(len(x))
    for i, sign in enumerate(signs.to(x.dtype)):
        total += (_gradient(v, x, sign, i < len(signs) - 1) * sign).sum(1)
    return total / len(signs)


def _gradient(out: Tensor, x: Tensor, weights: Tensor | None, again: bool) -> Tensor:
    found = (
        torch.autograd.grad(out, x, weights, retain_graph=again, allow_unused=True)[0] if out.requires_grad else None
    )
    if found is None:
        raise ValueError(
            "velocity: expected a result with a gradient to x, got one without (detached, or constant in x)"
        )
    return found


# Diffusions ---------------------------------------------------------------------------------------------------------


def alpha_bar(level: Tensor, beta_min: float = BETA_MIN, beta_max: float = BETA_MAX) -> Tensor:
    """Share of the data's variance that is left at a noise level in [0, 1], where 0 is data and 1 is noise.

    exp(-(beta_min s + (beta_max - beta_min) s^2 / 2)): x_s = sqrt(alpha_bar) x_data + sqrt(1 - alpha_bar) eps, whose
    rate of noise is beta(s) = beta_min + (beta_max - beta_min) s (arXiv:2011.13456, eq. 33). [...] -> [...].
    """
    return torch.exp(-_total_noise(level, beta_min, beta_max))


def _total_noise(level: Tensor, beta_min: float, beta_max: float) -> Tensor:
    """The integral of beta from 0 to the level, [...] -> [...]."""
    return beta_min * level + 0.5 * (beta_max - beta_min) * level.square()


def diffusion_velocity(
    noise: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    t: Tensor,
    *,
    beta_min: float = BETA_MIN,
    beta_max: float = BETA_MAX,
    min_level: float = 1e-3,
) -> Tensor:
    """The velocity of a diffusion's probability flow in flow time, so that `log_prob` and integrators can take it.

    In the noise level s the flow is dx/ds = -(beta(s) / 2) (x + score) with score = -eps / sqrt(1 - alpha_bar(s))
    (arXiv:2011.13456, eq. 13). Here t = 1 - s (0 noise, 1 data), so the sign turns:
    v(x, t) = (beta(1 - t) / 2) (x - eps(x, 1 - t) / sqrt(1 - alpha_bar(1 - t))).

    The source of that flow is the data shrunk by sqrt(alpha_bar(1)) and noised, not quite N(0, I): by default the
    means of the source are 0.7 % of the data's.

    Args:
        noise: eps(x, level), the predicted noise, shaped as x; its level is 1 - t, at least `min_level`.
        x: [..., D]. t: [...].
        beta_min, beta_max: the linear schedule.
        min_level: levels below it are taken as it, since the division ends in 0 / 0 at data; 1e-3 is the last of 1000
            discrete levels.

    Returns:
        [..., D]; differentiable.

    Raises:
        ValueError: a schedule that is not 0 < beta_min <= beta_max, min_level outside (0, 1).
    """
    if not 0 < beta_min <= beta_max < float("inf"):
        raise ValueError(f"beta_min, beta_max: expected 0 < beta_min <= beta_max, got {(beta_min, beta_max)}")
    if not 0 < min_level < 1:
        raise ValueError(f"min_level: expected a number in (0, 1), got {min_level}")
    level = (1 - t).clamp_min(min_level)
    rate = 0.5 * (beta_min + (beta_max - beta_min) * level)
    # 1 - alpha_bar: near data the difference itself would lose its digits.
    std = (-torch.expm1(-_total_noise(level, beta_min, beta_max))).sqrt()
    return rate.unsqueeze(-1) * (x - noise(x, level) / std.unsqueeze(-1))


# Checks -------------------------------------------------------------------------------------------------------------


def _check(
    x_1: Tensor,
    num_steps: int,
    method: str,
    divergence: str,
    probes: int,
    generator: torch.Generator | None,
    cond: Tensor | None,
    chunk: int | None,
) -> None:
    if not isinstance(x_1, Tensor) or not x_1.is_floating_point():
        raise TypeError(f"x_1: expected a floating Tensor, got {getattr(x_1, 'dtype', type(x_1).__name__)}")
    if x_1.dim() != 2 or not x_1.shape[1]:
        raise ValueError(f"x_1: expected [N, D], got {list(x_1.shape)}")
    for name, value in (("num_steps", num_steps), ("probes", probes), ("chunk", 1 if chunk is None else chunk)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    methods = ("euler", *SCHEMES)
    if method not in methods:
        raise ValueError(f"method: expected one of {methods}, got {method!r}")
    if divergence not in ("exact", "hutchinson"):
        raise ValueError(f"divergence: expected exact or hutchinson, got {divergence!r}")
    if divergence == "hutchinson" and generator is None:
        raise ValueError("generator: expected a torch.Generator for hutchinson's probes, got None")
    if cond is not None and (cond.dim() != 2 or len(cond) != len(x_1)):
        raise ValueError(f"cond: expected [{len(x_1)}, C], got {list(cond.shape)}")


def _check_velocity(v: Tensor, x: Tensor) -> None:
    if v.shape != x.shape:
        raise ValueError(f"velocity: expected a result of {list(x.shape)}, got {list(v.shape)}")
