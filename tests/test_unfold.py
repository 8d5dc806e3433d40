"""What surrounds the kernel of the way back: gradients of cond and of parameters as they are laid out."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close_rms
from networks import SPECS, random_field, random_inputs
from passes import compare_loss, compare_walk, loss_and_gradients

import fastflow as ff

pytest.importorskip("triton")

from fastflow.kernels import plan

pytestmark = pytest.mark.poison


@pytest.mark.parametrize("name", ["floq", "no-cond", "wide-state"])
def test_parameters_of_bfloat16(name, device):
    spec = SPECS[name]
    field = random_field(spec, device, torch.bfloat16)
    inputs = {k: x if x is None else x.bfloat16() for k, x in random_inputs(spec, 9, 2, device).items()}
    compare_loss(field, inputs, "bf16")
    compare_walk(field, inputs, "bf16", num_steps=2)
    assert loss_and_gradients(field, inputs, "fused", "bf16")["x_0"].dtype == torch.bfloat16


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("hidden", [(24,), (24, 24), (40, 16, 8)], ids=str)
def test_cond_of_every_member_and_times_of_every_row(hidden, precision, device):
    spec = ff.FieldSpec(3, 5, hidden, 2, norm="layer", time_embedding=ff.CosineFourier(4))
    inputs = random_inputs(spec, 6, 3, device)
    inputs["cond"] = torch.randn(2, 6, 5, device=device)
    field = random_field(spec, device)
    compare_loss(field, inputs, precision)
    compare_walk(field, inputs, precision, num_steps=2, t_1=0.5 + 0.5 * inputs["t"])
    compare_walk(field, inputs, precision, num_steps=2, method="heun")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_several_fields_share_cond(precision, device):
    fields = [random_field(SPECS["floq"], device) for _ in range(2)]
    inputs = random_inputs(SPECS["floq"], 7, None, device)
    cond = inputs["cond"].requires_grad_()
    leaves = [cond, *(p for field in fields for p in field.parameters())]
    options = dict(num_steps=3, backend="fused", precision=precision)
    together = ff.integrate(fields, inputs["x_0"], cond, **options)
    alone = torch.cat([ff.integrate(field, inputs["x_0"], cond, **options) for field in fields])
    found, expected = (torch.autograd.grad(x.square().sum(), leaves) for x in (together, alone))
    for gradient, wanted in zip(found, expected, strict=True):
        assert_close_rms("gradient", gradient, wanted, 1e-5)


def test_a_loss_in_parts_of_rows_sums_samples_of_each(device, monkeypatch):
    spec = SPECS["floq"]
    field, inputs = random_field(spec, device), random_inputs(spec, 7, 3, device)
    whole = loss_and_gradients(field, inputs, "fused", "fp32")
    monkeypatch.setattr(plan, "STORE_BYTES", 1)
    for name, value in loss_and_gradients(field, inputs, "fused", "fp32").items():
        assert_close_rms(name, value, whole[name], 1e-5)
