"""Offline to online: how much is acted and learnt, that it goes on exactly, and what is said of rewards and of data."""

from __future__ import annotations

import dataclasses
import shutil
import signal

import numpy as np
import pytest
import torch

from fastflow import cli
from fastflow.data import load_dataset
from fastflow.errors import UserError
from fastflow.experiments.seeds import Seeds, split, train_seeds
from fastflow.finetuning import FineTuning
from fastflow.offline import OfflineTask, TrainSettings
from fastflow.record import Run
from fastflow.train import default_settings, parse, train

pytest.importorskip("ogbench")
pytest.importorskip("tyro")

ENV = "pointmaze-arena-navigate-singletask-v0"
SMALL = {
    "batch_size": 8,
    "block_width": 16,
    "block_depth": 1,
    "value_hidden_dims": (16,),
    "actor_hidden_dims": (16,),
    "noise_samples": 1,
    "critic_flow_steps": 2,
    "flow_steps": 2,
}
ROWS = 300


def write(path, *, solved_within: float = 3.0) -> None:
    """Random motion in the arena, as a transitions file."""
    rng = np.random.default_rng(0)
    observations = rng.uniform(0, 20, (ROWS, 2)).astype(np.float32)
    actions = rng.uniform(-1, 1, (ROWS, 2)).astype(np.float32)
    solved = np.linalg.norm(observations - 20, axis=1) < solved_within
    np.savez(
        path,
        observations=observations,
        actions=actions,
        next_observations=observations + 0.2 * actions,
        rewards=solved.astype(np.float32) - 1,
        masks=1 - solved.astype(np.float32),
        terminals=(np.arange(ROWS) % 30 == 29).astype(np.float32),
    )


@pytest.fixture(scope="module")
def transitions(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "moves.npz"
    write(path)
    return path


@pytest.fixture
def settings(transitions, tmp_path):
    """Settings of a small run; keyword arguments are those of TrainSettings, and `agent` a dict of changes."""

    def make(name: str = "run", agent: dict | None = None, **changes) -> TrainSettings:
        values = {
            "dataset_path": transitions,
            "run_dir": tmp_path / name,
            "steps": 4,
            "online_steps": 12,
            "log_interval": 5,
            "eval_interval": 0,
            "save_interval": 0,
            "device": "cpu",
            "tensorboard": False,
            **changes,
        }
        made = default_settings("floq", ENV, "none", **values)
        return dataclasses.replace(made, agent=dataclasses.replace(made.agent, **SMALL, **(agent or {})))

    return make


def quiet(text: str) -> None:
    pass


def stop_at(step: int):
    """An `out` that sends this process the signal of Ctrl-C when the log point of `step` is said."""

    def out(text: str) -> None:
        if text.startswith(f"step {step} of"):
            signal.raise_signal(signal.SIGINT)

    return out


def losses(run: Run) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in run.train.rows()]


def assert_same_state(a: Run, b: Run) -> None:
    first, second = a.load().tensors, b.load().tensors
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def online_rows(run: Run) -> dict[str, torch.Tensor]:
    """What came in online, from the files."""
    load_file = pytest.importorskip("safetensors.torch").load_file
    parts = [load_file(path) for path in sorted((run.path / "replay").iterdir())]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


# How much is done


@pytest.mark.parametrize(("steps", "utd_ratio", "balanced"), [(4, 1, False), (0, 4, True)])
def test_counts(settings, steps, utd_ratio, balanced):
    """Also that of RLPD's kind: no offline update, half of every batch from the data."""
    made = settings(steps=steps, utd_ratio=utd_ratio, balanced_sampling=balanced)
    lines: list[str] = []
    result = train(made, out=lines.append)
    assert result.step == steps + 12
    assert result.agent.step == steps + 12 * utd_ratio
    assert len(online_rows(result.run)["rewards"]) == 12
    assert result.run.last_step == result.run.checkpoint_steps()[-1] == steps + 12
    row = result.run.train.rows()[-1]
    assert row["rollout/transitions"] == 12
    assert row["training/critic/critic_loss"] > 0
    # Where learning went online there are a row and a checkpoint.
    if steps:
        assert result.run.train.steps() == [4, 5, 10, 15, 16]
        assert result.run.checkpoint_steps() == [4, 16]
        assert "rollout/transitions" not in result.run.train.rows()[0]
    assert lines[-1].startswith(f"done: {steps + 12} steps")


def test_transitions_follow_each_other(settings):
    rows = online_rows(train(settings(online_steps=30), out=quiet).run)
    assert torch.equal(rows["next_observations"][:-1], rows["observations"][1:])
    assert (rows["actions"].abs() < 1).all()
    assert rows["rewards"].tolist() == [-1.0] * 30
    assert rows["masks"].tolist() == [1.0] * 30
    assert len(rows["actions"].unique(dim=0)) == 30


