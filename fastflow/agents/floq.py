"""floq (Agrawalla et al., arXiv:2509.06863): RL whose critic is a flow, with the actor of FQL (arXiv:2502.02538).

The critic is a velocity field v(z, t | s, a) over scalars. A value is the end of a K-step walk from uniform noise, and
the field is trained to walk to the bootstrapped target. A plain critic is distilled from it for the actor, and the
actor is a one-step policy distilled from a behaviour-cloning flow. Names of hyperparameters, networks and metrics are
the published code's.

Letters: B batch, E members of the flow critic, S noise samples per transition, O observation, A action.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastflow import ops, reference
from fastflow.agents.checks import check_config, check_state, check_tensor, check_widths, copy_state, ready_moments
from fastflow.fields import Cosine, CosineFourier, RawTime, Scaled, TimeEmbedding
from fastflow.modules import FlowCritic, FlowPolicy, OneStepPolicy, ValueNetwork, value_ranges

__all__ = ["PRESETS", "FloqAgent", "FloqConfig", "FloqNetworks", "FloqNoise", "preset_for", "reward_range"]


# Configuration ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FloqConfig:
    """Every hyperparameter of floq under its published name; defaults are the published ones.

    Raises:
        ValueError: a value outside its range. TypeError: a value of another type. Both name the field.
    """

    lr: float = 3e-4
    """Learning rate of the one Adam that trains all networks."""
    batch_size: int = 256
    """Transitions per update."""
    alpha: float = 10.0
    """Weight of the one-step actor's distillation from the behaviour-cloning flow. Tune this first."""
    discount: float = 0.99
    """Discount factor; it also sets the range of values."""
    tau: float = 0.005
    """Share of the online field that the target field takes over at every update."""
    q_agg: Literal["mean", "min"] = "mean"
    """How the members' values are combined in the bootstrapped target."""
    critic_flow_steps: int = 8
    """K: Euler steps of the critic's walk. Tune among 4, 8 and 16."""
    flow_steps: int = 10
    """Euler steps of the behaviour-cloning flow."""
    noise_samples: int = 8
    """Walks per transition: their values are averaged, and each is one row of the critic's loss."""
    flow_num_ensembles: int = 2
    """Members of the flow critic."""
    num_ensembles: int = 2
    """Members of the distilled critic."""
    noise_coverage: float = 0.1
    """Width of the uniform noise as a share of the range of values. Tune among 0.1 and 0.25."""
    use_prob_embed: bool = True
    """Feed the walk's state as HL-Gauss features; otherwise as one number scaled by the range of values."""
    num_bins: int = 51
    """Edges of the HL-Gauss features; there is one feature fewer."""
    sigma: float = 16.0
    """Standard deviation of the HL-Gauss features, in bins."""
    reward_offset: float = 0.01
    """Margin of the range of values, per step."""
    time_embedding: Literal["cosine", "fourier", "raw"] = "cosine"
    """Time as the flow critic sees it: cosine is cos(t), as in the published code; fourier is cos(i pi t) for i = 1, 2,
    ..., as in the paper; raw is t. The behaviour-cloning flow always sees t."""
    time_embed_dim: int = 64
    """Number of features of the fourier time embedding."""
    train_at_zero_only: bool = False
    """Train the flow critic at t = 0 alone (an ablation)."""
    block_width: int = 512
    """Width of the flow critic's hidden layers."""
    block_depth: int = 4
    """Number of the flow critic's hidden layers."""
    value_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)
    """Hidden layers of the distilled critic."""
    actor_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)
    """Hidden layers of the behaviour-cloning flow and of the one-step actor."""
    layer_norm: bool = True
    """LayerNorm in both critics."""
    actor_layer_norm: bool = False
    """LayerNorm in both actors."""
    normalize_q_loss: bool = False
    """Divide the actor's value term by the mean absolute value of the batch."""
    lr_decay_steps: int = 0
    """Updates over which the learning rate decays; 0 keeps it constant, as published."""
    lr_decay_start: float = 0.5
    """Share of lr_decay_steps before the decay, which is linear from there."""
    lr_final: float = 0.02
    """Learning rate from lr_decay_steps on, as a share of lr."""
    backend: Literal["auto", "fused", "reference"] | None = None
    """What runs the flows' walks and losses, see fastflow.integrate, and on the CPU the other networks; None takes the
    environment variable FASTFLOW_BACKEND, or auto."""
    precision: Literal["bf16", "tf32", "fp32"] | None = None
    """Matrix products of all networks; None follows torch's settings."""

    def __post_init__(self) -> None:
        check_widths(self, "value_hidden_dims", "actor_hidden_dims")
        check_config(self, _LEAST, _RANGES, _CHOICES)

    def learning_rate(self, step: int) -> float:
        """Learning rate of the update that `step` updates came before."""
        begin = self.lr_decay_start * self.lr_decay_steps
        if step <= begin or not self.lr_decay_steps:
            return self.lr
        done = min((step - begin) / (self.lr_decay_steps - begin), 1.0)
        return self.lr * (1.0 - done * (1.0 - self.lr_final))


