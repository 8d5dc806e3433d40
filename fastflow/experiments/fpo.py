"""Experiments about FPO and FPO++ in gymnasium's environments, with Gaussian PPO beside them."""

from __future__ import annotations

from typing import Any

from fastflow.experiments.declare import Arm, Experiment, Metric, Size

__all__ = [
    "ABLATION",
    "DMC",
    "HALFCHEETAH",
    "HOPPER",
    "PENDULUM",
    "REACHER",
    "SEARCH_HOPPER",
    "SEARCH_PENDULUM",
    "SEARCH_REACHER",
]

_RETURN = Metric("evaluation/episode.return", "return", "higher", compare="difference")
_RANDOM = Metric("evaluation/episode.return.random", "return with noise", "higher", compare="difference")

_FAMILIES: dict[str, dict[str, Any]] = {
    "fpo": {"agent.ratio": "action", "agent.negative": "clip", "agent.clip": 0.05},
    "fpo++": {"agent.ratio": "pair", "agent.negative": "aspo", "agent.clip": 0.2},
}
# By short names: the environment, environment steps of a run, and what differs from the preset for all agents alike.
TASKS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "pendulum": ("Pendulum-v1", 200_000, {"agent.rollout_steps": 64, "agent.gamma": 0.95}),
    "reacher": ("Reacher-v5", 200_000, {}),
    "hopper": ("Hopper-v5", 400_000, {}),
    "halfcheetah": ("HalfCheetah-v5", 400_000, {}),
}

# What a search tries beside learning rate and clip: one setting of flows, one of Gaussians. Less noise to begin with
# where control is fine; else the full scale of a flow's output, and a Gaussian's usual companion on these tasks.
_EXTRA: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "reacher": ({"agent.action_scale": 0.5}, {"agent.init_std": 0.5}),
    "hopper": ({"agent.output_scale": 1.0}, {"agent.normalize_rewards": True}),
}


def _search(task: str) -> Experiment:
    """As many settings of flow policies as of Gaussian ones, all else equal."""
    env, steps, shared = TASKS[task]
    flow_extra, ppo_extra = _EXTRA.get(task, ({}, {}))

    def with_and_without(
        name: str, label: str, settings: dict[str, Any], extra: dict[str, Any], group: str, agent: str | None
    ) -> list[Arm]:
        found = [Arm(name, label, settings, group=group, agent=agent)]
        for key, value in extra.items():
            short = key.removeprefix("agent.")
            found.append(
                Arm(f"{name}-{short}", f"{label}, {short} {value}", {**settings, key: value}, group=group, agent=agent)
            )
        return found

    arms = [
        arm
        for family, settings in _FAMILIES.items()
        for lr in (3e-4, 1e-3)
        for arm in with_and_without(
            f"{family}-lr{lr:g}",
            f"{family.upper()}, lr {lr:g}",
            {**settings, "agent.lr": lr},
            flow_extra,
            family.upper(),
            None,
        )
    ]
    arms += [
        arm
        for lr in (3e-4, 1e-3)
        for clip in (0.1, 0.2)
        for arm in with_and_without(
            f"ppo-lr{lr:g}-clip{clip:g}",
            f"PPO, lr {lr:g}, clip {clip:g}",
            {"agent.lr": lr, "agent.clip": clip},
            ppo_extra,
            "PPO",
            "ppo",
        )
    ]
    return Experiment(
        name=f"fpo-search-{task}",
        title=f"Settings of FPO, FPO++ and PPO on {env}",
        agent="fpo",
        question="Which settings do the comparisons take?",
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
                (100,),
                "2 CPU cores, 20 minutes",
            )
        },
        metrics=(_RETURN, _RANDOM),
    )


def _comparison(task: str) -> Experiment:
    """The presets of an environment, over five seeds that the search did not see."""
    env, steps, _ = TASKS[task]
    arms = [
        Arm("fpo", "FPO", {"preset": task}, group="FPO"),
        Arm("fpo++", "FPO++", {"preset": f"{task}/fpo++"}, group="FPO++"),
        Arm("ppo", "PPO (Gaussian)", {"preset": task}, group="PPO", agent="ppo"),
    ]
    if task in ("hopper", "halfcheetah"):
        # What many PPO recipes do on these tasks.
        settings = {"preset": task, "agent.normalize_rewards": True}
        arms.append(Arm("ppo-normalized", "PPO, rewards normalised", settings, group="PPO", agent="ppo"))
    return Experiment(
        name=f"fpo-{task}",
        title=f"FPO, FPO++ and Gaussian PPO on {env}",
        agent="fpo",
        question="How do flow policies compare with a Gaussian one at equal steps, passes and network sizes?",
        arms=tuple(arms),
        sizes={
            "small": Size(
                {
                    "env": env,
                    "steps": steps,
                    "eval_interval": steps // 4,
                    "log_interval": steps // 40,
                    # Short episodes, whose returns differ by where they start.
                    "eval_episodes": 30 if task in ("pendulum", "reacher") else 10,
                },
                (0, 1, 2, 3, 4),
                "2 CPU cores, 15 minutes",
            )
        },
        metrics=(_RETURN, _RANDOM),
        reference="ppo",
        picture="fastflow.online_figures:draw_experiment",
    )


