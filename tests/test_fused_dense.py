"""Plain networks by the kernels of the velocity networks."""

from __future__ import annotations

import pytest
import torch
from conftest import HAS_GPU, assert_as_accurate, products

import fastflow as ff
from fastflow import dense, fused_dense
from fastflow.fields import DenseStack
from fastflow.kernels import plan

pytest.importorskip("triton")
pytestmark = pytest.mark.poison

PRECISIONS = ["bf16", "tf32", "fp32"] if HAS_GPU else ["bf16", "fp32"]


def network(widths, ensemble, norm, device):
    sizes = tuple(zip(widths[:-1], widths[1:], strict=True))
    stack = DenseStack(sizes, ensemble, norm, device)
    for p in stack.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return stack.parameter_list()


def passed(x, parameters, norm, precision, backend, dtype=torch.float32):
    """The result and the gradients of inputs and parameters."""
    x, parameters = x.to(dtype).requires_grad_(), [p.detach().to(dtype).requires_grad_() for p in parameters]
    rows = x.expand(len(parameters[0]), -1, -1) if parameters[0].dim() == 3 else x
    with products(precision if backend == "reference" and dtype == torch.float32 else None):
        y = dense.dense_stack(rows, parameters, "gelu_tanh", norm, precision=precision, backend=backend)
        weights = torch.linspace(-1, 2, y.numel(), dtype=dtype, device=y.device).view_as(y)
        return y, *torch.autograd.grad((y * weights).sum(), [x, *parameters])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("widths", "ensemble", "norm", "members"),
    [
        ((7, 24, 24, 3), None, None, ()),
        ((42, 96, 96, 1), 2, "layer", (1,)),
        ((5, 40, 16, 20), 2, "layer", (2,)),
        ((90, 20, 1), None, "layer", ()),
    ],
    ids=str,
)
def test_as_accurate_as_eager(widths, ensemble, norm, members, precision, device):
    parameters = network(widths, ensemble, norm, device)
    x = torch.randn(*members, 77, widths[0], device=device)
    found = passed(x, parameters, norm, precision, "fused")
    eager = passed(x, parameters, norm, precision, "reference")
    exact = passed(x, parameters, norm, None, "reference", torch.float64)
    for i, (a, b, c) in enumerate(zip(found, eager, exact, strict=True)):
        floor = {"fp32": 1e-6, "tf32": 2**-10, "bf16": 2**-8}[precision]
        assert_as_accurate(f"{i}", a, b, c, ratio_floor=floor)


# The wide one goes by groups of programs.
@pytest.mark.parametrize("width", [24, 256])
def test_without_gradients_the_same(width, device):
    parameters = network((6, width, width, 2), 2, "layer", device)
    x = torch.randn(1, 19, 6, device=device).expand(2, -1, -1)
    options = dict(precision="bf16", backend="fused")
    y = dense.dense_stack(x, parameters, "gelu_tanh", "layer", **options)
    with torch.no_grad():
        alone = dense.dense_stack(x, parameters, "gelu_tanh", "layer", **options)
    torch.testing.assert_close(alone, y, rtol=0.02, atol=0.02 * y.abs().max().item())


def test_frozen_critics_pass_gradients_on_to_actions(device):
    critic = ff.ValueNetwork(4, 2, hidden=(24, 24), backend="fused", precision="fp32", device=device)
    plain = ff.ValueNetwork(4, 2, hidden=(24, 24), backend="reference", device=device)
    plain.load_state_dict(critic.state_dict())
    obs, action = torch.randn(9, 4, device=device), torch.randn(9, 2, device=device, requires_grad=True)
    found, expected = (torch.autograd.grad(q(obs, action, frozen=True).sum(), action)[0] for q in (critic, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    critic(obs, action, frozen=True).sum().backward()
    assert all(p.grad is None for p in critic.parameters())


def test_gradients_of_gradients_are_plain_pytorchs(device):
    parameters = [p.requires_grad_() for p in network((3, 20, 1), None, None, device)]
    x = torch.randn(5, 3, device=device, requires_grad=True)
    found = []
    for backend in ("fused", "reference"):
        y = dense.dense_stack(x, parameters, "gelu_tanh", None, precision="fp32", backend=backend)
        (d_x,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        found.append(torch.autograd.grad(d_x.square().sum(), parameters[0])[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck(device):
    parameters = [p.detach().requires_grad_() for p in network((5, 8, 8, 3), 2, "layer", device)]
    x = torch.randn(1, 4, 5, device=device, requires_grad=True)
    arguments = (x, parameters, "gelu_tanh", True, 1e-6, "fp32", "triton", True)
    torch.library.opcheck(torch.ops.fastflow.dense_stack, arguments)


@pytest.mark.parametrize("precision", ["fp32", None])
def test_compiled_without_a_break(precision, device):
    actor = ff.OneStepPolicy(4, 2, hidden=(24, 24), backend="fused", precision=precision, device=device)
    obs, noise = torch.randn(9, 4, device=device), torch.randn(9, 2, device=device)

    def gradients(act):
        loss = act(obs, noise, raw=True).square().sum()
        return torch.autograd.grad(loss, list(actor.parameters()))

    compiled = torch.compile(actor, fullgraph=True, backend="aot_eager")
    for found, expected in zip(gradients(compiled), gradients(actor), strict=True):
        torch.testing.assert_close(found, expected)


def test_states_and_times_do_not_count():
    kind = dense.Kind((42, 512, 512, 5), True, "gelu_tanh", True, 1e-6, "bf16")
    net = fused_dense.network(kind)
    assert net.fold and net.roll and net.layers == 2 and net.state_dim == 5
    assert net.state_features == net.time_features == 0
    assert plan.groups(90, 132, net, 1, 16) is not None
