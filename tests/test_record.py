"""The run folder: tables, checkpoints, and what happens to them when something goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from fastflow.errors import UserError
from fastflow.record import (
    Checkpoint,
    MetricTable,
    Run,
    check_available,
    differences,
    load_checkpoint,
    save_checkpoint,
    tensor_fingerprint,
)

CONFIG = {"alpha": 0.3, "hidden": [16, 16], "q_agg": "mean"}


def make_checkpoint(step: int = 5, **tensors: torch.Tensor) -> Checkpoint:
    tensors = tensors or {"agent/weight": torch.arange(6.0).view(2, 3), "loop/count": torch.tensor(3)}
    return Checkpoint(step, "floq", CONFIG, {"obs_dim": 2}, {"device": "cpu"}, tensors)


# Tables


def test_table_keeps_rows_exactly(tmp_path):
    table = MetricTable(tmp_path / "train.csv")
    assert table.rows() == []
    table.append(1, {"training/critic/floq_loss": 0.1, "time/total_time": 1e-300})
    table.append(2, {"training/critic/floq_loss": 1 / 3, "time/total_time": 2.0})
    assert table.path.read_text().splitlines()[0] == "step,training/critic/floq_loss,time/total_time"
    assert table.rows() == [
        {"step": 1, "training/critic/floq_loss": 0.1, "time/total_time": 1e-300},
        {"step": 2, "training/critic/floq_loss": 1 / 3, "time/total_time": 2.0},
    ]


def test_table_takes_new_columns(tmp_path):
    table = MetricTable(tmp_path / "eval.csv")
    table.append(0, {"a": 1.0})
    table.append(1, {"b": 2.0})
    table.append(2, {"a": 3.0})
    assert table.rows() == [{"step": 0, "a": 1.0}, {"step": 1, "b": 2.0}, {"step": 2, "a": 3.0}]


def test_table_insert_sorts_and_replaces(tmp_path):
    table = MetricTable(tmp_path / "eval.csv")
    for step in (0, 20):
        table.append(step, {"success": 0.0})
    table.insert(10, {"success": 0.5, "extra": 1.0})
    table.insert(20, {"success": 1.0})
    assert table.steps() == [0, 10, 20]
    assert table.rows()[1:] == [{"step": 10, "success": 0.5, "extra": 1.0}, {"step": 20, "success": 1.0}]


def test_table_truncate_drops_later_rows_and_a_torn_line(tmp_path):
    table = MetricTable(tmp_path / "train.csv")
    for step in (10, 20, 30):
        table.append(step, {"loss": step / 7, "rate": 1.0})
    with open(table.path, "a") as file:
        file.write("40,0.1,1")  # cut off in the middle of a number
    assert table.steps() == [10, 20, 30]
    table.truncate(20)
    assert table.path.read_text().count("\n") == 3
    assert [row["loss"] for row in table.rows()] == [10 / 7, 20 / 7]


def test_table_of_something_else(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("name,age\n")
    with pytest.raises(UserError, match="step"):
        MetricTable(path).rows()


# Checkpoints


def test_checkpoint_round_trip(tmp_path):
    path = tmp_path / "checkpoints" / "step_00000005.safetensors"
    shared = torch.randn(4, 4)
    saved = make_checkpoint(
        5, **{"agent/whole": shared, "agent/view": shared[:2].T, "loop/generator": torch.Generator().get_state()}
    )
    save_checkpoint(path, saved)
    loaded = load_checkpoint(path, agent="floq", config=CONFIG)
    assert (loaded.step, loaded.agent, loaded.config, loaded.arguments) == (5, "floq", CONFIG, {"obs_dim": 2})
    assert loaded.tensors.keys() == saved.tensors.keys()
    for name, tensor in saved.tensors.items():
        assert torch.equal(loaded.tensors[name], tensor), name
    assert set(loaded.part("agent")) == {"whole", "view"}
    # Any tool can read what it is.
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "fastflow-checkpoint"
        assert json.loads(file.metadata()["config"]) == CONFIG


def test_checkpoint_that_is_not_finite_is_refused(tmp_path):
    path = tmp_path / "step_00000005.safetensors"
    save_checkpoint(path, make_checkpoint(5))
    with pytest.raises(ValueError, match=r"finite.*agent/weight"):
        save_checkpoint(path, make_checkpoint(5, **{"agent/weight": torch.tensor([1.0, float("nan")])}))
    assert torch.equal(load_checkpoint(path).tensors["agent/weight"], torch.arange(6.0).view(2, 3))


@pytest.mark.parametrize("keep", [0, 7, 100, 300])
def test_truncated_checkpoint(tmp_path, keep):
    path = tmp_path / "step_00000005.safetensors"
    save_checkpoint(path, make_checkpoint())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        load_checkpoint(path)


def test_pickle_is_not_a_checkpoint(tmp_path):
    path = tmp_path / "step_00000005.safetensors"
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        load_checkpoint(path)


def test_foreign_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="not a checkpoint of fastflow"):
        load_checkpoint(path)


def test_checkpoint_of_another_version_agent_or_config(tmp_path):
    path = tmp_path / "step_00000005.safetensors"
    save_checkpoint(path, make_checkpoint())
    with pytest.raises(UserError, match="agent 'floq', expected 'fpo'"):
        load_checkpoint(path, agent="fpo")
    with pytest.raises(UserError, match=r"alpha: 0\.3 there, 4\.0 here") as error:
        load_checkpoint(path, config={**CONFIG, "alpha": 4.0})
    assert "q_agg" not in str(error.value)

    with safetensors.safe_open(path, "pt") as file:
        metadata = {**file.metadata(), "version": "2"}
    safetensors.torch.save_file({"agent/weight": torch.zeros(1)}, path, metadata)
    with pytest.raises(UserError, match="format version 2"):
        load_checkpoint(path)


def test_missing_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        load_checkpoint(tmp_path / "step_00000005.safetensors")


def test_differences_names_nested_fields():
    saved = {"env": "a", "agent": {"alpha": 1.0, "tau": 0.1}}
    asked = {"env": "a", "agent": {"alpha": 2.0, "tau": 0.1, "new": True}}
    assert differences(saved, asked) == ["agent.alpha: 1.0 there, 2.0 here", "agent.new: (absent) there, True here"]


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file size are POSIX")
def test_full_disk_leaves_the_old_file(tmp_path):
    """With a limit on file size, which fails like a full disk."""
    code = """