class Walker:
    """Walks to the goal, which lies at (20, 20)."""

    def act(self, observations: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        return (20 - observations).clamp(-1, 1)


def test_the_end_of_an_episode(settings, transitions, tmp_path):
    """A solved task ends it: nothing is bootstrapped from there, and the next row is another episode's."""
    made = settings()
    online = FineTuning(made, load_dataset(ENV, dataset_path=transitions)[0], (-1.0, 0.0), tmp_path, quiet)
    while online.buffer is None or online.buffer.rows(online.buffer.added - 1, online.buffer.added)["masks"][0]:
        online.step(Walker(), torch.Generator())
    online.step(Walker(), torch.Generator())
    rows = online.buffer.rows(0, online.buffer.added)
    assert 50 < online.buffer.added < 300
    assert rows["rewards"].tolist() == [-1.0] * (online.buffer.added - 2) + [0.0, -1.0]
    assert torch.equal(rows["masks"], -rows["rewards"])
    assert torch.equal(rows["terminals"], 1 - rows["masks"])
    assert (rows["next_observations"][-2] - 20).norm() < 1.5
    assert (rows["observations"][-1] - 20).norm() > 10
    assert online.report()["rollout/success"] == 1.0
    online.close()


# Going on


def test_resumed_equals_uninterrupted(settings):
    """Stopped before and after learning went online, the latter in the middle of a log interval."""
    common = {"steps": 6, "log_interval": 4, "utd_ratio": 2, "buffer_size": ROWS + 5}
    whole = train(settings("whole", **common), out=quiet).run
    made = settings("parts", **common)
    first = train(made, out=stop_at(4))
    assert (first.step, first.interrupted) == (4, signal.SIGINT)
    resumed = dataclasses.replace(made, resume=made.run_dir)
    second = train(resumed, out=stop_at(12))
    assert (second.step, len(list((made.run_dir / "replay").iterdir()))) == (12, 1)
    third = train(resumed, out=quiet)
    assert (third.step, third.interrupted) == (18, None)
    assert_same_state(whole, third.run)
    assert losses(whole) == losses(third.run)
    ours, theirs = online_rows(whole), online_rows(third.run)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("balanced", [False, True])
def test_a_finished_offline_run_goes_online(settings, balanced):
    """It ends as one that was told so from the beginning; its copy can go online in another way."""
    online = {"online_steps": 12, "balanced_sampling": balanced}
    whole = train(settings("whole", **online), out=quiet).run
    made = settings("parts", online_steps=0)
    train(made, out=quiet)
    shutil.copytree(made.run_dir, made.run_dir.with_name("copy"))
    run = train(dataclasses.replace(made, resume=made.run_dir, **online), out=quiet).run
    assert_same_state(whole, run)
    assert (run.config["steps"], run.config["online_steps"]) == (4, 12)
    copy = dataclasses.replace(made, resume=made.run_dir.with_name("copy"), utd_ratio=3, **online)
    assert train(copy, out=quiet).agent.step == 4 + 3 * 12
    # And further.
    longer = train(dataclasses.replace(made, resume=made.run_dir, **online | {"online_steps": 15}), out=quiet)
    assert (longer.step, longer.agent.step) == (19, 19)


def test_an_environment_that_cannot_be_saved(settings):
    """Its episode begins anew, which is said, and at the same start every time."""
    made = dataclasses.replace(settings(log_interval=4), env="pointmaze-teleport-navigate-singletask-v0")
    train(made, out=stop_at(8))
    shutil.copytree(made.run_dir, made.run_dir.with_name("again"))
    found = []
    for path in (made.run_dir, made.run_dir.with_name("again")):
        lines: list[str] = []
        found.append(train(dataclasses.replace(made, resume=path), out=lines.append).run)
        assert any("its episode under way begins anew" in line for line in lines)
    assert_same_state(*found)
    rows = online_rows(found[0])
    assert not torch.equal(rows["next_observations"][3], rows["observations"][4])
    assert torch.equal(rows["next_observations"][4], rows["observations"][5])


def test_an_environment_that_fails(settings, tmp_path):
    """The transition is not kept, and what came in before it is saved; the environment is then made anew."""
    made = settings()
    task = OfflineTask(made, torch.device("cpu"), None, tmp_path, quiet)
    task.bind(Walker())
    for _ in range(3):
        assert task.begin_step(4, torch.Generator()) == 1
    task.online.envs._guards[0].env.unwrapped.data = None
    with pytest.raises(UserError, match=r"environment 0 failed in its step 4 \(step 4 of the episode\)"):
        task.begin_step(7, torch.Generator())
    task.save()
    state = task.state_dict()
    assert int(state["online/transitions"]) == 3
    assert not any(name.startswith("envs/") for name in state)
    lines: list[str] = []
    again = OfflineTask(made, torch.device("cpu"), None, tmp_path, lines.append)
    again.load_state_dict(state, 7)
    assert again.online.buffer.added == 3
    assert any("its episode under way begins anew" in line for line in lines)
    again.close()


def test_going_on_otherwise_is_refused(settings):
    made = settings()
    run = train(made, out=quiet).run
    resumed = dataclasses.replace(made, resume=run.path)
    for changes in ({"steps": 5}, {"utd_ratio": 2}, {"buffer_size": 7}, {"balanced_sampling": True}):
        (name,) = changes
        with pytest.raises(UserError, match=f"online learning began with other settings:\n  {name}: "):
            train(dataclasses.replace(resumed, **changes), out=quiet)
    with pytest.raises(UserError, match="online_steps: this run has gone online already"):
        train(dataclasses.replace(resumed, online_steps=0), out=quiet)


def test_going_on_without_the_buffer(settings, tmp_path):
    made = settings()
    run = train(made, out=quiet).run
    tables = (run.path / "train.csv").read_bytes()
    shutil.rmtree(run.path / "replay")
    with pytest.raises(UserError, match=r"online transitions 0 to 12 of the replay buffer.*cannot go on without its"):
        train(dataclasses.replace(made, resume=run.path, online_steps=20), out=quiet)
    assert (run.path / "train.csv").read_bytes() == tables
    # An offline run that is told to have gone online where it did not.
    offline = settings("offline", online_steps=0)
    train(offline, out=quiet)
    with pytest.raises(UserError, match=r"step 4, which is after the 2 offline updates.*pass --steps 4"):
        train(dataclasses.replace(offline, resume=offline.run_dir, steps=2, online_steps=9), out=quiet)


# Rewards and data


def test_rewards_outside_the_range_are_counted(settings):
    """Those of the dataset at the start, those of the environment as they come."""
    lines: list[str] = []
    result = train(settings(reward_range=(-0.5, 0.0)), out=lines.append)
    assert result.agent.reward_range == (-0.5, 0.0)
    rewards = online_rows(result.run)["rewards"]
    assert (rewards < -0.5).all()
    (offline,) = [line for line in lines if "rewards of the dataset are outside" in line]
    assert "of 300 rewards of the dataset are outside the range [-0.5, 0]" in offline
    assert "they reach from -1 to 0" in offline
    assert sum("a reward of -1 online is outside the range [-0.5, 0]" in line for line in lines) == 1
    counted = [row.get("rollout/outside_range", 0) for row in result.run.train.rows()]
    assert counted == [0, 1, 5, 5, 1]
    lines.clear()
    train(settings("inside"), out=lines.append)
    assert not any("is outside the range" in line or "are outside the range" in line for line in lines)


def test_a_dataset_without_successes(settings, tmp_path):
    write(tmp_path / "never.npz", solved_within=0.0)
    lines: list[str] = []
    train(settings(dataset_path=tmp_path / "never.npz", online_steps=0), out=lines.append)
    assert (
        "warning: the dataset has no success: 0 of 300 rows end the task (mask 0); the highest reward is -1, in 300 "
        "rows"
    ) in lines
    assert any("dataset: 300 rows, 0 of them successes" in line for line in lines)
    lines.clear()
    run = train(settings("solved", online_steps=0), out=lines.append).run
    assert run.config["dataset"]["successes"] > 0
    assert any(f"{run.config['dataset']['successes']} of them successes" in line for line in lines)


def test_data_of_another_task(settings, tmp_path):
    write(tmp_path / "wide.npz")
    with np.load(tmp_path / "wide.npz") as file:
        arrays = dict(file)
    np.savez(tmp_path / "wide.npz", **arrays | {"actions": np.zeros((ROWS, 5), np.float32)})
    with pytest.raises(UserError, match=r"2 observations and 5 actions per row, but .* has 2 and 2"):
        train(settings(dataset_path=tmp_path / "wide.npz"), out=quiet)
    assert not (tmp_path / "run").exists()


def test_targets_from_the_data_are_for_offline_learning(settings):
    with pytest.raises(UserError, match="online_steps: this FloqConfig learns from returns of the dataset"):
        train(settings(agent={"critic_target": "returns"}), out=quiet)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"online_steps": -1}, "online_steps: expected at least 0, got -1"),
        ({"utd_ratio": 0}, "utd_ratio: expected at least 1, got 0"),
        ({"buffer_size": 0}, "buffer_size: expected at least 1, got 0"),
        ({"reward_range": (0.0, -1.0)}, "reward_range: expected two finite numbers, the lower one first, got 0.0 -1.0"),
        ({"balanced_sampling": True, "agent": {"batch_size": 9}}, "expected an even agent.batch_size, .*got 9"),
    ],
)
def test_settings_that_cannot_be(settings, changes, message):
    made = settings()
    agent = dataclasses.replace(made.agent, **changes.pop("agent", {}))
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(made, agent=agent, **changes)


