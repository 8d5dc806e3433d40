"""Running statistics against those of all rows at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastflow.running import RunningStatistics


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 999), st.sampled_from([0.0, 1e4]))
def test_equal_those_of_all_rows_whatever_the_batches(sizes, seed, offset):
    rng = np.random.default_rng(seed)
    rows = (offset + [1.0, 5.0, 1e-2] * rng.normal(size=(sum(sizes), 3))).astype(np.float32)
    statistics, start = RunningStatistics(3), 0
    for size in sizes:
        statistics.update(torch.from_numpy(rows[start : start + size]))
        start += size
    assert int(statistics.count) == len(rows)
    if len(rows):
        exact = rows.astype(np.float64)
        np.testing.assert_allclose(statistics.mean, exact.mean(0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(statistics.std, np.maximum(exact.std(0), 1e-4), rtol=1e-7)
    else:
        assert statistics.std.tolist() == [1.0] * 3


def test_before_anything_was_seen():
    statistics = RunningStatistics(2)
    assert statistics.std.tolist() == [1.0, 1.0]
    rows = torch.tensor([[0.25, -3.0]])
    assert torch.equal(statistics.normalize(rows), rows)


def test_std_does_not_fall_with_the_number_of_updates():
    # FPO's released code: 2.99, 2.14, 1.50, .94 after 1, 2, 4, 10 updates.
    statistics, source = RunningStatistics(1), torch.Generator().manual_seed(0)
    for _ in range(10):
        statistics.update(3 * torch.randn(2000, 4, 1, generator=source))
        assert float(statistics.std) == pytest.approx(3.0, rel=0.03)


def test_a_number_that_never_changes():
    statistics = RunningStatistics(1)
    statistics.update(torch.full((50, 1), 2.5))
    assert float(statistics.std) == pytest.approx(1e-4)
    assert torch.equal(statistics.normalize(torch.full((3, 1), 2.5)), torch.zeros(3, 1))


def test_normalized_rows():
    statistics = RunningStatistics(2, limit=2.0)
    rows = torch.randn(4, 100, 2) * torch.tensor([3.0, 0.1]) + 5
    statistics.update(rows)
    found = statistics.normalize(rows)
    assert (found.shape, found.dtype) == (rows.shape, torch.float32)
    expected = (rows - rows.mean((0, 1))) / rows.flatten(0, 1).std(0, correction=0)
    torch.testing.assert_close(found, expected.clamp(-2, 2), rtol=1e-4, atol=1e-4)
    assert float(found.abs().max()) == 2.0


def test_what_is_kept_for_the_next_rows_follows_every_change():
    statistics, other, rows = RunningStatistics(2), RunningStatistics(2), torch.randn(10, 2)

    def expected(rows):
        return ((rows - statistics.mean.to(rows.dtype)) / statistics.std.to(rows.dtype)).clamp(-10, 10)

    other.update(5 * rows + 1)
    for change in (
        lambda: None,
        lambda: statistics.update(rows),
        lambda: [mine.copy_(other.tensors()[name]) for name, mine in statistics.tensors().items()],
        lambda: setattr(statistics, "mean", statistics.mean + 1),
    ):
        change()
        for dtype in (torch.float32, torch.float64, torch.float32):
            assert torch.equal(statistics.normalize(rows.to(dtype)), expected(rows.to(dtype)))
    with torch.inference_mode():
        statistics.update(rows)
        statistics.normalize(rows)
    assert statistics.normalize(rows.clone().requires_grad_()).requires_grad


def test_looking_changes_nothing():
    statistics = RunningStatistics(2)
    statistics.update(torch.randn(10, 2))
    before = {name: value.clone() for name, value in statistics.tensors().items()}
    rows = torch.randn(5, 2)
    first = statistics.normalize(rows)
    assert torch.equal(first, statistics.normalize(rows))
    statistics.update(torch.zeros(0, 2))
    assert all(torch.equal(value, before[name]) for name, value in statistics.tensors().items())


def test_tensors_are_the_whole_state():
    a, b, rows = RunningStatistics(2), RunningStatistics(2), torch.randn(10, 2)
    a.update(rows)
    for name, value in b.tensors().items():
        value.copy_(a.tensors()[name])
    a.update(2 * rows)
    b.update(2 * rows)
    assert all(torch.equal(value, a.tensors()[name]) for name, value in b.tensors().items())


def test_rows_of_another_width():
    with pytest.raises(ValueError, match=r"rows must be \[\.\.\., 3\], got \[4, 2\]"):
        RunningStatistics(3).update(torch.zeros(4, 2))
