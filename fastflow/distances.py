"""Distances between two sets of samples, and the variance of a gradient: what a model of a distribution is judged by.

All sums are in float64 whatever the samples' dtype, and nothing here has a gradient. Samples are [n, D]. A distance
between finite samples of one distribution is not zero; `emd_against` gives that floor beside the distance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastflow.errors import missing_extra

__all__ = ["BANDWIDTHS", "MAX_EMD_SAMPLES", "emd", "emd_against", "gradient_variance", "mmd", "sliced_wasserstein"]

MAX_EMD_SAMPLES = 8192
"""The most samples that `emd` takes: its cost matrix is then half a GiB, and its time grows with their cube."""
BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Bandwidths of `mmd`'s kernels, as multiples of the median distance within the second sample."""

_BLOCK = 1024  # rows of a block of pairwise distances: 8 MiB of float64
_MEDIAN_ROWS = 2048  # rows that the median distance is taken over


@torch.no_grad()
def emd(x: Tensor, y: Tensor) -> float:
    """The earth mover's distance (1-Wasserstein, Euclidean cost) between two samples of equal size, exactly.

    min over permutations p of mean_i |x_i - y_p(i)|, by the Hungarian method (scipy).

    Args:
        x, y: [n, D] each, n at most `MAX_EMD_SAMPLES`.

    Raises:
        MissingExtra: scipy is not installed.
        TypeError: not floating tensors.
        ValueError: other shapes, unequal sizes, no or too many samples, a number that is not finite.
    """
    x, y = _samples("x", x), _samples("y", y)
    _same_width(x, y)
    _same_size(x, y)
    n = len(x)
    if n > MAX_EMD_SAMPLES:
        raise ValueError(
            f"emd: expected at most {MAX_EMD_SAMPLES} samples, got {n}, whose costs would take {8 * n * n} bytes; "
            "pass fewer, average the distances of several parts, or use sliced_wasserstein or mmd"
        )
    try:
        from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
    except ImportError as error:
        raise missing_extra("rl", error.name or "scipy") from error
    cost = np.empty((n, n))
    for rows in range(0, n, _BLOCK):
        cost[rows : rows + _BLOCK] = _pairwise(x[rows : rows + _BLOCK], y).cpu().numpy()
    return float(cost[linear_sum_assignment(cost)].mean())


