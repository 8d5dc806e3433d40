"""Rollouts of a policy in its simulator, and statistics over training seeds.

The protocol of OGBench's offline results: 50 episodes, the stochastic policy as it is, and success read from
`info["success"]` at the last step of an episode.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fastflow.errors import UserError
from fastflow.info import versions
from fastflow.record import Run, load_agent, to_json, write_json

__all__ = ["Episodes", "Rollouts", "bootstrap_interval", "evaluate", "interquartile_mean", "summary"]


class Policy(Protocol):
    """What evaluation needs of an agent."""

    device: torch.device

    def act(self, observations: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Actions [N, A] in [-1, 1] for observations [N, O] on `device`."""
        ...


@dataclasses.dataclass(frozen=True)
class Episodes:
    """Finished episodes, in the order of their numbers.

    Attributes:
        success: 0 or 1 each, [N]; NaN where the environment does not tell.
        returns: undiscounted sums of rewards, [N].
        lengths: environment steps, [N].
        invalid: episodes that ended in a reward or an observation that was not finite.
    """

    success: np.ndarray
    returns: np.ndarray
    lengths: np.ndarray
    invalid: int = 0

    def metrics(self) -> dict[str, float]:
        """Means over episodes under the names of the FQL family."""
        success = float(self.success.mean())
        return {
            **({} if math.isnan(success) else {"success": success}),
            "episode.return": float(self.returns.mean()),
            "episode.length": float(self.lengths.mean()),
            **({"invalid": float(self.invalid)} if self.invalid else {}),
        }


class Rollouts:
    """Environments of one task, made once (manipulation scenes take about a second each) and used for every evaluation.

    Args:
        env_name: name of the task.
        num_envs: environments that step together, so that the policy is asked once per step for all of them.
        make: makes one by its name; by default `fastflow.envs.make_env`.

    Raises:
        ValueError: num_envs < 1.
        UserError: there is no such task, or the simulator is not installed (MissingExtra).
    """

    def __init__(self, env_name: str, num_envs: int = 10, make: Callable[[str], Any] | None = None) -> None:
        if make is None:
            from fastflow.envs import make_env

            make = make_env
        if num_envs < 1:
            raise ValueError(f"num_envs: expected at least 1, got {num_envs}")
        self.env_name = env_name
        self._envs = [make(env_name) for _ in range(num_envs)]

    @property
    def obs_dim(self) -> int:
        """Numbers in an observation."""
        return math.prod(self._envs[0].observation_space.shape or ())

    @property
    def action_dim(self) -> int:
        """Numbers in an action."""
        return math.prod(self._envs[0].action_space.shape or ())

    def run(
        self, agent: Policy, *, episodes: int, seed: int, should_stop: Callable[[], bool] = lambda: False
    ) -> Episodes | None:
        """Plays exactly `episodes` episodes.

        Episodes are numbered beforehand and all of them are finished, so short ones are not favoured. An environment
        that finishes one takes the next number. Environments are reset by hand; there is no automatic reset whose first
        observation could be mistaken for the end of an episode. No random state but the episodes' own is touched.

        Args:
            agent: the policy; its `act` gets observations [num_envs, O] in float32, the same number every step.
            episodes: how many.
            seed: decides resets and the policy's noise; the same seed, agent and number of environments give the same
                result.
            should_stop: asked once per step; if it says yes, the evaluation is abandoned.

        Returns:
            The episodes, or None if abandoned.

        Raises:
            ValueError: episodes < 1.
            UserError: an environment raised; it names the episode and the step.
        """
        if episodes < 1:
            raise ValueError(f"episodes: expected at least 1, got {episodes}")
        envs = self._envs[:episodes]
        seeds = np.random.SeedSequence(seed).generate_state(episodes + 1)
        generator = torch.Generator(agent.device).manual_seed(int(seeds[-1]))
        success, returns, lengths = (np.zeros(episodes) for _ in range(3))
        invalid = 0
        playing: list[int | None] = list(range(len(envs)))
        started = len(envs)
        observations = np.stack([env.reset(seed=int(seeds[i]))[0] for i, env in enumerate(envs)]).astype(np.float32)
        while any(episode is not None for episode in playing):
            if should_stop():
                return None
            with torch.no_grad():
                actions = agent.act(torch.from_numpy(observations).to(agent.device), generator).cpu().numpy()
            for slot, (env, episode) in enumerate(zip(envs, playing, strict=True)):
                if episode is None:
                    continue
                try:
                    observation, reward, terminated, truncated, info = env.step(actions[slot])
                except Exception as error:
                    raise UserError(
                        f"{self.env_name}: the environment raised in evaluation episode {episode} at step "
                        f"{int(lengths[episode])}: {type(error).__name__}: {error}"
                    ) from error
                lengths[episode] += 1
                if not (math.isfinite(reward) and np.isfinite(observation).all()):
                    # A simulation that broke ends the episode instead of poisoning means.
                    observation, reward, terminated = observations[slot], 0.0, True
                    invalid += 1
                returns[episode] += float(reward)
                if terminated or truncated:
                    success[episode] = float(info.get("success", math.nan))
                    playing[slot] = started if started < episodes else None
                    if started < episodes:
                        observation, _ = env.reset(seed=int(seeds[started]))
                        started += 1
                observations[slot] = observation
        return Episodes(success, returns, lengths, invalid)

    def close(self) -> None:
        """Closes the environments."""
        for env in self._envs:
            env.close()


