"""What an agent is trained on, as the training loop sees it."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Task"]


class Task(abc.ABC):
    """Where batches come from and what an agent is tested on; one kind of task per kind of data.

    Args:
        settings: of the run.
        device: where batches are made.
        arguments: of the agent as a checkpoint holds them; None computes them from the data.
        path: the run folder, for messages. out: called with lines of text.

    Attributes:
        facts: about the data, for config.json; `fingerprint` tells one dataset from another.
        arguments: what the agent is made with besides its configuration, as JSON values.
        stride: by how much an update moves the run's step: 1 where steps are updates.
        step_is, steps_are: what a step is called.
    """

    facts: dict[str, Any]
    arguments: dict[str, Any]
    stride: int = 1
    step_is = "update"
    steps_are = "updates"

    @abc.abstractmethod
    def __init__(
        self,
        settings: Any,
        device: torch.device,
        arguments: dict[str, Any] | None,
        path: Path,
        out: Callable[[str], None],
    ) -> None: ...

    @staticmethod
    @abc.abstractmethod
    def check_name(name: str) -> None:
        """Raises UserError for an unknown task."""

    @property
    @abc.abstractmethod
    def evaluates(self) -> bool:
        """Whether there is something to test on."""

    def bind(self, agent: Any) -> None:  # noqa: B027 - most tasks need none
        """Called once with the agent, before the first batch; a task that has to ask it for actions keeps it."""

    def describe_data(self) -> str:
        """What a run learns from, in a line."""
        return f"dataset: {self.facts['rows']:,} rows"

    def begin_step(self, step: int, generator: torch.Generator) -> int:
        """Called before the updates that follow `step`; returns how many they are."""
        return 1

    @abc.abstractmethod
    def sample(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A batch for the agent's `update`."""

    def sample_validation(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor] | None:
        """A batch for the agent's `validate`; None if no data are held back."""
        return None

    def report(self) -> dict[str, float]:
        """Further numbers for a row of train.csv, since the last call."""
        return {}

    @abc.abstractmethod
    def samples(self) -> dict[str, Tensor]:
        """A few rows for figures."""

    @abc.abstractmethod
    def evaluate(self, agent: Any, seed: int, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        """Metrics of an evaluation; None if `should_stop` said so."""

    @abc.abstractmethod
    def describe(self, metrics: dict[str, float]) -> str:
        """An evaluation in words."""

    def save(self) -> None:  # noqa: B027 - most tasks need none
        """Called before a checkpoint is written, for what is too large to be in it."""

    def state_dict(self) -> dict[str, Tensor]:
        """What the task itself needs to go on, on the CPU."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor], step: int) -> None:  # noqa: B027 - most tasks need none
        """Takes over the state of the checkpoint of `step`; a task without one ignores it."""

    def close(self) -> None:  # noqa: B027 - most tasks need none
        """Closes what is open."""