_LEAST = {
    "batch_size": 1,
    "critic_flow_steps": 1,
    "flow_steps": 1,
    "noise_samples": 1,
    "flow_num_ensembles": 1,
    "num_ensembles": 1,
    "num_bins": 2,
    "time_embed_dim": 1,
    "block_width": 1,
    "block_depth": 1,
    "lr_decay_steps": 0,
}
_RANGES = {
    "lr": (lambda x: x > 0, "a positive number"),
    "alpha": (lambda x: x >= 0, "at least 0"),
    "discount": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "tau": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "noise_coverage": (lambda x: x >= 0, "at least 0"),
    "sigma": (lambda x: x > 0, "a positive number of bins"),
    "reward_offset": (lambda x: x > 0, "a positive number"),
    "lr_decay_start": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "lr_final": (lambda x: 0 <= x <= 1, "in [0, 1]"),
}
_CHOICES = {
    "q_agg": ("mean", "min"),
    "time_embedding": ("cosine", "fourier", "raw"),
    "backend": (None, *ops.BACKENDS),
    "precision": (None, *ops.PRECISIONS),
}

# The published settings: environment and dataset type -> ("floq (default)", what "floq (best)" changes, what online
# fine-tuning changes). What is not listed is the default; all five tasks of an environment share a row.
_PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "antmaze-large-navigate": ({"alpha": 10.0}, {}, {}),
    "antmaze-giant-navigate": (
        {"alpha": 10.0, "discount": 0.995, "batch_size": 512, "q_agg": "min"},
        {"critic_flow_steps": 4},
        {"critic_flow_steps": 4},
    ),
    "humanoidmaze-medium-navigate": ({"alpha": 30.0, "discount": 0.995}, {}, {}),
    "humanoidmaze-large-navigate": (
        {"alpha": 20.0, "discount": 0.995, "batch_size": 512},
        {},
        {"critic_flow_steps": 16},
    ),
    "antsoccer-arena-navigate": ({"alpha": 10.0, "discount": 0.995}, {}, {"alpha": 30.0}),
    "cube-single-play": ({"alpha": 300.0, "block_depth": 2}, {}, {}),
    "cube-double-play": ({"alpha": 300.0, "block_depth": 2}, {}, {}),
    "scene-play": ({"alpha": 300.0}, {}, {}),
    "puzzle-3x3-play": ({"alpha": 1000.0}, {}, {}),
    "puzzle-4x4-play": ({"alpha": 1000.0}, {"noise_coverage": 0.25}, {"noise_coverage": 0.25}),
}

PRESETS: dict[str, dict[str, Any]] = {
    **{
        name + suffix: {**row[0], **row[i]}
        for name, row in _PUBLISHED.items()
        for i, suffix in ((0, ""), (1, "/best"), (2, "/online"))
    },
    # Small enough for one CPU core. It expects observations scaled to a standard deviation of 4.
    "pointmaze-arena-demo": {
        "lr": 1e-3,
        "alpha": 0.3,
        "tau": 0.02,
        "noise_samples": 1,
        "noise_coverage": 0.03,
        "sigma": 3.0,
        "block_width": 64,
        "block_depth": 2,
        "value_hidden_dims": (64, 64, 64),
        "actor_hidden_dims": (64, 64, 64),
        "lr_decay_steps": 15_000,
    },
}
"""Settings by name, as what differs from `FloqConfig()`. `<environment>-<dataset type>` is the published offline
setting with K = 8 and a noise coverage of 0.1 everywhere, `/best` the one with both tuned, `/online` that of online
fine-tuning."""

