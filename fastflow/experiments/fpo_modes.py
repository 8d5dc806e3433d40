"""Experiments about FPO's modes: does a policy that could act in two ways keep both?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastflow import multimodality_figures as figures
from fastflow.experiments.declare import Arm, Experiment, Metric, Size
from fastflow.online_envs.gridworld_maps import MAP_NAMES

__all__ = ["BANDIT", "GRIDWORLD", "MODES"]

_HERE = "fastflow.experiments.fpo_modes"
_MEASURES = "fastflow.multimodality"

# What all policies of a grid world or bandit share, flows and Gaussians.
_PLAIN: dict[str, Any] = {
    "agent.actor_hidden": (64, 64),
    "agent.critic_hidden": (64, 64),
    "agent.activation": "relu",
    "agent.normalize_observations": False,
    "agent.value_coef": 1.0,
    "agent.num_epochs": 4,
    "agent.num_minibatches": 8,
    "agent.clip": 0.2,
}
_FLOW: dict[str, Any] = {
    "agent.time_embed_dim": 0,
    "agent.num_pairs": 8,
    "agent.difference_clamp": 3.0,
    "agent.straight_through": False,
}
_PAIR: dict[str, Any] = {**_FLOW, "agent.ratio": "pair"}
# An untrained network's own velocity leans to one side; scaled down, a policy begins as its noise is, and keeps its
# balance. The learning rate makes up for it.
_EVEN: dict[str, Any] = {"agent.output_scale": 0.25, "agent.lr": 3e-3}
_GAUSSIAN: dict[str, Any] = {"agent.variance": "learned", "agent.init_std": 1.0}
# The released baseline's variance of 1/2.
_FIXED: dict[str, Any] = {"agent.variance": "fixed", "agent.init_std": math.sqrt(0.5)}


# The saddle -----------------------------------------------------------------------------------------------------------

_STEPS, _ENVS, _ROLLOUT = 750_000, 512, 16
_SMOOTH: dict[str, Any] = {"agent.activation": "silu", "agent.time_embed_dim": 8}
# A quarter of the rows per update, in minibatches half as large.
_FEW: dict[str, Any] = {
    "num_envs": 64,
    "agent.rollout_steps": 32,
    "agent.num_minibatches": 4,
    "agent.lr_decay_updates": _STEPS // (64 * 32),
}


def _mode(name: str, label: str, settings: dict[str, Any], agent: str | None = None) -> Arm:
    return Arm(name, label, settings, after=f"{_MEASURES}:gridworld_modes", agent=agent)


def pictures_of_modes(experiment: Experiment, seeds: Sequence[int], folder: Path) -> list[Path]:
    """`Experiment.picture`."""
    some = figures.chosen(experiment, ("pair", "action", "network", "ppo", "ppo-fixed"))
    few = figures.chosen(experiment, ("pair", "action", "ppo", "ppo-fixed"))
    drawn = [
        figures.plot_actions(
            some, min(seeds), folder, folder / "actions.png", f"Actions at the saddle (12, 12), seed {min(seeds)}"
        ),
        figures.plot_ends(
            experiment.arms,
            seeds,
            folder,
            folder / "actions_end.png",
            "Action along y at the saddle at the end, not yet clipped (P(down) | P(stay) | P(up); dotted: the prior)",
        ),
        figures.plot_moves(
            experiment.arms, seeds, folder, folder / "moves.png", "Moves at the saddle, one line per seed"
        ),
        figures.plot_paths(
            few,
            seeds,
            folder,
            folder / "paths.png",
            "25 episodes from each of the figure's starts (blue: on the saddle's row)",
        ),
    ]
    return [path for path in drawn if path is not None]


MODES = Experiment(
    name="fpo-modes",
    title="Two equally near goals: does the policy keep both ways?",
    agent="fpo",
    question="What keeps a flow policy bimodal at the saddle of the grid world, and for how long?",
    arms=(
        _mode("pair", "per pair, gamma 0.8", {**_PAIR, **_EVEN}),
        _mode("action", "per action", {**_FLOW, **_EVEN, "agent.ratio": "action"}),
        _mode("aspo", "per pair, ASPO", {**_PAIR, **_EVEN, "agent.negative": "aspo"}),
        _mode("head", "full output scale", {**_PAIR, "agent.lr": 1.5e-3}),
        _mode("network", "SiLU, time as 8 numbers", {**_PAIR, **_EVEN, **_SMOOTH}),
        _mode("gamma-0.9", "gamma 0.9", {**_PAIR, **_EVEN, "agent.gamma": 0.9}),
        _mode("gamma-0.99", "gamma 0.99", {**_PAIR, **_EVEN, "agent.gamma": 0.99}),
        _mode("constant-lr", "constant learning rate", {**_PAIR, **_EVEN, "agent.lr_decay_updates": 0}),
        _mode("envs-64", "64 environments", {**_PAIR, **_EVEN, **_FEW}),
        _mode(
            "paper",
            "released settings",
            {
                **_FLOW,
                "agent.ratio": "action",
                "agent.num_pairs": 50,
                "agent.gamma": 0.99,
                "agent.gae_lambda": 0.98,
                "agent.lr": 3e-4,
                "agent.lr_decay_updates": 0,
                "agent.num_epochs": 10,
                "agent.num_minibatches": 6,
                "agent.rollout_steps": 2048,
                "num_envs": 1,
                "steps": 100_000,
                "save_interval": 20_000,
                "eval_interval": 50_000,
            },
        ),
        _mode("ppo", "PPO, learnt variance", _GAUSSIAN, agent="ppo"),
        _mode("ppo-fixed", "PPO, variance 0.5", _FIXED, agent="ppo"),
    ),
    sizes={
        "small": Size(
            {
                "env": "gridworld-two-walls",
                **_PLAIN,
                "num_envs": _ENVS,
                "agent.rollout_steps": _ROLLOUT,
                "agent.gamma": 0.8,
                "agent.gae_lambda": 1.0,
                "agent.lr": 1e-3,
                "agent.lr_decay_updates": _STEPS // (_ENVS * _ROLLOUT),
                "steps": _STEPS,
                "save_interval": _STEPS // 6,
                "keep_checkpoints": 0,
                "log_interval": 50_000,
                "eval_interval": _STEPS // 3,
                "eval_episodes": 50,
                "eval_envs": 50,
            },
            (0, 1, 2, 3, 4),
            "2 CPU cores, 15 minutes",
        ),
    },
    metrics=(
        Metric("both_modes", "both modes: min(P(up), P(down))", "higher", compare="difference"),
        Metric("p_stay", "P(stay)", "lower", compare="difference"),
        Metric("passes", "share of seeds with both modes >= 0.2 and P(stay) <= 0.2", "higher", compare="difference"),
        Metric("p_up", "P(up)", compare="difference"),
        Metric("p_down", "P(down)", compare="difference"),
        Metric("goal_entropy", "entropy of the goal from the saddle (nats)", "higher", compare="difference"),
        Metric("goal_entropy_starts", "the same from the figure's starts", "higher", compare="difference"),
        Metric("std_raw", "std of the action along y, not clipped", compare="difference"),
        Metric("saddle_length", "steps from the saddle to a goal", "lower", compare="difference"),
        Metric("evaluation/episode.return.random", "return with noise", "higher", compare="difference"),
    ),
    reference="pair",
    picture=f"{_HERE}:pictures_of_modes",
)


# All maps -------------------------------------------------------------------------------------------------------------


def pictures_of_gridworld(experiment: Experiment, seeds: Sequence[int], folder: Path) -> list[Path]:
    """`Experiment.picture`."""
    starts = {"two-walls": figures.FIGURE_STARTS}
    other = ((2, 12), (5, 21), (12, 2), (20, 20))
    drawn = [
        figures.plot_paths(
            [arm],
            seeds,
            folder,
            folder / f"paths_{arm.name}.png",
            f"25 episodes from each of four starts on {arm.name}",
            starts.get(arm.name, other),
        )
        for arm in experiment.arms
    ]
    return [path for path in drawn if path is not None]


GRIDWORLD = Experiment(
    name="fpo-gridworld",
    title="FPO on the five maps of the grid world",
    agent="fpo",
    question="Does every seed reach return 20 on every map within 100,000 steps?",
    arms=tuple(
        Arm(name, name, {"env": f"gridworld-{name}"}, after=f"{_MEASURES}:gridworld_goals") for name in MAP_NAMES
    ),
    sizes={
        "small": Size(
            {
                "preset": "gridworld/cpu",
                "steps": 100_000,
                "log_interval": 10_000,
                "eval_interval": 20_000,
                "eval_episodes": 50,
                "eval_envs": 50,
            },
            (0, 1, 2, 3, 4),
            "2 CPU cores, 6 minutes",
        ),
    },
    metrics=(
        Metric("evaluation/episode.return.random", "return with noise", "higher", compare="difference"),
        Metric("evaluation/episode.return", "return without noise", "higher", compare="difference"),
        Metric("reached", "share reaching a goal, from every cell", "higher", compare="difference"),
        Metric("death", "share dying", "lower", compare="difference"),
        Metric("steps_to_20", "steps until an evaluation of 20", "lower"),
        Metric("length", "steps to a goal", "lower"),
    ),
    picture=f"{_HERE}:pictures_of_gridworld",
)


# The bandit -----------------------------------------------------------------------------------------------------------


def pictures_of_bandit(experiment: Experiment, seeds: Sequence[int], folder: Path) -> list[Path]:
    """`Experiment.picture`."""
    title = "Actions at the end over contours of the reward (shares of the left and the right bump)"
    path = figures.plot_bandit(experiment.arms, seeds, folder, folder / "actions.png", title)
    return [] if path is None else [path]


def _bandit(name: str, label: str, settings: dict[str, Any], agent: str | None = None) -> Arm:
    return Arm(name, label, settings, after=f"{_MEASURES}:bandit_modes", agent=agent)


BANDIT = Experiment(
    name="fpo-bandit",
    title="A bandit with two equally good actions",
    agent="fpo",
    question="Which policies find the two bumps, and do they keep both?",
    arms=(
        _bandit("fpo", "FPO", {**_FLOW, "agent.ratio": "action"}),
        _bandit("pair", "FPO, per pair", _PAIR),
        _bandit("fpo++", "FPO++ (per pair, ASPO)", {**_PAIR, "agent.negative": "aspo"}),
        _bandit("ppo", "PPO, learnt variance", _GAUSSIAN, agent="ppo"),
        _bandit("ppo-fixed", "PPO, variance 0.5", _FIXED, agent="ppo"),
    ),
    sizes={
        "small": Size(
            {
                "env": "bandit-two-modes",
                **_PLAIN,
                "num_envs": 256,
                "agent.rollout_steps": 8,
                "agent.gamma": 0.0,
                "agent.lr": 1e-3,
                "steps": 200_000,
                "save_interval": 20_000,
                "keep_checkpoints": 0,
                "log_interval": 20_000,
                "eval_interval": 100_000,
                "eval_episodes": 100,
                "eval_envs": 100,
            },
            (0, 1, 2, 3, 4),
            "2 CPU cores, 5 minutes",
        ),
    },
    metrics=(
        Metric("reward", "mean reward", "higher", compare="difference"),
        Metric("both_modes", "share of the smaller bump", "higher", compare="difference"),
        Metric("left", "left bump", compare="difference"),
        Metric("right", "right bump", compare="difference"),
        Metric("outside", "outside both", "lower", compare="difference"),
    ),
    reference="fpo",
    picture=f"{_HERE}:pictures_of_bandit",
)
