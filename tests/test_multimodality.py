"""Measures of a policy's modes against closed forms, and the experiments that use them at a toy size."""

from __future__ import annotations

import dataclasses
import importlib
import math
from typing import Any

import numpy as np
import pytest
import torch

from fastflow.experiments import fpo_modes
from fastflow.experiments.declare import Arm, Experiment
from fastflow.experiments.report import results
from fastflow.experiments.run import flags, measure
from fastflow.multimodality import (
    PRIOR,
    SADDLE,
    TABLE,
    actions_at,
    bandit_actions,
    bumps,
    entropy,
    goals_reached,
    measure_bandit,
    measure_saddle,
    moves,
    observe,
    passes,
)
from fastflow.record import MetricTable, Run, load_agent
from fastflow.train import parse, train

pytest.importorskip("gymnasium")
from fastflow.online_envs import bandit
from fastflow.online_envs.gridworld import FIGURE_STARTS, grid_map


@dataclasses.dataclass
class Coin:
    """A policy that goes up with probability `up`, else down; with `stay` first of all it stays."""

    up: float
    stay: float = 0.0
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    def act(
        self, observations: torch.Tensor, generator: torch.Generator | None = None, *, deterministic: bool = False
    ) -> torch.Tensor:
        draws = torch.rand(2, len(observations), generator=generator)
        y = torch.where(draws[0] < self.up, 1.0, -1.0) * (draws[1] >= self.stay)
        return torch.stack((torch.zeros_like(y), y), -1)

    def explore(
        self, observations: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return 2 * self.act(observations, generator), {}


class Committed(Coin):
    """A policy that is a coin on the saddle's row and walks on to the nearer goal beside it."""

    def act(
        self, observations: torch.Tensor, generator: torch.Generator | None = None, *, deterministic: bool = False
    ) -> torch.Tensor:
        action = super().act(observations, generator)
        y = observations[:, 1]
        action[:, 1] = torch.where(y == 0, action[:, 1], y.sign())
        return action


def test_moves():
    y = np.array([0.5, 0.51, 3.0, -0.5, -0.6, 0.0, 0.2, -0.49, 1.0, -1.0])
    at = moves(np.stack((np.full(10, 9.0), y), -1))
    # Halves round to even: ±0.5 stays, as in the grid world.
    assert at[:3] == pytest.approx((0.3, 0.2, 0.5))
    assert at.std == pytest.approx(y.std())
    generator = np.random.default_rng(0)
    noise = moves(generator.standard_normal((200_000, 2)))
    np.testing.assert_allclose(noise, PRIOR, atol=5e-3)
    assert pytest.approx((0.3085, 0.3085, 0.3829), abs=1e-4) == PRIOR[:3]
    assert not passes(PRIOR)
    assert passes(PRIOR._replace(up=0.3, down=0.6, stay=0.1))
    assert not passes(PRIOR._replace(up=0.1, down=0.9, stay=0.0))
    assert not passes(PRIOR._replace(up=0.35, down=0.35, stay=0.3))


def test_entropy():
    assert entropy([0.5, 0.5]) == pytest.approx(math.log(2))
    assert entropy([0.2, 0.2, 0.2]) == pytest.approx(math.log(3))
    assert entropy([0.0, 0.7]) == 0.0
    assert entropy([0.0, 0.0]) == 0.0
    assert entropy([0.25, 0.75]) == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))


def test_goals_reached():
    grid = grid_map("two-walls")
    goals = goals_reached(Committed(0.25), grid, [SADDLE, (3, 20), (3, 4)], episodes=2000)
    np.testing.assert_allclose(goals.shares[0], (0.75, 0.25), atol=0.04)
    np.testing.assert_array_equal(goals.shares[1:], [(0.0, 1.0), (1.0, 0.0)])
    np.testing.assert_array_equal(goals.reached, 1.0)
    np.testing.assert_array_equal(goals.death, 0.0)
    # Rows 1 and 23 are goals.
    np.testing.assert_array_equal(goals.lengths, (11, 3, 3))
    np.testing.assert_allclose(goals.entropy, (entropy(goals.shares[0]), 0, 0))
    still = goals_reached(Coin(0.5, stay=1.0), grid, FIGURE_STARTS, episodes=3)
    np.testing.assert_array_equal(still.reached, 0.0)
    np.testing.assert_array_equal(still.entropy, 0.0)
    assert np.isnan(still.lengths).all()
    deadly = goals_reached(Coin(1.0), grid_map("three-goals"), [(12, 9), (7, 1)], episodes=2)
    np.testing.assert_array_equal(deadly.death, (1.0, 0.0))
    np.testing.assert_array_equal(deadly.shares, [(0, 0, 0), (0, 1, 0)])


