"""From where a flow critic's walks end to what it learns (floq, arXiv:2509.06863): one pass of native code on the CPU,
one launch on a GPU, or plain PyTorch.

Letters: B batch, E members, S noise samples per transition.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastflow import cpu, operators
from fastflow.kernels.cpu import NO_NETWORK, call
from fastflow.matching_gradients import ordinary

__all__ = ["Backup", "Learnt"]

# What is told of a batch. What the others follow from comes first: where training stops because a number is not finite,
# the first such metric is named.
_TOLD = ("target_mean", "q_mean", "q_min", "q_max", "var_flow_returns", "td_error", "outside_range")


class Learnt(NamedTuple):
    """What `Backup` returns, without gradient.

    Attributes:
        target: what the flow critic learns, [B], or [B, S] with a target for each sample.
        value: values of (obs, action) by the online critic, [B].
        metrics: 0-d, by name.
    """

    target: Tensor
    value: Tensor
    metrics: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Backup:
    """How targets are made; fields as in `fastflow.agents.floq.FloqConfig`.

    Args:
        value_range: beside it, values are counted as outside.
        clip: what values of next actions are clipped to, if anything.
    """

    q_agg: str
    backup: str
    critic_target: str
    discount: float
    target_noise: float
    value_range: tuple[float, float]
    clip: tuple[float, float] | None = None

    def __call__(
        self, target_q: Tensor, q: Tensor, batch: Mapping[str, Tensor], noise: Tensor | None, runner: str | None
    ) -> Learnt:
        """Target and value of each transition.

        Args:
            target_q, q: [E, B, S], where the target's walks from the next transitions and the online critic's end.
            batch: rewards and masks, or returns, [B].
            noise: of the targets, [B], or None.
            runner: "native" code or the kernel of "triton" may do it, where that covers the call; None for neither.
        """
        found = None if runner is None else self._in_one(target_q, q, batch, noise, runner)
        if found is not None:
            return found
        target = self._target(target_q, batch, noise)
        # Always the mean, also where the target takes the minimum.
        value = q.mean((0, 2))
        told = (
            target.mean(),
            value.mean(),
            value.min(),
            value.max(),
            q.var(2, correction=0).mean(),
            (target.reshape(len(value), -1) - value.unsqueeze(-1)).abs().mean(),
            share_outside(torch.stack((target_q, q)), self.value_range),
        )
        return Learnt(target, value, dict(zip(_TOLD, told, strict=True)))

    def _target(self, target_q: Tensor, batch: Mapping[str, Tensor], noise: Tensor | None) -> Tensor:
        if self.critic_target == "returns":
            target = batch["returns"]
        else:
            rewards, masks = batch["rewards"], batch["masks"]
            # Over members first, for each noise sample; then over noise samples.
            next_q = target_q.amin(0) if self.q_agg == "min" else target_q.mean(0)
            if self.clip is not None:
                next_q = next_q.clamp(*self.clip)
            if self.backup == "expected":
                next_q = next_q.mean(-1)
            else:
                rewards, masks = rewards.unsqueeze(-1), masks.unsqueeze(-1)
            target = rewards + self.discount * masks * next_q
        if noise is None:
            return target
        return target + self.target_noise * noise.view(-1, *(1,) * (target.dim() - 1))

    def _in_one(
        self, target_q: Tensor, q: Tensor, batch: Mapping[str, Tensor], noise: Tensor | None, runner: str
    ) -> Learnt | None:
        e, b, s = q.shape
        bootstrapped = self.critic_target != "returns"
        each = bootstrapped and self.backup == "distributional"
        given: list[Tensor] = [batch["rewards"], batch["masks"]] if bootstrapped else [batch["returns"]]
        given += [] if noise is None else [noise]
        expected: list[Any] = [(target_q, (e, b, s)), (q, (e, b, s)), *((x, (b,)) for x in given)]
        if runner == "triton":
            return self._launched(target_q, q, given, noise, each) if operators.unobserved() else None
        if not (operators.unobserved() and ordinary(expected)) or cpu.unsupported(torch.float32):
            return None
        rows = [x.contiguous() for x in given]
        rewards, masks = rows[0], rows[1] if bootstrapped else None
        target, value, told = q.new_empty((b, s) if each else b), q.new_empty(b), q.new_empty(len(_TOLD))
        ints = (e, b, s, int(self.q_agg == "min"), int(each))
        reals = (self.discount, self.target_noise, *self.value_range, *(self.clip or (-math.inf, math.inf)))
        tensors = (target_q.contiguous(), q.contiguous(), rewards, masks, None if noise is None else rows[-1])
        call("backup", NO_NETWORK, ints, reals, (*tensors, target, value, told))
        return Learnt(target, value, dict(zip(_TOLD, told.unbind(), strict=True)))

    def _launched(
        self, target_q: Tensor, q: Tensor, given: list[Tensor], noise: Tensor | None, each: bool
    ) -> Learnt | None:
        if any(x.dtype != torch.float32 or x.requires_grad for x in (target_q, q, *given)):
            return None
        from fastflow.kernels.backup import backup

        rewards, masks = given[0], None if self.critic_target == "returns" else given[1]
        rule = (self.q_agg == "min", each, self.discount, self.target_noise, self.value_range, self.clip)
        with torch.cuda.device_of(q):
            target, value, told = backup(target_q, q, rewards, masks, noise, *rule)
        return Learnt(target, value, dict(zip(_TOLD, told, strict=True)))


def share_outside(z: Tensor, value_range: tuple[float, float]) -> Tensor:
    """Share of z outside the range of values, which is that of the HL-Gauss features, 0-d."""
    return (z.clamp(*value_range) != z).to(z.dtype).mean()
