"""The operators as torch operators: shapes, errors, opcheck, autograd, compile, vmap, autocast."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import HAS_GPU, assert_close_rms
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import SPECS, random_field, random_inputs

import fastflow as ff
from fastflow import ops
from fastflow.kernels import launch

FLOQ = SPECS["floq"]
ACTOR = SPECS["actor"]


# Shapes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x_0, cond, out",
    [
        ((7, 1), (7, 5), (2, 7, 1)),
        ((7, 3, 1), (7, 5), (2, 7, 3, 1)),
        ((2, 7, 1), (7, 5), (2, 7, 1)),
        ((2, 7, 3, 1), (7, 5), (2, 7, 3, 1)),
        ((2, 7, 1), (2, 7, 5), (2, 7, 1)),
        ((2, 3, 1), (2, 5), (2, 2, 3, 1)),
        ((0, 1), (0, 5), (2, 0, 1)),
        ((7, 0, 1), (7, 5), (2, 7, 0, 1)),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_shapes_with_an_ensemble(x_0, cond, out, backend, device):
    field = random_field(FLOQ, device)
    walked = ff.integrate(
        field, torch.randn(x_0, device=device), torch.randn(cond, device=device), num_steps=2, backend=backend
    )
    assert walked.shape == out
    assert walked.dtype == torch.float32


@pytest.mark.parametrize("x_0, out", [((7, 5), (7, 5)), ((7, 3, 5), (7, 3, 5)), ((0, 5), (0, 5))])
def test_shapes_without_an_ensemble(x_0, out, device):
    field = random_field(ACTOR, device)
    walked = ff.integrate(field, torch.randn(x_0, device=device), torch.randn(x_0[0], 6, device=device), num_steps=2)
    assert walked.shape == out


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_loss_shapes_broadcast_over_members_and_samples(backend, device):
    field = random_field(FLOQ, device)
    cond = torch.randn(7, 5, device=device)
    full = dict(
        x_0=torch.randn(2, 7, 3, 1, device=device),
        x_1=torch.randn(7, 1, device=device),
        t=torch.rand(7, device=device),
        weight=torch.rand(7, 3, device=device),
    )
    rows = ff.flow_matching_loss(field, cond=cond, reduction="none", backend=backend, **full)
    assert rows.shape == (2, 7, 3)
    expanded = dict(
        x_0=full["x_0"],
        x_1=full["x_1"][None, :, None].expand(2, 7, 3, 1),
        t=full["t"][None, :, None].expand(2, 7, 3),
        weight=full["weight"].expand(2, 7, 3),
    )
    assert_close_rms(
        "rows", rows, ff.flow_matching_loss(field, cond=cond, reduction="none", backend="reference", **expanded), 1e-5
    )


def test_loss_of_an_empty_batch_is_empty(device):
    field = random_field(FLOQ, device)
    empty = torch.zeros(0, 1, device=device)
    rows = ff.flow_matching_loss(
        field, empty, empty, torch.zeros(0, device=device), torch.zeros(0, 5, device=device), reduction="none"
    )
    assert rows.shape == (2, 0)
    rows.sum().backward()
    assert not any(p.grad.any() for p in field.parameters())


@settings(max_examples=30)
@given(
    batch=st.integers(1, 9),
    samples=st.one_of(st.none(), st.integers(1, 4)),
    members=st.booleans(),
    num_steps=st.integers(1, 5),
    name=st.sampled_from(sorted(SPECS)),
)
def test_operator_and_reference_agree_for_any_shape(batch, samples, members, num_steps, name):
    spec = SPECS[name]
    field = random_field(spec, torch.device("cpu"))
    inputs = random_inputs(spec, batch, samples, torch.device("cpu"))
    x_0 = inputs["x_0"]
    if members and spec.ensemble:
        x_0 = torch.randn(spec.ensemble, batch, samples or 1, spec.state_dim)
    elif x_0.dim() == 3 and spec.ensemble and (batch == samples == spec.ensemble or spec.cond_dim == 0):
        x_0 = x_0.expand(spec.ensemble, *x_0.shape)
    with torch.no_grad():
        by_operator = ff.integrate(field, x_0, inputs["cond"], num_steps=num_steps)
        by_reference = ff.integrate(field, x_0, inputs["cond"], num_steps=num_steps, backend="reference")
    assert torch.equal(by_operator, by_reference)


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"x_0": torch.zeros(7, 2)}, ValueError, r"x_0 must be \[..., 1\], got \[7, 2\]"),
        ({"x_0": torch.zeros(6, 1)}, ValueError, r"x_0 must be \[B, 1\] or .* got \[6, 1\] with cond \[7, 5\]"),
        ({"x_0": torch.zeros(3, 7, 1)}, ValueError, r"got \[3, 7, 1\] with cond"),
        ({"x_0": torch.zeros(3, 7, 4, 1)}, ValueError, r"got \[3, 7, 4, 1\]"),
        ({"x_0": torch.tensor(1.0)}, ValueError, "x_0 must be"),
        (
            {"x_0": torch.zeros(7, 1).double()},
            TypeError,
            "x_0 must have the field's dtype torch.float32, got torch.float64",
        ),
        ({"x_0": torch.zeros(7, 1).int()}, TypeError, "x_0 must have the field's dtype"),
        ({"x_0": [0.0]}, TypeError, "x_0 must be a Tensor, got list"),
        ({"x_0": torch.zeros(7, 1, device="meta")}, ValueError, "x_0 must be on the field's device"),
        ({"cond": None}, ValueError, r"cond must be \[B, 5\], got None"),
        ({"cond": torch.zeros(7, 4)}, ValueError, r"cond must be \[..., 5\], got \[7, 4\]"),
        ({"cond": torch.zeros(3, 7, 5)}, ValueError, r"cond must be \[B, 5\] or \[2, B, 5\], got \[3, 7, 5\]"),
        ({"num_steps": 0}, ValueError, "num_steps must be at least 1, got 0"),
        ({"num_steps": -3}, ValueError, "num_steps must be at least 1, got -3"),
        ({"num_steps": 2.0}, TypeError, "num_steps must be an int, got float"),
        ({"method": "rk4"}, ValueError, "method must be 'euler', got 'rk4'"),
        ({"t_1": torch.ones(7)}, TypeError, "t_1 must be a number"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"precision": "fp16"}, ValueError, "precision must be one of"),
        ({"field": torch.nn.Linear(1, 1)}, TypeError, "field"),
        ({"field": []}, TypeError, "field must be a VelocityField or several"),
    ],
)
def test_integrate_names_what_is_wrong(changes, error, message):
    call = dict(
        field=random_field(FLOQ, torch.device("cpu")), x_0=torch.zeros(7, 1), cond=torch.zeros(7, 5), num_steps=2
    )
    with pytest.raises(error, match=message):
        ff.integrate(**(call | changes))


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"x_1": torch.zeros(7, 2)}, ValueError, "x_1 must be"),
        ({"x_1": torch.zeros(6, 1)}, ValueError, r"x_1 must be \[7, 1\] or \[2, 7, 1\], got \[6, 1\]"),
        ({"t": torch.zeros(7, 1)}, ValueError, r"t must be \[7\] or \[2, 7\], got \[7, 1\]"),
        ({"t": torch.zeros(7).double()}, TypeError, "t must have the field's dtype"),
        ({"weight": torch.zeros(3)}, ValueError, r"weight must be \[7\]"),
        ({"reduction": "average"}, ValueError, "reduction must be 'none', 'sum' or 'mean'"),
        ({"field": [random_field(FLOQ, torch.device("cpu"))] * 2}, TypeError, "field must be one VelocityField"),
    ],
)
def test_loss_names_what_is_wrong(changes, error, message):
    call = dict(
        field=random_field(FLOQ, torch.device("cpu")),
        x_0=torch.zeros(7, 1),
        x_1=torch.zeros(7, 1),
        t=torch.zeros(7),
        cond=torch.zeros(7, 5),
    )
    with pytest.raises(error, match=message):
        ff.flow_matching_loss(**(call | changes))


def test_an_ambiguous_start_is_refused():
    field = random_field(FLOQ, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"could be \[E, B, D\] or \[B, S, D\] with E=2; pass it as \[E, B, S, D\]"):
        ff.integrate(field, torch.zeros(2, 2, 1), torch.zeros(2, 5), num_steps=1)


def test_fields_of_different_specs_do_not_walk_together():
    fields = [random_field(FLOQ, torch.device("cpu")), random_field(SPECS["scaled-scalar"], torch.device("cpu"))]
    with pytest.raises(ValueError, match="several fields must share one spec"):
        ff.integrate(fields, torch.zeros(7, 1), torch.zeros(7, 5), num_steps=1)


def test_fused_is_refused_where_there_is_no_kernel(device):
    uneven = random_field(ff.FieldSpec(1, 2, (16, 8)), device)
    with pytest.raises(
        NotImplementedError, match=r"no fused kernel for .*unequal width \(16, 8\)|no fused kernel for cpu"
    ):
        ff.integrate(
            uneven, torch.zeros(3, 1, device=device), torch.zeros(3, 2, device=device), num_steps=1, backend="fused"
        )
    double = random_field(FLOQ, device, torch.float64)
    with pytest.raises(NotImplementedError, match=r"torch\.float64"):
        x_0, cond = (torch.zeros(3, n).to(double.layers[0].bias) for n in (1, 5))
        ff.integrate(double, x_0, cond, num_steps=1, backend="fused")


def test_fused_without_a_gpu_or_the_interpreter_says_so(plain_environment):
    code = (
        "import torch, fastflow as ff\n"
        "field = ff.VelocityField(ff.FieldSpec(1, 2, (8,)))\n"
        "try: ff.integrate(field, torch.zeros(3, 1), torch.zeros(3, 2), num_steps=1, backend='fused')\n"
        "except NotImplementedError as error: print(error)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], env=plain_environment, capture_output=True, text=True, check=True
    )
    assert "no fused kernel for cpu tensors; use backend='auto' or 'reference'" in out.stdout


def test_backend_comes_from_the_environment_once(plain_environment):
    env = plain_environment | {"FASTFLOW_BACKEND": "turbo"}
    out = subprocess.run([sys.executable, "-c", "import fastflow.ops"], env=env, capture_output=True, text=True)
    assert out.returncode != 0
    assert "FASTFLOW_BACKEND must be one of ('auto', 'fused', 'reference'), got 'turbo'" in out.stderr


def test_second_derivatives_say_how_to_switch(device):
    pytest.importorskip("triton")
    field = random_field(FLOQ, device)
    cond = torch.randn(4, 5, device=device, requires_grad=True)
    x_0, x_1, t = torch.zeros(4, 1, device=device), torch.ones(4, 1, device=device), torch.rand(4, device=device)
    for call in (
        lambda **o: ff.integrate(field, x_0, cond, num_steps=2, **o).sum(),
        lambda **o: ff.flow_matching_loss(field, x_0, x_1, t, cond, **o),
    ):
        (grad,) = torch.autograd.grad(call(backend="fused"), cond, create_graph=True)
        with pytest.raises(RuntimeError, match="backend='reference'"):
            grad.square().sum().backward()
        (grad,) = torch.autograd.grad(call(backend="reference"), cond, create_graph=True)
        grad.square().sum().backward()
        assert cond.grad is not None


# torch's own checks -------------------------------------------------------------------------------------------------


def operator_inputs(device, fused, requires_grad=True):
    field = random_field(FLOQ, device)
    x_0, x_1 = torch.randn(2, 4, 3, 1, device=device), torch.randn(2, 4, 3, 1, device=device)
    t, cond = torch.rand(2, 4, 3, device=device), torch.randn(1, 4, 5, device=device, requires_grad=requires_grad)
    parameters = [p.detach().clone().requires_grad_(requires_grad) for p in field.parameter_list()]
    return {
        "integrate": (x_0, cond, parameters, field.key, 3, 1.0, "fp32", fused),
        "matching_loss": (x_0, x_1, t, cond, parameters, field.key, "fp32", True, fused, fused),
    }


@pytest.mark.parametrize("fused", [False, True], ids=["reference", "fused"])
@pytest.mark.parametrize("name", ["integrate", "matching_loss"])
# torch 2.15's opcheck looks at .grad of its own copies.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck(name, fused, device):
    if fused:
        pytest.importorskip("triton")
    torch.library.opcheck(getattr(torch.ops.fastflow, name), operator_inputs(device, fused)[name])


def test_gradcheck_through_the_operators():
    field = random_field(ff.FieldSpec(1, 2, (4, 4), 2, norm="layer"), torch.device("cpu"), torch.float64)
    d = torch.float64
    x, y, t = torch.randn(3, 2, 1, dtype=d), torch.randn(3, 2, 1, dtype=d), torch.rand(3, 2, dtype=d)
    cond = torch.randn(3, 2, dtype=d)
    leaves = [v.requires_grad_() for v in (x, y, t, cond)]
    assert torch.autograd.gradcheck(lambda x, y, t, c: ff.flow_matching_loss(field, x, y, t, c), leaves)
    assert torch.autograd.gradcheck(lambda x, c: ff.integrate(field, x, c, num_steps=2), [leaves[0], leaves[3]])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.parametrize("backend", ["auto", "fused"])
def test_compiles_whole_forward_and_backward_for_any_batch(backend, device):
    """fullgraph, and after the first change of shape no recompilation over batch sizes and step counts."""
    if backend == "fused":
        pytest.importorskip("triton")
    field = random_field(FLOQ, device)

    def loss(x_0, x_1, t, cond, num_steps):
        walked = ff.integrate(field, x_0, cond, num_steps=num_steps, backend=backend, precision="fp32")
        return walked.mean() + ff.flow_matching_loss(field, x_0, x_1, t, cond, backend=backend, precision="fp32")

    torch._dynamo.reset()
    compiled = torch.compile(
        loss, fullgraph=True, dynamic=True, backend="inductor" if backend == "auto" else "aot_eager"
    )
    graphs = []
    for batch, num_steps in ((6, 3), (7, 4), (11, 4), (30, 8)):
        inputs = torch.randn(batch, 1), torch.randn(batch, 1), torch.rand(batch), torch.randn(batch, 5)
        inputs = [x.to(device) for x in inputs]
        inputs[3].requires_grad_()
        grads = []
        for function in (compiled, loss):
            field.zero_grad()
            inputs[3].grad = None
            value = function(*inputs, num_steps)
            value.backward()
            grads.append([value.detach(), inputs[3].grad, *(p.grad for p in field.parameters())])
        for i, (a, b) in enumerate(zip(*grads)):
            assert_close_rms(f"{i}", a, b, 1e-4, floor=1e-6)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[1], f"graphs after each shape: {graphs}"


def test_exports():
    field = random_field(ACTOR, torch.device("cpu"))

    class Policy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.field = field

        def forward(self, x_0, cond):
            return ff.integrate(self.field, x_0, cond, num_steps=4)

    args = torch.randn(3, 5), torch.randn(3, 6)
    program = torch.export.export(Policy(), args)
    assert any("fastflow.integrate" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*args), Policy()(*args))


# vmap ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["floq", "actor"])
def test_vmap_over_parameters_is_the_networks_alone(name):
    """LeanRL's and TorchRL's ensembles: stacked parameters, vmapped call."""
    spec = SPECS[name]
    fields = [random_field(spec, torch.device("cpu")) for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(fields)
    i = random_inputs(spec, 4, None, torch.device("cpu"))

    class Calls(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.field = fields[0]

        def forward(self, x_0, x_1, t, cond):
            walked = ff.integrate(self.field, x_0, cond, num_steps=2)
            return walked, ff.flow_matching_loss(self.field, x_0, x_1, t, cond, reduction="none")

    calls = Calls()

    def run(parameters, x_0):
        named = {f"field.{k}": v for k, v in parameters.items()}
        return torch.func.functional_call(calls, named, (x_0, i["x_1"], i["t"], i["cond"]))

    x_0 = torch.stack([i["x_0"] + n for n in range(3)], 1)
    for x, dim in ((i["x_0"], None), (x_0, 1)):
        walked, rows = torch.func.vmap(run, in_dims=(0, dim))(stacked, x)
        for n, field in enumerate(fields):
            start = x if dim is None else x[:, n]
            torch.testing.assert_close(walked[n], ff.integrate(field, start, i["cond"], num_steps=2))
            alone = ff.flow_matching_loss(field, start, i["x_1"], i["t"], i["cond"], reduction="none")
            torch.testing.assert_close(rows[n], alone)


# Precision ----------------------------------------------------------------------------------------------------------


def test_autocast_chooses_bfloat16_products(device):
    field = random_field(FLOQ, device)
    x_0, cond = torch.randn(8, 1, device=device), torch.randn(8, 5, device=device)
    with torch.no_grad():
        with torch.autocast(device.type, torch.bfloat16):
            cast = ff.integrate(field, x_0, cond.bfloat16(), num_steps=3)
        asked = ff.integrate(field, x_0, cond.bfloat16().float(), num_steps=3, precision="bf16")
        exact = ff.integrate(field, x_0, cond, num_steps=3, precision="fp32")
    assert cast.dtype == torch.float32
    assert torch.equal(cast, asked)
    assert not torch.equal(cast, exact)
    assert_close_rms("bf16", cast, exact, 0.1)


def test_default_precision_follows_torch_s_settings():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    before = torch.get_float32_matmul_precision()
    try:
        for setting, expected in (("highest", "fp32"), ("high", "tf32"), ("medium", "bf16")):
            torch.set_float32_matmul_precision(setting)
            assert ops._resolve_precision(None, torch.float32, cuda) == "default"
            assert launch.product_precision() == expected
            assert ops._resolve_precision(None, torch.float32, cpu) == "fp32"
        assert ops._resolve_precision("tf32", torch.float32, cuda) == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(HAS_GPU, reason="looks at the interpreter")
def test_auto_on_the_cpu_never_interprets_kernels(monkeypatch):
    """`auto` takes the reference on CPU tensors even where TRITON_INTERPRET is set: interpreting is for tests."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    field = random_field(FLOQ, torch.device("cpu"))
    x_0, cond = torch.randn(8, 1), torch.randn(8, 5)
    with torch.no_grad():
        auto = ff.integrate(field, x_0, cond, num_steps=3)
        reference = ff.integrate(field, x_0, cond, num_steps=3, backend="reference")
    assert torch.equal(auto, reference)
