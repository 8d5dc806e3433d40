"""On-policy runs by the training loop: what they leave behind, that they go on exactly, and how they stop."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import signal
import warnings

import gymnasium
import numpy as np
import pytest
import torch

from fastflow import agents, online, online_figures, ops
from fastflow.cli import main
from fastflow.errors import UserError
from fastflow.online import OnlineSettings, OnlineTask
from fastflow.record import Run, load_agent, load_checkpoint
from fastflow.train import default_settings, parse, settings_from_config, train

SMALL = {
    "rollout_steps": 8,
    "num_epochs": 2,
    "num_minibatches": 2,
    "actor_hidden": (16,),
    "critic_hidden": (16,),
}
OWN = {"fpo": {"num_pairs": 2, "num_steps": 2}, "dppo": {"num_steps": 2}, "ppo": {}}
ENVS = ["Pendulum-v1", "gridworld-two-walls"]


@pytest.fixture
def settings(tmp_path):
    """Settings of a small run; keyword arguments are those of OnlineSettings, and `agent` a dict of changes."""

    def make(run="run", name="fpo", env="Pendulum-v1", agent=None, **changes) -> OnlineSettings:
        values = {
            "run_dir": tmp_path / run,
            "num_envs": 2,
            "steps": 64,
            "log_interval": 16,
            "eval_interval": 0,
            "eval_episodes": 2,
            "eval_envs": 2,
            "device": "cpu",
            "tensorboard": False,
            **changes,
        }
        config = agents.config_class(name)(**{**SMALL, **OWN[name], **(agent or {})})
        return default_settings(name, env, preset="none", agent=config, **values)

    return make


class Flaw(gymnasium.Env):
    """Moves a point; at step `at` of the first episode it raises or rewards with NaN, as `flaw` says."""

    def __init__(self, flaw: str, at: int, length: int = 50):
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
        self.flaw, self.at, self.length = flaw, at, length
        self.episodes = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.steps = self.np_random.normal(size=2), 0
        self.episodes += 1
        return self.position.astype(np.float32), {}

    def step(self, action):
        self.steps += 1
        if self.steps == self.at and self.episodes == 1:
            if self.flaw == "raise":
                raise ZeroDivisionError("the wheels came off")
            return self.position.astype(np.float32), np.nan, False, False, {}
        self.position[0] += float(action[0])
        return self.position.astype(np.float32), -abs(self.position[0]), False, self.steps >= self.length, {}


def flawed(flaw: str, at: int, **kwargs) -> str:
    """Registers a flawed environment and returns its name."""
    name = f"Flaw{len(gymnasium.registry)}-v0"
    gymnasium.register(name, Flaw, kwargs={"flaw": flaw, "at": at, **kwargs})
    return name


def quiet(text: str) -> None:
    pass


def tensors(run: Run) -> dict[str, torch.Tensor]:
    return run.load().tensors


def rows_of(run: Run) -> list[dict[str, float]]:
    """All but the clock's."""
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in run.train.rows()]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


# What a run leaves behind


@pytest.mark.parametrize("name", OWN)
def test_run_folder(name, settings, tmp_path):
    lines: list[str] = []
    made = settings(name=name, steps=70, log_interval=32, eval_interval=32, save_interval=32)
    # Whole rollouts of 16 steps.
    assert (made.whole().steps, made.stride, made.agent.batch_size) == (64, 16, 8)
    result = train(made, name, out=lines.append)
    run = Run.open(tmp_path / "run")
    assert (result.step, result.interrupted, result.agent.step) == (64, None, 4)
    assert run.train.steps() == [32, 64]
    assert run.eval.steps() == [0, 32, 64]
    assert run.checkpoint_steps() == [32, 64]
    for row in run.train.rows():
        for key in ("actor/actor_loss", "critic/critic_loss", "actor/ratio", "actor/kl", "critic/explained_variance"):
            assert np.isfinite(row[f"training/{key}"])
        assert row["rollout/episodes"] == row["rollout/invalid"] == 0
        assert all(row[f"time/{part}"] > 0 for part in ("env", "sampling", "update", "environment_steps_per_second"))
        parts = row["time/env"] + row["time/sampling"] + row["time/update"]
        assert parts < row["time/total_time"]
    for row in run.eval.rows():
        assert row["evaluation/episode.length"] == row["evaluation/episode.length.random"] == 200
        assert row["evaluation/episode.return"] < 0
        assert row["evaluation/episode.return"] != row["evaluation/episode.return.random"] < 0
        assert row["evaluation/episodes"] == 2
        assert row["time/evaluation"] > 0
        assert not [key for key in row if "success" in key]
    config = json.loads((run.path / "config.json").read_text())
    assert (config["agent_name"], config["num_envs"], config["arguments"]["obs_dim"]) == (name, 2, 3)
    assert config["arguments"]["action_low"] == [-2.0]
    assert set(run.load_samples()) == {"observations"}
    assert "2 environments of Pendulum-v1: 3 observations, 1 actions; run folder" in lines[1]
    assert any(line.startswith("environment step 32 of 64: actor/actor_loss") for line in lines)
    assert any(line.startswith("environment step 32: return -") and "with noise" in line for line in lines)
    assert lines[-1].startswith("done: 64 environment steps")


