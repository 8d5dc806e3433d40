"""FQL (Park et al., arXiv:2502.02538), the critic that floq replaces: one pass of a plain network per value.

    L(Q) = E[(Q_e(s, a) - y)^2],  y = r + discount mask agg_e Q'_e(s', a'),  a' = mu(s', n)

with a fresh action a' of the one-step policy per transition and the target network Q'. The actor is that of
`fastflow.agents.fql_actor`. floq's paper scales this critic to floq's compute in two ways, which are options here: a
residual network of more blocks (FQL-ResNet), and an ensemble of more members.

Letters: B batch, E members of the critic, O observation, A action.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

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
from fastflow.fields import MLP, ResidualMLP
from fastflow.flops import forward_flops, input_gradient_flops, training_flops
from fastflow.modules import ValueNetwork

__all__ = ["LOOP_PRESETS", "PRESETS", "FqlAgent", "FqlConfig", "FqlNoise", "flops", "preset_for"]


# Configuration ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FqlConfig(FqlActorConfig):
    """Every hyperparameter of FQL under its published name; defaults are the published ones.

    Raises:
        ValueError: a value outside its range. TypeError: a value of another type. Both name the field.
    """

    num_ensembles: int = 2
    """Members of the critic. Many of them are floq's monolithic ensemble."""
    value_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)
    """Hidden layers of the critic; use_resnets replaces them."""
    use_resnets: bool = False
    """A residual critic instead: one layer, then blocks whose output is added to their input (FQL-ResNet)."""
    block_width: int = 512
    """Width of the residual critic's layers."""
    block_depth: int = 4
    """Layers of each block."""
    num_transformations: int = 2
    """Number of blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_widths(self, "value_hidden_dims")
        least = dict.fromkeys(("num_ensembles", "block_width", "block_depth", "num_transformations"), 1)
        check_config(self, least, {}, {})

    @property
    def critic_hidden(self) -> tuple[int, ...]:
        """Widths of all hidden layers of the critic."""
        if self.use_resnets:
            return (self.block_width,) * (1 + self.block_depth * self.num_transformations)
        return self.value_hidden_dims


# The published settings: environment and dataset type -> (FQL's offline, what online fine-tuning changes). What is not
# listed is the default; all five tasks of an environment share a row. antmaze-giant and humanoidmaze-large have the
# batch of floq's reruns, which is floq's own (FQL's paper: 256). Without a number for online fine-tuning it is the
# offline one.
_PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "antmaze-large-navigate": ({"alpha": 10.0, "q_agg": "min"}, {}),
    "antmaze-giant-navigate": ({"alpha": 10.0, "discount": 0.995, "batch_size": 512, "q_agg": "min"}, {}),
    "humanoidmaze-medium-navigate": ({"alpha": 30.0, "discount": 0.995}, {"alpha": 100.0}),
    "humanoidmaze-large-navigate": ({"alpha": 30.0, "discount": 0.995, "batch_size": 512}, {"alpha": 40.0}),
    "antsoccer-arena-navigate": ({"alpha": 10.0, "discount": 0.995}, {"alpha": 30.0}),
    "cube-single-play": ({"alpha": 300.0}, {}),
    "cube-double-play": ({"alpha": 300.0}, {}),
    "scene-play": ({"alpha": 300.0}, {}),
    "puzzle-3x3-play": ({"alpha": 1000.0}, {}),
    "puzzle-4x4-play": ({"alpha": 1000.0}, {}),
}
# FQL-ResNet's published sizes. They cost less than floq's update: see `_MATCHED` for equal costs.
_PUBLISHED_RESNETS: dict[str, dict[str, Any]] = {
    "antmaze-giant-navigate": {"block_depth": 4, "num_transformations": 2},
    "humanoidmaze-large-navigate": {"alpha": 20.0, "block_depth": 2, "num_transformations": 4},
}
# (blocks of two layers, members) with which an update costs what floq's offline setting costs, by `python -m
# fastflow.flops`.
_MATCHED: dict[str, tuple[int, int]] = {
    "antmaze-large-navigate": (42, 55),
    "antmaze-giant-navigate": (42, 55),
    "humanoidmaze-medium-navigate": (44, 55),
    "humanoidmaze-large-navigate": (44, 55),
    "antsoccer-arena-navigate": (43, 55),
    "cube-single-play": (17, 22),
    "cube-double-play": (17, 22),
    "scene-play": (42, 55),
    "puzzle-3x3-play": (43, 55),
    "puzzle-4x4-play": (43, 55),
    DEMO_NAME: (4, 7),
}

_OFFLINE = {**{name: offline for name, (offline, _) in _PUBLISHED.items()}, DEMO_NAME: {**DEMO, "block_width": 64}}


def _resnet(name: str) -> dict[str, Any]:
    return {**_OFFLINE[name], "use_resnets": True, **_PUBLISHED_RESNETS.get(name, {})}


PRESETS: dict[str, dict[str, Any]] = {
    **_OFFLINE,
    **{f"{name}/online": {**offline, **online} for name, (offline, online) in _PUBLISHED.items()},
    **{f"{name}/resnet-published": _resnet(name) for name in _PUBLISHED_RESNETS},
    **{
        f"{name}/resnet": {**_resnet(name), "block_depth": 2, "num_transformations": blocks}
        for name, (blocks, _) in _MATCHED.items()
    },
    **{f"{name}/ensemble": {**_OFFLINE[name], "num_ensembles": members} for name, (_, members) in _MATCHED.items()},
}
"""Settings by name, as what differs from `FqlConfig()`. `<environment>-<dataset type>` is the published offline
setting, `/online` that of online fine-tuning. `/resnet` and `/ensemble` have as many residual blocks or members as make
an update cost what floq's costs (`fastflow.flops`); `/resnet-published` has the sizes of floq's authors."""

LOOP_PRESETS: dict[str, dict[str, Any]] = {name: DEMO_LOOP for name in PRESETS if name.startswith(DEMO_NAME)}
"""Defaults of the training loop that go with a preset; its general ones go with the published presets."""


def preset_for(env_name: str) -> str | None:
    """Name of the preset for an environment or dataset such as "cube-single-play-singletask-v0"; None if none fits."""
    return preset_name(env_name, _PUBLISHED)


# The agent ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class FqlNoise(FqlActorNoise):
    """All random numbers of one update."""

    next_action: Tensor
    """Gaussian, [B, A]: noise of the next action."""


class FqlAgent(FqlActorAgent):
    """FQL's networks, their training and the policy; see `fastflow.agents.fql_actor.FqlActorAgent` for arguments and
    use.

    The critic is `networks.critic`, its moving average `networks.target_critic`. Metrics under `critic/` are the loss,
    the mean, lowest and highest value of the batch and the mean target.
    """

    config_class = FqlConfig

    def _make_networks(self, generator: torch.Generator) -> FqlActorNetworks:
        config = self.config
        architecture = ResidualMLP(config.block_depth) if config.use_resnets else MLP()
        return plain_critics(self, generator, self.action_dim, config.critic_hidden, architecture)

    def sample_noise(self, batch: Mapping[str, Tensor], generator: torch.Generator | None = None) -> FqlNoise:
        """Fresh noise for one update on `batch`, from `generator` or the agent's own."""
        b = batch["actions"].shape[0]
        options = self._noise_options(generator)
        next_action, bc_noise, action = torch.randn(3, b, self.action_dim, **options)
        bc_time = torch.rand(b, **options)
        return FqlNoise(bc_noise=bc_noise, bc_time=bc_time, action=action, next_action=next_action)

    def _critic_loss(
        self, obs: Tensor, next_obs: Tensor, batch: Mapping[str, Tensor], noise: FqlNoise, direct: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config, networks = self.config, self.networks
        with torch.no_grad():
            next_action = networks.actor_onestep_flow(next_obs, noise.next_action)
            next_q = networks.target_critic(next_obs, next_action).squeeze(-1)  # [E, B]
            next_q = next_q.amin(0) if config.q_agg == "min" else next_q.mean(0)
            target = batch["rewards"] + config.discount * batch["masks"] * next_q
        critic_loss, q = self._fit_critic(obs, batch["actions"], target, direct)
        # What others follow from comes first: of numbers that are not finite, training names the first.
        return critic_loss, {
            "target_mean": target.mean(),
            "q_mean": q.mean(),
            "q_min": q.min(),
            "q_max": q.max(),
            "critic_loss": critic_loss,
        }


def plain_critics(
    agent: FqlActorAgent,
    generator: torch.Generator,
    beside: int,
    hidden: tuple[int, ...],
    architecture: MLP | ResidualMLP = MLP(),  # noqa: B008 (frozen)
) -> FqlActorNetworks:
    """The networks of an agent whose `critic`, and its `target_critic`, are one pass of an ensemble of plain networks.

    Args:
        agent: whose sizes and configuration they have.
        generator: of the weights.
        beside: numbers beside the observation, the action's included.
        hidden, architecture: of the critic.
    """
    config = agent.config

    def critic() -> ValueNetwork:
        return ValueNetwork(
            agent.obs_dim,
            beside,
            hidden=hidden,
            architecture=architecture,
            ensemble=config.num_ensembles,
            norm="layer" if config.layer_norm else None,
            backend=config.backend,
            precision=config.precision,
            device="meta",
            dtype=torch.float32,
        )

    critics = {"critic": critic(), "target_critic": critic()}
    return FqlActorNetworks(config, agent.obs_dim, agent.action_dim, critics, generator)


def flops(config: FqlConfig, obs_dim: int, action_dim: int) -> dict[str, int]:
    """Floating-point operations of one update by part, see `fastflow.flops`."""
    critic = (obs_dim + action_dim, *config.critic_hidden, 1)
    return plain_flops(config, obs_dim, action_dim, critic, config.num_ensembles * config.batch_size)


def plain_flops(
    config: FqlActorConfig, obs_dim: int, action_dim: int, critic: tuple[int, ...], rows: int
) -> dict[str, int]:
    """Those of an agent with `plain_critics`, whose critic of these widths sees so many rows, over all members."""
    onestep = (obs_dim + action_dim, *config.actor_hidden_dims, action_dim)
    return {
        "target": forward_flops(critic, rows),
        "next actions": forward_flops(onestep, config.batch_size),
        "critic": training_flops(critic, rows),
        "value of the policy": input_gradient_flops(critic, rows),
        "actor": actor_flops(config, obs_dim, action_dim),
    }
