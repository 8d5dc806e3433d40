"""DPPO's way (Ren et al., arXiv:2409.00588) of training a flow policy: each step of a walk is an action.

With noise of a fixed sigma behind every Euler step the walk is a chain of Gaussians,

    x_{k+1} = x_k + v(x_k, t_k | obs) / K + sigma n_k,   n_k ~ N(0, I),

and PPO's ratio of step k is exp(L_old,k - L_new,k) with L_k = |x_{k+1} - x_k - v / K|^2 / (2 sigma^2): up to a factor
the flow-matching loss of the pair (x_k, t_k) against the velocity K (x_{k+1} - x_k). So the same fused loss serves,
with the walk's own points in the place of FPO's random pairs, and one ratio per step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastflow import ops
from fastflow.agents.checks import check_config
from fastflow.agents.flow import FlowConfig, flow_policy
from fastflow.agents.on_policy import PLAYGROUND, ActorLoss, OnPolicyAgent
from fastflow.surrogate import flow_log_ratio

__all__ = ["LOOP_PRESETS", "PRESETS", "DppoAgent", "DppoConfig", "preset_for"]


@dataclasses.dataclass(frozen=True)
class DppoConfig(FlowConfig):
    """Hyperparameters of the denoising MDP.

    Raises:
        ValueError: a value outside its range. TypeError: a value of another type. Both name the field.
    """

    sigma: float = 0.05
    """Standard deviation of the noise behind each step, while learning."""
    last_steps: int = 0
    """Learn on the last so many steps of the walk; 0 learns on all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_config(self, {"last_steps": 0}, {"sigma": (lambda x: x > 0, "a positive number")}, {})
        if self.last_steps > self.num_steps:
            raise ValueError(
                f"DppoConfig: last_steps must be at most num_steps, {self.num_steps}, got {self.last_steps}"
            )
        if self.entropy_coef:
            raise ValueError(
                f"DppoConfig: entropy_coef must be 0, the entropy of a step is fixed; got {self.entropy_coef}"
            )


PRESETS: dict[str, dict[str, Any]] = {
    # Ours, for two CPU cores: 16 environments of 128 steps.
    "cpu": {"output_scale": 0.25},
    # FPO's baseline on MuJoCo Playground.
    "playground": {**PLAYGROUND, "output_scale": 0.25, "clip": 0.2},
}
LOOP_PRESETS: dict[str, dict[str, Any]] = {"playground": {"num_envs": 2048, "steps": 60_000_000}}


def preset_for(env_name: str) -> str | None:
    """The small preset for a CPU, whatever the environment."""
    return "cpu"


class DppoAgent(OnPolicyAgent):
    """A flow policy trained on the steps of its walk; see `fastflow.agents.on_policy.OnPolicyAgent`."""

    config_class = DppoConfig

    def _make_actor(self) -> nn.Module:
        return flow_policy(self.config, self.obs_dim, self.action_dim)

    def _draw(self, obs: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        shape = (config.num_steps + 1, obs.shape[0], self.action_dim)
        draws = torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)
        chain = ops.integrate(
            self.networks.actor.field,  # type: ignore[arg-type]
            draws[0],
            obs,
            num_steps=config.num_steps,
            step_noise=config.sigma * draws[1:],
            trajectory=True,
            backend=config.backend,
            precision=config.precision,
        )
        return chain[-1], {"chain": chain.movedim(0, 1)}

    def _decide(self, actor: nn.Module, obs: Tensor, generator: torch.Generator | None, deterministic: bool) -> Tensor:
        return actor(obs, deterministic=deterministic, generator=None if deterministic else generator)

    def _prepare(self, obs: Tensor, rollout: Mapping[str, Tensor]) -> dict[str, Tensor]:
        expected = (*rollout["rewards"].shape, self.config.num_steps + 1, self.action_dim)
        if "chain" not in rollout:
            raise ValueError("DppoAgent: rollout must have chain, from explore; it is missing")
        self._check("chain", rollout["chain"], expected)
        first = self.config.num_steps - (self.config.last_steps or self.config.num_steps)
        chain = rollout["chain"].flatten(0, 1)[:, first:]
        rows = {"x_t": chain[:, :-1], "target": self.config.num_steps * chain.diff(dim=1)}
        return rows | {"old": self._step_losses({"obs": obs, **rows})}

    def _step_losses(self, rows: Mapping[str, Tensor]) -> Tensor:
        """L [R, K] of the chain's steps."""
        config = self.config
        count, steps, _ = rows["x_t"].shape
        t = torch.arange(config.num_steps - steps, config.num_steps, device=self.device).to(self.dtype)
        losses = ops.velocity_matching_loss(
            self.networks.actor.field,  # type: ignore[arg-type]
            rows["x_t"],
            (t / config.num_steps).expand(count, steps),
            rows["target"],
            rows["obs"],
            reduction="none",
            dim_reduction="sum",
            backend=config.backend,
            precision=config.precision,
        )
        return losses / (2 * (config.num_steps * config.sigma) ** 2)

    def _actor_loss(self, rows: Mapping[str, Tensor], advantages: Tensor) -> ActorLoss:
        losses = self._step_losses(rows)
        found = self._clipped(flow_log_ratio(rows["old"], losses, per="pair"), advantages)
        return found._replace(metrics={"flow_loss": losses.detach().mean()})
