"""The mathematics in plain PyTorch, any floating dtype: the oracle of every kernel and the readable statement of the
method.

Time runs from 0 (noise, x_0) to 1 (data, x_1). Letters: B batch, E ensemble, S noise samples, C cond, D flow state, H
hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from fastflow.fields import FieldSpec


# Path ---------------------------------------------------------------------------------------------------------------


def interpolate(x_0: Tensor, x_1: Tensor, t: Tensor, sigma_min: float = 0.0) -> tuple[Tensor, Tensor]:
    """The optimal-transport path (Lipman et al., arXiv:2210.02747, eq. 22-23): x_t = (1 - (1 - sigma_min) t) x_0 + t
    x_1 and its velocity x_1 - (1 - sigma_min) x_0.

    `x_0`, `x_1` are [..., D], `t` is [...]; both results are [..., D].
    """
    t, keep = t.unsqueeze(-1), 1 - sigma_min
    return (1 - keep * t) * x_0 + t * x_1, x_1 - (x_0 if sigma_min == 0 else keep * x_0)


def error_scale(t: Tensor, error: str, sigma_min: float = 0.0) -> Tensor:
    """What the squared velocity error is multiplied by to be that of the "noise" or the "endpoint" it implies.

    On the path above x_0 = x_t - t v and x_1 = (1 - sigma_min) x_t + (1 - (1 - sigma_min) t) v, so an error of v counts
    t^2 and (1 - (1 - sigma_min) t)^2 times (FPO, arXiv:2507.21053: the epsilon loss). `t` is [...], and so is the
    result.
    """
    if error == "noise":
        return t.square()
    if error == "endpoint":
        return (1 - (1 - sigma_min) * t).square()
    raise ValueError(f"error must be noise or endpoint, got {error!r}")


# Embeddings ---------------------------------------------------------------------------------------------------------


def hl_gauss(x: Tensor, low: float, high: float, bins: int, sigma: float) -> Tensor:
    """Masses of N(x, (sigma w)^2) in the `bins - 1` intervals of width w between `bins` even edges of [low, high],
    normalised.

    [..., 1] -> [..., bins - 1], each row summing to 1, in x's dtype. x is clamped to three standard deviations
    outside the range.
    """
    width = (high - low) / (bins - 1)
    std = sigma * width
    edges = low + width * torch.arange(bins, dtype=x.dtype, device=x.device)
    c = torch.erf((edges - x.clamp(low - 3 * std, high + 3 * std)) / (math.sqrt(2) * std))
    return c.diff(dim=-1) / (c[..., -1:] - c[..., :1])


def cosine_fourier(t: Tensor, dim: int) -> Tensor:
    """cos(i pi t) for i = 1..dim: [...] -> [..., dim]."""
    return torch.cos(math.pi * t.unsqueeze(-1) * torch.arange(1, dim + 1, dtype=t.dtype, device=t.device))


def power_fourier(t: Tensor, dim: int, powers: Tensor | None = None) -> Tensor:
    """cos(2^k t), then sin(2^k t), for k = 0..dim/2-1: [...] -> [..., dim]. powers: 2^k, for a caller that has them."""
    if powers is None:
        powers = 2.0 ** torch.arange(dim // 2, dtype=t.dtype, device=t.device)
    angles = t.unsqueeze(-1) * powers
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sinusoidal(t: Tensor, dim: int, max_period: float) -> Tensor:
    """cos(w_i t), then sin(w_i t), for w_i = max_period^(-2 i / dim), i = 0..dim/2-1: [...] -> [..., dim]."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, dtype=t.dtype, device=t.device) * (-math.log(max_period) / half))
    angles = t.unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


# Network ------------------------------------------------------------------------------------------------------------


