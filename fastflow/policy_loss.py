"""The loss of a flow policy as one call: pairs, ratios, clipping and all gradients, in memory that N does not raise.

On the CPU native code does all of it in one pass (`policy_gradients`); elsewhere the loss is made of its parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastflow import cpu, operators, ops
from fastflow.fields import VelocityField
from fastflow.matching_gradients import covers, ordinary
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
    clamps: dict[str, Any] = dict(
        loss_clamp=loss_clamp, difference_clamp=difference_clamp, straight_through=straight_through
    )
    ratios: dict[str, Any] = dict(per=ratio, **clamps)
    options = dict(clip=clip, ratio=ratio, negative=negative, max_pairs=max_pairs, **matching, **clamps)
    found = policy_gradients(field, x_0, action, t, cond, old, advantages, **options)
    if found is not None:
        loss = _AtHand.apply(found.loss, found.gradients, *field.parameter_list())
        return FlowPolicyLoss(loss, found.ratio, found.log_ratio, found.clip_fraction, found.flow_loss)

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


class PolicyGradients(NamedTuple):
    """What `policy_gradients` returns, all without graph: the gradients of the field's parameters, in their order,
    what `FlowPolicyLoss` holds, and what else a minibatch tells of its ratios."""

    gradients: Sequence[Tensor]
    log_ratio: Tensor
    ratio: Tensor
    loss: Tensor
    clip_fraction: Tensor
    flow_loss: Tensor
    mean: Tensor
    """Of the ratios, 0-d; so are their largest and the mean of rho - 1 - log rho."""
    largest: Tensor
    divergence: Tensor


def policy_gradients(
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
    gradients: Sequence[Tensor] | None = None,
) -> PolicyGradients | None:
    """`flow_policy_loss` in one pass of native code: a few actions with all their pairs go forward, to their ratios,
    and back while their activations are at hand. None, and nothing done, where that does not cover the call.

    Args:
        gradients: where those of the field's parameters go, contiguous; None makes them.
    """
    named = (
        ratio in ("action", "pair")
        and negative in ("clip", "aspo")
        and error in ops.ERRORS
        and dim_reduction in ops.DIM_REDUCTIONS
        and precision in (None, *ops.PRECISIONS)
    )
    if not named or not _covered(field, x_0, action, t, cond, old, advantages, backend):
        return None
    rows, pairs = old.shape
    dim, parameters = field.spec.state_dim, field.parameter_list()
    factor = {"mean": 1.0, "sum": float(dim), "sqrt": math.sqrt(dim)}[dim_reduction]
    count = rows if ratio == "action" else rows * pairs
    objective = cpu.Objective(
        (ops.ERRORS.index(error), int(ratio == "action"), int(negative == "aspo"), int(straight_through)),
        (factor, loss_scale, loss_clamp, difference_clamp, 1 - clip, 1 + clip, clip, count),
    )
    log_ratio = old.new_empty(rows, 1 if ratio == "action" else pairs)
    ratios, losses = torch.empty_like(log_ratio), old.new_empty(rows, pairs)
    if gradients is None:
        gradients = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters]
    fixed = (field.spec, precision or "fp32", objective)

    def run(part: slice | None, statistics: Tensor, to: Sequence[Tensor]) -> None:
        noise, times = x_0 if part is None else _rows(x_0, part), t if part is None or t is None else t[part]
        if isinstance(noise, PhiloxNoise):
            times = noise.t().to(old.dtype) if times is None else times
            noise = noise.x_0(dim).to(old.dtype)
        assert times is not None
        inputs: tuple[Tensor, ...] = (action, cond, old, advantages)
        outputs: tuple[Tensor, ...] = (losses, log_ratio, ratios)
        if part is not None:
            inputs, outputs = tuple(x[part] for x in inputs), tuple(x[part] for x in outputs)
        cpu.policy((noise, times, *inputs), parameters, *fixed, (*outputs, statistics), to)

    parts = _parts(rows, pairs, max_pairs)
    with torch.no_grad():
        if len(parts) == 1:
            statistics = old.new_empty(cpu.STATISTICS)
            run(None, statistics, gradients)
            return PolicyGradients(gradients, log_ratio, ratios, *statistics.unbind())
        table = old.new_empty(len(parts), cpu.STATISTICS)
        more = [torch.empty_like(g) for g in gradients]
        for i, part in enumerate(parts):
            run(part, table[i], more if i else gradients)
            if i:
                torch._foreach_add_(list(gradients), more)
        clipped = ((ratios - 1).abs() > clip).to(old.dtype).mean()
        told = (ratios.mean(), ratios.max(), (ratios - 1 - log_ratio).mean())
        return PolicyGradients(gradients, log_ratio, ratios, table[:, 0].sum(), clipped, losses.mean(), *told)


MOST_PAIRS = 256
"""Pairs of an action that native code goes through in one block."""


def _covered(
    field: VelocityField,
    x_0: Tensor | PhiloxNoise,
    action: Tensor,
    t: Tensor | None,
    cond: Tensor,
    old: Tensor,
    advantages: Tensor,
    backend: str | None,
) -> bool:
    """Whether `policy_gradients` can run: plain tensors that are laid out as it says, on the CPU, of which the field's
    parameters alone want a gradient, and nobody who looks at operators."""
    if not old.is_cpu or not covers(field, backend) or field.spec.ensemble is not None:
        return False
    spec = field.spec
    rows, pairs = old.shape
    if not rows or not 1 <= pairs <= MOST_PAIRS:
        return False
    expected: list[tuple[Tensor | None, tuple[int, ...]]] = [
        (action, (rows, spec.state_dim)),
        (cond, (rows, spec.cond_dim)),
        (old, (rows, pairs)),
        (advantages, (rows,)),
    ]
    if isinstance(x_0, PhiloxNoise):
        if len(x_0.ids) != rows or x_0.samples != pairs or not x_0.ids.is_cpu:
            return False
    else:
        expected.append((x_0, (rows, pairs, spec.state_dim)))
    if t is not None or not isinstance(x_0, PhiloxNoise):
        expected.append((t, (rows, pairs)))
    return ordinary(expected) and any(p.requires_grad for p in field.parameter_list())


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


class _AtHand(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients, *parameters)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        half = len(saved) // 2
        gradients = torch._foreach_mul(saved[:half], grad)
        if torch.is_grad_enabled():
            gradients = _Once.apply(half, *gradients, *saved[half:])
        return (None, None, *gradients)


class _Once(torch.autograd.Function):
    """Gradients that depend on parameters in a way that nobody can differentiate: whoever tries is told."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        operators.refuse_double_backward(ctx, *grads)


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
