"""The command line as a user meets it: help, errors with exit code 2, Ctrl-C, machines where something is missing."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HIDE

from fastflow import demo
from fastflow.cli import main
from fastflow.record import Run, load_checkpoint

pytest.importorskip("ogbench")
pytest.importorskip("tyro")

ENV = "pointmaze-arena-navigate-singletask-v0"
SMALL = shlex.split(
    "--preset none --device cpu --no-tensorboard --agent.batch-size 32 --agent.block-width 16 --agent.block-depth 1 "
    "--agent.value-hidden-dims 16 --agent.actor-hidden-dims 16 --agent.noise-samples 2 --agent.critic-flow-steps 2 "
    "--agent.flow-steps 2"
)
SIMULATOR = {"ogbench", "gymnasium", "mujoco", "dm_control"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a small collected dataset and its transitions file, both made by the commands."""
    folder = tmp_path_factory.mktemp("data")
    collect = ["collect", "pointmaze-arena-navigate-v0", "--episodes", "2", "--dataset-dir", str(folder)]
    assert main(collect) == 0
    assert main(["relabel", ENV, "--dataset-dir", str(folder), "--output", str(folder / "moves.npz")]) == 0
    return folder


@pytest.fixture
def python(plain_environment, tmp_path):
    """Run code in a process of its own, in an empty folder."""

    def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", code, *arguments],
            cwd=tmp_path,
            env=plain_environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def command(*arguments: str) -> str:
    return f"import sys; from fastflow.cli import main; sys.exit(main({list(arguments)!r}))"


