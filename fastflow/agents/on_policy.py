"""What FPO, DPPO and PPO share: everything but where an action comes from and what its ratio is.

One update takes a rollout [T, B] of steps in parallel environments, estimates advantages, and passes over it in
minibatches, each with a clipped policy gradient (`fastflow.surrogate`) and a regression of the value. Observations are
normalised by statistics that stand still from the first step of a rollout to the last minibatch of its update, and
kernels compute a row alike in every batch: the first ratios are exactly 1 (with backend="reference" PyTorch rounds a
row by its place in the batch, and they are 1 to about 1e-6).

Letters: T steps of B environments, R = T B rows, N ratios per row, O observation, A action.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastflow import ops
from fastflow.advantages import gae
from fastflow.agents.checks import check_config, check_int, check_state, check_tensor, check_widths, ready_moments
from fastflow.agents.descent import Descent, FlatGradients, GradientStep, set_rate
from fastflow.branches import branch
from fastflow.modules import ValueNetwork
from fastflow.running import RunningStatistics
from fastflow.surrogate import advantages_for, surrogate

__all__ = ["PLAYGROUND", "ActorLoss", "OnPolicyAgent", "OnPolicyConfig", "OnPolicyNetworks"]


# Configuration ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OnPolicyConfig:
    """Hyperparameters that every on-policy agent has.

    Raises:
        ValueError: a value outside its range. TypeError: a value of another type. Both name the field.
    """

    lr: float = 3e-4
    """Learning rate of the policy."""
    critic_lr: float = 0.0
    """Learning rate of the value network; 0 takes the policy's."""
    rollout_steps: int = 128
    """T: steps of every environment between updates."""
    num_epochs: int = 10
    """Passes over a rollout."""
    num_minibatches: int = 8
    """Minibatches of a pass."""
    gamma: float = 0.99
    """Discount factor."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""
    clip: float = 0.2
    """Half-width of the range of ratios around 1. Tune this and the learning rate first."""
    negative: Literal["clip", "aspo"] = "clip"
    """What holds actions of negative advantage: the clip, or ASPO's pull towards the old policy (FPO++)."""
    normalize_advantages: Literal["batch", "minibatch", "none"] = "batch"
    """Over which rows advantages get zero mean and unit variance."""
    positive_advantages: bool = False
    """Softplus of the advantages, so that no action is pushed away."""
    advantage_clamp: float = 0.0
    """Largest absolute advantage; 0 for none."""
    recompute_advantages: bool = False
    """Estimate advantages anew before every pass, with the value network as it is then."""
    value_coef: float = 0.5
    """Weight of the value's mean squared error."""
    value_clip: float = 0.0
    """Keep new values within this distance of the old ones, as PPO2 did; 0 does not."""
    entropy_coef: float = 0.0
    """Weight of the policy's entropy, or of its estimate; 0 computes none."""
    max_grad_norm: float = 0.5
    """Largest norm of the gradient, of each network by itself; 0 for any."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW)."""
    adam_beta1: float = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: float = 0.999
    """Decay of Adam's second moment."""
    adam_eps: float = 1e-5
    """Adam's epsilon."""
    lr_decay_updates: int = 0
    """Updates over which the learning rate decays linearly; 0 keeps it constant."""
    lr_final: float = 0.0
    """Learning rate from there on, as a share of lr."""
    target_kl: float = 0.0
    """End an update's passes once the estimated divergence from the policy that acted exceeds this; 0 never. Waits for
    the device after every pass."""
    adaptive_kl: float = 0.0
    """Divergence per update that the policy's learning rate is steered to: up by half where it stays below half of it,
    down by a third above twice of it; 0 leaves the rate alone. Waits for the device after every pass."""
    reward_scale: float = 1.0
    """Rewards are multiplied by this."""
    normalize_rewards: bool = False
    """Divide rewards by the running standard deviation of discounted returns."""
    normalize_observations: bool = True
    """Centre and scale observations by running statistics."""
    observation_clip: float = 10.0
    """Largest absolute normalised observation."""
    squash: Literal["tanh", "clip"] = "clip"
    """How actions are brought into the environment's bounds. The policy learns on them as they were before."""
    action_scale: float = 1.0
    """Actions are multiplied by this before they are squashed: below 1 a policy begins with less noise."""
    actor_ema: float = 0.0
    """Decay per update of the moving average of the policy that evaluations take; 0 takes the policy itself."""
    actor_ema_start: int = 0
    """Updates before the average begins."""
    actor_hidden: tuple[int, ...] = (64, 64)
    """Hidden layers of the policy."""
    critic_hidden: tuple[int, ...] = (64, 64)
    """Hidden layers of the value network."""
    activation: Literal["gelu_tanh", "gelu", "silu", "relu", "elu", "mish", "tanh"] = "silu"
    """Activation of both."""
    backend: Literal["auto", "fused", "reference"] | None = None
    """What runs walks, losses and networks, see fastflow.integrate; None takes the environment variable
    FASTFLOW_BACKEND, or auto."""
    precision: Literal["bf16", "tf32", "fp32"] | None = None
    """Matrix products of all networks; None follows torch's settings."""

    def __post_init__(self) -> None:
        check_widths(self, "actor_hidden", "critic_hidden")
        check_config(self, _LEAST, _RANGES, _CHOICES)

    @property
    def batch_size(self) -> int:
        """What the training loop asks its task for: steps of every environment."""
        return self.rollout_steps

    def decayed(self, step: int) -> float:
        """Share of the learning rate that is left after `step` updates."""
        if not self.lr_decay_updates:
            return 1.0
        return 1.0 - min(step / self.lr_decay_updates, 1.0) * (1.0 - self.lr_final)


