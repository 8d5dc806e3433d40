"""A walk to times of each row with the velocity at its end in one native call, against plain PyTorch in float64."""

from __future__ import annotations

import copy

import pytest
import torch

import fastflow as ff
from fastflow import ops
from fastflow.kernels import cpu

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=f"no native code: {cpu.why_unavailable()}")


def model_and_rows(rows=150, method="midpoint", precision=None, **options):
    """float64."""
    torch.manual_seed(0)
    settings = dict(hidden=(24, 40), time_embedding=ff.PowerFourier(6), architecture=ff.MLP(), num_steps=5)
    model = ff.SuccessorFlow(3, 2, gamma=0.9, method=method, precision=precision, **{**settings, **options}).double()
    with torch.no_grad():
        for p in model.field.parameters():
            p.add_(0.1 * torch.randn_like(p))
    t = torch.rand(rows, dtype=torch.float64)
    t[:2] = torch.tensor([0.0, 1.0], dtype=t.dtype)[:rows]
    return model, torch.randn(rows, 3, dtype=t.dtype), torch.randn(rows, 5, dtype=t.dtype), t


def single(given):
    model, *tensors = given
    return [copy.deepcopy(model).float(), *(x.float() for x in tensors)]


def plainly(given, backend="reference"):
    model, x, cond, t = given
    steps = dict(num_steps=model.num_steps, method=model.method, t_1=t, backend=backend, precision=model.precision)
    with torch.no_grad():
        x = ff.integrate(model.field, x, cond, **steps)
        step = dict(num_steps=1, t_0=t, t_1=t + 1, backend=backend, precision=model.precision)
        return x, ff.integrate(model.field, x, cond, **step) - x


@pytest.mark.parametrize("rows", [2, 150])
@pytest.mark.parametrize("method", ["euler", "midpoint", "heun"])
@pytest.mark.parametrize("precision", [None, "bf16"])
def test_arrival_errs_no_more_than_pytorchs(rows, method, precision):
    exact = model_and_rows(rows, method, precision)
    mine = single(exact)
    exact[0].precision = None
    truth, eager = plainly(exact), plainly(single(exact) if precision is None else mine)
    with torch.no_grad():
        model, x, cond, t = mine
        found = ops.plain_arrival(model.field, x, cond, t, 5, method, None, precision)
    assert all(torch.equal(a, b) for a, b in zip(found, model.arrive(x, cond, t), strict=True))
    assert torch.equal(found[0], model.walk(x, cond, t).detach())
    for a, b, expected in zip(found, eager, truth, strict=True):
        error, other = ((got - expected).norm() for got in (a, b))
        assert error <= 2 * other + 3e-7 * expected.norm()
        assert not a.requires_grad


def test_what_is_special_takes_the_ordinary_way():
    model, x, cond, t = single(model_and_rows())
    steps = (5, "midpoint", None, None)
    with torch.no_grad():
        assert ops.plain_arrival(model.field, x, cond, t, *steps) is not None
        assert ops.plain_arrival(model.field, x, cond, t[:1], *steps) is None
        assert ops.plain_arrival(model.field, x, cond, t, 5, "midpoint", "reference", None) is None
        for name in ("num_steps", "method"):
            given = {"num_steps": 5, "method": "midpoint", name: 0 if name == "num_steps" else "best"}
            with pytest.raises(ValueError, match=name):
                ops.plain_arrival(model.field, x, cond, t, **given, backend=None, precision=None)
        with torch.autocast("cpu", torch.bfloat16):
            assert ops.plain_arrival(model.field, x, cond, t, *steps) is None
    assert ops.plain_arrival(model.field, x, cond, t, *steps) is None  # parameters want gradients
    for special in (model_and_rows(), single(model_and_rows(hidden=(8, 8), architecture=ff.FiLMUNet((8,))))):
        model, x, cond, t = special
        found, expected = model.arrive(x, cond, t), plainly(special)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="t_1"):
        model.arrive(x, cond, t[:3])
