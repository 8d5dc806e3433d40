"""The loss of a flow policy as one call: pairs, ratios, clipping and all gradients, in memory that N does not raise."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastflow import ops
from fastflow.fields import VelocityField
from fastflow.philox import PhiloxNoise
from fastflow.surrogate import Negative, Ratio, flow_log_ratio, surrogate

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

    # Made first: small tensors that outlive a block would lie between the blocks' own memory and break it up.
    log_ratio = old.new_empty(rows, 1 if ratio == "action" else old.shape[1])
    clipped, now = torch.empty_like(log_ratio, dtype=torch.bool), torch.empty_like(old)

    def block(part: slice) -> Tensor:
        """This block's share of the loss."""
        times = None if t is None else t[part]
        losses = pair_losses(field, _rows(x_0, part), action[part], times, cond[part], **matching)
        change = flow_log_ratio(old[part], losses, **ratios)
        found = surrogate(change, advantages[part], clip, negative)
        with torch.no_grad():
            log_ratio[part], clipped[part], now[part] = change, found.clipped, losses
        return found.loss if part.stop - part.start == rows else found.loss * ((part.stop - part.start) / rows)

    parts = _parts(rows, old.shape[1], max_pairs)
    parameters = [p for p in field.parameter_list() if p.requires_grad]
    if len(parts) > 1 and torch.is_grad_enabled() and parameters:
        loss = _Blocks.apply(block, parts, *parameters)
    else:
        loss = torch.stack([block(part) for part in parts]).sum()
    return FlowPolicyLoss(loss, log_ratio.exp(), log_ratio, clipped.to(old.dtype).mean(), now.mean())


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
    max_pairs: int = MAX_PAIRS,
    backend: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """Losses [B, N] of pairs; arguments as for `flow_policy_loss`. A row's are the same in every batch, bit for bit.

    Without gradients `max_pairs` are computed at once: what noise is drawn from takes more room than the losses.
    """
    options = dict(reduction="none", dim_reduction=dim_reduction, error=error, backend=backend, precision=precision)

    def block(part: slice) -> Tensor:
        times = None if t is None else t[part]
        return ops.flow_matching_loss(field, _rows(x_0, part), action[part], times, cond[part], **options)  # type: ignore[arg-type]

    parts = [slice(0, len(action))]
    if not torch.is_grad_enabled():
        parts = _parts(len(action), x_0.samples if isinstance(x_0, PhiloxNoise) else x_0.shape[1], max_pairs)
    blocks = [block(part) for part in parts]
    losses = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    return losses * loss_scale if loss_scale != 1 else losses


def _parts(rows: int, pairs: int, max_pairs: int) -> list[slice]:
    """Blocks of rows of at most `max_pairs` pairs, one row at least."""
    size = max(max_pairs // pairs, 1)
    return [slice(i, min(i + size, rows)) for i in range(0, max(rows, 1), size)]


def _rows(x_0: Tensor | PhiloxNoise, part: slice) -> Tensor | PhiloxNoise:
    if isinstance(x_0, PhiloxNoise):
        return PhiloxNoise(x_0.seed, x_0.ids[part], x_0.samples)
    return x_0[part]


class _Blocks(torch.autograd.Function):
    """The loss over blocks of rows, each with its gradient before the next begins."""

    @staticmethod
    def forward(ctx: Any, block: Any, parts: list[slice], *parameters: Tensor) -> Tensor:
        losses = []
        grads = [torch.zeros_like(p) for p in parameters]
        for part in parts:
            with torch.enable_grad():
                share = block(part)
                torch._foreach_add_(grads, torch.autograd.grad(share, parameters))
            losses.append(share.detach())
        ctx.save_for_backward(*grads)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *output: Tensor) -> tuple[Any, ...]:
        return (None, None, *(output[0] * grad for grad in ctx.saved_tensors))
