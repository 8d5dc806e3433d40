"""A plain call on the CPU takes a short way to the native code: the same bits, and only where nothing is special."""

import pytest
import torch

import fastflow as ff
from fastflow import ops
from fastflow.kernels import cpu

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason="no native code")


@pytest.fixture
def short_way(monkeypatch):
    """Whether each call of `integrate` took it."""
    took = []
    short = ops._plain_walk

    def watched(*arguments):
        found = short(*arguments)
        took.append(found is not None)
        return found

    monkeypatch.setattr(ops, "_plain_walk", watched)
    return took


@pytest.mark.parametrize("ensemble", [None, 2])
@pytest.mark.parametrize("method", ["euler", "midpoint"])
@pytest.mark.parametrize("precision", [None, "bf16"])
def test_short_way_gives_the_same_bits(ensemble, method, precision, short_way):
    generator = torch.Generator().manual_seed(3)
    hl = ff.HLGauss(-1.0, 1.0, 11, 2.0)
    spec = ff.FieldSpec(1, 4, (16, 16), ensemble=ensemble, norm="layer", state_embedding=hl)
    field = ff.VelocityField(spec)
    field.reset_parameters(generator)
    x_0 = torch.randn(*([5] if ensemble is None else [2, 5, 3]), 1, generator=generator)
    cond = torch.randn(5, 4, generator=generator)
    options = dict(num_steps=3, method=method, t_0=0.1, t_1=0.8, precision=precision)
    with torch.no_grad():
        short = ff.integrate(field, x_0, cond, **options)
    assert short_way == [True]
    long = ff.integrate(field, x_0, cond, **options)
    assert short_way == [True, False] and long.requires_grad
    assert torch.equal(short, long)


@pytest.mark.parametrize("ensemble", [None, 2])
@pytest.mark.parametrize("per_member", [False, True])
def test_short_way_of_several_fields_gives_the_same_bits(ensemble, per_member, short_way):
    generator = torch.Generator().manual_seed(3)
    fields = [ff.VelocityField(ff.FieldSpec(2, 4, (16, 16), ensemble=ensemble, norm="layer")) for _ in range(3)]
    for field in fields:
        field.reset_parameters(generator)
    members = 3 * (ensemble or 1)
    x_0 = torch.randn(members, 5, 3, 2, generator=generator)
    cond = torch.randn(*([members, 5] if per_member else [5]), 4, generator=generator)
    with torch.no_grad():
        short = ff.integrate(fields, x_0, cond, num_steps=3)
        assert short_way == [True]
        for bad in ({"cond": cond.expand(2, *cond.shape)}, {"x_0": x_0[:1]}):
            with pytest.raises(ValueError, match="integrate"):
                ff.integrate(fields, **{"x_0": x_0, "cond": cond, "num_steps": 3, **bad})
    long = ff.integrate(fields, x_0, cond, num_steps=3)
    assert short_way == [True, False, False, False] and torch.equal(short, long)


def test_short_way_is_not_taken_where_anything_is_special(short_way):
    field = ff.VelocityField(ff.FieldSpec(2, 3, (8,)))
    x_0, cond = torch.randn(4, 2), torch.randn(4, 3)
    expected = ff.integrate(field, x_0, cond, num_steps=2, backend="reference")

    class Marked(torch.Tensor):
        pass

    with torch.no_grad():
        cases = [
            dict(backend="reference"),
            dict(t_0=torch.zeros(4)),
            dict(t_1=1),
            dict(x_0=x_0.as_subclass(Marked)),
            dict(x_0=x_0.t().contiguous().t()),
            dict(cond=cond.expand(1, 4, 3)[0].t().contiguous().t()),
        ]
        for case in cases:
            found = ff.integrate(field, **{"x_0": x_0, "cond": cond, "num_steps": 2, **case})
            torch.testing.assert_close(found.as_subclass(torch.Tensor), expected, rtol=1e-5, atol=1e-6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ff.integrate(field, x_0, cond, num_steps=2)
        torch.func.vmap(lambda x: ff.integrate(field, x, cond, num_steps=2))(x_0.expand(2, 4, 2))
    assert len(short_way) >= len(cases) + 2 and not any(short_way)
    for bad in (dict(x_0=x_0[:, :1]), dict(cond=cond[:3]), dict(t_1=float("nan")), dict(precision="fp8")):
        with torch.no_grad(), pytest.raises(ValueError, match="integrate"):
            ff.integrate(field, **{"x_0": x_0, "cond": cond, "num_steps": 2, **bad})