LOOP_PRESETS: dict[str, dict[str, Any]] = {
    # Minutes on one CPU core.
    "pointmaze-arena-demo": {
        "steps": 15_000,
        "observation_scale": 4.0,
        "log_interval": 500,
        "eval_interval": 3_000,
        "save_interval": 3_000,
        "threads": 1,
    },
}
"""Defaults of the training loop that go with a preset; its general ones go with the published presets."""


def preset_for(env_name: str) -> str | None:
    """Name of the preset for an environment or dataset such as "cube-single-play-singletask-v0"; None if none fits."""
    name = re.sub(r"(-singletask(-task\d+)?)?-v\d+$", "", env_name)
    if name == "pointmaze-arena-navigate":
        return "pointmaze-arena-demo"
    return name if name in _PUBLISHED else None


def reward_range(rewards: Tensor) -> tuple[float, float]:
    """(r_min, r_max) of a dataset's rewards [N], extended to contain 0.

    The published code takes both from a replay buffer padded with zero rewards, so 0 is always in the range, and its
    noise and value ranges follow from that.

    Raises:
        ValueError: no rewards, or one that is not finite.
    """
    if rewards.numel() == 0:
        raise ValueError("reward_range: rewards must hold at least one reward, got none")
    return _with_zero((float(rewards.min()), float(rewards.max())))


def _with_zero(limits: tuple[float, float]) -> tuple[float, float]:
    low, high = (float(limit) for limit in limits)
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"reward_range: expected finite (r_min, r_max) with r_min <= r_max, got {(low, high)}")
    return min(low, 0.0), max(high, 0.0)


# The agent ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class FloqNoise:
    """All random numbers of one update."""

    next_action: Tensor
    """Gaussian, [B, S, A]: noise of a fresh next action for every noise sample."""
    target_start: Tensor
    """Uniform, [B, S]: where the target's walks start."""
    start: Tensor
    """Uniform, [B, S]: where the online field's walks start, and the x_0 of its loss."""
    time: Tensor
    """Uniform, [B, S]: times of the critic's loss."""
    bc_noise: Tensor
    """Gaussian, [B, A]: x_0 of the behaviour-cloning loss."""
    bc_time: Tensor
    """Uniform, [B]: its times."""
    action: Tensor
    """Gaussian, [B, A]: noise of the one-step actor and of the flow that it is distilled from."""


