"""Floating-point operations of one update, from the sizes of its networks: what "at matched FLOPs" means here.

Counted are the matrix products, two operations per multiplication and addition, as the published codes compute them:
every evaluation of a network anew, gradients by backpropagation. Every agent with FQL's actor has a function `flops`;
`python -m fastflow.flops` tables them on the sizes of the published environments.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["SIZES", "forward_flops", "input_gradient_flops", "main", "matched_fql", "training_flops", "update_flops"]

SIZES: dict[str, tuple[int, int]] = {
    "antmaze-large-navigate": (29, 8),
    "antmaze-giant-navigate": (29, 8),
    "humanoidmaze-medium-navigate": (69, 21),
    "humanoidmaze-large-navigate": (69, 21),
    "antsoccer-arena-navigate": (42, 8),
    "cube-single-play": (28, 5),
    "cube-double-play": (37, 5),
    "scene-play": (40, 5),
    "puzzle-3x3-play": (55, 5),
    "puzzle-4x4-play": (83, 5),
    "pointmaze-arena-demo": (2, 2),
}
"""(O, A), widths of observation and action, of the environment that a preset of floq is for."""


def forward_flops(widths: Sequence[int], rows: int) -> int:
    """Of Dense layers from `widths[0]` to `widths[-1]` on so many rows (over all members of an ensemble)."""
    return 2 * rows * _weights(widths)


def training_flops(widths: Sequence[int], rows: int) -> int:
    """The same with the gradients of all weights: another product per layer for them, and one for the layer's input
    except where that is the data."""
    return forward_flops(widths, rows) + 2 * rows * (2 * _weights(widths) - widths[0] * widths[1])


def input_gradient_flops(widths: Sequence[int], rows: int) -> int:
    """The same with the gradient of the input alone."""
    return 2 * forward_flops(widths, rows)


def _weights(widths: Sequence[int]) -> int:
    return sum(a * b for a, b in zip(widths[:-1], widths[1:], strict=True))


def update_flops(agent_name: str, config: Any, obs_dim: int, action_dim: int) -> dict[str, int]:
    """What one update costs.

    Args:
        agent_name: "floq", "fql", "fql-iqn" or "value-flows".
        config: of that agent. obs_dim, action_dim: O and A.

    Returns:
        Operations by part of the update.

    Raises:
        ValueError: an agent whose operations are not counted.
    """
    from fastflow import agents

    module = agents.module(agent_name)
    if not hasattr(module, "flops"):
        raise ValueError(f"update_flops: the operations of agent {agent_name!r} are not counted")
    return module.flops(config, obs_dim, action_dim)


def matched_fql(preset: str) -> tuple[int, int]:
    """(blocks, members): how many residual blocks of two layers, and how many members, FQL's critic needs so that an
    update costs what floq's costs with its preset of that name."""
    from fastflow.agents import floq, fql

    sizes = SIZES[preset]

    def cost(**changes: Any) -> int:
        config = dataclasses.replace(fql.FqlConfig(**fql.PRESETS[preset]), **changes)
        return sum(fql.flops(config, *sizes).values())

    # Costs of batches of different sizes are compared per transition: the number of updates is floq's anyway.
    config = floq.FloqConfig(**floq.PRESETS[preset])
    batch_size = fql.FqlConfig(**fql.PRESETS[preset]).batch_size
    goal = sum(floq.flops(config, *sizes).values()) * batch_size / config.batch_size
    found = []
    for change in (
        lambda n: {"use_resnets": True, "block_depth": 2, "num_transformations": n},
        lambda n: {"num_ensembles": n},
    ):
        one, two = cost(**change(1)), cost(**change(2))
        found.append(max(1, round(1 + (goal - one) / (two - one))))
    return found[0], found[1]


def main() -> int:
    """Prints the table of docs/baselines.md: GFLOP per update with the presets of each environment."""
    from fastflow import agents

    columns = (
        ("floq", "floq", ""),
        ("FQL", "fql", ""),
        ("FQL-ResNet", "fql", "/resnet"),
        ("its blocks", "fql", "/resnet"),
        ("FQL, ensemble", "fql", "/ensemble"),
        ("its members", "fql", "/ensemble"),
        ("FQL-IQN", "fql-iqn", ""),
        ("Value Flows", "value-flows", ""),
    )
    print("| environment | batch | " + " | ".join(title for title, _, _ in columns) + " |")
    print("|---" * (2 + len(columns)) + "|")
    for name, sizes in SIZES.items():
        cells = []
        for title, agent, suffix in columns:
            config = agents.config_class(agent)(**agents.module(agent).PRESETS[name + suffix])
            if title.startswith("its "):
                cells.append(str(config.num_transformations if suffix == "/resnet" else config.num_ensembles))
            else:
                cells.append(f"{sum(update_flops(agent, config, *sizes).values()) / 1e9:.4g}")
        print(f"| {name} | {config.batch_size} | " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
