"""The loss kernels against the reference in float64: values and every gradient."""

from __future__ import annotations

import pytest
import torch
from conftest import HAS_GPU, assert_as_accurate, assert_close_rms, products, relative_rms
from networks import SPECS, in_float64, random_field, random_inputs, to_float64

import fastflow as ff

pytest.importorskip("triton")

PRECISIONS = ["bf16", "tf32", "fp32"] if HAS_GPU else ["fp32"]

pytestmark = pytest.mark.poison


def loss_and_gradients(field, inputs, backend, precision, reduction="mean", weighted=True, point=False):
    """The loss and the gradients of cond, weight and every parameter; with "none", of a non-uniform sum of the rows."""
    field.zero_grad()
    cond = None if inputs["cond"] is None else inputs["cond"].clone().requires_grad_()
    weight = inputs["weight"].clone().requires_grad_() if weighted else None
    options = dict(weight=weight, reduction=reduction, backend=backend, precision=precision)
    if point:
        loss = ff.velocity_matching_loss(field, inputs["x_0"], inputs["t"], inputs["x_1"], cond, **options)
    else:
        loss = ff.flow_matching_loss(field, inputs["x_0"], inputs["x_1"], inputs["t"], cond, **options)
    scalar = loss if reduction != "none" else (loss * torch.linspace(-1, 2, loss.numel()).to(loss).view_as(loss)).sum()
    scalar.backward()
    result = {"loss": loss.detach()} | {name: p.grad.clone() for name, p in field.named_parameters()}
    if cond is not None:
        result["cond"] = cond.grad
    if weight is not None:
        result["weight"] = weight.grad
    return result


def compare(spec, batch, samples, device, precision, **options):
    field = random_field(spec, device)
    inputs = random_inputs(spec, batch, samples, device)
    compare_inputs(field, inputs, precision, **options)


def compare_inputs(field, inputs, precision, **options):
    fused = loss_and_gradients(field, inputs, "fused", precision, **options)
    with products(precision):
        eager = loss_and_gradients(field, inputs, "reference", precision, **options)
    exact = loss_and_gradients(in_float64(field), to_float64(inputs), "reference", None, **options)
    assert fused.keys() == exact.keys()
    # Eager may be right by luck where there are few numbers (the loss, a bias of the head): what it errs by elsewhere
    # in the same pass is allowed there.
    typical = max(relative_rms(eager[name], exact[name]) for name in exact)
    for name in exact:
        floor = max(typical, 2e-6) if exact[name].numel() < 16 else 2e-6
        assert_as_accurate(name, fused[name], eager[name], exact[name], ratio_floor=floor)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", SPECS)
def test_loss_and_every_gradient_match_reference(name, precision, device):
    compare(SPECS[name], 19, 3, device, precision)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
def test_every_reduction(reduction, weighted, device):
    compare(SPECS["floq"], 7, 2, device, "fp32", reduction=reduction, weighted=weighted)


@pytest.mark.parametrize("batch", [1, 3, 127, 129])
def test_any_number_of_rows(batch, device):
    compare(SPECS["scalar-identity"], batch, None, device, "fp32")


@pytest.mark.parametrize("name", ["floq", "actor"])
def test_velocity_matching(name, device):
    compare(SPECS[name], 5, None, device, "fp32", point=True)


def test_cond_per_member(device):
    spec = SPECS["floq"]
    field = random_field(spec, device)
    inputs = random_inputs(spec, 6, 2, device)
    inputs["cond"] = torch.randn(2, 6, spec.cond_dim, device=device)
    compare_inputs(field, inputs, "fp32")
    assert loss_and_gradients(field, inputs, "fused", "fp32")["cond"].shape == (2, 6, spec.cond_dim)


def test_only_some_inputs_need_a_gradient(device):
    spec = SPECS["floq"]
    field = random_field(spec, device)
    inputs = random_inputs(spec, 4, None, device)
    for p in field.parameters():
        p.requires_grad_(False)
    field.layers[1].weight.requires_grad_(True)
    loss = ff.flow_matching_loss(
        field, inputs["x_0"], inputs["x_1"], inputs["t"], inputs["cond"], backend="fused", precision="fp32"
    )
    loss.backward()
    expected = torch.autograd.grad(
        ff.flow_matching_loss(field, inputs["x_0"], inputs["x_1"], inputs["t"], inputs["cond"], backend="reference"),
        field.layers[1].weight,
    )[0]
    assert_close_rms("gradient", field.layers[1].weight.grad, expected, 1e-5)
    assert field.layers[0].weight.grad is None


def test_without_gradients_the_rows_are_the_same(device):
    spec = SPECS["floq"]
    field = random_field(spec, device)
    i = random_inputs(spec, 5, 3, device)
    args = (field, i["x_0"], i["x_1"], i["t"], i["cond"])
    with_grad = ff.flow_matching_loss(*args, reduction="none", backend="fused", precision="fp32")
    with torch.no_grad():
        without = ff.flow_matching_loss(*args, reduction="none", backend="fused", precision="fp32")
    assert torch.equal(with_grad, without)


def test_gradient_of_the_path_is_refused_by_name(device):
    spec = SPECS["floq"]
    field = random_field(spec, device)
    i = random_inputs(spec, 5, None, device)
    with pytest.raises(NotImplementedError, match="gradient of the path's ends"):
        ff.flow_matching_loss(field, i["x_0"].requires_grad_(), i["x_1"], i["t"], i["cond"], backend="fused")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_published_sizes(precision, device):
    spec = ff.FieldSpec(
        1, 42, (512,) * 4, 2, norm="layer", state_embedding=ff.HLGauss(-101.0, 1.0), time_embedding=ff.Cosine()
    )
    compare(spec, 256, 8, device, precision)
    compare(spec, 2048, None, device, precision)
