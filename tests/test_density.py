"""Log-densities of flows whose law is known, and the probability flow of a diffusion."""

from __future__ import annotations

import functools
import math

import pytest
import torch

import fastflow as ff
from fastflow import density
from fastflow.density import alpha_bar, diffusion_velocity, log_prob

MEAN = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
FACTOR = torch.tensor([[0.8, 0.0, 0.0], [0.3, 0.5, 0.0], [-0.4, 0.1, 1.2]], dtype=torch.float64)
COVARIANCE = FACTOR @ FACTOR.T
LAW = torch.distributions.MultivariateNormal(MEAN, COVARIANCE)


def gaussian_velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The velocity of the straight path from N(0, I) to N(MEAN, COVARIANCE), in closed form."""
    t = t[:, None, None]
    mean, covariance, eye = (v.to(x.dtype) for v in (MEAN, COVARIANCE, torch.eye(3)))
    gain = (t * covariance - (1 - t) * eye) @ torch.linalg.inv(t**2 * covariance + (1 - t) ** 2 * eye)
    return mean + (gain @ (x - t[:, :, 0] * mean)[:, :, None])[:, :, 0]


def data(num: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    draws = torch.randn(num, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (MEAN + draws @ FACTOR.T).to(dtype)


def field(dtype: torch.dtype = torch.float64) -> ff.VelocityField:
    net = ff.VelocityField(ff.FieldSpec(3, 2, (32, 32), activation="silu"), dtype=dtype)
    net.reset_parameters(torch.Generator().manual_seed(0))
    return net


# Flows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, order", [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_gaussian_to_its_order(method, order):
    x = data(64)
    steps = (40, 80, 160)
    errors = [
        (log_prob(gaussian_velocity, x, num_steps=n, method=method) - LAW.log_prob(x)).abs().mean() for n in steps
    ]
    measured = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert measured == pytest.approx([order] * 2, abs=0.2)
    assert errors[-1] < (0.03 if method == "euler" else 1e-3)


def test_float32_follows_float64():
    x = data(64, dtype=torch.float32)
    found = log_prob(gaussian_velocity, x, num_steps=20)
    assert found.dtype == torch.float32 and found.shape == (64,)
    assert torch.allclose(found.double(), log_prob(gaussian_velocity, x.double(), num_steps=20), atol=1e-4)


def test_density_integrates_to_one():
    """Of a network nobody trained, in two dimensions, on a grid: no closed form is behind this one."""
    net = ff.VelocityField(ff.FieldSpec(2, 0, (16, 16), activation="tanh"), dtype=torch.float64)
    net.reset_parameters(torch.Generator().manual_seed(1))
    axis = torch.linspace(-8, 8, 81, dtype=torch.float64)
    total = log_prob(net, torch.cartesian_prod(axis, axis), num_steps=20).exp().sum() * 0.2**2
    assert total.item() == pytest.approx(1, abs=1e-3)


def test_velocity_field_with_conditions():
    """Against the log-determinant of the forward walk's Jacobian, which knows nothing of divergences."""
    net, x, cond = field(), data(5), data(5, seed=1)[:, :2]

    def backwards(row: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        for k in range(400):
            t_mid = torch.tensor(1 - (k + 0.5) / 400, dtype=row.dtype)
            middle = row - net(row, t_mid + 0.5 / 400, cond) / 800
            row = row - net(middle, t_mid, cond) / 400
        return row

    found = log_prob(net, x, cond=cond, num_steps=400)
    for i in range(5):
        noise = backwards(x[i], cond[i])
        jacobian = torch.autograd.functional.jacobian(lambda row, i=i: backwards(row, cond[i]), x[i])
        expected = -0.5 * noise.square().sum() - 1.5 * math.log(2 * math.pi) + torch.linalg.slogdet(jacobian)[1]
        assert found[i].item() == pytest.approx(expected.item(), abs=1e-5)
    assert all(p.grad is None for p in net.parameters())


def test_chunks_and_closures_change_nothing():
    net, x, cond = field(), data(23), data(23, seed=1)[:, :2]
    options = dict(num_steps=4, divergence="hutchinson", probes=2)

    def found(velocity=net, **more):
        return log_prob(velocity, x, **options, generator=torch.Generator().manual_seed(3), **more)

    whole = found(cond=cond)
    assert torch.allclose(found(cond=cond, chunk=5), whole, rtol=0, atol=1e-12)
    assert torch.equal(found(lambda x, t: net(x, t, cond)), whole)
    assert log_prob(net, x[:0], cond=cond[:0], num_steps=4).shape == (0,)


def test_without_gradients_and_in_inference_mode():
    net, x, cond = field(), data(8), data(8, seed=1)[:, :2]
    expected = log_prob(net, x.clone().requires_grad_(), cond=cond, num_steps=3)
    assert not expected.requires_grad
    with torch.no_grad():
        assert torch.equal(log_prob(net, x, cond=cond, num_steps=3), expected)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert torch.equal(log_prob(net, x.clone(), cond=cond.clone(), num_steps=3), expected)


def test_hutchinson_is_right_on_average():
    net, x, cond = field(), data(4), data(4, seed=1)[:, :2]
    exact = log_prob(net, x, cond=cond, num_steps=2)
    generator = torch.Generator().manual_seed(0)
    rows, conds = x.repeat(5000, 1), cond.repeat(5000, 1)
    found = log_prob(net, rows, cond=conds, num_steps=2, divergence="hutchinson", generator=generator).view(5000, 4)
    error = found.std(0) / math.sqrt(5000)
    assert (found.std(0) > 1e-3).all()
    assert ((found.mean(0) - exact).abs() < 4 * error).all()
    # More probes: a variance that many times smaller.
    many = log_prob(net, rows, cond=conds, num_steps=2, divergence="hutchinson", probes=4, generator=generator)
    ratio = (many.view(5000, 4).var(0) / found.var(0)).mean().item()
    assert ratio == pytest.approx(0.25, rel=0.1)


def test_hutchinson_needs_one_probe_where_the_jacobian_is_diagonal():
    """A sign squared is 1."""
    scale = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    x = data(6)
    exact = log_prob(lambda x, t: scale * x, x, num_steps=5)
    estimate = log_prob(
        lambda x, t: scale * x, x, num_steps=5, divergence="hutchinson", generator=torch.Generator().manual_seed(0)
    )
    assert torch.allclose(estimate, exact, rtol=0, atol=1e-12)
    # dx/dt = a x: x_1 ~ N(0, exp(2 a)).
    truth = torch.distributions.Normal(torch.zeros(3, dtype=torch.float64), scale.exp()).log_prob(x).sum(1)
    assert torch.allclose(log_prob(lambda x, t: scale * x, x, num_steps=400), truth, rtol=0, atol=1e-3)


# Diffusions ---------------------------------------------------------------------------------------------------------


def gaussian_noise(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """eps = -sqrt(1 - alpha_bar) score of the data N(MEAN, COVARIANCE) at a noise level."""
    share = alpha_bar(level)[:, None]
    covariance = share[..., None] * COVARIANCE + (1 - share[..., None]) * torch.eye(3, dtype=x.dtype)
    score = -torch.linalg.solve(covariance, (x - share.sqrt() * MEAN)[..., None])[..., 0]
    return -(1 - share).sqrt() * score


def test_schedule():
    level = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    expected = [1.0, math.exp(-(0.05 + 19.9 / 8)), math.exp(-(0.1 + 19.9 / 2))]
    assert alpha_bar(level).tolist() == pytest.approx(expected, rel=1e-12)
    # d log(alpha_bar) / ds = -beta(s): the rate at which the flow takes the data away.
    level.requires_grad_()
    (slope,) = torch.autograd.grad(alpha_bar(level).log().sum(), level)
    assert slope.tolist() == pytest.approx([-0.1, -(0.1 + 19.9 / 2), -20.0], rel=1e-12)


def test_probability_flow_moves_the_marginals():
    """The continuity equation, dp/dt + div(p v) = 0, at points and times, by finite differences in t: p_t is
    N(sqrt(a) MEAN, a COVARIANCE + (1 - a) I) with a = alpha_bar(1 - t)."""
    velocity = functools.partial(diffusion_velocity, gaussian_noise)

    def log_p(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        share = alpha_bar(1 - t)
        law = torch.distributions.MultivariateNormal(
            share.sqrt() * MEAN, share * COVARIANCE + (1 - share) * torch.eye(3, dtype=x.dtype)
        )
        return law.log_prob(x)

    for time in (0.05, 0.4, 0.8, 0.97):
        x = data(7, seed=3).requires_grad_()
        t = torch.full((7,), time, dtype=x.dtype)
        v = velocity(x, t)
        div = sum(torch.autograd.grad(v[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(3))
        (score,) = torch.autograd.grad(log_p(x, t[0]).sum(), x)
        rate = (log_p(x, t[0] + 1e-6) - log_p(x, t[0] - 1e-6)) / 2e-6
        assert torch.allclose(rate + (v * score).sum(1) + div, torch.zeros(7, dtype=x.dtype), atol=1e-5)


def test_diffusion_of_a_gaussian():
    x = data(200)
    found = log_prob(functools.partial(diffusion_velocity, gaussian_noise), x, num_steps=400)
    # N(0, I) stands for the true end, whose mean is .0066 MEAN.
    assert (found - LAW.log_prob(x)).abs().max() < 0.05
    assert (found - LAW.log_prob(x)).mean().abs() < 2e-3


def test_diffusion_error_is_that_of_the_source_alone():
    """The exact flow maps linearly; with N(0, I) in place of the true source the density follows in closed form."""
    std = torch.tensor([0.5, 1.3, 2.0], dtype=torch.float64)

    def noise(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        share = alpha_bar(level)[:, None]
        return (1 - share).sqrt() * (x - share.sqrt() * MEAN) / (share * std**2 + 1 - share)

    share = alpha_bar(torch.ones((), dtype=torch.float64))
    end = (share * std**2 + 1 - share).sqrt()
    x = MEAN + std * torch.randn(100, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at_noise = share.sqrt() * MEAN + end / std * (x - MEAN)
    expected = (-0.5 * at_noise.square() - 0.5 * math.log(2 * math.pi) + (end / std).log()).sum(1)
    errors = []
    for steps in (200, 400):
        found = log_prob(functools.partial(diffusion_velocity, noise, min_level=1e-5), x, num_steps=steps)
        errors.append((found - expected).abs().max().item())
    assert errors[1] < 2e-3
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.4)


def test_diffusion_in_float32_near_data():
    velocity = functools.partial(diffusion_velocity, lambda x, level: x * level[..., None])
    x, t = data(4, dtype=torch.float32), torch.ones(4)
    assert torch.allclose(velocity(x, t).double(), velocity(x.double(), t.double()), rtol=1e-3)
    assert torch.isfinite(velocity(x, t)).all()
    # Any leading shape.
    assert torch.equal(velocity(x.view(2, 2, 3), t.view(2, 2)).view(4, 3), velocity(x, t))


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(num_steps=0), "num_steps: expected at least 1, got 0"),
        (dict(method="rk4"), "method: expected one of .*midpoint.*, got 'rk4'"),
        (dict(divergence="none"), "divergence: expected exact or hutchinson, got 'none'"),
        (dict(divergence="hutchinson"), "generator: expected a torch.Generator"),
        (dict(probes=0), "probes: expected at least 1"),
        (dict(chunk=0), "chunk: expected at least 1"),
        (dict(cond=torch.zeros(3, 1)), r"cond: expected \[4, C\], got \[3, 1\]"),
        (dict(x_1=torch.zeros(4)), r"x_1: expected \[N, D\], got \[4\]"),
        (dict(velocity=lambda x, t: x[:, :1]), r"velocity: expected a result of \[4, 3\], got \[4, 1\]"),
        (dict(velocity=lambda x, t: x.detach()), "velocity: expected a result with a gradient to x"),
        (dict(velocity=torch.no_grad()(gaussian_velocity)), "velocity: expected a result with a gradient to x"),
        (dict(velocity=lambda x, t: torch.ones(4, 3, requires_grad=True) * 2), "with a gradient to x"),
    ],
)
def test_errors(changed, message):
    arguments = dict(velocity=gaussian_velocity, x_1=torch.zeros(4, 3), num_steps=2) | changed
    with pytest.raises(ValueError, match=message):
        log_prob(arguments.pop("velocity"), arguments.pop("x_1"), **arguments)


def test_other_errors():
    with pytest.raises(TypeError, match=r"x_1: expected a floating Tensor, got torch\.int64"):
        log_prob(gaussian_velocity, torch.zeros(4, 3).long(), num_steps=2)
    with pytest.raises(ValueError, match="beta_min"):
        diffusion_velocity(gaussian_noise, torch.zeros(1, 3), torch.zeros(1), beta_min=2.0, beta_max=1.0)
    with pytest.raises(ValueError, match=r"min_level: expected a number in \(0, 1\), got 0"):
        diffusion_velocity(gaussian_noise, torch.zeros(1, 3), torch.zeros(1), min_level=0)
    assert (density.BETA_MIN, density.BETA_MAX) == (0.1, 20.0)
