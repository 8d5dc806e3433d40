"""The loss's kernels, forward and backward, against the reference in float64: in the interpreter without a GPU, on real
kernels with one."""

from __future__ import annotations

import pytest
import torch
from conftest import HAS_GPU, assert_close_rms
from networks import LOSS_FACTORS, SPECS, laid_out, name_of, pairwise, random_field, random_inputs, spec_of
from passes import as_on_a_gpu, compare_loss, drawn, loss_and_gradients, loss_options

import fastflow as ff

pytest.importorskip("triton")

from fastflow.kernels import plan

# The interpreter's products (numpy) round by a row's place in its tile; a GPU's do not.
ELSEWHERE = (slice(3, 8), torch.tensor([60, 2, 31, 69])) if HAS_GPU else ()
PRECISIONS = ["bf16", "tf32", "fp32"] if HAS_GPU else ["bf16", "fp32"]
LOSSES = laid_out(pairwise(LOSS_FACTORS))

pytestmark = pytest.mark.poison


@pytest.mark.parametrize("combination", LOSSES, ids=map(name_of, LOSSES))
def test_every_field_and_loss(combination, device, lay_out):
    lay_out(combination["design"])
    spec = spec_of(combination)
    field = random_field(spec, device)
    inputs, options = loss_options(combination, spec, device)
    # Noise that a kernel draws is left to the interpreter.
    with as_on_a_gpu(combination["precision"] if combination["start"] != "drawn" else ""):
        compare_loss(field, inputs, combination["precision"], **options)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", SPECS)
def test_loss_and_every_gradient_match_reference(name, precision, device):
    compare_loss(random_field(SPECS[name], device), random_inputs(SPECS[name], 19, 3, device), precision)


@pytest.mark.parametrize("batch", [1, 3, 127, 129])
def test_any_number_of_rows(batch, device):
    spec = SPECS["scalar-identity"]
    # Few numbers are exact by luck now and then: more draws of them.
    draws = 12 if batch < 10 else 3
    compare_loss(random_field(spec, device), random_inputs(spec, batch, None, device), "fp32", draws=draws)


def test_cond_per_member(device):
    spec = SPECS["floq"]
    field = random_field(spec, device)
    inputs = random_inputs(spec, 6, 2, device)
    inputs["cond"] = torch.randn(2, 6, spec.cond_dim, device=device)
    compare_loss(field, inputs, "fp32")
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["floq", "actor", "no-cond"])
def test_a_pair_s_loss_is_the_same_bits_in_any_pass_and_batch(name, precision, device):
    """FPO's ratio is exactly 1 before the first update: whether gradients are kept, and whatever rows stand beside."""
    spec = SPECS[name]
    field = random_field(spec, device)
    i = random_inputs(spec, 70, 3, device)

    def rows(some):
        parts = [None if x is None else x[some] for x in (i["x_0"], i["x_1"], i["t"], i["cond"])]
        return ff.flow_matching_loss(field, *parts, reduction="none", backend="fused", precision=precision)

    training = rows(slice(None))
    assert training.requires_grad
    with torch.no_grad():
        assert torch.equal(rows(slice(None)), training)
        for some in (slice(0, 1), slice(0, 7), slice(0, 65), *ELSEWHERE):
            assert torch.equal(rows(some), training[..., some, :])


def test_drawn_noise_is_the_noise_of_the_generator(device):
    spec = SPECS["actor"]
    field = random_field(spec, device)
    noise = drawn(6, 4, device)
    x_1, cond = torch.randn(6, spec.state_dim, device=device), torch.randn(6, spec.cond_dim, device=device)
    options = dict(reduction="none", backend="fused", precision="fp32")
    with torch.no_grad():
        in_kernel = ff.flow_matching_loss(field, noise, x_1, None, cond, **options)
        given = ff.flow_matching_loss(field, noise.x_0(spec.state_dim), x_1, noise.t(), cond, **options)
        own_times = ff.flow_matching_loss(field, noise, x_1, noise.t(), cond, **options)
        some = ff.PhiloxNoise(noise.seed, noise.ids[:4], 4)
        again = ff.flow_matching_loss(field, some, x_1[:4], None, cond[:4], **options)
    assert torch.equal(in_kernel, given)
    assert torch.equal(in_kernel, own_times)
    assert torch.equal(again, in_kernel[:4])


@pytest.mark.parametrize("name", ["floq", "wide-state"])
def test_gradients_in_parts_of_rows(name, device, monkeypatch):
    """Rows whose activations do not fit in `plan.STORE_BYTES` are computed again, some at a time."""
    spec = SPECS[name]
    field = random_field(spec, device)
    inputs = random_inputs(spec, 20, 2, device)
    whole = loss_and_gradients(field, inputs, "fused", "fp32")
    monkeypatch.setattr(plan, "STORE_BYTES", 60_000)
    for key, value in loss_and_gradients(field, inputs, "fused", "fp32").items():
        assert_close_rms(key, value, whole[key], 1e-5)


def test_gradient_of_times_is_refused_by_name(device):
    spec = SPECS["floq"]
    field = random_field(spec, device)
    i = random_inputs(spec, 5, None, device)
    with pytest.raises(NotImplementedError, match="a gradient of t"):
        ff.flow_matching_loss(field, i["x_0"], i["x_1"], i["t"].requires_grad_(), i["cond"], backend="fused")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_published_sizes_on_a_gpu(precision, device):
    spec = ff.FieldSpec(
        1, 42, (512,) * 4, 2, norm="layer", state_embedding=ff.HLGauss(-101.0, 1.0), time_embedding=ff.Cosine()
    )
    for batch, samples in ((256, 8), (2048, None)):
        compare_loss(random_field(spec, device), random_inputs(spec, batch, samples, device), precision)
