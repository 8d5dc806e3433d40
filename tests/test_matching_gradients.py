"""A flow-matching loss with its gradients in one pass of native code, against autograd in float64."""

from __future__ import annotations

import copy

import pytest
import torch

import fastflow as ff
from fastflow.kernels import cpu
from fastflow.matching_gradients import matching_gradients, velocity_gradients

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=f"no native code: {cpu.why_unavailable()}")

SPECS = {
    "floq": ff.FieldSpec(
        1,
        6,
        (24, 40),
        ensemble=2,
        norm="layer",
        activation="gelu_tanh",
        state_embedding=ff.HLGauss(-10.0, 1.0, 11, 3.0),
        time_embedding=ff.Cosine(),
    ),
    "residual": ff.FieldSpec(
        1, 4, (16, 16, 16), ensemble=3, norm="layer", norm_first=True, architecture=ff.ResidualMLP(2)
    ),
    "scaled_endpoint": ff.FieldSpec(
        1, 5, (16,), ensemble=1, state_embedding=ff.Scaled(-5.0, 5.0), prediction="endpoint"
    ),
    "policy": ff.FieldSpec(3, 5, (24, 40), activation="silu"),
    "wide": ff.FieldSpec(6, 17, (160, 130), time_embedding=ff.PowerFourier(8)),
}


def problem(spec, rows, samples, many, seed=0):
    """float64 field and inputs."""
    generator = torch.Generator().manual_seed(seed)
    field = ff.VelocityField(spec)
    field.reset_parameters(generator)
    field = field.double()
    draw = {"generator": generator, "dtype": torch.float64}
    with torch.no_grad():
        for p in field.parameters():
            p.add_(0.1 * torch.randn(p.shape, **draw))
    x_0, cond = torch.randn(rows, samples, spec.state_dim, **draw), torch.randn(rows, spec.cond_dim, **draw)
    x_1 = torch.randn(*((rows, samples) if many else (rows,)), spec.state_dim, **draw)
    return field, x_0, x_1, 0.98 * torch.rand(rows, samples, **draw), cond


def single(given):
    field, *tensors = given
    return [copy.deepcopy(field).float(), *(x.float() for x in tensors)]


def by_autograd(given, error, scale, precision=None):
    field, x_0, x_1, t, cond = given
    members = field.spec.ensemble
    if members is not None:
        x_0 = x_0.expand(members, *x_0.shape)
    x_1 = x_1 if x_1.dim() == 3 else x_1.unsqueeze(1).expand(given[1].shape)
    loss = ff.flow_matching_loss(field, x_0, x_1, t, cond, error=error, backend="reference", precision=precision)
    return loss.detach(), torch.autograd.grad(scale * loss, field.parameter_list())


def gradients_of(field):
    return [torch.full_like(p, torch.nan) for p in field.parameter_list()]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("error", ["velocity", "noise", "endpoint"])
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_gradients_err_no_more_than_pytorchs(name, error, scale):
    every: tuple[list, ...] = ([], [], [])
    for seed, (rows, samples, many) in enumerate(
        ((1, 1, True), (37, 8, True), (256, 1, False), (130, 5, False), (97, 1, True), (300, 4, True))
    ):
        exact = problem(SPECS[name], rows, samples, many, seed)
        mine, eager = single(exact), single(exact)
        truth, theirs = by_autograd(exact, error, scale), by_autograd(eager, error, scale)
        found = gradients_of(mine[0])
        loss = matching_gradients(*mine, scale=scale, gradients=found, error=error)
        assert loss.shape == () and not loss.requires_grad
        size = sum(g.square().sum() for g in truth[1]).sqrt()
        assert abs(loss - truth[0]) <= 2 * abs(theirs[0] - truth[0]) + 5e-7 * abs(truth[0])
        for of_all, of_one in zip(every, (found, theirs[1], truth[1]), strict=True):
            of_all.append(torch.cat([g.double().flatten() for g in of_one]) / size)
    flat = [torch.cat(of_all) for of_all in every]
    error_of, other = ((x - flat[2]).square().mean().sqrt() for x in flat[:2])
    assert error_of <= 2 * other + 3e-7 * flat[2].square().mean().sqrt()


@pytest.mark.parametrize("name", ["floq", "policy"])
def test_products_of_bfloat16_err_no_more_than_pytorchs(name):
    exact = problem(SPECS[name], 500, 2, True)
    mine, eager = single(exact), single(exact)
    truth = by_autograd(exact, "velocity", 1.0)[1]
    found = gradients_of(mine[0])
    assert matching_gradients(*mine, gradients=found, precision="bf16") is not None
    theirs = by_autograd(eager, "velocity", 1.0, "bf16")[1]
    size, error_of, other = (
        torch.cat([(g.double() - t * (of is not truth)).flatten() for g, t in zip(of, truth, strict=True)]).norm()
        for of in (truth, found, theirs)
    )
    assert error_of <= 2 * other + 3e-7 * size and other > 1e-5 * size


