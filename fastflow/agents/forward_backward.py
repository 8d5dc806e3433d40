"""Forward-Backward representations (Touati and Ollivier, arXiv:2103.07945; Touati et al., arXiv:2209.14935): a family
of policies pi_w, one for every reward, learnt from transitions without rewards.

Two maps factorise the successor measure of every policy of the family over the data's distribution rho of states,

    sum_{k >= 1} gamma^(k-1) Pr(S_k in X | s, a, pi_z) = integral over X of F(s, a, z)^T B(s') rho(ds'),

and pi_z is greedy for Q_z(s, a) = F(s, a, z)^T z. A reward r has the policy of z = E_rho[r(s) B(s)], up to scale. The
measure starts at the next state, as in `fastflow.successor`, so a reward belongs to the state that is reached.

Letters: B batch, E members of F, O observation, A action, W (z_dim) the embedding z, which the rest of the library
calls w.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflow import reference
from fastflow.agents.checks import check_config, check_state, check_tensor, check_widths, copy_state, ready_moments
from fastflow.agents.descent import Descent, GradientStep
from fastflow.fields import Dense, LayerNormAffine

__all__ = [
    "PRESETS",
    "ForwardBackwardAgent",
    "ForwardBackwardConfig",
    "ForwardBackwardNetworks",
    "ForwardBackwardNoise",
    "preset_for",
]


# Configuration ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ForwardBackwardConfig:
    """Every hyperparameter; defaults are those that TD-Flow (arXiv:2503.09817, its Table 8) lists for walker.

    Raises:
        ValueError: a value outside its range. TypeError: a value of another type. Both name the field.
    """

    z_dim: int = 100
    """Width of F, B and z: how many features the policies' measures are made of."""
    discount: float = 0.98
    """Discount factor gamma."""
    batch_size: int = 2048
    """Transitions per update; the loss is over all pairs of them."""
    lr_f: float = 1e-4
    """Adam's learning rate for F."""
    lr_b: float = 1e-4
    """Adam's learning rate for B."""
    lr_actor: float = 1e-4
    """Adam's learning rate for the policies."""
    tau: float = 0.01
    """Share of F and B that their targets take over at every update."""
    ortho_coef: float = 1.0
    """Weight of the loss that makes B orthonormal over the data."""
    goal_prob: float = 0.0
    """Share of the training's z that are B of a state of the batch; the others are uniform on the sphere."""
    policy_noise: float = 0.2
    """Standard deviation of the noise on the target's actions (TD3)."""
    noise_clip: float = 0.3
    """Largest absolute value of that noise."""
    num_ensembles: int = 2
    """Members of F."""
    q_agg: Literal["min", "mean"] = "min"
    """How the members are combined, in the bootstrapped target and for the policies. min is cautious, as in TD3, and
    makes the measures too small; with mean their total mass is right."""
    hidden_dim: int = 1024
    """Width of the hidden layers of F and of the policies."""
    feature_dim: int = 512
    """Width of what their two encoders give."""
    backward_hidden_dims: tuple[int, ...] = (512, 512, 512)
    """Hidden layers of B."""

    def __post_init__(self) -> None:
        check_widths(self, "backward_hidden_dims")
        check_config(self, _LEAST, _RANGES, _CHOICES)


# A pair of rows is what the loss is about, and B(s) in one dimension would be a sign.
_LEAST = {"z_dim": 2, "batch_size": 2, "num_ensembles": 1, "hidden_dim": 1, "feature_dim": 1}
_RANGES = {
    "discount": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "lr_f": (lambda x: x > 0, "a positive number"),
    "lr_b": (lambda x: x > 0, "a positive number"),
    "lr_actor": (lambda x: x > 0, "a positive number"),
    "tau": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "ortho_coef": (lambda x: x >= 0, "at least 0"),
    "goal_prob": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    "policy_noise": (lambda x: x >= 0, "at least 0"),
    "noise_clip": (lambda x: x >= 0, "at least 0"),
}
_CHOICES = {"q_agg": ("min", "mean")}