def dense(x: Tensor, weight: Tensor, bias: Tensor, precision: str | None = None) -> Tensor:
    """x @ weight + bias, for one network ([..., in], [in, out], [out]) or for E side by side ([E, ..., in], [E, in,
    out], [E, out]).

    With `precision="bf16"` the operands of the product are rounded to bfloat16 and the result is returned in x's dtype.
    """
    dtype = x.dtype
    if precision == "bf16" and dtype == torch.float32:
        x, weight, bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    if weight.dim() == 2:
        return F.linear(x, weight.mT, bias).to(dtype)
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    y = torch.baddbmm(bias.unsqueeze(1), rows, weight)
    return y.reshape(*x.shape[:-1], weight.shape[-1]).to(dtype)


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation named as in `FieldSpec.activation`, elementwise."""
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "silu":
        return F.silu(x)
    if activation in ("gelu", "relu", "elu", "mish"):
        return getattr(F, activation)(x)
    if activation == "tanh":
        return x.tanh()
    raise ValueError(f"activation must be gelu_tanh, gelu, silu, relu, elu, mish or tanh, got {activation!r}")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last axis with scale and shift [H], or [E, H] for x [E, ..., H]."""
    if weight.dim() == 2:
        shape = (weight.shape[0], *(1 for _ in x.shape[1:-1]), weight.shape[-1])
        return F.layer_norm(x, x.shape[-1:], eps=eps) * weight.view(shape) + bias.view(shape)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def dense_stack(
    x: Tensor,
    parameters: Sequence[Tensor],
    activation: str,
    norm: str | None,
    eps: float = 1e-6,
    precision: str | None = None,
    wiring: Sequence[tuple[tuple[int, ...], int | None]] | None = None,
) -> Tensor:
    """Dense -> activation -> optional LayerNorm per hidden layer, then Dense.

    Args:
        x: [..., in], or [E, ..., in] with ensemble parameters.
        parameters: weights and biases of every layer, then scales and shifts (`DenseStack.parameter_list`).
        activation, norm, eps: as in `FieldSpec`.
        precision: see `dense`.
        wiring: of the hidden layers, as `trunk` takes it; None puts them one behind the other.

    Returns:
        [..., out] in x's dtype.
    """
    n = num_layers(parameters, norm)
    pairs = list(zip(parameters[::2], parameters[1::2], strict=True))
    if wiring is None:
        wiring = [((i - 1,) if i else (), None) for i in range(n - 1)]
    position = "after" if norm == "layer" else None
    return trunk(x, wiring, pairs[:n], pairs[n:], [], activation, position, eps, precision)


def trunk(
    x: Tensor,
    wiring: Sequence[tuple[tuple[int, ...], int | None]],
    layers: Sequence[tuple[Tensor, Tensor]],
    norms: Sequence[tuple[Tensor, Tensor]],
    films: Sequence[Tensor],
    activation: str,
    norm_position: str | None,
    eps: float,
    precision: str | None = None,
) -> Tensor:
    """Hidden layers wired as (inputs, add) of `fields.Hidden`, then the head; films [..., 2 H] hold scale and shift."""
    if layers[0][0].dim() == 3 and not x.is_cuda and not films:
        # Member by member: the CPU's batched product runs at a fraction of the plain one's rate, and one member's
        # LayerNorm is one operation with its scale and shift.
        rows = []
        for e, row in enumerate(x):
            own, own_norms = ([(w[e], b[e]) for w, b in pairs] for pairs in (layers, norms))
            rows.append(trunk(row, wiring, own, own_norms, films, activation, norm_position, eps, precision))
        return torch.stack(rows)
    outputs: list[Tensor] = []
    for i, (inputs, add) in enumerate(wiring):
        y = x
        if inputs:
            y = torch.cat([outputs[j] for j in inputs], dim=-1) if len(inputs) > 1 else outputs[inputs[0]]
        y = dense(y, *layers[i], precision)
        if norm_position == "before":
            y = layer_norm(y, *norms[i], eps)
        elif norm_position == "film":
            scale, shift = films[i].chunk(2, dim=-1)
            y = F.layer_norm(y, y.shape[-1:], eps=eps) * (1 + scale) + shift
        y = activate(y, activation)
        if norm_position == "after":
            y = layer_norm(y, *norms[i], eps)
        outputs.append(y if add is None else y + outputs[add])
    return dense(outputs[-1], *layers[-1], precision)


