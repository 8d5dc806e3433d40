"""Policy gradients from ratios: what FPO, FPO++, DPPO and PPO maximise, given the logarithm of their ratios.

A flow policy has no tractable likelihood. FPO (arXiv:2507.21053) puts in the ratio's place the exponential of how much
the flow-matching loss of an action fell since the action was taken; everything behind the ratio is PPO's.

Letters: B rows (an action each), N pairs (t, noise) per action; N is 1 where a ratio belongs to an action.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["Surrogate", "advantages_for", "clamp", "flow_log_ratio", "surrogate"]

Ratio = Literal["action", "pair"]
Negative = Literal["clip", "aspo"]


def clamp(x: Tensor, low: float, high: float, *, straight_through: bool) -> Tensor:
    """x clamped to [low, high]; with `straight_through` its gradient is that of x everywhere (FPO++'s guards), else
    zero outside."""
    if not straight_through:
        return x.clamp(low, high)
    # Two subtractions would round: where nothing is clamped the value has to be x to the last bit.
    return _StraightThrough.apply(x, low, high)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, low: float, high: float) -> Tensor:
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def flow_log_ratio(
    old: Tensor,
    new: Tensor,
    *,
    per: Ratio = "action",
    loss_clamp: float = 0.0,
    difference_clamp: float = 0.0,
    straight_through: bool = True,
) -> Tensor:
    """Logarithm of the flow ratio from the losses of the same pairs before and after.

        per action (FPO, arXiv:2507.21053):     log rho   = mean_i (L_old,i - L_new,i)    [B, 1]
        per pair (FPO++, arXiv:2602.02481):    log rho_i = L_old,i - L_new,i              [B, N]

    Args:
        old: losses [B, N] at the parameters that acted, without gradient.
        new: losses [B, N] now.
        per: "action" or "pair".
        loss_clamp: largest loss of a pair, old and new, 0 for none (FPO++: 20).
        difference_clamp: largest absolute difference of a pair's losses, 0 for none (FPO's GridWorld: 3, FPO++: 10).
        straight_through: the clamps let gradients pass; else what they cut off has none.

    Returns:
        [B, 1] or [B, N]; exactly 0 where nothing changed.

    Raises:
        ValueError: shapes that differ, or an unknown `per`.
    """
    if old.shape != new.shape or new.dim() != 2:
        raise ValueError(f"flow_log_ratio: expected old and new as [B, N], got {list(old.shape)} and {list(new.shape)}")
    if per not in ("action", "pair"):
        raise ValueError(f"flow_log_ratio: per must be 'action' or 'pair', got {per!r}")
    if loss_clamp:
        old = old.clamp(max=loss_clamp)
        new = clamp(new, -math.inf, loss_clamp, straight_through=straight_through)
    difference = old - new
    if difference_clamp:
        difference = clamp(difference, -difference_clamp, difference_clamp, straight_through=straight_through)
    return difference.mean(1, keepdim=True) if per == "action" else difference


class Surrogate(NamedTuple):
    """Attributes: loss 0-d, to be minimised; ratio [B, N]; clipped [B, N], where the ratio left the clip range."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def surrogate(log_ratio: Tensor, advantages: Tensor, clip: float, negative: Negative = "clip") -> Surrogate:
    """The clipped objective, as a loss: minus the mean over all ratios of

        "clip" (PPO):  min(rho A, clip(rho, 1 - clip, 1 + clip) A)
        "aspo" (FPO++): the same where A >= 0; where A < 0 the simple policy objective
                       rho A - |A| / (2 clip) (rho - 1)^2, greatest at 1 - clip: its gradient goes on beyond the range
                       and pulls ratios back into it.

    Args:
        log_ratio: [B, N]. advantages: [B], shared by a row's pairs, without gradient.
        clip: half-width of the range of ratios around 1.
        negative: what becomes of rows with negative advantage.

    Raises:
        ValueError: shapes that do not fit, or an unknown `negative`.
    """
    if log_ratio.dim() != 2 or advantages.shape != log_ratio.shape[:1]:
        raise ValueError(
            f"surrogate: expected log_ratio [B, N] and advantages [B], got {list(log_ratio.shape)} and "
            f"{list(advantages.shape)}"
        )
    if negative not in ("clip", "aspo"):
        raise ValueError(f"surrogate: negative must be 'clip' or 'aspo', got {negative!r}")
    a = advantages.unsqueeze(1)
    ratio = log_ratio.exp()
    gain = torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
    if negative == "aspo":
        gain = torch.where(a < 0, ratio * a + a / (2 * clip) * (ratio - 1).square(), gain)
    with torch.no_grad():
        clipped = (ratio - 1).abs() > clip
    return Surrogate(-gain.mean(), ratio.detach(), clipped)


def advantages_for(
    advantages: Tensor, *, normalize: bool, positive: bool = False, limit: float = 0.0, eps: float = 1e-8
) -> Tensor:
    """Advantages [B] as the objective takes them.

    Args:
        normalize: zero mean and unit standard deviation over these rows.
        positive: their softplus instead, which is never negative (the FPO authors' suggestion of advantages that
            only ever pull actions up).
        limit: largest absolute value, 0 for none (FPO++: 100).
    """
    if normalize:
        # The standard deviation of a single row is nothing to divide by.
        spread = advantages.std() if len(advantages) > 1 else torch.ones_like(advantages[0])
        advantages = (advantages - advantages.mean()) / (spread + eps)
    if positive:
        advantages = torch.nn.functional.softplus(advantages)
    return advantages.clamp(-limit, limit) if limit else advantages
