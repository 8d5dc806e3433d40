"""FQL-IQN: FQL's actor with an implicit quantile critic (Dabney et al., arXiv:1806.06923), as floq's paper compares it.

The critic Z(tau | s, a) tells the value that the return stays below with probability tau. For N levels tau_i of the
loss and N levels tau'_j of the target, all uniform,

    y_j = r + discount mask agg_e Z'_e(tau'_j | s', a'),  a' = mu(s', n),  u_eij = y_j - Z_e(tau_i | s, a)
    L(Z) = mean over e, i, j of |tau_i - 1[u_eij < 0]| rho(u_eij) / kappa

The published baseline has rho(u) = u^2, by which Z is an expectile; `quantile_loss="huber"` is IQN's Huber loss with
threshold kappa. The network is a plain one of [s, a, cos(i pi tau) for i = 1, 2, ...]: floq's authors did not take
IQN's product of embeddings. A value is the mean over members and N fresh levels.

Not told by the published material, and chosen here: one next action per transition, as in FQL, and the same number of
levels for loss, target and value.

Letters: B batch, E members of the critic, N levels, O observation, A action.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fastflow import reference
from fastflow.agents import fql
from fastflow.agents.checks import check_config, check_widths
from fastflow.agents.fql_actor import (
    DEMO,
    DEMO_LOOP,
    DEMO_NAME,
    FqlActorAgent,
    FqlActorConfig,
    FqlActorNetworks,
    FqlActorNoise,
    preset_name,
)
from fastflow.modules import ValueNetwork

__all__ = [
    "LOOP_PRESETS",
    "PRESETS",
    "FqlIqnAgent",
    "FqlIqnConfig",
    "FqlIqnNoise",
    "flops",
    "preset_for",
    "quantile_loss",
]


# Configuration ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FqlIqnConfig(FqlActorConfig):
    """Every hyperparameter of FQL-IQN; defaults are those of floq's paper.

    Raises:
        ValueError: a value outside its range. TypeError: a value of another type. Both name the field.
    """

    num_ensembles: int = 2
    """Members of the critic."""
    value_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)
    """Hidden layers of the critic."""
    num_quantiles: int = 8
    """N: levels tau per transition, in the loss, in the target and in a value."""
    quantile_embed_dim: int = 64
    """Number of features cos(i pi tau) of a level."""
    kappa: float = 1.0
    """The loss is divided by it; with quantile_loss huber also the error at which it turns linear."""
    quantile_loss: Literal["squared", "huber"] = "squared"
    """Error that is weighed: its square, as published, or its Huber loss, as in IQN."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_widths(self, "value_hidden_dims")
        check_config(
            self,
            dict.fromkeys(("num_ensembles", "num_quantiles", "quantile_embed_dim"), 1),
            {"kappa": (lambda x: x > 0, "a positive number")},
            {"quantile_loss": ("squared", "huber")},
        )


# floq's authors give a command for antmaze-giant alone, which has FQL's alpha, discount, batch and aggregation; so have
# the others here.
_PUBLISHED = tuple(name for name in fql.PRESETS if "/" not in name and name != DEMO_NAME)

PRESETS: dict[str, dict[str, Any]] = {**{name: fql.PRESETS[name] for name in _PUBLISHED}, DEMO_NAME: DEMO}
"""Settings by name, as what differs from `FqlIqnConfig()`: FQL's of each environment."""

LOOP_PRESETS: dict[str, dict[str, Any]] = {DEMO_NAME: DEMO_LOOP}
"""Defaults of the training loop that go with a preset; its general ones go with the published presets."""


def preset_for(env_name: str) -> str | None:
    """Name of the preset for an environment or dataset such as "cube-single-play-singletask-v0"; None if none fits."""
    return preset_name(env_name, _PUBLISHED)


# The agent ----------------------------------------------------------------------------------------------------------


def quantile_loss(quantiles: Tensor, targets: Tensor, tau: Tensor, kappa: float = 1.0, kind: str = "squared") -> Tensor:
    """Mean of |tau_i - 1[u_ij < 0]| rho(u_ij) / kappa with u_ij = targets_j - quantiles_i.

    Args:
        quantiles: [..., B, N], of the levels tau. targets: [B, M], without gradient. tau: [B, N].
        kappa, kind: rho(u) is u^2 for "squared"; for "huber" u^2 / 2 up to |u| = kappa, then kappa (|u| - kappa / 2).

    Returns:
        0-d.
    """
    error = targets.unsqueeze(-2) - quantiles.unsqueeze(-1)  # [..., B, N, M]
    if kind == "squared":
        rho = error.square()
    else:
        inner = error.abs().clamp_max(kappa)
        rho = inner * (error.abs() - 0.5 * inner)
    weight = (tau.unsqueeze(-1) - (error < 0).to(tau.dtype)).abs()
    return (weight * rho).mean() / kappa


