"""Offline RL on OGBench's tasks, and online fine-tuning after it: the data that an agent is trained on, and episodes in
the simulator as its test."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastflow.data import load_dataset
from fastflow.envs import check_name
from fastflow.errors import MissingExtra, UserError
from fastflow.evaluate import Policy, Rollouts
from fastflow.finetuning import FineTuning
from fastflow.record import absolute, mean_and_std, quote, spread, tensor_fingerprint
from fastflow.settings import AgentConfig, LoopSettings
from fastflow.task import Task

__all__ = ["OfflineTask", "TrainSettings"]

_SAMPLES = 64


@dataclasses.dataclass(frozen=True)
class TrainSettings(LoopSettings[AgentConfig]):
    """Trains an agent on an offline dataset and leaves a run folder (config.json, train.csv, eval.csv, checkpoints).

    The task is an OGBench singletask name (cube-single-play-singletask-v0, ...) or one of fastflow's pointmaze-arena-*.
    Ctrl-C saves a checkpoint and prints the command that goes on from it, bit for bit. With --online-steps the agent
    goes on learning from what it does; a step of the run is an update before that and an environment step then.
    --seeds 0 1 2 (and --jobs 2) trains several runs and prints their interquartile mean.
    """

    online_steps: int = 0
    """Environment steps after `steps` updates on the dataset, each followed by utd_ratio updates. A finished run takes
    them up by --resume RUN --online-steps N."""
    utd_ratio: int = 1
    """Updates to data: updates per environment step online, 1 as published; 1 to 128 in studies of it."""
    balanced_sampling: bool = False
    """Draw one half of every online batch from the dataset and one from what came in online. Otherwise, as published,
    there is one buffer that begins with the dataset."""
    buffer_size: int = 2_000_000
    """Rows of the replay buffer, the dataset's included unless balanced; at least one more than the dataset has. When
    it is full, the oldest are overwritten."""
    reward_range: tuple[float, float] | None = None
    """Rewards to make the critic's range of values for; by default those of the dataset. It always contains 0. Rewards
    outside are used, counted and warned of."""

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

    fixed: ClassVar[tuple[str, ...]] = (*LoopSettings.fixed, "observation_scale", "reward_range")
    least: ClassVar[Mapping[str, int]] = {
        **LoopSettings.least,
        "online_steps": 0,
        "utd_ratio": 1,
        "buffer_size": 1,
        "eval_episodes": 1,
        "eval_envs": 1,
    }
    scores: ClassVar[Mapping[str, str]] = {
        "evaluation/success": "success",
        "evaluation/episode.return": "return",
    }

    @property
    def last_step(self) -> int:
        """Where a run ends."""
        return self.steps + self.online_steps

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.observation_scale < float("inf"):
            raise ValueError(f"observation_scale: expected a finite number of at least 0, got {self.observation_scale}")
        agent: Any = self.agent
        if self.balanced_sampling and agent.batch_size % 2:
            raise ValueError(
                f"balanced_sampling: expected an even agent.batch_size, for two halves, got {agent.batch_size}"
            )
        if self.reward_range is not None:
            low, high = self.reward_range
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise ValueError(f"reward_range: expected two finite numbers, the lower one first, got {low} {high}")


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
        keys = getattr(settings.agent, "further_keys", ())
        if keys and settings.online_steps:
            raise UserError(
                f"online_steps: this {type(settings.agent).__name__} learns from {' and '.join(keys)} of the dataset, "
                "which are not known while an episode goes on; expected 0"
            )
        try:
            self.data, self.validation = load_dataset(
                settings.env, dataset_dir=settings.dataset_dir, dataset_path=settings.dataset_path, device=device
            )
        except (OSError, ValueError) as error:
            raise UserError(f"dataset of {settings.env}: {error}") from error
        self.facts = self._facts()
        if keys:
            self.data = self.data.with_behaviour(keys, settings.agent.discount)
            if self.validation is not None:
                self.validation = self.validation.with_behaviour(keys, settings.agent.discount)
        self.arguments = self._arguments() if arguments is None else arguments
        self._say_rewards(out)
        self._agent: Any = None
        self.online: FineTuning | None = None
        if settings.online_steps:
            self.step_is, self.steps_are = "step", "steps"
            self.online = FineTuning(settings, self.data, self._reward_range(), path, out)
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
            "successes": int((data.tensors["masks"] == 0).sum()),
            "fingerprint": tensor_fingerprint(data.tensors),
        }

    def _arguments(self) -> dict[str, Any]:
        data, scale, declared = self.data, self.settings.observation_scale, self.settings.reward_range
        rewards = data.tensors["rewards"]
        statistics = None
        if scale:
            mean, std = mean_and_std(data.tensors["observations"])
            statistics = [mean, (torch.tensor(std) / scale).tolist()]
        return {
            "obs_dim": data.obs_dim,
            "action_dim": data.action_dim,
            "reward_range": list(declared or (float(rewards.min()), float(rewards.max()))),
            "observation_statistics": statistics,
        }

    def _reward_range(self) -> tuple[float, float]:
        """What rewards are expected in: the agent's range, which contains 0."""
        low, high = self.arguments["reward_range"]
        return min(low, 0.0), max(high, 0.0)

    def _say_rewards(self, out: Callable[[str], None]) -> None:
        """What a run had better be told of its data before it begins."""
        low, high = self._reward_range()
        for name, data in (("dataset", self.data), ("validation data", self.validation)):
            if data is None:
                continue
            rewards = data.tensors["rewards"]
            outside = int(((rewards < low) | (rewards > high)).sum())
            if outside:
                out(
                    f"warning: {outside:,} of {len(data):,} rewards of the {name} are outside the range [{low:g}, "
                    f"{high:g}] that the critic's values are made for: they reach from {float(rewards.min()):g} to "
                    f"{float(rewards.max()):g}"
                )
        if not self.facts["successes"]:
            highest = self.facts["reward_max"]
            rows = int((self.data.tensors["rewards"] == highest).sum())
            out(
                f"warning: the dataset has no success: 0 of {len(self.data):,} rows end the task (mask 0); the highest "
                f"reward is {highest:g}, in {rows:,} rows"
            )

    def describe_data(self) -> str:
        """Rows, and how many of them succeed."""
        return f"dataset: {len(self.data):,} rows, {self.facts['successes']:,} of them successes"

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

    def bind(self, agent: Any) -> None:
        """The agent that acts online."""
        self._agent = agent

    def begin_step(self, step: int, generator: torch.Generator) -> int:
        """After the offline updates: a step of the environment, and the number of updates that follow it."""
        if self.online is None or step < self.settings.steps:
            return 1
        self.online.step(self._agent, generator)
        return self.settings.utd_ratio

    def sample(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A batch for the agent's `update`: from the dataset, or online from the replay buffer."""
        buffer = None if self.online is None else self.online.buffer
        return (buffer or self.data).sample(batch_size, generator)

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

    def report(self) -> dict[str, float]:
        """Episodes online."""
        return {} if self.online is None else self.online.report()

    def save(self) -> None:
        """Writes new transitions to the run folder."""
        if self.online is not None:
            self.online.save()

    def state_dict(self) -> dict[str, Tensor]:
        """Of online learning, once it has begun."""
        return {} if self.online is None else self.online.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor], step: int) -> None:
        """Takes up online learning where it was.

        Raises:
            UserError: it began with other settings, or the run is without its replay buffer.
        """
        begun = "online/rules" in state
        if self.online is None:
            if begun:
                raise UserError("online_steps: this run has gone online already, expected at least 1, got 0")
        elif begun:
            self.online.load_state_dict(state)
        elif step > self.settings.steps:
            raise UserError(
                f"the checkpoint is of step {step:,}, which is after the {self.settings.steps:,} offline updates, and "
                f"the run has no replay buffer: to go online from here, pass --steps {step}"
            )

    def close(self) -> None:
        """Closes the environments."""
        if self.online is not None:
            self.online.close()
        if self.rollouts is not None:
            self.rollouts.close()
