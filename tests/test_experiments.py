"""Experiments: declarations, flags, statistics, and small floq runs by the real command in processes of their own."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fastflow import experiments
from fastflow.errors import UserError
from fastflow.experiments import report
from fastflow.experiments.declare import Arm, Experiment, Metric, Size
from fastflow.experiments.run import flags, run
from fastflow.record import Run, write_json

HERE = str(Path(__file__).parent)
ENV = "pointmaze-arena-navigate-singletask-v0"
SMALL = {
    "env": ENV,
    "preset": "none",
    "device": "cpu",
    "steps": 20,
    "log_interval": 10,
    "eval_interval": 20,
    "eval_episodes": 1,
    "eval_envs": 1,
    "save_interval": 0,
    "observation_scale": 4.0,
    "agent.batch_size": 32,
    "agent.block_width": 16,
    "agent.block_depth": 1,
    "agent.value_hidden_dims": (16,),
    "agent.actor_hidden_dims": (16,),
    "agent.noise_samples": 2,
    "agent.flow_steps": 2,
}


def weight_norm(run: Run) -> dict[str, float]:
    """An `Arm.after`: what the checkpoint weighs. It counts its calls in a file beside the run."""
    count = run.path.with_name("calls")
    count.write_text(count.read_text() + "x" if count.exists() else "x")
    tensors = run.load().part("agent").values()
    return {"norm": math.sqrt(sum(float(t.double().square().sum()) for t in tensors if t.is_floating_point()))}


def draw_picture(experiment: Experiment, seeds, folder: Path) -> list[Path]:
    """An `Experiment.picture`: which runs there are, in words."""
    path = folder / "picture.txt"
    finished = [arm.name for arm in experiment.arms if (folder / arm.name / "seed0" / "train.csv").is_file()]
    path.write_text(f"{experiment.name} {list(seeds)} {' '.join(finished)}")
    return [path]


def make(settings=SMALL, **changes) -> Experiment:
    values = {
        "name": "steps-of-the-walk",
        "title": "Steps of the critic's walk",
        "agent": "floq",
        "question": "How many does it take?",
        "arms": (
            Arm("k1", "K = 1", {"agent.critic_flow_steps": 1}, after="test_experiments:weight_norm"),
            Arm("k2", "K = 2", {"agent.critic_flow_steps": 2, "agent.use_prob_embed": False}),
        ),
        "sizes": {"small": Size(settings, (0, 1), "1 CPU core, 20 seconds")},
        "metrics": (
            Metric("evaluation/episode.length", "length", "lower"),
            Metric("evaluation/episode.return", "return", "higher"),
            Metric("norm", "norm of the state", log=True),
        ),
        "reference": "k1",
    }
    return Experiment(**{**values, **changes})


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Random motion in the arena as a transitions file."""
    rng = np.random.default_rng(0)
    observations = rng.uniform(0, 20, (800, 2)).astype(np.float32)
    actions = rng.uniform(-1, 1, (800, 2)).astype(np.float32)
    solved = np.linalg.norm(observations - 20, axis=1) < 3
    path = tmp_path_factory.mktemp("data") / "moves.npz"
    np.savez(
        path,
        observations=observations,
        actions=actions,
        next_observations=observations + 0.2 * actions,
        rewards=solved.astype(np.float32) - 1,
        masks=1 - solved.astype(np.float32),
        terminals=(np.arange(800) % 40 == 39).astype(np.float32),
    )
    return path


def quiet(text: str) -> None:
    pass