# The command line


def test_published_protocol():
    settings = parse(
        "floq", ["--env", "antmaze-giant-navigate-singletask-v0", "--preset", "antmaze-giant-navigate/online"]
    )
    assert (settings.steps, settings.online_steps, settings.utd_ratio) == (1_000_000, 2_000_000, 1)
    assert (settings.balanced_sampling, settings.buffer_size) == (False, 2_000_000)
    assert (settings.eval_interval, settings.eval_episodes, settings.agent.critic_flow_steps) == (20_000, 50, 4)
    # The preset of the task alone is that of offline learning.
    settings = parse("floq", ["--env", "antmaze-giant-navigate-singletask-v0"])
    assert (settings.steps, settings.online_steps, settings.agent.critic_flow_steps) == (2_000_000, 0, 8)
    settings = parse(
        "floq", ["--env", "antmaze-giant-navigate-singletask-v0", "--online-steps", "500", "--utd-ratio=8"]
    )
    assert settings.preset == "antmaze-giant-navigate/online"
    assert (settings.steps, settings.online_steps, settings.utd_ratio) == (1_000_000, 500, 8)
    settings = parse("floq", ["--env", ENV, "--online-steps", "500", "--reward-range", "-2", "0"])
    assert (settings.preset, settings.steps, settings.reward_range) == ("pointmaze-arena-demo", 15_000, (-2.0, 0.0))