_LEAST = {
    "rollout_steps": 1,
    "num_epochs": 1,
    "num_minibatches": 1,
    "lr_decay_updates": 0,
    "actor_ema_start": 0,
}
_NOT_NEGATIVE = (lambda x: x >= 0, "at least 0")
_POSITIVE = (lambda x: x > 0, "a positive number")
_RANGES = {
    "lr": _POSITIVE,
    "critic_lr": _NOT_NEGATIVE,
    "gamma": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    "gae_lambda": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    "clip": _POSITIVE,
    "advantage_clamp": _NOT_NEGATIVE,
    "value_coef": _NOT_NEGATIVE,
    "value_clip": _NOT_NEGATIVE,
    "entropy_coef": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "adam_beta1": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "adam_beta2": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "adam_eps": _POSITIVE,
    "lr_final": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    "target_kl": _NOT_NEGATIVE,
    "adaptive_kl": _NOT_NEGATIVE,
    "reward_scale": _POSITIVE,
    "observation_clip": _POSITIVE,
    "action_scale": _POSITIVE,
    "actor_ema": (lambda x: 0 <= x < 1, "in [0, 1)"),
}
_CHOICES: dict[str, tuple[object, ...]] = {
    "negative": ("clip", "aspo"),
    "normalize_advantages": ("batch", "minibatch", "none"),
    "squash": ("tanh", "clip"),
    "activation": ("gelu_tanh", "gelu", "silu", "relu", "elu", "mish", "tanh"),
    "backend": (None, *ops.BACKENDS),
    "precision": (None, *ops.PRECISIONS),
}
# Of the learning rate that adaptive_kl steers, as shares of lr.
_LOWEST, _HIGHEST, _FACTOR = 1e-2, 1e2, 1.5