def num_layers(parameters: Sequence[Tensor], norm: str | None) -> int:
    """Number of Dense layers, head included, in a parameter list: each brings two tensors, each LayerNorm two more."""
    return (len(parameters) + 2) // 4 if norm == "layer" else len(parameters) // 2


def mlp(x: Tensor, layers: Sequence[tuple[Tensor, Tensor]], activation: str, precision: str | None = None) -> Tensor:
    """Dense -> activation per layer, the last one included."""
    for weight, bias in layers:
        x = activate(dense(x, weight, bias, precision), activation)
    return x


def film(encoded: Tensor | None, time: Tensor, weight: Tensor, bias: Tensor, precision: str | None = None) -> Tensor:
    """FiLM of one hidden layer of width H: Dense of [encoded cond, time features], [..., 2 H].

    The two halves of the product are taken apart, so that leading shapes need only broadcast.
    """
    out = dense(time, weight[-time.shape[-1] :], torch.zeros_like(bias), precision)
    return out + (bias if encoded is None else dense(encoded, weight[: -time.shape[-1]], bias, precision))


# Predictions of x_1 and x_0 turn into velocities by a division that ends at 1 - t = 0 and t = 0.
TIME_MARGIN = 1e-3


def velocity(
    spec: FieldSpec,
    parameters: Sequence[Tensor],
    x_t: Tensor,
    t: Tensor,
    cond: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """v(x_t, t, cond) of the network that `spec` describes.

    Args:
        x_t: [..., D]; [E, ..., D] with an ensemble.
        t: broadcasts to the leading shape of x_t.
        cond: [..., C], broadcasts to the leading shape of x_t; None or [..., 0] if there is none.

    Returns:
        The velocity, shaped and typed as x_t.
    """
    cond = None if cond is None or not cond.shape[-1] else cond.to(x_t.dtype)
    if cond is None and spec.cond_dim:  # FiLM's sum of two products would go without it
        raise ValueError(f"velocity: cond must be [..., {spec.cond_dim}], got None")
    if parameters[0].dim() == 3 and x_t.shape[0] != parameters[0].shape[0]:
        raise ValueError(f"velocity: x_t must be [{parameters[0].shape[0]}, ..., D], got {list(x_t.shape)}")
    t = t.to(x_t.dtype)
    if parameters[0].dim() == 3 and spec.film:
        # Member by member: cond and time are encoded once for all rows, by weights that every member has of its own.
        dims = x_t.dim() - 1
        return torch.stack(
            [
                velocity(
                    spec,
                    [p[e] for p in parameters],
                    row,
                    _member(t, e, dims),
                    None if cond is None else _member(cond, e, dims + 1),
                    precision,
                )
                for e, row in enumerate(x_t)
            ]
        )
    out = _head(spec, parameters, x_t, t, cond, precision)
    if spec.output_scale != 1:
        out = out * spec.output_scale
    if spec.prediction == "velocity":
        return out
    t = t.unsqueeze(-1)
    if spec.prediction == "endpoint":
        return (out - x_t) / (1 - t).clamp_min(TIME_MARGIN)
    return (x_t - out) / t.clamp_min(TIME_MARGIN)


def _member(x: Tensor, e: int, dims: int) -> Tensor:
    """Member e's share of a tensor that broadcasts to `dims` axes, the first of which is E."""
    return x if x.dim() < dims else x[e if x.shape[0] > 1 else 0]


def _head(
    spec: FieldSpec, parameters: Sequence[Tensor], x_t: Tensor, t: Tensor, cond: Tensor | None, precision: str | None
) -> Tensor:
    """The head's output, [..., D]."""
    parts = spec.parts(parameters)
    lead = x_t.shape[:-1]
    state = spec.state_embedding.features(x_t)
    films: list[Tensor] = []
    if spec.film:
        time = mlp(spec.time_embedding.features(t), parts.time, spec.activation, precision)
        encoded = None if cond is None else mlp(cond, parts.encoder, spec.activation, precision)
        films = [film(encoded, time, weight, bias, precision) for weight, bias in parts.films]
        x = state
    else:
        # Members side by side have weights that want t with its E axis; else t is embedded before it is spread over
        # rows.
        time = spec.time_embedding.features(t.expand(lead) if parameters[0].dim() == 3 else t)
        time = mlp(time, parts.time, spec.activation, precision)
        features = [state, time.expand(*lead, time.shape[-1])]
        if cond is not None:
            features.insert(0, cond.expand(*lead, cond.shape[-1]))
        x = torch.cat(features, dim=-1)
    wiring = [(layer.inputs, layer.add) for layer in spec.trunk]
    return trunk(
        x, wiring, parts.layers, parts.norms, films, spec.activation, spec.norm_position, spec.norm_eps, precision
    )


# Integration and losses ---------------------------------------------------------------------------------------------


# Two-stage Runge-Kutta schemes as (a, b_1, b_2): v_1 at x, v_2 at x + a h v_1 and t + a h, x + h (b_1 v_1 + b_2 v_2).
SCHEMES = {"midpoint": (0.5, 0.0, 1.0), "heun": (1.0, 0.5, 0.5)}


def evaluation_steps(num_steps: int, method: str, device: torch.device | str = "cpu") -> Tensor:
    """At which step, k or k + a of the scheme, a walk evaluates the field: [N] float64, in order."""
    stages = [0.0] if method == "euler" else [0.0, SCHEMES[method][0]]
    k = torch.arange(num_steps, device=device, dtype=torch.float64)
    return torch.stack([k + a for a in stages], dim=1).flatten()


def integrate(
    spec: FieldSpec,
    parameters: Sequence[Tensor],
    x_0: Tensor,
    cond: Tensor | None,
    num_steps: int,
    t_0: float | Tensor = 0.0,
    t_1: float | Tensor = 1.0,
    method: str = "euler",
    precision: str | None = None,
    step_noise: Tensor | None = None,
    trajectory: bool = False,
) -> Tensor:
    """x_K of dx/dt = v(x, t, cond) from x_0 at t_0 to t_1 in K steps of h = (t_1 - t_0) / K.

    "euler" steps by v at the left end point; "midpoint" and "heun" are the two schemes of `SCHEMES`.

    Args:
        x_0, cond: as in `velocity`, x_0 with its E axis if there is an ensemble.
        t_0, t_1: numbers, or tensors that broadcast to the leading shape of x_0.
        step_noise: [K, ...] added to x behind each step.

    Returns:
        x_K, or with `trajectory` [K + 1, ...] with every x_k.
    """
    x, path = x_0, [x_0]
    h = (t_1 - t_0) / num_steps
    h_x = h.unsqueeze(-1).to(x.dtype) if isinstance(h, Tensor) else h

    def v(x: Tensor, k: float) -> Tensor:
        # k / K is computed, never accumulated, and both ends are weighed: the last step ends exactly at t_1.
        t = (1 - k / num_steps) * t_0 + k / num_steps * t_1
        if not isinstance(t, Tensor):
            t = torch.full((), t, dtype=x.dtype, device=x.device)
        return velocity(spec, parameters, x, t, cond, precision)

    for k in range(num_steps):
        if method == "euler":
            x = x + v(x, k) * h_x
        else:
            a, b_1, b_2 = SCHEMES[method]
            v_1 = v(x, k)
            v_2 = v(x + v_1 * (a * h_x), k + a)
            x = x + (b_1 * v_1 + b_2 * v_2 if b_1 else v_2) * h_x
        if step_noise is not None:
            x = x + step_noise[k]
        path.append(x)
    return torch.stack(path) if trajectory else x


def matching_rows(
    spec: FieldSpec,
    parameters: Sequence[Tensor],
    x_t: Tensor,
    t: Tensor,
    target: Tensor,
    cond: Tensor | None,
    precision: str | None = None,
) -> Tensor:
    """The flow-matching error of each row: mean over D of (v(x_t, t, cond) - target)^2. [..., D] -> [...]."""
    return (velocity(spec, parameters, x_t, t, cond, precision) - target).square().mean(-1)