def test_seeds_are_taken_from_the_flags():
    flags = ["--env", ENV, "--steps", "3"]
    assert split(flags) == (None, flags)
    assert split(["--seeds", "0", "1", *flags]) == (Seeds((0, 1), 1), flags)
    assert split([*flags, "--jobs", "2", "--seeds", "7"]) == (Seeds((7,), 2), flags)
    for words, message in (
        (["--jobs", "2"], "--jobs: only with --seeds"),
        (["--seeds", "0", "0"], "expected different numbers of at least 0, got 0 0"),
        (["--seeds", "one"], "--seeds: invalid int value: 'one'"),
        (["--seeds"], "--seeds: expected at least one argument"),
        (["--seeds", "0", "--seed", "1"], "--seed cannot be given with --seeds"),
        (["--seeds", "0", "--resume=x"], "--resume cannot be given with --seeds"),
    ):
        with pytest.raises(UserError, match=message):
            split(words)


def test_seeds_in_one_command(transitions, tmp_path, capsys):
    """Also that the same command goes on, and that the number over seeds is what the runs say."""
    argv = ["train", "floq", "--env", ENV, "--dataset-path", str(transitions), "--steps", "2", "--online-steps", "3"]
    argv += ["--eval-interval", "50", "--eval-episodes", "1", "--agent.block-width", "16", "--agent.batch-size", "8"]
    argv += ["--run-dir", str(tmp_path / "all"), "--no-tensorboard", "--seeds"]
    assert cli.main([*argv, "7"]) == 0
    printed = capsys.readouterr().out
    run = Run.open(tmp_path / "all" / "floq" / "seed7")
    assert (run.checkpoint_steps()[-1], run.config["seed"], run.config["online_steps"]) == (5, 7, 3)
    last = run.eval.rows()[-1]
    assert f"return over 1 seed, mean and range: {last['evaluation/episode.return']:,.0f}" in printed
    assert f"success over 1 seed, mean and range: {last['evaluation/success']:g}" in printed
    summary = (tmp_path / "all" / "summary.md").read_text()
    assert f"`fastflow train floq --env {ENV} --dataset-path" in summary
    assert cli.main([*argv, "7", "--jobs", "1"]) == 0
    assert "1 of 1 runs finished before" in capsys.readouterr().out


def test_seeds_of_an_agent_without_scores():
    with pytest.raises(UserError, match="td2-cfm has no score to compare runs by"):
        train_seeds("td2-cfm", default_settings("td2-cfm", "circle"), Seeds((0,)), command="")


def test_a_task_without_online_steps_has_no_online_part(settings, tmp_path):
    made = settings(online_steps=0)
    task = OfflineTask(made, torch.device("cpu"), None, tmp_path, quiet)
    assert (task.online, task.state_dict(), task.report(), task.begin_step(9, torch.Generator())) == (None, {}, {}, 1)
    assert (task.step_is, task.steps_are) == ("update", "updates")
    task.close()
