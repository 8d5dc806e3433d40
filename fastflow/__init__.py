"""Flow-matching critics and policies for reinforcement learning, with the K-step integration and the loss as one operation."""

from fastflow._version import __version__
from fastflow.fields import (
    Cosine,
    CosineFourier,
    FieldSpec,
    HLGauss,
    Identity,
    RawTime,
    Scaled,
    VelocityField,
)
from fastflow.modules import FlowCritic, FlowPolicy, OneStepPolicy, ValueNetwork
from fastflow.ops import flow_matching_loss, integrate, velocity_matching_loss

__all__ = [
    "Cosine",
    "CosineFourier",
    "FieldSpec",
    "FlowCritic",
    "FlowPolicy",
    "HLGauss",
    "Identity",
    "OneStepPolicy",
    "RawTime",
    "Scaled",
    "ValueNetwork",
    "VelocityField",
    "__version__",
    "flow_matching_loss",
    "integrate",
    "velocity_matching_loss",
]
