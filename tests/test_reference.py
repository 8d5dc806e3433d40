"""The reference against closed forms, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import assert_close_rms
from hypothesis import given
from hypothesis import strategies as st

import fastflow as ff
from fastflow import reference

D = torch.float64


def linear_field(matrix: torch.Tensor) -> ff.VelocityField:
    """A ReLU field that is exactly v(x, t) = x @ matrix: x = relu(x) - relu(-x)."""
    d = matrix.shape[0]
    field = ff.VelocityField(ff.FieldSpec(d, 0, (2 * d,), activation="relu"), dtype=D)
    with torch.no_grad():
        field.layers[0].weight.copy_(torch.cat([torch.eye(d, dtype=D), torch.zeros(1, d, dtype=D)])[:, :d].repeat(1, 2))
        field.layers[0].weight[:, d:] *= -1
        field.layers[1].weight.copy_(torch.cat([matrix, -matrix]))
    return field


def time_field() -> ff.VelocityField:
    """v(x, t) = t."""
    field = ff.VelocityField(ff.FieldSpec(1, 0, (1,), activation="relu"), dtype=D)
    with torch.no_grad():
        field.layers[0].weight.copy_(torch.tensor([[0.0], [1.0]]))
        field.layers[1].weight.fill_(1.0)
    return field


@pytest.mark.parametrize("num_steps", [1, 2, 7, 64])
def test_euler_of_a_linear_field_is_a_matrix_power(num_steps):
    matrix = torch.randn(3, 3, dtype=D)
    x = torch.randn(5, 3, dtype=D)
    walked = ff.integrate(linear_field(matrix), x, num_steps=num_steps, backend="reference")
    step = torch.eye(3, dtype=D) + matrix / num_steps
    assert_close_rms("x_1", walked, x @ torch.linalg.matrix_power(step, num_steps), 1e-13)


def test_euler_converges_with_order_one_to_the_matrix_exponential():
    matrix = torch.randn(3, 3, dtype=D)
    x = torch.randn(5, 3, dtype=D)
    field, exact = linear_field(matrix), x @ torch.linalg.matrix_exp(matrix)
    steps = np.array([64, 128, 256, 512])
    errors = [(ff.integrate(field, x, num_steps=int(k), backend="reference") - exact).norm().item() for k in steps]
    slope = np.polyfit(np.log2(1.0 / steps), np.log2(errors), 1)[0]
    assert slope == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("t_1", [1.0, 0.3])
@pytest.mark.parametrize("num_steps", [1, 3, 10])
def test_steps_start_at_left_end_points(num_steps, t_1):
    walked = ff.integrate(time_field(), torch.zeros(1, 1, dtype=D), num_steps=num_steps, t_1=t_1, backend="reference")
    expected = sum(t_1 * k / num_steps for k in range(num_steps)) * t_1 / num_steps
    assert walked.item() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("num_steps", [1, 2, 10])
def test_a_straight_path_is_exact_for_any_number_of_steps(num_steps):
    """The velocity x_1 - x_0 does not depend on x or t, so K changes nothing."""
    field = ff.VelocityField(ff.FieldSpec(2, 0, (4,), activation="relu"), dtype=D)
    with torch.no_grad():
        field.layers[0].weight.zero_()
        field.layers[1].weight.zero_()
        field.layers[1].bias.copy_(torch.tensor([2.0, -3.0]))
    x = torch.randn(4, 2, dtype=D)
    walked = ff.integrate(field, x, num_steps=num_steps, backend="reference")
    assert_close_rms("x_1", walked, x + field.layers[1].bias, 1e-14)


def test_interpolate_runs_from_noise_to_data():
    x_0, x_1 = torch.randn(3, 4, 2, dtype=D), torch.randn(3, 4, 2, dtype=D)
    for t, end in ((0.0, x_0), (1.0, x_1)):
        x_t, velocity = reference.interpolate(x_0, x_1, torch.full((3, 4), t, dtype=D))
        assert torch.equal(x_t, end)
        assert torch.equal(velocity, x_1 - x_0)


def test_hl_gauss_is_the_normalised_mass_between_edges():
    low, high, bins, sigma = -101.0, 1.0, 51, 16.0
    width = (high - low) / (bins - 1)
    z = [-101.0, -60.3, -1.0, 1.0, 30.0]
    got = reference.hl_gauss(torch.tensor(z, dtype=D).unsqueeze(-1), low, high, bins, sigma)
    for row, value in zip(got, z):
        cdf = [math.erf((low + i * width - value) / (math.sqrt(2) * sigma * width)) for i in range(bins)]
        expected = [(cdf[i + 1] - cdf[i]) / (cdf[-1] - cdf[0]) for i in range(bins - 1)]
        np.testing.assert_allclose(row.numpy(), expected, rtol=1e-12)


@given(
    z=st.floats(allow_nan=False, allow_infinity=False, width=32),
    sigma=st.sampled_from([0.1, 3.0, 16.0, 100.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_hl_gauss_of_any_finite_number_is_a_distribution(z, sigma, dtype):
    features = reference.hl_gauss(torch.tensor([[z]], dtype=dtype), -201.0, 1.0, 51, sigma)
    assert torch.isfinite(features).all()
    assert features.min() >= 0
    assert features.sum().item() == pytest.approx(1.0, abs=1e-3)


def test_time_embeddings():
    t = torch.rand(7, dtype=D)
    assert torch.equal(ff.RawTime().features(t), t[:, None])
    assert torch.equal(ff.Cosine().features(t), t.cos()[:, None])
    expected = torch.stack([torch.cos(i * math.pi * t) for i in range(1, 65)], -1)
    assert_close_rms("cos(i pi t)", ff.CosineFourier(64).features(t), expected, 1e-14)


def test_scaled_embedding_maps_the_range_to_the_unit_interval():
    x = torch.tensor([[-101.0], [-50.0], [1.0]], dtype=D)
    assert_close_rms("scaled", ff.Scaled(-101.0, 1.0).features(x), (x + 101) / 102, 1e-15)


@pytest.mark.parametrize("norm", ["layer", None])
@pytest.mark.parametrize("activation", ["gelu_tanh", "silu", "relu"])
def test_velocity_is_the_network_written_out_in_numpy(activation, norm):
    """Dense -> activation -> LayerNorm, inputs ordered cond, state, time, one network per member."""
    spec = ff.FieldSpec(
        1,
        3,
        (6, 5),
        2,
        activation,
        norm,
        state_embedding=ff.HLGauss(-2.0, 2.0, 5, 1.0),
        time_embedding=ff.CosineFourier(3),
    )
    field = ff.VelocityField(spec, dtype=D)
    with torch.no_grad():
        for p in field.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    x, t, cond = torch.randn(4, 1, dtype=D), torch.rand(4, dtype=D), torch.randn(4, 3, dtype=D)
    got = field(x, t, cond).detach().numpy()
    act = {
        "gelu_tanh": lambda u: 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3))),
        "silu": lambda u: u / (1 + np.exp(-u)),
        "relu": lambda u: np.maximum(u, 0),
    }[activation]
    state = reference.hl_gauss(x, -2.0, 2.0, 5, 1.0).numpy()
    time = np.cos(np.pi * t.numpy()[:, None] * np.arange(1, 4))
    weights = {name: p.detach().numpy() for name, p in field.named_parameters()}
    for e in range(2):
        h = np.concatenate([cond.numpy(), state, time], 1)
        for i in range(2):
            h = act(h @ weights[f"layers.{i}.weight"][e] + weights[f"layers.{i}.bias"][e])
            if norm:
                h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-6)
                h = h * weights[f"norms.{i}.weight"][e] + weights[f"norms.{i}.bias"][e]
        expected = h @ weights["layers.2.weight"][e] + weights["layers.2.bias"][e]
        np.testing.assert_allclose(got[e], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_loss_is_the_weighted_mean_of_squared_velocity_errors(reduction):
    field = linear_field(torch.eye(2, dtype=D) * 2)  # v = 2 x
    x_0, x_1, t, w = (
        torch.randn(5, 2, dtype=D),
        torch.randn(5, 2, dtype=D),
        torch.rand(5, dtype=D),
        torch.rand(5, dtype=D),
    )
    got = ff.flow_matching_loss(field, x_0, x_1, t, weight=w, reduction=reduction, backend="reference")
    x_t = (1 - t[:, None]) * x_0 + t[:, None] * x_1
    rows = w * (2 * x_t - (x_1 - x_0)).square().mean(1)
    expected = {"none": rows, "mean": rows.mean(), "sum": rows.sum()}[reduction]
    assert_close_rms(reduction, got, expected, 1e-13)


def test_velocity_matching_is_flow_matching_at_the_path_s_point():
    field = ff.VelocityField(ff.FieldSpec(3, 2, (8,), 2, norm="layer"), dtype=D)
    x_0, x_1, cond = torch.randn(4, 3, dtype=D), torch.randn(4, 3, dtype=D), torch.randn(4, 2, dtype=D)
    t = torch.rand(4, dtype=D)
    x_t, velocity = reference.interpolate(x_0, x_1, t)
    on_path = ff.flow_matching_loss(field, x_0, x_1, t, cond, reduction="none", backend="reference")
    at_point = ff.velocity_matching_loss(field, x_t, t, velocity, cond, reduction="none", backend="reference")
    assert torch.equal(on_path, at_point)


@pytest.mark.parametrize("norm", ["layer", None])
def test_gradients_of_the_loss_are_exact(norm):
    spec = ff.FieldSpec(1, 2, (4, 4), 2, norm=norm, state_embedding=ff.HLGauss(-2.0, 2.0, 5, 1.0))
    field = ff.VelocityField(spec, dtype=D)
    names = [name for name, _ in field.named_parameters()]

    def loss(x_0, x_1, t, cond, weight, *parameters):
        with torch.nn.utils.stateless._reparametrize_module(field, dict(zip(names, parameters))):
            return ff.flow_matching_loss(field, x_0, x_1, t, cond, weight=weight, backend="reference")

    inputs = [torch.randn(3, 2, 1), torch.randn(3, 2, 1), torch.rand(3, 2), torch.randn(3, 2), torch.rand(3, 2)]
    inputs = [x.to(D).requires_grad_() for x in inputs] + list(field.parameters())
    assert torch.autograd.gradcheck(loss, inputs)


def test_several_starts_per_row_are_independent_walks():
    field = ff.VelocityField(ff.FieldSpec(2, 3, (8, 8), 2, norm="layer"), dtype=D)
    x, cond = torch.randn(4, 5, 2, dtype=D), torch.randn(4, 3, dtype=D)
    together = ff.integrate(field, x, cond, num_steps=3, backend="reference")
    apart = torch.stack([ff.integrate(field, x[:, s], cond, num_steps=3, backend="reference") for s in range(5)], 2)
    assert_close_rms("x_1", together, apart, 1e-13)
