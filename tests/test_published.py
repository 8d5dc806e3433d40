"""The fields of the three papers at their published sizes, each through a walk, a loss and both ways back.

With bfloat16 products as a GPU computes them: on one, or by `kernel_machine`.
"""

from __future__ import annotations

import pytest
import torch
from networks import random_field, random_inputs
from passes import as_on_a_gpu, compare_loss, compare_walk

import fastflow as ff

pytest.importorskip("triton")

FLOQ = dict(norm="layer", state_embedding=ff.HLGauss(-101.0, 1.0), time_embedding=ff.Cosine())
FPO = dict(activation="silu", time_embedding=ff.PowerFourier(8), output_scale=0.25)
PUBLISHED = {
    "floq": ff.FieldSpec(1, 42, (512,) * 4, 2, **FLOQ),
    "floq-resnet": ff.FieldSpec(1, 42, (512,) * 5, 2, architecture=ff.ResidualMLP(2), **FLOQ),
    "floq-resnet-norm-first": ff.FieldSpec(
        1, 42, (512,) * 5, 2, architecture=ff.ResidualMLP(4), norm_first=True, **FLOQ
    ),
    "fql-actor": ff.FieldSpec(5, 37, (512,) * 4),
    "td-flow": ff.FieldSpec(
        4, 6, (512,) * 3, activation="mish", architecture=ff.FiLMUNet(), time_embedding=ff.Sinusoidal()
    ),
    "fpo": ff.FieldSpec(6, 17, (32,) * 4, **FPO),
    "fpo++": ff.FieldSpec(12, 48, (256,) * 3, activation="elu", time_embedding=ff.PowerFourier(8)),
    "fpo++-tracking": ff.FieldSpec(29, 160, (1024, 512, 256), activation="elu", time_embedding=ff.PowerFourier(8)),
}
# floq walks scalars from the left end points; TD-Flow each row to its own time, by midpoints.
METHODS = {"td-flow": "midpoint"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_walk_loss_and_gradients(name, device):
    spec = PUBLISHED[name]
    field = random_field(spec, device)
    inputs = random_inputs(spec, 3, 2, device)
    times = dict(t_1=inputs["t"]) if name == "td-flow" else {}
    with as_on_a_gpu("bf16"):
        compare_walk(field, inputs, "bf16", num_steps=2, method=METHODS.get(name, "euler"), **times)
        compare_loss(field, inputs, "bf16", reduction="none")
    assert torch.isfinite(torch.stack([p.sum() for p in field.parameters()])).all()