@dataclasses.dataclass
class FqlIqnNoise(FqlActorNoise):
    """All random numbers of one update."""

    next_action: Tensor
    """Gaussian, [B, A]: noise of the next action."""
    tau: Tensor
    """Uniform, [B, N]: levels of the loss."""
    next_tau: Tensor
    """Uniform, [B, N]: levels of the target."""
    value_tau: Tensor
    """Uniform, [B, N]: levels of the value that the actor climbs."""


class FqlIqnAgent(FqlActorAgent):
    """FQL-IQN's networks, their training and the policy; see `fastflow.agents.fql_actor.FqlActorAgent` for arguments
    and use.

    The critic is `networks.critic`, its moving average `networks.target_critic`. Metrics under `critic/` are the loss,
    the mean, lowest and highest value of the batch, the mean target and the standard deviation over levels.
    """

    config_class = FqlIqnConfig

    def _make_networks(self, generator: torch.Generator) -> FqlActorNetworks:
        # What stands beside the observation: the action and the features of a level.
        beside = self.action_dim + self.config.quantile_embed_dim
        return fql.plain_critics(self, generator, beside, self.config.value_hidden_dims)

    def sample_noise(self, batch: Mapping[str, Tensor], generator: torch.Generator | None = None) -> FqlIqnNoise:
        """Fresh noise for one update on `batch`, from `generator` or the agent's own."""
        b, n = batch["actions"].shape[0], self.config.num_quantiles
        options = self._noise_options(generator)
        next_action, bc_noise, action = torch.randn(3, b, self.action_dim, **options)
        tau, next_tau, value_tau, bc_time = torch.rand((3 * n + 1) * b, **options).split((n * b, n * b, n * b, b))
        return FqlIqnNoise(
            bc_noise=bc_noise,
            bc_time=bc_time,
            action=action,
            next_action=next_action,
            tau=tau.view(b, n),
            next_tau=next_tau.view(b, n),
            value_tau=value_tau.view(b, n),
        )

    def _quantiles(
        self, critic: ValueNetwork, obs: Tensor, action: Tensor, tau: Tensor, *, frozen: bool = False
    ) -> Tensor:
        """Z(tau | obs, action), [E, B, N], for levels [B, N]."""
        features = reference.cosine_fourier(tau, self.config.quantile_embed_dim)
        lead = tau.shape
        beside = torch.cat((action.unsqueeze(1).expand(*lead, -1), features), -1)
        return critic(obs.unsqueeze(1).expand(*lead, -1), beside, frozen=frozen).squeeze(-1)

    def _critic_loss(
        self, obs: Tensor, next_obs: Tensor, batch: Mapping[str, Tensor], noise: FqlIqnNoise, direct: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config, networks = self.config, self.networks
        with torch.no_grad():
            next_action = networks.actor_onestep_flow(next_obs, noise.next_action)
            next_z = self._quantiles(networks.target_critic, next_obs, next_action, noise.next_tau)
            next_z = next_z.amin(0) if config.q_agg == "min" else next_z.mean(0)
            targets = batch["rewards"].unsqueeze(1) + config.discount * batch["masks"].unsqueeze(1) * next_z
        z = self._quantiles(networks.critic, obs, batch["actions"], noise.tau)
        critic_loss = quantile_loss(z, targets, noise.tau, config.kappa, config.quantile_loss)
        q = z.mean(-1)
        # What others follow from comes first: of numbers that are not finite, training names the first.
        return critic_loss, {
            "target_mean": targets.mean(),
            "q_mean": q.mean(),
            "q_min": q.min(),
            "q_max": q.max(),
            "q_std": z.std(-1, correction=0).mean(),
            "critic_loss": critic_loss,
        }

    def _value(self, obs: Tensor, action: Tensor, noise: FqlIqnNoise) -> Tensor:
        z = self._quantiles(self.networks.critic, obs, action, noise.value_tau, frozen=True)
        return z.mean((0, 2)).unsqueeze(-1)


def flops(config: FqlIqnConfig, obs_dim: int, action_dim: int) -> dict[str, int]:
    """Floating-point operations of one update by part, see `fastflow.flops`."""
    critic = (obs_dim + action_dim + config.quantile_embed_dim, *config.value_hidden_dims, 1)
    levels = config.num_ensembles * config.batch_size * config.num_quantiles
    return fql.plain_flops(config, obs_dim, action_dim, critic, levels)
