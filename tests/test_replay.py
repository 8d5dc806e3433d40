"""The replay buffer of online fine-tuning: what it holds and draws, and its files."""

from __future__ import annotations

import pytest
import torch

from fastflow.data import KEYS, Dataset
from fastflow.errors import UserError
from fastflow.replay import ReplayBuffer, ReplayFiles

pytest.importorskip("safetensors")


def row(number: float) -> dict[str, torch.Tensor]:
    """A transition that tells itself by its reward."""
    vector = torch.full((2,), number)
    return {
        "observations": vector,
        "actions": vector[:1] / 1000,
        "next_observations": vector + 1,
        "rewards": torch.tensor(number),
        "masks": torch.tensor(1.0),
        "terminals": torch.tensor(0.0),
    }


def dataset(rows: int) -> Dataset:
    """Rewards -1, -2, ... -rows."""
    found = [row(-1.0 - i) for i in range(rows)]
    return Dataset("moves", {key: torch.stack([each[key] for each in found]) for key in KEYS})


def filled(rows: int, capacity: int, added: int, balanced: bool = False) -> ReplayBuffer:
    """Online transitions have the rewards 0, 1, 2, ..."""
    buffer = ReplayBuffer(dataset(rows), capacity, balanced=balanced)
    for i in range(added):
        buffer.add(row(float(i)))
    return buffer


def drawn(buffer: ReplayBuffer) -> set[float]:
    batch = buffer.sample(2000, torch.Generator().manual_seed(0))
    assert {key: tensor.shape for key, tensor in batch.items()} == {
        "observations": (2000, 2),
        "actions": (2000, 1),
        "next_observations": (2000, 2),
        "rewards": (2000,),
        "masks": (2000,),
        "terminals": (2000,),
    }
    # All of a transition comes from one row.
    assert torch.equal(batch["next_observations"], batch["observations"] + 1)
    assert torch.equal(batch["observations"][:, 0], batch["rewards"])
    return set(batch["rewards"].tolist())


# What is in it


def test_it_begins_with_the_dataset_and_padding_is_not_drawn():
    data = dataset(4)
    buffer = ReplayBuffer(data, 10)
    assert (len(buffer), buffer.capacity) == (4, 10)
    assert drawn(buffer) == {-1.0, -2.0, -3.0, -4.0}
    buffer.add(row(0.0))
    assert drawn(buffer) == {-1.0, -2.0, -3.0, -4.0, 0.0}


def test_the_oldest_are_overwritten_the_dataset_first():
    buffer = filled(3, 5, 4)
    assert len(buffer) == 5
    assert drawn(buffer) == {-3.0, 0.0, 1.0, 2.0, 3.0}
    buffer = filled(3, 5, 12)
    assert drawn(buffer) == {7.0, 8.0, 9.0, 10.0, 11.0}


def test_a_dataset_that_fills_it_leaves_one_row():
    """Published: max(capacity, n + 1) rows, so that a large dataset is overwritten from the second step on."""
    data = dataset(6)
    buffer = ReplayBuffer(data, 4)
    assert buffer.capacity == 7
    for i in range(3):
        buffer.add(row(float(i)))
    assert drawn(buffer) == {-3.0, -4.0, -5.0, -6.0, 0.0, 1.0, 2.0}
    # The dataset itself is as it was.
    assert torch.equal(data.tensors["rewards"], dataset(6).tensors["rewards"])