_CPU: dict[str, Any] = {
    "z_dim": 64,
    "batch_size": 256,
    "lr_f": 1e-3,
    "lr_b": 3e-4,
    "tau": 0.005,
    "goal_prob": 0.5,
    "q_agg": "mean",
    "hidden_dim": 128,
    "feature_dim": 64,
    "backward_hidden_dims": (128, 128),
}

PRESETS: dict[str, dict[str, Any]] = {
    # As published, for 5 M updates.
    "pointmass-maze": {
        "discount": 0.99,
        "batch_size": 1024,
        "lr_b": 1e-6,
        "lr_actor": 1e-6,
        "goal_prob": 0.5,
    },
    # Small enough for one CPU core.
    "pointmass-maze-cpu": _CPU,
    "pointmaze-cpu": _CPU,
}
"""Settings by name, as what differs from `ForwardBackwardConfig()`. Learning rates, sizes of z and batch, gamma, goal
share, noise and target rate of `pointmass-maze` are TD-Flow's (Table 8); the networks' widths, which it does not list,
and the presets for a CPU are ours. They expect `observation_statistics`."""

_LOOP_CPU: dict[str, Any] = {
    "steps": 6_000,
    "log_interval": 500,
    "eval_interval": 2_000,
    "save_interval": 2_000,
    "threads": 1,
}
LOOP_PRESETS: dict[str, dict[str, Any]] = {
    "pointmass-maze": {"steps": 5_000_000},
    "pointmass-maze-cpu": _LOOP_CPU,
    "pointmaze-cpu": _LOOP_CPU,
}
"""Defaults of the training loop that go with a preset."""


def preset_for(env_name: str) -> str | None:
    """Name of the preset for a world; None if none fits."""
    family = re.match(r"pointmass-maze|pointmaze", env_name)
    return f"{family[0]}-cpu" if family else None


# Networks -----------------------------------------------------------------------------------------------------------


class _Standardized(nn.Module):
    """Dense -> LayerNorm -> tanh, [..., in] -> [..., out]: brings inputs of any scale into range."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.dense, self.norm = Dense(inputs, outputs), LayerNormAffine(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return reference.layer_norm(self.dense(x), self.norm.weight, self.norm.bias, 1e-5).tanh()


class _Encoder(nn.Module):
    """A standardised layer, then Dense -> ReLU: [..., in] -> [..., out]."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.first, self.last = _Standardized(inputs, hidden), Dense(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x)).relu()


class _Head(nn.Module):
    """Dense -> ReLU -> Dense on two encodings, by one network or E side by side."""

    def __init__(self, inputs: int, hidden: int, outputs: int, ensemble: int | None = None) -> None:
        super().__init__()
        self.ensemble = ensemble
        self.first, self.last = Dense(inputs, hidden, ensemble), Dense(hidden, outputs, ensemble)

    def forward(self, x: Tensor) -> Tensor:
        if self.ensemble is not None:
            x = x.expand(self.ensemble, *x.shape)
        return self.last(self.first(x).relu())


class ForwardMap(nn.Module):
    """F: observations [N, O], actions [N, A], z [N, W] -> [E, N, W]; (s, a) and (s, z) have an encoder each."""

    def __init__(self, config: ForwardBackwardConfig, obs_dim: int, action_dim: int) -> None:
        super().__init__()
        z, hidden, features = config.z_dim, config.hidden_dim, config.feature_dim
        self.state_action = _Encoder(obs_dim + action_dim, hidden, features)
        self.state_task = _Encoder(obs_dim + z, hidden, features)
        self.head = _Head(2 * features, hidden, z, config.num_ensembles)

    def forward(self, obs: Tensor, action: Tensor, z: Tensor) -> Tensor:
        pair = self.state_action(torch.cat((obs, action), -1)), self.state_task(torch.cat((obs, z), -1))
        return self.head(torch.cat(pair, -1))


