"""Plain networks as one operator: native code against the reference, and what modules make of it."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import assert_pass_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import fastflow as ff
from fastflow import dense, reference
from fastflow.fields import DenseStack
from fastflow.kernels import cpu, launch

needs_native = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=f"no native code: {cpu.why_unavailable()}")


def network(sizes, ensemble, norm):
    stack = DenseStack(tuple(zip(sizes[:-1], sizes[1:], strict=True)), ensemble, norm)
    with torch.no_grad():
        for p in stack.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return stack


def outcome(call, stack, x):
    """The result, and the gradients of an uneven sum of it."""
    x = x.clone().requires_grad_()
    y = call(x, stack.parameter_list())
    weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).to(y).view_as(y)
    leaves = {"x": x, **dict(stack.named_parameters())}
    grads = torch.autograd.grad((y * weights).sum(), list(leaves.values()))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


@needs_native
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    hidden=st.lists(st.integers(8, 70), min_size=1, max_size=4),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 40),
    lead=st.lists(st.integers(1, 13), min_size=0, max_size=3),
    ensemble=st.sampled_from([None, 1, 3]),
    norm=st.sampled_from([None, "layer"]),
    activation=st.sampled_from(["gelu_tanh", "gelu", "silu", "elu", "mish", "tanh"]),
)
def test_value_and_gradients_match_the_reference(hidden, inputs, outputs, lead, ensemble, norm, activation):
    torch.manual_seed(0)
    stack = network((inputs, *hidden, outputs), ensemble, norm)
    members = () if ensemble is None else (ensemble,)
    x = torch.randn(*members, *lead, inputs)
    found = outcome(lambda x, p: dense.dense_stack(x, p, activation, norm), stack, x)
    eager = outcome(lambda x, p: reference.dense_stack(x, p, activation, norm), stack, x)
    double = copy.deepcopy(stack).double()
    exact = outcome(lambda x, p: reference.dense_stack(x, p, activation, norm), double, x.double())
    assert_pass_as_accurate(found, eager, exact, "fp32")


@needs_native
@pytest.mark.parametrize("rows", [1, 97, 1100])
def test_wide_layers_keep_their_products(rows):
    stack = network((10, 128, 160, 3), 2, "layer")
    x = torch.randn(2, rows, 10)
    assert dense.kept_floats((128, 160), 2 * rows) == 2 * rows * 288
    found = outcome(lambda x, p: dense.dense_stack(x, p, "gelu_tanh", "layer"), stack, x)
    eager = outcome(lambda x, p: reference.dense_stack(x, p, "gelu_tanh", "layer"), stack, x)
    double = copy.deepcopy(stack).double()
    exact = outcome(lambda x, p: reference.dense_stack(x, p, "gelu_tanh", "layer"), double, x.double())
    assert_pass_as_accurate(found, eager, exact, "fp32")


in_one_pass = [
    pytest.mark.parametrize("rows", [1, 3, 97, 1100]),
    pytest.mark.parametrize("ensemble", [None, 3]),
    pytest.mark.parametrize("norm", [None, "layer"]),
    pytest.mark.parametrize(
        ("sizes", "activation"),
        [((5, 16, 1), "silu"), ((7, 130, 160, 6), "elu"), ((3, 8, 9, 2), "relu"), ((4, 400, 390, 395, 1), "tanh")],
    ),
]


def stack_of(stack, activation, norm):
    return dense.Stack(stack.parameter_list(), activation, norm, None)


def every_case(test):
    for mark in in_one_pass:
        test = mark(test)
    return needs_native(test)


def assert_within(found, eager, truth, floor):
    """The error of `found` is at most twice that of `eager`, over all tensors; of few numbers either may be lucky."""
    found, eager, truth = (torch.cat([x.detach().double().flatten() for x in xs]) for xs in (found, eager, truth))
    error, other = ((x - truth).square().mean().sqrt() for x in (found, eager))
    assert error <= 2 * other + floor * truth.square().mean().sqrt()


@every_case
def test_a_regression_in_one_pass_errs_no_more_than_pytorch(rows, norm, sizes, activation, ensemble):
    stack = network(sizes, ensemble, norm)
    source = torch.Generator().manual_seed(1)
    x, target = (torch.randn(rows, width, generator=source) for width in (sizes[0], sizes[-1]))
    parameters = [p.detach().requires_grad_() for p in stack.parameter_list()]

    def plain(dtype):
        own = [p.detach().to(dtype).requires_grad_() for p in parameters]
        rows = x.to(dtype) if ensemble is None else x.to(dtype).expand(ensemble, *x.shape)
        y = reference.dense_stack(rows, own, activation, norm)
        loss = (y - target.to(dtype)).square().mean()
        return loss, y, torch.autograd.grad(0.5 * loss, own)

    found = [torch.full_like(p, torch.nan) for p in parameters]
    loss, y = dense.regression(x, dense.Stack(parameters, activation, norm, None), target, 0.5, found)
    exact, eager = plain(torch.float64), plain(torch.float32)
    assert loss.shape == () and y.shape == exact[1].shape and not (loss.requires_grad or y.requires_grad)
    floor = 3e-7 if target.numel() > 90 else 5e-6
    for mine, theirs, truth in zip(([loss], [y], found), ([eager[0]], [eager[1]], eager[2]), exact, strict=True):
        assert_within(mine, theirs, truth if isinstance(truth, tuple) else [truth], floor)


@needs_native
@pytest.mark.parametrize("rows", [1, 97, 1100])
@pytest.mark.parametrize("ensemble", [None, 3])
@pytest.mark.parametrize("norm", [None, "layer"])
@pytest.mark.parametrize(("hidden", "outputs"), [((16, 24), 1), ((130, 20), 6)])
def test_a_climb_in_one_pass_errs_no_more_than_pytorch(rows, ensemble, norm, hidden, outputs):
    obs, alpha = 4, 0.7
    policy = network((obs + 3, *hidden, outputs), None, norm)
    critic = network((obs + outputs, 20, 17, 1), ensemble, "layer")
    with torch.no_grad():
        critic.layers[-1].bias += 1  # values that do not cancel in their mean
    source = torch.Generator().manual_seed(1)
    # Some actions lie outside their bounds, where nothing is climbed.
    x, toward = 3 * torch.randn(rows, obs + 3, generator=source), torch.randn(rows, outputs, generator=source)

    def plain(dtype):
        own = [p.detach().to(dtype).requires_grad_() for p in policy.parameter_list()]
        y = reference.dense_stack(x.to(dtype), own, "silu", norm)
        rows_ = torch.cat((x[:, :obs].to(dtype), y.clamp(-1, 1)), -1)
        rows_ = rows_ if ensemble is None else rows_.expand(ensemble, *rows_.shape)
        q = reference.dense_stack(rows_, [p.detach().to(dtype) for p in critic.parameter_list()], "gelu_tanh", "layer")
        distance, value = (y - toward.to(dtype)).square().mean(), q.mean()
        return [distance], [value], torch.autograd.grad(alpha * distance - value, own)

    found = [torch.full_like(p, torch.nan) for p in policy.parameter_list()]
    stacks = (stack_of(policy, "silu", norm), stack_of(critic, "gelu_tanh", "layer"))
    distance, value = dense.climb(x, *stacks, toward, alpha, found)
    assert distance.shape == value.shape == () and not (distance.requires_grad or value.requires_grad)
    mine, eager, exact = ([distance], [value], found), plain(torch.float32), plain(torch.float64)
    floor = 3e-7 if rows > 90 else 5e-6
    for a, b, truth in zip(mine, eager, exact, strict=True):
        assert_within(a, b, truth, floor)


@needs_native
@pytest.mark.parametrize("rows", [1, 97, 1100])
@pytest.mark.parametrize("sizes", [(5, 16, 1), (7, 130, 160, 6)])
def test_a_pass_goes_back_as_autograd_does(rows, sizes):
    stack = network(sizes, None, "layer")
    x, grad = torch.randn(rows, sizes[0]), torch.randn(rows, sizes[-1])
    y = dense.dense_stack(x, stack.parameter_list(), "silu", "layer")
    expected = torch.autograd.grad(y, stack.parameter_list(), grad)
    there = dense.forward_pass(x, stack_of(stack, "silu", "layer"))
    found = [torch.full_like(p, torch.nan) for p in stack.parameter_list()]
    there.back(grad, found)
    assert torch.equal(there.y, y) and not there.y.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_native
def test_what_is_not_covered_is_left_alone():
    stack = network((5, 8, 1), None, None)
    parameters = list(stack.parameters())
    x, target = torch.randn(4, 5), torch.randn(4, 1)
    found = [torch.zeros_like(p) for p in parameters]

    def left(x=x, target=target, parameters=parameters):
        return dense.regression(x, dense.Stack(parameters, "silu", None, None), target, 1.0, found) is None

    assert left(x=x.clone().requires_grad_()) and left(target=target[:3]) and left(target=target.expand(4, 2))
    assert left(x=x.double()) and left(parameters=[p.double() for p in parameters])
    assert left(x=x[:0], target=target[:0])
    with torch.no_grad():
        assert left()
    with torch.autocast("cpu", torch.bfloat16):
        assert left()
    policy, members = stack_of(stack, "silu", None), stack_of(network((5, 8, 1), 2, None), "silu", None)
    for inputs in (x.double(), x[:0], x[None], x.clone().requires_grad_()):
        assert dense.forward_pass(inputs, policy) is None
        assert dense.climb(inputs, policy, members, target, 1.0, found) is None
    assert dense.forward_pass(x, members) is None
    assert dense.climb(x, members, members, target, 1.0, found) is None
    assert dense.climb(x, policy, members, target[:, :0], 1.0, found) is None
    assert dense.climb(x, policy, members._replace(precision="bf16"), target, 1.0, found) is None
    assert not any(g.any() for g in found)
    assert not left()


@needs_native
def test_modules_run_in_native_code_and_by_the_reference(monkeypatch):
    calls = []
    forward = dense.forward
    monkeypatch.setattr(dense, "forward", lambda *a: calls.append(1) or forward(*a))
    obs, action, noise = torch.randn(5, 3, 7), torch.randn(5, 3, 2), torch.randn(5, 3, 2)
    for make, inputs in (
        (lambda **o: ff.ValueNetwork(7, 2, hidden=(16, 16), **o), (obs, action)),
        (lambda **o: ff.OneStepPolicy(7, 2, hidden=(16, 16), **o), (obs, noise)),
    ):
        native, plain = make(), make(backend="reference")
        plain.load_state_dict(native.state_dict())
        calls.clear()
        found = native(*inputs)
        assert len(calls) == 1
        expected = plain(*inputs)
        assert len(calls) == 1
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        # Plain PyTorch under transforms, and where there is no kernel for the dtype.
        torch.func.vmap(native)(*inputs)
        native.double()(*(x.double() for x in inputs))
        assert len(calls) == 1


@needs_native
def test_frozen_values_reach_actions_and_no_parameter():
    critic = ff.ValueNetwork(4, 2, hidden=(16, 16))
    obs, action = torch.randn(6, 4), torch.randn(6, 2, requires_grad=True)
    critic(obs, action, frozen=True).sum().backward()
    assert action.grad.abs().sum() > 0
    assert all(p.grad is None for p in critic.parameters())


@needs_native
def test_gradients_can_be_differentiated():
    """A gradient penalty on a critic."""
    torch.manual_seed(0)
    native = ff.ValueNetwork(4, 2, hidden=(16, 16))
    plain = ff.ValueNetwork(4, 2, hidden=(16, 16), backend="reference")
    plain.load_state_dict(native.state_dict())
    obs, action = torch.randn(6, 4), torch.randn(6, 2, requires_grad=True)

    def penalty(critic):
        (slope,) = torch.autograd.grad(critic(obs, action).sum(), action, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), list(critic.parameters()), allow_unused=True)

    for found, expected in zip(penalty(native), penalty(plain), strict=True):
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@needs_native
def test_compiles_whole_for_any_batch():
    critic = ff.ValueNetwork(4, 2, hidden=(16, 16))
    compiled = torch.compile(critic, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (3, 8, 20):
        obs, action = torch.randn(batch, 4), torch.randn(batch, 2, requires_grad=True)
        found, expected = compiled(obs, action), critic(obs, action)
        assert torch.equal(found, expected)
        grads = [torch.autograd.grad(y.sum(), action)[0] for y in (found, expected)]
        assert torch.equal(*grads)
    torch.compiler.reset()


@needs_native
@pytest.mark.parametrize("ensemble", [None, 2])
# torch 2.15's opcheck looks at .grad of its own copies.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck(ensemble):
    stack = network((5, 8, 8, 3), ensemble, "layer")
    x = torch.randn(ensemble or 1, 4, 5, requires_grad=True)
    parameters = [p.detach().clone().requires_grad_() for p in stack.parameter_list()]
    arguments = (x, parameters, "gelu_tanh", True, 1e-6, "fp32", "native", True)
    torch.library.opcheck(torch.ops.fastflow.dense_stack, arguments)


@needs_native
def test_autocast_multiplies_in_bfloat16():
    critic = ff.ValueNetwork(40, 8, hidden=(64, 64))
    obs, action = torch.randn(32, 40), torch.randn(32, 8)
    with torch.no_grad():
        whole = critic(obs, action)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = critic(obs, action)
    error = (rounded - whole).square().mean().sqrt() / whole.square().mean().sqrt()
    assert error < 0.03
    assert (error > 1e-4) == cpu.has_bf16()


@needs_native
def test_no_rows():
    critic = ff.ValueNetwork(4, 2, hidden=(16, 16))
    value = critic(torch.zeros(0, 4), torch.zeros(0, 2))
    assert value.shape == (2, 0, 1)
    value.sum().backward()
    assert all(not p.grad.any() for p in critic.parameters())


@pytest.mark.parametrize(
    ("precision", "backend", "widths", "runner"),
    [
        ("bf16", "auto", (6, 24, 2), "triton"),
        ("tf32", "auto", (6, 24, 2), "triton"),
        ("fp32", "auto", (6, 24, 2), None),  # no matrix instructions: torch's own products are faster
        ("fp32", "fused", (6, 24, 2), "triton"),
        ("bf16", "reference", (6, 24, 2), None),
        ("bf16", "fused", (6, 2048, 2), None),
        ("bf16", "fused", (6, 24, 200), None),
        ("bf16", "auto", (6, 2), None),  # no hidden layer
    ],
    ids=str,
)
def test_what_runs_on_a_gpu(precision, backend, widths, runner, monkeypatch):
    monkeypatch.setattr(launch, "target", lambda device: (90, 132))
    with FakeTensorMode():
        sizes = zip(widths[:-1], widths[1:], strict=True)
        parameters = [torch.empty(shape, device="cuda") for i, o in sizes for shape in ((i, o), (o,))]
        x = torch.empty(5, widths[0], device="cuda")
        assert dense._runner(x, parameters, "relu", None, 1e-6, precision, backend) == runner
        x = torch.empty(0, widths[0], device="cuda")
        assert dense._runner(x, parameters, "relu", None, 1e-6, precision, backend) is None
