"""Value Flows (Dong, Zheng et al., arXiv:2510.07650): a critic that is a flow over returns, one sample per walk.

The field v(z, t | s, a) carries Gaussian noise to the distribution of the return: the end of a walk is one possible
return, where all of floq's walks lead to the mean. With psi(n, t | s, a) the walk from n to t, each step clipped to the
range of returns, agg over members, primes for the target network, and the same noise n and time t in both losses,

    BCFM: x_1 = r + discount mask agg psi'(n, 1 | s', a');  regress v((1 - t) n + t x_1, t | s, a) on x_1 - n
    DCFM: z'  = agg psi'(n, t | s', a');  regress v(r + discount mask z', t | s, a) on agg v'(z', t | s', a')
    L(v) = E[w (bcfm_lambda BCFM + dcfm_lambda DCFM)]
    w = sigmoid(-confidence_weight_temp / |d psi'(n_w, 1 | s, a) / d n_w|) + 1/2

with sums over the members; DCFM takes over the velocity at the next state without the discount, as published. The
derivative of a walk estimates the spread of the return: where that is small, a transition counts less. A value is read
in one step, Q(s, a) = agg n + v(n, 0 | s, a).

The policy is the best of `num_samples` actions of the behaviour-cloning flow by that value ("rs", as published
offline), or the one-step policy ("rpg", as published online); both are trained.

What is left out or differs from the published code: the actor is that of all agents here (`fastflow.agents.fql_actor`),
which clips actions at the end of the flow, not behind every step, and compares the one-step policy with it before
clipping; there are no image encoders; the range of rewards contains 0, as for floq. The two critics are one ensemble.

Letters: B batch, E members of the critic, N actions to choose from, O observation, A action.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fastflow import ops
from fastflow.agents import floq
from fastflow.agents.checks import check_config, check_widths
from fastflow.agents.fql_actor import (
    DEMO,
    DEMO_LOOP,
    DEMO_NAME,
    FqlActorAgent,
    FqlActorConfig,
    FqlActorNetworks,
    FqlActorNoise,
    actor_flops,
    preset_name,
)
from fastflow.fields import Identity, RawTime
from fastflow.flops import forward_flops, input_gradient_flops, training_flops
from fastflow.modules import FlowCritic

__all__ = [
    "LOOP_PRESETS",
    "PRESETS",
    "ValueFlowsAgent",
    "ValueFlowsConfig",
    "ValueFlowsNoise",
    "flops",
    "preset_for",
]


# Configuration ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ValueFlowsConfig(FqlActorConfig):
    """Every hyperparameter of Value Flows under its published name; defaults are the published ones.

    Raises:
        ValueError: a value outside its range. TypeError: a value of another type. Both name the field.
    """

    actor_layer_norm: bool = True
    """LayerNorm in both actors."""
    num_ensembles: int = 2
    """Members of the critic."""
    value_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)
    """Hidden layers of the critic's field."""
    critic_flow_steps: int = 10
    """K: Euler steps of the critic's walks (in the published code one number with flow_steps: num_flow_steps)."""
    ret_agg: Literal["mean", "min"] = "mean"
    """How the members' returns, and their velocities at them, are combined in the targets. q_agg combines values."""
    clip_flow_returns: bool = True
    """Keep walks and values in the range of returns, (r_min, r_max) / (1 - discount)."""
    confidence_weight_temp: float = 0.3
    """Temperature of the weight of a transition."""
    bcfm_lambda: float = 1.0
    """Weight of the bootstrapped flow-matching loss."""
    dcfm_lambda: float = 1.0
    """Weight of the distributional flow-matching loss."""
    policy_extraction: Literal["rs", "rpg"] = "rs"
    """rs: the best of num_samples actions of the behaviour-cloning flow; rpg: the one-step policy, as FQL and floq."""
    num_samples: int = 16
    """N: actions to choose from with rs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_widths(self, "value_hidden_dims")
        not_negative = (lambda x: x >= 0, "at least 0")
        check_config(
            self,
            dict.fromkeys(("num_ensembles", "critic_flow_steps", "num_samples"), 1),
            {
                "confidence_weight_temp": (lambda x: x > 0, "a positive number"),
                "bcfm_lambda": not_negative,
                "dcfm_lambda": not_negative,
            },
            {"ret_agg": ("mean", "min"), "policy_extraction": ("rs", "rpg")},
        )


# The paper's settings of its OGBench state tasks.
_PAPER: dict[str, dict[str, Any]] = {
    "cube-double-play": {"discount": 0.995, "confidence_weight_temp": 3.0},
    "cube-triple-play": {"discount": 0.995, "bcfm_lambda": 3.0, "confidence_weight_temp": 0.03},
    "scene-play": {"ret_agg": "min"},
    "puzzle-3x3-play": {"bcfm_lambda": 0.5, "ret_agg": "min"},
    "puzzle-4x4-play": {"bcfm_lambda": 3.0, "confidence_weight_temp": 100.0, "q_agg": "min"},
}
# It has none for floq's other environments: floq's alpha, discount, batch and aggregation there, and the defaults.
_SHARED = ("alpha", "discount", "batch_size", "q_agg")
_OTHERS = {
    name: {key: value for key, value in settings.items() if key in _SHARED}
    for name, settings in floq.PRESETS.items()
    if "/" not in name and name != DEMO_NAME and name not in _PAPER
}

PRESETS: dict[str, dict[str, Any]] = {
    **_PAPER,
    **_OTHERS,
    # The one-step policy, so that nothing but the critic differs from floq's demo.
    DEMO_NAME: {**DEMO, "actor_layer_norm": False, "policy_extraction": "rpg"},
}
"""Settings by name, as what differs from `ValueFlowsConfig()`: the paper's offline ones for cube-double, cube-triple,
scene, puzzle-3x3 and puzzle-4x4; for the other environments, which the paper has no number for, floq's."""