# Declarations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "k9"}, "reference: expected one of k1, k2, got 'k9'"),
        ({"arms": (Arm("a", "A"), Arm("a", "B"))}, "arms: expected each name once, got 'a' 2 times"),
        ({"arms": ()}, "arms: expected at least one"),
        ({"metrics": ()}, "metrics: expected at least one"),
        ({"sizes": {}}, "sizes: expected at least one"),
        ({"x": "horizon"}, "x: expected an arm with a number on the axis 'horizon'"),
        ({"name": "../up"}, "experiment: expected letters"),
        ({"picture": "module.function"}, "picture: expected module:function, got 'module.function'"),
        ({"picture": "test_experiments:draw picture"}, "picture: expected module:function"),
    ],
)
def test_declaration_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="arm a: settings: seed is set for every run"):
        Arm("a", "A", {"seed": 3})
    with pytest.raises(ValueError, match="expected dotted names of settings"):
        Arm("a", "A", {"agent.batch-size": 3})
    with pytest.raises(TypeError, match="agent: expected a plain value or a tuple of such, got dict"):
        Arm("a", "A", {"agent": {"gamma": 0.9}})
    with pytest.raises(ValueError, match="after: expected module:function"):
        Arm("a", "A", after="module.function")
    with pytest.raises(ValueError, match="seeds: expected different numbers"):
        Size({}, (1, 1), "")
    with pytest.raises(ValueError, match="compare: expected 'ratio' or 'difference', got 'factor'"):
        Metric("a", "A", compare="factor")
    with pytest.raises(ValueError, match="better"):
        Metric("a", "A", "smaller")


def test_an_arm_wins_over_its_size():
    experiment = make({"agent.gamma": 0.9, "steps": 3}, arms=(Arm("a", "A", {"steps": 5}),), reference=None)
    assert experiment.settings(experiment.arms[0], "small") == {"agent.gamma": 0.9, "steps": 5}


def test_references():
    arms = (Arm("a", "A"), Arm("b", "B"), Arm("c", "C", reference="b"))
    experiment = make(arms=arms, reference="a")
    assert [experiment.reference_of(arm) for arm in arms] == [None, arms[0], arms[1]]


def test_unknown_names():
    with pytest.raises(UserError, match="no experiment 'no-such-thing'"):
        run("no-such-thing")
    with pytest.raises(UserError, match="size: expected small, got 'papre'"):
        run(make(), size="papre")
    with pytest.raises(UserError, match=r"no arm 'k3'; did you mean k\d\?; there are k1, k2"):
        run(make(), arms=["k1", "k3"])
    with pytest.raises(UserError, match="jobs: expected at least 1, got 0"):
        run(make(), jobs=0)


def test_registered_experiments_are_settings_that_exist():
    train = pytest.importorskip("fastflow.train")
    pytest.importorskip("tyro")
    for name in experiments.NAMES:
        experiment = experiments.load(name)
        for size in experiment.sizes:
            for arm in experiment.arms:
                settings = {**experiment.settings(arm, size), "seed": 0, "run_dir": Path("somewhere")}
                assert train.parse(arm.agent or experiment.agent, flags(settings)).run_dir == Path("somewhere"), (
                    name,
                    size,
                    arm,
                )


# Flags


def test_flags():
    settings = {"env": "a b", "tensorboard": False, "progress": True, "agent.lr": 3e-05, "agent.hidden_dims": (16, 32)}
    assert flags(settings) == [
        "--env=a b",
        "--no-tensorboard",
        "--progress",
        "--agent.lr=3e-05",
        "--agent.hidden-dims",
        "16",
        "32",
    ]
    assert flags({"agent.use_prob_embed": False, "dataset_dir": None}) == [
        "--agent.no-use-prob-embed",
        "--dataset-dir=None",
    ]


def test_flags_say_to_train_what_was_declared():
    train = pytest.importorskip("fastflow.train")
    pytest.importorskip("tyro")
    declared = {**SMALL, "agent.use_prob_embed": False, "agent.value_hidden_dims": (8, 4), "dataset_path": Path("-a b")}
    settings = train.parse("floq", flags(declared))
    for name, value in declared.items():
        part = settings.agent if name.startswith("agent.") else settings
        assert getattr(part, name.removeprefix("agent.")) == value


# Statistics


def test_estimate_with_enough_seeds():
    values = [1.0, 2.0, 3.0, 4.0, 100.0]
    found = report.estimate(values)
    assert found.center == pytest.approx(3.0)
    assert found.low < 3.0 < found.high <= 100.0
    assert (found.count, found.left_out) == (5, 0)


def test_estimate_with_few_seeds_is_mean_and_range():
    found = report.estimate([1.0, 4.0])
    assert (found.center, found.low, found.high) == (2.5, 1.0, 4.0)
    assert str(report.estimate([4.0])) == "4"


def test_values_that_are_not_finite_are_counted():
    found = report.estimate([1.0, math.nan, 1.0, math.inf, 1.0])
    assert (found.count, found.left_out, found.center) == (3, 2, 1.0)
    assert str(found) == "1 (1 to 1), 2 not finite"
    assert str(report.estimate([math.nan])) == "not finite in 1"
    assert str(report.estimate([])) == "—"


