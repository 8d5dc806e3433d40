"""The operators as torch operators: shapes, errors, opcheck, autograd, compile, vmap, autocast."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch
from conftest import HAS_GPU, assert_close_rms
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import SPECS, random_field, random_inputs, to_float64

import fastflow as ff
from fastflow import cpu, operators, ops
from fastflow.kernels import launch

FLOQ = SPECS["floq"]
ACTOR = SPECS["actor"]
# As small as they come, for what runs kernels many times.
SMALL = ff.FieldSpec(1, 5, (16,), 2, norm="layer", time_embedding=ff.Cosine())
SMALL_ACTOR = ff.FieldSpec(3, 6, (16,), None)


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


@settings(max_examples=40)
@given(
    batch=st.integers(1, 9),
    samples=st.one_of(st.none(), st.integers(1, 4)),
    members=st.booleans(),
    num_steps=st.integers(1, 5),
    name=st.sampled_from(sorted(SPECS)),
    method=st.sampled_from(ops.METHODS),
    times=st.sampled_from(["numbers", "t_0", "t_1", "both"]),
    noisy=st.booleans(),
    trajectory=st.booleans(),
)
def test_operator_and_reference_agree_for_any_shape(
    batch, samples, members, num_steps, name, method, times, noisy, trajectory
):
    spec = SPECS[name]
    # Of float64 there are no kernels: the operator runs the reference.
    field = random_field(spec, torch.device("cpu"), torch.float64)
    inputs = to_float64(random_inputs(spec, batch, samples, torch.device("cpu")))
    x_0 = inputs["x_0"]
    if members and spec.ensemble:
        x_0 = torch.randn(spec.ensemble, batch, samples or 1, spec.state_dim, dtype=torch.float64)
    elif x_0.dim() == 3 and spec.ensemble and (batch == samples == spec.ensemble or spec.cond_dim == 0):
        x_0 = x_0.expand(spec.ensemble, *x_0.shape)
    options = dict(num_steps=num_steps, method=method, trajectory=trajectory)
    options |= {t: torch.rand(batch).double() if times in (t, "both") else float(t == "t_1") for t in ("t_0", "t_1")}
    if noisy:
        options["step_noise"] = torch.randn(num_steps, *x_0.shape, dtype=torch.float64)
    with torch.no_grad():
        by_operator = ff.integrate(field, x_0, inputs["cond"], **options)
        by_reference = ff.integrate(field, x_0, inputs["cond"], **options, backend="reference")
    assert torch.equal(by_operator, by_reference)
    assert by_operator.is_contiguous()


# What the arguments mean --------------------------------------------------------------------------------------------


def walk_inputs(spec, device, batch=5, dtype=torch.float32):
    field = random_field(spec, device, dtype)
    i = random_inputs(spec, batch, None, device)
    return field, i["x_0"].to(dtype), i["cond"].to(dtype)


@pytest.mark.parametrize("method", ops.METHODS)
def test_each_row_has_times_of_its_own(method, device):
    field, x_0, cond = walk_inputs(ACTOR, device)
    t_0, t_1 = torch.rand(5, device=device), torch.rand(5, device=device)
    options = dict(num_steps=3, method=method)
    for begin, end in ((t_0, t_1), (0.25, t_1), (t_0, 0.25)):
        together = ff.integrate(field, x_0, cond, t_0=begin, t_1=end, **options)
        for b in range(5):
            own = [t if isinstance(t, float) else t[b].item() for t in (begin, end)]
            alone = ff.integrate(field, x_0[b : b + 1], cond[b : b + 1], t_0=own[0], t_1=own[1], **options)
            assert_close_rms(f"row {b}", together[b], alone[0], 1e-5)


def test_times_follow_rows_as_in_the_loss(device):
    field, _, cond = walk_inputs(FLOQ, device)
    x_0, t = torch.randn(2, 5, 3, 1, device=device), torch.rand(2, 5, 3, device=device)
    for form in (t[0, :, 0], t[0], t):
        full = (form if form.dim() > 1 else form[:, None]).expand(2, 5, 3)
        by_shape = [
            ff.integrate(field, x_0, cond, num_steps=2, t_1=x, backend=b)
            for x in (form, full)
            for b in ("auto", "reference")
        ]
        for other in by_shape[1:]:
            assert_close_rms("walk", by_shape[0], other, 1e-6)


def test_a_walk_back_ends_where_it_began(device):
    field, x_0, cond = walk_inputs(ACTOR, device)
    options = dict(num_steps=40, method="heun")
    x_1 = ff.integrate(field, x_0, cond, **options)
    assert_close_rms("start", ff.integrate(field, x_1, cond, t_0=1.0, t_1=0.0, **options), x_0, 1e-3)
    assert torch.equal(ff.integrate(field, x_0, cond, t_0=0.5, t_1=0.5, **options), x_0)


@pytest.mark.parametrize("spec", [FLOQ, ACTOR], ids=["floq", "actor"])
def test_a_trajectory_is_every_point_of_the_walk(spec, device):
    field, x_0, cond = walk_inputs(spec, device)
    noise = torch.randn(3, *x_0.shape, device=device)
    path = ff.integrate(field, x_0, cond, num_steps=3, step_noise=noise, trajectory=True)
    lead = () if spec.ensemble is None else (spec.ensemble,)
    assert path.shape == (4, *lead, *x_0.shape)
    assert torch.equal(path[0], x_0.expand(path.shape[1:]))
    assert torch.equal(path[-1], ff.integrate(field, x_0, cond, num_steps=3, step_noise=noise))
    for k in range(3):
        x = path[k].unsqueeze(-2) if lead else path[k]
        step = ff.integrate(field, x, cond, num_steps=1, t_0=k / 3, t_1=(k + 1) / 3)
        assert_close_rms(f"step {k}", path[k + 1], step.reshape(path[k].shape) + noise[k], 1e-5)


def test_no_start_is_a_start_at_zero(device):
    for spec in (FLOQ, ACTOR):
        field, x_0, cond = walk_inputs(spec, device)
        expected = ff.integrate(field, torch.zeros_like(x_0), cond, num_steps=2)
        assert torch.equal(ff.integrate(field, None, cond, num_steps=2), expected)
    by_member = cond.expand(2, *cond.shape)
    both = ff.integrate([field, field], None, by_member, num_steps=2, t_1=torch.ones(5, device=device))
    assert_close_rms("several fields", both, expected.expand(2, *expected.shape), 1e-6)


def test_step_noise_may_leave_out_members(device):
    field, x_0, cond = walk_inputs(FLOQ, device)
    noise = torch.randn(2, 5, 1, device=device)
    shared = ff.integrate(field, x_0, cond, num_steps=2, step_noise=noise)
    each = ff.integrate(field, x_0, cond, num_steps=2, step_noise=noise[:, None].expand(2, 2, 5, 1))
    assert torch.equal(shared, each)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_reductions_over_dimensions_are_multiples_of_the_mean(backend, device):
    field = random_field(ACTOR, device)
    i = random_inputs(ACTOR, 4, 3, device)
    call = (field, i["x_0"], i["x_1"], i["t"], i["cond"])
    mean = ff.flow_matching_loss(*call, reduction="none", backend=backend)
    for how, times in (("sum", 5.0), ("sqrt", 5.0**0.5)):
        rows = ff.flow_matching_loss(*call, reduction="none", dim_reduction=how, backend=backend)
        assert_close_rms(how, rows, times * mean, 1e-6)
        loss = ff.velocity_matching_loss(field, i["x_0"], i["t"], i["x_1"], i["cond"], dim_reduction=how)
        by_mean = ff.velocity_matching_loss(field, i["x_0"], i["t"], i["x_1"], i["cond"])
        assert_close_rms(how, loss, times * by_mean, 1e-6)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("sigma_min", [0.0, 0.2])
def test_errors_are_those_of_what_the_velocity_implies(sigma_min, backend, device):
    field = random_field(ACTOR, device)
    i = random_inputs(ACTOR, 4, None, device)
    x_0, x_1, t = i["x_0"], i["x_1"], i["t"].unsqueeze(-1)
    keep = 1 - sigma_min
    x_t = (1 - keep * t) * x_0 + t * x_1
    v = field(x_t, i["t"], i["cond"])
    implied = {
        "velocity": (v, x_1 - keep * x_0),
        "noise": (x_t - t * v, x_0),
        "endpoint": (keep * x_t + (1 - keep * t) * v, x_1),
    }
    for error, (found, wanted) in implied.items():
        rows = ff.flow_matching_loss(
            field, x_0, x_1, i["t"], i["cond"], error=error, sigma_min=sigma_min, reduction="none", backend=backend
        )
        assert_close_rms(error, rows, (found - wanted).square().mean(-1), 1e-4)


@pytest.mark.parametrize("spec", [FLOQ, ACTOR], ids=["floq", "actor"])
@pytest.mark.parametrize("drawn", [True, False], ids=["t drawn", "t given"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_generator_stands_for_the_tensors_it_draws(spec, drawn, dtype, device):
    field = random_field(spec, device, dtype)
    noise = ff.PhiloxNoise(torch.tensor(7, device=device), torch.tensor([3, -1, 2**40, 3], device=device), 3)
    x_1 = torch.randn(4, spec.state_dim, device=device, dtype=dtype)
    cond = torch.randn(4, spec.cond_dim, device=device, dtype=dtype)
    t = None if drawn else torch.rand(4, 3, device=device, dtype=dtype)
    options = dict(reduction="none", error="noise", dim_reduction="sum", sigma_min=0.1)
    rows = ff.flow_matching_loss(field, noise, x_1, t, cond, **options)
    x_0, times = noise.x_0(spec.state_dim).to(dtype), noise.t().to(dtype) if drawn else t
    lead = () if spec.ensemble is None else (spec.ensemble,)
    given = ff.flow_matching_loss(field, x_0.expand(*lead, *x_0.shape), x_1, times, cond, **options)
    assert rows.shape == (*lead, 4, 3)
    assert_close_rms("rows", rows, given, 1e-5)


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
        ({"method": "rk4"}, ValueError, "method must be 'euler', 'midpoint' or 'heun', got 'rk4'"),
        ({"activations": "drop"}, ValueError, "activations must be 'auto', 'store' or 'recompute', got 'drop'"),
        ({"trajectory": 1}, TypeError, "trajectory must be a bool, got int"),
        ({"t_0": "0"}, TypeError, "t_0 must be a number or a Tensor with one time per row, got str"),
        ({"t_1": None}, TypeError, "t_1 must be a number or a Tensor with one time per row, got NoneType"),
        ({"t_1": float("nan")}, ValueError, "t_1 must be finite, got nan"),
        ({"t_1": torch.ones(6)}, ValueError, r"t_1 must be \[7\] or \[2, 7\], got \[6\]"),
        ({"t_0": torch.tensor(0.0)}, ValueError, r"t_0 must be \[7\] or \[2, 7\], got \[\]"),
        ({"t_0": torch.ones(7).double()}, TypeError, "t_0 must have the field's dtype"),
        ({"x_0": None, "cond": None}, ValueError, "x_0 must be a Tensor where cond is None"),
        ({"x_0": None, "cond": torch.zeros(5)}, ValueError, r"cond must be \[B, 5\] or \[2, B, 5\], got \[5\]"),
        (
            {"step_noise": torch.zeros(3, 7, 1)},
            ValueError,
            r"step_noise must be \[2, 7, 1\] or \[2, 2, 7, 1\], got \[3, 7, 1\]",
        ),
        ({"step_noise": torch.zeros(2, 7, 2)}, ValueError, r"step_noise must be \[..., 1\], got \[2, 7, 2\]"),
        ({"step_noise": 0.1}, TypeError, "step_noise must be a Tensor, got float"),
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
        ({"t": None}, TypeError, "t must be a Tensor, got NoneType"),
        ({"reduction": "average"}, ValueError, "reduction must be 'none', 'sum' or 'mean'"),
        ({"dim_reduction": "max"}, ValueError, "dim_reduction must be 'mean', 'sum' or 'sqrt', got 'max'"),
        ({"error": "x_0"}, ValueError, "error must be 'velocity', 'noise' or 'endpoint', got 'x_0'"),
        ({"sigma_min": 1.0}, ValueError, r"sigma_min must be in \[0, 1\), got 1.0"),
        ({"sigma_min": torch.tensor(0.1)}, TypeError, "sigma_min must be a number, got Tensor"),
        (
            {"x_0": ff.PhiloxNoise(torch.tensor(0), torch.arange(6), 3)},
            ValueError,
            "x_0 must have as many ids as cond has rows, 7, got 6",
        ),
        (
            {
                "x_0": ff.PhiloxNoise(
                    torch.tensor(0, device="meta"), torch.zeros(7, dtype=torch.int64, device="meta"), 3
                )
            },
            ValueError,
            "x_0 must be on the field's device cpu, got ids on meta",
        ),
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


def test_velocity_matching_takes_no_generator():
    field = random_field(FLOQ, torch.device("cpu"))
    noise = ff.PhiloxNoise(torch.tensor(0), torch.arange(7), 3)
    with pytest.raises(TypeError, match="x_t must be a Tensor, got PhiloxNoise"):
        ff.velocity_matching_loss(field, noise, torch.zeros(7), torch.zeros(7, 1), torch.zeros(7, 5))


def test_an_ambiguous_start_is_refused():
    field = random_field(FLOQ, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"could be \[E, B, D\] or \[B, S, D\] with E=2; pass it as \[E, B, S, D\]"):
        ff.integrate(field, torch.zeros(2, 2, 1), torch.zeros(2, 5), num_steps=1)


def test_fields_of_different_specs_do_not_walk_together():
    fields = [random_field(FLOQ, torch.device("cpu")), random_field(SPECS["scaled-scalar"], torch.device("cpu"))]
    with pytest.raises(ValueError, match="several fields must share one spec"):
        ff.integrate(fields, torch.zeros(7, 1), torch.zeros(7, 5), num_steps=1)


def test_fused_is_refused_where_there_is_no_kernel(device):
    wide = random_field(ff.FieldSpec(4096, 2, (8,)), device)
    with pytest.raises(NotImplementedError, match=r"no fused kernel for (a state of 4096 dimensions|cpu tensors)"):
        ff.integrate(
            wide, torch.zeros(3, 4096, device=device), torch.zeros(3, 2, device=device), num_steps=1, backend="fused"
        )
    double = random_field(FLOQ, device, torch.float64)
    with pytest.raises(NotImplementedError, match=r"torch\.float64"):
        x_0, cond = (torch.zeros(3, n).to(double.layers[0].bias) for n in (1, 5))
        ff.integrate(double, x_0, cond, num_steps=1, backend="fused")


def test_fused_without_a_kernel_says_so(plain_environment):
    code = (
        "import torch, fastflow as ff\n"
        "field = ff.VelocityField(ff.FieldSpec(1, 2, (8,)))\n"
        "try: ff.integrate(field, torch.zeros(3, 1), torch.zeros(3, 2), num_steps=1, backend='fused')\n"
        "except NotImplementedError as error: print(error)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        env=plain_environment | {"CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "no fused kernel for no C++ compiler (no-such-compiler not found); use backend='auto'" in out.stdout


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
        lambda **o: ff.integrate(field, x_0, cond, num_steps=2, trajectory=True, **o).sum(),
        lambda **o: ff.flow_matching_loss(field, x_0, x_1, t, cond, **o),
    ):
        (grad,) = torch.autograd.grad(call(backend="fused"), cond, create_graph=True)
        with pytest.raises(RuntimeError, match="backend='reference'"):
            grad.square().sum().backward()
        (grad,) = torch.autograd.grad(call(backend="reference"), cond, create_graph=True)
        grad.square().sum().backward()
        assert cond.grad is not None


# torch's own checks -------------------------------------------------------------------------------------------------


def operator_inputs(device, runner, requires_grad=True):
    """Arguments of the operators, every optional one absent and present."""
    field = random_field(SMALL, device)
    x_0, x_1 = torch.randn(2, 4, 3, 1, device=device), torch.randn(2, 4, 3, 1, device=device)
    t, cond = torch.rand(2, 4, 3, device=device), torch.randn(1, 4, 5, device=device, requires_grad=requires_grad)
    parameters = [p.detach().clone().requires_grad_(requires_grad) for p in field.parameter_list()]
    noise = torch.randn(2, 2, 4, 3, 1, device=device, requires_grad=requires_grad)
    seed, ids = torch.tensor(3, device=device), torch.arange(4, device=device)
    empty = torch.zeros(0, device=device)
    walk, loss = (field.key, 2, 0.0, 1.0), (field.key, "fp32", True)
    needs = [True, True, True, True]
    kept, store = runner != "reference", runner == "triton"
    calls = {
        "integrate": (x_0, cond, parameters, None, None, None, *walk, "euler", "fp32", runner, kept, False),
        "integrate-all": (x_0, cond, parameters, t, t + 1, noise, *walk, "midpoint", "fp32", runner, True, store),
        "matching_loss": (x_0, x_1, t, cond, parameters, None, None, *loss, 0.0, runner, kept, False),
        "matching_loss-drawn": (empty, x_1, empty, cond, parameters, seed, ids, *loss, 0.1, runner, kept, True),
    }
    if not kept:
        grad, grad_path = torch.randn_like(x_0), torch.randn_like(noise)
        walk += ("heun", "fp32", runner, False)
        calls["integrate_bwd"] = (grad, grad_path, x_0, cond, parameters, t, None, noise, [], *walk, needs)
        some = [True, False, True, False]
        calls["integrate_bwd-some"] = (None, grad_path, x_0, cond, parameters, None, t, None, [], *walk, some)
        calls["matching_loss_bwd"] = (t, x_0, x_1, t, cond, parameters, None, None, [], *loss, 0.0, runner, needs)
    return calls


@pytest.mark.parametrize("runner", ["reference", "triton", "native"])
@pytest.mark.parametrize("name", ["integrate", "integrate-all", "matching_loss", "matching_loss-drawn"])
# torch 2.15's opcheck looks at .grad of its own copies.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck(name, runner, device):
    if runner == "triton":
        pytest.importorskip("triton")
    if runner == "native" and cpu.unsupported(torch.float32):
        pytest.skip("no native code")
    device = torch.device("cpu") if runner == "native" else device
    operator = getattr(torch.ops.fastflow, name.partition("-")[0])
    torch.library.opcheck(operator, operator_inputs(device, runner)[name])


@pytest.mark.parametrize("name", ["integrate_bwd", "integrate_bwd-some", "matching_loss_bwd"])
def test_backward_operators_know_what_they_return(name, device):
    """opcheck's modes do not see through torch.func, with which the reference's gradients are computed."""
    operator = getattr(torch.ops.fastflow, name.partition("-")[0])
    arguments = operator_inputs(device, "reference", requires_grad=False)[name]
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = operator(*torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments))
    for fake, real in zip(fakes, operator(*arguments), strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_gradcheck_through_the_operators():
    field = random_field(ff.FieldSpec(1, 2, (4, 4), 2, norm="layer"), torch.device("cpu"), torch.float64)
    d = torch.float64
    x, y, t = torch.randn(3, 2, 1, dtype=d), torch.randn(3, 2, 1, dtype=d), torch.rand(3, 2, dtype=d)
    cond, noise = torch.randn(3, 2, dtype=d), torch.randn(2, 3, 2, 1, dtype=d)
    leaves = [v.requires_grad_() for v in (x, y, t, cond)]
    assert torch.autograd.gradcheck(lambda x, y, t, c: ff.flow_matching_loss(field, x, y, t, c), leaves)
    for options in (dict(error="noise", sigma_min=0.1), dict(error="endpoint", dim_reduction="sum")):
        assert torch.autograd.gradcheck(
            lambda x, y, t, c, o=options: ff.flow_matching_loss(field, x, y, t, c, **o), leaves
        )
    walks = [leaves[0], leaves[3], noise.requires_grad_(), next(field.parameters())]
    given = t.detach()
    for options in (
        dict(),
        dict(method="midpoint", t_1=given),
        dict(method="heun", t_0=given, t_1=0.3, trajectory=True),
        dict(method="euler", t_0=1.0, t_1=given, trajectory=True),
    ):

        def walk(x, c, n, _, o=options):
            return ff.integrate(field, x, c, num_steps=2, step_noise=n, **o)

        assert torch.autograd.gradcheck(walk, walks)


# Gradients ----------------------------------------------------------------------------------------------------------

WALKS = {
    "euler": dict(),
    "midpoint, times": dict(method="midpoint", t_1=torch.tensor([0.9, 0.1, 0.5, 1.0])),
    "heun, trajectory": dict(method="heun", trajectory=True, t_0=torch.tensor([0.9, 0.1, 0.5, 1.0]), t_1=0.0),
    "noise, recompute": dict(step_noise=0.1 * torch.ones(3, 4, 1), activations="recompute"),
    "noise, store": dict(step_noise=0.1 * torch.ones(3, 4, 1), activations="store", trajectory=True),
}


def on(device, options):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def both_backends(call, leaves):
    """Gradients of the call's sum of squares: the operators', the reference's; None where there is none."""
    found = []
    for backend in ("auto", "reference"):
        out = call(backend).square().sum()
        found.append(torch.autograd.grad(out, leaves, allow_unused=True))
    return found


