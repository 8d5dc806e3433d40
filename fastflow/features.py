"""What a network's last hidden layer puts out."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastflow import reference
from fastflow.fields import DenseStack, VelocityField

__all__ = ["feature_norm", "features"]


def features(stack: DenseStack, x: Tensor, *, activation: str = "gelu_tanh", norm: str | None = "layer") -> Tensor:
    """What the head of a plain network takes, for inputs x [..., in] ([E, ..., in] with an ensemble): [..., H]."""
    return reference.dense_stack(x, _without_head(stack), activation, norm)


def feature_norm(field: VelocityField, x_t: Tensor, cond: Tensor | None, t: float = 0.0) -> Tensor:
    """The mean norm, 0-d, of what the head of a velocity network takes at time t.

    Args:
        field: any but with a U-Net.
        x_t: [..., D], [E, ..., D] with an ensemble. cond: [..., C], broadcasts to the leading shape of x_t.
    """
    # The head's place is taken by one that hands on what it gets.
    spec = dataclasses.replace(field.spec, prediction="velocity", output_scale=1.0)
    time = torch.full((), t, dtype=x_t.dtype, device=x_t.device)
    return reference.velocity(spec, _without_head(field), x_t, time, cond).norm(dim=-1).mean()


def _without_head(stack: DenseStack) -> list[Tensor]:
    """A network's parameters with the identity in place of its head."""
    parameters = stack.parameter_list()
    head = 2 * (len(stack.layers) - 1)
    weight = parameters[head]
    identity = torch.eye(weight.shape[-2], dtype=weight.dtype, device=weight.device)
    parameters[head] = identity.expand(*weight.shape[:-2], *identity.shape)
    parameters[head + 1] = torch.zeros_like(weight[..., 0])
    return parameters
