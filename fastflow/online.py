"""On-policy RL: an agent that learns from what it does in many environments at once, and episodes as its test."""

from __future__ import annotations

import dataclasses
import math
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
from fastflow.evaluate import Episodes, Rollouts
from fastflow.info import versions
from fastflow.online_envs import OnlineEnvs, check_name, make_envs, make_single
from fastflow.record import Run, load_agent, write_json
from fastflow.settings import LoopSettings
from fastflow.task import Task

__all__ = ["OnlineSettings", "OnlineTask", "evaluate_runs"]

Noise = Literal["both", "zero", "random"]
OnPolicy = TypeVar("OnPolicy", bound=OnPolicyConfig)


@dataclasses.dataclass(frozen=True)
class OnlineSettings(LoopSettings[OnPolicy]):
    """Trains an agent on what it does in gymnasium environments, and leaves a run folder (config.json, train.csv,
    eval.csv, checkpoints). Steps are steps of the environments, over all of them.

    The env is a gymnasium id (Hopper-v5, ...), one of OGBench's (online-ant-v0, pointmaze-medium-singletask-v0, ...),
    dmc-DOMAIN-TASK, gridworld-MAP or bandit-two-modes. Ctrl-C saves a checkpoint and prints the command that goes on
    from it: bit for bit, where the environments can be saved too.
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
    """Threads on the CPU, of torch and of environments that step in this process; 0 leaves torch's choice."""
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


