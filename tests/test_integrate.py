"""The walk's kernels, forward and backward, against the reference in float64: in the interpreter without a GPU, on real
kernels with one."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import HAS_GPU, assert_close_rms, rms
from networks import SPECS, WALK_FACTORS, in_float64, laid_out, name_of, pairwise, random_field, random_inputs, spec_of
from passes import as_on_a_gpu, compare_walk, walk_and_gradients, walk_options

import fastflow as ff

pytest.importorskip("triton")

from fastflow.kernels import plan

# The interpreter has no tensor cores; bfloat16 it computes with as a GPU would, rounded by hand.
PRECISIONS = ["bf16", "tf32", "fp32"] if HAS_GPU else ["bf16", "fp32"]
WALKS = laid_out(pairwise(WALK_FACTORS))

pytestmark = pytest.mark.poison


@pytest.mark.parametrize("combination", WALKS, ids=map(name_of, WALKS))
def test_every_field_and_walk(combination, device, lay_out):
    lay_out(combination["design"])
    spec = spec_of(combination)
    field = random_field(spec, device)
    inputs = random_inputs(spec, 10 if combination["samples"] else 30, combination["samples"], device)
    # Divided by t, one draw's errors are mostly chance.
    draws = 2 if combination["prediction"] == "noise" else 1
    precision = combination["precision"]
    with as_on_a_gpu(precision):
        compare_walk(field, inputs, precision, draws=draws, **walk_options(combination, inputs, 2))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", SPECS)
def test_euler_walk_of_every_network(name, precision, device):
    field = random_field(SPECS[name], device)
    compare_walk(field, random_inputs(SPECS[name], 19, 3, device), precision, num_steps=3)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch", [1, 3, 127, 129])
def test_any_number_of_rows(batch, precision, device):
    spec = SPECS["scalar-identity"]
    compare_walk(random_field(spec, device), random_inputs(spec, batch, None, device), precision, draws=3, num_steps=2)


@pytest.mark.parametrize("num_steps", [1, 2, 16, 17])
def test_any_number_of_steps(num_steps, device):
    spec = SPECS["floq"]
    compare_walk(random_field(spec, device), random_inputs(spec, 4, None, device), "fp32", num_steps=num_steps)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_order_of_convergence(method, order, device):
    spec = SPECS["actor"]
    field = random_field(spec, device)
    inputs = random_inputs(spec, 8, None, device)
    exact = ff.integrate(
        in_float64(field), inputs["x_0"].double(), inputs["cond"].double(), num_steps=256, method="midpoint"
    )
    steps = [2, 4, 8]
    with torch.no_grad():
        errors = [
            rms(
                ff.integrate(
                    field, inputs["x_0"], inputs["cond"], num_steps=k, method=method, backend="fused", precision="fp32"
                ).double()
                - exact
            )
            for k in steps
        ]
    slope = -math.log2(errors[-1] / errors[0]) / math.log2(steps[-1] / steps[0])
    assert slope == pytest.approx(order, abs=0.2)


def test_state_far_outside_the_embedding_s_range(device):
    field = random_field(SPECS["floq"], device)
    x_0 = torch.tensor([[-1e30], [-600.0], [400.0], [1e30]], device=device, requires_grad=True)
    cond = torch.randn(4, 5, device=device)
    walked = ff.integrate(field, x_0, cond, num_steps=4, backend="fused", precision="fp32")
    assert torch.isfinite(walked).all()
    walked.sum().backward()
    # Clamped: the velocity does not depend on the state there. Two members share each start.
    assert torch.equal(x_0.grad, torch.full_like(x_0, 2.0))


def test_several_fields_in_one_launch_are_the_fields_alone(device):
    spec = SPECS["floq"]
    fields = [random_field(spec, device) for _ in range(2)]
    cond = torch.randn(4, 7, spec.cond_dim, device=device)
    x_0 = torch.randn(4, 7, 1, device=device)
    options = dict(num_steps=3, backend="fused", precision="fp32")
    parameters = [p for field in fields for p in field.parameters()]
    together = ff.integrate(fields, x_0, cond, **options)
    gradients = torch.autograd.grad(together.square().sum(), parameters)
    alone = [
        ff.integrate(field, x_0[part], cond[part], **options)
        for field, part in zip(fields, (slice(0, 2), slice(2, 4)), strict=True)
    ]
    assert torch.equal(together, torch.cat(alone))
    expected = torch.autograd.grad(torch.cat(alone).square().sum(), parameters)
    for found, wanted in zip(gradients, expected, strict=True):
        assert_close_rms("gradient", found, wanted, 1e-6)


def test_strided_inputs_are_read_where_they_are_and_left_alone(device):
    spec = SPECS["actor"]
    field = random_field(spec, device)
    wide = torch.randn(9, 2 * spec.cond_dim, device=device)
    x_wide = torch.randn(spec.state_dim, 9, device=device)
    cond, x_0 = wide[:, ::2], x_wide.T
    before = wide.clone(), x_wide.clone()
    with torch.no_grad():
        strided = ff.integrate(field, x_0, cond, num_steps=2, backend="fused", precision="fp32")
        dense = ff.integrate(field, x_0.contiguous(), cond.contiguous(), num_steps=2, backend="fused", precision="fp32")
    assert torch.equal(strided, dense)
    assert torch.equal(wide, before[0])
    assert torch.equal(x_wide, before[1])


@pytest.mark.parametrize("name", ["floq", "actor"])
def test_gradients_of_actions_alone_and_of_one_parameter(name, device):
    spec = SPECS[name]
    field = random_field(spec, device)
    inputs = random_inputs(spec, 6, 2, device)
    options = dict(num_steps=2, backend="fused", precision="fp32")

    def gradient(*leaves):
        wanted = {id(leaf) for leaf in leaves}
        for p in field.parameters():
            p.requires_grad_(id(p) in wanted)
        cond = inputs["cond"].requires_grad_(id(inputs["cond"]) in wanted)
        x = ff.integrate(field, inputs["x_0"], cond, **options)
        return torch.autograd.grad(x.square().sum(), leaves)

    weight = field.layers[1].weight
    both = gradient(inputs["cond"], weight)
    assert_close_rms("cond", gradient(inputs["cond"])[0], both[0], 1e-6)
    assert_close_rms("weight", gradient(weight)[0], both[1], 1e-6)


@pytest.mark.parametrize("name", ["floq", "no-cond"])
def test_gradients_are_the_same_bits_every_time_and_however_made(name, device, monkeypatch):
    spec = SPECS[name]
    field = random_field(spec, device)
    inputs = random_inputs(spec, 5, 3, device)

    def gradients(**options):
        return walk_and_gradients(field, inputs, num_steps=5, backend="fused", precision="fp32", **options)

    first = gradients(activations="store")
    for again in (gradients(activations="store"), gradients(activations="recompute")):
        assert all(torch.equal(first[key], again[key]) for key in first)
    # In parts of a step each: sums over steps are taken in another order.
    monkeypatch.setattr(plan, "STORE_BYTES", 1)
    for key, value in gradients(activations="recompute").items():
        assert_close_rms(key, value, first[key], 1e-5)


def test_the_field_is_read_anew_at_every_call(device):
    spec = SPECS["floq"]
    field, other = random_field(spec, device), random_field(spec, device)
    inputs = random_inputs(spec, 4, None, device)

    def walk(field):
        with torch.no_grad():
            return ff.integrate(field, inputs["x_0"], inputs["cond"], num_steps=2, backend="fused", precision="fp32")

    before, wanted = walk(field), walk(other)
    twin = copy.deepcopy(field)
    for mine, theirs in zip(field.parameters(), other.parameters(), strict=True):
        mine.data.copy_(theirs.data)
    assert torch.equal(walk(field), wanted)
    assert torch.equal(walk(twin), before)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_published_sizes_on_a_gpu(precision, device):
    spec = ff.FieldSpec(
        1, 42, (512,) * 4, 2, norm="layer", state_embedding=ff.HLGauss(-101.0, 1.0), time_embedding=ff.Cosine()
    )
    for batch, samples in ((256, 8), (2048, None)):
        compare_walk(random_field(spec, device), random_inputs(spec, batch, samples, device), precision, num_steps=8)


@pytest.mark.gpu
def test_walk_is_captured_in_a_cuda_graph(device):
    field = random_field(SPECS["floq"], device)
    x_0, cond = torch.randn(64, 1, device=device), torch.randn(64, 5, device=device)

    def walk():
        with torch.no_grad():
            return ff.integrate(field, x_0, cond, num_steps=4, backend="fused", precision="bf16")

    walk()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = walk()
    x_0.normal_()
    graph.replay()
    assert torch.equal(out, walk())


@pytest.mark.gpu
def test_gradients_are_captured_in_a_cuda_graph(device):
    spec = SPECS["floq"]
    field = random_field(spec, device)
    x_0, cond = torch.randn(64, 1, device=device), torch.randn(64, 5, device=device)

    def gradients():
        x = ff.integrate(field, x_0, cond, num_steps=4, backend="fused", precision="bf16")
        return torch.autograd.grad(x.square().sum(), list(field.parameters()))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients()
    x_0.normal_()
    graph.replay()
    for found, wanted in zip(captured, gradients(), strict=True):
        assert torch.equal(found, wanted)
