"""Training successor models on worlds: run folders, exact resumption, evaluation, figures, data files, bad input."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from fastflow.agents.td2_cfm import Td2CfmConfig
from fastflow.cli import main
from fastflow.errors import UserError
from fastflow.horizon import HorizonSettings, HorizonTask, compare, evaluate_runs, make_truth, policies_of
from fastflow.record import Run, load_agent
from fastflow.train import parse, settings_from_config, train
from fastflow.worlds import make_world
from fastflow.worlds.files import collect, load_transitions

pytest.importorskip("tyro")
pytest.importorskip("scipy")

SMALL = {"architecture": "mlp", "hidden": (16, 16), "activation": "silu", "batch_size": 16, "num_steps": 2}
SMALL |= {"eval_num_steps": 2, "lr": 1e-3, "gamma": 0.8, "ddim_steps": 3}


def quiet(text: str) -> None:
    pass


@pytest.fixture
def settings(tmp_path):
    """Settings of a small run; keyword arguments are those of HorizonSettings, and `agent` a dict of changes."""

    def make(name: str = "run", agent: dict | None = None, **changes) -> HorizonSettings:
        values = {
            "env": "linear-gaussian",
            "run_dir": tmp_path / name,
            "steps": 12,
            "log_interval": 4,
            "eval_interval": 6,
            "save_interval": 0,
            "transitions": 500,
            "eval_states": 2,
            "eval_samples": 32,
            "device": "cpu",
            "tensorboard": False,
            **changes,
        }
        return HorizonSettings(agent=Td2CfmConfig(**{**SMALL, **(agent or {})}), **values)

    return make


def trained(settings) -> Run:
    return train(settings, "td2-cfm", out=quiet).run


def test_run_folder(settings):
    lines: list[str] = []
    run = train(settings(), "td2-cfm", out=lines.append).run
    assert run.train.steps() == [4, 8, 12]
    assert run.eval.steps() == [0, 6, 12]
    row = run.eval.rows()[-1]
    for name in ("emd", "emd_floor", "sliced_w1", "mmd", "nll", "value_mse", "value_mse.bump-right", "velocity_mse"):
        assert np.isfinite(row[f"evaluation/{name}"]), name
    assert {r["evaluation/emd_floor"] for r in run.eval.rows()} == {row["evaluation/emd_floor"]}
    for name in ("loss", "direct_loss", "bootstrap_loss"):
        assert np.isfinite(run.train.rows()[0][f"training/{name}"])
    config = json.loads((run.path / "config.json").read_text())
    assert config["dataset"]["policy"] == "spiral"
    assert config["dataset"]["rows"] == 500
    assert config["agent"]["variant"] == "td2-cfm"
    assert any("EMD" in line and "two true samples" in line for line in lines)


@pytest.mark.parametrize("variant", ["td2-cfm", "mc-cfm", "td-dd"])
def test_resumes_bit_for_bit(settings, variant):
    whole = trained(settings("whole", {"variant": variant}))
    half = trained(settings("half", {"variant": variant}, steps=6))
    again = dataclasses.replace(settings_from_config(half, "td2-cfm"), steps=12, resume=half.path)
    continued = train(again, "td2-cfm", out=quiet).run
    a, b = whole.load().tensors, continued.load().tensors
    assert a.keys() == b.keys()
    for name, value in a.items():
        if name != "loop/metric_sums":  # the stop after six updates closed an interval
            assert torch.equal(value, b[name]), name
    last = [run.eval.rows()[-1] for run in (whole, continued)]
    assert last[0]["evaluation/emd"] == last[1]["evaluation/emd"]


@pytest.mark.parametrize(
    ("env", "policy", "variant"),
    [
        ("circle", "all", "td2-cfm"),
        ("circle", "all", "mc-cfm"),
        ("pointmaze-arena", "auto", "mc-cfm"),
        ("pointmaze-arena", "all", "mc-cfm"),
        ("pointmaze-arena", "all", "td-cfm"),
        ("pointmass-maze", "loop", "td2-cfm"),
    ],
)
def test_worlds_and_policies_train(settings, env, policy, variant):
    agent = {"policy": policy, "variant": variant, "normalize": True}
    run = trained(settings(env=env, agent=agent, steps=3, eval_interval=3, transitions=300))
    row = run.eval.rows()[-1]
    assert np.isfinite(row["evaluation/emd"])
    world = make_world(env)
    model = load_agent(run, None, "cpu")[0].model
    assert model.policy_dim == (world.policy_dim if policy == "all" else 0)
    if policy == "all":
        embeddings = torch.tensor(list(world.policies.values()))
        torch.testing.assert_close(model.policy_mean, embeddings.mean(0), atol=0.2, rtol=0.02)
    assert "evaluation/velocity_mse" not in row


def test_batches_follow_the_target_policy(settings):
    world = make_world("pointmaze-arena")
    name = list(world.policies)[2]
    given = settings(env="pointmaze-arena", agent={"policy": name}, transitions=300)
    task = HorizonTask(given, torch.device("cpu"), None, given.run_dir, quiet)
    batch = task.sample(64, torch.Generator().manual_seed(0))
    torch.testing.assert_close(batch["next_actions"], world.act(batch["next_observations"], world.w(name)))
    again = task.sample(64, torch.Generator().manual_seed(0))
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    family = dataclasses.replace(given, agent=dataclasses.replace(given.agent, policy="all"))
    task = HorizonTask(family, torch.device("cpu"), None, given.run_dir, quiet)
    batch = task.sample(64, torch.Generator().manual_seed(0))
    assert len(batch["policies"].unique(dim=0)) > 5
    expected = world.act(batch["next_observations"], batch["policies"])
    torch.testing.assert_close(batch["next_actions"], expected)


def test_monte_carlo_pool_has_futures_of_its_rows(settings):
    given = settings(env="circle", agent={"variant": "mc-cfm", "gamma": 0.0}, transitions=200)
    task = HorizonTask(given, torch.device("cpu"), None, given.run_dir, quiet)
    batch = task.sample(32, torch.Generator().manual_seed(0))
    # With gamma 0 the future is the next state, which a deterministic world fixes.
    torch.testing.assert_close(batch["futures"], batch["next_observations"], atol=1e-5, rtol=0)
    given = settings(env="pointmaze-arena", agent={"variant": "mc-cfm", "gamma": 0.0}, transitions=200)
    task = HorizonTask(given, torch.device("cpu"), None, given.run_dir, quiet)
    batch = task.sample(32, torch.Generator().manual_seed(0))
    torch.testing.assert_close(batch["futures"], batch["next_observations"], atol=1e-4, rtol=0)


def test_behaviour_policy_takes_the_datas_own_next_actions(settings):
    lines: list[str] = []
    given = settings(env="pointmaze-arena", agent={"policy": "behaviour"}, transitions=300)
    result = train(given, "td2-cfm", out=lines.append)
    assert not result.run.eval.steps()
    assert any("evaluation is skipped" in line for line in lines)
    with pytest.raises(UserError, match="policy behaviour cannot be asked for actions"):
        evaluate_runs([result.run.path])


def test_true_samples_are_at_the_floor():
    # A model that answers with true futures scores the floor: no metric has an offset of its own.
    world = make_world("linear-gaussian")
    truth = make_truth(world, None, 0.8, 4, 256, seed=3)

    model = load_model_of_truth(world, truth)
    metrics = compare(model, world, truth, 0)
    assert metrics["emd"] == pytest.approx(metrics["emd_floor"], rel=0.3)
    assert abs(metrics["mmd"]) < 0.01
    assert metrics["value_mse"] < 0.2


def load_model_of_truth(world, truth):
    from fastflow import MLP, PowerFourier, SuccessorFlow

    class TrueFutures(SuccessorFlow):
        def sample(self, obs, action, n=1, **options):
            return world.futures(obs, action, None, self.gamma, n, torch.Generator().manual_seed(99))

    return TrueFutures(2, 2, gamma=0.8, hidden=(4,), architecture=MLP(), time_embedding=PowerFourier(4))


def test_evaluate_and_plot_commands(settings, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run = trained(settings("maze", env="pointmaze-arena", agent={"normalize": True}, transitions=300, eval_interval=0))
    assert main(["evaluate", str(run.path), "--states", "2", "--samples", "16"]) == 0
    assert "EMD" in capsys.readouterr().out
    record = json.loads((run.path / "evaluations" / "step_00000012_seed0.json").read_text())
    assert (record["states"], record["samples"]) == (2, 16)
    assert Run.open(run.path).eval.steps() == [12]
    assert main(["plot", str(run.path), "--output", str(tmp_path / "figures")]) == 0
    written = capsys.readouterr().out.split()
    assert [name.split("/")[-1] for name in written] == ["learning_curve.png", "futures.png", "value_map.png"]
    assert all((tmp_path / "figures" / name.split("/")[-1]).stat().st_size > 5_000 for name in written)


def test_flags_of_the_agent_need_no_prefix():
    argv = ["--env", "linear-gaussian", "--gamma", "0.95", "--variant=td-cfm", "--normalize", "--agent.lr", "0.01"]
    settings = parse("td2-cfm", argv)
    agent = settings.agent
    assert (agent.gamma, agent.variant, agent.normalize, agent.lr) == (0.95, "td-cfm", True, 0.01)
    assert settings.preset == "linear-gaussian"
    assert settings.steps == 24_000


# Files


def test_collected_file_trains_as_the_world_does(settings, tmp_path, capsys):
    command = ["collect", "circle", "--transitions", "120", "--dataset-dir", str(tmp_path)]
    assert main(command) == 0
    path = tmp_path / "circle.npz"
    assert capsys.readouterr().out.strip() == str(path)
    with pytest.raises(UserError, match="exists; pass --overwrite"):
        collect("circle", dataset_dir=tmp_path, transitions=10)
    rows = load_transitions(path, make_world("circle"))
    direct = make_world("circle").transitions(120, torch.Generator().manual_seed(0))
    for name in ("observations", "actions", "next_observations", "next_actions", "masks"):
        assert torch.equal(rows[name], direct[name])
    a = trained(settings("file", env="circle", dataset_path=path, steps=3, eval_interval=0))
    b = trained(settings("world", env="circle", transitions=120, steps=3, eval_interval=0))
    assert a.config["dataset"]["fingerprint"] == b.config["dataset"]["fingerprint"]


def test_trajectories_in_ogbenchs_format(settings, tmp_path):
    path = tmp_path / "pointmaze-arena-navigate-v0.npz"
    observations = np.arange(12, dtype=np.float32).reshape(6, 2)
    terminals = np.array([0, 0, 1, 0, 0, 1], dtype=bool)
    actions = np.linspace(-1, 1, 12, dtype=np.float32).reshape(6, 2)
    np.savez(path, observations=observations, actions=actions, terminals=terminals)
    rows = load_transitions(path, make_world("pointmaze-arena"))
    assert rows["observations"].tolist() == observations[[0, 1, 3, 4]].tolist()
    assert rows["next_actions"].tolist() == actions[[1, 2, 4, 5]].tolist()
    run = trained(settings(env="pointmaze-arena", dataset_path=path, steps=2, agent={"policy": "behaviour"}))
    assert run.config["dataset"]["rows"] == 4


def write(path, **changes):
    rows = {name: np.zeros((4, 2), np.float32) for name in ("observations", "next_observations", "actions")}
    rows["masks"] = np.ones(4, np.float32)
    np.savez(path, **{name: value for name, value in {**rows, **changes}.items() if value is not None})
    return path


@pytest.mark.parametrize(
    ("changes", "policy", "message"),
    [
        ({"observations": np.zeros((4, 3), np.float32)}, "auto", "'observations': expected rows of 2 numbers"),
        ({"masks": np.ones(3, np.float32)}, "auto", "'masks': expected 4 rows"),
        ({"actions": np.full((4, 2), np.nan, np.float32)}, "auto", "'actions': NaN or infinite value in row 0"),
        ({"next_observations": np.full((4, 2), np.inf, np.float32)}, "auto", "'next_observations': NaN or infinite"),
        ({"masks": None}, "auto", "the key 'masks' is missing"),
        ({}, "behaviour", "policy behaviour needs 'next_actions'"),
    ],
)
def test_files_that_do_not_fit(settings, tmp_path, changes, policy, message):
    path = write(tmp_path / "rows.npz", **changes)
    with pytest.raises(UserError, match=message):
        trained(settings(dataset_path=path, agent={"policy": policy}))
    assert not (tmp_path / "run").exists()


# Bad input


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--env", "linear-gaussian", "--gamma", "1.0"], r"gamma must be in \[0, 1\)"),
        (["--env", "linear-gausian"], "did you mean linear-gaussian"),
        (["--env", "linear-gaussian", "--policy", "all"], "policy all: linear-gaussian has one policy"),
        (["--env", "circle", "--policy", "sideways"], "policy sideways: unknown; circle has auto, behaviour, all"),
        (["--env", "circle", "--policy", "behaviour", "--variant", "mc-cfm"], "policy behaviour has no act"),
        (["--env", "circle", "--dataset-path", "nowhere.npz"], "nowhere.npz: no such file"),
        (["--env", "circle", "--eval-samples", "20000"], "eval_samples: expected at most 8192, got 20000"),
        (["--env", "circle", "--transitions", "0"], "transitions: expected at least 1"),
        (["--env", "circle", "--preset", "circl"], "preset circl: unknown; did you mean circle"),
    ],
)
def test_command_line_that_cannot_be(argv, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    import re

    try:
        code = main(["train", "td2-cfm", *argv])
    except SystemExit as error:  # tyro's own complaints
        code = error.code
    assert code == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err + captured.out)
    assert not list(tmp_path.iterdir())


def test_other_settings_cannot_be_resumed(settings):
    run = trained(settings(steps=2, eval_interval=0))
    again = dataclasses.replace(settings_from_config(run, "td2-cfm"), transitions=400, resume=run.path)
    with pytest.raises(UserError, match="transitions: 500 there, 400 here"):
        train(again, "td2-cfm", out=quiet)


def test_policies_of_a_family_take_turns():
    world = make_world("circle")
    w = policies_of(world, "all", 4)
    assert w[3].tolist() == w[0].tolist()
    assert len(w.unique(dim=0)) == 3
    assert policies_of(make_world("linear-gaussian"), "spiral", 4) is None
