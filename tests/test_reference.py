"""The reference against closed forms and against the same formulas written out in numpy, in float64."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import assert_close_rms
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import random_field
from test_fields import specs

import fastflow as ff
from fastflow import reference

D = torch.float64


# The field written out ------------------------------------------------------------------------------------------------

erf = np.vectorize(math.erf, otypes=[float])

ACTIVATIONS = {
    "gelu_tanh": lambda u: 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3))),
    "gelu": lambda u: 0.5 * u * (1 + erf(u / np.sqrt(2))),
    "silu": lambda u: u / (1 + np.exp(-u)),
    "relu": lambda u: np.maximum(u, 0),
    "elu": lambda u: np.where(u > 0, u, np.expm1(np.minimum(u, 0))),
    "mish": lambda u: u * np.tanh(np.log1p(np.exp(u))),
    "tanh": np.tanh,
}


def state_features(embedding, x):
    """A state embedding in numpy, x [..., D]."""
    if isinstance(embedding, ff.Identity):
        return x
    low, high = embedding.low, embedding.high
    if isinstance(embedding, ff.Scaled):
        return (x - low) / (high - low)
    edges = np.linspace(low, high, embedding.bins)
    std = embedding.sigma * (edges[1] - edges[0])
    cdf = erf((edges - np.clip(x, low - 3 * std, high + 3 * std)) / (np.sqrt(2) * std))
    return np.diff(cdf) / (cdf[..., -1:] - cdf[..., :1])


def time_features(embedding, t):
    """A time embedding without its MLP in numpy, t [...]."""
    t = t[..., None]
    if isinstance(embedding, ff.RawTime):
        return t
    if isinstance(embedding, ff.Cosine):
        return np.cos(t)
    if isinstance(embedding, ff.CosineFourier):
        return np.cos(np.arange(1, embedding.dim + 1) * np.pi * t)
    i = np.arange(embedding.dim // 2)
    if isinstance(embedding, ff.PowerFourier):
        angles = 2**i * t
    else:
        angles = embedding.scale * t / embedding.max_period ** (2 * i / embedding.dim)
    return np.concatenate([np.cos(angles), np.sin(angles)], -1)


def written_out(spec, weights, x, t, cond):
    """The velocity of one network from its state_dict: x [..., D], t [...], cond [..., C], all numpy."""
    act, n = ACTIVATIONS[spec.activation], len(spec.hidden)

    def dense(name, h):
        return h @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def stack(name, h):
        for i in range(10):
            h = act(dense(f"{name}.{i}", h)) if f"{name}.{i}.weight" in weights else h
        return h

    def normalised(h):
        return (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + spec.norm_eps)

    def layer(i, h):
        h = dense(f"layers.{i}", h)
        if film:
            scale, shift = np.split(dense(f"films.{i}", context), 2, -1)
            return act(normalised(h) * (1 + scale) + shift)
        if spec.norm is None:
            return act(h)
        scale, shift = weights[f"norms.{i}.weight"], weights[f"norms.{i}.bias"]
        return act(normalised(h) * scale + shift) if spec.norm_first else normalised(act(h)) * scale + shift

    film = isinstance(spec.architecture, ff.FiLMUNet)
    state = state_features(spec.state_embedding, x)
    time = stack("time_layers", time_features(spec.time_embedding, t))
    if film:
        context = np.concatenate([stack("encoder", cond), time], -1)
        down = [layer(0, state)]
        for i in range(1, n):
            down.append(layer(i, down[-1]))
        h = layer(n, down.pop())
        for i in range(n + 1, 2 * n):
            h = layer(i, np.concatenate([h, down.pop()], -1))
        out = dense(f"layers.{2 * n}", h)
    else:
        h = layer(0, np.concatenate([cond, state, time], -1))
        block = spec.architecture.depth if isinstance(spec.architecture, ff.ResidualMLP) else 1
        for first in range(1, n, block):
            skip = h
            for i in range(first, first + block):
                h = layer(i, h)
            if isinstance(spec.architecture, ff.ResidualMLP):
                h = skip + h
        out = dense(f"layers.{n}", h)

    out, t = spec.output_scale * out, t[..., None]
    if spec.prediction == "velocity":
        return out
    return (out - x) / np.maximum(1 - t, 1e-3) if spec.prediction == "endpoint" else (x - out) / np.maximum(t, 1e-3)


def expected_velocity(field, x, t, cond=None):
    """`written_out` for each member alone, everything spread over the leading shape of x first."""
    spec = field.spec
    if spec.ensemble is not None and x.dim() == 2:
        x = x.expand(spec.ensemble, *x.shape)
    lead = x.shape[:-1]
    cond = x.new_zeros(0) if cond is None else cond
    rows = [x.numpy(), t.expand(lead).numpy(), cond.expand(*lead, cond.shape[-1]).numpy()]
    weights = {name: p.detach().numpy() for name, p in field.state_dict().items()}
    if spec.ensemble is None:
        return torch.from_numpy(written_out(spec, weights, *rows))
    members = [
        written_out(spec, {name: w[e] for name, w in weights.items()}, *(row[e] for row in rows))
        for e in range(spec.ensemble)
    ]
    return torch.from_numpy(np.stack(members))


def random_rows(spec, batch=4):
    """x_t [B, D] over and beyond the embedding's range, t [B] in [0, 1], cond [B, C]."""
    low, high = getattr(spec.state_embedding, "low", -1.0), getattr(spec.state_embedding, "high", 1.0)
    x = low + (high - low) * (torch.rand(batch, spec.state_dim, dtype=D) * 1.4 - 0.2)
    return x, torch.rand(batch, dtype=D), torch.randn(batch, spec.cond_dim, dtype=D)


