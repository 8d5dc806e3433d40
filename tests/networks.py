"""Velocity networks that the operator and kernel tests share: every option of a field at least once, small enough to
interpret."""

from __future__ import annotations

import copy

import torch

import fastflow as ff

SPECS = {
    "floq": ff.FieldSpec(
        1, 5, (24, 24, 24), 2, norm="layer", state_embedding=ff.HLGauss(-21.0, 1.0), time_embedding=ff.Cosine()
    ),
    "floq-as-written": ff.FieldSpec(
        1,
        70,
        (16, 16),
        2,
        norm="layer",
        state_embedding=ff.HLGauss(-2.0, 2.0, 9, 2.0),
        time_embedding=ff.CosineFourier(7),
    ),
    "scaled-scalar": ff.FieldSpec(1, 3, (32,), 2, "relu", "layer", ff.Scaled(-3.0, 4.0), ff.Cosine()),
    "scaled-vector": ff.FieldSpec(3, 4, (16, 16), None, "silu", "layer", ff.Scaled(-3.0, 4.0), ff.RawTime()),
    "actor": ff.FieldSpec(5, 6, (16, 16, 16), None),
    "no-cond": ff.FieldSpec(2, 0, (20, 20), 3, "silu"),
    "scalar-identity": ff.FieldSpec(1, 2, (40, 40), None, "gelu_tanh", "layer"),
    "wide-state": ff.FieldSpec(17, 2, (16, 16), 2, "relu", None, ff.Identity(), ff.CosineFourier(4)),
}


def random_field(spec: ff.FieldSpec, device: torch.device, dtype: torch.dtype = torch.float32) -> ff.VelocityField:
    """A field none of whose parameters is at its special initial value (zero bias, unit scale)."""
    field = ff.VelocityField(spec)
    with torch.no_grad():
        for p in field.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return field.to(device, dtype)


def in_float64(field: ff.VelocityField) -> ff.VelocityField:
    """The same field in float64: what both paths are measured against."""
    return copy.deepcopy(field).double()


def random_inputs(spec: ff.FieldSpec, batch: int, samples: int | None, device: torch.device) -> dict[str, torch.Tensor]:
    """x_0, x_1, t, cond, weight for one call; states spread over the embedding's range and beyond."""
    rows = (batch,) if samples is None else (batch, samples)
    embedding = spec.state_embedding
    low, high = getattr(embedding, "low", -1.0), getattr(embedding, "high", 1.0)

    def state() -> torch.Tensor:
        return low + (high - low) * (torch.rand(*rows, spec.state_dim) * 1.2 - 0.1)

    inputs = {"x_0": state(), "x_1": state(), "t": torch.rand(rows), "weight": torch.rand(rows)}
    inputs["cond"] = torch.randn(batch, spec.cond_dim) if spec.cond_dim else None
    return {name: x if x is None else x.to(device) for name, x in inputs.items()}


def to_float64(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs in float64."""
    return {name: x if x is None else x.double() for name, x in inputs.items()}
