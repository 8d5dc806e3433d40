"""Offline RL on OGBench's tasks: the data that an agent is trained on, and episodes in the simulator as its test."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastflow.data import load_dataset
from fastflow.envs import check_name
from fastflow.errors import MissingExtra, UserError
from fastflow.evaluate import Policy, Rollouts
from fastflow.record import absolute, mean_and_std, quote, spread, tensor_fingerprint
from fastflow.settings import AgentConfig, LoopSettings
from fastflow.task import Task

__all__ = ["OfflineTask", "TrainSettings"]

_SAMPLES = 64


@dataclasses.dataclass(frozen=True)
class TrainSettings(LoopSettings[AgentConfig]):
    """Trains an agent on an offline dataset and leaves a run folder (config.json, train.csv, eval.csv, checkpoints).

    The task is an OGBench singletask name (cube-single-play-singletask-v0, ...) or one of fastflow's pointmaze-arena-*.
    Ctrl-C saves a checkpoint and prints the command that goes on from it, bit for bit.
    """

    eval_episodes: int = 50
    """Episodes per evaluation."""
    eval_envs: int = 10
    """Environments that step together during an evaluation."""
    dataset_dir: Path | None = None
    """Folder with OGBench's dataset files; by default OGBench's own, ~/.ogbench/data."""
    dataset_path: Path | None = None
    """One dataset file instead. One by `fastflow relabel` needs no simulator; without it, evaluation is skipped."""
    observation_scale: float = 0.0
    """If not 0, the networks see this number times (observation - mean) / std of the dataset."""

    fixed: ClassVar[tuple[str, ...]] = (*LoopSettings.fixed, "observation_scale")
    least: ClassVar[Mapping[str, int]] = {**LoopSettings.least, "eval_episodes": 1, "eval_envs": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.observation_scale < float("inf"):
            raise ValueError(f"observation_scale: expected a finite number of at least 0, got {self.observation_scale}")


class OfflineTask(Task):
    """What the training loop asks of a task, for a dataset and its environment.

    Args:
        settings: of the run.
        device: where batches are made.
        arguments: of the agent as a checkpoint holds them; None computes them from the data.
        path: the run folder, for messages. out: called with lines of text.

    Attributes:
        facts: about the data, for config.json; `fingerprint` tells one dataset from another.
        arguments: what the agent is made with besides its configuration, as JSON values.

    Raises:
        UserError: an unknown task, missing or damaged data, data of another task.
    """

    def __init__(
        self,
        settings: TrainSettings[Any],
        device: torch.device,
        arguments: dict[str, Any] | None,
        path: Path,
        out: Callable[[str], None],
    ) -> None:
        self.settings = settings
        try:
            self.data, self.validation = load_dataset(
                settings.env, dataset_dir=settings.dataset_dir, dataset_path=settings.dataset_path, device=device
            )
        except (OSError, ValueError) as error:
            raise UserError(f"dataset of {settings.env}: {error}") from error
        self.facts = self._facts()
        if keys := getattr(settings.agent, "further_keys", ()):
            self.data = self.data.with_behaviour(keys, settings.agent.discount)
            if self.validation is not None:
                self.validation = self.validation.with_behaviour(keys, settings.agent.discount)
        self.arguments = self._arguments() if arguments is None else arguments
        self.rollouts = self._make_rollouts(path, out)

    @staticmethod
    def check_name(name: str) -> None:
        """Raises UserError for an unknown task."""
        check_name(name)

    def _facts(self) -> dict[str, Any]:
        data, settings = self.data, self.settings
        rewards = data.tensors["rewards"]
        return {
            "name": data.name,
            "path": absolute(settings.dataset_path or settings.dataset_dir),
            "rows": len(data),
            "validation_rows": 0 if self.validation is None else len(self.validation),
            "bytes": data.nbytes,
            "obs_dim": data.obs_dim,
            "action_dim": data.action_dim,
            "reward_min": float(rewards.min()),
            "reward_max": float(rewards.max()),
            "reward_mean": float(rewards.double().mean()),
            "fingerprint": tensor_fingerprint(data.tensors),
        }

    def _arguments(self) -> dict[str, Any]:
        data, scale = self.data, self.settings.observation_scale
        rewards = data.tensors["rewards"]
        statistics = None
        if scale:
            mean, std = mean_and_std(data.tensors["observations"])
            statistics = [mean, (torch.tensor(std) / scale).tolist()]
        return {
            "obs_dim": data.obs_dim,
            "action_dim": data.action_dim,
            "reward_range": [float(rewards.min()), float(rewards.max())],
            "observation_statistics": statistics,
        }

    def _make_rollouts(self, path: Path, out: Callable[[str], None]) -> Rollouts | None:
        settings = self.settings
        if not settings.eval_interval:
            return None
        try:
            rollouts = Rollouts(settings.env, min(settings.eval_envs, settings.eval_episodes))
        except MissingExtra as error:
            out(f"evaluation is skipped: {error}. Where there is a simulator: fastflow evaluate {quote(path)}")
            return None
        dims = (self.data.obs_dim, self.data.action_dim)
        if dims != (rollouts.obs_dim, rollouts.action_dim):
            raise UserError(
                f"the dataset has {dims[0]} observations and {dims[1]} actions per row, but {settings.env} has "
                f"{rollouts.obs_dim} and {rollouts.action_dim}: is it the dataset of another task?"
            )
        return rollouts

    @property
    def evaluates(self) -> bool:
        """Whether there is a simulator."""
        return self.rollouts is not None

    def sample(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A batch for the agent's `update`."""
        return self.data.sample(batch_size, generator)

    def sample_validation(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor] | None:
        """A batch for the agent's `validate`; None if there are no such data."""
        return None if self.validation is None else self.validation.sample(batch_size, generator)

    def samples(self) -> dict[str, Tensor]:
        """A few rows for figures."""
        rows = spread(len(self.data), _SAMPLES).to(self.data.device)
        return {name: self.data.tensors[name][rows] for name in ("observations", "actions")}

    def evaluate(self, agent: Policy, seed: int, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        """Metrics of `eval_episodes` episodes; None if `should_stop` said so."""
        assert self.rollouts is not None
        episodes = self.rollouts.run(agent, episodes=self.settings.eval_episodes, seed=seed, should_stop=should_stop)
        return None if episodes is None else episodes.metrics() | {"episodes": self.settings.eval_episodes}

    def describe(self, metrics: dict[str, float]) -> str:
        """An evaluation in words."""
        return (
            f"success {metrics['success']:.2f} over {metrics['episodes']:.0f} episodes, "
            f"return {metrics['episode.return']:.1f}, length {metrics['episode.length']:.1f}"
        )

    def close(self) -> None:
        """Closes the environments."""
        if self.rollouts is not None:
            self.rollouts.close()