PLAYGROUND: dict[str, Any] = {
    "actor_hidden": (32, 32, 32, 32),
    "critic_hidden": (256, 256, 256, 256, 256),
    "squash": "tanh",
    "gamma": 0.995,
    "rollout_steps": 480,
    "num_epochs": 16,
    "num_minibatches": 32,
    "normalize_advantages": "minibatch",
    "recompute_advantages": True,
    "value_coef": 0.25,
    "reward_scale": 10.0,
    "max_grad_norm": 0.0,
    "adam_eps": 1e-8,
}
"""What FPO's paper gives all agents on MuJoCo Playground: 2,048 environments of 480 steps, 32 minibatches of 30,720."""


# The agent ----------------------------------------------------------------------------------------------------------


class ActorLoss(NamedTuple):
    """What an algorithm makes of a minibatch of b rows.

    Attributes:
        loss: 0-d, with gradient, without the entropy term.
        log_ratio: [b, N], without gradient.
        clip_fraction: share of ratios outside the clip range, 0-d.
        entropy: 0-d, with gradient, or None.
        metrics: further 0-d tensors without gradient, by name.
        gradients: of the loss, where they are known already; it has no graph then.
        ratios: the ratios' mean, the largest, and the mean of rho - 1 - log rho, 0-d, where they are known already.
    """

    loss: Tensor
    log_ratio: Tensor
    clip_fraction: Tensor
    entropy: Tensor | None
    metrics: dict[str, Tensor]
    gradients: FlatGradients | None = None
    ratios: tuple[Tensor, Tensor, Tensor] | None = None


class OnPolicyNetworks(nn.Module):
    """The policy `actor`, its value network `critic`, on the CPU in float32, with weights from `generator`."""

    def __init__(self, config: OnPolicyConfig, obs_dim: int, actor: nn.Module, generator: torch.Generator) -> None:
        super().__init__()
        self.actor = actor
        self.critic = ValueNetwork(
            obs_dim,
            0,
            hidden=config.critic_hidden,
            ensemble=None,
            activation=config.activation,
            norm=None,
            backend=config.backend,
            precision=config.precision,
            device="meta",
            dtype=torch.float32,
        )
        self.to_empty(device="cpu")
        self.actor.reset_parameters(generator)  # type: ignore[operator]
        self.critic.network.reset_parameters(generator)


_ROLLOUT_KEYS = ("observations", "actions", "next_observations", "rewards", "terminated", "truncated")