def test_ratio():
    rng = np.random.default_rng(0)
    theirs = rng.normal(10, 0.5, 10)
    half = report.compare(rng.normal(5, 0.5, 10), theirs)
    assert half.center == pytest.approx(0.5, rel=0.1)
    assert half.interval[0] < half.center < half.interval[1] < 1
    assert (half.word("lower"), half.word("higher"), half.word(None)) == ("better", "worse", "")
    like = report.compare(rng.normal(10, 0.5, 10), theirs)
    assert like.same()
    assert like.text("lower").endswith(", no difference")


def test_ratio_interval_covers_the_truth():
    """95 % intervals from ten seeds, over 200 experiments with a true ratio of 2: about as many as they say."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        ours, theirs = rng.normal(2, 0.3, 10), rng.normal(1, 0.15, 10)

        def ratio(both: np.ndarray) -> float:
            return float(both[:10].mean() / both[10:].mean())

        low, high = report.bootstrap_interval([ours, theirs], ratio, resamples=300)
        hits += low <= 2 <= high
    assert 0.85 <= hits / 200 <= 0.99


def test_few_seeds_give_no_interval():
    found = report.compare([1.0, 3.0], [4.0, 4.0, 4.0])
    assert found == report.Comparison("ratio", 0.5, None)
    assert found.text("lower") == "0.5"
    assert not found.same()
    assert report.compare([], [1.0]) is None


def test_difference_of_numbers_that_may_be_negative():
    found = report.compare([-1.0, -1.1, -0.9], [-3.0, -3.1, -2.9], "difference")
    assert found.center == pytest.approx(2.0)
    assert found.text("higher").startswith("+2 (")
    assert found.word("higher") == "better"
    assert report.compare([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], "difference").same()


# Report


def values(experiment: Experiment, seeds, skip=()) -> list[report.Result]:
    rng = np.random.default_rng(0)
    return [
        report.Result(arm, seed, 10, 2.0, {"a": (i + 1) * math.exp(0.05 * rng.normal()), "b": i - 0.5, "floor": 0.5})
        for i, arm in enumerate(experiment.arms)
        for seed in seeds
        if (arm.name, seed) not in skip
    ]


AXIS = {
    "arms": (*(Arm(f"{g}{x}", f"{g} at {x}", x=x, group=g) for g in "pq" for x in (1, 10)), Arm("all", "all")),
    "metrics": (Metric("a", "first|one", "lower", log=True, floor="floor"), Metric("b", "second"), Metric("c", "no")),
    "x": "horizon",
    "reference": "p1",
}
ROWS = {**AXIS, "x": None, "arms": tuple(dataclasses.replace(arm, x=None) for arm in AXIS["arms"])}
FACTS = {
    "command": "fastflow experiment steps-of-the-walk --size small",
    "budget": "1 CPU core",
    "sessions": [{"commit": "abc", "machine": "a cpu"}, {"commit": None, "machine": "a cpu"}],
}


def test_summary_says_what_there_is_and_what_is_missing():
    experiment = make(**AXIS)
    found = values(experiment, range(4), skip={("q1", 2)})
    text = report.summary(experiment, range(4), found, FACTS)
    assert "- Runs: 19 of 20 finished; missing: q1 seed 2\n" in text
    assert "- Command: `fastflow experiment steps-of-the-walk --size small`\n" in text
    assert "- Commit: abc; unknown\n" in text
    assert "- Machine: a cpu\n" in text
    assert "- Budget: 1 CPU core (38 s" in text
    assert "- No finished run has `c`\n" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 5
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1
    assert "first\\|one ↓" in rows[0]
    assert "ratio to p at 1" in rows[0]
    assert "difference from p at 1" in rows[0]
    assert rows[2].count("reference") == 3
    assert "worse" in rows[3]


def test_logarithms_are_compared_by_their_difference():
    arms = (Arm("a", "A"), Arm("b", "B"))
    experiment = make(arms=arms, metrics=(Metric("a", "log a", compare="difference"),), reference="a")
    rows = report.summary(experiment, range(3), values(experiment, range(3)), FACTS).splitlines()[-4:]
    assert "difference from A" in rows[0]
    assert "| +1" in rows[3] or "| +0.9" in rows[3]


def test_few_seeds_are_said():
    experiment = make(**ROWS)
    text = report.summary(experiment, range(2), values(experiment, range(2)), FACTS)
    assert "- Numbers: mean over seeds (smallest to largest), because fewer than 3 give no interval" in text
    assert "interquartile" not in text
    mixed = report.summary(experiment, range(3), values(experiment, range(3), skip={("p1", 0)}), FACTS)
    assert "interquartile mean" in mixed
    assert "in arms with fewer than 3 seeds" in mixed


def test_references_that_differ_have_a_column():
    experiment = make(
        arms=(Arm("a", "A"), Arm("b", "B"), Arm("c", "C", reference="b")), metrics=(Metric("a", "A"),), reference="a"
    )
    rows = report.summary(experiment, range(3), values(experiment, range(3)), FACTS).splitlines()[-3:]
    assert [row.split(" | ")[2] for row in rows] == ["—", "A", "B"]
    assert [float(row.split(" | ")[4].split()[0]) for row in rows[1:]] == pytest.approx([2.0, 1.5], rel=0.1)


@pytest.mark.parametrize("kind", ["axis", "rows"])
def test_figure_shows_every_arm(kind, tmp_path):
    pytest.importorskip("matplotlib")
    experiment = make(**(AXIS if kind == "axis" else ROWS))
    figure = report.draw(experiment, values(experiment, range(3), skip={("q1", 2)}), 15)
    first, second = figure.axes
    assert figure.get_suptitle().endswith("over 2 to 3 seeds, 14 of 15 runs")
    assert "floor" in [text.get_text() for text in first.texts]
    if kind == "axis":
        assert (first.get_xscale(), first.get_yscale(), second.get_yscale()) == ("log", "log", "linear")
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["p", "q", "all"]
    else:
        assert (first.get_xscale(), second.get_xscale()) == ("log", "linear")
        assert [text.get_text() for text in first.get_yticklabels()] == [arm.label for arm in experiment.arms]
    report.save_figure(figure, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_figure_without_a_number_says_so():
    pytest.importorskip("matplotlib")
    experiment = make(**ROWS)
    found = [
        report.Result(experiment.arms[0], 0, 1, 1.0, {"a": math.inf}),
        report.Result(experiment.arms[1], 0, 1, 1.0, {"a": 1.0}),
    ]
    texts = [text.get_text() for text in report.draw(experiment, found, 5).axes[0].texts]
    assert texts.count("not finite") == 1
    assert texts.count("no finished run") == 3


# Running


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """An experiment that ran, one of its arms in vain, and what it said."""
    pytest.importorskip("ogbench")
    pytest.importorskip("tyro")
    folder = tmp_path_factory.mktemp("experiment") / "it"
    whole = make({**SMALL, "dataset_path": data})
    broken = Arm("broken", "broken", {"agent.critic_flow_steps": 0})
    experiment = dataclasses.replace(whole, arms=(*whole.arms, broken))
    # With nothing to do, an empty report; then a run whose training was killed before its first checkpoint.
    assert [path.name for path in run(experiment, output=folder, arms=[], out=quiet)] == ["results.csv", "summary.md"]
    assert "- Runs: 0 of 6 finished" in (folder / "summary.md").read_text(encoding="utf-8")
    Run.create(folder / "k2" / "seed0", {"steps": 20, "eval_interval": 20})
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as error:
        patch.setenv("PYTHONPATH", HERE)
        run(experiment, output=folder, jobs=2, out=lines.append, seeds=[0])
    return experiment, folder, lines, str(error.value)


def test_failing_arm_is_named_and_the_others_go_on(done):
    _, folder, lines, message = done
    assert message.startswith("1 of 3 runs failed: broken seed 0.")
    (failure,) = [line for line in lines if "FAILED" in line]
    assert "broken seed 0: training FAILED, exit code 2" in failure
    assert str(folder / "broken" / "seed0.log") in failure
    assert "critic_flow_steps" in failure
    assert len(failure.splitlines()) <= 6
    taken = [re.search(r"\] (k\d) seed 0: done, (\d+) s$", line) for line in lines]
    taken = {match[1]: int(match[2]) for match in taken if match}
    assert sorted(taken) == ["k1", "k2"]
    for arm, seconds in taken.items():  # with training, not only what was measured behind it
        with open(folder / arm / "seed0" / "eval.csv", newline="", encoding="utf-8") as file:
            *_, last = csv.DictReader(file)
        assert seconds >= round(float(last["time/total_time"]))
    text = (folder / "summary.md").read_text(encoding="utf-8")
    # Seed 1 is declared, though it was not asked for yet.
    assert "- Runs: 2 of 6 finished; missing: k1 seed 1, k2 seed 1, broken seed 0, broken seed 1\n" in text


def test_what_an_experiment_leaves_behind(done):
    _, folder, _, _ = done
    facts = json.loads((folder / "experiment.json").read_text())
    assert (facts["name"], facts["size"], facts["seeds"]) == ("steps-of-the-walk", "small", [0, 1])
    assert facts["arms"]["k2"]["settings"] == {"agent.critic_flow_steps": 2, "agent.use_prob_embed": False}
    assert facts["settings"]["steps"] == 20
    (session,) = facts["sessions"]
    assert session["machine"]
    assert {"fastflow", "torch"} <= set(session["versions"])

    for name, steps in (("k1", 1), ("k2", 2)):
        config = Run.open(folder / name / "seed0").config
        assert (config["agent"]["critic_flow_steps"], config["seed"], config["threads_used"]) == (steps, 0, 1)
        assert config["agent"]["value_hidden_dims"] == [16]
    assert config["agent"]["use_prob_embed"] is False

    with open(folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["seed"], row["steps"]) for row in rows] == [("k1", "0", "20"), ("k2", "0", "20")]
    assert float(rows[0]["seconds"]) > 0
    assert float(rows[0]["evaluation/episode.length"]) >= 1
    assert "evaluation/success" in rows[0]
    kept = json.loads((folder / "k1" / "seed0.after.json").read_text())
    assert float(rows[0]["norm"]) == kept["metrics"]["norm"] > 0
    assert rows[1]["norm"] == ""
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_finished_runs_are_not_run_again(done):
    experiment, folder, _, _ = done
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    lines: list[str] = []
    written = run(experiment, output=folder, seeds=[0], arms=["k1", "k2"], out=lines.append)
    assert lines[0].startswith("steps-of-the-walk, small: 2 of 2 runs finished before")
    assert [path.name for path in written] == ["results.csv", "summary.md", "figure.png"]
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert (folder / "k1" / "calls").read_text() == "x"
    assert len(json.loads((folder / "experiment.json").read_text())["sessions"]) == 1


def test_plot_only(done):
    experiment, folder, _, _ = done
    (folder / "summary.md").unlink()
    relabelled = dataclasses.replace(experiment, title="Another title")
    written = run(relabelled, output=folder, plot_only=True, out=quiet)
    assert all(path.is_file() for path in written)
    assert (folder / "summary.md").read_text(encoding="utf-8").startswith("# Another title\n")
    assert f"--output {folder}`" in (folder / "summary.md").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="holds no experiment to report on"):
        run(experiment, output=folder / "nowhere", plot_only=True)
    assert not (folder / "nowhere").exists()


def test_folder_of_another_declaration_is_refused(done, data, tmp_path):
    experiment, folder, _, _ = done
    before = (folder / "experiment.json").read_bytes()
    arms = (Arm("k1", "K = 1", {"agent.critic_flow_steps": 4}, after=experiment.arms[0].after), *experiment.arms[1:])
    with pytest.raises(
        UserError, match=r"another experiment.*\n  arms\.k1\.settings\.agent\.critic_flow_steps: 1 there, 4 here$"
    ):
        run(dataclasses.replace(experiment, arms=arms), output=folder)
    sizes = {"small": Size({**SMALL, "dataset_path": data, "steps": 30}, (0, 1), "")}
    with pytest.raises(UserError, match=r"\n  settings\.steps: 20 there, 30 here$"):
        run(dataclasses.replace(experiment, sizes=sizes), output=folder, plot_only=True)
    assert (folder / "experiment.json").read_bytes() == before

    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not empty and not an experiment's"):
        run(experiment, output=tmp_path)
    write_json(tmp_path / "experiment.json", {"format": "another", "version": "1"})
    with pytest.raises(UserError, match="expected fastflow-experiment version 1, got another version 1"):
        run(experiment, output=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.tex", "experiment.json"}


def test_arms_and_seeds_may_come_in_addition(done):
    """And an arm that was taken out cannot come back as something else."""
    experiment, folder, _, _ = done
    fewer = dataclasses.replace(experiment, arms=(*experiment.arms[:2], Arm("new", "new")))
    run(fewer, output=folder, arms=["k1"], seeds=[0], out=quiet)
    assert set(json.loads((folder / "experiment.json").read_text())["arms"]) == {"k1", "k2", "broken", "new"}
    back = dataclasses.replace(experiment, arms=(*experiment.arms[:2], Arm("broken", "mended")))
    with pytest.raises(UserError, match=r"arms\.broken\.settings\.agent\.critic_flow_steps: 0 there, \(absent\) here"):
        run(back, output=folder)


def test_further_metrics_that_fail_or_change(done):
    """Other ones need no other training."""
    experiment, folder, _, _ = done
    checkpoint = Run.open(folder / "k2" / "seed0").checkpoint_path(20).stat().st_mtime_ns
    arms = (experiment.arms[0], dataclasses.replace(experiment.arms[1], after="builtins:id"))
    lines: list[str] = []
    with pytest.raises(UserError, match="1 of 1 runs failed: k2 seed 0"):
        run(dataclasses.replace(experiment, arms=arms), output=folder, arms=["k2"], seeds=[0], out=lines.append)
    assert "k2 seed 0: builtins:id FAILED, exit code 1" in lines[-1]
    assert "expected a dict of numbers by name, got int" in lines[-1]
    assert "1 of 4 finished" in (folder / "summary.md").read_text(encoding="utf-8")
    assert Run.open(folder / "k2" / "seed0").checkpoint_path(20).stat().st_mtime_ns == checkpoint


BANDIT = {
    "env": "bandit-two-modes",
    "preset": "none",
    "device": "cpu",
    "steps": 32,
    "num_envs": 4,
    "log_interval": 16,
    "eval_interval": 32,
    "eval_episodes": 2,
    "agent.rollout_steps": 4,
    "agent.num_minibatches": 2,
    "agent.num_epochs": 1,
}


def test_arms_with_agents_of_their_own(tmp_path):
    pytest.importorskip("gymnasium")
    pytest.importorskip("tyro")
    experiment = make(
        agent="fpo",
        arms=(
            Arm("fpo", "FPO", {"agent.num_pairs": 2}),
            Arm("ppo", "PPO", {"agent.init_std": 0.5}, agent="ppo"),
        ),
        sizes={"small": Size(BANDIT, (0,), "1 CPU core, 20 seconds")},
        metrics=(Metric("evaluation/episode.return", "return", "higher", compare="difference"),),
        reference="ppo",
        picture="test_experiments:draw_picture",
    )
    folder = tmp_path / "it"
    written = run(experiment, output=folder, jobs=2, out=quiet)
    assert [path.name for path in written][-1] == "picture.txt"
    assert (folder / "picture.txt").read_text() == "steps-of-the-walk [0] fpo ppo"
    for name in ("fpo", "ppo"):
        config = Run.open(folder / name / "seed0").config
        assert (config["agent_name"], config["steps"]) == (name, 32)
    assert config["agent"]["init_std"] == 0.5
    assert "num_pairs" not in config["agent"]
    facts = json.loads((folder / "experiment.json").read_text())
    assert [arm.get("agent") for arm in facts["arms"].values()] == [None, "ppo"]
    # Drawn anew without training; and another agent is another experiment.
    (folder / "picture.txt").unlink()
    assert folder / "picture.txt" in run(experiment, output=folder, plot_only=True, out=quiet)
    arms = (experiment.arms[0], dataclasses.replace(experiment.arms[1], agent="dppo"))
    with pytest.raises(UserError, match=r"arms\.ppo\.agent: ppo there, dppo here"):
        run(dataclasses.replace(experiment, arms=arms), output=folder, out=quiet)


INTERRUPTED = """
import sys
from pathlib import Path
from fastflow.experiments.run import run
from test_experiments import SMALL, Arm, make
settings = {**SMALL, "dataset_path": Path(sys.argv[1]), "steps": 1500, "log_interval": 50, "eval_interval": 1500}
experiment = make(settings, arms=(Arm("long", "long"),), reference=None)
if __name__ == "__main__":
    run(experiment, output=sys.argv[2], seeds=[0], jobs=1)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_interrupted_and_resumed(data, tmp_path):
    pytest.importorskip("ogbench")
    pytest.importorskip("tyro")
    folder = tmp_path / "it"
    command = [sys.executable, "-c", INTERRUPTED, str(data), str(folder)]
    log = folder / "long" / "seed0.log"
    # A group of its own, as a terminal gives; its Ctrl-C reaches the whole group.
    environment = {**os.environ, "PYTHONPATH": HERE}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while "update 100 of 1,500" not in (log.read_text() if log.exists() else ""):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGINT)
            printed, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert "stopped; what was under way is saved, and the same command goes on" in printed
    assert errors.endswith("KeyboardInterrupt\n")
    assert "- Runs: 0 of 2 finished; missing: long seed 0, long seed 1" in (folder / "summary.md").read_text()
    stopped = Run.open(folder / "long" / "seed0")
    (step,) = stopped.checkpoint_steps()
    assert 100 <= step < 1500
    # The terminal's signal did not reach the training a second time, which would have ended it without saving.
    assert log.read_text().count("stopping after this update") == 1

    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=60).stdout
    assert "long seed 0: done" in printed
    finished = Run.open(folder / "long" / "seed0")
    assert [entry["step"] for entry in finished.config["resumed"]] == [step]
    assert (finished.checkpoint_steps(), finished.eval.steps()) == ([1500], [0, 1500])
    assert f"--resume={finished.path}" in log.read_text()


