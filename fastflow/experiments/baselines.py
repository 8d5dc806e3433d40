"""floq beside what it is compared with (docs/baselines.md), each with its preset of the task.

`small` of `baselines-pointmaze` learns from data that `fastflow collect pointmaze-arena-navigate-v0 --dataset-dir data
--episodes 300` makes; the sizes called `paper` are published ones.
"""

from __future__ import annotations

from typing import Any

from fastflow.experiments.declare import Arm, Experiment, Metric, Size
from fastflow.experiments.floq import SMALL

__all__ = ["ANTMAZE_GIANT", "CUBE_DOUBLE", "POINTMAZE"]


def _baselines(name: str, title: str, preset: str, sizes: dict[str, Size], *further: Arm) -> Experiment:
    """The critics that are compared on one environment; `preset` names it in every agent's presets."""

    def arm(name: str, label: str, agent: str, suffix: str = "", **settings: Any) -> Arm:
        return Arm(name, label, {"preset": preset + suffix, **settings}, agent=agent)

    return Experiment(
        name=name,
        title=f"floq and its baselines on {title}",
        agent="floq",
        question="Is a flow the better critic, at equal compute too?",
        arms=(
            arm("floq", "floq", "floq"),
            arm("fql", "FQL", "fql"),
            arm("fql-resnet", "FQL-ResNet, floq's FLOPs", "fql", "/resnet"),
            arm("fql-ensemble", "FQL ensemble, floq's FLOPs", "fql", "/ensemble"),
            arm("fql-iqn", "FQL-IQN", "fql-iqn"),
            arm("value-flows-rpg", "Value Flows, one-step policy", "value-flows", **{"agent.policy_extraction": "rpg"}),
            arm("value-flows-rs", "Value Flows, best of N", "value-flows", **{"agent.policy_extraction": "rs"}),
            *further,
        ),
        sizes=sizes,
        metrics=(
            Metric("evaluation/success", "success at the end", "higher", compare="difference"),
            Metric("evaluation/episode.length", "episode length at the end", "lower"),
        ),
        reference="fql",
    )


def _paper(env: str) -> dict[str, Size]:
    return {"paper": Size({"env": f"{env}-singletask-v0"}, (0, 1, 2), "a GPU, days")}


POINTMAZE = _baselines(
    "baselines-pointmaze",
    "the point maze",
    "pointmaze-arena-demo",
    {
        "small": Size(
            # Those of floq's experiments: its arm is theirs (`fastflow experiment --reuse`).
            dict(SMALL.settings),
            SMALL.seeds,
            "2 CPU cores, an hour",
        )
    },
)

CUBE_DOUBLE = _baselines("baselines-cube-double", "cube-double", "cube-double-play", _paper("cube-double-play"))

ANTMAZE_GIANT = _baselines(
    "baselines-antmaze-giant",
    "antmaze-giant",
    "antmaze-giant-navigate",
    _paper("antmaze-giant-navigate"),
    Arm(
        "fql-resnet-published",
        "FQL-ResNet, published size",
        {"preset": "antmaze-giant-navigate/resnet-published"},
        agent="fql",
    ),
)