class OnPolicyAgent(abc.ABC):
    """Networks, their training and the policy. A subclass says where actions come from (`_draw`), what an update keeps
    of the policy that acted (`_prepare`), and what its loss is (`_actor_loss`).

    Args:
        config: hyperparameters.
        obs_dim, action_dim: O and A.
        action_low, action_high: the environment's bounds [A], finite.
        num_envs: B, for the running returns of `normalize_rewards`.
        device: where the networks live; rollouts and observations must be there.
        seed: of the initial weights (the same on every device) and of all noise.
        dtype: of parameters and rollouts.

    Attributes:
        networks: see `OnPolicyNetworks`.
        optimizer: the one Adam; its first group is the policy's.
        generator: source of all noise.
        step: updates done.
        update_seconds: spent in `update` so far.

    Raises:
        ValueError, TypeError: an argument that cannot be.
    """

    config_class: type[OnPolicyConfig] = OnPolicyConfig

    def __init__(
        self,
        config: Any,
        obs_dim: int,
        action_dim: int,
        action_low: Sequence[float],
        action_high: Sequence[float],
        num_envs: int = 1,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        name = type(self).__name__
        if not isinstance(config, self.config_class):
            raise TypeError(f"{name}: config must be a {self.config_class.__name__}, got {type(config).__name__}")
        for argument, value in (("obs_dim", obs_dim), ("action_dim", action_dim), ("num_envs", num_envs)):
            check_int(name, argument, value, 1)
        self.config: Any = config
        self.obs_dim, self.action_dim, self.num_envs = obs_dim, action_dim, num_envs
        self.device, self.dtype, self.seed = torch.device(device), dtype, seed
        self.step = 0
        self.update_seconds = 0.0
        low, high = (torch.as_tensor(bound, dtype=dtype, device=self.device) for bound in (action_low, action_high))
        for argument, bound in (("action_low", low), ("action_high", high)):
            if bound.shape != (action_dim,) or not bool(bound.isfinite().all()):
                raise ValueError(f"{name}: {argument} must be {action_dim} finite numbers, got {bound.tolist()}")
        if not bool((low < high).all()):
            raise ValueError(f"{name}: action_low must be below action_high, got {low.tolist()} and {high.tolist()}")
        self._low, self._high = low, high
        self._middle, self._half = (low + high) / 2, (high - low) / 2

        source = torch.Generator().manual_seed(seed)
        noise_seed = int(torch.randint(2**62, (), generator=source))
        self.generator = torch.Generator(self.device).manual_seed(noise_seed)
        self.networks = OnPolicyNetworks(config, obs_dim, self._make_actor(), source)
        self.networks.to(device=self.device, dtype=dtype)
        # What evaluations take; without an average it is the policy itself.
        self.average = copy.deepcopy(self.networks.actor).requires_grad_(False) if config.actor_ema else None
        self._trained = dict(self.networks.named_parameters())
        self._actor_parameters = list(self.networks.actor.parameters())
        self._critic_parameters = list(self.networks.critic.parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": self._actor_parameters, "lr": config.lr},
                {"params": self._critic_parameters, "lr": config.critic_lr or config.lr},
            ],
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self._descent = Descent(self.optimizer)
        self._critic_gradients = FlatGradients(self.networks.critic.network.parameter_list())
        ready_moments(self.optimizer, self.device)
        self._minibatches_done = torch.zeros((), dtype=torch.int64)
        self._lr_factor = torch.ones((), dtype=torch.float64)  # what adaptive_kl has made of lr
        self.observation_statistics = RunningStatistics(obs_dim, device=self.device, limit=config.observation_clip)
        self.return_statistics = RunningStatistics(1, device=self.device)
        self._discounted = torch.zeros(num_envs, dtype=torch.float64, device=self.device)

    # What an algorithm says of itself ---------------------------------------------------------------------------------

    @abc.abstractmethod
    def _make_actor(self) -> nn.Module:
        """The policy's network, on the meta device in float32, with `reset_parameters(generator)`."""

    @abc.abstractmethod
    def _draw(self, obs: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Actions [B, A] as the policy explores, and what else of how they came about an update needs, [B, ...]."""

    @abc.abstractmethod
    def _decide(self, actor: nn.Module, obs: Tensor, generator: torch.Generator | None, deterministic: bool) -> Tensor:
        """Actions [B, A] of `actor` for evaluation, without exploration noise of its own."""

    @abc.abstractmethod
    def _prepare(self, obs: Tensor, rollout: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a minibatch needs besides observations and actions, each [R, ...]: the ratios' denominators."""

    @abc.abstractmethod
    def _actor_loss(self, rows: Mapping[str, Tensor], advantages: Tensor) -> ActorLoss:
        """The loss of a minibatch: `obs` [b, O], `actions` [b, A] and what `_prepare` made, for its rows."""

    def _clipped(self, log_ratio: Tensor, advantages: Tensor) -> ActorLoss:
        """The loss of ratios whose logarithm [b, N] is at hand."""
        found = surrogate(log_ratio, advantages, self.config.clip, self.config.negative)
        return ActorLoss(found.loss, log_ratio.detach(), found.clipped.to(self.dtype).mean(), None, {})

    def _divergence(self, rows: Mapping[str, Tensor]) -> Tensor:
        """How far the policy has moved from the one that acted, 0-d: by default the mean of (rho - 1) - log rho over
        all rows, which estimates the Kullback-Leibler divergence."""
        log_ratio = self._actor_loss(rows, rows["advantages"]).log_ratio
        return (log_ratio.exp() - 1 - log_ratio).mean()

    # Acting -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def explore(self, observations: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Actions [B, A] for a rollout, as the policy learns on them (`to_env` brings them into the environment's
        bounds), and what else the rollout has to keep, [B, ...] each.

        Raises:
            ValueError, TypeError: observations of another shape, dtype or device.
        """
        self._check("observations", observations, (None, self.obs_dim))
        return self._draw(self._normalize(observations), generator)

    def to_env(self, actions: Tensor) -> Tensor:
        """Actions [..., A] within the environment's bounds: times action_scale, by tanh or cut off at -1 and 1, then
        scaled to the bounds."""
        if self.config.action_scale != 1:
            actions = actions * self.config.action_scale
        inside = actions.tanh() if self.config.squash == "tanh" else actions.clamp(-1, 1)
        # Rounding may lead out of the bounds again.
        return (self._middle + self._half * inside).clamp(self._low, self._high)

    @torch.no_grad()
    def act(
        self, observations: Tensor, generator: torch.Generator | None = None, *, deterministic: bool = False
    ) -> Tensor:
        """Actions [N, A] within the environment's bounds, for observations [N, O]: of the moving average of the policy,
        where there is one.

        Args:
            observations: as the environment gives them.
            generator: of the policy's noise; the agent's own if None.
            deterministic: no noise: a flow then starts at zero (FPO++'s zero-sampling), a Gaussian gives its mean.

        Raises:
            ValueError, TypeError: observations of another shape, dtype or device.
        """
        self._check("observations", observations, (None, self.obs_dim))
        source = self.generator if generator is None else generator
        actor = self.networks.actor if self.average is None else self.average
        return self.to_env(self._decide(actor, self._normalize(observations), source, deterministic))

    @torch.no_grad()
    def values(self, observations: Tensor) -> Tensor:
        """Values [...] of observations [..., O], in units of (scaled) rewards."""
        return self.networks.critic(self._normalize(observations)).squeeze(-1)

    def _normalize(self, observations: Tensor) -> Tensor:
        if not self.config.normalize_observations:
            return observations
        return self.observation_statistics.normalize(observations)

    # Training ---------------------------------------------------------------------------------------------------------

    def update(self, rollout: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One update: all passes over one rollout.

        Args:
            rollout: observations and next_observations [T, B, O] as the environments gave them (an ended episode's own
                last observation, not the next one's first), actions [T, B, A] from `explore`, rewards [T, B],
                terminated and truncated [T, B] bool, and what else `explore` returned, [T, B, ...].

        Returns:
            Means over all minibatches as 0-d tensors, without gradient (`actor/ratio_max` is the largest).

        Raises:
            ValueError, TypeError: a missing key, a tensor of another shape, dtype or device; more minibatches than
                rows.
        """
        return self.update_by(self.gradient_step, rollout)

    def update_by(self, step: GradientStep, rollout: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`update` with `step` in place of `gradient_step`, such as a graph of it (`fastflow.graphs`)."""
        config = self.config
        self._check_rollout(rollout)
        began = time.perf_counter()
        rate = config.decayed(self.step)
        groups = self.optimizer.param_groups
        set_rate(groups[1], rate * (config.critic_lr or config.lr))
        with torch.no_grad():
            observations = rollout["observations"]
            rows: dict[str, Tensor] = {
                "obs": self._normalize(observations).flatten(0, 1),
                "actions": rollout["actions"].flatten(0, 1),
            }
            rewards = self._rewards(rollout)
            self._estimate(rows, rollout, rewards)
            rows |= self._prepare(rows["obs"], rollout)
            spread = rows["returns"].var(correction=0)
            explained = 1 - (rows["returns"] - rows["values"]).var(correction=0) / spread.clamp(min=1e-12)

        seen: list[dict[str, Tensor]] = []
        passes = 0
        for epoch in range(config.num_epochs):
            if epoch and config.recompute_advantages:
                with torch.no_grad():
                    self._estimate(rows, rollout, rewards)
            actor_rate = rate * config.lr * float(self._lr_factor)
            set_rate(groups[0], actor_rate)
            order = torch.randperm(len(rows["obs"]), generator=self.generator, device=self.device)
            for part in _shuffled(rows, order, config.num_minibatches):
                seen.append(step(part))
                self._minibatches_done += 1
            passes += 1
            if config.adaptive_kl or config.target_kl:
                with torch.no_grad():
                    divergence = float(self._divergence(rows))
                self._steer(divergence)
                if config.target_kl and divergence > config.target_kl:
                    break
        self._take_in(observations)
        self.step += 1
        names = list(seen[0])
        table = torch.stack([value for metrics in seen for value in metrics.values()]).view(len(seen), len(names))
        found = dict(zip(names, table.mean(0).unbind(), strict=True))
        found["actor/ratio_max"] = table[:, names.index("actor/ratio_max")].max()
        found |= {
            "critic/explained_variance": explained,
            "critic/value": rows["values"].mean(),
            "actor/std": rows["actions"].std(0, correction=0).mean(),
            "actor/lr": torch.tensor(actor_rate, dtype=self.dtype, device=self.device),
            "actor/passes": torch.tensor(float(passes), dtype=self.dtype, device=self.device),
        }
        if self.device.type == "cuda":
            # The next rollout would wait here anyway: its first action needs the new policy.
            torch.cuda.synchronize(self.device)
        self.update_seconds += time.perf_counter() - began
        return found

    def _estimate(self, rows: dict[str, Tensor], rollout: Mapping[str, Tensor], rewards: Tensor) -> None:
        """Puts values, advantages and returns [R] of a rollout into `rows`."""
        config, shape = self.config, rewards.shape
        both = torch.cat((rows["obs"], self._normalize(rollout["next_observations"]).flatten(0, 1)))
        values, next_values = self.networks.critic(both).view(2, *shape)
        ends = (rollout["terminated"], rollout["truncated"])
        advantages = gae(rewards, values, next_values, *ends, config.gamma, config.gae_lambda)
        rows["values"] = values.flatten()
        rows.setdefault("old_values", rows["values"])
        rows["returns"] = (advantages + values).flatten()
        rows["advantages"] = self._shaped(advantages.flatten(), "batch")

    def _shaped(self, advantages: Tensor, where: str) -> Tensor:
        """Advantages as the objective takes them, if this is where that is done."""
        config = self.config
        if where != ("minibatch" if config.normalize_advantages == "minibatch" else "batch"):
            return advantages
        return advantages_for(
            advantages,
            normalize=config.normalize_advantages != "none",
            positive=config.positive_advantages,
            limit=config.advantage_clamp,
        )

    def _rewards(self, rollout: Mapping[str, Tensor]) -> Tensor:
        """Rewards [T, B] as the value network learns them."""
        config, rewards = self.config, rollout["rewards"] * self.config.reward_scale
        if not config.normalize_rewards:
            return rewards
        ended = rollout["terminated"] | rollout["truncated"]
        returns = []
        for reward, end in zip(rewards.double(), ended, strict=True):
            self._discounted = self._discounted * config.gamma + reward
            returns.append(self._discounted)
            self._discounted = self._discounted * ~end
        self.return_statistics.update(torch.stack(returns).unsqueeze(-1))
        return (rewards / self.return_statistics.std.to(self.dtype)).clamp(-10, 10)

    def gradient_step(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What an update does with a minibatch: runs on the device, and reads nothing of the host's that changes
        between minibatches.

        Args:
            rows: `obs` [b, O] normalised, `actions` [b, A], `advantages`, `values`, `old_values` and `returns` [b], and
                what the algorithm keeps besides, [b, ...].

        Returns:
            Metrics as 0-d tensors, without gradient.
        """
        config = self.config
        values = branch("values", self._fit_values, rows)
        actor = self._actor_loss(rows, self._shaped(rows["advantages"], "minibatch"))
        actor_loss = actor.loss
        if actor.entropy is not None:
            actor_loss = actor_loss - config.entropy_coef * actor.entropy
        if actor.gradients is None:
            _backward(actor_loss, self._actor_parameters)
        else:
            actor.gradients.attach()
        critic_loss, critic_gradients = values.join()
        norms = (
            self._clip_gradient(self._actor_parameters, actor.gradients),
            self._clip_gradient(self._critic_parameters, critic_gradients),
        )
        self._descent.step()
        with torch.no_grad():
            ratios = actor.ratios
            if ratios is None:
                ratio = actor.log_ratio.exp()
                ratios = ratio.mean(), ratio.max(), (ratio - 1 - actor.log_ratio).mean()
            metrics = {
                "actor/actor_loss": actor_loss.detach(),
                "critic/critic_loss": critic_loss.detach(),
                "actor/clip_fraction": actor.clip_fraction,
                "actor/ratio": ratios[0],
                "actor/ratio_max": ratios[1],
                "actor/kl": ratios[2],
                "actor/grad_norm": norms[0],
                "critic/grad_norm": norms[1],
            }
        if actor.entropy is not None:
            metrics["actor/entropy"] = actor.entropy.detach()
        return metrics | {f"actor/{name}": value for name, value in actor.metrics.items()}

    def _fit_values(self, rows: Mapping[str, Tensor]) -> tuple[Tensor, FlatGradients | None]:
        """The value network's loss, whose gradients are in place behind this; where they lie side by side, there."""
        config, critic, obs, returns = self.config, self.networks.critic, rows["obs"], rows["returns"]
        if not config.value_clip:
            known = self._critic_gradients
            found = critic._regression(obs, None, returns, config.value_coef, known.parts)
            if found is not None:
                known.attach()
                return found.loss, known
        value = critic(obs).squeeze(-1)
        error = (value - returns).square()
        if config.value_clip:
            old = rows["old_values"]
            kept = old + (value - old).clamp(-config.value_clip, config.value_clip)
            error = torch.maximum(error, (kept - returns).square())
        loss = error.mean()
        _backward(config.value_coef * loss, self._critic_parameters)
        return loss, None

    def _clip_gradient(self, parameters: list[nn.Parameter], known: FlatGradients | None) -> Tensor:
        limit = self.config.max_grad_norm
        if known is not None:
            norm = torch.linalg.vector_norm(known.flat)
            if limit:
                known.flat.mul_((limit / (norm + 1e-6)).clamp_(max=1.0))
            return norm
        # A parameter that the loss does not reach has no gradient.
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if limit:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm

    def _steer(self, divergence: float) -> None:
        """Moves the policy's learning rate towards the divergence that adaptive_kl asks for."""
        target = self.config.adaptive_kl
        if target and divergence > 2 * target:
            self._lr_factor.div_(_FACTOR).clamp_(min=_LOWEST)
        elif target and divergence < target / 2:
            self._lr_factor.mul_(_FACTOR).clamp_(max=_HIGHEST)

    @torch.no_grad()
    def _take_in(self, observations: Tensor) -> None:
        """What follows an update's passes: statistics take in its observations, and the average its policy."""
        if self.config.normalize_observations:
            self.observation_statistics.update(observations)
        if self.average is not None:
            begun = self.step + 1 > self.config.actor_ema_start
            weight = 1 - self.config.actor_ema if begun else 1.0
            torch._foreach_lerp_(list(self.average.parameters()), [*self._actor_parameters], weight)
        self._changed()

    def _changed(self) -> None:  # noqa: B027 - only some keep copies
        """The policy is another one from now on."""

    # State ------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """All that exact resumption needs, as flat names to copies of tensors: parameters, Adam's moments, statistics,
        generator."""
        return {name: tensor.detach().clone() for name, tensor in self._tensors().items()} | {
            "step": torch.tensor(self.step, dtype=torch.int64),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over a state of an agent with the same configuration and sizes. All or nothing.

        Raises:
            ValueError: names, shapes or dtypes differ, or a generator of another kind of device; the agent is then as
                it was.
            TypeError: not tensors.
        """
        owner = type(self).__name__
        check_state(owner, self.state_dict(), state)
        try:
            self.generator.set_state(state["generator"].cpu())
        except RuntimeError as error:
            raise ValueError(f"{owner}.load_state_dict: generator does not fit {self.device}: {error}") from error
        self.step = int(state["step"])
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(state[name])
            for moments in self.optimizer.state.values():
                moments["step"].fill_(float(self._minibatches_done))
        self._changed()

    def _tensors(self) -> dict[str, Tensor]:
        """What a state consists of, besides step and generator: the agent's own tensors by name."""
        tensors: dict[str, Tensor] = dict(self._trained)
        for name, parameter in self._trained.items():
            moments = self.optimizer.state[parameter]
            tensors |= {f"adam/{key}/{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
        if self.average is not None:
            tensors |= {f"average/{name}": value for name, value in self.average.named_parameters()}
        for group, statistics in (("observations", self.observation_statistics), ("returns", self.return_statistics)):
            tensors |= {f"statistics/{group}/{name}": value for name, value in statistics.tensors().items()}
        return tensors | {
            "minibatches": self._minibatches_done,
            "lr_factor": self._lr_factor,
            "discounted": self._discounted,
        }

    # Checks -----------------------------------------------------------------------------------------------------------

    def _check_rollout(self, rollout: Mapping[str, Tensor]) -> None:
        """Shapes, dtypes and devices only: looking at values would wait for the device."""
        owner = type(self).__name__
        missing = [key for key in _ROLLOUT_KEYS if key not in rollout]
        if missing:
            raise ValueError(f"{owner}: rollout must have {', '.join(_ROLLOUT_KEYS)}; {', '.join(missing)} missing")
        self._check("observations", rollout["observations"], (None, self.num_envs, self.obs_dim))
        t = rollout["observations"].shape[0]
        if not t:
            raise ValueError(f"{owner}: rollout must have at least one step, got none")
        self._check("next_observations", rollout["next_observations"], (t, self.num_envs, self.obs_dim))
        self._check("actions", rollout["actions"], (t, self.num_envs, self.action_dim))
        self._check("rewards", rollout["rewards"], (t, self.num_envs))
        for name in ("terminated", "truncated"):
            check_tensor(owner, name, rollout[name], (t, self.num_envs), torch.bool, self.device)
        if self.config.num_minibatches > t * self.num_envs:
            raise ValueError(
                f"{owner}: num_minibatches must be at most the rows of a rollout, {t} x {self.num_envs} = "
                f"{t * self.num_envs}, got {self.config.num_minibatches}"
            )

    def _check(self, name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
        check_tensor(type(self).__name__, name, tensor, shape, self.dtype, self.device)


def _backward(loss: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Gradients of `loss` alone."""
    for parameter in parameters:
        parameter.grad = None
    loss.backward()


SHUFFLED_BYTES = 1 << 26
"""Most that a pass copies of a rollout at once."""


def _shuffled(rows: Mapping[str, Tensor], order: Tensor, count: int) -> Iterator[dict[str, Tensor]]:
    """The rows in `order`, in `count` parts. Of a rollout that is small everything is put in order at once: a view is
    made sooner than rows are gathered."""
    if sum(value.nbytes for value in rows.values()) > SHUFFLED_BYTES:
        for index in order.tensor_split(count):
            yield {name: value[index] for name, value in rows.items()}
        return
    parts = [value.index_select(0, order).tensor_split(count) for value in rows.values()]
    for part in zip(*parts, strict=True):
        yield dict(zip(rows, part, strict=True))
