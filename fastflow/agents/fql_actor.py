"""The actor of FQL (Park et al., arXiv:2502.02538) and what else floq and the critics it is compared with share.

A behaviour-cloning flow v(x_t, t | s) learns the data's actions; a one-step policy mu(s, n) is distilled from it and
climbs the critic:

    L(actor) = E|v(x_t, t | s) - (a - x_0)|^2 + alpha E|mu(s, n) - flow(s, n)|^2 - E[Q(s, mu(s, n))]

The agents differ in their critic alone: a subclass of `FqlActorAgent` brings critics and their loss. One Adam trains
all networks; targets follow the online critics by a moving average.

Letters: B batch, O observation, A action.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from fastflow import ops
from fastflow.agents.checks import check_config, check_state, check_tensor, check_widths, copy_state, ready_moments
from fastflow.agents.descent import Descent, FlatGradients, GradientStep, set_rate
from fastflow.branches import branch, settled
from fastflow.fields import DenseStack
from fastflow.flops import forward_flops, training_flops
from fastflow.kernels.cpu import ONE_THREAD
from fastflow.matching_gradients import matching_gradients
from fastflow.modules import FlowPolicy, OneStepPolicy

__all__ = [
    "DEMO",
    "DEMO_LOOP",
    "DEMO_NAME",
    "FqlActorAgent",
    "FqlActorConfig",
    "FqlActorNetworks",
    "FqlActorNoise",
    "actor_flops",
    "preset_name",
    "reward_range",
]


# Configuration ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FqlActorConfig:
    """Hyperparameters of every agent with FQL's actor under their published names; defaults are the published ones.

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
    """Discount factor; where an agent uses a range of values, it also sets that range."""
    tau: float = 0.005
    """Share of the online critic that the target critic takes over at every update."""
    q_agg: Literal["mean", "min"] = "mean"
    """How the members' values are combined in the bootstrapped target."""
    flow_steps: int = 10
    """Euler steps of the behaviour-cloning flow."""
    actor_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)
    """Hidden layers of the behaviour-cloning flow and of the one-step actor."""
    layer_norm: bool = True
    """LayerNorm in the critics."""
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
        check_widths(self, "actor_hidden_dims")
        check_config(self, _LEAST, _RANGES, _CHOICES)

    def learning_rate(self, step: int) -> float:
        """Learning rate of the update that `step` updates came before."""
        begin = self.lr_decay_start * self.lr_decay_steps
        if step <= begin or not self.lr_decay_steps:
            return self.lr
        done = min((step - begin) / (self.lr_decay_steps - begin), 1.0)
        return self.lr * (1.0 - done * (1.0 - self.lr_final))


_LEAST = {"batch_size": 1, "flow_steps": 1, "lr_decay_steps": 0}
_RANGES = {
    "lr": (lambda x: x > 0, "a positive number"),
    "alpha": (lambda x: x >= 0, "at least 0"),
    "discount": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "tau": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "lr_decay_start": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "lr_final": (lambda x: 0 <= x <= 1, "in [0, 1]"),
}
_CHOICES: dict[str, tuple[object, ...]] = {
    "q_agg": ("mean", "min"),
    "backend": (None, *ops.BACKENDS),
    "precision": (None, *ops.PRECISIONS),
}


# The demo's point maze, small enough for one CPU core: floq's setting without its critic, for every agent that floq is
# compared with. It expects observations scaled to a standard deviation of 4.
DEMO_NAME = "pointmaze-arena-demo"
DEMO: dict[str, Any] = {
    "lr": 1e-3,
    "alpha": 0.3,
    "tau": 0.02,
    "value_hidden_dims": (64, 64, 64),
    "actor_hidden_dims": (64, 64, 64),
    "lr_decay_steps": 15_000,
}
DEMO_LOOP: dict[str, Any] = {
    "steps": 15_000,
    "observation_scale": 4.0,
    "log_interval": 500,
    "eval_interval": 3_000,
    "save_interval": 3_000,
    "threads": 1,
}


def preset_name(env_name: str, published: Collection[str]) -> str | None:
    """Name of the preset for an environment or dataset such as "cube-single-play-singletask-v0": one of `published`,
    the demo's, or None if none fits."""
    name = re.sub(r"(-singletask(-task\d+)?)?-v\d+$", "", env_name)
    if name == "pointmaze-arena-navigate":
        return DEMO_NAME
    return name if name in published else None


