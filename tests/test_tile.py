"""Device functions as a GPU computes them with bfloat16 products: the hardware's tanh and reciprocal, which Triton's
interpreter does not know, and forms with fewer instructions that stand on them. Their source runs as Python, with
torch's functions for the hardware's.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from conftest import HAS_GPU

import fastflow as ff

pytest.importorskip("triton")

from kernel_machine import Machine

from fastflow.kernels import tile

pytestmark = pytest.mark.skipif(HAS_GPU, reason="the kernels themselves run")

X = torch.cat((torch.linspace(-12, 12, 2001), torch.tensor([0.0, -80.0, 80.0])))


class Net(NamedTuple):
    """What these functions read of a network."""

    ACT: str = "relu"
    ARITH: str = "fast"
    EMBED: str = "hl_gauss"
    F: int = 50
    D: int = 1


def run(name, *args):
    return Machine().function(getattr(tile, name))(*args)


@pytest.mark.parametrize("arith", ["fast", "exact"])
@pytest.mark.parametrize("act", ["gelu_tanh", "gelu", "silu", "elu", "mish", "tanh", "relu"])
def test_activations_and_their_derivatives(act, arith):
    net, x = Net(act, arith), X.double().requires_grad_()
    functional = torch.nn.functional
    expected = {
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        **{name: getattr(functional, name) for name in ("gelu", "silu", "elu", "mish", "relu")},
        "tanh": torch.tanh,
    }[act](x)
    (slope,) = torch.autograd.grad(expected.sum(), x)
    alone, (y, dy) = run("activate", X, net), run("activate_grad", X, net)
    for found in (alone, y):
        torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(dy.double(), slope, rtol=1e-5, atol=5e-6)
    assert not alone[X == 0].any()


def test_erf():
    found = run("erf", X, Net())
    torch.testing.assert_close(found.double(), torch.erf(X.double()), rtol=0, atol=4e-7)


@pytest.mark.parametrize(("embed", "allowed"), [("hl_gauss", 2e-5), ("hl_gauss_smooth", 1e-4)])
def test_hl_gauss_and_its_gradient(embed, allowed):
    net, embedding = Net(EMBED=embed), ff.HLGauss(-21.0, 1.0)
    low, high, std = -21.0, 1.0, embedding.sigma * 22.0 / 50
    x = torch.linspace(-25.0, 5.0, 301)[:, None]
    o_f = torch.arange(64)
    exact = x.double().requires_grad_()
    expected = embedding.features(exact)
    found = run("embed_state", x, o_f, low, high, std, net)
    assert not found[:, 50:].any()
    assert (found[:, :50] - expected.detach()).abs().max() <= allowed * expected.max()
    given = torch.randn(301, 64, generator=torch.Generator().manual_seed(0))
    (slope,) = torch.autograd.grad(expected, exact, given[:, :50].double())
    back = run("embed_state_grad", given, x, o_f, low, high, std, net)
    torch.testing.assert_close(back.double(), slope, rtol=1e-2, atol=1e-2 * float(slope.abs().max()))