def test_measure_saddle():
    found = measure_saddle(Committed(0.5, stay=0.1))
    assert found["p_stay"] == pytest.approx(0.1, abs=0.03)
    assert found["both_modes"] == pytest.approx(0.45, abs=0.04)
    assert found["passes"] == found["row_passes"] == 1.0
    # 1 / 0.9 steps until it leaves the row, then ten more.
    assert found["saddle_length"] == pytest.approx(10 + 1 / 0.9, abs=0.1)
    assert found["goal_entropy"] == pytest.approx(math.log(2), abs=0.01)
    # One of the figure's four starts is on the saddle's row, the others have a nearer goal.
    assert FIGURE_STARTS[0][1] == SADDLE[1]
    assert found["goal_entropy_starts"] == pytest.approx(math.log(2) / 4, abs=0.01)
    assert found["std_raw"] == pytest.approx(2 * found["std"], rel=0.02)
    np.testing.assert_array_equal(observe([(12, 12), (0, 24)]), [(0, 0), (-1, 1)])
    assert actions_at(Coin(1.0), SADDLE, 7).shape == (7, 2)


def test_bumps():
    actions = np.array([(-0.5, 0.0), (-0.5, 0.29), (0.5, -0.31), (0.25, 0.0), (0.0, 0.0)])
    found = bumps(actions)
    assert found[:2] == pytest.approx((0.4, 0.2))
    assert found.reward == pytest.approx(float(bandit.reward(actions).mean()))
    # A Gaussian of the bump's own spread: 1 - exp(-2) within two deviations, and half the height on average.
    spread = np.random.default_rng(0).normal(0, bandit.STD, (100_000, 2)) + bandit.CENTRES[1]
    found = bumps(spread)
    assert found.right == pytest.approx(1 - math.exp(-2), abs=0.01)
    assert found.reward == pytest.approx(0.5, abs=0.01)


DECLARED = (fpo_modes.MODES, fpo_modes.GRIDWORLD, fpo_modes.BANDIT)


def parsed(experiment: Experiment, arm: Arm, changes: dict[str, Any]) -> Any:
    pytest.importorskip("tyro")
    return parse(arm.agent or experiment.agent, flags({**experiment.settings(arm, "small"), **changes}))


TINY = {
    "num_envs": 16,
    "agent.rollout_steps": 8,
    "agent.num_epochs": 1,
    "agent.num_minibatches": 2,
    "agent.num_pairs": 2,
    "steps": 256,
    "log_interval": 128,
    "eval_interval": 256,
    "eval_episodes": 2,
    "eval_envs": 2,
    "tensorboard": False,
}


@pytest.mark.parametrize("experiment", DECLARED, ids=lambda experiment: experiment.name)
def test_measured_and_drawn(experiment, tmp_path):
    pytest.importorskip("matplotlib")
    # The first arms, a flow's and where there is one a Gaussian's.
    arms = [experiment.arms[0], *[arm for arm in experiment.arms if arm.agent == "ppo"][:1]]
    over_training = experiment is not fpo_modes.GRIDWORLD
    for arm in arms:
        path = tmp_path / arm.name / "seed0"
        tiny = {name: value for name, value in TINY.items() if arm.agent != "ppo" or name != "agent.num_pairs"}
        changes = {**tiny, "run_dir": path, "seed": 0, "save_interval": 128 if over_training else 0}
        train(parsed(experiment, arm, changes), arm.agent or experiment.agent, out=lambda text: None)
        measure(arm.after, path)
        (result,) = results(dataclasses.replace(experiment, arms=(arm,), reference=None), [0], tmp_path)
        for metric in experiment.metrics:
            # No tiny run gets as far as an evaluation of 20.
            assert math.isfinite(result.values[metric.column]) or metric.column == "steps_to_20"
        assert (path / TABLE).exists() == over_training
        if over_training:
            rows = MetricTable(path / TABLE).rows()
            assert [row["step"] for row in rows] == [0, 128, 256]
            assert rows[-1]["both_modes"] == pytest.approx(result.values["both_modes"])
            again = measure_saddle if experiment is fpo_modes.MODES else measure_bandit
            last = {name: value for name, value in rows[-1].items() if name != "step"}
            assert last == pytest.approx(again(load_agent(Run.open(path), None, "cpu")[0]))
        if arm.agent is None and experiment is fpo_modes.MODES:
            # What has learnt nothing does about what the prior does.
            np.testing.assert_allclose([rows[0][name] for name in ("p_up", "p_down", "p_stay")], PRIOR[:3], atol=0.12)
    module, _, name = experiment.picture.partition(":")
    written = getattr(importlib.import_module(module), name)(experiment, [0, 1], tmp_path)
    assert written
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert bandit_actions(Coin(0.5), 9).shape == (9, 2)


def test_no_pictures_of_nothing(tmp_path):
    for experiment in DECLARED:
        module, _, name = experiment.picture.partition(":")
        assert getattr(importlib.import_module(module), name)(experiment, [0], tmp_path) == []