@pytest.mark.parametrize("name", WALKS)
@pytest.mark.parametrize("needed", ["x_0", "cond", "step_noise", "one parameter", "all"])
def test_gradients_of_what_requires_them(name, needed, device):
    field, x_0, cond = walk_inputs(FLOQ, device, 4)
    options = on(device, WALKS[name])
    if needed in ("step_noise", "all") and "step_noise" not in options:
        options["step_noise"] = torch.zeros(3, 4, 1, device=device)
    field.requires_grad_(needed == "all")
    leaves = list(field.parameters()) if needed == "all" else []
    if needed == "one parameter":
        leaves = [field.layers[1].weight.requires_grad_()]
    for key, tensor in {"x_0": x_0, "cond": cond, "step_noise": options.get("step_noise")}.items():
        if needed in (key, "all"):
            leaves.append(tensor.requires_grad_())
    grads, expected = both_backends(
        lambda backend: ff.integrate(field, x_0, cond, num_steps=3, backend=backend, **options), leaves
    )
    for i, (a, b) in enumerate(zip(grads, expected)):
        assert_close_rms(f"{i}", a, b, 1e-4, floor=1e-6)


def test_gradients_of_times_take_the_reference(device):
    field, x_0, cond = walk_inputs(FLOQ, device, 4)
    t_1, t = torch.rand(4, device=device, requires_grad=True), torch.rand(4, device=device, requires_grad=True)
    assert ff.integrate(field, x_0, cond, num_steps=2, t_1=t_1, backend="reference").requires_grad
    if device.type == "cpu":
        grads, expected = both_backends(
            lambda b: ff.integrate(field, x_0, cond, num_steps=2, t_1=t_1, backend=b), [t_1, *field.parameters()]
        )
        for i, (a, b) in enumerate(zip(grads, expected)):
            assert_close_rms(f"{i}", a, b, 1e-6)
    with pytest.raises(NotImplementedError, match="no fused kernel for a gradient of t_0 or t_1; use backend='auto'"):
        ff.integrate(field, x_0, cond, num_steps=2, t_1=t_1, backend="fused")
    with pytest.raises(NotImplementedError, match="no fused kernel for a gradient of t; use backend='auto'"):
        ff.flow_matching_loss(field, x_0, x_0, t, cond, backend="fused")