def test_episodes_of_rollouts_are_told(settings):
    run = train(settings(env="bandit-two-modes", num_envs=4, steps=64, log_interval=32), "fpo", out=quiet).run
    rows = run.train.rows()
    assert [row["rollout/episodes"] for row in rows] == [32, 32]
    for row in rows:
        assert row["rollout/episode.length"] == 1
        assert 0 <= row["rollout/episode.return"] < 1
    run = train(
        settings("grid", env="gridworld-two-walls", num_envs=4, steps=1024, log_interval=1024),
        out=quiet,
        agent_name="fpo",
    ).run
    (row,) = run.train.rows()
    assert row["rollout/episodes"] > 0
    assert 0 < row["rollout/episode.length"] <= 100


def test_steps_and_intervals_are_whole_rollouts(settings):
    made = settings(steps=100, log_interval=17, eval_interval=5, save_interval=33).whole()
    assert made == made.whole()
    assert (made.steps, made.log_interval, made.eval_interval, made.save_interval) == (96, 16, 16, 32)
    never = settings(steps=1, eval_interval=0, save_interval=0).whole()
    assert (never.steps, never.eval_interval, never.save_interval) == (16, 0, 0)
    assert train(dataclasses.replace(made, eval_interval=0), "fpo", out=quiet).step == 96


def test_rows_are_means_over_their_interval(settings):
    every, both = (train(settings(str(i), log_interval=i), "fpo", out=quiet).run.train.rows() for i in (16, 32))
    for name in ("training/actor/actor_loss", "training/critic/critic_loss"):
        means = np.reshape([row[name] for row in every], (2, 2)).mean(1)
        assert [row[name] for row in both] == pytest.approx(means, rel=1e-12)


def test_seed_decides(settings):
    first, again, other = (train(settings(n, seed=s, steps=32), "fpo", out=quiet).run for n, s in zip("abc", (1, 1, 2)))
    assert_same(tensors(first), tensors(again))
    assert rows_of(first) == rows_of(again) != rows_of(other)


@pytest.mark.parametrize("noise", ["zero", "random"])
def test_evaluation_with_one_kind_of_noise(noise, settings):
    run = train(settings(steps=16, eval_interval=16, eval_noise=noise), "fpo", out=quiet).run
    both = train(settings("both", steps=16, eval_interval=16), "fpo", out=quiet).run
    key = "evaluation/episode.return" + (".random" if noise == "random" else "")
    for row, reference in zip(run.eval.rows(), both.eval.rows()):
        assert "evaluation/episode.return.random" not in row
        assert row["evaluation/episode.return"] == reference[key]


def test_processes_of_their_own_give_the_same(settings):
    here, there = (
        train(settings(str(flag), asynchronous=flag, steps=32), "fpo", out=quiet).run for flag in (False, True)
    )
    assert_same(tensors(here), tensors(there))


# Going on


def stop_at(step: int):
    """An `out` that sends this process the signal of Ctrl-C when the evaluation after `step` is reported."""

    def out(text: str) -> None:
        if text.startswith(f"environment step {step}: return"):
            signal.raise_signal(signal.SIGINT)

    return out