def reward_range(rewards: Tensor) -> tuple[float, float]:
    """(r_min, r_max) of a dataset's rewards [N], extended to contain 0.

    floq's published code takes both from a replay buffer padded with zero rewards, so 0 is always in the range, and its
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


# Networks and noise -------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class FqlActorNoise:
    """The actors' random numbers of one update."""

    bc_noise: Tensor
    """Gaussian, [B, A]: x_0 of the behaviour-cloning loss."""
    bc_time: Tensor
    """Uniform, [B]: its times."""
    action: Tensor
    """Gaussian, [B, A]: noise of the one-step actor and of the flow that it is distilled from."""


class FqlActorNetworks(nn.Module):
    """Critics and the two actors under their published names, on the CPU in float32, with weights from `generator`.

    Args:
        config: hyperparameters.
        obs_dim, action_dim: O and A.
        critics: by name, on the meta device: so no constructor draws from torch's global generator. `target_<name>`
            begins as a copy of `<name>` and is not trained.
        generator: source of the weights.

    Attributes:
        actor_bc_flow: the behaviour-cloning flow.
        actor_onestep_flow: the policy, distilled from that flow.
    """

    def __init__(
        self,
        config: FqlActorConfig,
        obs_dim: int,
        action_dim: int,
        critics: Mapping[str, nn.Module],
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        for name, critic in critics.items():
            self.add_module(name, critic)
        options: dict[str, Any] = {
            "hidden": config.actor_hidden_dims,
            "norm": "layer" if config.actor_layer_norm else None,
            "backend": config.backend,
            "precision": config.precision,
            "device": "meta",
            "dtype": torch.float32,
        }
        self.actor_bc_flow = FlowPolicy(obs_dim, action_dim, num_steps=config.flow_steps, **options)
        self.actor_onestep_flow = OneStepPolicy(obs_dim, action_dim, **options)
        self.to_empty(device="cpu")
        pairs = self.targets()
        for network in self.children():
            if not any(network is target for target, _ in pairs):
                for stack in network.modules():
                    if isinstance(stack, DenseStack):
                        stack.reset_parameters(generator)
        for target, online in pairs:
            target.load_state_dict(online.state_dict())
            target.requires_grad_(False)

    def targets(self) -> list[tuple[nn.Module, nn.Module]]:
        """(target, online) of every critic that has a target."""
        networks = dict(self.named_children())
        return [(networks[f"target_{name}"], net) for name, net in networks.items() if f"target_{name}" in networks]

    def stacks(self) -> dict[str, DenseStack]:
        """By name of the network, what each that is trained consists of."""
        found = {name: net.field if hasattr(net, "field") else net.network for name, net in self.named_children()}
        return {name: cast(DenseStack, stack) for name, stack in found.items() if not name.startswith("target_")}

    def trained(self) -> dict[str, nn.Parameter]:
        """Names and parameters of all networks but the targets, which only follow."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("target_")}


# The agent ----------------------------------------------------------------------------------------------------------


_BATCH_KEYS = ("observations", "actions", "next_observations", "rewards", "masks")


class FqlActorAgent(abc.ABC):
    """Networks, their training and the policy. A subclass says what critics there are (`_make_networks`), the noise of
    an update (`sample_noise`), the critics' loss (`_critic_loss`) and the value that the actor climbs (`_value`).

    Args:
        config: hyperparameters.
        obs_dim, action_dim: O and A.
        reward_range: (min, max) of the dataset's rewards, see `reward_range`.
        device: where the networks live; batches and observations must be there.
        seed: of the initial weights (the same on every device) and of all noise.
        observation_statistics: (mean [O], std [O]); observations then enter all networks as (obs - mean) / std.
        dtype: of parameters and batches.

    Attributes:
        networks: critics and actors, see `FqlActorNetworks`.
        optimizer: the one Adam.
        generator: source of all noise.
        step: updates done.

    Raises:
        ValueError, TypeError: an argument that cannot be.
    """

    config_class: type[FqlActorConfig]
    compiles: ClassVar[bool] = True
    """Whether torch.compile takes `losses` as one graph."""

    def __init__(
        self,
        config: Any,
        obs_dim: int,
        action_dim: int,
        reward_range: tuple[float, float],
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        observation_statistics: tuple[Tensor, Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._name = type(self).__name__
        if not isinstance(config, self.config_class):
            expected = self.config_class.__name__
            raise TypeError(f"{self._name}: config must be a {expected}, got {type(config).__name__}")
        self.config: Any = config
        self.obs_dim, self.action_dim = obs_dim, action_dim
        self.device, self.dtype, self.seed = torch.device(device), dtype, seed
        self.reward_range = _with_zero(reward_range)
        self.step = 0
        self.observation_mean, self.observation_std = self._statistics(observation_statistics)

        # Weights are drawn on the CPU in float32 whatever the device and dtype, so that a seed fixes them everywhere.
        source = torch.Generator().manual_seed(seed)
        noise_seed = int(torch.randint(2**62, (), generator=source))
        self.generator = torch.Generator(self.device).manual_seed(noise_seed)
        self.networks: Any = self._make_networks(source)
        self.networks.to(device=self.device, dtype=dtype)
        self._trained: dict[str, nn.Parameter] = self.networks.trained()
        pairs = self.networks.targets()
        self._target: list[Tensor] = [p for target, _ in pairs for p in target.parameters()]
        self._online: list[Tensor] = [p for _, online in pairs for p in online.parameters()]
        self.optimizer = torch.optim.Adam(
            self._trained.values(), lr=config.lr, betas=(0.9, 0.999), eps=1e-8, fused=_can_fuse(self.device)
        )
        ready_moments(self.optimizer, self.device)
        self._descent = Descent(self.optimizer)
        self._known = {name: FlatGradients(stack.parameter_list()) for name, stack in self.networks.stacks().items()}

    def _statistics(self, statistics: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
        if statistics is None:
            return None, None
        mean, std = (torch.as_tensor(s).to(device=self.device, dtype=self.dtype, copy=True) for s in statistics)
        for name, value in (("mean", mean), ("std", std)):
            if value.shape != (self.obs_dim,):
                raise ValueError(
                    f"{self._name}: observation_statistics {name} must be [{self.obs_dim}], got {list(value.shape)}"
                )
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
            raise ValueError(f"{self._name}: observation_statistics must be finite with every std positive")
        return mean, std

    @abc.abstractmethod
    def _make_networks(self, generator: torch.Generator) -> FqlActorNetworks:
        """The networks, with weights from `generator`."""

    @abc.abstractmethod
    def sample_noise(self, batch: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Any:
        """Fresh noise for one update on `batch`, from `generator` or the agent's own."""

    def _noise_options(self, generator: torch.Generator | None) -> dict[str, Any]:
        """How noise is drawn: from `generator` or the agent's own, with the agent's device and dtype."""
        return {
            "generator": self.generator if generator is None else generator,
            "device": self.device,
            "dtype": self.dtype,
        }

    @abc.abstractmethod
    def _critic_loss(
        self, obs: Tensor, next_obs: Tensor, batch: Mapping[str, Tensor], noise: Any, direct: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The critics' loss, 0-d, and metrics; obs and next_obs are normalised. `direct`: see `_losses`."""

    @property
    def _native(self) -> bool:
        """Whether the configuration lets native code run on the CPU."""
        return ops.runs_native(ops.DEFAULT_BACKEND if self.config.backend is None else self.config.backend)

    @property
    def _runner(self) -> str | None:
        """What may run what is neither walk nor loss: "native" code, the kernels of "triton", or None for PyTorch."""
        backend = ops.DEFAULT_BACKEND if self.config.backend is None else self.config.backend
        return ops.runner(backend, self.device)

    def _fit_critic(self, obs: Tensor, action: Tensor, target: Tensor, direct: bool) -> tuple[Tensor, Tensor]:
        """The plain critic's mean squared distance from target [B], 0-d, and its values [E, B]; see `_losses` for
        `direct`."""
        critic = self.networks.critic
        known = self._one_pass("critic", len(obs), direct)
        if known is not None:
            found = critic._regression(obs, action, target, 1.0, known.parts)
            if found is not None:
                known.attach()
                return found.loss, found.y.squeeze(-1)
        q = critic(obs, action).squeeze(-1)
        return (q - target).square().mean(), q

    def _value(self, obs: Tensor, action: Tensor, noise: Any) -> Tensor:
        """What the actor climbs, [B, 1]: gradients reach the action and no parameter."""
        return self.networks.critic(obs, action, frozen=True).mean(0)

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
        return self.update_by(self.gradient_step, batch)

    def update_by(self, step: GradientStep, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`update` with `step` in place of `gradient_step`, such as a graph of it (`fastflow.graphs`)."""
        self._check_batch(batch)
        if self.config.lr_decay_steps:
            set_rate(self.optimizer.param_groups[0], self.config.learning_rate(self.step))
        metrics = step(batch)
        self.step += 1
        return metrics

    def gradient_step(self, batch: Mapping[str, Tensor], losses: Callable[..., Any] | None = None) -> dict[str, Tensor]:
        """The part of an update that runs on the device, and reads nothing of the host's that changes between updates.

        Args:
            batch: as for `update`, checked.
            losses: in place of `losses`, such as it compiled.
        """
        for parameter in self._trained.values():
            parameter.grad = None
        noise = self.sample_noise(batch)
        found = self._losses(batch, noise, direct=True) if losses is None else losses(batch, noise)
        critic_loss, actor_loss, metrics = found
        loss = critic_loss + actor_loss
        if loss.requires_grad:  # what native code has not differentiated already
            loss.backward()
        # The target follows the weights from before this update: one step behind, as in the published code.
        with torch.no_grad():  # else the target's history would grow with every update
            torch._foreach_lerp_(self._target, self._online, self.config.tau)
        self._descent.step()
        return metrics

    def validate(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `update` returns, without an update, on noise that depends on seed and step alone."""
        self._check_batch(batch)
        generator = torch.Generator(self.device).manual_seed(self.seed + self.step)
        with torch.no_grad():
            return self.losses(batch, self.sample_noise(batch, generator))[2]

    def losses(self, batch: Mapping[str, Tensor], noise: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Both losses of one update: the algorithm's own for the critics, FQL's for the actors.

        Args:
            batch: as for `update`. noise: as from `sample_noise`.

        Returns:
            The critics' loss and the actors' loss, 0-d. The first has gradients for the critics alone, the second for
            the two actors alone. Metrics, 0-d and without gradient: under `critic/` those of the critics, under
            `actor/` the losses and the mean value of the policy's actions.
        """
        return self._losses(batch, noise, direct=False)

    def _losses(
        self, batch: Mapping[str, Tensor], noise: Any, direct: bool
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """`losses`. With `direct` the gradients that native code computes along with a loss are left in place, and that
        part of the loss has no graph; without, both have one."""
        obs = self._normalize(batch["observations"])
        next_obs = self._normalize(batch["next_observations"])
        actor = branch("actor", self._actor_loss, obs, batch["actions"], noise, direct)
        critic_loss, critic_metrics = self._critic_loss(obs, next_obs, batch, noise, direct)
        critic_loss = settled(critic_loss)
        actor_loss, actor_metrics = actor.join()
        metrics = {f"critic/{name}": value for name, value in critic_metrics.items()}
        metrics |= {f"actor/{name}": value for name, value in actor_metrics.items()}
        # What native code has computed has no graph.
        metrics = {name: value.detach() if value.requires_grad else value for name, value in metrics.items()}
        return critic_loss, actor_loss, metrics

    def _one_pass(self, name: str, rows: int, direct: bool) -> FlatGradients | None:
        """Where the gradients of the network `name` go if native code computes them along with its loss; else None.
        Work for several threads takes autograd's two passes, the first of which is shared out in smaller parts."""
        known = self._known[name]
        if torch.compiler.is_compiling() or not (
            direct and self._native and self.device.type == "cpu" and known.size * rows < ONE_THREAD
        ):
            return None
        return known if all(p.requires_grad for p in known.parameters) else None

    def _actor_loss(
        self, obs: Tensor, actions: Tensor, noise: FqlActorNoise, direct: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config, flow = self.config, self.networks.actor_bc_flow
        bc_flow = branch("bc flow", lambda: settled(self._bc_flow_loss(obs, actions, noise, direct)))
        with torch.no_grad():
            flow_action = flow(obs, noise.action)
        found = self._onestep_loss(obs, flow_action, noise, direct)
        if found is None:
            action = self.networks.actor_onestep_flow(obs, noise.action, raw=True)
            distill_loss = (action - flow_action).square().mean()
            q_mean, q_loss = self._value_term(obs, action, noise)
        else:
            distill_loss, q_mean, q_loss = found
        onestep_loss = settled(config.alpha * distill_loss + q_loss)
        bc_flow_loss = bc_flow.join()
        actor_loss = bc_flow_loss + onestep_loss
        return actor_loss, {
            "actor_loss": actor_loss,
            "bc_flow_loss": bc_flow_loss,
            "distill_loss": distill_loss,
            "q_loss": q_loss,
            "q": q_mean,
        }

    def _value_term(self, obs: Tensor, action: Tensor, noise: FqlActorNoise) -> tuple[Tensor, Tensor]:
        """The mean value of the policy's actions and its term of the loss."""
        q = self._value(obs, action.clamp(-1, 1), noise)
        q_mean = q.mean()
        return q_mean, -q_mean / q.detach().abs().mean() if self.config.normalize_q_loss else -q_mean

    def _bc_flow_loss(self, obs: Tensor, actions: Tensor, noise: FqlActorNoise, direct: bool) -> Tensor:
        flow = self.networks.actor_bc_flow
        known = self._one_pass("actor_bc_flow", len(actions), direct)
        if known is not None:
            rows = (noise.bc_noise.unsqueeze(1), actions, noise.bc_time.unsqueeze(1), obs)
            options = {"backend": flow.backend, "precision": flow.precision}
            loss = matching_gradients(flow.field, *rows, gradients=known.parts, **options)
            if loss is not None:
                known.attach()
                return loss
        return flow.loss(obs, actions, noise.bc_noise, noise.bc_time)

    def _onestep_loss(
        self, obs: Tensor, flow_action: Tensor, noise: FqlActorNoise, direct: bool
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """The policy's distillation loss, mean value and value term, with its gradients in place; None, and nothing
        done, where native code does not do that, see `_one_pass`."""
        config, networks = self.config, self.networks
        known = self._one_pass("actor_onestep_flow", len(obs), direct)
        if known is None:
            return None
        # What an agent climbs besides a plain critic is its own affair.
        if type(self)._value is FqlActorAgent._value and not config.normalize_q_loss:
            given = (obs, noise.action, networks.critic, flow_action, config.alpha, known.parts)
            found = networks.actor_onestep_flow._climb(*given)
            if found is not None:
                known.attach()
                return *found, -found[1]
        onestep = networks.actor_onestep_flow._pass(obs, noise.action)
        if onestep is None:
            return None
        action = onestep.y.requires_grad_()
        q_mean, q_loss = self._value_term(obs, action, noise)
        slope = torch.autograd.grad(q_loss, action)[0]
        away = onestep.y.detach() - flow_action
        onestep.back((away * (2 * config.alpha / away.numel())).add_(slope), known.parts)
        known.attach()
        return away.square().mean(), q_mean.detach(), q_loss.detach()

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
        check_state(self._name, own, state)
        if not torch.equal(state["reward_range"].cpu(), own["reward_range"]):
            other = tuple(state["reward_range"].tolist())
            raise ValueError(f"{self._name}.load_state_dict: reward_range must be {self.reward_range}, got {other}")
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
            raise ValueError(f"{self._name}: batch must have {', '.join(_BATCH_KEYS)}; {', '.join(missing)} missing")
        observations = batch["observations"]
        self._check("observations", observations, (None, self.obs_dim))
        b = observations.shape[0]
        if b == 0:
            raise ValueError(f"{self._name}: batch must have at least one row, got none")
        self._check("actions", batch["actions"], (b, self.action_dim))
        self._check("next_observations", batch["next_observations"], (b, self.obs_dim))
        self._check("rewards", batch["rewards"], (b,))
        self._check("masks", batch["masks"], (b,))

    def _check(self, name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
        check_tensor(self._name, name, tensor, shape, self.dtype, self.device)


def actor_flops(config: FqlActorConfig, obs_dim: int, action_dim: int) -> int:
    """Floating-point operations of the actors' losses, without the critic's values, see `fastflow.flops`."""
    rows, hidden = config.batch_size, config.actor_hidden_dims
    flow = (obs_dim + action_dim + 1, *hidden, action_dim)
    onestep = (obs_dim + action_dim, *hidden, action_dim)
    walk = forward_flops(flow, config.flow_steps * rows)
    return training_flops(flow, rows) + walk + training_flops(onestep, rows)


def _can_fuse(device: torch.device) -> bool:
    return device.type in ("cpu", "cuda")
