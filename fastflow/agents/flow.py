"""The flow policy that FPO and DPPO both train, and its settings."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from fastflow.agents.checks import check_config
from fastflow.agents.on_policy import OnPolicyConfig
from fastflow.fields import PowerFourier, RawTime, TimeEmbedding
from fastflow.modules import FlowPolicy

__all__ = ["FlowConfig", "flow_policy"]


@dataclasses.dataclass(frozen=True)
class FlowConfig(OnPolicyConfig):
    """Hyperparameters of every on-policy agent whose policy is a flow.

    Raises:
        ValueError: a value outside its range. TypeError: a value of another type. Both name the field.
    """

    num_steps: int = 10
    """K: Euler steps from noise to an action."""
    prediction: Literal["velocity", "endpoint"] = "velocity"
    """What the network puts out. FPO's pairs need grid or skewed times with an end point, whose velocity is infinite at
    t = 1."""
    output_scale: float = 1.0
    """The network's output is multiplied by this (0.25 in Playground)."""
    time_embed_dim: int = 8
    """Numbers that tell the time: sin and cos of 2^k t; 0 gives t itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"num_steps": 1, "time_embed_dim": 0}
        ranges = {"output_scale": (lambda x: x > 0, "a positive number")}
        check_config(self, least, ranges, {"prediction": ("velocity", "endpoint")})
        if self.time_embed_dim % 2:
            owner = type(self).__name__
            raise ValueError(f"{owner}: time_embed_dim must be even, or 0 for t itself, got {self.time_embed_dim}")


def flow_policy(config: FlowConfig, obs_dim: int, action_dim: int) -> FlowPolicy:
    """The flow policy that a configuration describes, on the meta device: its constructor then draws nothing from
    torch's global generator."""
    embedding: TimeEmbedding = PowerFourier(config.time_embed_dim) if config.time_embed_dim else RawTime()
    return FlowPolicy(
        obs_dim,
        action_dim,
        hidden=config.actor_hidden,
        activation=config.activation,
        time_embedding=embedding,
        output_scale=config.output_scale,
        prediction=config.prediction,
        num_steps=config.num_steps,
        # Actions are learnt on as they are, and brought into bounds on their way to the environment.
        clip=None,
        backend=config.backend,
        precision=config.precision,
        device="meta",
        dtype=torch.float32,
    )
