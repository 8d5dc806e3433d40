"""Experiments about Temporal Difference Flows: how the variants compare where the truth is known."""

from __future__ import annotations

from typing import Any

import torch

from fastflow.agents.td2_cfm import Td2CfmAgent
from fastflow.distances import gradient_variance
from fastflow.evaluate import bootstrap_interval
from fastflow.experiments.declare import Arm, Experiment, Metric, Size
from fastflow.horizon import HorizonTask
from fastflow.planning import PolicyImprovement, play
from fastflow.record import Run, load_agent
from fastflow.train import settings_from_config
from fastflow.worlds import World

__all__ = ["CURVED", "DIFFUSION", "LINEAR_GAUSSIAN", "PLANNING", "POINTMAZE", "STEPS"]

_HERE = "fastflow.experiments.td2_cfm"
_LABELS = {
    "mc-cfm": "MC-CFM",
    "td2-cfm": "TD²-CFM",
    "td-cfm-c": "TD-CFM(C)",
    "td-cfm": "TD-CFM",
    "td2-dd": "TD²-DD",
    "td-dd": "TD-DD",
}
_FLOWS = ("mc-cfm", "td2-cfm", "td-cfm-c", "td-cfm")

_EMD = Metric("evaluation/emd", "EMD", "lower", log=True, floor="evaluation/emd_floor")
_VALUE = Metric("evaluation/value_mse", "MSE(V)", "lower", log=True)
_VELOCITY = Metric("evaluation/velocity_mse", "velocity MSE", "lower", log=True)
_NLL = Metric("evaluation/nll", "NLL/d", "lower", compare="difference")
_VARIANCE = Metric("gradient_trace", "Tr Cov of the gradient", "lower", log=True)


# What is measured after training ------------------------------------------------------------------------------------

_GRADIENTS = 64
_FLOW_TARGETS = ("td2-cfm", "td-cfm-c", "td-cfm")


def gradients(run: Run) -> dict[str, float]:
    """Trace of the covariance of a batch's gradient at the trained parameters, and the squared norm of its mean.

    `gradient_trace` is that of the run's own loss; `gradient_trace.<variant>` those of the three bootstrapped losses at
    the same parameters, on the same batches and noise.
    """
    agent, task = _restore(run)
    own = agent.config.variant
    variants = (own,) if agent.config.diffusion else dict.fromkeys((own, *_FLOW_TARGETS))
    found: dict[str, float] = {}
    for variant in variants:
        batches, noises = (torch.Generator().manual_seed(seed) for seed in (1, 2))

        def draw(variant: str = variant, batches: torch.Generator = batches, noises: torch.Generator = noises) -> Any:
            for _ in range(_GRADIENTS):
                batch = task.sample(agent.config.batch_size, batches)
                yield agent.gradient(batch, agent.sample_noise(batch, noises), variant)

        trace, mean = gradient_variance(draw())
        found |= {f"gradient_trace.{variant}": trace, f"gradient_mean.{variant}": mean}
    return found | {"gradient_trace": found[f"gradient_trace.{own}"]}


_EPISODES, _STEPS, _DECISION_SAMPLES = 12, 200, 128


def planning(run: Run) -> dict[str, float]:
    """Returns of generalised policy improvement, of every policy of the family alone, and of the behaviour policy.

    Over `_EPISODES` episodes of `_STEPS` steps, for each of the world's tasks that no policy was made for. `best` is
    the best single policy in hindsight, chosen per task by the returns of these very episodes; `promised` the single
    policy that the model itself prefers at the start of each episode.
    """
    agent, task = _restore(run)
    world = task.world
    embeddings = torch.tensor(list(world.policies.values()))
    found: dict[str, float] = {"policies": len(embeddings)}
    sums: dict[str, list[float]] = {}
    for name in (n for n in world.tasks if not n.startswith("reach")):
        returns = _returns(agent, world, embeddings, name)
        for kind, values in returns.items():
            found[f"return.{kind}.{name}"] = float(values.mean())
            sums.setdefault(kind, []).append(float(values.mean()))
        low, high = bootstrap_interval([(returns["gpi"] - returns["best"]).tolist()], lambda x: float(x.mean()))
        found |= {f"gain_low.{name}": low, f"gain_high.{name}": high}
    return found | {f"return.{kind}": sum(values) / len(values) for kind, values in sums.items()}


