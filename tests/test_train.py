"""The training loop with a small floq: what it leaves behind, that it continues exactly, and how it stops."""

from __future__ import annotations

import dataclasses
import functools
import json
import signal

import numpy as np
import pytest
import torch
from test_graphs import on_tape

from fastflow.errors import UserError
from fastflow.evaluate import evaluate_runs
from fastflow.graphs import GraphedUpdate, make_update
from fastflow.offline import TrainSettings
from fastflow.record import Run, load_agent, load_checkpoint, save_checkpoint
from fastflow.train import default_settings, parse, settings_from_config, train

pytest.importorskip("ogbench")
pytest.importorskip("tyro")

ENV = "pointmaze-arena-navigate-singletask-v0"
SMALL = {
    "batch_size": 32,
    "block_width": 16,
    "block_depth": 1,
    "value_hidden_dims": (16,),
    "actor_hidden_dims": (16,),
    "noise_samples": 2,
    "critic_flow_steps": 2,
    "flow_steps": 2,
}


@pytest.fixture(scope="module")
def transitions(tmp_path_factory):
    """Random motion in the arena as a transitions file, with a validation file beside it."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, rows in (("moves.npz", 800), ("moves-val.npz", 80)):
        observations = rng.uniform(0, 20, (rows, 2)).astype(np.float32)
        actions = rng.uniform(-1, 1, (rows, 2)).astype(np.float32)
        solved = np.linalg.norm(observations - 20, axis=1) < 3
        np.savez(
            folder / name,
            observations=observations,
            actions=actions,
            next_observations=observations + 0.2 * actions,
            rewards=solved.astype(np.float32) - 1,
            masks=1 - solved.astype(np.float32),
            terminals=(np.arange(rows) % 40 == 39).astype(np.float32),
        )
    return folder / "moves.npz"


@pytest.fixture
def settings(transitions, tmp_path):
    """Settings of a small run; keyword arguments are those of TrainSettings, and `agent` a dict of changes."""

    def make(name: str = "run", agent: dict | None = None, **changes) -> TrainSettings:
        values = {
            "dataset_path": transitions,
            "run_dir": tmp_path / name,
            "steps": 20,
            "log_interval": 10,
            "eval_interval": 0,
            "eval_episodes": 2,
            "eval_envs": 2,
            "save_interval": 0,
            "observation_scale": 4.0,
            "device": "cpu",
            "tensorboard": False,
            **changes,
        }
        made = default_settings("floq", ENV, "none", **values)
        return dataclasses.replace(made, agent=dataclasses.replace(made.agent, **SMALL, **(agent or {})))

    return make


def quiet(text: str) -> None:
    pass


def state(run: Run) -> dict[str, torch.Tensor]:
    return run.load().tensors


def losses(run: Run) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in run.train.rows()]


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


# What a run leaves behind


def test_run_folder(settings, tmp_path):
    lines: list[str] = []
    result = train(
        settings(steps=25, eval_interval=20, save_interval=10, keep_checkpoints=2, tensorboard=True), out=lines.append
    )
    run = Run.open(tmp_path / "run")
    assert (result.step, result.interrupted, result.agent.step) == (25, None, 25)

    assert run.train.steps() == [10, 20, 25]
    row = run.train.rows()[0]
    for name in ("critic/critic_loss", "critic/floq_loss", "critic/distill_loss", "actor/actor_loss", "actor/q"):
        assert np.isfinite(row[f"training/{name}"])
        assert np.isfinite(row[f"validation/{name}"])
    assert row["time/updates_per_second"] > 0
    assert run.eval.steps() == [0, 20, 25]
    last = run.eval.rows()[-1]
    assert 0 <= last["evaluation/success"] <= 1
    assert last["evaluation/episode.length"] >= 1
    assert last["evaluation/episode.return"] <= 0

    assert run.checkpoint_steps() == [20, 25]
    assert (run.path / "checkpoints" / "step_00000025.safetensors").is_file()
    config = json.loads((run.path / "config.json").read_text())
    assert config["env"] == ENV
    assert config["preset"] == "none"
    assert config["agent"]["block_width"] == 16
    assert config["dataset"]["rows"] == 800
    assert config["dataset"]["validation_rows"] == 80
    assert config["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert list(run.path.glob("events.out.tfevents.*"))
    assert set(run.load_samples()) == {"observations", "actions"}
    assert any("success" in line for line in lines)
    assert any("updates/s" in line for line in lines)


def test_rows_are_means_over_their_interval(settings):
    every = train(settings("every", log_interval=1), out=quiet).run.train.rows()
    tens = train(settings("tens", log_interval=10), out=quiet).run.train.rows()
    for name in ("training/critic/floq_loss", "training/actor/actor_loss"):
        means = np.reshape([row[name] for row in every], (2, 10)).mean(1)
        assert [row[name] for row in tens] == pytest.approx(means, rel=1e-12)


def test_tensorboard_has_the_same_numbers(settings):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = train(settings(tensorboard=True), out=quiet).run
    events = accumulator.EventAccumulator(str(run.path))
    events.Reload()
    name = "training/critic/floq_loss"
    assert [event.step for event in events.Scalars(name)] == run.train.steps()
    assert [event.value for event in events.Scalars(name)] == pytest.approx([row[name] for row in run.train.rows()])


def test_seed_decides(settings):
    first, again, other = (
        train(settings(name, seed=seed, steps=3), out=quiet).run for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert_same_tensors(state(first), state(again))
    assert not torch.equal(state(first)["loop/batches_generator"], state(other)["loop/batches_generator"])
    assert losses(first) == losses(again) != losses(other)


def test_observation_scale_reaches_the_agent(settings, transitions):
    run = train(settings(steps=1, observation_scale=4.0), out=quiet).run
    agent, _ = load_agent(run, device="cpu")
    observations = torch.from_numpy(np.load(transitions)["observations"])
    seen = (observations - agent.observation_mean) / agent.observation_std
    assert seen.mean(0).abs().max() < 1e-3
    assert seen.std(0) == pytest.approx([4.0, 4.0], rel=1e-2)


# Continuing


def stop_at_evaluation(lines: list[str], step: int):
    """An `out` that sends this process the signal of Ctrl-C when the evaluation after `step` updates is reported."""

    def out(text: str) -> None:
        lines.append(text)
        if text.startswith(f"update {step}: success"):
            signal.raise_signal(signal.SIGINT)

    return out


def test_resumed_equals_uninterrupted(settings, tmp_path):
    """Stopped in the middle of a log interval, twice; one with and one without evaluations."""
    whole = train(settings("whole", steps=60, log_interval=20), out=quiet).run

    lines: list[str] = []
    parts = settings("parts", steps=60, log_interval=20, eval_interval=13, eval_episodes=1, eval_envs=1)
    first = train(parts, out=stop_at_evaluation(lines, 13))
    assert (first.step, first.interrupted) == (13, signal.SIGINT)
    assert f"fastflow train floq --resume {tmp_path / 'parts'}" in lines[-1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    parts = dataclasses.replace(parts, resume=parts.run_dir)
    second = train(parts, out=stop_at_evaluation(lines, 39))
    assert second.step == 39
    third = train(parts, out=quiet)
    assert (third.step, third.interrupted) == (60, None)

    assert_same_tensors(state(whole), state(third.run))
    assert losses(whole) == losses(third.run)
    assert third.run.eval.steps() == [0, 13, 26, 39, 52, 60]
    assert [entry["step"] for entry in third.run.config["resumed"]] == [13, 39]


def test_rows_after_the_checkpoint_are_written_once(settings):
    """As after a power cut: the tables are ahead of the newest checkpoint."""
    made = settings(steps=40, save_interval=10, log_interval=5)
    run = train(made, out=quiet).run
    before = losses(run)
    for step in (20, 30, 40):
        run.checkpoint_path(step).unlink()
    resumed = train(dataclasses.replace(made, resume=run.path), out=quiet).run
    assert resumed.train.steps() == [5, 10, 15, 20, 25, 30, 35, 40]
    assert losses(resumed) == before


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
def test_abandoned_evaluation_is_made_up_for(settings):
    made = settings(steps=4, eval_interval=2, eval_episodes=1000)

    def out(text: str) -> None:
        # The last line before the first evaluation, which would take minutes.
        if text.startswith("dataset:"):
            signal.setitimer(signal.ITIMER_REAL, 0.3)

    previous = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        first = train(made, out=out)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert (first.step, first.interrupted) == (0, signal.SIGINT)
    assert first.run.eval.steps() == []
    second = train(dataclasses.replace(made, eval_episodes=2, resume=first.run.path), out=quiet)
    assert second.run.eval.steps() == [0, 2, 4]


def test_graphed_run_is_the_plain_one(settings, monkeypatch):
    """Resumed in the middle too; and on from there without graphs."""
    made = settings("plain", steps=30, agent={"backend": "reference", "lr_decay_steps": 30})
    whole = train(made, out=quiet).run
    for step in (10, 20, 30):
        if step < 30:
            monkeypatch.setattr("fastflow.train.make_update", lambda agent, **_: GraphedUpdate(agent, capture=on_tape))
        else:
            monkeypatch.undo()
        resume = None if step == 10 else made.run_dir.with_name("graphed")
        given = dataclasses.replace(made, run_dir=made.run_dir.with_name("graphed"), resume=resume, steps=step)
        run = train(given, out=quiet).run
    assert_same_tensors(state(whole), state(run))
    assert losses(whole) == losses(run)


def test_graphs_need_a_gpu(settings):
    made = settings(cuda_graph=True)
    with pytest.raises(UserError, match=r"^--cuda-graph needs a CUDA device, got cpu$"):
        train(made, out=quiet)
    assert not made.run_dir.exists()


def test_compiled_run_is_the_plain_one_within_rounding(settings, monkeypatch):
    made = settings("plain", steps=4, log_interval=1)
    plain = train(made, out=quiet).run
    monkeypatch.setattr("fastflow.train.make_update", functools.partial(make_update, backend="eager"))
    torch._dynamo.reset()
    run = train(dataclasses.replace(made, run_dir=made.run_dir.with_name("compiled"), compile=True), out=quiet).run
    assert run.config["compile"] is True
    for wanted, found in zip(losses(plain), losses(run), strict=True):
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5)


def test_agents_that_do_not_compile_are_refused(transitions, tmp_path):
    made = default_settings("value-flows", ENV, "none", dataset_path=transitions, run_dir=tmp_path / "run")
    made = dataclasses.replace(made, compile=True, device="cpu", eval_interval=0)
    with pytest.raises(UserError, match="settings of value-flows: compile: expected an agent whose losses are one"):
        train(made, "value-flows", out=quiet)
    assert not made.run_dir.exists()


def test_a_run_of_before_there_were_graphs_goes_on(settings):
    made = settings(steps=2)
    run = train(made, out=quiet).run
    for name in ("cuda_graph", "compile"):
        del run.config[name]
    run.write_config()
    assert settings_from_config(Run.open(run.path), "floq") == made
    again = train(parse("floq", ["--resume", str(run.path), "--steps", "4"]), out=quiet)
    assert (again.step, again.run.config["cuda_graph"]) == (4, False)


def test_training_longer(settings):
    whole = train(settings("whole", steps=30), out=quiet).run
    made = settings("parts", steps=20)
    train(made, out=quiet)
    run = train(dataclasses.replace(made, steps=30, resume=made.run_dir), out=quiet).run
    assert_same_tensors(state(whole), state(run))
    assert run.config["steps"] == 30
    # A finished run stays as it is.
    assert train(dataclasses.replace(made, steps=30, resume=made.run_dir), out=quiet).step == 30
    assert losses(Run.open(run.path)) == losses(whole)


def test_resuming_with_other_settings(settings):
    made = settings(steps=2)
    run = train(made, out=quiet).run
    resumed = dataclasses.replace(made, resume=run.path)
    with pytest.raises(
        UserError, match=r"other settings:\n  agent\.alpha: 10\.0 there, 4\.0 here\n  seed: 0 there, 3 here"
    ):
        train(dataclasses.replace(resumed, seed=3, agent=dataclasses.replace(made.agent, alpha=4.0)), out=quiet)
    # A config.json that was edited does not deceive the checkpoint.
    run.config["agent"]["alpha"] = 4.0
    run.write_config()
    with pytest.raises(UserError, match=r"another configuration:\n  alpha: 10\.0 there, 4\.0 here"):
        train(dataclasses.replace(resumed, agent=dataclasses.replace(made.agent, alpha=4.0)), out=quiet)


def test_resuming_with_other_data(settings, transitions, tmp_path):
    made = settings(steps=2)
    train(made, out=quiet)
    with np.load(transitions) as file:
        arrays = dict(file)
    arrays["rewards"][7] = -0.5
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(UserError, match="dataset is not the one"):
        train(dataclasses.replace(made, resume=made.run_dir, dataset_path=tmp_path / "other.npz"), out=quiet)


def test_resuming_on_another_kind_of_device(settings):
    made = settings(steps=2)
    run = train(made, out=quiet).run
    saved = run.load()
    save_checkpoint(run.checkpoint_path(2), dataclasses.replace(saved, loop={**saved.loop, "device": "cuda"}))
    with pytest.raises(UserError, match="trained on cuda and cannot go on bit for bit on cpu"):
        train(dataclasses.replace(made, resume=run.path), out=quiet)
    # Evaluating and plotting there is possible.
    agent, _ = load_agent(run, device="cpu")
    assert agent.step == 2


def test_resuming_without_a_checkpoint(settings, tmp_path):
    made = settings(steps=2)
    run = train(made, out=quiet).run
    run.checkpoint_path(2).unlink()
    with pytest.raises(UserError, match="holds no checkpoint"):
        train(dataclasses.replace(made, resume=run.path), out=quiet)
    with pytest.raises(UserError, match="not a run folder"):
        train(dataclasses.replace(made, resume=tmp_path / "nowhere"), out=quiet)


def test_resuming_from_a_truncated_checkpoint(settings):
    made = settings(steps=2)
    run = train(made, out=quiet).run
    path = run.checkpoint_path(2)
    path.write_bytes(path.read_bytes()[:-10])
    tables = (run.path / "train.csv").read_bytes()
    with pytest.raises(UserError, match="damaged"):
        train(dataclasses.replace(made, resume=run.path), out=quiet)
    assert (run.path / "train.csv").read_bytes() == tables


# Stopping


def test_loss_that_is_not_finite(settings):
    made = settings(steps=1000, save_interval=1, log_interval=100, agent={"lr": 1e30})
    with pytest.raises(
        UserError,
        # The cause, not the loss that follows from it.
        match=r"training/critic/(target|q)_mean is not finite since update \d+: training stopped.*last good checkpoint",
    ) as error:
        train(made, out=quiet)
    run = Run.open(made.run_dir)
    (step,) = run.checkpoint_steps()[-1:]
    assert str(run.checkpoint_path(step)) in str(error.value)
    saved = load_checkpoint(run.checkpoint_path(step))
    assert all(value.isfinite().all() for value in saved.tensors.values() if value.is_floating_point())


def test_loss_that_is_not_finite_is_dated(settings, transitions, tmp_path):
    """Noticed at the log point, but the update is named; nothing of it reaches train.csv."""
    alone = tmp_path / "without-validation.npz"
    alone.write_bytes(transitions.read_bytes())
    updates = []
    for name, interval in (("a", 1), ("b", 100)):
        made = settings(name, dataset_path=alone, steps=100, log_interval=interval, agent={"lr": 1e30})
        with pytest.raises(UserError, match="nothing was saved yet") as error:
            train(made, out=quiet)
        updates.append(str(error.value).partition("since update ")[2].partition(":")[0])
        assert all(np.isfinite(list(row.values())).all() for row in Run.open(made.run_dir).train.rows())
    assert updates[0] == updates[1]


def test_validation_that_is_not_finite(settings):
    with pytest.raises(UserError, match=r"validation/\w+/\w+ is not finite after update 1: training stopped"):
        train(settings(log_interval=1, agent={"lr": 1e30}), out=quiet)


def test_the_agent_s_advice_is_said_once(settings):
    lines = []
    # Starts three times as wide as all that the rewards allow.
    train(settings(log_interval=5, agent={"noise_coverage": 3.0}), out=lines.append)
    (advice,) = [line for line in lines if line.startswith("warning: ")]
    assert advice.startswith("warning: update 5: ") and "of the flow critic's values lie outside [-101, 1]" in advice
    lines = []
    train(settings("quiet", log_interval=5), out=lines.append)
    assert not any("warning" in line for line in lines)


def test_targets_from_the_data(settings):
    for target in ("data", "returns"):
        run = train(settings(target, agent={"critic_target": target}), out=quiet).run
        (*_, row) = run.train.rows()
        assert row["validation/critic/critic_loss"] > 0
        again = train(settings(f"{target}2", agent={"critic_target": target}), out=quiet).run
        assert losses(run) == losses(again)


def test_existing_folder_is_refused_and_kept(settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="exists and is not empty"):
        train(settings(), out=quiet)
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work"


def test_failing_early_leaves_no_folder(settings, tmp_path, transitions):
    cut = tmp_path / "cut.npz"
    cut.write_bytes(transitions.read_bytes()[:-100])
    with np.load(transitions) as file:
        arrays = dict(file)
    np.savez(tmp_path / "nan.npz", **{**arrays, "observations": np.full_like(arrays["observations"], np.nan)})
    np.savez(tmp_path / "wide.npz", **{**arrays, "actions": np.zeros((800, 5), np.float32)})
    del arrays["masks"]
    np.savez(tmp_path / "keys.npz", **arrays)
    for name in ("absent.npz", "cut.npz", "nan.npz", "keys.npz"):
        with pytest.raises(UserError, match=name):
            train(settings(dataset_path=tmp_path / name), out=quiet)
    with pytest.raises(UserError, match="2 observations and 5 actions"):
        train(settings(dataset_path=tmp_path / "wide.npz", eval_interval=10), out=quiet)
    with pytest.raises(UserError, match="did you mean"):
        train(dataclasses.replace(settings(), env="pointmaze-arena-navigat-singletask-v0"), out=quiet)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", -1), ("log_interval", 0), ("eval_episodes", 0), ("seed", -1), ("observation_scale", float("nan"))],
)
def test_settings_out_of_range(settings, name, value):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        dataclasses.replace(settings(), **{name: value})


# From the command line


def test_flags_win_over_the_preset():
    settings = parse("floq", ["--env", "cube-single-play-singletask-v0"])
    assert (settings.preset, settings.agent.alpha, settings.agent.block_depth) == ("cube-single-play", 300.0, 2)
    assert (settings.steps, settings.log_interval, settings.eval_interval) == (2_000_000, 5_000, 20_000)
    argv = [
        "--env=cube-single-play-singletask-v0",
        "--agent.alpha",
        "3",
        "--agent.critic_flow_steps",
        "4",
        "--steps",
        "7",
    ]
    settings = parse("floq", argv)
    assert (settings.agent.alpha, settings.agent.critic_flow_steps, settings.steps) == (3.0, 4, 7)
    assert (settings.preset, settings.agent.block_depth) == ("cube-single-play", 2)
    settings = parse("floq", ["--env", "cube-single-play-singletask-v0", "--preset", "none"])
    assert (settings.preset, settings.agent.alpha) == ("none", 10.0)
    settings = parse("floq", ["--env", "cube-single-play-singletask-v0", "--preset", "puzzle-4x4-play/best"])
    assert (settings.preset, settings.agent.noise_coverage) == ("puzzle-4x4-play/best", 0.25)


def test_demo_preset_brings_its_loop():
    settings = parse("floq", ["--env", ENV])
    assert settings.preset == "pointmaze-arena-demo"
    assert (settings.steps, settings.observation_scale) == (15_000, 4.0)
    assert settings.agent.lr_decay_steps == settings.steps
    assert parse("floq", ["--env", ENV, "--observation-scale", "0"]).observation_scale == 0


def test_graphs_and_compilation_are_asked_for():
    settings = parse("floq", ["--env", ENV])
    assert (settings.cuda_graph, settings.compile) == (False, False)
    settings = parse("floq", ["--env", ENV, "--cuda-graph", "--compile"])
    assert (settings.cuda_graph, settings.compile) == (True, True)


def test_unknown_preset_suggests():
    with pytest.raises(UserError, match="did you mean cube-single-play"):
        parse("floq", ["--env", ENV, "--preset", "cube-single-pley"])


def test_resume_keeps_the_settings_of_the_run(settings):
    made = settings(steps=2, eval_interval=7)
    run = train(made, out=quiet).run
    resumed = parse("floq", ["--resume", str(run.path), "--steps", "9"])
    assert resumed == dataclasses.replace(made, steps=9, resume=run.path)
    assert settings_from_config(run, "floq") == made
    with pytest.raises(UserError, match="--preset cannot be given with --resume"):
        parse("floq", ["--resume", str(run.path), "--preset", "none"])


@pytest.mark.parametrize(
    "flags", [[], ["--env"], ["--env", ENV, "--agent.batch-size", "0"], ["--env", ENV, "--stepz", "3"]]
)
def test_malformed_flags_exit_with_2(flags, capsys):
    with pytest.raises(SystemExit) as error:
        parse("floq", flags)
    assert error.value.code == 2
    assert capsys.readouterr().err


# Evaluating saved runs


def test_evaluate_runs(settings, capsys):
    runs = [train(settings(f"seed{seed}", seed=seed, steps=4, save_interval=2), out=quiet).run for seed in (0, 1)]
    records = evaluate_runs([run.path for run in runs], episodes=2, seed=5, num_envs=2, device="cpu")
    printed = capsys.readouterr().out
    assert "95 % interval of the IQM" in printed
    mean = np.mean([record["success"] for record in records])
    assert printed.splitlines()[-1].split() == ["2", f"{mean:.3f}", f"{mean:.3f}", *printed.split()[-4:-1], ENV]
    assert [record["step"] for record in records] == [4, 4]
    written = json.loads((runs[0].path / "evaluations" / "step_00000004_seed5.json").read_text())
    assert written["success"] == records[0]["success"]
    assert len(written["each"]["lengths"]) == 2
    # Trained without evaluation, so that the learning curve comes from here.
    assert runs[0].eval.steps() == [4]
    evaluate_runs([runs[0].path], episodes=1, all_checkpoints=True, device="cpu")
    assert runs[0].eval.steps() == [2, 4]
    assert runs[0].eval.rows()[1]["evaluation/episodes"] == 2
    with pytest.raises(UserError, match="no checkpoint of step 3"):
        evaluate_runs([runs[0].path], checkpoint=3, device="cpu")
