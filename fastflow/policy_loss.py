"""The loss of a flow policy as one call: pairs, ratios, clipping and all gradients, in memory that N does not raise."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastflow import ops
from fastflow.fields import VelocityField
from fastflow.philox import PhiloxNoise
from fastflow.surrogate import Negative, Ratio, Surrogate, flow_log_ratio, surrogate

__all__ = ["FlowPolicyLoss", "flow_policy_loss"]

MAX_PAIRS = 1 << 18
"""Pairs whose activations are held at once."""


class FlowPolicyLoss(NamedTuple):
    """What `flow_policy_loss` returns; all but `loss` without gradient.

    Attributes:
        loss: 0-d, to be minimised.
        ratio: [B, 1] or [B, N].
        log_ratio: its logarithm.
        clip_fraction: share of ratios outside [1 - clip, 1 + clip], 0-d.
        flow_loss: mean loss of a pair now, 0-d.
    """

    loss: Tensor
    ratio: Tensor
    log_ratio: Tensor
    clip_fraction: Tensor
    flow_loss: Tensor


def flow_policy_loss(
    field: VelocityField,
    x_0: Tensor | PhiloxNoise,
    action: Tensor,
    t: Tensor | None,
    cond: Tensor,
    old: Tensor,
    advantages: Tensor,
    *,
    clip: float,
    ratio: Ratio = "action",
    negative: Negative = "clip",
    error: str = "velocity",
    dim_reduction: str = "mean",
    loss_scale: float = 1.0,
    loss_clamp: float = 0.0,
    difference_clamp: float = 0.0,
    straight_through: bool = True,
    max_pairs: int = MAX_PAIRS,
    backend: str | None = None,
    precision: str | None = None,
) -> FlowPolicyLoss:
    """FPO's and FPO++'s objective (arXiv:2507.21053, arXiv:2602.02481) as a loss over B actions with N pairs each.

    The gradients of the field's parameters are computed in the same call, a block of actions at a time, so that the
    activations of `max_pairs` pairs exist at once and no more; `loss.backward()` only hands them on. Nothing else
    gets a gradient.

    Args:
        field: velocity field of the policy.
        x_0, t: the pairs: noise [B, N, A] and times [B, N]; or a `fastflow.PhiloxNoise` of N samples per row, with
            which t may be None (drawn too).
        action: [B, A], as the sampler gave them. cond: [B, C], observations as the field sees them.
        old: [B, N], losses of the same pairs at the parameters that acted (`pair_losses`).
        advantages: [B].
        clip, negative: see `fastflow.surrogate.surrogate`.
        ratio, loss_clamp, difference_clamp, straight_through: see `fastflow.surrogate.flow_log_ratio`.
        error, dim_reduction, backend, precision: see `fastflow.flow_matching_loss`. loss_scale: factor of each loss.
        max_pairs: at least 1; blocks have at least one action.

    Raises:
        ValueError, TypeError: a shape, name or dtype that does not fit, as the functions named above.
    """
    if max_pairs < 1:
        raise ValueError(f"flow_policy_loss: max_pairs must be at least 1, got {max_pairs}")
    rows = action.shape[0]
    if old.dim() != 2 or old.shape[0] != rows or advantages.shape != (rows,):
        raise ValueError(
            f"flow_policy_loss: expected old [{rows}, N] and advantages [{rows}], got {list(old.shape)} and "
            f"{list(advantages.shape)}"
        )
    matching: dict[str, Any] = dict(
        error=error, dim_reduction=dim_reduction, loss_scale=loss_scale, backend=backend, precision=precision
    )
    ratios: dict[str, Any] = dict(
        per=ratio, loss_clamp=loss_clamp, difference_clamp=difference_clamp, straight_through=straight_through
    )

    def block(part: slice) -> tuple[Surrogate, Tensor, Tensor]:
        losses = pair_losses(
            field, _rows(x_0, part), action[part], None if t is None else t[part], cond[part], **matching
        )
        log_ratio = flow_log_ratio(old[part], losses, **ratios)
        return surrogate(log_ratio, advantages[part], clip, negative), log_ratio.detach(), losses.detach()

    size = max(max_pairs // old.shape[1], 1)
    parts = [slice(i, min(i + size, rows)) for i in range(0, max(rows, 1), size)]
    parameters = [p for p in field.parameter_list() if p.requires_grad]
    if len(parts) == 1:
        found, log_ratio, losses = block(parts[0])
        return _result(found.loss, [found], [log_ratio], [losses])
    if not (torch.is_grad_enabled() and parameters):
        blocks = [block(part) for part in parts]
        weights = [(part.stop - part.start) / rows for part in parts]
        loss = torch.stack([b[0].loss * w for b, w in zip(blocks, weights)]).sum()
        return _result(loss, *map(list, zip(*blocks)))
    seen: list[Any] = []
    loss = _Blocks.apply(block, parts, rows, seen, *parameters)
    return _result(loss, *map(list, zip(*seen)))


def pair_losses(
    field: VelocityField,
    x_0: Tensor | PhiloxNoise,
    action: Tensor,
    t: Tensor | None,
    cond: Tensor,
    *,
    error: str = "velocity",
    dim_reduction: str = "mean",
    loss_scale: float = 1.0,
    backend: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """Losses [B, N] of pairs; arguments as for `flow_policy_loss`. A row's are the same in every batch, bit for bit."""
    losses = ops.flow_matching_loss(
        field,
        x_0,
        action,
        t,
        cond,
        reduction="none",
        dim_reduction=dim_reduction,
        error=error,
        backend=backend,
        precision=precision,
    )
    return losses * loss_scale if loss_scale != 1 else losses


def _rows(x_0: Tensor | PhiloxNoise, part: slice) -> Tensor | PhiloxNoise:
    if isinstance(x_0, PhiloxNoise):
        return PhiloxNoise(x_0.seed, x_0.ids[part], x_0.samples)
    return x_0[part]


def _result(loss: Tensor, found: list[Surrogate], log_ratio: list[Tensor], losses: list[Tensor]) -> FlowPolicyLoss:
    ratio, clipped = (torch.cat(parts) for parts in zip(*((s.ratio, s.clipped) for s in found)))
    return FlowPolicyLoss(loss, ratio, torch.cat(log_ratio), clipped.to(ratio.dtype).mean(), torch.cat(losses).mean())


class _Blocks(torch.autograd.Function):
    """The loss over blocks of rows, each with its gradient before the next begins."""

    @staticmethod
    def forward(ctx: Any, block: Any, parts: list[slice], rows: int, seen: list[Any], *parameters: Tensor) -> Tensor:
        total, grads = None, None
        for part in parts:
            with torch.enable_grad():
                found, log_ratio, losses = block(part)
                share = found.loss * ((part.stop - part.start) / rows)
                block_grads = torch.autograd.grad(share, parameters)
            seen.append((Surrogate(share.detach(), found.ratio, found.clipped), log_ratio, losses))
            total = share.detach() if total is None else total + share.detach()
            if grads is None:
                grads = list(block_grads)
            else:
                torch._foreach_add_(grads, block_grads)
        ctx.save_for_backward(*(grads or ()))
        assert total is not None
        return total

    @staticmethod
    def backward(ctx: Any, *output: Tensor) -> tuple[Any, ...]:
        return (None, None, None, None, *(output[0] * grad for grad in ctx.saved_tensors))
