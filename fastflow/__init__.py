"""Flow-matching critics and policies for reinforcement learning: the K-step integration and the loss, each one
operation."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fastflow._version import __version__

if TYPE_CHECKING:
    from fastflow.fields import (
        MLP,
        Cosine,
        CosineFourier,
        FieldSpec,
        FiLMUNet,
        HLGauss,
        Identity,
        PowerFourier,
        RawTime,
        ResidualMLP,
        Scaled,
        Sinusoidal,
        VelocityField,
    )
    from fastflow.frozen import FrozenWalk
    from fastflow.modules import (
        FlowCritic,
        FlowPolicy,
        FrozenFlowCritic,
        FrozenFlowPolicy,
        OneStepPolicy,
        ValueNetwork,
    )
    from fastflow.ops import flow_matching_loss, integrate, velocity_matching_loss
    from fastflow.philox import PhiloxNoise
    from fastflow.policy_loss import FlowPolicyLoss, flow_policy_loss, pair_losses
    from fastflow.successor import SuccessorFlow

__all__ = [
    "MLP",
    "Cosine",
    "CosineFourier",
    "FiLMUNet",
    "FieldSpec",
    "FlowCritic",
    "FlowPolicy",
    "FlowPolicyLoss",
    "FrozenFlowCritic",
    "FrozenFlowPolicy",
    "FrozenWalk",
    "HLGauss",
    "Identity",
    "OneStepPolicy",
    "PhiloxNoise",
    "PowerFourier",
    "RawTime",
    "ResidualMLP",
    "Scaled",
    "Sinusoidal",
    "SuccessorFlow",
    "ValueNetwork",
    "VelocityField",
    "__version__",
    "flow_matching_loss",
    "flow_policy_loss",
    "integrate",
    "pair_losses",
    "velocity_matching_loss",
]

_MODULES = {
    "fields": [
        "Cosine",
        "CosineFourier",
        "FiLMUNet",
        "FieldSpec",
        "HLGauss",
        "Identity",
        "MLP",
        "PowerFourier",
        "RawTime",
        "ResidualMLP",
        "Scaled",
        "Sinusoidal",
        "VelocityField",
    ],
    "frozen": ["FrozenWalk"],
    "modules": ["FlowCritic", "FlowPolicy", "FrozenFlowCritic", "FrozenFlowPolicy", "OneStepPolicy", "ValueNetwork"],
    "ops": ["flow_matching_loss", "integrate", "velocity_matching_loss"],
    "philox": ["PhiloxNoise"],
    "policy_loss": ["FlowPolicyLoss", "flow_policy_loss", "pair_losses"],
    "successor": ["SuccessorFlow"],
}


def __getattr__(name: str) -> object:
    # torch takes over a second to import, and the command line answers --help and errors without it.
    for module, names in _MODULES.items():
        if name in names:
            value = globals()[name] = getattr(importlib.import_module(f"fastflow.{module}"), name)
            return value
    raise AttributeError(f"module 'fastflow' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