def test_gradients_twice_and_of_parts_of_a_trajectory(device):
    field, x_0, cond = walk_inputs(FLOQ, device, 4)
    cond.requires_grad_()
    path = ff.integrate(field, x_0, cond, num_steps=3, trajectory=True)
    expected = ff.integrate(field, x_0, cond, num_steps=3, trajectory=True, backend="reference")
    for part in (slice(0, 4), slice(3, 4), slice(1, 3)):
        for _ in range(2):
            (grad,) = torch.autograd.grad(path[part].square().sum(), cond, retain_graph=True)
            (wanted,) = torch.autograd.grad(expected[part].square().sum(), cond, retain_graph=True)
            assert_close_rms("cond", grad, wanted, 1e-4)


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_any_batch_and_layout_has_gradients(batch, device):
    """Empty, single and prime batches; transposed and expanded tensors."""
    field = random_field(FLOQ, device)
    x_0 = torch.randn(3, batch, 1, device=device).transpose(0, 1)
    cond = torch.randn(5, batch, device=device).mT
    noise, t_1 = torch.randn(2, 1, 1, 1, device=device).expand(2, batch, 3, 1), torch.rand(1, device=device)
    leaves = [v.requires_grad_() for v in (x_0, cond, noise)] + list(field.parameters())
    x_0 = x_0.expand(2, batch, 3, 1)  # with its E axis S cannot be taken for B
    for trajectory in (False, True):
        options = dict(num_steps=2, t_1=t_1.expand(batch), step_noise=noise, trajectory=trajectory, method="heun")
        grads, expected = both_backends(lambda b, o=options: ff.integrate(field, x_0, cond, backend=b, **o), leaves)
        for i, (a, b, leaf) in enumerate(zip(grads, expected, leaves)):
            assert a.shape == leaf.shape
            assert_close_rms(f"{i}", a, b, 1e-4, floor=1e-6)


