"""Velocity networks that the operator and kernel tests share: every option of a field at least once, small enough to
interpret."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

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


# What a field, a walk and a loss can be told, for `pairwise`.
TRUNKS: dict[str, dict[str, Any]] = {
    "plain": dict(hidden=(24, 24, 24)),
    "plain-uneven": dict(hidden=(40, 16, 8)),
    "after": dict(hidden=(24, 24, 24), norm="layer"),
    "after-uneven": dict(hidden=(32, 20), norm="layer"),
    "one-layer": dict(hidden=(20,), norm="layer"),
    "before": dict(hidden=(24, 24, 24), norm="layer", norm_first=True),
    "before-uneven": dict(hidden=(8, 40), norm="layer", norm_first=True),
    "residual": dict(hidden=(24,) * 5, norm="layer", architecture=ff.ResidualMLP(2)),
    "residual-before": dict(hidden=(24,) * 4, norm="layer", norm_first=True, architecture=ff.ResidualMLP(3)),
    "residual-plain": dict(hidden=(16,) * 3, architecture=ff.ResidualMLP(1)),
    "unet": dict(hidden=(16, 24, 16), architecture=ff.FiLMUNet((20, 12))),
    "unet-of-two": dict(hidden=(24, 24), architecture=ff.FiLMUNet((12,))),
}
FIELD_FACTORS: dict[str, list[Any]] = {
    "trunk": list(TRUNKS),
    "activation": ["gelu_tanh", "gelu", "silu", "relu", "elu", "mish", "tanh"],
    "state": ["scalar", "vector", "wide", "scaled", "scaled-vector", "hl-gauss"],
    "time_embedding": [
        ff.RawTime(),
        ff.Cosine(),
        ff.CosineFourier(5),
        ff.PowerFourier(6),
        ff.Sinusoidal(8, (12, 10)),
        ff.Sinusoidal(6, ()),
    ],
    "ensemble": [None, 2],
    "cond_dim": [0, 7, 70],
    "prediction": ["velocity", "endpoint", "noise"],
    "output_scale": [1.0, 0.25],
    "samples": [None, 3],
    "precision": ["fp32", "bf16"],
}
WALK_FACTORS: dict[str, list[Any]] = FIELD_FACTORS | {
    "method": ["euler", "midpoint", "heun"],
    "times": ["whole", "part", "backwards", "per-row"],
    "activations": ["store", "recompute"],
    "trajectory": [False, True],
    "step_noise": [False, True],
}
LOSS_FACTORS: dict[str, list[Any]] = FIELD_FACTORS | {
    "start": ["given", "drawn", "point"],
    "sigma_min": [0.0, 0.1],
    "error": ["velocity", "noise", "endpoint"],
    "dim_reduction": ["mean", "sum", "sqrt"],
    "weighted": [False, True],
    "reduction": ["none", "sum", "mean"],
}


def pairwise(factors: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Combinations in which every two values of two factors meet at least once, chosen greedily."""
    draw = random.Random(0)
    names = list(factors)
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }

    def covers(combination: dict[str, int]) -> set[tuple[str, int, str, int]]:
        return {(a, combination[a], b, combination[b]) for a, b in itertools.combinations(names, 2)} & missing

    out = []
    while missing:
        a, i, b, j = min(missing)
        tries = []
        for _ in range(40):
            combination = {name: draw.randrange(len(factors[name])) for name in names} | {a: i, b: j}
            tries.append((len(covers(combination)), len(tries), combination))
        best = max(tries)[2]
        missing -= covers(best)
        out.append({name: factors[name][best[name]] for name in names})
    return out


def laid_out(combinations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The combinations with how the kernels lay their network out in turns: as the narrow one that it is, or by rows as
    every wide one."""
    return [each | {"design": ("narrow", "rows")[i % 2]} for i, each in enumerate(combinations)]


def spec_of(combination: dict[str, Any]) -> ff.FieldSpec:
    """The field of a combination of `FIELD_FACTORS`."""
    dim, embedding = {
        "scalar": (1, ff.Identity()),
        "vector": (5, ff.Identity()),
        "wide": (17, ff.Identity()),
        "scaled": (1, ff.Scaled(-3.0, 4.0)),
        "scaled-vector": (3, ff.Scaled(-3.0, 4.0)),
        "hl-gauss": (1, ff.HLGauss(-3.0, 2.0, 11, 2.0)),
    }[combination["state"]]
    names = ("cond_dim", "activation", "time_embedding", "ensemble", "prediction", "output_scale")
    options = {name: combination[name] for name in names} | TRUNKS[combination["trunk"]]
    return ff.FieldSpec(state_dim=dim, state_embedding=embedding, **options)


def name_of(combination: dict[str, Any]) -> str:
    """The combination as a test's name."""
    return "-".join(
        type(value).__name__ if name == "time_embedding" else str(value)
        for name, value in combination.items()
        if value not in (None, False) and name not in ("cond_dim", "output_scale")
    )


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
    return {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
