"""Distances between samples against closed forms and brute force."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import HIDE

from fastflow import distances
from fastflow.distances import emd, emd_against, gradient_variance, mmd, sliced_wasserstein

scipy = pytest.importorskip("scipy")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# The earth mover's distance -----------------------------------------------------------------------------------------


def test_emd_of_a_translated_set_is_the_length_of_the_translation():
    """By the triangle inequality no assignment is cheaper than moving every point along."""
    x, shift = normal(300, 3), torch.tensor([3.0, -4.0, 12.0], dtype=torch.float64)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    assert emd(x, (x + shift)[order]) == pytest.approx(13.0, rel=1e-12)
    assert emd(x, x[order]) == 0.0


def test_emd_is_euclidean_not_squared_and_scales():
    x, y = normal(100, 2), normal(100, 2, seed=1)
    assert emd(3 * x, 3 * y) == pytest.approx(3 * emd(x, y), rel=1e-12)


def test_emd_in_one_dimension_is_that_of_sorted_values():
    x, y = normal(500, 1), 2 * normal(500, 1, seed=1) + 1
    expected = (x.sort(0).values - y.sort(0).values).abs().mean().item()
    assert emd(x, y) == pytest.approx(expected, rel=1e-12)


def test_emd_is_the_least_over_all_permutations():
    x, y = normal(6, 2), normal(6, 2, seed=1)
    cost = torch.cdist(x, y)
    expected = min(sum(cost[i, p[i]].item() for i in range(6)) for p in itertools.permutations(range(6))) / 6
    assert emd(x, y) == pytest.approx(expected, rel=1e-12)


def test_emd_of_float32_is_computed_in_float64(monkeypatch):
    x = normal(40, 2, dtype=torch.float32) * 1e-4 + 1000
    assert emd(x, x.flip(0)) == 0.0
    y = x + 0.5
    expected = emd(x.double(), y.double())
    monkeypatch.setattr(distances, "_BLOCK", 7)  # blocks that do not divide the rows
    assert emd(x, y) == expected == pytest.approx(math.sqrt(0.5), rel=1e-9)


def test_floor_of_true_samples():
    truth, second = normal(3, 256, 2), normal(3, 256, 2, seed=1)
    model = normal(3, 256, 2, seed=2)
    model[1, :, 0] += 5
    distance, floor = emd_against(model, truth, second)
    assert distance.shape == floor.shape == (3,)
    assert distance.dtype == floor.dtype == torch.float64
    assert distance[0].item() == emd(model[0], truth[0])
    assert floor[2].item() == emd(second[2], truth[2])
    # 4.8 is 5 less the noise of the means; two normal sets of 256 in the plane are .19 apart on average.
    assert 4.7 < distance[1] < 5.3
    assert ((distance[[0, 2]] < 0.35) & (floor[[0, 2]] > 0.1)).all()
    # Four dimensions: the published floor of two sets of 256 is .80.
    assert emd(normal(256, 4), normal(256, 4, seed=1)) == pytest.approx(0.80, abs=0.05)


def test_emd_refuses_what_would_fill_the_memory():
    n = distances.MAX_EMD_SAMPLES + 1
    x = torch.zeros(n, 1)
    with pytest.raises(ValueError, match=rf"at most 8192 samples, got 8193.* {8 * n * n} bytes.*sliced_wasserstein"):
        emd(x, x)


def test_without_scipy_the_extra_is_named():
    code = (
        HIDE.format(names=["scipy"])
        + """
import torch
from fastflow import distances
from fastflow.errors import MissingExtra
x = torch.ones(4, 2)
assert distances.sliced_wasserstein(x, x, num_projections=2, generator=torch.Generator()) == 0
try:
    distances.emd(x, x)
except MissingExtra as error:
    assert 'scipy is not installed' in str(error) and 'fastflow[rl]' in str(error), error
else:
    raise SystemExit('no error')