# Runs of other experiments --------------------------------------------------------------------------------------------


def test_runs_with_the_same_settings_are_taken_over(data, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", HERE)
    settings = {**SMALL, "dataset_path": data}
    sizes = {"small": Size(settings, (0, 1), "seconds")}
    first = make(sizes=sizes)
    run(first, output=tmp_path / "first", arms=["k1"], seeds=[0], out=quiet)

    # The same value, once as an arm's and once as everybody's.
    shared = {"small": Size({**settings, "agent.critic_flow_steps": 1}, (0, 1), "seconds")}
    arms = (
        Arm("plain", "plain", after="test_experiments:weight_norm"),
        Arm("sigma3", "sigma 3", {"agent.sigma": 3.0}),
    )
    second = make(name="another", sizes=shared, arms=arms, reference="plain")
    printed: list[str] = []
    run(second, output=tmp_path / "second", reuse=True, out=printed.append)
    ours, theirs = (tmp_path / name / arm / "seed0" for name, arm in (("second", "plain"), ("first", "k1")))
    assert f"plain seed 0: taken over from {theirs}" in printed
    assert [line for line in printed if "taken over" in line] == [f"plain seed 0: taken over from {theirs}"]
    assert any("plain seed 1: done" in line for line in printed)
    assert any("sigma3 seed 0: done" in line for line in printed)
    assert not any("plain seed 0: done" in line for line in printed)
    assert (ours / "train.csv").read_text() == (theirs / "train.csv").read_text()
    written = (tmp_path / "second" / "summary.md").read_text()
    assert "- Runs: 4 of 4 finished" in written
    assert "- Runs of other experiments with the same settings: plain from first/k1\n" in written
    # What was measured of it came along: it was not measured again.
    assert (tmp_path / "second" / "plain" / "calls").read_text() == "x"

    again: list[str] = []
    run(second, output=tmp_path / "second", reuse=True, out=again.append)
    assert not any("taken over" in line for line in again)


def test_a_run_that_has_begun_is_not_replaced(data, tmp_path):
    settings = {**SMALL, "dataset_path": data}
    sizes = {"small": Size(settings, (0,), "seconds")}
    run(make(sizes=sizes), output=tmp_path / "first", arms=["k2"], out=quiet)
    run(make(sizes=sizes), output=tmp_path / "second", arms=["k2"], out=quiet)
    printed: list[str] = []
    run(make(sizes=sizes), output=tmp_path / "second", arms=["k2"], reuse=True, out=printed.append)
    assert printed[0] == "steps-of-the-walk, small: 1 of 1 runs finished before, 1 at a time"