def few_options(field, x_0, x_1, t, cond, num_steps, seed, ids, **options):
    walked = ff.integrate(field, x_0, cond, num_steps=num_steps, **options)
    return walked.mean() + ff.flow_matching_loss(field, x_0, x_1, t, cond, **options)


def many_options(field, x_0, x_1, t, cond, num_steps, seed, ids, **options):
    by_row = dict(t_1=t, step_noise=torch.stack([x_0, x_1]), trajectory=True)
    path = ff.integrate(field, x_0, cond, num_steps=2, method="midpoint", **by_row, **options)
    walked = ff.integrate(field, None, cond, num_steps=num_steps, method="heun", t_0=t, **options)
    losses = ff.flow_matching_loss(
        field, x_0, x_1, t, cond, sigma_min=0.1, dim_reduction="sqrt", error="noise", reduction="none", **options
    )
    drawn = ff.flow_matching_loss(field, ff.PhiloxNoise(seed, ids, 3), x_1, None, cond, error="endpoint", **options)
    matched = ff.velocity_matching_loss(field, x_0, t, x_1, cond, dim_reduction="sum", **options)
    return path.square().mean() + walked.mean() + losses.sum() + drawn + matched


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.parametrize(
    "loss, backend, compiler",
    [
        (few_options, "auto", "inductor"),
        (many_options, "auto", "aot_eager"),
        (few_options, "fused", "aot_eager"),
        (many_options, "fused", "aot_eager"),
    ],
)
def test_compiles_whole_forward_and_backward_for_any_batch(loss, backend, compiler, device):
    """fullgraph, and after the first change of shape no recompilation over batch sizes and step counts."""
    if backend == "fused":
        pytest.importorskip("triton")
    field = random_field(SMALL, device)

    def call(*inputs, backend=backend):
        return loss(field, *inputs, backend=backend, precision="fp32")

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=compiler)
    graphs = []
    for batch, num_steps in ((6, 3), (7, 2), (30, 4)):
        inputs = torch.randn(batch, 1), torch.randn(batch, 1), torch.rand(batch), torch.randn(batch, 5)
        inputs = [x.to(device) for x in inputs]
        leaves = [inputs[1].requires_grad_(), inputs[3].requires_grad_(), *field.parameters()]
        rest = num_steps, torch.tensor(batch, device=device), torch.arange(batch, device=device)
        by_function = []
        for function in (compiled, functools.partial(call, backend="reference")):
            value = function(*inputs, *rest)
            by_function.append([value.detach(), *torch.autograd.grad(value, leaves)])
        for i, (a, b) in enumerate(zip(*by_function)):
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
            walked = ff.integrate(self.field, x_0, cond, num_steps=4)
            path = ff.integrate(self.field, None, cond, num_steps=2, t_1=x_0[:, 0], method="heun", trajectory=True)
            return walked, path

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