def test_balanced_halves_are_exact():
    buffer = filled(3, 4, 6, balanced=True)
    assert (len(buffer), buffer.capacity) == (4, 4)
    for size in (2, 64):
        rewards = buffer.sample(size, torch.Generator().manual_seed(1))["rewards"]
        assert (rewards < 0).tolist() == [True] * (size // 2) + [False] * (size // 2)
    assert drawn(buffer) == {-1.0, -2.0, -3.0, 2.0, 3.0, 4.0, 5.0}
    with pytest.raises(ValueError, match="batch_size: expected an even number for balanced sampling, got 7"):
        buffer.sample(7, torch.Generator())


def test_draws_are_uniform():
    buffer = filled(2, 100, 2)
    counts = torch.bincount(buffer.sample(40_000, torch.Generator().manual_seed(0))["rewards"].long() + 2)
    assert counts.tolist() == pytest.approx([10_000] * 4, rel=0.05)


def test_nothing_to_draw_from():
    with pytest.raises(ValueError, match="the replay buffer is empty"):
        filled(3, 4, 0, balanced=True).sample(2, torch.Generator())
    with pytest.raises(ValueError, match="capacity: expected at least 1, got 0"):
        ReplayBuffer(dataset(2), 0)


def test_rows_that_are_not_there():
    buffer = filled(2, 3, 5, balanced=True)
    assert buffer.rows(2, 5)["rewards"].tolist() == [2.0, 3.0, 4.0]
    for start, stop in ((1, 5), (3, 6)):
        with pytest.raises(ValueError, match=f"rows: {start} to {stop} are not among the last 3 of 5"):
            buffer.rows(start, stop)


# Files


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("saves", [(3,), (3, 4, 9), (2, 12), (12, 13)])
def test_what_is_saved_comes_back(tmp_path, balanced, saves):
    """Saves before and after the ring is full, and one after more transitions than it holds."""
    files = ReplayFiles(tmp_path / "replay")
    buffer = ReplayBuffer(dataset(2), 5, balanced=balanced)
    for added in saves:
        while buffer.added < added:
            buffer.add(row(float(buffer.added)))
        files.save(buffer)
    files.save(buffer)
    assert len(list(files.folder.iterdir())) == len(saves)
    again = ReplayBuffer(dataset(2), 5, balanced=balanced)
    ReplayFiles(files.folder).load(again, saves[-1])
    for key, tensor in buffer._ring.items():
        assert torch.equal(tensor, again._ring[key]), key
    assert again.added == buffer.added


def test_a_file_is_written_once(tmp_path):
    files = ReplayFiles(tmp_path)
    buffer = filled(2, 100, 4)
    files.save(buffer)
    first = tmp_path / "rows_000000000000_000000000004.safetensors"
    before = (first.stat().st_mtime_ns, first.read_bytes())
    buffer.add(row(4.0))
    files.save(buffer)
    assert (first.stat().st_mtime_ns, first.read_bytes()) == before
    assert (tmp_path / "rows_000000000004_000000000005.safetensors").stat().st_size < len(before[1])


def test_what_came_after_the_checkpoint_is_replaced(tmp_path):
    """As after a power cut between the file and its checkpoint."""
    files = ReplayFiles(tmp_path)
    for added in (4, 7):
        files.save(filled(2, 100, added))
    files = ReplayFiles(tmp_path)
    buffer = ReplayBuffer(dataset(2), 100)
    files.load(buffer, 4)
    assert buffer.rows(0, 4)["rewards"].tolist() == [0.0, 1.0, 2.0, 3.0]
    for i in range(5):
        buffer.add(row(100.0 + i))
    files.save(buffer)
    again = ReplayBuffer(dataset(2), 100)
    ReplayFiles(tmp_path).load(again, 9)
    assert again.rows(0, 9)["rewards"].tolist() == [0.0, 1.0, 2.0, 3.0, 100.0, 101.0, 102.0, 103.0, 104.0]


def test_files_that_cannot_be_used(tmp_path):
    files = ReplayFiles(tmp_path / "replay")
    buffer = filled(2, 100, 3)
    files.save(buffer)
    buffer.add(row(3.0))
    files.save(buffer)
    first, second = sorted(files.folder.iterdir())
    content = first.read_bytes()

    def load() -> None:
        ReplayFiles(files.folder).load(ReplayBuffer(dataset(2), 100), 4)

    load()
    first.write_bytes(content[:-3])
    with pytest.raises(UserError, match=f"{first.name} is damaged"):
        load()
    # Rows of other numbers than its name says.
    first.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match=f"{first.name} does not fit this run: expected finite rows"):
        load()
    first.unlink()
    with pytest.raises(
        UserError, match=r"online transitions 0 to 4 .* those from 0 on are missing.*without its buffer"
    ):
        load()
    first.write_bytes(content)
    second.unlink()
    with pytest.raises(UserError, match="those from 3 on are missing"):
        load()
