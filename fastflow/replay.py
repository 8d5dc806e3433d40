"""The replay buffer of online fine-tuning: what it holds, how batches are drawn from it, and its files.

    <run>/replay/rows_000000000000_000000100000.safetensors   online transitions 0 to 99,999, in order

A file holds what came in between two checkpoints and is never written again, so saving costs what is new.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastflow.data import KEYS, Dataset
from fastflow.errors import UserError, missing_extra
from fastflow.record import save_tensors

__all__ = ["ReplayBuffer", "ReplayFiles"]

_NAME = re.compile(r"rows_(\d{12,})_(\d{12,})\.safetensors")
_FORMAT = {"format": "fastflow-replay", "version": "1"}


class ReplayBuffer:
    """Offline data and the transitions that come in online, on one device.

    The buffer rules of FQL's code (arXiv:2502.02538), which floq's has too. Unbalanced, there is one ring that begins
    with the dataset: it has max(capacity, n + 1) rows for n of the dataset, new rows follow the dataset's, and when it
    is full the oldest are overwritten, the dataset's first. A batch is uniform over what is there. Balanced, the
    dataset stays whole, the ring of `capacity` rows holds online transitions alone, and one half of a batch comes from
    each.

    Args:
        dataset: the offline data; balanced, its tensors are used as they are, else copied.
        capacity: rows of the ring.
        balanced: see above.

    Attributes:
        capacity: rows of the ring as it is.
        added: transitions that came in.

    Raises:
        ValueError: capacity < 1.
    """

    def __init__(self, dataset: Dataset, capacity: int, *, balanced: bool = False) -> None:
        if capacity < 1:
            raise ValueError(f"capacity: expected at least 1, got {capacity}")
        self.balanced = balanced
        self.added = 0
        self._first = 0 if balanced else len(dataset)
        self.capacity = capacity if balanced else max(capacity, len(dataset) + 1)
        self._dataset = dataset if balanced else None
        self._ring: dict[str, Tensor] = {}
        for key, tensor in dataset.tensors.items():
            self._ring[key] = tensor.new_zeros(self.capacity, *tensor.shape[1:])
            self._ring[key][: self._first] = tensor[: self._first]

    def __len__(self) -> int:
        """Rows of the ring that hold a transition."""
        return min(self._first + self.added, self.capacity)

    def add(self, transition: Mapping[str, Tensor]) -> None:
        """Appends one transition.

        Args:
            transition: `fastflow.data.KEYS` without a batch axis, float32, on any device.
        """
        position = (self._first + self.added) % self.capacity
        for key, ring in self._ring.items():
            ring[position].copy_(transition[key])
        self.added += 1

    def sample(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draws transitions with replacement.

        Args:
            batch_size: B; even if balanced.
            generator: on the buffer's device.

        Returns:
            As `Dataset.sample`; balanced, the first B / 2 rows are the dataset's.

        Raises:
            ValueError: an odd `batch_size` of balanced sampling, or no transition to draw from.
        """
        if not len(self):
            raise ValueError("sample: the replay buffer is empty")
        if self._dataset is None:
            return self._draw(batch_size, generator)
        if batch_size % 2:
            raise ValueError(f"batch_size: expected an even number for balanced sampling, got {batch_size}")
        offline = self._dataset.sample(batch_size // 2, generator)
        online = self._draw(batch_size // 2, generator)
        return {key: torch.cat((offline[key], online[key])) for key in KEYS}

    def _draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        device = self._ring["rewards"].device
        index = torch.randint(len(self), (count,), generator=generator, device=device)
        return {key: ring.index_select(0, index) for key, ring in self._ring.items()}

    def rows(self, start: int, stop: int) -> dict[str, Tensor]:
        """Online transitions `start` to `stop` - 1 of those added, on the CPU, each tensor [stop - start, ...].

        Raises:
            ValueError: not added yet, or overwritten.
        """
        if not max(self.added - self.capacity, 0) <= start <= stop <= self.added:
            raise ValueError(f"rows: {start} to {stop} are not among the last {self.capacity} of {self.added}")
        index = (self._first + torch.arange(start, stop)) % self.capacity
        return {key: ring.index_select(0, index.to(ring.device)).cpu() for key, ring in self._ring.items()}

    def put(self, start: int, rows: Mapping[str, Tensor]) -> None:
        """Takes back what `rows(start, ...)` gave: the transitions from `start` on are these, and the last ones."""
        count = len(rows["rewards"])
        index = (self._first + start + torch.arange(count)) % self.capacity
        for key, ring in self._ring.items():
            ring[index.to(ring.device)] = rows[key].to(ring.device)
        self.added = start + count

    def shapes(self) -> dict[str, list[int]]:
        """Shape of one transition, by key."""
        return {key: list(ring.shape[1:]) for key, ring in self._ring.items()}


class ReplayFiles:
    """The online transitions of a run on the disk.

    Args:
        folder: of the files.

    Attributes:
        saved: transitions that the newest checkpoint can count on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved = 0

    def save(self, buffer: ReplayBuffer) -> None:
        """Writes what came in since the last file, atomically.

        Raises:
            UserError: the disk is full, or the file cannot be written.
        """
        # What has been overwritten in the meantime is not missed: nothing would read it.
        start = max(self.saved, buffer.added - buffer.capacity)
        if start == buffer.added:
            return
        for other in self._spans():
            if other[0] >= self.saved:
                # From after the checkpoint that this run went on from: those transitions have come in anew.
                self._path(*other).unlink()
        save_tensors(self._path(start, buffer.added), buffer.rows(start, buffer.added), _FORMAT)
        self.saved = buffer.added

    def load(self, buffer: ReplayBuffer, added: int) -> None:
        """Fills a new buffer with the first `added` online transitions, as far as it still held them.

        Raises:
            UserError: files are missing, damaged, or of another task.
        """
        oldest = max(added - buffer.capacity, 0)
        reached = oldest
        for start, stop in self._spans():
            if stop <= oldest or start >= added:
                continue
            if start > reached or stop > added:
                break
            buffer.put(start, self._read(start, stop, buffer))
            reached = stop
        if reached < added:
            raise UserError(
                f"{self.folder}: expected the online transitions {oldest:,} to {added:,} of the replay buffer, and "
                f"those from {reached:,} on are missing; the run cannot go on without its buffer"
            )
        self.saved = added

    def _spans(self) -> list[tuple[int, int]]:
        names = [_NAME.fullmatch(file.name) for file in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted((int(name[1]), int(name[2])) for name in names if name)

    def _path(self, start: int, stop: int) -> Path:
        return self.folder / f"rows_{start:012d}_{stop:012d}.safetensors"

    def _read(self, start: int, stop: int, buffer: ReplayBuffer) -> dict[str, Tensor]:
        try:
            import safetensors
        except ImportError as error:
            raise missing_extra("rl", "safetensors") from error
        path = self._path(start, stop)
        expected = {key: [stop - start, *shape] for key, shape in buffer.shapes().items()}
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged or not of a replay buffer ({error})") from error
        if any(metadata.get(name) != value for name, value in _FORMAT.items()):
            raise UserError(f"{path}: expected {_FORMAT['format']} version {_FORMAT['version']}, got {metadata}")
        found = {name: list(tensor.shape) for name, tensor in rows.items()}
        if found != expected or any(not tensor.isfinite().all() for tensor in rows.values()):
            raise UserError(f"{path} does not fit this run: expected finite rows {expected}, got {found}")
        return rows
