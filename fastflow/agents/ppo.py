"""PPO (Schulman et al., arXiv:1707.06347) with a Gaussian policy: what flow policies are compared with, in the same
harness and with equal care."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastflow.agents.checks import check_config
from fastflow.agents.on_policy import PLAYGROUND, ActorLoss, OnPolicyAgent, OnPolicyConfig
from fastflow.fields import DenseStack
from fastflow.modules import _Plain

__all__ = ["LOOP_PRESETS", "PRESETS", "GaussianPolicy", "PpoAgent", "PpoConfig", "preset_for"]


@dataclasses.dataclass(frozen=True)
class PpoConfig(OnPolicyConfig):
    """Hyperparameters of PPO.

    Raises:
        ValueError: a value outside its range. TypeError: a value of another type. Both name the field.
    """

    variance: Literal["learned", "fixed"] = "learned"
    """Of the Gaussian: one learnt number per dimension of the action, the same in all states; or fixed."""
    init_std: float = 1.0
    """Standard deviation at the beginning (GridWorld's baseline: a fixed variance of 0.5)."""
    head_scale: float = 0.01
    """Initial weights of the mean's last layer are multiplied by this, so that all actions begin around zero."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = (lambda x: x > 0, "a positive number")
        ranges = {"init_std": positive, "head_scale": positive}
        check_config(self, {}, ranges, {"variance": ("learned", "fixed")})


PRESETS: dict[str, dict[str, Any]] = {
    # Ours, for two CPU cores: 16 environments of 128 steps.
    "cpu": {},
    "pendulum": {"lr": 3e-4, "clip": 0.1, "gamma": 0.95, "rollout_steps": 64},
    "reacher": {"lr": 1e-3, "init_std": 0.5},
    "normalized": {"normalize_rewards": True},
    "hopper": {},
    "halfcheetah": {},
    "walker2d": {},
    "dmc": {"gamma": 0.995, "squash": "tanh", "normalize_rewards": True},
    # The GridWorld baseline of the FPO paper: a fixed variance of 0.5.
    "gridworld": {
        "variance": "fixed",
        "init_std": math.sqrt(0.5),
        "activation": "relu",
        "clip": 0.2,
        "gae_lambda": 0.98,
        "rollout_steps": 2048,
        "num_epochs": 10,
        "num_minibatches": 6,
        "value_coef": 1.0,
        "target_kl": 0.02,
        "normalize_observations": False,
        "adam_eps": 1e-8,
    },
    # The tuned baseline on MuJoCo Playground.
    "playground": {**PLAYGROUND, "clip": 0.1, "entropy_coef": 0.01},
}
# Names of environments begin so.
_ENVIRONMENTS = {
    "Pendulum-": "pendulum",
    "Reacher-": "reacher",
    "Hopper-": "normalized",
    "HalfCheetah-": "normalized",
    "Walker2d-": "normalized",
    "dmc-": "dmc",
}

LOOP_PRESETS: dict[str, dict[str, Any]] = {
    "pendulum": {"steps": 200_000},
    "reacher": {"steps": 200_000},
    "normalized": {"steps": 400_000},
    "hopper": {"steps": 400_000},
    "halfcheetah": {"steps": 400_000},
    "walker2d": {"steps": 400_000},
    "gridworld": {"num_envs": 1, "steps": 2_000_000},
    "playground": {"num_envs": 2048, "steps": 60_000_000},
}


def preset_for(env_name: str) -> str | None:
    """Name of the preset for an environment: a small one that suits a CPU. None if there is none."""
    return next((preset for begin, preset in _ENVIRONMENTS.items() if env_name.startswith(begin)), None)


class GaussianPolicy(_Plain):
    """N(mean(obs), diag(std^2)) with a standard deviation that does not depend on obs.

    Args:
        obs_dim, action_dim: O and A.
        hidden, activation: of the network obs -> mean.
        init_std: initial standard deviation. learned: whether it is a parameter.
        head_scale: factor of the head's initial weights.
        backend, precision: as for `fastflow.ValueNetwork`.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        *,
        hidden: Sequence[int] = (64, 64),
        activation: str = "tanh",
        init_std: float = 1.0,
        learned: bool = True,
        head_scale: float = 0.01,
        backend: str | None = None,
        precision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(activation, None, backend, precision)
        widths = (obs_dim, *hidden, action_dim)
        self.network = DenseStack(tuple(zip(widths[:-1], widths[1:], strict=True)), None, None, device, dtype)
        self.log_std = nn.Parameter(torch.empty(action_dim, device=device, dtype=dtype), requires_grad=learned)
        self.init_std, self.head_scale = init_std, head_scale

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draws all weights anew."""
        self.network.reset_parameters(generator)
        with torch.no_grad():
            self.network.layers[-1].weight.mul_(self.head_scale)  # type: ignore[operator]
            self.log_std.fill_(math.log(self.init_std))

    def forward(self, obs: Tensor) -> Tensor:
        """Means [B, A] for obs [B, O]."""
        return self._dense(obs, self.network.parameter_list())

    def log_prob(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Log-densities [B] of actions [B, A]."""
        z = (actions - self(obs)) * (-self.log_std).exp()
        return -(0.5 * z.square() + self.log_std + 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        """Differential entropy, 0-d."""
        return (self.log_std + 0.5 * (1 + math.log(2 * math.pi))).sum()


class PpoAgent(OnPolicyAgent):
    """A Gaussian policy trained by PPO; see `fastflow.agents.on_policy.OnPolicyAgent` for arguments and use."""

    config_class = PpoConfig

    def _make_actor(self) -> nn.Module:
        config = self.config
        return GaussianPolicy(
            self.obs_dim,
            self.action_dim,
            hidden=config.actor_hidden,
            activation=config.activation,
            init_std=config.init_std,
            learned=config.variance == "learned",
            head_scale=config.head_scale,
            backend=config.backend,
            precision=config.precision,
            device="meta",
            dtype=torch.float32,
        )

    def _draw(self, obs: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return self._decide(self.networks.actor, obs, generator, False), {}

    def _decide(self, actor: nn.Module, obs: Tensor, generator: torch.Generator | None, deterministic: bool) -> Tensor:
        assert isinstance(actor, GaussianPolicy)
        mean = actor(obs)
        if deterministic:
            return mean
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return mean + actor.log_std.exp() * noise

    def _prepare(self, obs: Tensor, rollout: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"old": self._log_prob(obs, rollout["actions"].flatten(0, 1))}

    def _actor_loss(self, rows: Mapping[str, Tensor], advantages: Tensor) -> ActorLoss:
        log_ratio = self._log_prob(rows["obs"], rows["actions"]) - rows["old"]
        found = self._clipped(log_ratio.unsqueeze(1), advantages)
        if not self.config.entropy_coef:
            return found
        return found._replace(entropy=self.networks.actor.entropy())  # type: ignore[operator]

    def _log_prob(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.networks.actor.log_prob(obs, actions)  # type: ignore[operator]
