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


def interpolate(x_0: Tensor, x_1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The optimal-transport path: x_t = (1 - t) x_0 + t x_1 and its velocity x_1 - x_0.

    `x_0`, `x_1` are [..., D], `t` is [...]; both results are [..., D].
    """
    t = t.unsqueeze(-1)
    return (1 - t) * x_0 + t * x_1, x_1 - x_0


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
    if activation == "relu":
        return F.relu(x)
    raise ValueError(f"activation must be gelu_tanh, silu or relu, got {activation!r}")


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
) -> Tensor:
    """Dense -> activation -> optional LayerNorm per hidden layer, then Dense.

    Args:
        x: [..., in], or [E, ..., in] with ensemble parameters.
        parameters: weights and biases of every layer, then scales and shifts (`DenseStack.parameter_list`).
        activation, norm, eps: as in `FieldSpec`.
        precision: see `dense`.

    Returns:
        [..., out] in x's dtype.
    """
    if parameters[0].dim() == 3 and not x.is_cuda:
        # Member by member: the CPU's batched product runs at a fraction of the plain one's rate, and one member's
        # LayerNorm is one operation with its scale and shift.
        members = zip(x, *parameters, strict=True)
        return torch.stack([dense_stack(row, ps, activation, norm, eps, precision) for row, *ps in members])
    n = num_layers(parameters, norm)
    for i in range(n - 1):
        x = activate(dense(x, parameters[2 * i], parameters[2 * i + 1], precision), activation)
        if norm == "layer":
            x = layer_norm(x, parameters[2 * (n + i)], parameters[2 * (n + i) + 1], eps)
    return dense(x, parameters[2 * n - 2], parameters[2 * n - 1], precision)


def num_layers(parameters: Sequence[Tensor], norm: str | None) -> int:
    """Number of Dense layers, head included, in a parameter list: each brings two tensors, each LayerNorm two more."""
    return (len(parameters) + 2) // 4 if norm == "layer" else len(parameters) // 2


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
    lead = x_t.shape[:-1]
    features = [spec.state_embedding.features(x_t), spec.time_embedding.features(t.to(x_t.dtype).expand(lead))]
    if cond is not None and cond.shape[-1]:
        features.insert(0, cond.to(x_t.dtype).expand(*lead, cond.shape[-1]))
    x = torch.cat(features, dim=-1)
    return dense_stack(x, parameters, spec.activation, spec.norm, spec.norm_eps, precision)


# Integration and losses ---------------------------------------------------------------------------------------------


def euler(
    spec: FieldSpec,
    parameters: Sequence[Tensor],
    x_0: Tensor,
    cond: Tensor | None,
    num_steps: int,
    t_1: float = 1.0,
    precision: str | None = None,
    trajectory: bool = False,
) -> Tensor:
    """x_{k+1} = x_k + (t_1 / K) v(x_k, t_1 k / K, cond) for k = 0..K-1 (left end points, floq eq. for the integrated
    value).

    Shapes as in `velocity`, x_0 with its E axis if there is an ensemble. Returns x_K, or [K + 1, ...] with every x_k.
    """
    x, path = x_0, [x_0]
    for k in range(num_steps):
        # k / K is computed, never accumulated: the last step starts exactly at t_1 (K - 1) / K.
        t = torch.full((), t_1 * k / num_steps, dtype=x.dtype, device=x.device)
        x = x + velocity(spec, parameters, x, t, cond, precision) * (t_1 / num_steps)
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
