"""One whole update of TD^2-CFM in JAX, as a JAX user would write it: see `td2_update`. Importing this needs jax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import jax_adam
from benchmarks.jax_network import array, velocity, walk
from benchmarks.td2_update import Td2Learner


class JaxTd2:
    """The field of `learner` as it is now, and its training in one `jax.jit` with donated state.

    Args:
        learner: whose parameters and case are taken; it is not changed.
        precision: of the matrix products, "fp32" or "bf16".
        unrolled: the walk unrolled in place of `lax.scan`.
    """

    def __init__(self, learner: Td2Learner, precision: str, unrolled: bool = False) -> None:
        self.case, self.unrolled = learner.case, unrolled
        self.v = velocity(learner.case.spec, precision)
        parameters = [array(p) for p in learner.field.parameter_list()]
        self.state: dict[str, Any] = {
            "parameters": parameters,
            "target": [array(p) for p in learner.target.parameter_list()],
            "adam": jax_adam.zeros(parameters),
            "key": jax.random.key(1),
        }
        self._update = jax.jit(self.step, donate_argnums=0)

    def update(self, batch: Mapping[str, Any], noise: tuple[Any, Any] | None = None) -> dict[str, Any]:
        """One update; its losses, perhaps not yet computed."""
        self.state, losses = self._update(self.state, batch, noise)
        return losses

    def step(
        self, state: dict[str, Any], batch: Mapping[str, Any], noise: tuple[Any, Any] | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The state behind one update, and its losses; draws x_0 and t where none are given."""
        case = self.case
        key, for_x, for_t = jax.random.split(state["key"], 3)
        if noise is None:
            b, d = batch["next_state"].shape
            noise = jax.random.normal(for_x, (b, d)), jax.random.uniform(for_t, (b,))
        parameters = state["parameters"]
        gradients, losses = jax.grad(self.loss, has_aux=True)(parameters, state["target"], batch, *noise)
        parameters, adam = jax_adam.step(parameters, gradients, state["adam"], case.lr, case.weight_decay)
        target = jax.tree.map(lambda t, p: t + case.tau * (p - t), state["target"], parameters)
        return {"parameters": parameters, "target": target, "adam": adam, "key": key}, losses

    def loss(
        self, parameters: Any, target: Any, batch: Mapping[str, Any], x_0: Any, t: Any
    ) -> tuple[Any, dict[str, Any]]:
        """The weighted loss, and all three."""
        case, v, times = self.case, self.v, t[:, None]
        x_1, next_cond = batch["next_state"], batch["next_cond"]
        predicted = v(parameters, (1 - times) * x_0 + times * x_1, t, batch["cond"])
        direct = jnp.square(predicted - (x_1 - x_0)).sum(-1).mean()
        x_t = walk(v, target, x_0, next_cond, case.num_steps, "midpoint", t, self.unrolled)
        goal = v(target, x_t, t, next_cond)
        bootstrap = jnp.square(v(parameters, x_t, t, batch["cond"]) - goal).sum(-1).mean()
        loss = (1 - case.gamma) * direct + case.gamma * bootstrap
        return loss, {"direct": direct, "bootstrap": bootstrap, "loss": loss}
