"""What floq's experiments measure after training, on a run of a few updates."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

pytest.importorskip("ogbench")
pytest.importorskip("safetensors")

from fastflow.errors import UserError
from fastflow.experiments import floq_measures
from fastflow.record import Run, load_agent
from fastflow.train import default_settings, train
from fastflow.worlds.pointmaze import PointMaze

ENV = "pointmaze-arena-navigate-singletask-v0"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("floq")
    rng = np.random.default_rng(0)
    observations = rng.uniform(0, 20, (400, 2)).astype(np.float32)
    actions = rng.uniform(-1, 1, (400, 2)).astype(np.float32)
    np.savez(
        folder / "moves.npz",
        observations=observations,
        actions=actions,
        next_observations=observations + 0.2 * actions,
        rewards=-np.ones(400, np.float32),
        masks=np.ones(400, np.float32),
        terminals=(np.arange(400) % 40 == 39).astype(np.float32),
    )
    settings = default_settings(
        "floq",
        ENV,
        dataset_path=folder / "moves.npz",
        run_dir=folder / "run",
        steps=20,
        eval_interval=20,
        eval_episodes=1,
        save_interval=10,
        tensorboard=False,
    )
    settings = dataclasses.replace(
        settings, agent=dataclasses.replace(settings.agent, critic_flow_steps=4, batch_size=8)
    )
    return train(settings, out=lambda text: None).run


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(floq_measures, "_EPISODES", 2)
    monkeypatch.setattr(floq_measures, "_ENVS", 2)


def test_critic(run, short):
    found = floq_measures.critic(run)
    assert all(isinstance(value, float) for value in found.values())
    # Nothing is solved after twenty updates: every return is that of -1 for ever.
    assert found["success"] == 0
    assert found["q_bias"] == pytest.approx(found["q_mean"] + 100, rel=1e-4)
    assert found["q_error"] >= abs(found["q_bias"]) > 50
    assert found["var_z"] > 0 and 0 <= found["curvature"] < 0.1
    assert found["feature_norm.growth"] == pytest.approx(1, abs=0.1)
    assert found["critic_feature_norm.growth"] == pytest.approx(1, abs=0.1)


def test_maze(run, short):
    found = floq_measures.maze(run)
    assert floq_measures.critic(run).keys() < found.keys()
    # 400 rows all over a room of 20 x 20: within 0.5 of a place there are 0.8 on average.
    assert found["lost"] == 1 and 0 <= found["lost.rows"] < 2_000
    # A fresh critic says about 0 everywhere, the scripted policy needs up to 200 steps.
    assert 0 < found["lost.excess"] < 100


def test_value_of_the_scripted_policy():
    world = PointMaze("medium")
    goal = torch.tensor([20.0, 20.0])
    # At the goal, 3 away from its edge in a straight line, and in the corner behind it.
    values = floq_measures._scripted(world, torch.tensor([[20.5, 20.0], [20.0, 16.0], [21.3, 21.3]]), goal, 0.9)
    steps = torch.tensor([0.0, 15.0, 5.0])
    torch.testing.assert_close(values, -(1 - 0.9**steps) / 0.1)


def test_recovery(run, short, monkeypatch):
    monkeypatch.setattr(floq_measures, "_SHARES", (0.0, 0.5))
    found = floq_measures.recovery(run)
    assert found["q_error.0"] == pytest.approx(floq_measures.critic(run)["q_error"], rel=1e-3)
    assert found["q_error.50"] != found["q_error.0"] and "q_error.100" not in found
    assert found["success.50"] == 0 and found["length.50"] == 1000


def test_walks_with_stale_first_steps(run):
    now, before = (load_agent(run, step, "cpu")[0] for step in (20, 10))
    observations, actions = torch.rand(6, 2) * 20, torch.rand(6, 2) * 2 - 1
    whole = floq_measures._values(now, observations, actions)
    u = floq_measures._starts(6, 8)
    expected = now.flow_paths(observations, actions, u)[..., -1].mean((0, 2))
    torch.testing.assert_close(whole, expected)
    stale = floq_measures._values(now, observations, actions, before, 1.0)
    torch.testing.assert_close(stale, before.flow_paths(observations, actions, u)[..., -1].mean((0, 2)))
    both = floq_measures._values(now, observations, actions, before, 0.5)
    assert not torch.equal(both, whole) and not torch.equal(both, stale)
    # Half-way, one walk is handed over to the other.
    torch.testing.assert_close(floq_measures._values(now, observations, actions, now, 0.5), whole)


def test_recovery_needs_two_checkpoints(run, tmp_path):
    import shutil

    path = shutil.copytree(run.path, tmp_path / "run")
    Run.open(path).checkpoint_path(10).unlink()
    with pytest.raises(UserError, match="expected at least two checkpoints, got 1"):
        floq_measures.recovery(Run.open(path))


def test_errors_of_values():
    found = floq_measures._errors(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 2.5]))
    assert found["q_error"] == pytest.approx(np.sqrt((1 + 0 + 0.25) / 3))
    assert found["q_mean"] == 2 and found["q_bias"] == pytest.approx(-0.5 / 3)
    assert found["q_correlation"] == pytest.approx(np.corrcoef([1, 2, 3], [2, 2, 2.5])[0, 1])