class BackwardMap(nn.Module):
    """B: states [N, O] -> [N, W] on the sphere of radius sqrt(W)."""

    def __init__(self, config: ForwardBackwardConfig, obs_dim: int) -> None:
        super().__init__()
        widths = (*config.backward_hidden_dims, config.z_dim)
        self.first = _Standardized(obs_dim, widths[0])
        self.layers = nn.ModuleList(Dense(i, o) for i, o in zip(widths[:-1], widths[1:], strict=True))

    def forward(self, obs: Tensor) -> Tensor:
        x = self.first(obs)
        for i, layer in enumerate(self.layers):
            x = layer(x.relu() if i else x)
        return _on_sphere(x)


class Actor(nn.Module):
    """pi: observations [N, O], z [N, W] -> actions [N, A] in [-1, 1]; s and (s, z) have an encoder each."""

    def __init__(self, config: ForwardBackwardConfig, obs_dim: int, action_dim: int) -> None:
        super().__init__()
        hidden, features = config.hidden_dim, config.feature_dim
        self.state = _Encoder(obs_dim, hidden, features)
        self.state_task = _Encoder(obs_dim + config.z_dim, hidden, features)
        self.head = _Head(2 * features, hidden, action_dim)

    def forward(self, obs: Tensor, z: Tensor) -> Tensor:
        pair = self.state(obs), self.state_task(torch.cat((obs, z), -1))
        return self.head(torch.cat(pair, -1)).tanh()


