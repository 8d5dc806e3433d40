"""One whole update of floq in JAX, as a JAX user would write it: one `jax.jit` over target walks, losses, gradients,
Adam and the moving average, the state donated, ensembles by vmap, noise drawn inside.

The mathematics is that of `fastflow.agents.floq` (arXiv:2509.06863), the parameters those of an agent of it, so that
the losses of both can be compared on the same noise. Importing this module needs jax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from torch import Tensor

from benchmarks import jax_adam
from benchmarks.jax_network import array, stack, velocity, walk
from fastflow.agents.floq import FloqAgent, FloqNoise

# Without noise on the targets, which the paper's experiments alone have.
NOISE = tuple(field.name for field in dataclasses.fields(FloqNoise) if field.name != "target")
BATCH = ("observations", "actions", "next_observations", "rewards", "masks")


class JaxFloq:
    """The networks of `agent` as they are now, and their training in JAX.

    Args:
        agent: whose parameters and configuration are taken; it is not changed.
        precision: of the matrix products of walks and flow losses: "fp32", or "bf16" with float32 sums.
        unrolled: walks unrolled in place of `lax.scan`.
        plain: precision of the plain networks beside them, "tf32" for JAX's default.

    Raises:
        ValueError: an agent with a schedule of the learning rate or observation statistics, which this has not.
    """

    def __init__(self, agent: FloqAgent, precision: str = "fp32", unrolled: bool = False, plain: str = "fp32") -> None:
        if agent.config.lr_decay_steps or agent.observation_mean is not None:
            raise ValueError("JaxFloq: agent must have a constant learning rate and raw observations")
        self.config, self.unrolled, self.plain = agent.config, unrolled, plain
        networks = agent.networks
        self.critic_spec, self.actor_spec = networks.floq.field.spec, networks.actor_bc_flow.field.spec
        self.noise_range, self.value_range = networks.floq.noise_range, networks.floq.value_range
        self.norms = {"critic": networks.critic.norm, "onestep": networks.actor_onestep_flow.norm}
        self.v = {
            "floq": velocity(self.critic_spec, precision),
            "actor": velocity(self.actor_spec, precision),
        }
        trained = {
            "floq": networks.floq.field,
            "critic": networks.critic.network,
            "actor": networks.actor_bc_flow.field,
            "onestep": networks.actor_onestep_flow.network,
        }
        parameters = {name: [array(p) for p in network.parameter_list()] for name, network in trained.items()}
        self.state: dict[str, Any] = {
            "parameters": parameters,
            "target": [array(p) for p in networks.target_floq.field.parameter_list()],
            "adam": jax_adam.zeros(parameters),
            "key": jax.random.key(agent.seed),
        }
        self._update = jax.jit(self.step, donate_argnums=0)

    def update(self, batch: Mapping[str, Any], noise: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One update on arrays as from `arrays`; its metrics, named as the agent's, perhaps not yet computed."""
        self.state, metrics = self._update(self.state, batch, noise)
        return metrics

    def step(
        self, state: dict[str, Any], batch: Mapping[str, Any], noise: Mapping[str, Any] | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The state behind one update, and its metrics; draws noise where none is given."""
        key, own = jax.random.split(state["key"])
        noise = self.draw(own, batch) if noise is None else noise
        parameters = state["parameters"]
        gradients, metrics = jax.grad(self.loss, has_aux=True)(parameters, state["target"], batch, noise)
        # The target follows the weights from before this update, as in the published code.
        tau = self.config.tau
        target = jax.tree.map(lambda t, p: t + tau * (p - t), state["target"], parameters["floq"])
        parameters, adam = jax_adam.step(parameters, gradients, state["adam"], self.config.lr)
        return {"parameters": parameters, "target": target, "adam": adam, "key": key}, metrics

    def draw(self, key: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Fresh noise, shaped as `FloqNoise` tells."""
        (b, a), s = batch["actions"].shape, self.config.noise_samples
        keys = dict(zip(NOISE, jax.random.split(key, len(NOISE))))
        normal, uniform = {"next_action": (b, s, a), "bc_noise": (b, a), "action": (b, a)}, {"bc_time": (b,)}
        uniform |= dict.fromkeys(("target_start", "start", "time"), (b, s))
        return {name: jax.random.normal(keys[name], shape) for name, shape in normal.items()} | {
            name: jax.random.uniform(keys[name], shape) for name, shape in uniform.items()
        }

    def loss(
        self, parameters: dict[str, Any], target: Any, batch: Mapping[str, Any], noise: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """The critics' and the actors' loss, added, and the metrics."""
        critic_loss, critic = self.critic_loss(parameters, target, batch, noise)
        actor_loss, actor = self.actor_loss(parameters, batch, noise)
        metrics = {f"critic/{name}": value for name, value in critic.items()}
        return critic_loss + actor_loss, metrics | {f"actor/{name}": value for name, value in actor.items()}

    def critic_loss(
        self, parameters: dict[str, Any], target: Any, batch: Mapping[str, Any], noise: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Flow matching towards the bootstrapped value, and the plain critic's distillation (floq, section 4)."""
        config = self.config
        obs, actions = batch["observations"], batch["actions"]
        b, s = noise["start"].shape
        cond = jnp.repeat(jnp.concatenate([obs, actions], -1), s, axis=0)
        next_obs = jnp.repeat(batch["next_observations"], s, axis=0)
        next_actions = self.onestep(parameters["onestep"], next_obs, noise["next_action"].reshape(b * s, -1))
        next_cond = jnp.concatenate([next_obs, jnp.clip(next_actions, -1, 1)], -1)
        start = self.start(noise["start"]).reshape(b * s, 1)
        target_q = self.values(target, self.start(noise["target_start"]).reshape(b * s, 1), next_cond)
        q = self.values(parameters["floq"], start, cond)
        target_q, q = (jax.lax.stop_gradient(x).reshape(-1, b, s) for x in (target_q, q))
        next_q = (target_q.min(0) if config.q_agg == "min" else target_q.mean(0)).mean(-1)
        goal = batch["rewards"] + config.discount * batch["masks"] * next_q
        value, walks = q.mean((0, 2)), jnp.stack([target_q, q])
        t = (jnp.zeros_like(noise["time"]) if config.train_at_zero_only else noise["time"]).reshape(-1)
        x_1 = jnp.repeat(goal, s)[:, None]
        x_t = (1 - t[:, None]) * start + t[:, None] * x_1
        v = jax.vmap(self.v["floq"], (0, None, None, None))(parameters["floq"], x_t, t, cond)
        floq_loss = s * jnp.square(v - (x_1 - start)).mean()
        distill_loss = jnp.square(self.critic(parameters["critic"], obs, actions) - value).mean()
        critic_loss = floq_loss + distill_loss
        return critic_loss, {
            "critic_loss": critic_loss,
            "floq_loss": floq_loss,
            "distill_loss": distill_loss,
            "q_mean": value.mean(),
            "q_min": value.min(),
            "q_max": value.max(),
            "target_mean": goal.mean(),
            "var_flow_returns": q.var(2).mean(),
            "td_error": jnp.abs(goal - value).mean(),
            "outside_range": (jnp.clip(walks, *self.value_range) != walks).mean(),
        }

    def actor_loss(
        self, parameters: dict[str, Any], batch: Mapping[str, Any], noise: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Behaviour cloning by flow matching, distillation and the value term (FQL, arXiv:2502.02538)."""
        config, v = self.config, self.v["actor"]
        obs, actions, x_0 = batch["observations"], batch["actions"], noise["bc_noise"]
        t = noise["bc_time"][:, None]
        predicted = v(parameters["actor"], (1 - t) * x_0 + t * actions, t[:, 0], obs)
        bc_flow_loss = jnp.square(predicted - (actions - x_0)).mean()
        flow = walk(v, parameters["actor"], noise["action"], obs, config.flow_steps, unrolled=self.unrolled)
        flow_action = jax.lax.stop_gradient(jnp.clip(flow, -1, 1))
        action = self.onestep(parameters["onestep"], obs, noise["action"])
        distill_loss = jnp.square(action - flow_action).mean()
        frozen = jax.lax.stop_gradient(parameters["critic"])
        q = self.critic(frozen, obs, jnp.clip(action, -1, 1)).mean(0)
        q_mean = q.mean()
        q_loss = -q_mean
        if config.normalize_q_loss:
            q_loss = q_loss / jax.lax.stop_gradient(jnp.abs(q).mean())
        actor_loss = bc_flow_loss + config.alpha * distill_loss + q_loss
        return actor_loss, {
            "actor_loss": actor_loss,
            "bc_flow_loss": bc_flow_loss,
            "distill_loss": distill_loss,
            "q_loss": q_loss,
            "q": q_mean,
        }

    def start(self, u: Any) -> Any:
        """Starts of walks for uniform draws."""
        low, high = self.noise_range
        return (1 - u) * low + u * high

    def values(self, parameters: Any, x_0: Any, cond: Any) -> Any:
        """Ends of the critic's walks, [E, N, 1]."""

        def one(member: Any) -> Any:
            return walk(self.v["floq"], member, x_0, cond, self.config.critic_flow_steps, unrolled=self.unrolled)

        return jax.vmap(one)(parameters)

    def critic(self, parameters: Any, obs: Any, actions: Any) -> Any:
        """The distilled critic, [E, N]."""
        x = jnp.concatenate([obs, actions], -1)

        def one(member: Any) -> Any:
            return stack(member, x, "gelu_tanh", self.norms["critic"], precision=self.plain)

        return jax.vmap(one)(parameters)[..., 0]

    def onestep(self, parameters: Any, obs: Any, noise: Any) -> Any:
        """The one-step policy's raw output, [N, A]."""
        x = jnp.concatenate([obs, noise], -1)
        return stack(parameters, x, "gelu_tanh", self.norms["onestep"], precision=self.plain)


def arrays(tensors: Mapping[str, Tensor] | FloqNoise) -> dict[str, Any]:
    """A batch or the noise of one update as JAX takes it."""
    if isinstance(tensors, FloqNoise):
        return {name: array(getattr(tensors, name)) for name in NOISE}
    return {name: array(tensors[name]) for name in BATCH}