CPU = torch.device("cpu")
ORDERS = {"plain": {}, "norm-after": dict(norm="layer"), "norm-before": dict(norm="layer", norm_first=True)}
TIMES = {
    "raw": ff.RawTime(),
    "cosine": ff.Cosine(),
    "cosine-fourier": ff.CosineFourier(3),
    "power-fourier": ff.PowerFourier(6),
    "sinusoidal": ff.Sinusoidal(6, (), max_period=50.0, scale=3.0),
    "sinusoidal-mlp": ff.Sinusoidal(8, (7, 5)),
}
ARCHITECTURES = {
    "mlp": dict(hidden=(16, 12, 8), norm="layer"),
    "residual": dict(hidden=(9,) * 5, norm="layer", norm_first=True, architecture=ff.ResidualMLP(2)),
    "unet": dict(hidden=(10, 7, 4), architecture=ff.FiLMUNet((6, 9))),
}
FIELDS = {
    **{
        f"mlp-{activation}-{order}": ff.FieldSpec(
            1, 3, (16, 12, 8), 2, activation, state_embedding=ff.HLGauss(-2.0, 2.0, 5, 1.0), norm_eps=1e-2, **options
        )
        for activation in ACTIVATIONS
        for order, options in ORDERS.items()
    },
    **{
        f"residual-{depth}x{blocks}-{order}": ff.FieldSpec(
            2, 3, (9,) * (1 + depth * blocks), None, "mish", architecture=ff.ResidualMLP(depth), **options
        )
        for depth, blocks in ((1, 0), (1, 3), (2, 2), (3, 2))
        for order, options in ORDERS.items()
    },
    **{
        f"unet-{len(hidden)}-cond-{cond_dim}": ff.FieldSpec(
            2, cond_dim, hidden, None, "gelu", norm_eps=1e-2, architecture=ff.FiLMUNet((6, 9))
        )
        for hidden in ((5,), (10, 7), (10, 7, 4))
        for cond_dim in (0, 3)
    },
    **{
        f"{name}-{time}-cond-{cond_dim}": ff.FieldSpec(
            3, cond_dim, **options, activation="elu", state_embedding=ff.Scaled(-2.0, 3.0), time_embedding=embedding
        )
        for name, options in ARCHITECTURES.items()
        for time, embedding in TIMES.items()
        for cond_dim in (0, 3)
    },
}


@pytest.mark.parametrize("name", FIELDS)
def test_velocity_is_the_network_written_out_in_numpy(name):
    field = random_field(FIELDS[name], CPU, D)
    rows = random_rows(field.spec)
    assert_close_rms("v", field(*rows), expected_velocity(field, *rows), 1e-12, floor=0)