import resource, sys, torch
from fastflow.errors import UserError
from fastflow.record import Checkpoint, MetricTable, load_checkpoint, save_checkpoint

def checkpoint(rows):
    return Checkpoint(5, "floq", {}, {}, {}, {"agent/weight": torch.ones(rows)})

save_checkpoint("c.safetensors", checkpoint(8))
table = MetricTable("train.csv")
table.append(1, {"loss": 1.0})
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
try:
    save_checkpoint("c.safetensors", checkpoint(100_000))
except UserError as error:
    assert "disk is full" in str(error), error
else:
    sys.exit("a full disk went unnoticed")
assert torch.equal(load_checkpoint("c.safetensors").tensors["agent/weight"], torch.ones(8))
try:
    for step in range(2, 1000):
        table.append(step, {"loss": 1.0})
except UserError as error:
    assert "disk is full" in str(error), error
else:
    sys.exit("a full disk went unnoticed")
assert table.steps() == list(range(1, step)), table.steps()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.safetensors", "train.csv"]


# The folder


def test_run_folder_must_be_free(tmp_path):
    check_available(tmp_path / "new")
    check_available(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"not empty.*--resume"):
        Run.create(tmp_path, {})
    with pytest.raises(UserError, match="a file of that name"):
        Run.create(tmp_path / "notes.txt", {})


def test_run_folder_round_trip(tmp_path):
    Run.create(tmp_path / "run", {"env": "x", "agent": {"hidden": (1, 2)}})
    run = Run.open(tmp_path / "run")
    assert run.config["env"] == "x"
    assert run.config["agent"]["hidden"] == [1, 2]


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"format": "fastflow-run", "version": "0"}'])
def test_not_a_run_folder(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"not a run folder|damaged|expected format"):
        Run.open(tmp_path)


def test_run_keeps_the_newest_checkpoints(tmp_path):
    run = Run.create(tmp_path / "run", {})
    with pytest.raises(UserError, match="no checkpoint"):
        run.load()
    for step in (10, 20, 30):
        run.save(make_checkpoint(step), keep=2)
    assert run.checkpoint_steps() == [20, 30]
    assert run.load().step == 30
    assert run.load(20).step == 20
    with pytest.raises(UserError, match="no checkpoint of step 10; it has 20, 30"):
        run.load(10)


def test_fingerprint_sees_changes():
    tensors = {"observations": torch.randn(5000, 3), "rewards": torch.randn(5000)}
    before = tensor_fingerprint(tensors)
    assert before == tensor_fingerprint({name: value.clone() for name, value in reversed(tensors.items())})
    changed = {**tensors, "rewards": tensors["rewards"].clone()}
    changed["rewards"][4321] += 1
    assert tensor_fingerprint(changed) != before
    assert tensor_fingerprint({**tensors, "observations": tensors["observations"] + 1}) != before
