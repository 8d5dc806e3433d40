"""FPO (McAllister et al., arXiv:2507.21053) and FPO++ (arXiv:2602.02481): policy gradients for a flow policy.

The policy walks noise x_0 ~ N(0, I) in K Euler steps to an action x_1 along a velocity field v(x_t, t | obs). Its
likelihood is out of reach; in the ratio's place stands how much the flow-matching loss of the action fell:

    L_i = reduce_d (v(x_t, t_i | obs) - (a - eps_i))^2,   x_t = (1 - t_i) eps_i + t_i a,   i = 1..N
    FPO:   rho   = exp(mean_i L_old,i - mean_i L_new,i)        FPO++: rho_i = exp(L_old,i - L_new,i)

N pairs (t_i, eps_i) are drawn once per action and kept for all passes of an update. L_old comes from the same kernel as
L_new, at the same parameters and normalised observations that acted: the first ratios are exactly 1.

Time runs from 0 (noise) to 1 (action), as in the papers; the released Playground and FPO++ code run it the other way,
and what it calls t is 1 - t here. So its noise error, (1 - t)^2 times the velocity's, is t^2 times here.

Letters: R rows, N pairs per row, K steps, O observation, A action.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fastflow import ops
from fastflow.agents.checks import check_config
from fastflow.agents.descent import FlatGradients
from fastflow.agents.flow import FlowConfig, flow_policy
from fastflow.agents.on_policy import PLAYGROUND, ActorLoss, OnPolicyAgent
from fastflow.fields import VelocityField
from fastflow.modules import FlowPolicy, FrozenFlowPolicy
from fastflow.philox import PhiloxNoise
from fastflow.policy_loss import flow_policy_loss, pair_losses, policy_gradients

__all__ = ["LOOP_PRESETS", "PRESETS", "FpoAgent", "FpoConfig", "preset_for"]


# Configuration ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FpoConfig(FlowConfig):
    """Every hyperparameter of FPO and FPO++.

    Raises:
        ValueError: a value outside its range. TypeError: a value of another type. Both name the field.
    """

    num_pairs: int = 8
    """N: pairs of time and noise per action."""
    ratio: Literal["action", "pair"] = "action"
    """One ratio per action (FPO) or one per pair (FPO++)."""
    error: Literal["velocity", "noise", "endpoint"] = "velocity"
    """What the loss is the squared error of: the velocity (u), the noise (epsilon, t^2 times) or the action ((1 - t)^2
    times)."""
    dim_reduction: Literal["mean", "sum", "sqrt"] = "mean"
    """Over the action's numbers: their mean (released FPO), sum (its paper), or sum / sqrt(A) (FPO++)."""
    loss_scale: float = 1.0
    """Losses are multiplied by this (200 in the humanoid code, where it is 1 / (2 * 0.05^2))."""
    loss_clamp: float = 0.0
    """Largest loss of a pair; 0 for none."""
    difference_clamp: float = 0.0
    """Largest absolute difference of a pair's losses; 0 for none."""
    straight_through: bool = True
    """Clamps let gradients pass."""
    time_sampling: Literal["uniform", "grid", "skewed"] = "uniform"
    """Times of the pairs: uniform in [0, 1); on the sampler's grid k / K, k = 0..K-1 (Playground); or by time_beta
    towards one end (FPO++)."""
    time_beta: float = 1.0
    """Skewed times are 1 - (0.005 + 0.99 (1 - (1 - u)^(1 / time_beta))): uniform at 1, towards the action above."""
    noise: Literal["stored", "regenerated"] = "stored"
    """Keep the pairs' noise for an update, or compute it again in every pass from a counter (R N A floats less)."""
    action_noise: float = 0.0
    """Standard deviation of Gaussian noise that exploration adds to an action."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_config(self, _LEAST, _RANGES, _CHOICES)
        if self.prediction == "endpoint" and self.time_sampling == "uniform":
            raise ValueError(
                "FpoConfig: prediction 'endpoint' needs time_sampling 'grid' or 'skewed', got 'uniform': its velocity "
                "is infinite at t = 1"
            )
        if self.entropy_coef and self.num_pairs < 2:
            raise ValueError("FpoConfig: entropy_coef needs num_pairs of at least 2: the estimate is about neighbours")


_LEAST = {"num_pairs": 1}
_RANGES = {
    "loss_scale": (lambda x: x > 0, "a positive number"),
    "loss_clamp": (lambda x: x >= 0, "at least 0"),
    "difference_clamp": (lambda x: x >= 0, "at least 0"),
    "time_beta": (lambda x: x > 0, "a positive number"),
    "action_noise": (lambda x: x >= 0, "at least 0"),
}
_CHOICES: dict[str, tuple[object, ...]] = {
    "ratio": ("action", "pair"),
    "error": ops.ERRORS,
    "dim_reduction": ops.DIM_REDUCTIONS,
    "time_sampling": ("uniform", "grid", "skewed"),
    "noise": ("stored", "regenerated"),
}

_FPO_PLUS: dict[str, Any] = {
    "ratio": "pair",
    "negative": "aspo",
    "dim_reduction": "sqrt",
    "loss_clamp": 20.0,
    "difference_clamp": 10.0,
    "advantage_clamp": 100.0,
    "num_pairs": 16,
    "time_sampling": "skewed",
    "activation": "elu",
    "weight_decay": 1e-4,
    "max_grad_norm": 1.0,
    "value_coef": 1.0,
    "actor_ema": 0.95,
    "actor_ema_start": 500,
    "action_noise": 0.02,
    "adam_eps": 1e-8,
}

_CPU: dict[str, Any] = {"output_scale": 0.25, "difference_clamp": 3.0}
_GRID: dict[str, Any] = {
    "activation": "relu",
    "time_embed_dim": 0,
    "difference_clamp": 3.0,
    "straight_through": False,
    "clip": 0.2,
    "value_coef": 1.0,
    "normalize_observations": False,
}
_PAIRS: dict[str, Any] = {"ratio": "pair", "negative": "aspo", "clip": 0.2}

PRESETS: dict[str, dict[str, Any]] = {
    # Ours, for two CPU cores: 16 environments of 128 steps.
    "cpu": _CPU,
    "pendulum": {**_CPU, "lr": 1e-3, "clip": 0.05, "gamma": 0.95, "rollout_steps": 64},
    "pendulum/fpo++": {**_CPU, **_PAIRS, "lr": 3e-4, "gamma": 0.95, "rollout_steps": 64},
    "reacher": {**_CPU, "lr": 1e-3, "clip": 0.05, "action_scale": 0.5},
    "reacher/fpo++": {**_CPU, **_PAIRS, "lr": 1e-3, "action_scale": 0.5},
    "hopper": {**_CPU, "lr": 3e-4, "clip": 0.05},
    "hopper/fpo++": {**_CPU, **_PAIRS, "output_scale": 1.0, "lr": 1e-3},
    "halfcheetah": {**_CPU, "lr": 3e-4, "clip": 0.05},
    "halfcheetah/fpo++": {**_CPU, **_PAIRS, "output_scale": 1.0, "lr": 1e-3},
    "walker2d": {**_CPU, "lr": 3e-4, "clip": 0.05},
    "walker2d/fpo++": {**_CPU, **_PAIRS, "output_scale": 1.0, "lr": 1e-3},
    "dmc": {**_CPU, "lr": 1e-3, "clip": 0.05, "gamma": 0.995, "squash": "tanh", "normalize_rewards": True},
    # All maps in seconds; and what keeps both ways open at the saddle of the first (docs/fpo.md).
    "gridworld/cpu": {
        **_GRID,
        "ratio": "pair",
        "num_pairs": 16,
        "lr": 1e-3,
        "gamma": 0.97,
        "rollout_steps": 64,
    },
    "gridworld/modes": {
        **_GRID,
        "ratio": "pair",
        "output_scale": 0.25,
        "lr": 3e-3,
        "lr_decay_updates": 91,
        "gamma": 0.8,
        "gae_lambda": 1.0,
        "rollout_steps": 16,
        "num_epochs": 4,
    },
    # The GridWorld of the paper: one environment, 2,048 steps, N = 50.
    "gridworld": {
        "actor_hidden": (64, 64),
        "critic_hidden": (64, 64),
        "activation": "relu",
        "time_embed_dim": 0,
        "num_pairs": 50,
        "difference_clamp": 3.0,
        "straight_through": False,
        "clip": 0.2,
        "gae_lambda": 0.98,
        "rollout_steps": 2048,
        "num_epochs": 10,
        "num_minibatches": 6,
        "value_coef": 1.0,
        "normalize_observations": False,
        "adam_eps": 1e-8,
    },
    "playground": {**PLAYGROUND, "output_scale": 0.25, "error": "noise", "time_sampling": "grid", "clip": 0.05},
    "fpo++/locomotion": {
        **_FPO_PLUS,
        "actor_hidden": (256, 256, 256),
        "critic_hidden": (768, 768, 768),
        "num_steps": 64,
        "lr": 1e-4,
        "clip": 0.05,
        "adam_beta2": 0.95,
        "rollout_steps": 24,
        "num_epochs": 16,
        "num_minibatches": 4,
    },
    "fpo++/tracking": {
        **_FPO_PLUS,
        "actor_hidden": (1024, 512, 256),
        "critic_hidden": (1024, 512, 256),
        "num_steps": 50,
        "lr": 3e-4,
        "clip": 0.01,
        "adam_beta2": 0.95,
        "rollout_steps": 96,
        "num_epochs": 5,
        "num_minibatches": 4,
        "entropy_coef": 1e-3,
        "adaptive_kl": 1e-4,
    },
    # Of states; the paper's policy sees images, and its chunks of 16 actions are one action of 16 A numbers here.
    "fpo++/manipulation": {
        **_FPO_PLUS,
        "negative": "clip",
        "dim_reduction": "sum",
        "actor_hidden": (512, 512, 512),
        "critic_hidden": (512, 256),
        "activation": "relu",
        "num_pairs": 8,
        "num_steps": 10,
        "lr": 1e-5,
        "critic_lr": 1e-4,
        "clip": 0.01,
        "adam_beta2": 0.99,
        "gamma": 0.99,
        "gae_lambda": 0.99,
        "rollout_steps": 96,
        "num_epochs": 10,
        "num_minibatches": 4,
    },
}
"""Settings by name, as what differs from `FpoConfig()`: the papers', and small ones for a CPU."""