"""
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ.copy())
    assert finished.returncode == 0, finished.stderr


# Sliced Wasserstein -------------------------------------------------------------------------------------------------


def test_sliced_distance_in_one_dimension_is_emd():
    x, y = normal(200, 1), normal(200, 1, seed=1) ** 3
    generator = torch.Generator().manual_seed(0)
    assert sliced_wasserstein(x, y, num_projections=3, generator=generator) == pytest.approx(emd(x, y), rel=1e-12)


@pytest.mark.parametrize("dim, expected", [(2, 2 / math.pi), (3, 0.5)])
def test_sliced_distance_of_a_translated_set_is_the_mean_cosine(dim, expected):
    x = normal(50, dim)
    shift = torch.zeros(dim, dtype=torch.float64)
    shift[0] = 7.0
    sliced = sliced_wasserstein(x, x + shift, num_projections=20_000, generator=torch.Generator().manual_seed(0))
    assert sliced == pytest.approx(7 * expected, rel=0.015)


def test_sliced_distance_follows_its_generator_alone(monkeypatch):
    x, y = normal(100, 3, dtype=torch.float32), normal(100, 3, seed=1, dtype=torch.float32)
    state = torch.get_rng_state()

    def distance(seed: int) -> float:
        return sliced_wasserstein(x, y, num_projections=50, generator=torch.Generator().manual_seed(seed))

    first = distance(0)
    assert first == distance(0) != distance(1)
    assert first <= emd(x, y)
    monkeypatch.setattr(distances, "_BLOCK", 30)  # nine directions at once
    assert distance(0) == pytest.approx(first, rel=1e-12)
    assert torch.equal(torch.get_rng_state(), state)


# MMD ----------------------------------------------------------------------------------------------------------------


def test_mmd_of_two_gaussians_is_the_closed_form():
    """E k between N(a, I) and N(b, I) is (s^2 / (s^2 + 2))^(D/2) exp(-|a - b|^2 / (2 (s^2 + 2)))."""
    x, y = normal(4000, 2), normal(4000, 2, seed=1)
    y[:, 0] += 1.5
    scales = (0.5, 2.0)
    expected = sum(2 * (s**2 / (s**2 + 2)) * (1 - math.exp(-(1.5**2) / (2 * (s**2 + 2)))) for s in scales) / 2
    assert mmd(x, y, scales) == pytest.approx(expected, rel=0.03)


def test_mmd_of_one_distribution_is_zero_on_average():
    values = [mmd(normal(100, 2, seed=2 * i), normal(120, 2, seed=2 * i + 1)) for i in range(100)]
    mean, error = torch.tensor(values).mean().item(), torch.tensor(values).std().item() / 10
    assert abs(mean) < 3 * error < 2e-3
    assert min(values) < 0 < max(values)


def test_mmd_against_the_double_loop(monkeypatch):
    x, y = normal(7, 3), normal(9, 3, seed=1)

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return sum(math.exp(-float((a - b).square().sum()) / (2 * s * s)) for s in (0.7, 1.9)) / 2

    expected = sum(kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (7 * 6)
    expected += sum(kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (9 * 8)
    expected -= 2 * sum(kernel(a, b) for a in x for b in y) / (7 * 9)
    assert mmd(x, y, (0.7, 1.9)) == pytest.approx(expected, rel=1e-10)
    monkeypatch.setattr(distances, "_BLOCK", 4)
    assert mmd(x, y, (0.7, 1.9)) == pytest.approx(expected, rel=1e-10)


def test_default_bandwidths_are_those_of_the_second_sample():
    x, y = 100 * normal(50, 2), normal(60, 2, seed=1)
    median = torch.pdist(y).median().item()
    expected = mmd(x, y, [median * scale for scale in (0.25, 0.5, 1, 2, 4)])
    assert mmd(x, y) == pytest.approx(expected, rel=1e-12)
    # Rescaling both changes nothing; most rows at one place (a terminal state) do not make the median zero.
    assert mmd(1e3 * x, 1e3 * y) == pytest.approx(expected, rel=1e-9)
    stuck = y.clone()
    stuck[:55] = 0
    assert math.isfinite(mmd(x, stuck))
    with pytest.raises(ValueError, match="bandwidths: expected them to be given"):
        mmd(x, torch.ones(60, 2))


# Gradient variance --------------------------------------------------------------------------------------------------


def test_gradient_variance_of_rows_and_of_a_stream():
    rows = normal(50, 20, dtype=torch.float32) * 3 + 1000
    trace, square = gradient_variance(rows)
    exact = rows.double()
    assert trace == pytest.approx(exact.var(0).sum().item(), rel=1e-9)
    assert square == pytest.approx(exact.mean(0).square().sum().item() - trace / 50, rel=1e-12)
    assert gradient_variance(row for row in rows) == (trace, square)


def test_both_gradient_statistics_are_unbiased():
    """Four draws of N(mean, 4 I) at a time: the trace is 40, and |mean|^2 is 2.5, far below the noise's 10."""
    results = torch.tensor([gradient_variance(2 * normal(4, 10, seed=i) + 0.5) for i in range(3000)])
    mean, error = results.mean(0), results.std(0) / math.sqrt(3000)
    assert torch.allclose(mean, torch.tensor([40.0, 2.5]), rtol=0, atol=float(3.5 * error.max()))
    assert abs(mean[1] - 2.5) < 3.5 * error[1]
    assert (results[:, 1] < 0).any()


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x, y, message",
    [
        (torch.zeros(3), torch.zeros(3, 2), r"x: expected \[n, D\].*got \[3\]"),
        (torch.zeros(3, 2), torch.zeros(0, 2), r"y: expected \[n, D\] with n at least 1"),
        (torch.zeros(3, 2), torch.zeros(3, 1), "y: expected x's width and device, 2 on cpu, got 1 on cpu"),
        (torch.zeros(3, 2), torch.zeros(4, 2), "y: expected as many samples as x, 3, got 4"),
        (torch.full((3, 2), float("nan")), torch.zeros(3, 2), "x: expected finite samples, got 3 of 3 rows"),
    ],
)
def test_samples_that_cannot_be_compared(x, y, message):
    with pytest.raises(ValueError, match=message):
        emd(x, y)
    with pytest.raises(ValueError, match=message):
        sliced_wasserstein(x, y, num_projections=1, generator=torch.Generator())