@pytest.mark.parametrize(("name", "env"), [*(("fpo", env) for env in ENVS), ("dppo", ENVS[1]), ("ppo", ENVS[0])])
def test_resumed_equals_uninterrupted(name, env, settings):
    """Stopped in the middle of a log interval, behind the end of an episode."""
    changes = dict(env=env, name=name, steps=480, log_interval=480, agent={"normalize_rewards": True})
    whole = train(settings("whole", **changes), name, out=quiet).run
    made = settings("parts", **changes, eval_interval=432, eval_episodes=1, eval_noise="zero")
    first = train(made, name, out=stop_at(432))
    assert (first.step, first.interrupted) == (432, signal.SIGINT)
    second = train(dataclasses.replace(made, resume=made.run_dir), name, out=quiet)
    assert (second.step, second.interrupted, second.agent.step) == (480, None, 30)
    assert_same(tensors(whole), tensors(second.run))
    assert rows_of(whole) == rows_of(second.run)
    assert second.run.eval.steps() == [0, 432, 480]


def test_training_longer(settings):
    whole = train(settings("whole", steps=160), "fpo", out=quiet).run
    made = settings("parts", steps=80)
    train(made, "fpo", out=quiet)
    run = train(dataclasses.replace(made, steps=160, resume=made.run_dir), "fpo", out=quiet).run
    assert_same(tensors(whole), tensors(run))


def test_an_environment_that_cannot_be_saved_begins_anew(settings):
    env = flawed("none", at=0)
    made = settings(env=env, steps=32)
    train(made, "fpo", out=quiet)
    lines: list[str] = []
    result = train(dataclasses.replace(made, steps=64, resume=made.run_dir), "fpo", out=lines.append)
    assert result.step == 64
    assert any("the environments were not saved; their episodes under way begin anew" in line for line in lines)


def test_an_environment_that_raises_in_an_evaluation_is_named_and_the_state_saved(settings):
    env = flawed("raise", at=37)
    made = settings(env=env, steps=64, eval_interval=32)
    with pytest.raises(
        UserError, match=rf"{env}: the environment raised in evaluation episode \d+ at step \d+"
    ) as error:
        train(made, "fpo", out=quiet)
    done = Run.open(made.run_dir).checkpoint_steps()
    assert bool(done) == ("fastflow train fpo --resume" in str(error.value))