@torch.no_grad()
def emd_against(samples: Tensor, truth: Tensor, second_truth: Tensor) -> tuple[Tensor, Tensor]:
    """`emd` of a model's samples from true ones, for N conditions, with the floor that true samples would reach.

    Args:
        samples: the model's, [N, n, D].
        truth, second_truth: two independent draws from the true distribution, [N, n, D] each.

    Returns:
        emd(samples, truth) and emd(second_truth, truth), [N] each, float64 on the CPU. Sampling noise alone gives the
        second; only what the first has above it is the model's error.

    Raises:
        As `emd`.
    """
    for name, given in (("samples", samples), ("truth", truth), ("second_truth", second_truth)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{name}: expected a Tensor [N, n, D], got {type(given).__name__}")
        if given.dim() != 3:
            raise ValueError(f"{name}: expected [N, n, D], got {list(given.shape)}")
    for name, given in (("samples", samples), ("second_truth", second_truth)):
        if len(given) != len(truth):
            raise ValueError(f"{name}: expected as many conditions as truth, {len(truth)}, got {len(given)}")
    model = [emd(x, y) for x, y in zip(samples, truth, strict=True)]
    floor = [emd(x, y) for x, y in zip(second_truth, truth, strict=True)]
    return torch.tensor(model, dtype=torch.float64), torch.tensor(floor, dtype=torch.float64)


@torch.no_grad()
def sliced_wasserstein(x: Tensor, y: Tensor, *, num_projections: int, generator: torch.Generator) -> float:
    """The sliced 1-Wasserstein distance (Bonneel et al., 2015): the mean W1 of the samples' projections on lines.

    A projection's W1 is that of its sorted values. At most `emd`, at a cost of n log n.

    Args:
        x, y: [n, D] each.
        num_projections: random directions, uniform on the sphere.
        generator: what they are drawn from, on any device; one state gives one set of directions.

    Raises:
        TypeError: not floating tensors.
        ValueError: other shapes, unequal sizes, no samples, a number that is not finite, num_projections < 1.
    """
    x, y = _samples("x", x), _samples("y", y)
    _same_width(x, y)
    _same_size(x, y)
    if num_projections < 1:
        raise ValueError(f"num_projections: expected at least 1, got {num_projections}")
    shape = (num_projections, x.shape[1])
    directions = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device).to(x.device)
    directions /= directions.norm(dim=1, keepdim=True)
    total = 0.0
    for part in directions.split(max(1, _BLOCK * _BLOCK // len(x))):
        total += float(((part @ x.mT).sort(dim=1).values - (part @ y.mT).sort(dim=1).values).abs().mean(1).sum())
    return total / num_projections


@torch.no_grad()
def mmd(x: Tensor, y: Tensor, bandwidths: Sequence[float] | None = None) -> float:
    """The squared maximum mean discrepancy of a mean of Gaussian kernels, by its unbiased U-statistic.

    mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j) with k(a, b) the mean over
    bandwidths s of exp(-|a - b|^2 / (2 s^2)) (Gretton et al., JMLR 13, 2012, eq. 3). Being unbiased it is negative
    about half the time where the distributions are equal.

    Args:
        x: [n, D]. y: [m, D]. Two rows each at least.
        bandwidths: the kernels' s; by default `BANDWIDTHS` times the median distance within y (between the rows that
            differ, and over evenly spaced rows if there are more than a few thousand), so that the scale does not
            depend on x.

    Raises:
        TypeError: not floating tensors.
        ValueError: other shapes, too few rows, a number that is not finite, a bandwidth that is not positive; rows of
            y that are all the same, where bandwidths must be given.
    """
    x, y = _samples("x", x, 2), _samples("y", y, 2)
    _same_width(x, y)
    scales = [scale * _median_distance(y) for scale in BANDWIDTHS] if bandwidths is None else list(bandwidths)
    if not scales or not all(0 < scale < float("inf") for scale in scales):
        raise ValueError(f"bandwidths: expected positive numbers, got {bandwidths}")
    n, m = len(x), len(y)
    # A row's kernel with itself is 1.
    within_x = (_kernel_sum(x, x, scales) - n) / (n * (n - 1))
    within_y = (_kernel_sum(y, y, scales) - m) / (m * (m - 1))
    return within_x + within_y - 2 * _kernel_sum(x, y, scales) / (n * m)


@torch.no_grad()
def gradient_variance(gradients: Tensor | Iterable[Tensor]) -> tuple[float, float]:
    """How noisy a stochastic gradient is: the trace of its covariance, and the squared norm of its mean.

    One pass with one vector of memory (Welford, 1962), both unbiased: the squared norm of the sample mean exceeds that
    of the mean by Tr Cov / n on average, which is taken off. So the second can be negative where the noise hides the
    mean.

    Args:
        gradients: n independent draws as rows, [n, P], or as an iterable of [P].

    Returns:
        Tr Cov[g] and |E g|^2.

    Raises:
        TypeError: not tensors.
        ValueError: fewer than two gradients, other shapes.
    """
    if isinstance(gradients, Tensor) and gradients.dim() != 2:
        raise ValueError(f"gradients: expected [n, P], got {list(gradients.shape)}")
    count, squares, mean = 0, 0.0, torch.empty(0)
    for gradient in gradients:
        if not isinstance(gradient, Tensor):
            raise TypeError(f"gradients: expected Tensors, got {type(gradient).__name__}")
        if gradient.dim() != 1 or (count and gradient.shape != mean.shape):
            expected = f"[{len(mean)}]" if count else "[P]"
            raise ValueError(f"gradients: expected each to be {expected}, got {list(gradient.shape)}")
        row = gradient.detach().double()
        if not count:
            mean = torch.zeros_like(row)
        count += 1
        delta = row - mean
        mean += delta / count
        squares += float(delta @ (row - mean))
    if count < 2:
        raise ValueError(f"gradients: expected at least 2, got {count}")
    trace = squares / (count - 1)
    return trace, float(mean @ mean) - trace / count


def _pairwise(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances [n, m]. By differences: the product form loses half the digits of small distances."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _kernel_sum(x: Tensor, y: Tensor, scales: Sequence[float]) -> float:
    """The sum over all pairs of the mean over scales of the Gaussian kernel."""
    total = 0.0
    for rows in x.split(_BLOCK):
        for columns in y.split(_BLOCK):
            squares = _pairwise(rows, columns).square_()
            total += sum(float((squares * (-0.5 / scale**2)).exp_().sum()) for scale in scales)
    return total / len(scales)


def _median_distance(y: Tensor) -> float:
    if len(y) > _MEDIAN_ROWS:
        y = y[torch.linspace(0, len(y) - 1, _MEDIAN_ROWS, device=y.device).long()]
    distances = torch.nn.functional.pdist(y)
    distances = distances[distances > 0]
    if not len(distances):
        raise ValueError("bandwidths: expected them to be given where all rows of y are the same, got None")
    return float(distances.median())


def _samples(name: str, given: Tensor, least: int = 1) -> Tensor:
    """`given` in float64 if it is a sample of at least `least` rows."""
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(given).__name__}")
    if not given.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {given.dtype}")
    if given.dim() != 2 or len(given) < least or not given.shape[1]:
        raise ValueError(f"{name}: expected [n, D] with n at least {least} and D at least 1, got {list(given.shape)}")
    bad = int((~torch.isfinite(given)).any(1).sum())
    if bad:
        raise ValueError(f"{name}: expected finite samples, got {bad} of {len(given)} rows that are not")
    return given.detach().double()


def _same_width(x: Tensor, y: Tensor) -> None:
    if x.shape[1] != y.shape[1] or x.device != y.device:
        raise ValueError(
            f"y: expected x's width and device, {x.shape[1]} on {x.device}, got {y.shape[1]} on {y.device}"
        )


def _same_size(x: Tensor, y: Tensor) -> None:
    if len(x) != len(y):
        raise ValueError(f"y: expected as many samples as x, {len(x)}, got {len(y)}")
