"""Adam in JAX as `torch.optim` computes it (Kingma and Ba, arXiv:1412.6980; AdamW: arXiv:1711.05101), on any tree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def zeros(parameters: Any) -> dict[str, Any]:
    """The state before the first step."""

    def moments() -> Any:
        return jax.tree.map(jnp.zeros_like, parameters)

    return {"first": moments(), "second": moments(), "count": jnp.zeros((), jnp.int32)}


def step(
    parameters: Any, gradients: Any, state: dict[str, Any], lr: float, weight_decay: float = 0.0
) -> tuple[Any, dict[str, Any]]:
    """Parameters and state behind one step; the decay is AdamW's, behind the gradient's back."""
    a, b, eps = 0.9, 0.999, 1e-8
    count = state["count"] + 1
    first = jax.tree.map(lambda m, g: a * m + (1 - a) * g, state["first"], gradients)
    second = jax.tree.map(lambda v, g: b * v + (1 - b) * g * g, state["second"], gradients)
    large, small = 1 - a**count, 1 - b**count
    parameters = jax.tree.map(
        lambda p, m, v: p * (1 - lr * weight_decay) - lr * (m / large) / (jnp.sqrt(v / small) + eps),
        parameters,
        first,
        second,
    )
    return parameters, {"first": first, "second": second, "count": count}