PENDULUM, REACHER, HOPPER, HALFCHEETAH = map(_comparison, TASKS)


def _ablation() -> Experiment:
    """One setting of FPO changed at a time."""
    changes: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
        "pairs N": [(f"n{n}", f"N = {n}", {"agent.num_pairs": n}) for n in (1, 4, 16)],
        "clip": [(f"clip{clip:g}", f"clip {clip:g}", {"agent.clip": clip}) for clip in (0.1, 0.2)],
        "error": [
            ("noise-error", "noise error (epsilon)", {"agent.error": "noise"}),
            ("endpoint-error", "end-point error", {"agent.error": "endpoint"}),
        ],
        "ratio": [
            ("pair", "ratio per pair", {"agent.ratio": "pair"}),
            ("aspo", "ASPO", {"agent.negative": "aspo"}),
            ("pair-aspo", "ratio per pair, ASPO", {"agent.ratio": "pair", "agent.negative": "aspo"}),
        ],
        "solver steps K": [(f"k{k}", f"K = {k}", {"agent.num_steps": k}) for k in (1, 2, 5)],
        "advantages": [("positive", "softplus of advantages", {"agent.positive_advantages": True})],
    }
    arms = [Arm("base", "N = 8, K = 10, clip 0.05, velocity error, per action", group="base")]
    arms += [Arm(name, label, setting, group=group) for group, rows in changes.items() for name, label, setting in rows]
    env, steps, _ = TASKS["reacher"]
    steps //= 2
    return Experiment(
        name="fpo-ablation",
        title=f"FPO on {env}, {steps:,} steps, one setting changed at a time",
        agent="fpo",
        question="Which of FPO's choices matter, and does it need its noise when evaluated?",
        arms=tuple(arms),
        sizes={
            "small": Size(
                {"env": env, "preset": "reacher", "steps": steps, "eval_interval": steps, "log_interval": steps // 20},
                (0, 1, 2, 3, 4),
                "2 CPU cores, 15 minutes",
            )
        },
        metrics=(_RETURN, _RANDOM),
        reference="base",
    )


ABLATION = _ablation()

DMC_TASKS = (
    "ball_in_cup-catch",
    "cartpole-balance",
    "cheetah-run",
    "finger-spin",
    "finger-turn_easy",
    "finger-turn_hard",
    "fish-swim",
    "point_mass-easy",
    "reacher-easy",
    "reacher-hard",
)


def _dmc() -> Experiment:
    """The ten tasks of the FPO paper's table."""
    return Experiment(
        name="fpo-dmc",
        title="FPO and Gaussian PPO on ten tasks of the DM control suite",
        agent="fpo",
        question="What do both reach on the paper's ten tasks?",
        arms=tuple(
            Arm(
                f"{agent}-{task}",
                f"{agent.upper()}, {task}",
                # The paper's discount: 0.95 for the two tasks that reward at once.
                {"env": f"dmc-{task}", "agent.gamma": 0.95 if task in ("ball_in_cup-catch", "finger-spin") else 0.995},
                group=agent.upper(),
                agent=agent,
                reference=f"ppo-{task}",
            )
            for task in DMC_TASKS
            for agent in ("fpo", "ppo")
        ),
        sizes={
            "small": Size(
                {"preset": "dmc", "steps": 50_000, "eval_interval": 50_000, "log_interval": 5_000, "eval_episodes": 5},
                (0, 1, 2),
                "2 CPU cores, one hour, 50,000 steps a task",
            ),
            "paper": Size(
                {"preset": "playground", "steps": 60_000_000, "eval_interval": 6_000_000, "num_envs": 2048},
                (0, 1, 2, 3, 4),
                "many CPU cores for the simulator and a GPU, days",
            ),
        },
        metrics=(_RETURN, _RANDOM),
    )


DMC = _dmc()

SEARCH_PENDULUM, SEARCH_REACHER, SEARCH_HOPPER = map(_search, ("pendulum", "reacher", "hopper"))