def test_threads_change_no_bit():
    given = single(problem(SPECS["floq"], 700, 4, False))
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found = gradients_of(given[0])
            results.append([matching_gradients(*given, gradients=found), *found])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_is_not_covered_is_left_alone():
    field, x_0, x_1, t, cond = single(problem(SPECS["floq"], 8, 2, True))
    gradients = [torch.zeros_like(p) for p in field.parameter_list()]

    def left(*given, **options):
        return matching_gradients(*given, gradients=gradients, **options) is None

    given = (x_0, x_1, t, cond)
    assert left(field, *given, backend="reference") and left(field, *given, error="value")
    assert left(field, x_0[:, :1], x_1, t, cond) and left(field, x_0, x_1, t[:, 0], cond)
    assert left(field, x_0, x_1.clone().requires_grad_(), t, cond) and left(field, *(x.double() for x in given))
    assert left(field, *(x[:0] for x in given))
    assert left(copy.deepcopy(field).double(), *(x.double() for x in given))
    with torch.no_grad():
        assert left(field, *given)
    with torch.autocast("cpu", torch.bfloat16):
        assert left(field, *given)
    film = ff.VelocityField(ff.FieldSpec(1, 6, (8, 8, 8), architecture=ff.FiLMUNet()))
    assert left(film, *given)
    field.layers[0].weight.requires_grad_(False)
    assert left(field, *given)
    assert not any(g.any() for g in gradients)
    field.layers[0].weight.requires_grad_(True)
    assert not left(field, *given)


# Errors at given points -----------------------------------------------------------------------------------------------

SINGLE = {name: SPECS[name] for name in ("policy", "wide")} | {
    name: ff.FieldSpec(2, 5, (16, 24), norm="layer", prediction=name) for name in ("endpoint", "noise")
}


def problem_at_points(spec, rows, samples, seed=0):
    """float64 field and inputs, with weights of rows."""
    field, x_t, velocity, t, cond = problem(spec, rows, samples, True, seed)
    return field, x_t, 0.02 + t, velocity, cond, 2 * torch.rand(t.shape, dtype=t.dtype)


def at_points_by_autograd(given, scale, precision=None):
    *given, weight = given
    options = dict(reduction="none", backend="reference", precision=precision)
    rows = ff.velocity_matching_loss(*given, **options)
    loss = (weight * rows).mean()
    return loss.detach(), rows.detach(), torch.autograd.grad(scale * loss, given[0].parameter_list())


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("precision", [None, "bf16"])
def test_gradients_at_given_points_err_no_more_than_pytorchs(name, precision):
    every: tuple[list, ...] = ([], [], [])
    for seed, (rows, samples) in enumerate(((1, 1), (37, 8), (256, 2), (130, 5), (97, 1), (1300, 1))):
        exact = problem_at_points(SINGLE[name], rows, samples, seed)
        mine, eager = single(exact), single(exact)
        truth, theirs = at_points_by_autograd(exact, 3.0), at_points_by_autograd(eager, 3.0, precision)
        found = gradients_of(mine[0])
        options = dict(weight=mine.pop(), scale=3.0, gradients=found, precision=precision)
        loss, of_rows = velocity_gradients(*mine, **options)
        assert loss.shape == () and of_rows.shape == (rows, samples)
        assert not loss.requires_grad and not of_rows.requires_grad
        floor = 5e-7 if precision is None else 2e-2
        for x, theirs_, true in zip((loss, of_rows), theirs, truth):
            error, other = ((got - true).square().mean().sqrt() for got in (x, theirs_))
            assert error <= 2 * other + floor * true.square().mean().sqrt()
        size = sum(g.square().sum() for g in truth[2]).sqrt()
        for of_all, of_one in zip(every, (found, theirs[2], truth[2]), strict=True):
            of_all.append(torch.cat([g.double().flatten() for g in of_one]) / size)
    flat = [torch.cat(of_all) for of_all in every]
    error, other = ((x - flat[2]).square().mean().sqrt() for x in flat[:2])
    assert error <= 2 * other + 3e-7 * flat[2].square().mean().sqrt()


def test_what_is_not_covered_at_given_points_is_left_alone():
    *given, weight = single(problem_at_points(SINGLE["policy"], 8, 2))
    gradients = [torch.zeros_like(p) for p in given[0].parameter_list()]

    def left(*given, weight=weight, **options):
        return velocity_gradients(*given, weight=weight, gradients=gradients, **options) is None

    field, x_t, t, velocity, cond = given
    assert left(*given, backend="reference") and left(*given, weight=weight[:, 0]) and left(*given, weight=weight[:1])
    assert left(field, x_t, t, velocity[:, 0], cond) and left(field, x_t[:0], t[:0], velocity[:0], cond[:0])
    assert left(*given, weight=weight.clone().requires_grad_())
    assert left(single(problem(SPECS["floq"], 8, 2, True))[0], *given[1:])
    with torch.no_grad():
        assert left(*given)
    assert not any(g.any() for g in gradients) and not left(*given)