def test_an_evaluation_survives_rewards_that_are_not_finite(settings):
    made = settings(env=flawed("nan", at=11), steps=16, eval_interval=16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = train(made, "fpo", out=quiet).run.eval.rows()
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert sum(row.get("evaluation/invalid", 0) for row in rows) > 0


def test_intervals_are_rounded_when_all_flags_are_known():
    flags = ["--env", "Pendulum-v1", "--preset", "playground", "--num-envs", "16", "--rollout-steps", "64"]
    made = parse("fpo", flags).whole()
    assert (made.stride, made.log_interval, made.eval_interval) == (1024, 9 * 1024, 48 * 1024)


def test_resuming_with_other_settings(settings):
    made = settings(steps=16)
    train(made, "fpo", out=quiet)
    resumed = dataclasses.replace(made, resume=made.run_dir)
    with pytest.raises(UserError, match=r"other settings:\n.*num_envs: 2 there, 4 here"):
        train(dataclasses.replace(resumed, num_envs=4), "fpo", out=quiet)
    with pytest.raises(UserError, match=r"agent\.clip: 0\.2 there, 0\.1 here"):
        train(dataclasses.replace(resumed, agent=dataclasses.replace(made.agent, clip=0.1)), "fpo", out=quiet)
    assert settings_from_config(Run.open(made.run_dir), "fpo") == made
    assert parse("fpo", ["--resume", str(made.run_dir)]) == dataclasses.replace(made, resume=made.run_dir)


# Stopping


def test_environment_that_raises(settings):
    made = settings(env=flawed("raise", at=37), steps=160)
    with pytest.raises(UserError) as error:
        train(made, "fpo", out=quiet)
    message = str(error.value)
    # Whole rollouts of 8 steps before it; both environments raise, the first is told.
    for part in (
        f"{made.env}: environment 0 failed in its step 37 (step 37 of the episode): ZeroDivisionError: the wheels came",
        "stopped after 64 environment steps and saved",
        f"fastflow train fpo --resume {made.run_dir}",
    ):
        assert part in message
    run = Run.open(made.run_dir)
    assert run.checkpoint_steps() == [64]
    lines: list[str] = []
    result = train(dataclasses.replace(made, steps=96, resume=made.run_dir), "fpo", out=lines.append)
    assert (result.step, result.agent.step) == (96, 6)
    assert any("begin anew" in line for line in lines)


def test_environment_that_raises_before_the_first_update(settings):
    made = settings(env=flawed("raise", at=3))
    with pytest.raises(UserError, match=r"environment 0 failed in its step 3 \(step 3 of the episode\)") as error:
        train(made, "fpo", out=quiet)
    assert "resume" not in str(error.value)


def test_reward_that_is_not_finite(settings):
    made = settings(env=flawed("nan", at=5, length=20), steps=96, log_interval=48)
    with pytest.warns(UserWarning, match="environment 0 gave a reward or an observation that is not finite") as seen:
        result = train(made, "fpo", out=quiet)
    assert len(seen) == 1
    assert result.step == 96
    rows = result.run.train.rows()
    # Both environments, once each; the episode ends there.
    assert [row["rollout/invalid"] for row in rows] == [2, 0]
    assert rows[0]["rollout/episodes"] == 2 + 2 * ((24 - 5) // 20)
    for row in rows:
        assert all(np.isfinite(value) for value in row.values())
    assert all(value.isfinite().all() for value in tensors(result.run).values() if value.is_floating_point())


def task_and_agent(made):
    task = OnlineTask(made, torch.device("cpu"), None, made.run_dir, quiet)
    agent = agents.make("fpo", made.agent, **task.arguments)
    task.bind(agent)
    return task, agent


def test_policy_that_is_not_finite(settings):
    task, agent = task_and_agent(settings())
    with contextlib.closing(task):
        task.sample(8, torch.Generator().manual_seed(0))
        with torch.no_grad():
            next(agent.networks.actor.parameters()).fill_(np.nan)
        agent._changed()
        with pytest.raises(
            UserError, match=r"not finite, \[nan\] in environment 0 of Pendulum-v1 at step 8 of its ep.*--"
        ):
            task.sample(8, torch.Generator().manual_seed(0))


def test_loss_that_is_not_finite(settings):
    made = settings(steps=1600, save_interval=16, log_interval=160, agent={"lr": 1e30, "max_grad_norm": 0.0})
    with pytest.raises(UserError, match=r"not finite.*[lL]earning rate may help \(--agent\.lr\)"):
        train(made, "fpo", out=quiet)
    run = Run.open(made.run_dir)
    for step in run.checkpoint_steps():
        saved = load_checkpoint(run.checkpoint_path(step))
        assert all(value.isfinite().all() for value in saved.tensors.values() if value.is_floating_point())


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ("CartPole-v1", "expected continuous actions"),
        ("FrozenLake-v1", "expected continuous actions"),
        ("Pendulum-v7", "unknown environment"),
        ("gridworld-two_walls", "did you mean gridworld-two-walls"),
    ],
)
def test_environments_that_do_not_fit(env, message, settings):
    made = settings(env=env)
    with pytest.raises(UserError, match=message):
        train(made, "fpo", out=quiet)
    assert not made.run_dir.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_envs": 0}, "num_envs: expected at least 1, got 0"),
        ({"eval_episodes": 0}, "eval_episodes: expected at least 1, got 0"),
        ({"eval_envs": 0}, "eval_envs: expected at least 1, got 0"),
        ({"steps": -1}, "steps: expected at least 0, got -1"),
        ({"eval_noise": "none"}, "eval_noise: expected both, zero or random, got 'none'"),
        (
            {"agent": {"num_minibatches": 17}},
            r"agent\.num_minibatches: expected at most the 16 rows of a rollout \(2 environments x 8 steps\), got 17",
        ),
    ],
)
def test_settings_that_cannot_be(changes, message, settings, tmp_path):
    with pytest.raises(ValueError, match=message):
        settings(**changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", ["--num-envs 0", "--num-minibatches 5000", "--agent.clip 0", "--preset nothing"])
def test_flags_that_cannot_be(flags, capsys, tmp_path, monkeypatch):
    pytest.importorskip("tyro")
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["train", "fpo", "--env", "Pendulum-v1", *shlex.split(flags)])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# Saved runs


@pytest.fixture
def two_runs(settings):
    """One of FPO and one of PPO, with evaluations."""
    changes = dict(env="bandit-two-modes", steps=32, eval_interval=16, save_interval=16, eval_episodes=3)
    return [train(settings(name, name, **changes), name, out=quiet).run for name in ("fpo", "ppo")]


