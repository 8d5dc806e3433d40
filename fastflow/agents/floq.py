"""floq (Agrawalla et al., arXiv:2509.06863): RL whose critic is a flow, with the actor of FQL (arXiv:2502.02538).

The critic is a velocity field v(z, t | s, a) over scalars. A value is the end of a K-step walk from uniform noise, and
the field is trained to walk to the bootstrapped target. A plain critic is distilled from it for the actor
(`fastflow.agents.fql_actor`), a one-step policy distilled from a behaviour-cloning flow. Names of hyperparameters,
networks and metrics are the published code's.

Letters: B batch, E members of the flow critic, S noise samples per transition, O observation, A action.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor

from fastflow import ops, reference
from fastflow.agents.backup import Backup, share_outside
from fastflow.agents.checks import check_config, check_widths
from fastflow.agents.descent import GradientStep
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
    reward_range,
)
from fastflow.branches import branch, settled
from fastflow.features import feature_norm
from fastflow.fields import MLP, Cosine, CosineFourier, RawTime, ResidualMLP, Scaled, TimeEmbedding
from fastflow.flops import forward_flops, input_gradient_flops, training_flops
from fastflow.matching_gradients import matching_gradients
from fastflow.modules import FlowCritic, ValueNetwork, value_ranges

__all__ = ["PRESETS", "FloqAgent", "FloqConfig", "FloqNetworks", "FloqNoise", "flops", "preset_for", "reward_range"]


# Configuration ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FloqConfig(FqlActorConfig):
    """Every hyperparameter of floq under its published name; defaults are the published ones.

    Raises:
        ValueError: a value outside its range. TypeError: a value of another type. Both name the field.
    """

    critic_flow_steps: int = 8
    """K: Euler steps of the critic's walk. Tune among 4, 8 and 16."""
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
    prediction: Literal["velocity", "endpoint"] = "velocity"
    """What the flow critic's network puts out. endpoint (an ablation) is the value itself: the walk follows
    (value - z) / (1 - t), where 1 - t is 1 / K at least, and the loss is the squared error of the value."""
    backup: Literal["expected", "distributional"] = "expected"
    """expected: all noise samples of a transition learn the mean of its bootstrapped values. distributional (an
    ablation): each learns its own."""
    critic_target: Literal["policy", "data", "returns"] = "policy"
    """What follows a transition in the critic's target: the policy's action (Q-learning), the dataset's (SARSA), or
    the dataset's whole return, without bootstrapping (Monte Carlo). The last two are ablations."""
    target_noise: float = 0.0
    """Standard deviation of Gaussian noise on the critic's targets (an ablation)."""
    freeze_features_at: int = 0
    """Update before which the flow critic's hidden layers stop learning and its head begins anew (an ablation); 0 is
    never."""
    block_width: int = 512
    """Width of the flow critic's hidden layers."""
    block_depth: int = 4
    """Number of the flow critic's hidden layers; with use_resnets of the hidden layers in each block."""
    use_resnets: bool = False
    """A residual flow critic: one hidden layer, then num_transformations blocks whose output is added to their
    input."""
    num_transformations: int = 2
    """Blocks of the residual flow critic."""
    activate_before_layernorm: bool = True
    """Whether the flow critic's hidden layers apply LayerNorm behind the activation, or before it."""
    value_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)
    """Hidden layers of the distilled critic."""
    num_candidates: int = 1
    """N: acting and the critic's target take, of N actions of the one-step policy, the one that the distilled critic
    values most. 1 is the published algorithm."""
    clip_values: bool = False
    """Clip to what rewards can add up to, [r_min, r_max] / (1 - discount): values of next actions in the critic's
    target, and those that candidates are compared by. The published algorithm does not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_widths(self, "value_hidden_dims")
        check_config(self, _LEAST, _RANGES, _CHOICES)

    @property
    def further_keys(self) -> tuple[str, ...]:
        """What a batch must hold beside the usual keys, see `fastflow.data.Dataset.with_behaviour`."""
        return {"policy": (), "data": ("next_actions",), "returns": ("returns",)}[self.critic_target]


_LEAST = {
    "critic_flow_steps": 1,
    "noise_samples": 1,
    "flow_num_ensembles": 1,
    "num_ensembles": 1,
    "num_bins": 2,
    "time_embed_dim": 1,
    "block_width": 1,
    "block_depth": 1,
    "num_transformations": 1,
    "freeze_features_at": 0,
    "num_candidates": 1,
}
_RANGES = {
    "noise_coverage": (lambda x: x >= 0, "at least 0"),
    "target_noise": (lambda x: x >= 0, "at least 0"),
    "sigma": (lambda x: x > 0, "a positive number of bins"),
    "reward_offset": (lambda x: x > 0, "a positive number"),
}
_CHOICES = {
    "time_embedding": ("cosine", "fourier", "raw"),
    "prediction": ("velocity", "endpoint"),
    "backup": ("expected", "distributional"),
    "critic_target": ("policy", "data", "returns"),
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

# Small enough for one CPU core. It expects observations scaled to a standard deviation of 4.
_DEMO: dict[str, Any] = {
    **DEMO,
    "noise_samples": 1,
    "noise_coverage": 0.03,
    "sigma": 3.0,
    "block_width": 64,
    "block_depth": 2,
}

PRESETS: dict[str, dict[str, Any]] = {
    **{
        name + suffix: {**row[0], **row[i]}
        for name, row in _PUBLISHED.items()
        for i, suffix in ((0, ""), (1, "/best"), (2, "/online"))
    },
    DEMO_NAME: _DEMO,
    # The same networks where walls stand between places and the data have no row near most corners (docs/floq.md,
    # "Robust learning").
    "pointmaze-medium-navigate/cpu": {
        **_DEMO,
        # The one-step policy stays with the data, which go back and forth, and the best of four actions goes the right
        # way. A smaller alpha tilts it to wherever the critic says, also where that knows nothing.
        "alpha": 10.0,
        "num_candidates": 4,
        # No value can be above 0; behind the goal, where there are no data, the critic's are.
        "clip_values": True,
        "discount": 0.995,
        # Values come down from 0 in some 1 / (1 - discount) moves of the target.
        "tau": 0.05,
        # A walk of this field ends about as far from others as it began, and one walk is one target: what it begins
        # with is noise on targets, whose differences between good and bad actions are about 1.
        "noise_coverage": 0.003,
        "lr_decay_steps": 12_000,
    },
    # Robot manipulation on one CPU core: the published setting with narrower networks, one noise sample, and a larger
    # learning rate that decays.
    "cube-single-play/cpu": {
        **_DEMO,
        **_PUBLISHED["cube-single-play"][0],
        "block_width": 128,
        "value_hidden_dims": (128, 128, 128),
        "actor_hidden_dims": (128, 128, 128),
        "lr_decay_steps": 50_000,
    },
}
"""Settings by name, as what differs from `FloqConfig()`. `<environment>-<dataset type>` is the published offline
setting with K = 8 and a noise coverage of 0.1 everywhere, `/best` the one with both tuned, `/online` that of online
fine-tuning."""

LOOP_PRESETS: dict[str, dict[str, Any]] = {
    **{f"{name}/online": {"steps": 1_000_000, "online_steps": 2_000_000} for name in _PUBLISHED},
    # Minutes on one CPU core.
    DEMO_NAME: DEMO_LOOP,
    "pointmaze-medium-navigate/cpu": {
        **DEMO_LOOP,
        "steps": 12_000,
        "eval_interval": 2_000,
        "save_interval": 2_000,
    },
    "cube-single-play/cpu": {
        "steps": 50_000,
        "log_interval": 1_000,
        "eval_interval": 5_000,
        "save_interval": 5_000,
        "threads": 1,
    },
}
"""Defaults of the training loop that go with a preset; its general ones go with the published presets."""


def preset_for(env_name: str) -> str | None:
    """Name of the preset for an environment or dataset such as "cube-single-play-singletask-v0"; None if none fits."""
    return preset_name(env_name, _PUBLISHED)


# The agent ----------------------------------------------------------------------------------------------------------

# The share of values outside their range that is warned about.
_OUTSIDE = 0.05


@dataclasses.dataclass
class FloqNoise(FqlActorNoise):
    """All random numbers of one update."""

    next_action: Tensor
    """Gaussian, [B, S, A]: noise of a fresh next action for every noise sample; [B, S, N, A] with N candidates for
    it."""
    target_start: Tensor
    """Uniform, [B, S]: where the target's walks start."""
    start: Tensor
    """Uniform, [B, S]: where the online field's walks start, and the x_0 of its loss."""
    time: Tensor
    """Uniform, [B, S]: times of the critic's loss."""
    target: Tensor | None = None
    """Gaussian, [B]: noise of the critic's targets; None without `target_noise`."""


