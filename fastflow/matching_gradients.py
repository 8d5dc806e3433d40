"""Flow-matching losses and their gradients in one pass of native code, without autograd."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastflow import cpu, operators, ops
from fastflow.fields import VelocityField

__all__ = ["covers", "matching_gradients", "ordinary", "velocity_gradients"]


def matching_gradients(
    field: VelocityField,
    x_0: Tensor,
    x_1: Tensor,
    t: Tensor,
    cond: Tensor,
    *,
    scale: float = 1.0,
    gradients: Sequence[Tensor],
    error: str = "velocity",
    backend: str | None = None,
    precision: str | None = None,
) -> Tensor | None:
    """The mean of `fastflow.flow_matching_loss` over members, rows and samples, 0-d without graph, and `scale` times
    its gradients: a block of rows goes forward and back while its activations are at hand. None, and nothing done,
    where native code does not cover the call or a parameter wants no gradient.

    Args:
        x_0: [B, S, D]. x_1: [B, S, D], or [B, D] for all samples. t: [B, S]. cond: [B, C]. Members share them all.
        gradients: where those of the field's parameters go, in their order; contiguous.
        error, backend, precision: see `fastflow.flow_matching_loss`.
    """
    if error not in ops.ERRORS or precision not in (None, *ops.PRECISIONS) or not covers(field, backend):
        return None
    spec, parameters = field.spec, field.parameter_list()
    rows, samples, dim = x_0.shape if x_0.dim() == 3 else (0, 0, 0)
    many = x_1.dim() == 3
    expected = [
        (x_0, (rows, samples, spec.state_dim)),
        (x_1, (rows, samples, dim) if many else (rows, dim)),
        (t, (rows, samples)),
        (cond, (rows, spec.cond_dim)),
    ]
    if not rows * samples or not ordinary(expected) or not all(p.requires_grad for p in parameters):
        return None
    with torch.no_grad():
        fixed = (spec, precision or "fp32", ops.ERRORS.index(error), scale, gradients)
        return cpu.matching(x_0, x_1, t, cond, parameters, *fixed)


def velocity_gradients(
    field: VelocityField,
    x_t: Tensor,
    t: Tensor,
    target_velocity: Tensor,
    cond: Tensor,
    *,
    weight: Tensor,
    scale: float = 1.0,
    gradients: Sequence[Tensor],
    backend: str | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor] | None:
    """`fastflow.velocity_matching_loss` with the weights of rows, 0-d, and without weights and `reduction="none"`,
    [B, S]; both without graph, and `scale` times the first one's gradients. None, and nothing done, as in
    `matching_gradients`, and for a field with members.

    Args:
        x_t, target_velocity: [B, S, D]. t, weight: [B, S]. cond: [B, C].
        gradients, backend, precision: see `matching_gradients`.
    """
    if precision not in (None, *ops.PRECISIONS) or not covers(field, backend) or field.spec.ensemble is not None:
        return None
    spec, parameters = field.spec, field.parameter_list()
    rows, samples = x_t.shape[:2] if x_t.dim() == 3 else (0, 0)
    points, times = (rows, samples, spec.state_dim), (rows, samples)
    expected = [(x_t, points), (target_velocity, points), (t, times), (weight, times), (cond, (rows, spec.cond_dim))]
    if not rows * samples or not ordinary(expected) or not all(p.requires_grad for p in parameters):
        return None
    with torch.no_grad():
        fixed = (spec, precision or "fp32", scale, gradients)
        return cpu.velocity_matching(x_t, target_velocity, t, cond, weight, parameters, *fixed)


def covers(field: VelocityField, backend: str | None) -> bool:
    """Whether native code may compute a loss of this field with its gradients: it runs here and has no layers before
    the network, the parameters are ordinary float32 ones, gradients are wanted, and nobody looks at operators."""
    if not (operators.unobserved() and torch.is_grad_enabled() and isinstance(field, VelocityField)):
        return False
    spec, backend = field.spec, ops.DEFAULT_BACKEND if backend is None else backend
    if spec.film or spec.time_sizes or not spec.cond_dim:
        return False
    if backend not in ops.BACKENDS or not ops.runs_native(backend) or torch.is_autocast_enabled("cpu"):
        return False
    if cpu.unsupported(torch.float32):
        return False
    return all(type(p) in operators.ORDINARY and p.dtype is torch.float32 and p.is_cpu for p in field.parameter_list())


def ordinary(expected: Iterable[tuple[Tensor | None, tuple[int, ...]]]) -> bool:
    """Whether all are plain float32 tensors on the CPU of these shapes, without gradients of their own."""
    return all(
        type(x) is Tensor and x.dtype is torch.float32 and x.is_cpu and not x.requires_grad and x.shape == shape
        for x, shape in expected
    )
