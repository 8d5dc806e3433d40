"""Rollouts on a real environment, and the statistics over seeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastflow.errors import UserError
from fastflow.evaluate import Rollouts, bootstrap_interval, evaluate, interquartile_mean, summary

pytest.importorskip("ogbench")

ENV = "pointmaze-arena-navigate-singletask-v0"


class Walker:
    """Walks to the goal, which lies at (20, 20), in the slots that it is told to; stands about in the others."""

    device = torch.device("cpu")

    def __init__(self, *slots: int, noise: float = 0.1) -> None:
        self.slots, self.noise = slots, noise
        self.shapes: set[tuple[int, ...]] = set()

    def act(self, observations: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        assert observations.dtype == torch.float32
        self.shapes.add(tuple(observations.shape))
        actions = self.noise * torch.randn(len(observations), 2, generator=generator)
        for slot in self.slots:
            actions[slot] += (20 - observations[slot]).clamp(-1, 1)
        return actions.clamp(-1, 1)


@pytest.fixture(scope="module")
def rollouts():
    rollouts = Rollouts(ENV, 3)
    yield rollouts
    rollouts.close()


def test_every_episode_counts_once(rollouts):
    walker = Walker(0, 1, 2)
    episodes = rollouts.run(walker, episodes=8, seed=0)
    assert episodes.success.tolist() == [1.0] * 8
    assert ((episodes.lengths > 50) & (episodes.lengths < 300)).all()
    # -1 per step until the step at which the goal has been reached.
    assert np.array_equal(episodes.returns, 1 - episodes.lengths)
    # One shape all along: compiled policies are not compiled again when episodes end.
    assert walker.shapes == {(3, 2)}


def test_short_episodes_are_not_favoured(rollouts):
    """Slot 1 fails slowly while the others solve all the rest; its episode still counts."""
    episodes = rollouts.run(Walker(0, 2, noise=0.0), episodes=7, seed=0)
    assert sorted(episodes.success.tolist()) == [0.0] + [1.0] * 6
    assert episodes.metrics()["success"] == pytest.approx(6 / 7)
    assert episodes.lengths.max() == 1000


def test_seed_decides(rollouts):
    first, again, other = (rollouts.run(Walker(0, 1, 2), episodes=4, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.lengths, again.lengths)
    assert not np.array_equal(first.lengths, other.lengths)


def test_outside_random_states_are_untouched(rollouts):
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    rollouts.run(Walker(0, 1, 2), episodes=3, seed=0)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_abandoning(rollouts):
    asked = iter([False, False, True])
    assert rollouts.run(Walker(), episodes=3, seed=0, should_stop=lambda: next(asked)) is None


def test_evaluate_has_the_names_of_the_family():
    metrics = evaluate(Walker(0, 1), ENV, episodes=2, seed=0, num_envs=5)
    assert list(metrics) == ["success", "episode.return", "episode.length"]
    assert metrics["success"] == 1.0
    assert metrics["episode.length"] == 1 - metrics["episode.return"]


def test_bad_counts(rollouts):
    with pytest.raises(ValueError, match="episodes: expected at least 1, got 0"):
        rollouts.run(Walker(), episodes=0, seed=0)
    with pytest.raises(ValueError, match="num_envs: expected at least 1, got 0"):
        Rollouts(ENV, 0)


def test_unknown_environment():
    with pytest.raises(UserError, match="did you mean pointmaze-arena-navigate-singletask-v0"):
        Rollouts("pointmaze-arana-navigate-singletask-v0")


# Statistics


def test_interquartile_mean():
    assert interquartile_mean([0.5]) == 0.5
    assert interquartile_mean([3.0, 1.0, 2.0]) == 2.0
    assert interquartile_mean([100.0, 1.0, 2.0, -50.0]) == 1.5
    assert interquartile_mean(np.arange(8)) == 3.5
    with pytest.raises(ValueError, match="at least one"):
        interquartile_mean([])


def test_interquartile_mean_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    for size in range(1, 30):
        scores = np.random.default_rng(size).normal(size=size)
        assert interquartile_mean(scores) == pytest.approx(stats.trim_mean(scores, 0.25))


def test_bootstrap_interval_of_a_mean():
    """Against the normal approximation, which holds for the mean of many scores."""
    scores = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    low, high = bootstrap_interval([scores], np.mean)
    half = 1.96 * scores.std() / np.sqrt(len(scores))
    assert low == pytest.approx(scores.mean() - half, abs=0.03)
    assert high == pytest.approx(scores.mean() + half, abs=0.03)


def test_bootstrap_resamples_within_tasks():
    # Each task's seeds agree, so nothing varies although the tasks differ.
    assert bootstrap_interval([[0.0, 0.0, 0.0], [1.0, 1.0]], np.mean) == (0.4, 0.4)
    with pytest.raises(ValueError, match="at least one score"):
        bootstrap_interval([[1.0], []])


def test_summary_of_runs():
    tasks = (("a", 0.5), ("b", 1.0), ("a", 0.5), ("b", 1.0))
    records = [{"agent": "floq", "env": env, "success": x} for env, x in tasks]
    lines = [line.split() for line in summary(records, "success").splitlines()[2:]]
    assert lines == [
        ["2", "0.500", "0.500", "0.500", "to", "0.500", "a"],
        ["2", "1.000", "1.000", "1.000", "to", "1.000", "b"],
        ["4", "0.750", "0.750", "0.750", "to", "0.750", "all", "2", "tasks"],
    ]
    assert len(summary(records[::2], "success").splitlines()) == 3


def test_summary_keeps_agents_apart():
    records = [{"agent": agent, "env": "a", "success": x} for agent, x in (("floq", 1.0), ("fql", 0.0), ("floq", 1.0))]
    lines = [line.split() for line in summary(records, "success").splitlines()[2:]]
    assert lines == [
        ["2", "1.000", "1.000", "1.000", "to", "1.000", "floq,", "a"],
        ["1", "0.000", "0.000", "0.000", "to", "0.000", "fql,", "a"],
    ]