WALKS_AND_LOSSES = ("euler", "midpoint", "heun", "loss", "drawn")


def stacked_walks(spec, device):
    """(function of one network's parameters, x_0 and cond, parameters of two networks stacked, x_0, cond)."""
    fields = [random_field(spec, device) for _ in range(2)]
    i = random_inputs(spec, 4, None, device)
    x_0, x_1, t = i["x_0"], i["x_1"], i["t"]
    noise = ff.PhiloxNoise(torch.tensor(5, device=device), torch.arange(4, device=device), 2)
    calls = {
        "euler": lambda f, x, c, b: ff.integrate(f, x, c, num_steps=2, backend=b).square(),
        "midpoint": lambda f, x, c, b: ff.integrate(
            f, x, c, num_steps=2, method="midpoint", t_1=t, trajectory=True, backend=b
        ).square(),
        "heun": lambda f, x, c, b: ff.integrate(
            f, x, c, num_steps=2, method="heun", t_0=t, step_noise=torch.stack([x_0, x_1]), backend=b
        ).square(),
        "loss": lambda f, x, c, b: ff.flow_matching_loss(f, x, x_1, t, c, sigma_min=0.1, backend=b),
        "drawn": lambda f, x, c, b: ff.flow_matching_loss(f, noise, x[..., :1].expand_as(x), None, c, backend=b),
    }

    class Call(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.field = fields[0]

        def forward(self, name, x, c, backend):
            return calls[name](self.field, x, c, backend).sum()

    module = Call()

    def run(name, backend, parameters, x, c):
        named = {f"field.{k}": v for k, v in parameters.items()}
        return torch.func.functional_call(module, named, (name, x, c, backend))

    return run, torch.func.stack_module_state(fields)[0], x_0, i["cond"]


@pytest.mark.parametrize(
    "spec, name, backend",
    [
        *((spec, name, "auto") for spec in (SMALL, SMALL_ACTOR) for name in WALKS_AND_LOSSES),
        *((SMALL, name, "fused") for name in ("midpoint", "drawn")),
        *((SMALL_ACTOR, name, "fused") for name in ("heun", "loss")),
    ],
    ids=lambda value: value if isinstance(value, str) else "members" if value.ensemble else "alone",
)
def test_vmap_and_grad_in_any_order(spec, backend, name, device):
    """Gradients of every network's parameters, start and condition: torch.func's, and autograd's behind vmap."""
    if backend == "fused":
        pytest.importorskip("triton")
    run, stacked, x_0, cond = stacked_walks(spec, device)
    x_0 = torch.stack([x_0, x_0 + 0.1], 1)
    one = functools.partial(run, name, backend)
    dims = (0, 1, None)
    grads = torch.func.vmap(torch.func.grad(one, argnums=(0, 1, 2)), in_dims=dims)(stacked, x_0, cond)
    for n in range(2):
        alone = torch.func.grad(functools.partial(run, name, "reference"), argnums=(0, 1, 2))(
            {k: v[n] for k, v in stacked.items()}, x_0[:, n], cond
        )
        for k, g in alone[0].items():
            assert_close_rms(k, grads[0][k][n], g, 1e-4, floor=1e-5)
        for i in (1, 2):
            assert_close_rms(f"{i}", grads[i][n], alone[i], 1e-4, floor=1e-5)

    def total(parameters):
        return torch.func.vmap(one, in_dims=dims)(parameters, x_0, cond).sum()

    leaves = {k: v.detach().requires_grad_() for k, v in stacked.items()}
    by_autograd = dict(zip(leaves, torch.autograd.grad(total(leaves), list(leaves.values()))))
    for found in (torch.func.grad(total)(stacked), by_autograd):
        for k, g in found.items():
            assert_close_rms(k, g, grads[0][k], 1e-4, floor=1e-5)


@pytest.mark.parametrize("backend", ["auto", "fused"])
def test_vmap_over_inputs_and_over_cotangents(backend, device):
    if backend == "fused":
        pytest.importorskip("triton")
    run, stacked, x_0, cond = stacked_walks(SMALL_ACTOR, device)
    parameters = {k: v[0] for k, v in stacked.items()}
    inputs = torch.stack([cond, cond + 1])
    grads = torch.func.vmap(torch.func.grad(functools.partial(run, "euler", backend)), in_dims=(None, None, 0))
    for k, g in grads(parameters, x_0, inputs).items():
        alone = torch.func.grad(functools.partial(run, "euler", "reference"))
        expected = torch.stack([alone(parameters, x_0, c)[k] for c in inputs])
        assert_close_rms(k, g, expected, 1e-4, floor=1e-5)

    field = random_field(SMALL_ACTOR, device)

    def walk(x, backend):
        return ff.integrate(field, x, cond, num_steps=1, trajectory=True, backend=backend)[1:].sum(1)

    def jacobian(backend):
        return torch.func.jacrev(lambda x: walk(x, backend))(x_0)

    assert_close_rms("jacobian", jacobian(backend), jacobian("reference"), 1e-4)
    t = torch.rand(4, device=device)

    def rows(x, backend):
        return ff.flow_matching_loss(field, x, x_0 + 1, t, cond, reduction="none", backend=backend)

    by_row = torch.func.jacrev(lambda x: rows(x, backend))(x_0)
    assert_close_rms("rows", by_row, torch.func.jacrev(lambda x: rows(x, "reference"))(x_0), 1e-4)


def test_vmap_refuses_what_it_cannot_fold(device):
    field = random_field(ACTOR, device)
    x_0, cond = torch.randn(4, 5, device=device), torch.randn(4, 6, device=device)
    t = torch.rand(3, 4, device=device, requires_grad=True)
    walked = torch.func.vmap(lambda t: ff.integrate(field, x_0, cond, num_steps=2, t_1=t))(t)
    with pytest.raises(NotImplementedError, match=r"a gradient of t_0 or t_1 .* use backend='reference'"):
        walked.sum().backward()
    with pytest.raises(NotImplementedError, match="several fields in one call"):
        torch.func.vmap(lambda c: ff.integrate([field, field], x_0, c, num_steps=2))(cond.expand(2, 4, 6))
    arguments = list(operator_inputs(device, "reference", requires_grad=False)["matching_loss-drawn"])
    with pytest.raises(NotImplementedError, match="seed or ids; use backend='reference'"):
        torch.func.vmap(lambda s: torch.ops.fastflow.matching_loss(*arguments[:5], s, *arguments[6:]))(torch.arange(3))

    def walk(c):
        return ff.integrate(field, x_0, c, num_steps=2).sum()

    with pytest.raises(RuntimeError, match=r"second derivatives .* backend='reference'"):
        torch.func.grad(lambda c: torch.func.grad(walk)(c).sum())(cond)


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
    """`auto` takes native code or the reference on CPU tensors even where TRITON_INTERPRET is set: interpreting is for
    tests."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    runners, kernels = [], operators._kernels
    monkeypatch.setattr(operators, "_kernels", lambda runner: runners.append(runner) or kernels(runner))
    field = random_field(FLOQ, torch.device("cpu"))
    x_0, cond = torch.randn(8, 1), torch.randn(8, 5)
    with torch.no_grad():
        auto = ff.integrate(field, x_0, cond, num_steps=3)
        reference = ff.integrate(field, x_0, cond, num_steps=3, backend="reference")
    assert runners == ([] if cpu.unsupported(torch.float32) else ["native"])
    assert_close_rms("walk", auto, reference, 1e-5)