class FloqNetworks(nn.Module):
    """The five networks under their published names, on the CPU in float32, with weights from `generator`.

    Attributes:
        floq: the flow critic.
        target_floq: its moving average.
        critic: the plain critic that is distilled from floq.
        actor_bc_flow: the behaviour-cloning flow.
        actor_onestep_flow: the policy, distilled from that flow.
    """

    def __init__(
        self,
        config: FloqConfig,
        obs_dim: int,
        action_dim: int,
        reward_range: tuple[float, float],
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        critic_norm = "layer" if config.layer_norm else None
        actor_norm = "layer" if config.actor_layer_norm else None
        value_range, noise_range = value_ranges(
            reward_range, config.discount, config.noise_coverage, config.reward_offset
        )
        # On the meta device the constructors' own initialisation draws nothing from torch's global generator.
        plain: dict[str, Any] = {"device": "meta", "dtype": torch.float32}
        flow: dict[str, Any] = {"backend": config.backend, "precision": config.precision, **plain}

        def flow_critic() -> FlowCritic:
            return FlowCritic(
                obs_dim,
                action_dim,
                value_range=value_range,
                noise_range=noise_range,
                hidden=(config.block_width,) * config.block_depth,
                ensemble=config.flow_num_ensembles,
                num_steps=config.critic_flow_steps,
                num_samples=config.noise_samples,
                bins=config.num_bins,
                sigma=config.sigma,
                state_embedding=None if config.use_prob_embed else Scaled(*value_range),
                time_embedding=_time_embedding(config),
                norm=critic_norm,
                **flow,
            )

        self.floq = flow_critic()
        self.target_floq = flow_critic()
        self.critic = ValueNetwork(
            obs_dim,
            action_dim,
            hidden=config.value_hidden_dims,
            ensemble=config.num_ensembles,
            norm=critic_norm,
            backend=config.backend,
            precision=config.precision,
            **plain,
        )
        self.actor_bc_flow = FlowPolicy(
            obs_dim,
            action_dim,
            hidden=config.actor_hidden_dims,
            norm=actor_norm,
            num_steps=config.flow_steps,
            **flow,
        )
        self.actor_onestep_flow = OneStepPolicy(
            obs_dim,
            action_dim,
            hidden=config.actor_hidden_dims,
            norm=actor_norm,
            backend=config.backend,
            precision=config.precision,
            **plain,
        )
        self.to_empty(device="cpu")
        for parameters in (
            self.floq.field,
            self.critic.network,
            self.actor_bc_flow.field,
            self.actor_onestep_flow.network,
        ):
            parameters.reset_parameters(generator)
        self.target_floq.load_state_dict(self.floq.state_dict())
        self.target_floq.requires_grad_(False)

    def trained(self) -> dict[str, nn.Parameter]:
        """Names and parameters of all networks but the target, which only follows."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("target_floq.")}


_BATCH_KEYS = ("observations", "actions", "next_observations", "rewards", "masks")


class FloqAgent:
    """floq's networks, their training and the policy.

    Args:
        config: hyperparameters.
        obs_dim, action_dim: O and A.
        reward_range: (min, max) of the dataset's rewards, see `reward_range`.
        device: where the networks live; batches and observations must be there.
        seed: of the initial weights (the same on every device) and of all noise.
        observation_statistics: (mean [O], std [O]); observations then enter all networks as (obs - mean) / std.
        dtype: of parameters and batches.

    Attributes:
        networks: see `FloqNetworks`.
        optimizer: the one Adam.
        generator: source of all noise.
        step: updates done.

    Raises:
        ValueError, TypeError: an argument that cannot be.
    """

    def __init__(
        self,
        config: FloqConfig,
        obs_dim: int,
        action_dim: int,
        reward_range: tuple[float, float],
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        observation_statistics: tuple[Tensor, Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not isinstance(config, FloqConfig):
            raise TypeError(f"FloqAgent: config must be a FloqConfig, got {type(config).__name__}")
        self.config = config
        self.obs_dim, self.action_dim = obs_dim, action_dim
        self.device, self.dtype, self.seed = torch.device(device), dtype, seed
        self.reward_range = _with_zero(reward_range)
        self.step = 0
        self.observation_mean, self.observation_std = self._statistics(observation_statistics)

        # Weights are drawn on the CPU in float32 whatever the device and dtype, so that a seed fixes them everywhere.
        source = torch.Generator().manual_seed(seed)
        noise_seed = int(torch.randint(2**62, (), generator=source))
        self.generator = torch.Generator(self.device).manual_seed(noise_seed)
        self.networks = FloqNetworks(config, obs_dim, action_dim, self.reward_range, source)
        self.networks.to(device=self.device, dtype=dtype)
        self._trained = self.networks.trained()
        self._online: list[Tensor] = list(self.networks.floq.parameters())
        self._target: list[Tensor] = list(self.networks.target_floq.parameters())
        self.optimizer = torch.optim.Adam(
            self._trained.values(), lr=config.lr, betas=(0.9, 0.999), eps=1e-8, fused=_can_fuse(self.device)
        )
        ready_moments(self.optimizer, self.device)

    def _statistics(self, statistics: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
        if statistics is None:
            return None, None
        mean, std = (torch.as_tensor(s).to(device=self.device, dtype=self.dtype, copy=True) for s in statistics)
        for name, value in (("mean", mean), ("std", std)):
            if value.shape != (self.obs_dim,):
                raise ValueError(
                    f"FloqAgent: observation_statistics {name} must be [{self.obs_dim}], got {list(value.shape)}"
                )
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
            raise ValueError("FloqAgent: observation_statistics must be finite with every std positive")
        return mean, std

    # Training -------------------------------------------------------------------------------------------------------

    def update(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One update of all networks. Never waits for the device.

        Args:
            batch: observations [B, O], actions [B, A], next_observations [B, O], rewards [B], masks [B] (0 where the
                task has ended, so that nothing is bootstrapped), of the agent's dtype on its device. More keys are
                ignored.

        Returns:
            The losses and values as 0-d tensors, without gradient, see `losses`.

        Raises:
            ValueError, TypeError: a missing key, a tensor of another shape, dtype or device, an empty batch.
        """
        self._check_batch(batch)
        if self.config.lr_decay_steps:
            self.optimizer.param_groups[0]["lr"] = self.config.learning_rate(self.step)
        critic_loss, actor_loss, metrics = self.losses(batch, self.sample_noise(batch))
        self.optimizer.zero_grad(set_to_none=True)
        (critic_loss + actor_loss).backward()
        # The target follows the weights from before this update: one step behind, as in the published code.
        with torch.no_grad():  # else the target's history would grow with every update
            torch._foreach_lerp_(self._target, self._online, self.config.tau)
        self.optimizer.step()
        self.step += 1
        return metrics

    def validate(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `update` returns, without an update, on noise that depends on seed and step alone."""
        self._check_batch(batch)
        generator = torch.Generator(self.device).manual_seed(self.seed + self.step)
        with torch.no_grad():
            return self.losses(batch, self.sample_noise(batch, generator))[2]

    def sample_noise(self, batch: Mapping[str, Tensor], generator: torch.Generator | None = None) -> FloqNoise:
        """Fresh noise for one update on `batch`, from `generator` or the agent's own."""
        b, s, a = batch["actions"].shape[0], self.config.noise_samples, self.action_dim
        options: dict[str, Any] = {
            "generator": self.generator if generator is None else generator,
            "device": self.device,
            "dtype": self.dtype,
        }
        # Two draws, cut into pieces: on small problems launches cost more than numbers.
        next_action, bc_noise, action = torch.randn((s + 2) * b, a, **options).split((s * b, b, b))
        target_start, start, time, bc_time = torch.rand((3 * s + 1) * b, **options).split((s * b, s * b, s * b, b))
        return FloqNoise(
            next_action=next_action.view(b, s, a),
            target_start=target_start.view(b, s),
            start=start.view(b, s),
            time=time.view(b, s),
            bc_noise=bc_noise,
            bc_time=bc_time,
            action=action,
        )

    def losses(self, batch: Mapping[str, Tensor], noise: FloqNoise) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Both losses of one update: floq's for the critics, FQL's for the actors.

        Args:
            batch: as for `update`. noise: as from `sample_noise`.

        Returns:
            The critics' loss and the actors' loss, 0-d. The first has gradients for `floq` and `critic` alone, the
            second for the two actors alone. Metrics, 0-d and without gradient: under `critic/` the losses, the mean,
            lowest and highest value of the batch by floq, the mean target and the variance of a value over its noise
            samples; under `actor/` the losses and the mean value of the policy's actions by the distilled critic.
        """
        obs = self._normalize(batch["observations"])
        next_obs = self._normalize(batch["next_observations"])
        critic_loss, critic_metrics = self._critic_loss(obs, next_obs, batch, noise)
        actor_loss, actor_metrics = self._actor_loss(obs, batch["actions"], noise)
        metrics = {f"critic/{name}": value.detach() for name, value in critic_metrics.items()}
        metrics |= {f"actor/{name}": value.detach() for name, value in actor_metrics.items()}
        return critic_loss, actor_loss, metrics

    def _critic_loss(
        self, obs: Tensor, next_obs: Tensor, batch: Mapping[str, Tensor], noise: FloqNoise
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config, floq = self.config, self.networks.floq
        actions = batch["actions"]
        with torch.no_grad():
            target_q, q = self._walk(obs, actions, next_obs, noise)  # [E, B, S] each
            # Over members first, for each noise sample; then over noise samples.
            next_q = (target_q.amin(0) if config.q_agg == "min" else target_q.mean(0)).mean(-1)
            target = batch["rewards"] + config.discount * batch["masks"] * next_q
            # Always the mean, also where the target takes the minimum.
            value = q.mean((0, 2))
        time = torch.zeros_like(noise.time) if config.train_at_zero_only else noise.time
        # The same start as the walk that gave `value`. The published loss is a sum over noise samples.
        floq_loss = config.noise_samples * floq.loss(obs, actions, target, noise.start, time)
        distill_loss = (self.networks.critic(obs, actions).squeeze(-1) - value).square().mean()
        critic_loss = floq_loss + distill_loss
        return critic_loss, {
            "critic_loss": critic_loss,
            "floq_loss": floq_loss,
            "distill_loss": distill_loss,
            "q_mean": value.mean(),
            "q_min": value.min(),
            "q_max": value.max(),
            "target_mean": target.mean(),
            "var_flow_returns": q.var(2, correction=0).mean(),
        }

    def _walk(self, obs: Tensor, actions: Tensor, next_obs: Tensor, noise: FloqNoise) -> tuple[Tensor, Tensor]:
        """Values of (next_obs, a fresh action per noise sample) by the target and of (obs, actions) by the online floq.

        Both walks are one operation: the two fields' members stand one behind the other on its E axis. Both [E, B, S].
        """
        floq, target_floq = self.networks.floq, self.networks.target_floq
        e, (b, s) = self.config.flow_num_ensembles, noise.start.shape
        next_obs = next_obs.unsqueeze(1).expand(b, s, self.obs_dim)
        next_actions = self.networks.actor_onestep_flow(next_obs, noise.next_action)
        next_cond = torch.cat((next_obs, next_actions), -1).view(1, b * s, -1)
        cond = torch.cat((obs, actions), -1).unsqueeze(1).expand(b, s, -1).reshape(1, b * s, -1)
        cond = torch.cat((next_cond.expand(e, -1, -1), cond.expand(e, -1, -1)))
        start = floq.start(torch.stack((noise.target_start, noise.start))).view(2, 1, b * s, 1, 1)
        z = ops.integrate(
            [target_floq.field, floq.field],
            start.expand(2, e, b * s, 1, 1).reshape(2 * e, b * s, 1, 1),
            cond,
            num_steps=self.config.critic_flow_steps,
            backend=self.config.backend,
            precision=self.config.precision,
        )
        target_q, q = z.view(2, e, b, s)
        return target_q, q

    def _actor_loss(self, obs: Tensor, actions: Tensor, noise: FloqNoise) -> tuple[Tensor, dict[str, Tensor]]:
        flow, onestep = self.networks.actor_bc_flow, self.networks.actor_onestep_flow
        bc_flow_loss = flow.loss(obs, actions, noise.bc_noise, noise.bc_time)
        with torch.no_grad():
            flow_action = flow(obs, noise.action)
        action = onestep(obs, noise.action, raw=True)
        distill_loss = (action - flow_action).square().mean()
        q = self.networks.critic(obs, action.clamp(-1, 1), frozen=True).mean(0)
        q_mean = q.mean()
        q_loss = -q_mean
        if self.config.normalize_q_loss:
            q_loss = q_loss / q.detach().abs().mean()
        actor_loss = bc_flow_loss + self.config.alpha * distill_loss + q_loss
        return actor_loss, {
            "actor_loss": actor_loss,
            "bc_flow_loss": bc_flow_loss,
            "distill_loss": distill_loss,
            "q_loss": q_loss,
            "q": q_mean,
        }

    # Using what was learned -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, observations: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Actions [N, A] in [-1, 1] for observations [N, O]: the one-step policy on fresh Gaussian noise.

        The published policy is stochastic in evaluation too. The noise comes from `generator`, or from the agent's own.

        Raises:
            ValueError, TypeError: observations of another shape, dtype or device.
        """
        self._check("observations", observations, (None, self.obs_dim))
        shape = (observations.shape[0], self.action_dim)
        source = self.generator if generator is None else generator
        noise = torch.randn(shape, generator=source, dtype=self.dtype, device=self.device)
        return self.networks.actor_onestep_flow(self._normalize(observations), noise)

    @torch.no_grad()
    def flow_paths(self, observations: Tensor, actions: Tensor, noise: Tensor) -> Tensor:
        """The critic's walks, for looking at: z_k for k = 0..K.

        Args:
            observations: [B, O]. actions: [B, A]. noise: uniform draws in [0, 1], [B, S], the walks' starts.

        Returns:
            [E, B, S, K + 1]; the last of the last axis is the value.

        Raises:
            ValueError, TypeError: a tensor of another shape, dtype or device.
        """
        self._check("observations", observations, (None, self.obs_dim))
        b = observations.shape[0]
        self._check("actions", actions, (b, self.action_dim))
        self._check("noise", noise, (b, None))
        floq = self.networks.floq
        start = floq.start(noise).unsqueeze(-1).expand(self.config.flow_num_ensembles, *noise.shape, 1)
        cond = torch.cat((self._normalize(observations), actions), -1).unsqueeze(1)
        parameters = floq.field.parameter_list()
        steps = self.config.critic_flow_steps
        path = reference.integrate(floq.field.spec, parameters, start, cond, steps, trajectory=True)
        return path.squeeze(-1).movedim(0, -1)

    # State ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """All that exact resumption needs, as flat names to copies of tensors.

        Parameters under their names, Adam's moments under `adam/exp_avg/<name>` and `adam/exp_avg_sq/<name>`, `step`,
        `generator`, `reward_range`, and `observation_mean`, `observation_std` where there are any.
        """
        return {name: tensor.detach().clone() for name, tensor in self._tensors().items()} | {
            "step": torch.tensor(self.step, dtype=torch.int64),
            "generator": self.generator.get_state(),
            "reward_range": torch.tensor(self.reward_range, dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over a state of an agent with the same configuration, sizes and reward range. All or nothing.

        Raises:
            ValueError: names, shapes or dtypes differ, another reward range, or a generator of another kind of device;
                the agent is then as it was.
            TypeError: not tensors.
        """
        own = self.state_dict()
        check_state("FloqAgent", own, state)
        if not torch.equal(state["reward_range"].cpu(), own["reward_range"]):
            other = tuple(state["reward_range"].tolist())
            raise ValueError(f"FloqAgent.load_state_dict: reward_range must be {self.reward_range}, got {other}")
        copy_state(self, self._tensors(), state)

    def _tensors(self) -> dict[str, Tensor]:
        """What a state consists of, besides step, generator and reward range: the agent's own tensors by name."""
        tensors: dict[str, Tensor] = dict(self.networks.named_parameters())
        for name, parameter in self._trained.items():
            moments = self.optimizer.state[parameter]
            tensors |= {f"adam/{key}/{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
        if self.observation_mean is not None and self.observation_std is not None:
            tensors |= {"observation_mean": self.observation_mean, "observation_std": self.observation_std}
        return tensors

    # Checks ---------------------------------------------------------------------------------------------------------

    def _normalize(self, observations: Tensor) -> Tensor:
        if self.observation_mean is None or self.observation_std is None:
            return observations
        return (observations - self.observation_mean) / self.observation_std

    def _check_batch(self, batch: Mapping[str, Tensor]) -> None:
        """Shapes, dtypes and devices only: looking at values would wait for the device."""
        missing = [key for key in _BATCH_KEYS if key not in batch]
        if missing:
            raise ValueError(f"FloqAgent: batch must have {', '.join(_BATCH_KEYS)}; {', '.join(missing)} missing")
        observations = batch["observations"]
        self._check("observations", observations, (None, self.obs_dim))
        b = observations.shape[0]
        if b == 0:
            raise ValueError("FloqAgent: batch must have at least one row, got none")
        self._check("actions", batch["actions"], (b, self.action_dim))
        self._check("next_observations", batch["next_observations"], (b, self.obs_dim))
        self._check("rewards", batch["rewards"], (b,))
        self._check("masks", batch["masks"], (b,))

    def _check(self, name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
        check_tensor("FloqAgent", name, tensor, shape, self.dtype, self.device)


def _time_embedding(config: FloqConfig) -> TimeEmbedding:
    if config.time_embedding == "fourier":
        return CosineFourier(config.time_embed_dim)
    return Cosine() if config.time_embedding == "cosine" else RawTime()


def _can_fuse(device: torch.device) -> bool:
    return device.type in ("cpu", "cuda")