class FloqNetworks(FqlActorNetworks):
    """The five networks under their published names, on the CPU in float32, with weights from `generator`.

    Attributes:
        floq: the flow critic.
        target_floq: its moving average.
        critic: the plain critic that is distilled from floq.
    """

    def __init__(
        self,
        config: FloqConfig,
        obs_dim: int,
        action_dim: int,
        reward_range: tuple[float, float],
        generator: torch.Generator,
    ) -> None:
        value_range, noise_range = value_ranges(
            reward_range, config.discount, config.noise_coverage, config.reward_offset
        )
        options: dict[str, Any] = {
            "norm": "layer" if config.layer_norm else None,
            "backend": config.backend,
            "precision": config.precision,
            "device": "meta",
            "dtype": torch.float32,
        }

        def flow_critic() -> FlowCritic:
            return FlowCritic(
                obs_dim,
                action_dim,
                value_range=value_range,
                noise_range=noise_range,
                hidden=(config.block_width,) * _hidden_layers(config),
                architecture=ResidualMLP(config.block_depth) if config.use_resnets else MLP(),
                norm_first=config.layer_norm and not config.activate_before_layernorm,
                prediction=config.prediction,
                ensemble=config.flow_num_ensembles,
                num_steps=config.critic_flow_steps,
                num_samples=config.noise_samples,
                bins=config.num_bins,
                sigma=config.sigma,
                state_embedding=None if config.use_prob_embed else Scaled(*value_range),
                time_embedding=_time_embedding(config),
                **options,
            )

        critics = {
            "floq": flow_critic(),
            "target_floq": flow_critic(),
            "critic": ValueNetwork(
                obs_dim, action_dim, hidden=config.value_hidden_dims, ensemble=config.num_ensembles, **options
            ),
        }
        super().__init__(config, obs_dim, action_dim, critics, generator)