def test_other_errors():
    x = torch.zeros(3, 2)
    with pytest.raises(TypeError, match="x: expected a Tensor, got list"):
        emd([[0.0]], x)
    with pytest.raises(TypeError, match=r"y: expected a floating dtype, got torch\.int64"):
        mmd(x, x.long())
    with pytest.raises(ValueError, match=r"x: expected .* at least 2"):
        mmd(x[:1], x)
    with pytest.raises(ValueError, match="bandwidths: expected positive numbers"):
        mmd(x, x, [1.0, 0.0])
    with pytest.raises(ValueError, match="num_projections: expected at least 1, got 0"):
        sliced_wasserstein(x, x, num_projections=0, generator=torch.Generator())
    with pytest.raises(ValueError, match=r"truth: expected \[N, n, D\], got \[3, 2\]"):
        emd_against(x[None], x, x[None])
    with pytest.raises(ValueError, match="second_truth: expected as many conditions as truth, 1, got 2"):
        emd_against(x[None], x[None], torch.stack([x, x]))
    with pytest.raises(ValueError, match="at least 2, got 1"):
        gradient_variance(torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"\[4\], got \[5\]"):
        gradient_variance(iter([torch.zeros(4), torch.zeros(5)]))
    with pytest.raises(ValueError, match=r"expected \[n, P\], got \[4\]"):
        gradient_variance(torch.zeros(4))