class ForwardBackwardNetworks(nn.Module):
    """All networks, on the CPU in float32, with weights from `generator`.

    Attributes:
        forward_map, backward_map, actor: F, B and pi.
        target_forward_map, target_backward_map: moving averages of the first two.
    """

    def __init__(
        self, config: ForwardBackwardConfig, obs_dim: int, action_dim: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        # On the meta device the constructors' own initialisation draws nothing from torch's global generator.
        with torch.device("meta"):
            self.forward_map, self.target_forward_map = (ForwardMap(config, obs_dim, action_dim) for _ in range(2))
            self.backward_map, self.target_backward_map = (BackwardMap(config, obs_dim) for _ in range(2))
            self.actor = Actor(config, obs_dim, action_dim)
        self.to(dtype=torch.float32).to_empty(device="cpu")
        for network in (self.forward_map, self.backward_map, self.actor):
            for module in network.modules():
                if isinstance(module, (Dense, LayerNormAffine)):
                    module.reset_parameters(generator)
        self.target_forward_map.load_state_dict(self.forward_map.state_dict())
        self.target_backward_map.load_state_dict(self.backward_map.state_dict())
        self.target_forward_map.requires_grad_(False)
        self.target_backward_map.requires_grad_(False)


def _on_sphere(x: Tensor) -> Tensor:
    """x [..., W] scaled to length sqrt(W)."""
    return math.sqrt(x.shape[-1]) * F.normalize(x, dim=-1)


# The agent ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class ForwardBackwardNoise:
    """All random numbers of one update."""

    direction: Tensor
    """Gaussian, [B, W]: directions of the z that are uniform on the sphere."""
    goal: Tensor
    """A permutation, [B]: whose next states the other z are B of."""
    mixture: Tensor
    """Uniform, [B]: which of the two a row takes."""
    action: Tensor
    """Gaussian, [B, A]: noise of the target's actions, before its scale and clip."""


class ForwardBackwardAgent:
    """F, B, the family of policies, and their training.

    Args:
        config: hyperparameters.
        obs_dim, action_dim: O and A.
        device: where the networks live; batches and observations must be there.
        seed: of the initial weights (the same on every device) and of all noise.
        observation_statistics: (mean [O], std [O]); observations then enter all networks as (obs - mean) / std.
        dtype: of parameters and batches.

    Attributes:
        networks: see `ForwardBackwardNetworks`.
        policy_dim: W, what a policy's embedding has.
        optimizer: one Adam with a group each for F, B and the policies.
        generator: source of all noise.
        step: updates done.

    Raises:
        ValueError, TypeError: an argument that cannot be.
    """

    def __init__(
        self,
        config: ForwardBackwardConfig,
        obs_dim: int,
        action_dim: int,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        observation_statistics: tuple[Tensor, Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not isinstance(config, ForwardBackwardConfig):
            raise TypeError(
                f"ForwardBackwardAgent: config must be a ForwardBackwardConfig, got {type(config).__name__}"
            )
        self.config = config
        self.obs_dim, self.action_dim, self.policy_dim = obs_dim, action_dim, config.z_dim
        self.device, self.dtype, self.seed = torch.device(device), dtype, seed
        self.step = 0
        self.observation_mean, self.observation_std = self._statistics(observation_statistics)

        # Weights are drawn on the CPU in float32 whatever the device and dtype, so that a seed fixes them everywhere.
        source = torch.Generator().manual_seed(seed)
        noise_seed = int(torch.randint(2**62, (), generator=source))
        self.generator = torch.Generator(self.device).manual_seed(noise_seed)
        self.networks = ForwardBackwardNetworks(config, obs_dim, action_dim, source)
        self.networks.to(device=self.device, dtype=dtype)
        maps = (self.networks.forward_map, self.networks.backward_map)
        targets = (self.networks.target_forward_map, self.networks.target_backward_map)
        self._online: list[Tensor] = [p for network in maps for p in network.parameters()]
        self._target: list[Tensor] = [p for network in targets for p in network.parameters()]
        self._actor: list[nn.Parameter] = list(self.networks.actor.parameters())
        self.optimizer = torch.optim.Adam(
            [
                {"params": list(maps[0].parameters()), "lr": config.lr_f},
                {"params": list(maps[1].parameters()), "lr": config.lr_b},
                {"params": self._actor, "lr": config.lr_actor},
            ],
            betas=(0.9, 0.999),
            eps=1e-8,
            fused=self.device.type in ("cpu", "cuda"),
        )
        ready_moments(self.optimizer, self.device)
        self._descent = Descent(self.optimizer)

    def _statistics(self, statistics: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        if statistics is None:
            statistics = torch.zeros(self.obs_dim), torch.ones(self.obs_dim)
        mean, std = (torch.as_tensor(s).to(device=self.device, dtype=self.dtype, copy=True) for s in statistics)
        for name, value in (("mean", mean), ("std", std)):
            if value.shape != (self.obs_dim,):
                raise ValueError(
                    f"ForwardBackwardAgent: observation_statistics {name} must be [{self.obs_dim}], "
                    f"got {list(value.shape)}"
                )
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
            raise ValueError("ForwardBackwardAgent: observation_statistics must be finite with every std positive")
        return mean, std

    # Training -------------------------------------------------------------------------------------------------------

    def update(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One update of all networks. Never waits for the device.

        Args:
            batch: observations [B, O], actions [B, A], next_observations [B, O], of the agent's dtype on its device;
                two rows at least. More keys are ignored: there are no rewards, and no state is terminal.

        Returns:
            The losses and values as 0-d tensors, without gradient, see `losses`.

        Raises:
            ValueError, TypeError: a missing key, a tensor of another shape, dtype or device, too few rows.
        """
        return self.update_by(self.gradient_step, batch)

    def update_by(self, step: GradientStep, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`update` with `step` in place of `gradient_step`, such as a graph of it (`fastflow.graphs`)."""
        self._check_batch(batch)
        metrics = step(batch)
        self.step += 1
        return metrics

    def gradient_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The part of an update that runs on the device, and reads nothing of the host's that changes between updates.

        Args:
            batch: as for `update`, checked.
        """
        loss, actor_loss, metrics = self.losses(batch, self.sample_noise(batch))
        self.optimizer.zero_grad(set_to_none=True)
        # The policies' value passes through F, which must not learn from it.
        for parameter, gradient in zip(self._actor, torch.autograd.grad(actor_loss, self._actor), strict=True):
            parameter.grad = gradient
        loss.backward()
        self._descent.step()
        with torch.no_grad():
            torch._foreach_lerp_(self._target, self._online, self.config.tau)
        return metrics

    def validate(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `update` returns, without an update, on noise that depends on seed and step alone."""
        self._check_batch(batch)
        generator = torch.Generator(self.device).manual_seed(self.seed + self.step)
        with torch.no_grad():
            return self.losses(batch, self.sample_noise(batch, generator))[2]

    def sample_noise(
        self, batch: Mapping[str, Tensor], generator: torch.Generator | None = None
    ) -> ForwardBackwardNoise:
        """Fresh noise for one update on `batch`, from `generator` or the agent's own."""
        b = batch["actions"].shape[0]
        options: dict[str, Any] = {
            "generator": self.generator if generator is None else generator,
            "device": self.device,
            "dtype": self.dtype,
        }
        return ForwardBackwardNoise(
            direction=torch.randn(b, self.policy_dim, **options),
            goal=torch.randperm(b, generator=options["generator"], device=self.device),
            mixture=torch.rand(b, **options),
            action=torch.randn(b, self.action_dim, **options),
        )

    def losses(
        self, batch: Mapping[str, Tensor], noise: ForwardBackwardNoise
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The loss of F and B, and that of the policies.

        Args:
            batch: as for `update`. noise: as from `sample_noise`.

        Returns:
            Two losses, 0-d. The first has gradients for F and B alone; the second is for the policies, but has
            gradients for F too, which are not to be used. Metrics, 0-d and without gradient: under `fb/` the loss and
            its three parts, under `actor/` the mean value Q_z of the policies' own actions.
        """
        obs, next_obs = self._normalize(batch["observations"]), self._normalize(batch["next_observations"])
        networks, config = self.networks, self.config
        features = networks.backward_map(next_obs)  # [B, W]
        with torch.no_grad():
            z = torch.where(
                (noise.mixture < config.goal_prob).unsqueeze(-1), features[noise.goal], _on_sphere(noise.direction)
            )
            smoothing = (config.policy_noise * noise.action).clamp(-config.noise_clip, config.noise_clip)
            next_action = (networks.actor(next_obs, z) + smoothing).clamp(-1, 1)
            target_features = networks.target_backward_map(next_obs)
            target = self._aggregate(networks.target_forward_map(next_obs, next_action, z) @ target_features.mT)
        # Density [E, B, B] of the measure of row i at the state of row j. Off the diagonal that state is a draw from
        # the data that knows nothing of the row.
        measure = networks.forward_map(obs, batch["actions"], z) @ features.mT
        off_diagonal = _mean_off_diagonal((measure - config.discount * target).square())
        diagonal = -2 * measure.diagonal(dim1=-2, dim2=-1).mean(-1)
        fb_loss = (off_diagonal + diagonal).sum()
        # |E[B B^T] - I|^2 less the constant W; its diagonal part is constant too, B being on a sphere.
        ortho_loss = _mean_off_diagonal((features @ features.mT).square()) - 2 * features.square().sum(-1).mean()
        loss = fb_loss + config.ortho_coef * ortho_loss

        q = self._aggregate((networks.forward_map(obs, networks.actor(obs, z), z) * z).sum(-1)).mean()
        metrics = {
            "fb/loss": loss,
            "fb/off_diagonal": off_diagonal.mean(),
            "fb/diagonal": diagonal.mean(),
            "fb/orthonormality": ortho_loss + self.policy_dim,
            "actor/q": q,
        }
        return loss, -q, {name: value.detach() for name, value in metrics.items()}

    def _aggregate(self, values: Tensor) -> Tensor:
        """Over the members, [E, ...] -> [...]."""
        return values.amin(0) if self.config.q_agg == "min" else values.mean(0)

    # Using what was learned -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, observations: Tensor, w: Tensor) -> Tensor:
        """Actions [N, A] in [-1, 1] of the policies w at observations [N, O], without noise.

        Args:
            observations: [N, O].
            w: [N, W], or [W] for all rows; as the methods below make them. Their length is not corrected.

        Raises:
            ValueError, TypeError: a tensor of another shape, dtype or device.
        """
        self._check("observations", observations, (None, self.obs_dim))
        return self.networks.actor(self._normalize(observations), self._embeddings(w, observations.shape[0]))

    @torch.no_grad()
    def goal_embedding(self, observations: Tensor) -> Tensor:
        """The policies that head for these states: B, [N, O] -> [N, W].

        Raises:
            ValueError, TypeError: observations of another shape, dtype or device.
        """
        self._check("observations", observations, (None, self.obs_dim))
        return self.networks.backward_map(self._normalize(observations))

    @torch.no_grad()
    def task_embedding(self, observations: Tensor, rewards: Tensor) -> Tensor:
        """The policy for a reward: the mean of r(s) B(s) on the sphere, [W].

        Args:
            observations: states from the distribution that was trained on (its next_observations), [N, O].
            rewards: for reaching them, [N].

        Raises:
            ValueError: nothing to learn a task from, such as rewards that are all 0.
            ValueError, TypeError: a tensor of another shape, dtype or device.
        """
        self._check("observations", observations, (None, self.obs_dim))
        self._check("rewards", rewards, (observations.shape[0],))
        mean = (rewards.unsqueeze(-1) * self.goal_embedding(observations)).sum(0)
        if not (torch.isfinite(mean).all() and mean.any()):
            raise ValueError("ForwardBackwardAgent: rewards must be finite and not all 0")
        return _on_sphere(mean)

    @torch.no_grad()
    def sample_embeddings(
        self, num: int, generator: torch.Generator | None = None, observations: Tensor | None = None
    ) -> Tensor:
        """Policies [num, W] as in training: uniform on the sphere, or `goal_prob` of them towards random states.

        Args:
            num: how many.
            generator: of the draws, on the agent's device; the agent's own if None.
            observations: states [M, O] to choose goals from; None for no goals.

        Raises:
            ValueError, TypeError: num < 0, or observations of another shape, dtype or device.
        """
        if num < 0:
            raise ValueError(f"ForwardBackwardAgent: num must be at least 0, got {num}")
        options: dict[str, Any] = {"generator": self.generator if generator is None else generator}
        options["device"] = self.device
        uniform = _on_sphere(torch.randn(num, self.policy_dim, dtype=self.dtype, **options))
        if observations is None:
            return uniform
        self._check("observations", observations, (None, self.obs_dim))
        if not len(observations):
            raise ValueError("ForwardBackwardAgent: observations must have at least one row, got none")
        goals = self.goal_embedding(observations[torch.randint(len(observations), (num,), **options)])
        towards = torch.rand(num, 1, dtype=self.dtype, **options) < self.config.goal_prob
        return torch.where(towards, goals, uniform)

    @torch.no_grad()
    def value(self, observations: Tensor, actions: Tensor, w: Tensor, task: Tensor | None = None) -> Tensor:
        """Q of the policies w for the reward whose embedding is `task`, up to that reward's scale: F(s, a, w)^T task.

        Args:
            observations: [N, O]. actions: [N, A].
            w: [N, W] or [W], the policies.
            task: [N, W] or [W], the reward; None for each policy's own. With many policies and one task these are the
                values of generalised policy improvement.

        Returns:
            [N].

        Raises:
            ValueError, TypeError: a tensor of another shape, dtype or device.
        """
        found = self._forward(observations, actions, w)
        task = self._embeddings(w if task is None else task, observations.shape[0])
        return self._aggregate((found * task).sum(-1))

    @torch.no_grad()
    def density_ratio(self, observations: Tensor, actions: Tensor, w: Tensor, states: Tensor) -> Tensor:
        """How much more of the policy's future is spent around `states` than of the data: (1 - gamma) F^T B.

        The density of the normalised successor measure m(. | s, a, pi_w) relative to the data's; its mean over the data
        is 1 where it is exact. It is an estimate of low rank and can be negative.

        Args:
            observations: [N, O]. actions: [N, A]. w: [N, W] or [W].
            states: [M, O].

        Returns:
            [N, M].

        Raises:
            ValueError, TypeError: a tensor of another shape, dtype or device.
        """
        features = self.goal_embedding(states)
        return (1 - self.config.discount) * self._forward(observations, actions, w).mean(0) @ features.mT

    def _forward(self, observations: Tensor, actions: Tensor, w: Tensor) -> Tensor:
        """F, [E, N, W]."""
        self._check("observations", observations, (None, self.obs_dim))
        self._check("actions", actions, (observations.shape[0], self.action_dim))
        z = self._embeddings(w, observations.shape[0])
        return self.networks.forward_map(self._normalize(observations), actions, z)

    # State ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """All that exact resumption needs, as flat names to copies of tensors.

        Parameters under their names, Adam's moments under `adam/exp_avg/<name>` and `adam/exp_avg_sq/<name>`, `step`,
        `generator`, `observation_mean` and `observation_std`.
        """
        return {name: tensor.detach().clone() for name, tensor in self._tensors().items()} | {
            "step": torch.tensor(self.step, dtype=torch.int64),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over a state of an agent with the same configuration and sizes. All or nothing.

        Raises:
            ValueError: names, shapes or dtypes differ, or a generator of another kind of device. TypeError: not
                tensors. The agent is then as it was.
        """
        check_state("ForwardBackwardAgent", self.state_dict(), state)
        copy_state(self, self._tensors(), state)

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = dict(self.networks.named_parameters())
        for name, parameter in self.networks.named_parameters():
            if parameter.requires_grad:
                moments = self.optimizer.state[parameter]
                tensors |= {f"adam/{key}/{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
        return tensors | {"observation_mean": self.observation_mean, "observation_std": self.observation_std}

    # Checks ---------------------------------------------------------------------------------------------------------

    def _normalize(self, observations: Tensor) -> Tensor:
        return (observations - self.observation_mean) / self.observation_std

    def _embeddings(self, w: Tensor, rows: int) -> Tensor:
        """w as [rows, W]."""
        if isinstance(w, Tensor) and w.dim() == 1:
            self._check("w", w, (self.policy_dim,))
            return w.expand(rows, -1)
        self._check("w", w, (rows, self.policy_dim))
        return w

    def _check_batch(self, batch: Mapping[str, Tensor]) -> None:
        """Shapes, dtypes and devices only: looking at values would wait for the device."""
        widths = {"observations": self.obs_dim, "actions": self.action_dim, "next_observations": self.obs_dim}
        missing = [key for key in widths if key not in batch]
        if missing:
            raise ValueError(f"ForwardBackwardAgent: batch must have {', '.join(widths)}; {', '.join(missing)} missing")
        self._check("observations", batch["observations"], (None, self.obs_dim))
        b = batch["observations"].shape[0]
        for key, width in widths.items():
            self._check(key, batch[key], (b, width))
        if b < 2:
            raise ValueError(f"ForwardBackwardAgent: batch must have at least two rows, got {b}")

    def _check(self, name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
        check_tensor("ForwardBackwardAgent", name, tensor, shape, self.dtype, self.device)


def _mean_off_diagonal(pairs: Tensor) -> Tensor:
    """The mean over i != j, [..., B, B] -> [...]."""
    b = pairs.shape[-1]
    own = torch.eye(b, dtype=torch.bool, device=pairs.device)
    return pairs.masked_fill(own, 0).sum((-2, -1)) / (b * (b - 1))