class FloqAgent(FqlActorAgent):
    """floq's networks, their training and the policy; see `fastflow.agents.fql_actor.FqlActorAgent` for arguments and
    use.

    Metrics under `critic/` are the losses, the mean, lowest and highest value of the batch by floq, the mean target,
    the mean distance of a value from its target (`td_error`), the variance of a value over its noise samples
    (`var_flow_returns`), and the share of walks, the target's and the online field's, that end outside the range of
    values (`outside_range`); `actor/q` is by the distilled critic.

    With another `critic_target` than the policy, batches also hold next_actions [B, A] or returns [B].
    """

    config_class = FloqConfig

    def update_by(self, step: GradientStep, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `FqlActorAgent.update_by`; the update that `freeze_features_at` names begins with a new head."""
        if self.config.freeze_features_at and self.step == self.config.freeze_features_at:
            self._check_batch(batch)
            self._renew_head()
        return super().update_by(step, batch)

    def validate(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `update` returns, without an update, on noise that depends on seed and step alone, and what the flow
        critic's walks look like (`flow_statistics`)."""
        metrics = super().validate(batch)
        generator = torch.Generator(self.device).manual_seed(self.seed + self.step)
        noise = self.sample_noise(batch, generator)
        return metrics | self.flow_statistics(batch["observations"], batch["actions"], noise.start)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `FqlActorAgent.load_state_dict`."""
        super().load_state_dict(state)
        self._freeze_features(0 < self.config.freeze_features_at < self.step)

    def _renew_head(self) -> None:
        """Draws the flow critic's last layer anew, as seed and step decide, and freezes the others."""
        networks = self.networks
        fresh = copy.deepcopy(networks.floq.field.layers[-1]).to(device="cpu", dtype=torch.float32)
        fresh.reset_parameters(torch.Generator().manual_seed(self.seed + self.step))
        for field in (networks.floq.field, networks.target_floq.field):
            field.layers[-1].load_state_dict(fresh.state_dict())
        for parameter in networks.floq.field.layers[-1].parameters():
            for moment in self.optimizer.state[parameter].values():
                moment.zero_()
        self._freeze_features(True)

    def _freeze_features(self, frozen: bool) -> None:
        head = self.networks.floq.field.layers[-1]
        self.networks.floq.requires_grad_(not frozen)
        head.requires_grad_(True)
        if frozen:
            # Adam began anew with the head.
            for parameter in head.parameters():
                self.optimizer.state[parameter]["step"].fill_(self.step - self.config.freeze_features_at)

    def _make_networks(self, generator: torch.Generator) -> FloqNetworks:
        networks = FloqNetworks(self.config, self.obs_dim, self.action_dim, self.reward_range, generator)
        names = ("q_agg", "backup", "critic_target", "discount", "target_noise")
        fixed = {name: getattr(self.config, name) for name in names}
        low, high = (r / (1.0 - self.config.discount) for r in self.reward_range)
        self._backup = Backup(
            **fixed,
            value_range=cast(FlowCritic, networks.floq).value_range,
            clip=(low, high) if self.config.clip_values else None,
        )
        return networks

    def sample_noise(self, batch: Mapping[str, Tensor], generator: torch.Generator | None = None) -> FloqNoise:
        """Fresh noise for one update on `batch`, from `generator` or the agent's own."""
        b, s, a = batch["actions"].shape[0], self.config.noise_samples, self.action_dim
        n = self.config.num_candidates
        options = self._noise_options(generator)
        # Two draws, cut into pieces: on small problems launches cost more than numbers.
        next_action, bc_noise, action = torch.randn((n * s + 2) * b, a, **options).split((n * s * b, b, b))
        target_start, start, time, bc_time = torch.rand((3 * s + 1) * b, **options).split((s * b, s * b, s * b, b))
        return FloqNoise(
            next_action=next_action.view(b, s, a) if n == 1 else next_action.view(b, s, n, a),
            target_start=target_start.view(b, s),
            start=start.view(b, s),
            time=time.view(b, s),
            bc_noise=bc_noise,
            bc_time=bc_time,
            action=action,
            target=torch.randn(b, **options) if self.config.target_noise else None,
        )

    def _critic_loss(
        self, obs: Tensor, next_obs: Tensor, batch: Mapping[str, Tensor], noise: FloqNoise, direct: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        actions = batch["actions"]
        with torch.no_grad():
            walks = self._walk(obs, batch, next_obs, noise)
            runner = self._runner if direct else None
            target, value, metrics = self._backup(*walks, batch, noise.target, runner)
        distilled = branch("distilled critic", lambda: settled(self._fit_critic(obs, actions, value, direct)[0]))
        # The published loss is a sum over noise samples.
        floq_loss = settled(self.config.noise_samples * self._floq_loss(obs, actions, target, noise, direct))
        distill_loss = distilled.join()
        critic_loss = floq_loss + distill_loss
        losses = {"floq_loss": floq_loss, "distill_loss": distill_loss, "critic_loss": critic_loss}
        return critic_loss, metrics | losses

    def _floq_loss(self, obs: Tensor, actions: Tensor, target: Tensor, noise: FloqNoise, direct: bool) -> Tensor:
        """The mean loss of a walk, from the same start as the walk that gave its value; see `_losses` for `direct`."""
        floq, error = self.networks.floq, self.config.prediction
        time = torch.zeros_like(noise.time) if self.config.train_at_zero_only else noise.time
        known = self._one_pass("floq", noise.start.numel(), direct)
        if known is not None:
            rows = (floq.start(noise.start).unsqueeze(-1), target.unsqueeze(-1), time, torch.cat((obs, actions), -1))
            options = {"error": error, "backend": floq.backend, "precision": floq.precision}
            scale = float(self.config.noise_samples)
            loss = matching_gradients(floq.field, *rows, scale=scale, gradients=known.parts, **options)
            if loss is not None:
                known.attach()
                return loss
        return floq.loss(obs, actions, target, noise.start, time, error=error)

    def _walk(
        self, obs: Tensor, batch: Mapping[str, Tensor], next_obs: Tensor, noise: FloqNoise
    ) -> tuple[Tensor, Tensor]:
        """Values of (next_obs, its action, a fresh one per noise sample) by the target and of (obs, actions) by the
        online floq.

        Both walks are one operation: the two fields' members stand one behind the other on its E axis. Both [E, B, S].
        """
        config, actions = self.config, batch["actions"]
        floq, target_floq = self.networks.floq, self.networks.target_floq
        e, (b, s) = config.flow_num_ensembles, noise.start.shape
        next_obs = next_obs.unsqueeze(1).expand(b, s, self.obs_dim)
        if config.critic_target == "data":
            next_actions = batch["next_actions"].unsqueeze(1).expand(b, s, self.action_dim)
        elif config.num_candidates > 1:
            next_actions = self._choose(next_obs, noise.next_action)
        else:
            next_actions = self.networks.actor_onestep_flow(next_obs, noise.next_action)
        next_cond = torch.cat((next_obs, next_actions), -1).view(1, b * s, -1)
        cond = torch.cat((obs, actions), -1).unsqueeze(1).expand(b, s, -1).reshape(1, b * s, -1)
        cond = torch.cat((next_cond.expand(e, -1, -1), cond.expand(e, -1, -1)))
        start = floq.start(torch.stack((noise.target_start, noise.start))).view(2, 1, b * s, 1, 1)
        z = ops.integrate(
            [target_floq.field, floq.field],
            start.expand(2, e, b * s, 1, 1).reshape(2 * e, b * s, 1, 1),
            cond,
            num_steps=config.critic_flow_steps,
            backend=config.backend,
            precision=config.precision,
        )
        target_q, q = z.view(2, e, b, s)
        return target_q, q

    def _choose(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Actions [..., A] for normalised obs [..., O]: of the one-step policy's on noise [..., N, A], those that the
        distilled critic values most. Where clipping makes all alike, that is any."""
        obs = obs.unsqueeze(-2).expand(*noise.shape[:-1], self.obs_dim)
        actions = self.networks.actor_onestep_flow(obs, noise)
        values = self.networks.critic(obs, actions).mean(0)
        if self._backup.clip is not None:
            values = values.clamp(*self._backup.clip)
        return actions.take_along_dim(values.argmax(-2, keepdim=True), -2).squeeze(-2)

    @torch.no_grad()
    def act(self, observations: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """See `FqlActorAgent.act`; with `num_candidates`, the best of as many actions."""
        if self.config.num_candidates == 1:
            return super().act(observations, generator)
        self._check("observations", observations, (None, self.obs_dim))
        shape = (len(observations), self.config.num_candidates, self.action_dim)
        return self._choose(self._normalize(observations), torch.randn(shape, **self._noise_options(generator)))

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

    @torch.no_grad()
    def flow_statistics(self, observations: Tensor, actions: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """What the critic's walks look like, from what `flow_paths` takes; each 0-d.

        Returns:
            `flow/displacement.k`, the mean |z_(k+1) - z_k| of each step; `flow/curvature`, the mean over steps of
            (v_k - (z_K - z_0))^2 as a share of the mean (z_K - z_0)^2, which is 0 for straight walks;
            `flow/variance`, that of a value over its starts (Var_z(Q)); `flow/outside_range`, the share of all z_k
            outside the range of values; `flow/feature_norm`, the mean norm of what the velocity network's head takes
            at (z_0, t = 0).
        """
        path = self.flow_paths(observations, actions, noise)
        steps = path.diff(dim=-1)
        whole = path[..., -1:] - path[..., :1]
        velocities = steps.shape[-1] * steps
        cond = torch.cat((self._normalize(observations), actions), -1).unsqueeze(1)
        return {
            **{f"flow/displacement.{k}": size for k, size in enumerate(steps.abs().mean((0, 1, 2)))},
            "flow/curvature": (velocities - whole).square().mean() / whole.square().mean().clamp_min(1e-12),
            "flow/variance": path[..., -1].var(2, correction=0).mean(),
            "flow/outside_range": share_outside(path, self._backup.value_range),
            "flow/feature_norm": feature_norm(self.networks.floq.field, path[..., :1], cond),
        }

    def advise(self, metrics: Mapping[str, float]) -> str | None:
        """What to tell somebody who trains, from the means of an interval's metrics; None if nothing is amiss."""
        share = metrics.get("critic/outside_range", 0.0)
        if share <= _OUTSIDE:
            return None
        low, high = self._backup.value_range
        return (
            f"{share:.1%} of the flow critic's values lie outside [{low:g}, {high:g}], all that rewards in "
            f"[{self.reward_range[0]:g}, {self.reward_range[1]:g}] can add up to: it diverges, or the data's rewards "
            "are not the task's. Its features tell such values apart less and less"
        )

    def _check_batch(self, batch: Mapping[str, Tensor]) -> None:
        super()._check_batch(batch)
        b = len(batch["rewards"])
        for key in self.config.further_keys:
            if key not in batch:
                raise ValueError(
                    f"{self._name}: batch must have {key} where critic_target is {self.config.critic_target!r}"
                )
            self._check(key, batch[key], (b, self.action_dim) if key == "next_actions" else (b,))


def _hidden_layers(config: FloqConfig) -> int:
    return 1 + config.num_transformations * config.block_depth if config.use_resnets else config.block_depth


def flops(config: FloqConfig, obs_dim: int, action_dim: int) -> dict[str, int]:
    """Floating-point operations of one update by part, see `fastflow.flops`."""
    rows, cond = config.batch_size, obs_dim + action_dim
    walkers = config.flow_num_ensembles * rows * config.noise_samples
    features = config.num_bins - 1 if config.use_prob_embed else 1
    field = (cond + features + _time_embedding(config).width(), *(config.block_width,) * _hidden_layers(config), 1)
    critic = (cond, *config.value_hidden_dims, 1)
    onestep = (cond, *config.actor_hidden_dims, action_dim)
    walk = forward_flops(field, config.critic_flow_steps * walkers)
    choices = rows * config.noise_samples * config.num_candidates
    next_actions = forward_flops(onestep, choices)
    if config.num_candidates > 1:
        next_actions += forward_flops(critic, config.num_ensembles * choices)
    return {
        "target": walk,
        "current value": walk,
        "next actions": 0 if config.critic_target == "data" else next_actions,
        "critic": training_flops(field, walkers),
        "distilled critic": training_flops(critic, config.num_ensembles * rows),
        "value of the policy": input_gradient_flops(critic, config.num_ensembles * rows),
        "actor": actor_flops(config, obs_dim, action_dim),
    }


def _time_embedding(config: FloqConfig) -> TimeEmbedding:
    if config.time_embedding == "fourier":
        return CosineFourier(config.time_embed_dim)
    return Cosine() if config.time_embedding == "cosine" else RawTime()