# Names of environments begin so.
_ENVIRONMENTS = {
    "Pendulum-": "pendulum/fpo++",
    "Reacher-": "reacher",
    "Hopper-": "hopper/fpo++",
    "HalfCheetah-": "halfcheetah/fpo++",
    "Walker2d-": "walker2d/fpo++",
    "dmc-": "dmc",
    "gridworld-": "gridworld/cpu",
}

LOOP_PRESETS: dict[str, dict[str, Any]] = {
    "pendulum": {"steps": 200_000},
    "pendulum/fpo++": {"steps": 200_000},
    "reacher": {"steps": 200_000},
    "reacher/fpo++": {"steps": 200_000},
    "hopper": {"steps": 400_000},
    "hopper/fpo++": {"steps": 400_000},
    "halfcheetah": {"steps": 400_000},
    "halfcheetah/fpo++": {"steps": 400_000},
    "walker2d": {"steps": 400_000},
    "walker2d/fpo++": {"steps": 400_000},
    "gridworld/cpu": {"num_envs": 32, "steps": 100_000, "eval_interval": 20_000},
    "gridworld/modes": {"num_envs": 512, "steps": 750_000, "save_interval": 125_000},
    "gridworld": {"num_envs": 1, "steps": 2_000_000},
    "playground": {"num_envs": 2048, "steps": 60_000_000},
    "fpo++/locomotion": {"num_envs": 4096, "steps": 196_608_000},
    "fpo++/tracking": {"num_envs": 4096, "steps": 3_145_728_000},
    "fpo++/manipulation": {"num_envs": 2, "steps": 2_000_000},
}
"""Defaults of the training loop that go with a preset."""


