"""On-policy RL: an agent that learns from what it does in many environments at once, and episodes as its test."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastflow.agents.on_policy import OnPolicyConfig
from fastflow.errors import UserError
from fastflow.evaluate import Episodes, Rollouts, check_video, summary
from fastflow.info import versions
from fastflow.online_envs import OnlineEnvs, check_name, make_envs, make_single
from fastflow.online_envs.interaction import Interaction
from fastflow.record import Run, load_agent, write_json
from fastflow.settings import LoopSettings
from fastflow.task import Task
from fastflow.video import film

__all__ = ["OnlineSettings", "OnlineTask", "evaluate_runs"]

Noise = Literal["both", "zero", "random"]
OnPolicy = TypeVar("OnPolicy", bound=OnPolicyConfig)


@dataclasses.dataclass(frozen=True)
class OnlineSettings(LoopSettings[OnPolicy]):
    """Trains an agent on what it does in gymnasium environments, and leaves a run folder (config.json, train.csv,
    eval.csv, checkpoints). Steps are steps of the environments, over all of them.

    The env is a gymnasium id (Hopper-v5, ...), one of OGBench's (online-ant-v0, pointmaze-medium-singletask-v0, ...),
    dmc-DOMAIN-TASK, gridworld-MAP or bandit-two-modes. Ctrl-C saves a checkpoint and prints the command that goes on
    from it: bit for bit, where the environments can be saved too. --seeds 0 1 2 (and --jobs 2) trains several runs and
    prints their interquartile mean.
    """

    steps: int = 1_000_000
    """Environment steps in all; whole rollouts of num_envs times agent.rollout-steps are made of them."""
    log_interval: int = 10_000
    """Environment steps between rows of train.csv, each the mean over its interval; at least a rollout."""
    eval_interval: int = 50_000
    """Environment steps between evaluations, which also take place before the first update and after the last; 0 is
    never."""
    save_interval: int = 0
    """Environment steps between checkpoints, besides the one at the end; 0 is only at the end."""
    threads: int = 1
    """Threads of torch on the CPU; 0 leaves torch's choice."""
    num_envs: int = 16
    """Environments that step together."""
    asynchronous: bool = False
    """Step every environment in a process of its own. Pays where a step takes longer than a millisecond."""
    eval_episodes: int = 10
    """Episodes per evaluation, for each kind of noise."""
    eval_envs: int = 10
    """Environments that step together during an evaluation."""
    eval_noise: Noise = "both"
    """Evaluate without noise (a flow from zero, a Gaussian's mean), with it (episode.return.random), or both."""

    fixed: ClassVar[tuple[str, ...]] = (*LoopSettings.fixed, "num_envs")
    scores: ClassVar[Mapping[str, str]] = {"evaluation/episode.return": "return"}
    least: ClassVar[Mapping[str, int]] = {
        **LoopSettings.least,
        "num_envs": 1,
        "eval_episodes": 1,
        "eval_envs": 1,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_noise not in ("both", "zero", "random"):
            raise ValueError(f"eval_noise: expected both, zero or random, got {self.eval_noise!r}")
        rows = self.stride
        if self.agent.num_minibatches > rows:
            raise ValueError(
                f"agent.num_minibatches: expected at most the {rows} rows of a rollout ({self.num_envs} environments x "
                f"{self.agent.rollout_steps} steps), got {self.agent.num_minibatches}"
            )

    def whole(self) -> OnlineSettings[OnPolicy]:
        """In whole rollouts, after which alone the loop looks at its step: each number of steps rounded down to a
        multiple, at least one rollout."""
        names = ("steps", "log_interval", "eval_interval", "save_interval")
        given = {name: getattr(self, name) for name in names}
        rounded = {name: max(n // self.stride, 1) * self.stride for name, n in given.items() if n}
        return dataclasses.replace(self, **rounded)

    @property
    def stride(self) -> int:
        """Environment steps of one rollout."""
        return self.num_envs * int(self.agent.rollout_steps)


class OnlineTask(Task):
    """N environments that an on-policy agent acts in; see `fastflow.task.Task`.

    Attributes:
        envs: the environments.

    Raises:
        UserError: an unknown environment, one whose observations or actions are no vectors, a missing simulator.
    """

    step_is = "environment step"
    steps_are = "environment steps"

    def __init__(
        self,
        settings: OnlineSettings[Any],
        device: torch.device,
        arguments: dict[str, Any] | None,
        path: Path,
        out: Callable[[str], None],
    ) -> None:
        self.settings, self.device, self.out = settings, device, out
        self.stride = settings.stride
        self.envs: OnlineEnvs = make_envs(settings.env, settings.num_envs, asynchronous=settings.asynchronous)
        envs = self.envs
        self.arguments = {
            "obs_dim": envs.obs_dim,
            "action_dim": envs.action_dim,
            "action_low": envs.low.tolist(),
            "action_high": envs.high.tolist(),
            "num_envs": envs.num_envs,
        }
        self.facts = {
            "name": settings.env,
            "path": None,
            "rows": settings.steps,
            "autoreset": "same step",
            **self.arguments,
            "fingerprint": f"{settings.env} {envs.obs_dim} {envs.action_dim} {envs.num_envs}",
        }
        self._interaction = Interaction(envs, settings.seed)
        self._seconds = {"env": 0.0, "sampling": 0.0}
        self._told = {"env": 0.0, "sampling": 0.0, "update": 0.0}
        self._warned = False
        self._rollouts: Rollouts | None = None
        self._agent: Any = None

    @staticmethod
    def check_name(name: str) -> None:
        """Raises UserError for an unknown environment."""
        check_name(name)

    @property
    def evaluates(self) -> bool:
        """There is always a simulator."""
        return True

    def bind(self, agent: Any) -> None:
        """The agent that acts."""
        self._agent = agent

    def describe_data(self) -> str:
        """How many environments of what."""
        envs = self.envs
        number = "1 environment" if envs.num_envs == 1 else f"{envs.num_envs:,} environments"
        return f"{number} of {envs.name}: {envs.obs_dim} observations, {envs.action_dim} actions"

    # Rollouts -------------------------------------------------------------------------------------------------------

    def sample(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A rollout of `batch_size` steps of every environment, for the agent's `update`.

        Raises:
            UserError: an environment raised, or the policy's action is not finite.
        """
        agent, clock = self._agent, time.perf_counter
        kept: dict[str, list[Tensor]] = {}
        steps = []
        for _ in range(batch_size):
            began = clock()
            obs = torch.from_numpy(self._interaction.obs).to(self.device)
            actions, extras = agent.explore(obs, generator)
            for name, value in {"observations": obs, "actions": actions, **extras}.items():
                kept.setdefault(name, []).append(value)
            in_bounds = agent.to_env(actions).cpu().numpy()
            acted = clock()
            step = self._interaction.step(in_bounds)
            if step.invalid.any():
                self._warn(np.flatnonzero(step.invalid))
            steps.append((step.final_obs, step.rewards, step.terminated, step.truncated))
            self._seconds["env"] += clock() - acted
            self._seconds["sampling"] += acted - began
        names = ("next_observations", "rewards", "terminated", "truncated")
        rollout = {name: torch.stack(values) for name, values in kept.items()}
        for name, values in zip(names, zip(*steps, strict=True), strict=True):
            rollout[name] = torch.from_numpy(np.stack(values)).to(self.device)
        return rollout

    def _warn(self, which: np.ndarray) -> None:
        """Says once that the simulation gives numbers that are not finite; rollout/invalid counts."""
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"{self.envs.name}: environment {which[0]} gave a reward or an observation that is not finite; such "
            "episodes end there, and rollout/invalid in train.csv counts them",
            stacklevel=3,
        )

    def report(self) -> dict[str, float]:
        """Episodes that ended since the last call, and seconds by what they were spent on."""
        seconds = {**self._seconds, "update": self._agent.update_seconds}
        row = self._interaction.tell() | {f"time/{name}": value - self._told[name] for name, value in seconds.items()}
        self._told = seconds
        return row

    def samples(self) -> dict[str, Tensor]:
        """The first observations."""
        return {"observations": torch.from_numpy(self._interaction.obs[:64].copy())}

    # Evaluation -----------------------------------------------------------------------------------------------------

    def evaluate(self, agent: Any, seed: int, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        """Metrics of `eval_episodes` episodes without noise and, as `episode.return.random` and so on, with it."""
        settings = self.settings
        if self._rollouts is None:
            self._rollouts = Rollouts(settings.env, min(settings.eval_envs, settings.eval_episodes), make_single)
        found = play(
            self._rollouts, agent, settings.eval_noise, episodes=settings.eval_episodes, seed=seed, stop=should_stop
        )
        return None if found is None else metrics_of(found) | {"episodes": settings.eval_episodes}

    def describe(self, metrics: dict[str, float]) -> str:
        """An evaluation in words."""
        parts = [f"return {metrics['episode.return']:.1f}"]
        if "episode.return.random" in metrics:
            parts.append(f"{metrics['episode.return.random']:.1f} with noise")
        if "success" in metrics:
            parts.append(f"success {metrics['success']:.2f}")
        parts.append(f"length {metrics['episode.length']:.1f}")
        return f"{', '.join(parts)} over {metrics['episodes']:.0f} episodes"

    # State ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Environments, where they can be saved, and the episodes under way."""
        return self._interaction.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor], step: int) -> None:
        """Takes up the episodes under way; begins new ones where the environments could not be saved, and says so."""
        # Not those that the run began with.
        seed = int(np.random.SeedSequence([self.settings.seed, 1]).generate_state(1)[0])
        if not self._interaction.load_state_dict(state, seed):
            self.out(
                f"{self.envs.name}: the environments were not saved; their episodes under way begin anew, so the run "
                "does not go on bit for bit"
            )

    def close(self) -> None:
        """Closes the environments."""
        self.envs.close()
        if self._rollouts is not None:
            self._rollouts.close()


# --- evaluation -------------------------------------------------------------------------------------------------------


class _Acting:
    """An agent with or without noise, as `Rollouts` asks for actions."""

    def __init__(self, agent: Any, deterministic: bool) -> None:
        self.agent, self.deterministic, self.device = agent, deterministic, agent.device

    def act(self, observations: Tensor, generator: torch.Generator | None = None) -> Tensor:
        action: Tensor = self.agent.act(observations, generator, deterministic=self.deterministic)
        return action


def play(
    rollouts: Rollouts,
    agent: Any,
    noise: Noise,
    *,
    episodes: int,
    seed: int,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Episodes] | None:
    """Episodes by kind of noise ("zero", "random"), from the same start states; None if `stop` said so."""
    found = {}
    for kind in ("zero", "random") if noise == "both" else (noise,):
        played = rollouts.run(_Acting(agent, kind == "zero"), episodes=episodes, seed=seed, should_stop=stop)
        if played is None:
            return None
        found[kind] = played
    return found


def metrics_of(found: Mapping[str, Episodes]) -> dict[str, float]:
    """Metrics by name; those of random noise end in `.random` where both kinds were played."""
    row: dict[str, float] = {}
    for kind, played in found.items():
        suffix = ".random" if kind == "random" and len(found) > 1 else ""
        row |= {f"{name}{suffix}": value for name, value in played.metrics().items()}
    return row


def evaluate_runs(
    paths: Sequence[str | Path],
    *,
    episodes: int = 50,
    seed: int = 0,
    num_envs: int = 10,
    checkpoint: int | None = None,
    all_checkpoints: bool = False,
    device: str = "auto",
    video: Path | None = None,
) -> list[dict[str, Any]]:
    """Plays saved policies without and with noise and prints a table; what `fastflow evaluate` does with such runs.

    Args:
        paths: run folders. episodes: of each kind of noise. seed: of start states and noise. num_envs: that step
            together. checkpoint, all_checkpoints, device, video: as for other agents; the video is without noise.

    Returns:
        One record per evaluated checkpoint, as written to RUN/evaluations/.

    Raises:
        UserError: not a run folder, no such checkpoint, a damaged one, no simulator.
    """
    if not paths:
        raise UserError("evaluate: expected at least one run folder")
    if checkpoint is not None and all_checkpoints:
        raise UserError("evaluate: expected either --checkpoint or --all-checkpoints, got both")
    if video is not None:
        check_video(video, len(paths), all_checkpoints)
    records = []
    print(f"{'return':>10} {'with noise':>10} {'length':>8} {'step':>11}  run")
    for run in map(Run.open, paths):
        if video is not None:
            film(
                _Acting(load_agent(run, checkpoint, device)[0], True), run.config["env"], video, make_single, seed=seed
            )
            print(f"video: {video}")
        rollouts = Rollouts(run.config["env"], min(num_envs, episodes), make_single)
        try:
            for step in (run.checkpoint_steps() if all_checkpoints else [checkpoint]) or [None]:
                agent, saved = load_agent(run, step, device)
                found = play(rollouts, agent, "both", episodes=episodes, seed=seed)
                assert found is not None
                metrics = metrics_of(found)
                print(
                    f"{metrics['episode.return']:10.1f} {metrics['episode.return.random']:10.1f} "
                    f"{metrics['episode.length']:8.1f} {saved.step:11d}  {run.path}"
                )
                record = {"run": str(run.path), "agent": run.config["agent_name"], "env": run.config["env"]}
                record |= {"step": saved.step, "seed": seed, **metrics}
                each = {
                    kind: {"returns": e.returns.tolist(), "lengths": e.lengths.tolist()} for kind, e in found.items()
                }
                record |= {"episodes": episodes, "each": each, "versions": versions()}
                write_json(run.path / "evaluations" / f"step_{saved.step:08d}_seed{seed}.json", record)
                records.append(record)
        finally:
            rollouts.close()
    if len(paths) > 1 and not all_checkpoints:
        print(summary(records, "episode.return"))
    return records