@settings(max_examples=60)
@given(spec=specs())
def test_velocity_of_any_spec_is_the_network_written_out_in_numpy(spec):
    field = random_field(spec, CPU, D)
    rows = random_rows(spec)
    # Sinusoids of 1000 t carry the rounding of 1000 t.
    assert_close_rms("v", field(*rows), expected_velocity(field, *rows), 1e-11, floor=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("prediction", ["velocity", "endpoint", "noise"])
def test_predictions_become_velocities(name, prediction):
    """Up to both ends of time: there the divisor stays at 1e-3."""
    spec = ff.FieldSpec(2, 3, ensemble=2, **ARCHITECTURES[name], output_scale=0.25)
    field = random_field(dataclasses.replace(spec, prediction=prediction), CPU, D)
    t = torch.tensor([0.0, 5e-4, 1e-3, 2e-3, 0.5, 1 - 2e-3, 1 - 1e-3, 1 - 5e-4, 1.0], dtype=D)
    x, _, cond = random_rows(spec, len(t))
    v = field(x, t, cond)
    assert_close_rms("v", v, expected_velocity(field, x, t, cond), 1e-12, floor=0)

    out = reference.velocity(spec, field.parameter_list(), x.expand(2, *x.shape), t, cond)  # what the head says
    divisor = {
        "velocity": torch.ones(9, dtype=D),
        "endpoint": torch.tensor([1, 1 - 5e-4, 1 - 1e-3, 1 - 2e-3, 0.5, 2e-3, 1e-3, 1e-3, 1e-3], dtype=D),
        "noise": torch.tensor([1e-3, 1e-3, 1e-3, 2e-3, 0.5, 1 - 2e-3, 1 - 1e-3, 1 - 5e-4, 1], dtype=D),
    }[prediction]
    difference = {"velocity": out, "endpoint": out - x, "noise": x - out}[prediction]
    assert_close_rms("v * divisor", v * divisor[:, None], difference, 1e-12, floor=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_output_scale_multiplies_the_head(name):
    spec = ff.FieldSpec(2, 3, **ARCHITECTURES[name])
    field = random_field(spec, CPU, D)
    args = random_rows(spec)
    quarter = reference.velocity(dataclasses.replace(spec, output_scale=-0.25), field.parameter_list(), *args)
    assert torch.equal(quarter, -0.25 * field(*args))


# With E = B = S = 3 every axis that is taken for another still fits.
FORMS = [
    ((3,), (), (3,)),
    ((3,), (3,), (3, 3)),
    ((3, 3), (), (3,)),
    ((3, 3), (3,), (3,)),
    ((3, 3), (3, 1), (1, 3)),
    ((3, 3), (3, 3), (3, 1, 3)),
    ((3, 3), (1, 3), (3, 3, 3)),
    ((3, 3, 3), (), (3, 1, 3)),
    ((3, 3, 3), (3, 3), (3, 3, 1, 3)),
    ((3, 3, 3), (3, 1, 3), (1, 3, 1, 3)),
    ((3, 3, 3), (1, 1, 3), (3, 1, 1, 3)),
    ((3, 3, 3), (3, 3, 3), (3, 3, 3, 3)),
]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("lead, t_shape, cond_shape", FORMS)
def test_times_and_conds_broadcast_to_the_rows(name, lead, t_shape, cond_shape):
    """Of one network, of an ensemble, and of each member alone."""
    t, cond = torch.rand(t_shape, dtype=D), torch.randn(cond_shape, dtype=D)
    x = torch.randn(*lead, 2, dtype=D)
    for ensemble in (None, 3):
        spec = ff.FieldSpec(2, 3, ensemble=ensemble, **ARCHITECTURES[name], time_embedding=TIMES["sinusoidal-mlp"])
        field = random_field(spec, CPU, D)
        v = field(x, t, cond)
        assert_close_rms("v", v, expected_velocity(field, x, t, cond), 1e-12, floor=0)
        if ensemble is None:
            continue
        x = x.expand(3, *x.shape) if x.dim() == 2 else x
        t, cond = t.expand(x.shape[:-1]), cond.expand(*x.shape[:-1], 3)
        for e in range(3):
            alone = [p[e] for p in field.parameter_list()]
            one = reference.velocity(dataclasses.replace(spec, ensemble=None), alone, x[e], t[e], cond[e])
            assert_close_rms(f"member {e}", one, v[e], 1e-13, floor=0)


@pytest.mark.parametrize("name", ["mlp", "residual"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("lead, t_shape, cond_shape", [f for f in FORMS if len(f[0]) > 1])
def test_members_side_by_side_are_members_one_by_one(name, order, lead, t_shape, cond_shape):
    """What a GPU runs: batched products, here on the CPU."""
    options = ARCHITECTURES[name] | dict(norm=None, norm_first=False) | ORDERS[order]
    spec = ff.FieldSpec(2, 3, ensemble=3, **options, time_embedding=TIMES["sinusoidal-mlp"])
    field = random_field(spec, CPU, D)
    x, t, cond = torch.randn(*lead, 2, dtype=D), torch.rand(t_shape, dtype=D), torch.randn(cond_shape, dtype=D)
    x = x.expand(3, *x.shape) if x.dim() == 2 else x
    together = reference._head(spec, field.parameter_list(), x, t, cond, None)
    assert_close_rms("v", together, field(x, t, cond), 1e-13, floor=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_row_without_leading_axes(name):
    field = random_field(ff.FieldSpec(2, 3, **ARCHITECTURES[name]), CPU, D)
    x, t, cond = random_rows(field.spec)
    alone = torch.stack([field(*row) for row in zip(x, t, cond)])
    assert_close_rms("v", alone, field(x, t, cond), 1e-13, floor=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("ensemble, lead", [(None, (0,)), (2, (0,)), (2, (2, 0)), (2, (2, 3, 0)), (None, (0, 3))])
def test_no_rows(name, ensemble, lead):
    spec = ff.FieldSpec(2, 3, ensemble=ensemble, **ARCHITECTURES[name], time_embedding=TIMES["sinusoidal-mlp"])
    field = ff.VelocityField(spec)
    v = field(torch.zeros(*lead, 2), torch.zeros(lead), torch.zeros(*lead, 3))
    assert v.shape == (*(() if ensemble is None or len(lead) > 1 else (2,)), *lead, 2)
    v.sum().backward()
    assert not any(p.grad.any() for p in field.parameters())
    walked = reference.integrate(spec, field.parameter_list(), v.detach(), torch.zeros(*lead, 3), 2, method="heun")
    assert walked.shape == v.shape


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_velocity_is_typed_as_the_state(name, time):
    spec = ff.FieldSpec(2, 3, ensemble=2, **ARCHITECTURES[name], time_embedding=TIMES[time])
    field = random_field(spec, CPU)
    x, t, cond = (row.float() for row in random_rows(spec))
    exact = random_field(spec, CPU, D)
    exact.load_state_dict(field.state_dict())
    v = field(x, t, cond)
    assert v.dtype == torch.float32
    # A time of 1000 t in float32 is off by up to 3e-5.
    assert_close_rms("float32", v, exact(x.double(), t.double(), cond.double()), 1e-4, floor=0)
    assert torch.equal(field(x, t.double(), cond.double()), v)
    ones, bits = torch.ones(4, dtype=torch.int64), torch.ones(4, 3, dtype=torch.bool)
    assert torch.equal(field(x, ones, bits), field(x, ones.float(), bits.float()))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bf16_rounds_every_product_of_float32(name):
    """Also those of the time embedding's MLP, cond's encoder and FiLM; float64 is never rounded."""
    spec = ff.FieldSpec(2, 3, **ARCHITECTURES[name], time_embedding=TIMES["sinusoidal-mlp"])
    field = random_field(spec, CPU)
    args = [row.float() for row in random_rows(spec)]
    rounded = reference.velocity(spec, field.parameter_list(), *args, precision="bf16")
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, field(*args))
    assert_close_rms("bf16", rounded, field(*args), 5e-2)
    products, dense = [], reference.dense
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "dense", lambda x, w, b, p=None: products.append((w.shape, p)) or dense(x, w, b, p))
        reference.velocity(spec, field.parameter_list(), *args, precision="bf16")
    assert {precision for _, precision in products} == {"bf16"}
    assert len(products) == sum(p.dim() == 2 for p in field.parameters()) + len(spec.film_sizes)  # FiLM's in halves
    twice = field.double()
    args = [row.double() for row in args]
    assert torch.equal(reference.velocity(spec, twice.parameter_list(), *args, precision="bf16"), twice(*args))


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r"activation must be .*, got 'selu'"):
        reference.activate(torch.zeros(1), "selu")


# Solvers -------------------------------------------------------------------------------------------------------------

METHODS = ("euler", "midpoint", "heun")
SPANS = [(0.0, 1.0), (0.0, 0.3), (0.4, 0.9), (1.0, 0.0), (-0.5, -1.25)]


def linear_field(matrix: torch.Tensor, drift: torch.Tensor | None = None) -> ff.VelocityField:
    """A ReLU field that is exactly v(x, t) = x @ matrix + t drift: z = relu(z) - relu(-z)."""
    d = matrix.shape[0]
    rows = torch.cat([matrix, torch.zeros(1, d, dtype=D) if drift is None else drift[None]])
    field = ff.VelocityField(ff.FieldSpec(d, 0, (2 * d + 2,), activation="relu"), dtype=D)
    with torch.no_grad():
        field.layers[0].weight.copy_(torch.cat([torch.eye(d + 1, dtype=D), -torch.eye(d + 1, dtype=D)], 1))
        field.layers[1].weight.copy_(torch.cat([rows, -rows]))
    return field


def walk(field: ff.VelocityField, x: torch.Tensor, num_steps: int, *args, cond=None, **options) -> torch.Tensor:
    return reference.integrate(field.spec, field.parameter_list(), x, cond, num_steps, *args, **options)


def slope(steps: list[int], errors: list[float]) -> float:
    """The exponent p of errors ~ h^p."""
    return -np.polyfit(np.log2(steps), np.log2(errors), 1)[0]


@pytest.mark.parametrize("t_0, t_1", SPANS)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 64])
@pytest.mark.parametrize("method", METHODS)
def test_a_linear_field_is_a_matrix_polynomial_per_step(method, num_steps, t_0, t_1):
    matrix, x = torch.randn(3, 3, dtype=D), torch.randn(5, 3, dtype=D)
    walked = walk(linear_field(matrix), x, num_steps, t_0, t_1, method)
    h = (t_1 - t_0) / num_steps * matrix
    step = torch.eye(3, dtype=D) + h + (0 if method == "euler" else h @ h / 2)
    assert_close_rms("x_1", walked, x @ torch.linalg.matrix_power(step, num_steps), 1e-13, floor=0)


def test_the_public_walk_is_the_reference_s():
    field, x = linear_field(torch.randn(3, 3, dtype=D), torch.randn(3, dtype=D)), torch.randn(5, 3, dtype=D)
    for t_1 in (1.0, 0.3):
        walked = ff.integrate(field, x, num_steps=7, t_1=t_1, backend="reference")
        assert torch.equal(walked, walk(field, x, 7, 0.0, t_1))


@pytest.mark.parametrize("t_0, t_1", [(0.0, 1.0), (0.5, 2.0), (1.5, 0.0)])
@pytest.mark.parametrize("method, order", [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_orders_of_convergence(method, order, t_0, t_1):
    """dx/dt = x A + t b: [x, t, 1] of the exact flow is [x_0, t_0, 1] times a matrix exponential."""
    matrix, drift, x = torch.randn(3, 3, dtype=D), 5 * torch.randn(3, dtype=D), torch.randn(5, 3, dtype=D)
    generator = torch.zeros(5, 5, dtype=D)
    generator[:3, :3], generator[3, :3], generator[4, 3] = matrix, drift, 1.0
    start = torch.cat([x, torch.tensor([[t_0, 1.0]], dtype=D).expand(5, 2)], 1)
    exact = (start @ torch.linalg.matrix_exp((t_1 - t_0) * generator))[:, :3]
    steps = [128, 256, 512, 1024] if order == 1 else [32, 64, 128, 256]
    errors = [(walk(linear_field(matrix, drift), x, k, t_0, t_1, method) - exact).norm().item() for k in steps]
    assert slope(steps, errors) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize("method, order", [("euler", 1), ("midpoint", 3), ("heun", 3)])
def test_walking_back_returns_to_the_start(method, order):
    """The two-stage schemes better than to their order 2: the h^3 terms of a step there and a step back cancel."""
    field = linear_field(torch.randn(3, 3, dtype=D), torch.randn(3, dtype=D))
    x, steps = torch.randn(5, 3, dtype=D), [32, 64, 128, 256]
    errors = []
    for k in steps:
        there = walk(field, x, k, 0.2, 1.0, method)
        errors.append((walk(field, there, k, 1.0, 0.2, method) - x).norm().item())
    assert errors[-1] < 0.02 * x.norm()
    assert slope(steps, errors) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize("t_0, t_1", SPANS)
@pytest.mark.parametrize("num_steps", [1, 3, 10])
@pytest.mark.parametrize("method", METHODS)
def test_the_integral_of_time(method, num_steps, t_0, t_1):
    """v = t: the sum over left end points, and with a stage in or around the middle the exact integral."""
    field = linear_field(torch.zeros(1, 1, dtype=D), torch.ones(1, dtype=D))
    walked = walk(field, torch.zeros(1, 1, dtype=D), num_steps, t_0, t_1, method)
    h = (t_1 - t_0) / num_steps
    expected = sum((t_0 + h * k) * h for k in range(num_steps)) if method == "euler" else (t_1**2 - t_0**2) / 2
    assert walked.item() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("num_steps", [1, 2, 10])
@pytest.mark.parametrize("method", METHODS)
def test_a_straight_path_is_exact_for_any_number_of_steps(method, num_steps):
    """The velocity x_1 - x_0 does not depend on x or t, so K changes nothing."""
    field = linear_field(torch.zeros(2, 2, dtype=D))
    with torch.no_grad():
        field.layers[1].bias.copy_(torch.tensor([2.0, -3.0]))
    x = torch.randn(4, 2, dtype=D)
    assert_close_rms("x_1", walk(field, x, num_steps, method=method), x + field.layers[1].bias, 1e-14)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("num_steps", [1, 3, 10, 49])
@pytest.mark.parametrize("method", METHODS)
def test_stages_stand_at_their_times(monkeypatch, method, num_steps, per_row):
    """The first exactly at t_0, and a stage at the end exactly at t_1, whatever the two numbers are."""
    seen = []
    monkeypatch.setattr(reference, "velocity", lambda spec, ps, x, t, *rest: seen.append(t) or torch.ones_like(x))
    t_0, t_1 = torch.randn(300, dtype=D), torch.randn(300, dtype=D)
    x = torch.zeros(300, 1, dtype=D)
    if per_row:
        reference.integrate(None, (), x, None, num_steps, t_0, t_1, method)
        times = torch.stack(seen)
    else:
        for start, end in zip(t_0.tolist(), t_1.tolist()):
            reference.integrate(None, (), x, None, num_steps, start, end, method)
        assert {(t.shape, t.dtype) for t in seen} == {((), D)}
        times = torch.stack(seen).view(300, -1).T
    stages = {"euler": [0.0], "midpoint": [0.0, 0.5], "heun": [0.0, 1.0]}[method]
    expected = torch.stack([t_0 + (t_1 - t_0) / num_steps * (k + a) for k in range(num_steps) for a in stages])
    assert_close_rms("times", times, expected, 1e-15, floor=0)
    assert torch.equal(times[0], t_0)
    if method == "heun":
        assert torch.equal(times[-1], t_1)


def written_out_walk(field, x, cond, num_steps, t_0, t_1, method, noise):
    """Every x_k, from velocities in numpy; t_0 and t_1 as the leading shape of x."""
    h = (t_1 - t_0) / num_steps
    path = [x]
    for k in range(num_steps):
        t, step = t_0 + k * h, h[..., None]
        v = expected_velocity(field, x, t, cond)
        if method == "midpoint":
            v = expected_velocity(field, x + step / 2 * v, t + h / 2, cond)
        if method == "heun":
            v = (v + expected_velocity(field, x + step * v, t + h, cond)) / 2
        x = x + step * v + noise[k]
        path.append(x)
    return torch.stack(path)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prediction", ["velocity", "endpoint", "noise"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_walk_is_written_out_in_numpy(name, prediction, method):
    """Of an ensemble, with times per member and row, noise behind each step and every state on the way."""
    spec = ff.FieldSpec(
        2, 3, ensemble=3, **ARCHITECTURES[name], time_embedding=ff.Sinusoidal(6, (5,), scale=9.0), prediction=prediction
    )
    field = random_field(spec, CPU, D)
    x, cond = torch.randn(3, 4, 2, dtype=D), torch.randn(3, 4, 3, dtype=D)
    t_0, t_1, noise = torch.rand(3, 4, dtype=D), torch.rand(3, 4, dtype=D), torch.randn(5, 3, 4, 2, dtype=D)
    path = walk(field, x, 5, t_0, t_1, method, cond=cond, step_noise=noise, trajectory=True)
    expected = written_out_walk(field, x, cond, 5, t_0, t_1, method, noise)
    assert torch.equal(path[0], x)
    assert_close_rms("path", path, expected, 1e-11, floor=0)
    assert torch.equal(walk(field, x, 5, t_0, t_1, method, cond=cond, step_noise=noise), path[-1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("t_shape", [(), (1,), (4,), (3, 1), (3, 4)])
def test_times_per_row_are_walks_with_numbers(method, t_shape):
    spec = ff.FieldSpec(2, 3, (8,), 3, architecture=ff.FiLMUNet((4,)))
    field = random_field(spec, CPU, D)
    x, cond = torch.randn(3, 4, 2, dtype=D), torch.randn(4, 3, dtype=D)
    t_0, t_1 = torch.rand(t_shape, dtype=D), torch.rand(t_shape, dtype=D)
    full = [t.expand(3, 4).tolist() for t in (t_0, t_1)]
    for times in ((t_0, t_1), (t_0, 1.5), (-0.5, t_1)):
        together = walk(field, x, 3, *times, method, cond=cond)
        assert together.shape == x.shape
        for e in range(3):
            for b in range(4):
                ends = [g if isinstance(g, float) else f[e][b] for g, f in zip(times, full)]
                alone = walk(field, x[:, b : b + 1], 3, *ends, method, cond=cond[b : b + 1])
                assert_close_rms("x_1", alone[e, 0], together[e, b], 1e-13, floor=0)


@pytest.mark.parametrize("method", METHODS)
def test_rows_whose_time_stands_still_stay(method):
    field = linear_field(torch.randn(2, 2, dtype=D), torch.randn(2, dtype=D))
    x, t = torch.randn(4, 2, dtype=D), torch.rand(4, dtype=D)
    assert torch.equal(walk(field, x, 3, t, t, method), x)
    assert torch.equal(walk(field, x, 3, 0.7, 0.7, method), x)


@pytest.mark.parametrize("method", METHODS)
def test_noise_is_added_behind_each_step(method):
    matrix, x, noise = torch.randn(2, 2, dtype=D), torch.randn(4, 2, dtype=D), torch.randn(3, 4, 2, dtype=D)
    h = matrix / 3
    step = torch.eye(2, dtype=D) + h + (0 if method == "euler" else h @ h / 2)
    path = walk(linear_field(matrix), x, 3, method=method, step_noise=noise, trajectory=True)
    expected = [x]
    for k in range(3):
        expected.append(expected[-1] @ step + noise[k])
    assert_close_rms("path", path, torch.stack(expected), 1e-13, floor=0)
    # One draw for all rows.
    shared = walk(linear_field(matrix), x, 3, method=method, step_noise=noise[:, :1])
    spread = walk(linear_field(matrix), x, 3, method=method, step_noise=noise[:, :1].expand(3, 4, 2))
    assert torch.equal(shared, spread)


@pytest.mark.parametrize("method", METHODS)
def test_a_trajectory_holds_every_state(method):
    field, x = linear_field(torch.randn(2, 2, dtype=D), torch.randn(2, dtype=D)), torch.randn(4, 2, dtype=D)
    path = walk(field, x, 5, 0.5, 1.5, method, trajectory=True)
    assert path.shape == (6, 4, 2)
    assert torch.equal(path[0], x)
    for k in range(1, 6):
        assert_close_rms(f"x_{k}", path[k], walk(field, x, k, 0.5, 0.5 + k / 5, method), 1e-13, floor=0)
        assert_close_rms(f"x_{k}", path[k], walk(field, path[k - 1], 1, 0.3 + k / 5, 0.5 + k / 5, method), 1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_a_walk_are_exact(method):
    spec = ff.FieldSpec(1, 1, (2,), 2, "tanh", architecture=ff.FiLMUNet((2,)), prediction="endpoint")
    field = random_field(spec, CPU, D)

    def walked(x, cond, t_0, t_1, noise, *parameters):
        return reference.integrate(spec, parameters, x, cond, 2, t_0, t_1, method, step_noise=noise, trajectory=True)

    shapes = [(2, 2, 1), (2, 1), (2,), (2, 2), (2, 2, 2, 1)]
    inputs = [(torch.rand(shape, dtype=D) * 0.8).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(walked, (*inputs, *field.parameter_list()))


@pytest.mark.parametrize("method", METHODS)
def test_a_walk_is_typed_as_its_start(method):
    matrix = torch.randn(2, 2, dtype=D)
    field = linear_field(matrix).float()
    x, t = torch.randn(4, 2), torch.rand(4)
    for t_1 in (1.0, 1, t, t.double(), torch.tensor(0.5), torch.tensor(0.5, dtype=D), torch.tensor(1)):
        walked = walk(field, x, 3, 0.0, t_1, method)
        assert walked.dtype == torch.float32
        exact = walk(linear_field(matrix), x.double(), 3, 0.0, t_1, method)
        assert_close_rms("x_1", walked, exact, 1e-6)


# Paths ---------------------------------------------------------------------------------------------------------------


def test_interpolate_runs_from_noise_to_data():
    x_0, x_1 = torch.randn(3, 4, 2, dtype=D), torch.randn(3, 4, 2, dtype=D)
    for t, end in ((0.0, x_0), (1.0, x_1)):
        x_t, velocity = reference.interpolate(x_0, x_1, torch.full((3, 4), t, dtype=D))
        assert torch.equal(x_t, end)
        assert torch.equal(velocity, x_1 - x_0)


@pytest.mark.parametrize("sigma_min", [0.0, 1e-3, 0.1])
def test_the_path_leaves_sigma_min_of_the_noise(sigma_min):
    x_0, x_1, t = torch.randn(3, 4, 2, dtype=D), torch.randn(3, 4, 2, dtype=D), torch.rand(3, 4, dtype=D)
    x_t, velocity = reference.interpolate(x_0, x_1, t, sigma_min)
    a, b, s = x_0.numpy(), x_1.numpy(), t.numpy()[..., None]
    np.testing.assert_allclose(x_t.numpy(), (1 - (1 - sigma_min) * s) * a + s * b, rtol=0, atol=1e-15)
    np.testing.assert_allclose(velocity.numpy(), b - (1 - sigma_min) * a, rtol=0, atol=1e-15)
    start, end = (reference.interpolate(x_0, x_1, torch.full_like(t, at), sigma_min)[0] for at in (0.0, 1.0))
    assert torch.equal(start, x_0)
    assert_close_rms("x_t at 1", end, x_1 + sigma_min * x_0, 1e-15, floor=0)
    assert_close_rms("velocity of a straight line", velocity, end - start, 1e-15, floor=0)
    if not sigma_min:
        straight = reference.interpolate(x_0, x_1, t)
        assert torch.equal(straight[0], x_t)
        assert torch.equal(straight[1], velocity)


@pytest.mark.parametrize("sigma_min", [0.0, 0.1])
@pytest.mark.parametrize("prediction", ["velocity", "endpoint", "noise"])
def test_errors_of_noise_and_endpoint_are_scaled_errors_of_the_velocity(prediction, sigma_min):
    field = random_field(ff.FieldSpec(2, 3, (8,), prediction=prediction), CPU, D)
    x_0, x_1, cond = torch.randn(9, 2, dtype=D), torch.randn(9, 2, dtype=D), torch.randn(9, 3, dtype=D)
    t = torch.linspace(0, 1, 9, dtype=D)
    x_t, target = reference.interpolate(x_0, x_1, t, sigma_min)
    v, time = field(x_t, t, cond), t[:, None]
    # x_0 and x_1 solve the path's two equations; with v for the velocity they are what it implies.
    a, b = 1 - (1 - sigma_min) * time, 1 - sigma_min
    system = torch.stack([torch.cat([a, time], 1), torch.tensor([-b, 1.0], dtype=D).expand(9, 2)], 1)
    implied = torch.linalg.solve(system, torch.stack([x_t, v], 1))
    for error, end, truth in (("noise", implied[:, 0], x_0), ("endpoint", implied[:, 1], x_1)):
        scale = reference.error_scale(t, error, sigma_min)
        assert scale.shape == t.shape
        scaled = scale[:, None] * (v - target).square()
        assert_close_rms(error, scaled, (end - truth).square(), 1e-12, floor=0)
        if error == prediction and sigma_min == 0:  # what the head says is what its velocity implies
            head = dataclasses.replace(field.spec, prediction="velocity")
            says = reference.velocity(head, field.parameter_list(), x_t, t, cond)
            inside = (t > 0) & (t < 1)
            assert_close_rms("head", says[inside], end[inside], 1e-12, floor=0)


def test_an_unknown_error_is_refused():
    with pytest.raises(ValueError, match="error must be noise or endpoint, got 'velocity'"):
        reference.error_scale(torch.rand(3), "velocity")


# Embeddings ----------------------------------------------------------------------------------------------------------


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


def test_power_fourier_doubles_its_frequency():
    for dtype in (torch.float32, D):
        t = torch.rand(3, 4, dtype=dtype)
        features = ff.PowerFourier(8).features(t)
        assert features.shape == (3, 4, 8)
        assert features.dtype == dtype
        for k in range(4):
            assert torch.equal(features[..., k], torch.cos(2**k * t))
            assert torch.equal(features[..., 4 + k], torch.sin(2**k * t))


@pytest.mark.parametrize("max_period, scale", [(10_000.0, 1000.0), (50.0, -3.0)])
def test_sinusoids_have_geometric_frequencies(max_period, scale):
    t = torch.rand(3, 4, dtype=D)
    embedding = ff.Sinusoidal(10, (7, 6), max_period, scale)
    features = embedding.features(t)
    assert features.shape == (3, 4, 10)
    for i in range(5):
        w = max_period ** (-2 * i / 10)
        np.testing.assert_allclose(features[..., i], np.cos(w * scale * t.numpy()), rtol=0, atol=1e-12)
        np.testing.assert_allclose(features[..., 5 + i], np.sin(w * scale * t.numpy()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", TIMES)
def test_time_features_are_those_of_numpy(name):
    """At the ends and outside of [0, 1] too, and for a single time."""
    embedding = TIMES[name]
    t = torch.tensor([-0.5, 0.0, 0.25, 1.0, 1.5], dtype=D)
    features = embedding.features(t)
    assert features.shape == (5, embedding.width())
    np.testing.assert_allclose(features.numpy(), time_features(embedding, t.numpy()), rtol=0, atol=1e-11)
    assert torch.equal(embedding.features(t[3]), features[3])


def test_scaled_embedding_maps_the_range_to_the_unit_interval():
    x = torch.tensor([[-101.0], [-50.0], [1.0]], dtype=D)
    assert_close_rms("scaled", ff.Scaled(-101.0, 1.0).features(x), (x + 101) / 102, 1e-15)


# Losses --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_matching_rows_are_mean_squared_errors_over_d(name):
    field = random_field(ff.FieldSpec(3, 3, ensemble=2, **ARCHITECTURES[name]), CPU, D)
    x, t, cond = random_rows(field.spec)
    x, target = x.expand(2, 4, 3), torch.randn(2, 4, 3, dtype=D)
    rows = reference.matching_rows(field.spec, field.parameter_list(), x, t, target, cond)
    expected = ((expected_velocity(field, x, t, cond) - target) ** 2).sum(-1) / 3
    assert_close_rms("rows", rows, expected, 1e-12, floor=0)


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