class _Episodes:
    """What the environments' episodes came to: those under way, and those that ended since they were last told."""

    def __init__(self, num_envs: int) -> None:
        self.returns = np.zeros(num_envs)
        self.lengths = np.zeros(num_envs, dtype=np.int64)
        self.ended: list[tuple[float, float, float]] = []
        self.invalid = 0

    def add(self, rewards: np.ndarray, ended: np.ndarray, success: np.ndarray, invalid: np.ndarray) -> None:
        self.returns += rewards
        self.lengths += 1
        self.invalid += int(invalid.sum())
        for i in np.flatnonzero(ended):
            self.ended.append((float(self.returns[i]), float(self.lengths[i]), float(success[i])))
            self.returns[i] = self.lengths[i] = 0

    def tell(self) -> dict[str, float]:
        """Means over the episodes that ended since the last call."""
        row: dict[str, float] = {"rollout/episodes": float(len(self.ended)), "rollout/invalid": float(self.invalid)}
        if self.ended:
            returns, lengths, success = np.array(self.ended).T
            row |= {"rollout/episode.return": float(returns.mean()), "rollout/episode.length": float(lengths.mean())}
            if not np.isnan(success).any():
                row["rollout/success"] = float(success.mean())
        self.ended.clear()
        self.invalid = 0
        return row

    def tensors(self) -> dict[str, Tensor]:
        """All of it, for a checkpoint; an unknown success is -1 there, because checkpoints hold finite numbers."""
        ended = np.array(self.ended, dtype=np.float64).reshape(-1, 3)
        return {
            "returns": torch.from_numpy(self.returns.copy()),
            "lengths": torch.from_numpy(self.lengths.copy()),
            "ended": torch.from_numpy(np.where(np.isnan(ended), -1.0, ended)) if len(ended) else torch.zeros(0, 3),
            "invalid": torch.tensor(self.invalid),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `tensors` gave."""
        self.returns[:] = state["returns"].numpy()
        self.lengths[:] = state["lengths"].numpy()
        rows = state["ended"].tolist()
        self.ended = [(returns, length, math.nan if success < 0 else success) for returns, length, success in rows]
        self.invalid = int(state["invalid"])


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
        self.envs: OnlineEnvs = make_envs(
            settings.env,
            settings.num_envs,
            asynchronous=settings.asynchronous,
            threads=settings.threads or torch.get_num_threads(),
        )
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
        self._obs = envs.reset(settings.seed)
        self._episodes = _Episodes(envs.num_envs)
        self._seconds = {"env": 0.0, "sampling": 0.0}
        self._told = {"env": 0.0, "sampling": 0.0, "update": 0.0}
        self._failed = False
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
        agent, envs, clock = self._agent, self.envs, time.perf_counter
        kept: dict[str, list[Tensor]] = {}
        steps = []
        for _ in range(batch_size):
            began = clock()
            obs = torch.from_numpy(self._obs).to(self.device)
            actions, extras = agent.explore(obs, generator)
            for name, value in {"observations": obs, "actions": actions, **extras}.items():
                kept.setdefault(name, []).append(value)
            in_bounds = agent.to_env(actions).cpu().numpy()
            acted = clock()
            self._check_actions(in_bounds)
            try:
                step = envs.step(in_bounds)
            except UserError:
                self._failed = True
                raise
            self._obs = step.obs
            ended = step.terminated | step.truncated
            self._episodes.add(step.rewards, ended, step.success, step.invalid)
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

    def _check_actions(self, actions: np.ndarray) -> None:
        finite = np.isfinite(actions).all(-1)
        if not finite.all():
            i = int(np.flatnonzero(~finite)[0])
            raise UserError(
                f"the policy's action is not finite, {actions[i].tolist()} in environment {i} of {self.envs.name} at "
                f"step {int(self._episodes.lengths[i])} of its episode: the policy has diverged. A smaller learning "
                "rate may help (--agent.lr)"
            )

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
        row = self._episodes.tell() | {f"time/{name}": value - self._told[name] for name, value in seconds.items()}
        self._told = seconds
        return row

    def samples(self) -> dict[str, Tensor]:
        """The first observations."""
        return {"observations": torch.from_numpy(self._obs[:64].copy())}

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
        # After a failure there is nothing to be saved of environments that are closed.
        snapshot = None if self._failed else self.envs.snapshot()
        if snapshot is None:
            return {}
        state = {f"envs/{name}": torch.from_numpy(_signed(array)) for name, array in snapshot.items()}
        return state | self._episodes.tensors()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes up the episodes under way; begins new ones where the environments could not be saved, and says so."""
        if not state:
            self.out(
                f"{self.envs.name}: the environments were not saved; their episodes under way begin anew, so the run "
                "does not go on bit for bit"
            )
            # Not those that the run began with.
            self._obs = self.envs.reset(int(np.random.SeedSequence([self.settings.seed, 1]).generate_state(1)[0]))
            return
        expected = self.envs.snapshot()
        assert expected is not None
        arrays = {
            name.removeprefix("envs/"): value.numpy() for name, value in state.items() if name.startswith("envs/")
        }
        self._obs = self.envs.restore(
            {name: array.view(expected[name].dtype) if name in expected else array for name, array in arrays.items()}
        )
        self._episodes.load(state)

    def close(self) -> None:
        """Closes the environments."""
        self.envs.close()
        if self._rollouts is not None:
            self._rollouts.close()


def _signed(array: np.ndarray) -> np.ndarray:
    """An array of a dtype that every version of torch and safetensors knows, same bits; contiguous."""
    array = np.array(array, order="C")
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        return array.view(f"i{array.dtype.itemsize}")
    return array


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
) -> list[dict[str, Any]]:
    """Plays saved policies without and with noise and prints a table; what `fastflow evaluate` does with such runs.

    Args:
        paths: run folders. episodes: of each kind of noise. seed: of start states and noise. num_envs: that step
            together. checkpoint, all_checkpoints, device: as for other agents.

    Returns:
        One record per evaluated checkpoint, as written to RUN/evaluations/.

    Raises:
        UserError: not a run folder, no such checkpoint, a damaged one, no simulator.
    """
    if not paths:
        raise UserError("evaluate: expected at least one run folder")
    if checkpoint is not None and all_checkpoints:
        raise UserError("evaluate: expected either --checkpoint or --all-checkpoints, got both")
    records = []
    print(f"{'return':>10} {'with noise':>10} {'length':>8} {'step':>11}  run")
    for run in map(Run.open, paths):
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
                record = {"run": str(run.path), "env": run.config["env"], "step": saved.step, "seed": seed, **metrics}
                each = {
                    kind: {"returns": e.returns.tolist(), "lengths": e.lengths.tolist()} for kind, e in found.items()
                }
                record |= {"episodes": episodes, "each": each, "versions": versions()}
                write_json(run.path / "evaluations" / f"step_{saved.step:08d}_seed{seed}.json", record)
                records.append(record)
        finally:
            rollouts.close()
    return records