def _returns(agent: Td2CfmAgent, world: World, embeddings: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    """Returns [episodes] of one task by who acts."""
    generator = torch.Generator().manual_seed(11)
    starts = world.starts(_EPISODES, generator)

    def reward(states: torch.Tensor) -> torch.Tensor:
        return world.reward(name, states)

    def playing(act: Any) -> torch.Tensor:
        return play(world, act, reward, starts, horizon=_STEPS, generator=generator)

    planner = PolicyImprovement(
        agent.model, world.act, embeddings, reward, num_samples=_DECISION_SAMPLES, num_steps=5, generator=generator
    )
    alone = torch.stack([playing(lambda s, w=w: world.act(s, w)) for w in embeddings])
    preferred = embeddings[planner.values(starts)[0].argmax(1)]
    memory: list[Any] = [None]

    def behave(states: torch.Tensor) -> torch.Tensor:
        action, memory[0] = world.behave(states, memory[0], generator)
        return action

    return {
        "gpi": playing(planner.act),
        "best": alone[alone.mean(1).argmax()],
        "average": alone.mean(0),
        "promised": playing(lambda s: world.act(s, preferred)),
        "behaviour": playing(behave),
    }


def _restore(run: Run) -> tuple[Td2CfmAgent, HorizonTask]:
    agent, saved = load_agent(run, None, "cpu")
    settings = settings_from_config(run, "td2-cfm")
    return agent, HorizonTask(settings, torch.device("cpu"), saved.arguments, run.path, lambda text: None)


# The experiments ----------------------------------------------------------------------------------------------------


def _small(steps: int) -> dict[str, Any]:
    return {"steps": steps, "agent.lr_decay_steps": steps, "eval_interval": steps // 3, "save_interval": steps // 2}


LINEAR_GAUSSIAN = Experiment(
    name="td2-linear-gaussian",
    title="The variants of TD-Flow on a linear-Gaussian world",
    agent="td2-cfm",
    question="Which bootstrapped flow comes as close to the exact successor measure as Monte-Carlo training does?",
    arms=tuple(
        Arm(
            f"{variant}-{gamma:g}",
            f"{_LABELS[variant]}, gamma {gamma:g}",
            {"agent.variant": variant, "agent.gamma": gamma},
            group=_LABELS[variant],
            after=f"{_HERE}:gradients",
            reference=f"mc-cfm-{gamma:g}",
        )
        for gamma in (0.95, 0.99)
        for variant in _FLOWS
    ),
    sizes={
        "small": Size(
            {"env": "linear-gaussian", "preset": "linear-gaussian", **_small(24_000)},
            (0, 1, 2),
            "2 CPU cores, 30 minutes",
        ),
    },
    metrics=(_EMD, _VALUE, _VELOCITY, _NLL, _VARIANCE),
)

DIFFUSION = Experiment(
    name="td2-diffusion",
    title="Diffusions on the linear-Gaussian world, gamma 0.95",
    agent="td2-cfm",
    question="Does bootstrapping on the way (TD²) help a diffusion as it helps a flow?",
    arms=tuple(
        Arm(variant, _LABELS[variant], {"agent.variant": variant, "agent.gamma": 0.95})
        for variant in ("td2-cfm", "td2-dd", "td-dd")
    ),
    sizes=LINEAR_GAUSSIAN.sizes,
    metrics=(_EMD, _VALUE, _NLL),
    reference="td2-cfm",
)

CURVED = Experiment(
    name="td2-curved",
    title="Curved paths on the linear-Gaussian world, gamma 0.95",
    agent="td2-cfm",
    question="Who suffers when the path from noise to data is the quarter circle instead of the straight line?",
    arms=tuple(
        Arm(
            f"{variant}-{path}",
            f"{_LABELS[variant]}, {path}",
            {"agent.variant": variant, "agent.path": path, "agent.gamma": 0.95},
            group=_LABELS[variant],
            reference=f"{variant}-straight",
        )
        for variant in _FLOWS[1:]
        for path in ("straight", "curved")
    ),
    sizes=LINEAR_GAUSSIAN.sizes,
    metrics=(_EMD, _VALUE, _NLL),
)

STEPS = Experiment(
    name="td2-steps",
    title="Solver steps of TD²-CFM on the linear-Gaussian world, gamma 0.95",
    agent="td2-cfm",
    question="How many midpoint steps does TD²-CFM need, in training and in use?",
    arms=tuple(
        Arm(
            f"k{steps}",
            f"K = {steps}",
            {"agent.num_steps": steps, "agent.eval_num_steps": steps, "agent.gamma": 0.95},
            x=float(steps),
            group=_LABELS["td2-cfm"],
            reference="k10",
        )
        for steps in (1, 2, 5, 10, 20)
    ),
    sizes=LINEAR_GAUSSIAN.sizes,
    metrics=(_EMD, _VALUE, _VELOCITY, _NLL),
    x="solver steps K",
)

POINTMAZE = Experiment(
    name="td2-pointmaze",
    title="Horizons on OGBench's point maze (medium), one goal policy",
    agent="td2-cfm",
    question="How do the variants bear a growing horizon on data of another policy?",
    arms=tuple(
        Arm(
            f"{variant}-{horizon}",
            f"{_LABELS[variant]}, horizon {horizon}",
            {"agent.variant": variant, "agent.gamma": round(1 - 1 / horizon, 4)},
            x=float(horizon),
            group=_LABELS[variant],
            reference=f"mc-cfm-{horizon}",
        )
        for horizon in (5, 20, 50, 100)
        for variant in _FLOWS
    ),
    sizes={
        "small": Size(
            {
                "env": "pointmaze-medium",
                "preset": "pointmaze",
                "eval_states": 16,
                "eval_samples": 512,
                **_small(16_000),
            },
            (0, 1, 2),
            "2 CPU cores, 40 minutes",
        ),
        "paper": Size(
            {
                "env": "pointmass-maze",
                "preset": "single-policy",
                "agent.policy": "loop",
                "transitions": 10_000_000,
                "steps": 3_000_000,
                "eval_states": 64,
                "eval_samples": 2048,
            },
            (0, 1, 2),
            "a GPU, days",
        ),
    },
    metrics=(_EMD, _VALUE, _NLL),
    x="horizon 1 / (1 - gamma)",
)

PLANNING = Experiment(
    name="td2-planning",
    title="Generalised policy improvement on OGBench's point maze (medium), 21 goal policies",
    agent="td2-cfm",
    question="Does choosing among goal policies by sampled futures beat each of them, and the behaviour policy?",
    arms=(
        Arm("td2-cfm", _LABELS["td2-cfm"], {"agent.variant": "td2-cfm"}, after=f"{_HERE}:planning"),
        Arm("td-cfm", _LABELS["td-cfm"], {"agent.variant": "td-cfm"}, after=f"{_HERE}:planning"),
    ),
    sizes={
        "small": Size(
            {
                "env": "pointmaze-medium",
                "preset": "pointmaze",
                "agent.policy": "all",
                "agent.gamma": 0.98,
                "eval_states": 21,
                "eval_samples": 512,
                **_small(30_000),
            },
            (0, 1, 2),
            "2 CPU cores, 25 minutes",
        ),
        "paper": Size(
            {
                "env": "pointmass-maze",
                "preset": "multi-policy",
                "transitions": 10_000_000,
                "steps": 8_000_000,
                "eval_states": 64,
                "eval_samples": 2048,
            },
            (0, 1, 2),
            "a GPU, days",
        ),
    },
    metrics=(
        Metric("return.gpi", "return, planning", "higher"),
        Metric("return.best", "best single policy", "higher"),
        Metric("return.promised", "policy chosen once", "higher"),
        Metric("return.behaviour", "behaviour", "higher"),
        _EMD,
        _VALUE,
    ),
    reference="td2-cfm",
)