def assert_error(code: int, capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    """Exit code 2, and one `error: ...` on stderr that says all of `parts`; no traceback."""
    message = capsys.readouterr().err
    assert code == 2
    assert message.startswith("error: ")
    for part in parts:
        assert part in message


# Help


@pytest.mark.parametrize("flag", ["--help", "-h", "help"])
def test_help_lists_the_commands(flag, capsys):
    assert main([flag]) == 0
    printed = capsys.readouterr().out
    for name in ("collect", "train", "evaluate", "plot", "convert", "relabel", "info"):
        assert f"\n  {name} " in printed


@pytest.mark.parametrize(
    "name",
    [
        *("collect", "train", "train floq", "train fql"),
        *("train fpo", "train dppo", "train ppo", "evaluate", "plot", "relabel", "info"),
    ],
)
def test_help_of_each_command(name, capsys):
    try:
        code = main([*name.split(), "--help"])
    except SystemExit as exit:
        code = exit.code
    printed = capsys.readouterr().out
    assert code == 0
    assert f"fastflow {name}" in printed


def test_help_of_train_shows_the_preset(capsys):
    with pytest.raises(SystemExit):
        main(["train", "floq", "--env", "cube-single-play-singletask-v0", "--help"])
    printed = capsys.readouterr().out
    assert "300.0" in printed
    assert "--agent.critic-flow-steps" in printed


def test_help_of_on_policy_training_shows_the_preset(capsys):
    with pytest.raises(SystemExit):
        main(["train", "fpo", "--env", "Pendulum-v1", "--preset", "playground", "--help"])
    printed = capsys.readouterr().out
    for text in ("--num-envs", "2048", "--agent.num-pairs", "--agent.clip", "0.05", "--eval-noise"):
        assert text in printed


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fastflow ")


def test_info(capsys):
    assert main(["info"]) == 0
    assert torch.__version__.split("+")[0] in capsys.readouterr().out


# Errors


def test_no_command(capsys):
    assert main([]) == 2
    assert "usage:" in capsys.readouterr().err


def test_unknown_command(capsys):
    assert_error(main(["trian"]), capsys, "trian", "did you mean train?")


def test_unknown_agent(capsys):
    assert_error(main(["train", "flok"]), capsys, "flok", "did you mean floq?")


def test_unknown_environment(capsys):
    code = main(["train", "floq", "--env", "cube-singel-play-singletask-v0"])
    assert_error(code, capsys, "did you mean cube-single-play-singletask-v0?")


def test_unknown_dataset(capsys, tmp_path):
    code = main(["collect", "cube-singel-play-v0", "--dataset-dir", str(tmp_path)])
    assert_error(code, capsys, "did you mean cube-single-play-v0?")
    code = main(["relabel", "cube-singel-play-v0", "--output", str(tmp_path / "x.npz")])
    assert_error(code, capsys, "did you mean")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_cuda_absent(capsys, data):
    code = main(["train", "floq", "--env", ENV, "--dataset-dir", str(data), "--device", "cuda"])
    assert_error(code, capsys, "device cuda asked for")


def test_existing_run_folder(capsys, data, tmp_path):
    (tmp_path / "notes.txt").touch()
    code = main(["train", "floq", "--env", ENV, "--dataset-dir", str(data), "--run-dir", str(tmp_path), *SMALL])
    assert_error(code, capsys, "not empty", "--resume")


def test_commands_on_something_else(capsys, tmp_path):
    for name in ("evaluate", "plot"):
        assert_error(main([name, str(tmp_path)]), capsys, "not a run folder")
        assert_error(main([name]), capsys, "at least one run folder")
    assert_error(main(["train", "floq", "--resume", str(tmp_path)]), capsys, "not a run folder")


def test_runs_of_different_kinds(capsys, tmp_path):
    """Agents on the same kind of task may come together, others not."""
    paths = {name: str(tmp_path / name) for name in ("fpo", "ppo", "floq", "sac")}
    for name, path in paths.items():
        Run.create(Path(path), {"agent_name": name, "env": ENV})
    for command in ("evaluate", "plot"):
        code = main([command, paths["fpo"], paths["floq"]])
        assert_error(code, capsys, "runs: expected runs of one agent, or of one kind, got floq, fpo")
        assert_error(main([command, paths["sac"]]), capsys, "agent sac, which this version does not know")


def test_evaluating_no_episodes(capsys, tmp_path):
    assert_error(main(["evaluate", str(tmp_path), "--episodes", "0"]), capsys, "episodes: expected at least 1, got 0")


def test_relabel_keeps_an_existing_file(capsys, data, tmp_path):
    before = (data / "moves.npz").read_bytes()
    arguments = ["relabel", ENV, "--dataset-dir", str(data), "--output"]
    assert_error(main([*arguments, str(data / "moves.npz")]), capsys, "exists", "--overwrite")
    assert (data / "moves.npz").read_bytes() == before
    assert_error(main([*arguments, str(tmp_path / "no" / "folder.npz")]), capsys, "existing folder")


# Something is missing


def test_without_tyro(python, data):
    done = python(HIDE.format(names={"tyro"}) + command("train", "floq", "--env", ENV))
    assert done.returncode == 2
    assert done.stderr.startswith("error: tyro is not installed")
    assert 'pip install "fastflow[rl]"' in done.stderr


def test_without_tensorboard_nothing_is_begun(python, data, tmp_path):
    arguments = ["train", "floq", "--env", ENV, "--dataset-dir", str(data), "--run-dir", "run"]
    done = python(HIDE.format(names={"tensorboard"}) + command(*arguments))
    assert done.returncode == 2
    assert done.stderr.startswith("error: tensorboard is not installed")
    assert not (tmp_path / "run").exists()


def test_training_without_a_simulator(python, data, tmp_path, capsys):
    """A transitions file is enough; evaluation is left to another machine, here this one."""
    done = python(
        HIDE.format(names=SIMULATOR)
        + command(
            *("train", "floq", "--env", ENV, "--dataset-path", str(data / "moves.npz")),
            *("--run-dir", "run", "--steps", "20", "--log-interval", "10", *SMALL),
        )
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("evaluation is skipped") == 1
    assert "fastflow evaluate run" in done.stdout
    run = Run.open(tmp_path / "run")
    assert run.checkpoint_steps() == [20]
    assert run.eval.steps() == []

    assert main(["evaluate", str(run.path), "--episodes", "2", "--envs", "2", "--device", "cpu"]) == 0
    assert str(run.path) in capsys.readouterr().out
    assert run.eval.steps() == [20]


def test_raw_data_without_a_simulator(python, data):
    code = command("train", "floq", "--env", ENV, "--dataset-dir", str(data), "--run-dir", "run", *SMALL)
    done = python(HIDE.format(names=SIMULATOR) + code)
    assert done.returncode == 2
    assert "fastflow[rl]" in done.stderr


def test_plot_without_matplotlib(python, tmp_path):
    done = python(HIDE.format(names={"matplotlib"}) + command("plot", "run"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: matplotlib is not installed")
    assert "fastflow[plot]" in done.stderr


# Whole runs


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to one process")
def test_interrupt_saves_and_the_printed_command_goes_on(data, tmp_path, plain_environment):
    run = tmp_path / "a run"
    arguments = ["train", "floq", "--env", ENV, "--dataset-dir", str(data), "--run-dir", str(run), "--steps", "1000000"]
    process = subprocess.Popen(
        [
            sys.executable,
            "-W",
            "error",
            "-m",
            "fastflow",
            *arguments,
            "--log-interval",
            "7",
            "--eval-interval",
            "0",
            *SMALL,
        ],
        cwd=tmp_path,
        env=plain_environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stdout:
            if line.startswith("update "):
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    (step,) = Run.open(run).checkpoint_steps()
    assert f"stopped after {step:,} updates by SIGINT" in out

    going_on = shlex.split(out.splitlines()[-1])
    assert going_on == ["fastflow", "train", "floq", "--resume", str(run)]
    assert main([*going_on[1:], "--steps", str(step + 5)]) == 0
    assert Run.open(run).checkpoint_steps() == [step, step + 5]


@pytest.mark.skipif(os.name != "posix", reason="limits of file size are POSIX")
def test_full_disk_while_training(python, data, tmp_path):
    """The checkpoint does not fit: exit code 2, and the run goes on from the one before when there is room again."""
    run = tmp_path / "run"
    arguments = ["train", "floq", "--env", ENV, "--dataset-dir", str(data), "--run-dir", str(run), "--steps", "3"]
    assert main([*arguments, "--eval-interval", "0", *SMALL]) == 0
    first = run / "checkpoints" / "step_00000003.safetensors"
    limit = first.stat().st_size // 2
    going_on = ["train", "floq", "--resume", str(run), "--steps", "6"]
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    done = python(code + command(*going_on))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "disk is full" in done.stderr
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    assert load_checkpoint(first).step == 3

    assert main(going_on) == 0
    assert Run.open(run).checkpoint_steps() == [3, 6]


@pytest.mark.parametrize("agent", ["fpo", "dppo", "ppo"])
def test_on_policy_runs(agent, tmp_path, capsys):
    """Trained, trained on, evaluated and drawn."""
    pytest.importorskip("matplotlib")
    run = str(tmp_path / "run")
    flags = "--num-envs 4 --rollout-steps 4 --num-minibatches 2 --num-epochs 1 --eval-episodes 2 --no-tensorboard"
    flags += " --preset none --device cpu --steps 32 --log-interval 16 --eval-interval 16"
    assert main(["train", agent, "--env", "bandit-two-modes", "--run-dir", run, *shlex.split(flags)]) == 0
    assert main(["train", agent, "--resume", run, "--steps", "48"]) == 0
    assert "going on from the checkpoint after 32 environment steps" in capsys.readouterr().out
    assert Run.open(Path(run)).checkpoint_steps() == [32, 48]
    assert Run.open(Path(run)).config["agent"]["rollout_steps"] == 4
    assert main(["evaluate", run, "--episodes", "2", "--device", "cpu"]) == 0
    assert main(["plot", run]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("learning_curve.png")


@pytest.mark.parametrize("agent", ["fql", "fql-iqn", "value-flows"])
def test_baselines_of_floq(agent, data, tmp_path, capsys):
    """Trained, trained on to the same bits, evaluated and drawn."""
    pytest.importorskip("matplotlib")
    flags = "--preset none --device cpu --no-tensorboard --agent.batch-size 32 --agent.value-hidden-dims 16"
    flags += " --agent.actor-hidden-dims 16 --agent.flow-steps 2 --log-interval 2 --eval-interval 0"
    arguments = ["train", agent, "--env", ENV, "--dataset-path", str(data / "moves.npz"), *shlex.split(flags)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*arguments, "--run-dir", str(whole), "--steps", "5"]) == 0
    assert main([*arguments, "--run-dir", str(parts), "--steps", "3"]) == 0
    assert main(["train", agent, "--resume", str(parts), "--steps", "5"]) == 0
    ends = [Run.open(path).load().tensors for path in (whole, parts)]
    assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items())
    assert Run.open(parts).config["agent_name"] == agent
    assert main(["evaluate", str(parts), str(whole), "--episodes", "2", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main(["plot", str(parts), str(whole)]) == 0
    assert [Path(line).name for line in capsys.readouterr().out.splitlines()] == ["learning_curve.png"]
    code = main(["plot", str(parts), "--checkpoint", "5"])
    assert_error(code, capsys, f"agent {agent} has none")


def test_plot_draws_both_figures(data, tmp_path, capsys):
    image = pytest.importorskip("matplotlib.image")
    paths = []
    for seed in ("0", "1"):
        paths.append(str(tmp_path / f"seed{seed}"))
        code = main(
            [
                *("train", "floq", "--env", ENV, "--dataset-dir", str(data), "--run-dir", paths[-1], "--seed", seed),
                *("--steps", "20", "--log-interval", "5", "--eval-interval", "10", "--eval-episodes", "2", *SMALL),
            ]
        )
        assert code == 0
    capsys.readouterr()
    assert main(["plot", paths[0]]) == 0
    assert main(["plot", *paths, "--output", str(tmp_path / "figures")]) == 0
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in printed] == ["learning_curve.png", "flow_paths.png"] * 2
    assert printed[0].parent == Path(paths[0]) / "figures"
    for path in printed:
        pixels = image.imread(path)
        assert min(pixels.shape[:2]) > 300
        # Lines in several colours on white.
        assert len(np.unique((255 * pixels[..., :3]).astype(np.uint8).reshape(-1, 3), axis=0)) > 50
        assert 0.5 < (pixels[..., :3] == 1).all(-1).mean() < 0.99


def test_demo_that_misses_its_goal_says_so_and_repeats_nothing(data, tmp_path, capsys):
    """Without training; whether floq reaches the goal with all of them is for `make demo`."""
    pytest.importorskip("matplotlib")
    folder = tmp_path / "demo"
    (folder / "data").mkdir(parents=True)
    for path in data.glob("pointmaze-arena-navigate-v0*.npz"):
        (folder / "data" / path.name).write_bytes(path.read_bytes())
    assert demo.main(["--folder", str(folder), "--steps", "0"]) == 1
    printed = capsys.readouterr().out
    assert "collected before" in printed
    assert "NOT reached" in printed
    assert (folder / "figure.png").stat().st_size > 10_000
    checkpoint = folder / "seed0" / "checkpoints" / "step_00000000.safetensors"
    before = checkpoint.stat().st_mtime_ns

    assert demo.main(["--folder", str(folder), "--steps", "0"]) == 1
    assert "trained already" in capsys.readouterr().out
    assert checkpoint.stat().st_mtime_ns == before


def test_demo_leaves_other_folders_alone(tmp_path, data, capsys):
    folder = tmp_path / "demo"
    (folder / "seed0").mkdir(parents=True)
    (folder / "seed0" / "thesis.tex").touch()
    (folder / "data").symlink_to(data)
    assert_error(demo.main(["--folder", str(folder), "--fresh"]), capsys, "not a run folder")
    assert (folder / "seed0" / "thesis.tex").exists()
