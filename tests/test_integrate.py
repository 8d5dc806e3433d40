"""The walk's kernel against the reference in float64: in the interpreter without a GPU, on real kernels with one."""

from __future__ import annotations

import pytest
import torch
from conftest import HAS_GPU, assert_as_accurate, products
from networks import SPECS, in_float64, random_field, random_inputs, to_float64

import fastflow as ff

pytest.importorskip("triton")

# The interpreter computes in float32; a GPU also runs the tensor-core paths.
PRECISIONS = ["bf16", "tf32", "fp32"] if HAS_GPU else ["fp32"]

# Relative error allowed where there are too few numbers to compare two errors by.
FEW_NUMBERS = {"bf16": 3e-2, "tf32": 4e-3, "fp32": 2e-6}

pytestmark = pytest.mark.poison


def compare(spec, batch, samples, num_steps, precision, device, t_1=1.0):
    field = random_field(spec, device)
    inputs = random_inputs(spec, batch, samples, device)
    exact_field, exact_inputs = in_float64(field), to_float64(inputs)

    def walk(field, inputs, **options):
        with torch.no_grad():
            x = ff.integrate(field, inputs["x_0"], inputs["cond"], num_steps=num_steps, t_1=t_1, **options)
            return x - inputs["x_0"]  # the displacement: what the walk computed

    fused = walk(field, inputs, backend="fused", precision=precision)
    with products(precision):
        eager = walk(field, inputs, backend="reference", precision=precision)
    exact = walk(exact_field, exact_inputs, backend="reference")
    # A handful of numbers says little of accuracy: one of two equal errors is often more than twice the other.
    floor = FEW_NUMBERS[precision] if exact.numel() < 16 else 2e-6
    assert_as_accurate("displacement", fused, eager, exact, ratio_floor=floor)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", SPECS)
def test_integrate_matches_reference(name, precision, device):
    compare(SPECS[name], 19, 3, 3, precision, device)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch", [1, 3, 127, 129])
def test_any_number_of_rows(batch, precision, device):
    compare(SPECS["scalar-identity"], batch, None, 2, precision, device)


@pytest.mark.parametrize("num_steps", [1, 2, 16, 17])
def test_any_number_of_steps(num_steps, device):
    compare(SPECS["floq"], 4, None, num_steps, "fp32", device)


@pytest.mark.parametrize("t_1", [0.25, 1.0])
def test_end_time(t_1, device):
    compare(SPECS["floq-as-written"], 5, 2, 3, "fp32", device, t_1=t_1)


def test_state_far_outside_the_embedding_s_range(device):
    field = random_field(SPECS["floq"], device)
    x_0 = torch.tensor([[-1e30], [-600.0], [400.0], [1e30]], device=device)
    cond = torch.randn(4, 5, device=device)
    walked = ff.integrate(field, x_0, cond, num_steps=4, backend="fused", precision="fp32")
    assert torch.isfinite(walked).all()


def test_several_fields_in_one_launch_are_the_fields_alone(device):
    spec = SPECS["floq"]
    fields = [random_field(spec, device) for _ in range(2)]
    cond = torch.randn(4, 7, spec.cond_dim, device=device)
    x_0 = torch.randn(4, 7, 1, device=device)
    with torch.no_grad():
        together = ff.integrate(fields, x_0, cond, num_steps=3, backend="fused", precision="fp32")
        for i, field in enumerate(fields):
            part = slice(2 * i, 2 * i + 2)
            alone = ff.integrate(field, x_0[part], cond[part], num_steps=3, backend="fused", precision="fp32")
            assert torch.equal(together[part], alone)


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


def test_gradients_of_the_walk(device):
    """The walk's kernel is forward only; its gradient recomputes through the reference and must agree with it."""
    spec = SPECS["floq"]
    field = random_field(spec, device)
    inputs = random_inputs(spec, 6, 2, device)
    grads = []
    for backend, f, x in (
        ("fused", field, inputs),
        ("reference", field, inputs),
        ("reference", in_float64(field), to_float64(inputs)),
    ):
        leaves = [x["x_0"].clone().requires_grad_(), x["cond"].clone().requires_grad_()]
        walked = ff.integrate(f, *leaves, num_steps=3, backend=backend, precision="fp32")
        grads.append(torch.autograd.grad(walked.square().sum(), [*leaves, *f.parameters()]))
    for i, (fused, eager, exact) in enumerate(zip(*grads)):
        assert_as_accurate(f"gradient {i}", fused, eager, exact, ratio_floor=2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_published_sizes(precision, device):
    spec = ff.FieldSpec(
        1, 42, (512,) * 4, 2, norm="layer", state_embedding=ff.HLGauss(-101.0, 1.0), time_embedding=ff.Cosine()
    )
    compare(spec, 256, 8, 8, precision, device)
    compare(spec, 2048, None, 8, precision, device)


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