def evaluate(agent: Policy, env_name: str, episodes: int = 50, seed: int = 0, num_envs: int = 10) -> dict[str, float]:
    """Mean success, return and length of `episodes` episodes of `agent` on `env_name` (see `Rollouts`).

    Returns:
        `success` (share of episodes whose last step was successful), `episode.return`, `episode.length`.
    """
    rollouts = Rollouts(env_name, min(num_envs, episodes))
    try:
        finished = rollouts.run(agent, episodes=episodes, seed=seed)
    finally:
        rollouts.close()
    assert finished is not None
    return finished.metrics()


# --- statistics over seeds --------------------------------------------------------------------------------------------


def interquartile_mean(scores: Sequence[float] | np.ndarray) -> float:
    """Mean of the middle half of `scores` [N]: a quarter is cut off at either end, rounded down.

    Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice (arXiv:2108.13264).
    """
    ordered = np.sort(np.asarray(scores, dtype=np.float64).ravel())
    if not len(ordered):
        raise ValueError("scores: expected at least one, got none")
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())


def bootstrap_interval(
    groups: Sequence[Sequence[float]],
    statistic: Callable[[np.ndarray], float] = interquartile_mean,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of `statistic` over all scores, resampling seeds within each task.

    Args:
        groups: one sequence of scores (one per training seed) for each task.
        statistic: from the scores of all tasks, [N], to a number.
        confidence: share of resamples inside the interval.
        resamples: how many; seed: of the resampling.

    Returns:
        Lower and upper end.
    """
    if not groups or not all(len(group) for group in groups):
        raise ValueError("groups: expected at least one score for every task, got none")
    rng = np.random.default_rng(seed)
    draws = [rng.choice(np.asarray(group, dtype=np.float64), (resamples, len(group))) for group in groups]
    values = [statistic(row) for row in np.concatenate(draws, axis=1)]
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(values, [tail, 100.0 - tail])
    return float(low), float(high)


# --- the command ------------------------------------------------------------------------------------------------------


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
    """Evaluates saved checkpoints of one or more runs and prints a table; what `fastflow evaluate` does.

    Each result is written to RUN/evaluations/. A run without an evaluation at that step (trained where there was no
    simulator) also gets it as a row of its eval.csv, which `fastflow plot` draws.

    Args:
        paths: run folders.
        episodes, seed, num_envs: see `Rollouts`.
        checkpoint: step of the checkpoint; None takes the newest.
        all_checkpoints: every checkpoint of the run instead.
        device: "auto", "cpu" or "cuda".
        video: a .gif or .mp4 to write an episode to, of one run and checkpoint (see `fastflow.video.film`).

    Returns:
        One record per evaluated checkpoint, as written.

    Raises:
        UserError: not a run folder, no such checkpoint, a damaged checkpoint, no simulator installed.
    """
    if not paths:
        raise UserError("evaluate: expected at least one run folder")
    if checkpoint is not None and all_checkpoints:
        raise UserError("evaluate: expected either --checkpoint or --all-checkpoints, got both")
    runs = [Run.open(path) for path in paths]
    if video is not None:
        check_video(video, len(runs), all_checkpoints)
    rollouts: dict[str, Rollouts] = {}
    records = []
    print(f"{'success':>8} {'return':>9} {'length':>7} {'episodes':>9} {'step':>9}  run")
    try:
        for run in runs:
            steps: list[int | None] = list(run.checkpoint_steps()) if all_checkpoints else [checkpoint]
            for step in steps or [None]:
                agent, saved = load_agent(run, step, device)
                env_name = run.config["env"]
                if video is not None:
                    from fastflow.envs import make_env
                    from fastflow.video import film

                    film(agent, env_name, video, make_env, seed=seed)
                    print(f"video: {video}")
                if env_name not in rollouts:
                    rollouts[env_name] = Rollouts(env_name, min(num_envs, episodes))
                began = time.perf_counter()
                finished = rollouts[env_name].run(agent, episodes=episodes, seed=seed)
                assert finished is not None
                record = _record(run, saved.step, finished, seed, time.perf_counter() - began)
                records.append(record)
                metrics = finished.metrics()
                print(
                    f"{metrics['success']:8.2f} {metrics['episode.return']:9.1f} {metrics['episode.length']:7.1f} "
                    f"{episodes:9d} {saved.step:9d}  {run.path}"
                )
    finally:
        for pool in rollouts.values():
            pool.close()
    if len(runs) > 1 and not all_checkpoints:
        print(summary(records, "success"))
    return records


def _record(run: Run, step: int, finished: Episodes, seed: int, seconds: float) -> dict[str, Any]:
    metrics = finished.metrics()
    if step not in run.eval.steps():
        row = {f"evaluation/{name}": value for name, value in metrics.items()}
        run.eval.insert(step, row | {"evaluation/episodes": len(finished.success)})
    record = {
        "run": str(run.path),
        "agent": run.config["agent_name"],
        "env": run.config["env"],
        "step": step,
        "seed": seed,
        "episodes": len(finished.success),
        **metrics,
        "seconds": round(seconds, 3),
        "each": to_json({name: getattr(finished, name).tolist() for name in ("success", "returns", "lengths")}),
        "versions": versions(),
    }
    write_json(run.path / "evaluations" / f"step_{step:08d}_seed{seed}.json", record)
    return record


def check_video(path: Path, runs: int, all_checkpoints: bool) -> None:
    """Raises UserError unless a video of an episode can be written there, before anything is loaded."""
    from fastflow.video import check_path

    if runs != 1 or all_checkpoints:
        raise UserError("video: expected one run and one checkpoint, got " + ("all" if all_checkpoints else str(runs)))
    check_path(path)


def summary(records: Sequence[dict[str, Any]], score: str) -> str:
    """What several runs come to: a line per agent and task, and one for all tasks of an agent that has several.

    Args:
        records: of `evaluate_runs`.
        score: which number of theirs.

    Returns:
        A table: number of runs, mean, interquartile mean (IQM) and its 95 % bootstrap interval.
    """
    agents: dict[str, dict[str, list[float]]] = {}
    for record in records:
        agents.setdefault(record["agent"], {}).setdefault(record["env"], []).append(record[score])
    rows: list[tuple[str, list[list[float]]]] = []
    for agent, tasks in agents.items():
        who = f"{agent}, " if len(agents) > 1 else ""
        rows += [(who + task, [scores]) for task, scores in tasks.items()]
        if len(tasks) > 1:
            rows.append((f"{who}all {len(tasks)} tasks", list(tasks.values())))
    lines = [f"\n{'runs':>8} {'mean':>9} {'IQM':>9} {'95 % interval of the IQM':>26}  {score} over runs"]
    for task, parts in rows:
        scores = np.concatenate(parts)
        low, high = bootstrap_interval(parts)
        interval = f"{low:.3f} to {high:.3f}"
        lines.append(f"{len(scores):8d} {scores.mean():9.3f} {interquartile_mean(scores):9.3f} {interval:>26}  {task}")
    return "\n".join(lines)
