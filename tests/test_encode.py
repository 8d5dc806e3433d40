"""MLPs and FiLM that prepare a walk or a loss: their launches there and back against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close_rms
from networks import TRUNKS, random_field, random_inputs
from passes import compare_loss, compare_walk, loss_and_gradients

import fastflow as ff

pytest.importorskip("triton")

from fastflow.kernels import plan

pytestmark = pytest.mark.poison

EMBEDDINGS = [
    ff.Sinusoidal(8, (12, 10)),
    ff.Sinusoidal(6, (24,)),
    ff.Sinusoidal(6, ()),
    ff.PowerFourier(6),
    ff.Cosine(),
]


@pytest.mark.parametrize(
    ("trunk", "time_embedding", "cond_dim", "ensemble", "precision"),
    [
        ("unet", ff.Sinusoidal(8, (12, 10)), 5, 2, "fp32"),
        ("unet", ff.Sinusoidal(8, (12, 10)), 70, None, "fp32"),
        ("unet", ff.Sinusoidal(8, (12, 10)), 70, None, "bf16"),
        ("unet-of-two", ff.Sinusoidal(6, (24,)), 0, 2, "bf16"),
        ("unet", ff.PowerFourier(6), 5, 2, "fp32"),
        ("unet-of-two", ff.Cosine(), 0, None, "fp32"),
        ("after", ff.Sinusoidal(8, (12, 10)), 5, 2, "bf16"),
        ("residual-before", ff.Sinusoidal(8, (70,)), 5, None, "fp32"),
        ("before-uneven", ff.Sinusoidal(6, ()), 0, 2, "fp32"),
    ],
    ids=str,
)
def test_every_way_in(trunk, time_embedding, cond_dim, ensemble, precision, device):
    spec = ff.FieldSpec(
        3, cond_dim, ensemble=ensemble, activation="mish", time_embedding=time_embedding, **TRUNKS[trunk]
    )
    inputs = random_inputs(spec, 6, None if cond_dim == 70 else 3, device)
    if ensemble and cond_dim == 5 and precision == "fp32":
        inputs["cond"] = torch.randn(ensemble, 6, cond_dim, device=device)
    field = random_field(spec, device)
    compare_loss(field, inputs, precision)
    compare_walk(field, inputs, precision, num_steps=2, t_1=0.5 + 0.5 * inputs["t"])
    compare_walk(field, inputs, precision, num_steps=2, method="midpoint")


def test_several_fields_and_parts_of_rows(device, monkeypatch):
    spec = ff.FieldSpec(2, 4, activation="silu", time_embedding=ff.Sinusoidal(8, (12,)), **TRUNKS["unet-of-two"])
    fields, inputs = [random_field(spec, device) for _ in range(2)], random_inputs(spec, 7, None, device)
    cond = inputs["cond"].requires_grad_()
    leaves = [cond, *(p for field in fields for p in field.parameters())]
    options = dict(num_steps=2, t_1=0.5 + 0.5 * inputs["t"], backend="fused", precision="fp32")
    together = ff.integrate(fields, inputs["x_0"], cond, **options)
    alone = torch.stack([ff.integrate(field, inputs["x_0"], cond, **options) for field in fields])
    found, expected = (torch.autograd.grad(x.square().sum(), leaves) for x in (together.view_as(alone), alone))
    for gradient, wanted in zip(found, expected, strict=True):
        assert_close_rms("gradient", gradient, wanted, 1e-5)
    inputs = random_inputs(spec, 7, 3, device)
    whole = loss_and_gradients(fields[0], inputs, "fused", "fp32")
    monkeypatch.setattr(plan, "STORE_BYTES", 1)
    for name, value in loss_and_gradients(fields[0], inputs, "fused", "fp32").items():
        assert_close_rms(name, value, whole[name], 1e-5)


@pytest.mark.parametrize("architecture", [ff.MLP(), ff.FiLMUNet((12,))], ids=["mlp", "unet"])
@pytest.mark.parametrize("time_embedding", [ff.PowerFourier(20), ff.Sinusoidal(6, (8,), scale=1e4)], ids=str)
def test_frequencies_beyond_the_kernels(time_embedding, architecture, device):
    spec = ff.FieldSpec(2, 4, (24, 24), time_embedding=time_embedding, architecture=architecture)
    field, inputs = random_field(spec, device), random_inputs(spec, 6, None, device)
    compare_walk(field, inputs, "fp32", draws=2, num_steps=4)
    compare_walk(field, inputs, "fp32", draws=2, num_steps=2, t_1=0.5 + 0.5 * inputs["t"])
    compare_loss(field, inputs, "fp32", draws=2)
