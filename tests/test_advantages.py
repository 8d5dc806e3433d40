"""Generalised advantage estimation against its definition, with ends of both kinds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastflow.advantages import gae

NAMES = ("rewards", "values", "next_values", "terminated", "truncated")


def steps(t=9, b=3, seed=0, ends=0.2):
    source = torch.Generator().manual_seed(seed)
    rewards, values, next_values = torch.randn(3, t, b, generator=source, dtype=torch.float64)
    end, kind = torch.rand(2, t, b, generator=source)
    terminated, truncated = (end < ends) & (kind < 0.5), (end < ends) & (kind >= 0.5)
    return rewards, values, next_values, terminated, truncated


def plain(rewards, values, next_values, terminated, truncated, gamma, lam) -> list[list[float]]:
    """A_t = sum_k (gamma lambda)^k delta_{t+k}, each sum anew, by loops over numbers."""
    t_count, b_count = rewards.shape
    out = [[0.0] * b_count for _ in range(t_count)]
    for b in range(b_count):
        for t in range(t_count):
            weight = 1.0
            for k in range(t, t_count):
                bootstrap = 0.0 if terminated[k, b] else float(next_values[k, b])
                out[t][b] += weight * (float(rewards[k, b]) + gamma * bootstrap - float(values[k, b]))
                if terminated[k, b] or truncated[k, b]:
                    break
                weight *= gamma * lam
    return out


def assert_plain(given, gamma, lam):
    expected = torch.tensor(plain(*given, gamma, lam), dtype=torch.float64)
    torch.testing.assert_close(gae(*given, gamma, lam), expected, rtol=1e-10, atol=1e-12)


@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 999), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_equals_its_definition(t, b, seed, ends, gamma, lam):
    assert_plain(steps(t, b, seed, ends), gamma, lam)


def test_truncation_bootstraps_and_termination_does_not():
    one = torch.ones(3, 2, dtype=torch.float64)
    end, never = torch.tensor([[False] * 2, [True] * 2, [False] * 2]), torch.zeros(3, 2, dtype=torch.bool)
    terminated, truncated = end.clone(), end.clone()
    terminated[:, 1], truncated[:, 0] = never[:, 1], never[:, 0]
    found = gae(one, 0 * one, 10 * one, terminated, truncated, 0.5, 1.0)
    # The last row is cut off by the rollout alone, and bootstraps as well.
    assert found[2].tolist() == [6.0, 6.0]
    assert found[1].tolist() == [1.0, 6.0]
    # Both ends cut the sum: what follows is another episode's.
    assert found[0].tolist() == [6.0 + 0.5 * 1.0, 6.0 + 0.5 * 6.0]
    later = one.clone()
    later[2] = 1e6
    assert torch.equal(gae(later, 0 * one, 10 * one, terminated, truncated, 0.5, 1.0)[:2], found[:2])


def test_lambda_zero_is_the_one_step_error():
    rewards, values, next_values, terminated, _ = given = steps()
    expected = rewards + 0.9 * torch.where(terminated, 0.0, next_values) - values
    torch.testing.assert_close(gae(*given, 0.9, 0.0), expected)


def test_lambda_one_is_the_discounted_return_minus_the_value():
    # Values that agree along the way; without ends the sum telescopes.
    rewards, values, _, never, _ = steps(ends=0.0)
    next_values = torch.cat((values[1:], torch.full((1, 3), 7.0, dtype=torch.float64)))
    found = gae(rewards, values, next_values, never, never, 0.9, 1.0)
    discounted = next_values[-1].clone()
    for t in reversed(range(len(rewards))):
        discounted = rewards[t] + 0.9 * discounted
        torch.testing.assert_close(found[t], discounted - values[t])


def test_a_single_step():
    given = (torch.tensor([[2.0]]), torch.tensor([[1.0]]), torch.tensor([[4.0]]), *(torch.zeros(2, 1, 1).bool()))
    assert gae(*given, 0.5, 0.9).tolist() == [[3.0]]


def test_keeps_the_dtype_and_changes_nothing():
    given = [x.float() if x.is_floating_point() else x for x in steps()]
    before = [x.clone() for x in given]
    assert gae(*given, 0.99, 0.95).dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(given, before))


@pytest.mark.parametrize("name", NAMES[1:])
def test_shapes_that_differ(name):
    given = dict(zip(NAMES, steps()))
    given[name] = given[name][:-1]
    with pytest.raises(ValueError, match=rf"gae: {name} must be \[T, B\] = \[9, 3\] as rewards, got \[8, 3\]"):
        gae(**given, gamma=0.9, gae_lambda=0.9)