def test_evaluate(two_runs, capsys):
    assert main(["evaluate", *(str(run.path) for run in two_runs), "--episodes", "2", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "with noise" in printed
    for run in two_runs:
        assert str(run.path) in printed
        (path,) = (run.path / "evaluations").iterdir()
        written = json.loads(path.read_text())
        assert (written["step"], written["env"], written["episodes"]) == (32, "bandit-two-modes", 2)
        assert np.mean(written["each"]["zero"]["returns"]) == pytest.approx(written["episode.return"])
        assert np.mean(written["each"]["random"]["returns"]) == pytest.approx(written["episode.return.random"])
    records = online.evaluate_runs([two_runs[0].path], episodes=1, all_checkpoints=True, device="cpu")
    assert [record["step"] for record in records] == [16, 32]
    again = online.evaluate_runs([two_runs[0].path], episodes=1, checkpoint=16, device="cpu")
    assert again[0]["each"] == records[0]["each"]
    with pytest.raises(UserError, match="no checkpoint of step 3"):
        online.evaluate_runs([two_runs[0].path], checkpoint=3, device="cpu")
    with pytest.raises(UserError, match="either --checkpoint or --all-checkpoints"):
        online.evaluate_runs([two_runs[0].path], checkpoint=16, all_checkpoints=True)


def test_plot(two_runs, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    paths = [str(run.path) for run in two_runs]
    assert main(["plot", *paths, "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "learning_curve.png").stat().st_size > 10_000
    (path,) = online_figures.plot_runs(paths[:1])
    assert path == two_runs[0].path / "figures" / "learning_curve.png"
    figure, axes = online_figures.new_figure(2)
    online_figures.draw_returns(axes[0], two_runs)
    online_figures.draw_time(axes[1], two_runs)
    # Of each run: rollouts, with noise, without.
    assert [len(line.get_xdata()) for line in axes[0].lines][1::3] == [3, 3]
    assert [len(line.get_xdata()) for line in axes[0].lines][2::3] == [3, 3]
    seconds = sum(row["time/env"] + row["time/sampling"] + row["time/update"] for row in two_runs[0].train.rows())
    seconds += sum(row["time/evaluation"] for row in two_runs[0].eval.rows())
    widths = [container.patches[0].get_width() for container in axes[1].containers]
    assert sum(widths) == pytest.approx(seconds)
    figure.clear()


def test_plot_of_a_run_without_evaluations(settings):
    pytest.importorskip("matplotlib")
    run = train(settings(steps=16), "fpo", out=quiet).run
    (path,) = online_figures.plot_runs([run.path])
    assert path.stat().st_size > 5_000


def test_saved_policies_act_as_they_did(two_runs):
    agent, saved = load_agent(two_runs[0], device="cpu")
    assert (saved.step, agent.step) == (32, 2)
    observations = torch.zeros(3, 1)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    again, _ = load_agent(two_runs[0], device="cpu")
    assert torch.equal(agent.act(observations, generators[0]), again.act(observations, generators[1]))


# Learning


def test_fpo_finds_the_modes_of_a_bandit(settings):
    config = dict(lr=3e-3, clip=0.2, num_pairs=8, num_steps=5, num_epochs=4, num_minibatches=4, gae_lambda=0.0)
    config |= dict(actor_hidden=(32, 32), critic_hidden=(16,), rollout_steps=8)
    changes = dict(num_envs=64, steps=12_288, log_interval=2048, eval_interval=12_288, eval_episodes=64, eval_envs=64)
    run = train(settings(env="bandit-two-modes", agent=config, **changes), "fpo", out=quiet).run
    returns = [row["rollout/episode.return"] for row in run.train.rows()]
    assert returns[0] < 0.2
    assert returns[-1] > 0.65
    assert run.eval.rows()[-1]["evaluation/episode.return.random"] > 0.65


@pytest.mark.parametrize("name", OWN)
def test_fused_and_reference_training_begin_alike(name, settings, monkeypatch):
    config, found = dict(rollout_steps=16, num_epochs=2, num_minibatches=2), []
    for backend in ("auto", "reference"):
        # What the environment variable FASTFLOW_BACKEND sets.
        monkeypatch.setattr(ops, "DEFAULT_BACKEND", backend)
        made = settings(backend, name, agent=config, num_envs=4, steps=128, log_interval=64)
        found.append(train(made, name, out=quiet).run.train.rows())
    for mine, theirs in zip(*found, strict=True):
        for key in ("actor/actor_loss", "critic/critic_loss", "actor/ratio", "actor/kl", "actor/grad_norm"):
            assert mine[f"training/{key}"] == pytest.approx(theirs[f"training/{key}"], rel=1e-3, abs=1e-4), key
