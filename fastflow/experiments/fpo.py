"""Experiments about FPO and FPO++ in gymnasium's environments, with Gaussian PPO beside them."""

from __future__ import annotations

from typing import Any

from fastflow.experiments.declare import Arm, Experiment, Metric, Size

__all__ = ["SEARCH_HOPPER", "SEARCH_PENDULUM", "SEARCH_REACHER"]

_RETURN = Metric("evaluation/episode.return", "return", "higher", compare="difference")
_RANDOM = Metric("evaluation/episode.return.random", "return with noise", "higher", compare="difference")

_FAMILIES: dict[str, dict[str, Any]] = {
    "fpo": {"agent.ratio": "action", "agent.negative": "clip", "agent.clip": 0.05},
    "fpo++": {"agent.ratio": "pair", "agent.negative": "aspo", "agent.clip": 0.2},
}
# By short names: the environment, environment steps of a run, and what differs from the preset for all agents alike.
TASKS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "pendulum": ("Pendulum-v1", 200_000, {"agent.rollout_steps": 64}),
    "reacher": ("Reacher-v5", 200_000, {}),
    "hopper": ("Hopper-v5", 400_000, {}),
    "halfcheetah": ("HalfCheetah-v5", 400_000, {}),
}


def _search(task: str) -> Experiment:
    """Four settings of flow policies and four of Gaussian ones, all else equal."""
    env, steps, shared = TASKS[task]
    arms = [
        Arm(
            f"{family}-lr{lr:g}",
            f"{family.upper()}, lr {lr:g}",
            {**settings, "agent.lr": lr},
            group=family.upper(),
        )
        for family, settings in _FAMILIES.items()
        for lr in (3e-4, 1e-3)
    ]
    arms += [
        Arm(
            f"ppo-lr{lr:g}-clip{clip:g}",
            f"PPO, lr {lr:g}, clip {clip:g}",
            {"agent.lr": lr, "agent.clip": clip},
            group="PPO",
            agent="ppo",
        )
        for lr in (3e-4, 1e-3)
        for clip in (0.1, 0.2)
    ]
    return Experiment(
        name=f"fpo-search-{task}",
        title=f"Settings of FPO, FPO++ and PPO on {env}",
        agent="fpo",
        question="Which learning rate and clip do the comparisons take?",
        arms=tuple(arms),
        sizes={
            "small": Size(
                {
                    "env": env,
                    "preset": "cpu",
                    "steps": steps,
                    "eval_interval": steps,
                    "log_interval": steps // 20,
                    **shared,
                },
                (100, 101),
                "2 CPU cores, 10 minutes",
            )
        },
        metrics=(_RETURN, _RANDOM),
    )


SEARCH_PENDULUM, SEARCH_REACHER, SEARCH_HOPPER = map(_search, ("pendulum", "reacher", "hopper"))
