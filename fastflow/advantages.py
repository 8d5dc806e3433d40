"""Generalised advantage estimation (Schulman et al., arXiv:1506.02438), with ends of episodes told apart."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gae"]


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """A_t = sum_k (gamma lambda)^k delta_{t+k} within an episode, delta_t = r_t + gamma V(s_{t+1}) - V(s_t).

    Where an episode terminated, nothing follows: V(s_{t+1}) counts as zero. Where it was cut off (truncated), the state
    it was cut off in has its value, and the sum ends there too. The last row of a rollout is bootstrapped the same way.

    Args:
        rewards, values: [T, B], of the steps taken.
        next_values: [T, B], of the states the steps led to: an ended episode's own last state, not the first of the
            next one.
        terminated, truncated: [T, B] bool.
        gamma, gae_lambda: discount and lambda, both in [0, 1].

    Returns:
        [T, B]. Returns to train a value on are this plus `values`.

    Raises:
        ValueError: shapes that differ.
    """
    shape = rewards.shape
    for name, tensor in (
        ("values", values),
        ("next_values", next_values),
        ("terminated", terminated),
        ("truncated", truncated),
    ):
        if tensor.shape != shape or tensor.dim() != 2:
            raise ValueError(f"gae: {name} must be [T, B] = {list(shape)} as rewards, got {list(tensor.shape)}")
    delta = rewards + gamma * next_values * (~terminated).to(rewards.dtype) - values
    keep = (gamma * gae_lambda) * (~(terminated | truncated)).to(rewards.dtype)
    out = torch.empty_like(delta)
    following = torch.zeros_like(delta[0])
    for t in range(len(delta) - 1, -1, -1):
        following = torch.addcmul(delta[t], keep[t], following, out=out[t])
    return out
