"""Targets of a flow critic, its values and what is told of them, from where walks end: one launch for what is two dozen
operators of torch."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .plan import power_of_2

# Values of a block of rows, all samples.
_BLOCK = 1024


@triton.jit(do_not_specialize=["E", "B", "S"])
def backup_kernel(
    target_q_ptr,  # [E, B, S] where the target's walks end
    q_ptr,  # [E, B, S] where the online critic's do
    rewards_ptr,  # [B] rewards, or with RETURNS the targets themselves
    masks_ptr,  # [B]
    noise_ptr,  # [B] with NOISE
    target_ptr,  # [B], or with EACH [B, S]: result
    value_ptr,  # [B] result
    told_ptr,  # [7] result: means of targets and values, least and greatest value, variance, distance, share outside
    E,
    B,
    S,
    discount,
    target_noise,
    low,  # of the range of values
    high,
    clip_low,
    clip_high,
    MIN: tl.constexpr,  # over members the least, else their mean
    EACH: tl.constexpr,  # a target for each sample
    RETURNS: tl.constexpr,
    NOISE: tl.constexpr,
    CLIP: tl.constexpr,
    BB: tl.constexpr,
    SP: tl.constexpr,
):
    """One program for all rows: sums come out the same whatever runs beside it."""
    o_s = tl.arange(0, SP)[None, :]
    s_target = tl.zeros([BB], tl.float32)
    s_value = tl.zeros([BB], tl.float32)
    s_variance = tl.zeros([BB], tl.float32)
    s_distance = tl.zeros([BB], tl.float32)
    s_outside = tl.zeros([BB], tl.float32)
    least = tl.full([BB], float("inf"), tl.float32)
    most = tl.full([BB], float("-inf"), tl.float32)
    for i in tl.range(0, B, BB):
        o_b = i + tl.arange(0, BB)
        m_b = o_b < B
        m = m_b[:, None] & (o_s < S)
        b_next = tl.full([BB, SP], float("inf"), tl.float32) if MIN else tl.zeros([BB, SP], tl.float32)
        b_value = tl.zeros([BB], tl.float32)
        for e in tl.range(0, E):
            o = (e * B + o_b[:, None]) * S + o_s
            b_t = tl.load(target_q_ptr + o, mask=m, other=0.0)
            b_q = tl.load(q_ptr + o, mask=m, other=0.0)
            if MIN:
                b_next = tl.minimum(b_next, b_t, propagate_nan=tl.PropagateNan.ALL)
            else:
                b_next += b_t
            b_sum = tl.sum(b_q, 1)
            b_off = tl.where(m, b_q - (b_sum / S)[:, None], 0.0)
            s_variance += tl.sum(b_off * b_off, 1)
            b_value += b_sum
            # What is not a number is neither inside nor equal to itself.
            b_in = ((b_t >= low) & (b_t <= high)).to(tl.float32) + ((b_q >= low) & (b_q <= high)).to(tl.float32)
            s_outside += tl.sum(tl.where(m, 2.0 - b_in, 0.0), 1)
        b_value = b_value / (E * S)
        tl.store(value_ptr + o_b, b_value, mask=m_b)
        s_value += b_value
        least = tl.minimum(least, tl.where(m_b, b_value, float("inf")), propagate_nan=tl.PropagateNan.ALL)
        most = tl.maximum(most, tl.where(m_b, b_value, float("-inf")), propagate_nan=tl.PropagateNan.ALL)
        b_r = tl.load(rewards_ptr + o_b, mask=m_b, other=0.0)
        b_noise = tl.zeros([BB], tl.float32)
        if NOISE:
            b_noise = target_noise * tl.load(noise_ptr + o_b, mask=m_b, other=0.0)
        if RETURNS:
            b_target = b_r + b_noise
        else:
            b_mask = discount * tl.load(masks_ptr + o_b, mask=m_b, other=0.0)
            if not MIN:
                b_next = b_next / E
            if CLIP:
                b_next = tl.minimum(b_next, clip_high, propagate_nan=tl.PropagateNan.ALL)
                b_next = tl.maximum(b_next, clip_low, propagate_nan=tl.PropagateNan.ALL)
            if EACH:
                b_each = (b_r + b_noise)[:, None] + b_mask[:, None] * b_next
                tl.store(target_ptr + o_b[:, None] * S + o_s, b_each, mask=m)
                s_target += tl.sum(tl.where(m, b_each, 0.0), 1)
                s_distance += tl.sum(tl.where(m, tl.abs(b_each - b_value[:, None]), 0.0), 1)
            else:
                b_target = b_r + b_mask * (tl.sum(tl.where(m, b_next, 0.0), 1) / S) + b_noise
        if not EACH:
            tl.store(target_ptr + o_b, b_target, mask=m_b)
            s_target += tl.where(m_b, b_target, 0.0)
            s_distance += tl.where(m_b, tl.abs(b_target - b_value), 0.0)
    targets = B * S if EACH else B
    tl.store(told_ptr, tl.sum(s_target, 0) / targets)
    tl.store(told_ptr + 1, tl.sum(s_value, 0) / B)
    # Reductions would pass over what is not a number.
    broken = tl.sum((least != least).to(tl.float32), 0) > 0.0
    tl.store(told_ptr + 2, tl.where(broken, float("nan"), tl.min(least, 0)))
    tl.store(told_ptr + 3, tl.where(broken, float("nan"), tl.max(most, 0)))
    tl.store(told_ptr + 4, tl.sum(s_variance, 0) / (E * B * S))
    tl.store(told_ptr + 5, tl.sum(s_distance, 0) / targets)
    tl.store(told_ptr + 6, tl.sum(s_outside, 0) / (2 * E * B * S))


def backup(
    target_q: Tensor,
    q: Tensor,
    rewards: Tensor,
    masks: Tensor | None,
    noise: Tensor | None,
    least: bool,
    each: bool,
    discount: float,
    target_noise: float,
    value_range: tuple[float, float],
    clip: tuple[float, float] | None,
) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """(targets [B], or [B, S] with `each`; values [B]; what is told, 0-d, as `fastflow.agents.backup` names it).

    Args:
        target_q, q: [E, B, S], all float32.
        rewards, masks: [B]; without masks the rewards are returns, which are the targets.
        noise: [B] or None.
        least: over members the least instead of the mean.
    """
    e, b, s = q.shape
    target, value, told = q.new_empty((b, s) if each else b), q.new_empty(b), q.new_empty(7)
    samples = power_of_2(s)
    backup_kernel[(1,)](
        target_q.contiguous(),
        q.contiguous(),
        rewards.contiguous(),
        rewards if masks is None else masks.contiguous(),
        rewards if noise is None else noise.contiguous(),
        target,
        value,
        told,
        e,
        b,
        s,
        discount,
        target_noise,
        *value_range,
        *(clip or (0.0, 0.0)),
        MIN=least,
        EACH=each,
        RETURNS=masks is None,
        NOISE=noise is not None,
        CLIP=clip is not None,
        BB=max(1, _BLOCK // samples),
        SP=samples,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return target, value, told.unbind()