LOOP_PRESETS: dict[str, dict[str, Any]] = {DEMO_NAME: DEMO_LOOP}
"""Defaults of the training loop that go with a preset; its general ones go with the published presets."""


def preset_for(env_name: str) -> str | None:
    """Name of the preset for an environment or dataset such as "cube-double-play-singletask-v0"; None if none fits."""
    return preset_name(env_name, {**_PAPER, **_OTHERS})


# The agent ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class ValueFlowsNoise(FqlActorNoise):
    """All random numbers of one update."""

    next_action: Tensor
    """Gaussian, [B, N, A]: noise of the next actions to choose from; N = 1 for the one-step policy."""
    next_value: Tensor
    """Gaussian, [B, N]: noise of their values."""
    confidence: Tensor
    """Gaussian, [B]: start of the walks whose derivative is the weight."""
    start: Tensor
    """Gaussian, [B]: start of both losses' walks."""
    time: Tensor
    """Uniform, [B]: their time."""
    value: Tensor
    """Gaussian, [B]: noise of the values that the actor climbs."""


class ValueFlowsAgent(FqlActorAgent):
    """Value Flows' networks, their training and the policy; see `fastflow.agents.fql_actor.FqlActorAgent` for arguments
    and use.

    The critic is `networks.critic_flow`, its moving average `networks.target_critic_flow`. Metrics under `critic/` are
    the losses, the mean, lowest and highest return that the targets lead to, the estimated spread of the return and the
    mean weight.
    """

    config_class = ValueFlowsConfig
    # The weight is a derivative, which torch.compile does not follow within a loss.
    compiles = False

    def _make_networks(self, generator: torch.Generator) -> FqlActorNetworks:
        config = self.config
        horizon = 1 / (1 - config.discount)
        low, high = (horizon * r for r in self.reward_range)
        self.return_range = (low, high)

        def critic() -> FlowCritic:
            return FlowCritic(
                self.obs_dim,
                self.action_dim,
                value_range=self.return_range,
                # Starts as they are drawn: Gaussian, where floq scales uniform ones.
                noise_range=(0.0, 1.0),
                hidden=config.value_hidden_dims,
                ensemble=config.num_ensembles,
                num_steps=config.critic_flow_steps,
                state_embedding=Identity(),
                time_embedding=RawTime(),
                norm="layer" if config.layer_norm else None,
                backend=config.backend,
                precision=config.precision,
                device="meta",
                dtype=torch.float32,
            )

        critics = {"critic_flow": critic(), "target_critic_flow": critic()}
        return FqlActorNetworks(config, self.obs_dim, self.action_dim, critics, generator)

    def sample_noise(self, batch: Mapping[str, Tensor], generator: torch.Generator | None = None) -> ValueFlowsNoise:
        """Fresh noise for one update on `batch`, from `generator` or the agent's own."""
        b, a = batch["actions"].shape[0], self.action_dim
        n = self.config.num_samples if self.config.policy_extraction == "rs" else 1
        options = self._noise_options(generator)
        next_action, bc_noise, action = torch.randn((n + 2) * b, a, **options).split((n * b, b, b))
        next_value, confidence, start, value = torch.randn((n + 3) * b, **options).split((n * b, b, b, b))
        time, bc_time = torch.rand(2, b, **options)
        return ValueFlowsNoise(
            bc_noise=bc_noise,
            bc_time=bc_time,
            action=action,
            next_action=next_action.view(b, n, a),
            next_value=next_value.view(b, n),
            confidence=confidence,
            start=start,
            time=time,
            value=value,
        )

    # The critic -----------------------------------------------------------------------------------------------------

    def _critic_loss(
        self, obs: Tensor, next_obs: Tensor, batch: Mapping[str, Tensor], noise: ValueFlowsNoise, direct: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config, critic, actions = self.config, self.networks.critic_flow, batch["actions"]
        options = {"reduction": "none", "backend": config.backend, "precision": config.precision}
        # One sample per row, but with its S axis: else as many rows as members could not be told apart.
        cond, start, time = torch.cat((obs, actions), -1), noise.start.unsqueeze(1), noise.time.unsqueeze(1)
        with torch.no_grad():
            next_cond = torch.cat((next_obs, self._choose(next_obs, noise.next_action, noise.next_value)), -1)
            # Both walks of the target are one: to t = 1 and to t.
            ends = torch.cat((torch.ones_like(time), time), 1)
            z = self._combine(self._walk(start.expand(-1, 2), ends, next_cond), config.ret_agg)  # [B, 2]
            next_return, z_t = z[:, :1], z[:, 1:]
            velocity = self.networks.target_critic_flow.field(self._starts(z_t), time, next_cond.unsqueeze(1))
            velocity = self._combine(velocity, config.ret_agg)  # [B, 1, 1]
            reward, discount = batch["rewards"].unsqueeze(1), config.discount * batch["masks"].unsqueeze(1)
            returns = reward + discount * next_return
        spread = self._combine(self._spread(noise.confidence, cond), config.q_agg)
        weight = torch.sigmoid(-config.confidence_weight_temp / spread) + 0.5
        # Sums over the members, [B].
        x_1 = returns.unsqueeze(-1)
        bcfm = ops.flow_matching_loss(critic.field, self._starts(start), x_1, time, cond, **options).sum((0, 2))
        x_t = self._starts(reward + discount * z_t)
        dcfm = ops.velocity_matching_loss(critic.field, x_t, time, velocity, cond, **options).sum((0, 2))
        critic_loss = (weight * (config.bcfm_lambda * bcfm + config.dcfm_lambda * dcfm)).mean()
        # What others follow from comes first: of numbers that are not finite, training names the first.
        return critic_loss, {
            "return_mean": returns.mean(),
            "return_min": returns.min(),
            "return_max": returns.max(),
            "q_std": spread.mean(),
            "weight": weight.mean(),
            "bcfm_loss": bcfm.mean(),
            "dcfm_loss": dcfm.mean(),
            "critic_loss": critic_loss,
        }

    def _walk(self, start: Tensor, end: Tensor, cond: Tensor) -> Tensor:
        """The target's walks from `start` [B, S] to the times `end` [B, S], each step clipped. [E, B, S]."""
        z, steps = self._starts(start), self.config.critic_flow_steps
        for k in range(steps):
            z = self._clip(self._step(z, end * (k / steps), end * ((k + 1) / steps), cond))
        return z.squeeze(-1)

    def _step(self, z: Tensor, t_0: Tensor | float, t_1: Tensor | float, cond: Tensor) -> Tensor:
        config = self.config
        return ops.integrate(
            self.networks.target_critic_flow.field,
            z,
            cond,
            num_steps=1,
            t_0=t_0,
            t_1=t_1,
            backend=config.backend,
            precision=config.precision,
        )

    @torch.enable_grad()
    def _spread(self, start: Tensor, cond: Tensor) -> Tensor:
        """|d psi / d n| of the target's walks from `start` [B], without gradient, [E, B]: the product over the steps of
        1 + h dv/dz, clipping left out as in the published code."""
        z, steps = self._starts(start.unsqueeze(1)), self.config.critic_flow_steps
        derivative = torch.ones_like(z)
        for k in range(steps):
            z = z.detach().requires_grad_()
            z_next = self._step(z, k / steps, (k + 1) / steps, cond)
            # Rows do not meet: the gradient of their sum is each row's own derivative.
            derivative = derivative * torch.autograd.grad(z_next.sum(), z)[0]
            z = self._clip(z_next)
        return derivative.abs().flatten(1)

    def _starts(self, x: Tensor) -> Tensor:
        """Returns [B, S] as the flow state of every member, [E, B, S, 1]."""
        return x.expand(self.config.num_ensembles, *x.shape).unsqueeze(-1)

    def _clip(self, returns: Tensor) -> Tensor:
        return returns.clamp(*self.return_range) if self.config.clip_flow_returns else returns

    @staticmethod
    def _combine(x: Tensor, how: str) -> Tensor:
        return x.amin(0) if how == "min" else x.mean(0)

    # The policy -----------------------------------------------------------------------------------------------------

    def _q(self, obs: Tensor, action: Tensor, noise: Tensor) -> Tensor:
        """Values [...] of obs [..., O] and action [..., A], read in one step from Gaussian noise [...]; gradients reach
        the action and no parameter."""
        critic = self.networks.critic_flow
        parameters = {name: p.detach() for name, p in critic.named_parameters()}
        given = (obs, action, noise.unsqueeze(-1))
        q = torch.func.functional_call(critic, parameters, given, {"num_steps": 1})
        return self._combine(self._clip(q), self.config.q_agg).squeeze(-1)

    def _choose(self, obs: Tensor, action_noise: Tensor, value_noise: Tensor) -> Tensor:
        """The policy's actions [B, A] for obs [B, O], from noise [B, N, A] and [B, N]."""
        if self.config.policy_extraction == "rpg":
            return self.networks.actor_onestep_flow(obs, action_noise[:, 0])
        obs = obs.unsqueeze(1).expand(*value_noise.shape, -1)
        actions = self.networks.actor_bc_flow(obs, action_noise)
        best = self._q(obs, actions, value_noise).argmax(1)
        return actions.take_along_dim(best[:, None, None], 1).squeeze(1)

    def _value(self, obs: Tensor, action: Tensor, noise: ValueFlowsNoise) -> Tensor:
        return self._q(obs, action, noise.value).unsqueeze(-1)

    @torch.no_grad()
    def act(self, observations: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Actions [N, A] in [-1, 1] for observations [N, O]: the policy that `policy_extraction` names, on fresh noise
        from `generator`, or from the agent's own.

        Raises:
            ValueError, TypeError: observations of another shape, dtype or device.
        """
        if self.config.policy_extraction == "rpg":
            return super().act(observations, generator)
        self._check("observations", observations, (None, self.obs_dim))
        shape = (observations.shape[0], self.config.num_samples)
        options = self._noise_options(generator)
        action_noise = torch.randn(*shape, self.action_dim, **options)
        return self._choose(self._normalize(observations), action_noise, torch.randn(shape, **options))


def flops(config: ValueFlowsConfig, obs_dim: int, action_dim: int) -> dict[str, int]:
    """Floating-point operations of one update by part, see `fastflow.flops`."""
    rows, cond = config.batch_size, obs_dim + action_dim
    field = (cond + 2, *config.value_hidden_dims, 1)
    members, steps = config.num_ensembles * rows, config.critic_flow_steps
    if config.policy_extraction == "rs":
        flow = (cond + 1, *config.actor_hidden_dims, action_dim)
        choices = config.num_samples
        chosen = forward_flops(flow, choices * config.flow_steps * rows) + forward_flops(field, choices * members)
    else:
        chosen = forward_flops((cond, *config.actor_hidden_dims, action_dim), rows)
    return {
        "target": forward_flops(field, (2 * steps + 1) * members),
        "confidence": input_gradient_flops(field, steps * members),
        "next actions": chosen,
        "critic": 2 * training_flops(field, members),
        "value of the policy": input_gradient_flops(field, members),
        "actor": actor_flops(config, obs_dim, action_dim),
    }
