"""Families of policies that are learnt, and successor models conditioned on them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fastflow.agents.forward_backward import LOOP_PRESETS, PRESETS, ForwardBackwardConfig
from fastflow.cli import main
from fastflow.errors import UserError
from fastflow.family import FamilySettings, LearntFamily
from fastflow.record import Run
from fastflow.train import train
from fastflow.worlds import make_world

pytest.importorskip("tyro")
pytest.importorskip("scipy")

SMALL = {"z_dim": 4, "batch_size": 32, "hidden_dim": 16, "feature_dim": 8, "backward_hidden_dims": (16,)}


def quiet(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A few updates on the arena."""
    path = tmp_path_factory.mktemp("family") / "fb"
    settings = FamilySettings(
        env="pointmaze-arena",
        agent=ForwardBackwardConfig(**SMALL, discount=0.9),
        run_dir=path,
        steps=6,
        log_interval=3,
        eval_interval=3,
        save_interval=3,
        transitions=400,
        eval_episodes=2,
        eval_steps=4,
        device="cpu",
        tensorboard=False,
    )
    return train(settings, "fb", out=quiet).run


def test_run_folder(family):
    assert family.eval.steps() == [0, 3, 6]
    row = family.eval.rows()[-1]
    assert np.isfinite(row["evaluation/return"])
    assert np.isfinite(row["evaluation/return.behaviour"])
    # The same behaviour at the same starts, whatever the family has learnt.
    assert len({r["evaluation/return.behaviour"] for r in family.eval.rows()}) == 1
    assert family.config["arguments"]["observation_statistics"] is not None


def test_world_with_learnt_policies(family):
    base = make_world("pointmaze-arena")
    world = LearntFamily.of_run(base, family)
    assert world.policy_dim == 4
    assert set(world.policies) <= set(base.tasks)
    generator = torch.Generator().manual_seed(0)
    states = world.starts(5, generator)
    w = world.draw_policies(5, generator)
    torch.testing.assert_close(w.norm(dim=1), torch.full((5,), 2.0))
    actions = world.act(states, w)
    assert actions.shape == (5, 2)
    assert not torch.equal(actions, world.act(states, w.flip(0)))
    futures = world.futures(states, actions, w, 0.5, 3, generator)
    assert futures.shape == (5, 3, 2)
    task = next(iter(world.policies))
    torch.testing.assert_close(world.reward(task, states), base.reward(task, states))


def test_successor_model_of_a_learnt_family(family, tmp_path, capsys):
    run = tmp_path / "model"
    argv = ["train", "td2-cfm", "--env", "pointmaze-arena", "--policies", str(family.path), "--policy", "all"]
    argv += ["--steps", "2", "--eval-interval", "2", "--transitions", "300", "--eval-states", "2", "--gamma", "0.8"]
    argv += ["--eval-samples", "16", "--hidden", "8", "--batch-size", "8", "--run-dir", str(run), "--no-tensorboard"]
    assert main(argv) == 0
    assert np.isfinite(Run.open(run).eval.rows()[-1]["evaluation/emd"])
    assert Run.open(run).config["arguments"]["policy_dim"] == 4
    assert main(["evaluate", str(run), "--states", "2", "--samples", "8"]) == 0
    assert main(["train", "td2-cfm", "--resume", str(run), "--steps", "3"]) == 0
    capsys.readouterr()


def test_evaluate_and_plot(family, capsys):
    pytest.importorskip("matplotlib")
    assert main(["evaluate", str(family.path), "--episodes", "2"]) == 0
    record = json.loads((family.path / "evaluations" / "step_00000006_seed0.json").read_text())
    assert record["episodes"] == 2
    assert "behaviour" in capsys.readouterr().out
    assert main(["plot", str(family.path)]) == 0
    assert (family.path / "figures" / "learning_curve.png").stat().st_size > 5_000


def test_family_of_another_world_is_refused(family):
    with pytest.raises(UserError, match="expected a run of agent fb on pointmaze-medium, got one of fb on pointmaze-a"):
        LearntFamily.of_run(make_world("pointmaze-medium"), family)


def test_every_preset_belongs_to_a_loop():
    assert set(LOOP_PRESETS) == set(PRESETS)
    for name, settings in PRESETS.items():
        FamilySettings(env="pointmass-maze", agent=ForwardBackwardConfig(**settings), **LOOP_PRESETS[name])