def preset_for(env_name: str) -> str | None:
    """Name of the preset for an environment: a small one that suits a CPU. None if there is none."""
    return next((preset for begin, preset in _ENVIRONMENTS.items() if env_name.startswith(begin)), None)


# The agent ----------------------------------------------------------------------------------------------------------


class FpoAgent(OnPolicyAgent):
    """A flow policy trained by FPO or FPO++; see `fastflow.agents.on_policy.OnPolicyAgent` for arguments and use."""

    config_class = FpoConfig

    def _make_actor(self) -> nn.Module:
        return flow_policy(self.config, self.obs_dim, self.action_dim)

    # Acting -----------------------------------------------------------------------------------------------------------

    def _draw(self, obs: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        action = self._frozen(self.networks.actor)(obs, generator=generator)
        if self.config.action_noise:
            noise = torch.randn(action.shape, generator=generator, dtype=action.dtype, device=action.device)
            action = action + self.config.action_noise * noise
        return action, {}

    def _decide(self, actor: nn.Module, obs: Tensor, generator: torch.Generator | None, deterministic: bool) -> Tensor:
        if deterministic:
            return self._frozen(actor)(obs, deterministic=True)
        return self._frozen(actor)(obs, generator=generator)

    def _frozen(self, actor: nn.Module) -> FrozenFlowPolicy:
        """The policy with its weights packed: between two updates it acts thousands of times."""
        if actor not in self._packed:
            self._packed[actor] = cast(FlowPolicy, actor).freeze()
        return self._packed[actor]

    def _changed(self) -> None:
        self._packed.clear()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._packed: dict[nn.Module, FrozenFlowPolicy] = {}
        super().__init__(*args, **kwargs)
        self._flow_gradients = FlatGradients(cast(FlowPolicy, self.networks.actor).field.parameter_list())
        # Drawn anew in place: a graph of a minibatch reads it where it lies.
        self._seed = torch.zeros((), dtype=torch.int64, device=self.device)

    # Learning ---------------------------------------------------------------------------------------------------------

    def _prepare(self, obs: Tensor, rollout: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The pairs of every row and their losses at the policy that acted."""
        config, count = self.config, obs.shape[0]
        actions = rollout["actions"].flatten(0, 1)
        options: dict[str, Any] = {"generator": self.generator, "device": self.device}
        if config.noise == "regenerated":
            # Another seed for every update; within one, a row's noise follows from its place in the rollout.
            self._seed.random_(2**62, generator=self.generator)
            rows = {"ids": torch.arange(count, device=self.device)}
        else:
            shape = (count, config.num_pairs)
            uniform = torch.rand(shape, dtype=self.dtype, **options)
            rows = {
                "t": pair_times(uniform, config.time_sampling, config.num_steps, config.time_beta),
                "x_0": torch.randn(*shape, self.action_dim, dtype=self.dtype, **options),
            }
        rows["old"] = self.pair_losses({"obs": obs, "actions": actions, **rows})
        if config.adaptive_kl:
            x_t, t = self._points({"obs": obs, "actions": actions, **rows})
            rows["velocity"] = self._velocity(x_t, t, obs)
        return rows

    def pair_losses(self, rows: Mapping[str, Tensor]) -> Tensor:
        """L [R, N] of rows: `obs` [R, O] normalised, `actions` [R, A], and the pairs: `t` [R, N] and `x_0` [R, N, A],
        or `ids` [R]."""
        return pair_losses(*self._losing(rows), **self._matching)

    @property
    def _matching(self) -> dict[str, Any]:
        """How a pair's loss is measured and computed."""
        names = ("error", "dim_reduction", "loss_scale", "backend", "precision")
        return {name: getattr(self.config, name) for name in names}

    def _losing(self, rows: Mapping[str, Tensor]) -> tuple[VelocityField, Tensor | PhiloxNoise, Tensor, Any, Tensor]:
        """What a loss is made of: the field, noise, actions, times, observations."""
        noise, t = self._pairs(rows)
        return cast(FlowPolicy, self.networks.actor).field, noise, rows["actions"], t, rows["obs"]

    def _pairs(self, rows: Mapping[str, Tensor]) -> tuple[Tensor | PhiloxNoise, Tensor | None]:
        """The noise of each pair and its time, None where the kernel draws both."""
        config = self.config
        if config.noise == "stored":
            return rows["x_0"], rows["t"]
        noise = PhiloxNoise(self._seed, rows["ids"], config.num_pairs)
        if config.time_sampling == "uniform":
            return noise, None
        uniform = noise.t().to(self.dtype)
        return noise, pair_times(uniform, config.time_sampling, config.num_steps, config.time_beta)

    def _actor_loss(self, rows: Mapping[str, Tensor], advantages: Tensor) -> ActorLoss:
        config = self.config
        names = ("clip", "ratio", "negative", "loss_clamp", "difference_clamp", "straight_through")
        ratios: dict[str, Any] = {name: getattr(config, name) for name in names}
        field, noise, actions, t, obs = self._losing(rows)
        options = ratios | self._matching
        if not config.entropy_coef:
            known = self._flow_gradients
            native = policy_gradients(
                field, noise, actions, t, obs, rows["old"], advantages, gradients=known.parts, **options
            )
            if native is not None:
                told = (native.mean, native.largest, native.divergence)
                metrics = {"flow_loss": native.flow_loss}
                return ActorLoss(native.loss, native.log_ratio, native.clip_fraction, None, metrics, known, told)
        found = flow_policy_loss(field, noise, actions, t, obs, rows["old"], advantages, **options)
        entropy = self._entropy(rows) if config.entropy_coef else None
        return ActorLoss(found.loss, found.log_ratio, found.clip_fraction, entropy, {"flow_loss": found.flow_loss})

    def _points(self, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Where the pairs stand on the path: x_t [R, N, A] and t [R, N]."""
        noise, t = self._pairs(rows)
        if isinstance(noise, PhiloxNoise):
            t = noise.t().to(self.dtype) if t is None else t
            noise = noise.x_0(self.action_dim).to(self.dtype)
        assert t is not None
        s = t.unsqueeze(-1)
        return (1 - s) * noise + s * rows["actions"].unsqueeze(1), t

    def _velocity(self, x_t: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        return self.networks.actor.field(x_t, t, obs.unsqueeze(1))  # type: ignore[operator]

    def _entropy(self, rows: Mapping[str, Tensor]) -> Tensor:
        """FPO++'s estimate of the policy's entropy (Kozachenko and Leonenko, one neighbour): up to a constant, A times
        the mean logarithm of the distance from each action that a row's pairs point at to the nearest of the others."""
        x_t, t = self._points(rows)
        ends = x_t + (1 - t).unsqueeze(-1) * self._velocity(x_t, t, rows["obs"])
        squares = (ends.unsqueeze(1) - ends.unsqueeze(2)).square().sum(-1)
        itself = torch.eye(squares.shape[-1], dtype=torch.bool, device=squares.device)
        nearest = squares.masked_fill(itself, float("inf")).amin(-1)
        return self.action_dim * 0.5 * (nearest + 1e-12).log().mean()

    def _divergence(self, rows: Mapping[str, Tensor]) -> Tensor:
        """With adaptive_kl FPO++'s measure for its learning rate, the mean squared change of the predicted noise,
        x_t - t v."""
        if "velocity" not in rows:
            return super()._divergence(rows)
        x_t, t = self._points(rows)
        change = self._velocity(x_t, t, rows["obs"]) - rows["velocity"]
        return (t.unsqueeze(-1) * change).square().mean()


def pair_times(uniform: Tensor, sampling: str, num_steps: int, beta: float) -> Tensor:
    """Times of pairs from uniform numbers in [0, 1), see `FpoConfig.time_sampling`."""
    if sampling == "grid":
        return (uniform * num_steps).floor() / num_steps
    if sampling == "skewed":
        return 1 - (0.005 + 0.99 * (1 - (1 - uniform) ** (1 / beta)))
    return uniform
