"""Critics and policies around the fused operations, as plain nn.Modules that drop into other codebases.

Each reads its parameters anew at every call, so `state_dict`, `deepcopy`, `.to`, `functional_call`, `lerp_` and
`.data` edits all work. Observations and actions may have any leading shape.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastflow import ops, reference
from fastflow.dense import Pass, Regression, Stack, climb, dense_stack, forward_pass, regression
from fastflow.fields import (
    MLP,
    Architecture,
    Cosine,
    DenseStack,
    FieldSpec,
    HLGauss,
    RawTime,
    ResidualMLP,
    StateEmbedding,
    TimeEmbedding,
    VelocityField,
)
from fastflow.frozen import FrozenWalk


class FlowCritic(nn.Module):
    """A Q-value that is the end of a K-step walk: z_0 ~ U[noise_range], z_K = z_0 + integral of v(z, t | obs, action)
    (floq).

    Args:
        obs_dim, action_dim: O and A; `action_dim=0` gives a state value.
        value_range: (low, high) of the values, the range of the HL-Gauss embedding of z. `FlowCritic.for_rewards`
            computes it and `noise_range` from the rewards as the paper does.
        noise_range: (l, u) of the uniform start; default `value_range`. What a walk leaves of its width is noise in the
            value, so one about as wide as the differences between actions learns soonest (floq: a tenth of the range).
        hidden: widths of the velocity network.
        ensemble: E members side by side, None for one.
        num_steps: K of a call, also an argument of every call.
        num_samples: S starts per value; the value is their mean.
        bins, sigma: of the HL-Gauss embedding; `state_embedding` replaces it altogether.
        time_embedding: default `Cosine()`, as released.
        activation, norm, norm_first, architecture, output_scale, prediction: see `FieldSpec`.
        method, backend, precision: see `fastflow.integrate`.
        device, dtype: as for every module.
    """

    field: VelocityField
    obs_dim: int
    action_dim: int
    value_range: tuple[float, float]
    noise_range: tuple[float, float]
    num_steps: int
    num_samples: int
    method: str
    backend: str | None
    precision: str | None

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        *,
        value_range: tuple[float, float],
        noise_range: tuple[float, float] | None = None,
        hidden: Sequence[int] = (512, 512, 512, 512),
        ensemble: int | None = None,
        num_steps: int = 8,
        num_samples: int = 1,
        bins: int = 51,
        sigma: float = 16.0,
        state_embedding: StateEmbedding | None = None,
        time_embedding: TimeEmbedding = Cosine(),  # noqa: B008 (frozen)
        activation: str = "gelu_tanh",
        norm: str | None = "layer",
        norm_first: bool = False,
        architecture: Architecture = MLP(),  # noqa: B008 (frozen)
        output_scale: float = 1.0,
        prediction: str = "velocity",
        method: str = "euler",
        backend: str | None = None,
        precision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_samples < 1:
            raise ValueError(f"FlowCritic: num_samples must be at least 1, got {num_samples}")
        low, high = value_range
        spec = FieldSpec(
            state_dim=1,
            cond_dim=obs_dim + action_dim,
            hidden=tuple(hidden),
            ensemble=ensemble,
            activation=activation,
            norm=norm,
            state_embedding=state_embedding or HLGauss(low, high, bins, sigma),
            time_embedding=time_embedding,
            norm_first=norm_first,
            architecture=architecture,
            output_scale=output_scale,
            prediction=prediction,
        )
        self.field = VelocityField(spec, device, dtype)
        self.obs_dim, self.action_dim = obs_dim, action_dim
        self.value_range = (float(low), float(high))
        start, stop = noise_range or value_range
        self.noise_range = (float(start), float(stop))
        if self.noise_range[0] > self.noise_range[1]:
            raise ValueError(f"FlowCritic: noise_range must be (low, high), got {self.noise_range}")
        self.num_steps, self.num_samples, self.method = num_steps, num_samples, method
        self.backend, self.precision = backend, precision

    @classmethod
    def for_rewards(
        cls,
        obs_dim: int,
        action_dim: int,
        *,
        reward_range: tuple[float, float],
        discount: float,
        noise_coverage: float = 0.1,
        reward_offset: float = 0.01,
        **options: Any,
    ) -> FlowCritic:
        """A critic whose ranges follow from the rewards as in floq (see `value_ranges`)."""
        value_range, noise_range = value_ranges(reward_range, discount, noise_coverage, reward_offset)
        return cls(obs_dim, action_dim, value_range=value_range, noise_range=noise_range, **options)

    @classmethod
    def from_field(
        cls,
        field: VelocityField,
        action_dim: int,
        *,
        value_range: tuple[float, float],
        noise_range: tuple[float, float] | None = None,
        num_steps: int = 8,
        num_samples: int = 1,
        method: str = "euler",
        backend: str | None = None,
        precision: str | None = None,
    ) -> FlowCritic:
        """A critic that walks through a field which is there already (`VelocityField.from_sequential`), not a copy.

        Args:
            field: of one state dimension, conditioned on [obs, action] side by side.
            action_dim: A; O is the rest of the field's `cond_dim`.
            value_range, noise_range, num_steps, num_samples, method, backend, precision: as for `FlowCritic`.

        Raises:
            ValueError: a field of more dimensions, or conditioned on fewer than A.
        """
        spec = field.spec
        if spec.state_dim != 1:
            raise ValueError(f"FlowCritic.from_field: field must have state_dim 1, got {spec.state_dim}")
        if not 0 <= action_dim <= spec.cond_dim:
            raise ValueError(
                f"FlowCritic.from_field: action_dim must be in [0, {spec.cond_dim}], the field's cond_dim, "
                f"got {action_dim}"
            )
        critic = cls(
            spec.cond_dim - action_dim,
            action_dim,
            value_range=value_range,
            noise_range=noise_range,
            hidden=(1,),
            num_steps=num_steps,
            num_samples=num_samples,
            method=method,
            backend=backend,
            precision=precision,
            device="meta",
        )
        critic.field = field
        return critic

    def forward(
        self,
        obs: Tensor,
        action: Tensor | None = None,
        noise: Tensor | None = None,
        *,
        num_steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Q(obs, action).

        Args:
            obs: [..., O]. action: [..., A], the same leading shape; None if `action_dim` is 0.
            noise: uniform draws in [0, 1], [..., S] for any S; drawn from `generator` if None, `num_samples` per value.
            num_steps: K of this call.

        Returns:
            [..., 1], or [E, ..., 1] with an ensemble: the mean over the S walks.
        """
        field = self.field
        cond, z_0, lead = _critic_start(self, obs, action, noise, field.spec.ensemble, generator)
        z = ops.integrate(
            field,
            z_0,
            cond,
            num_steps=num_steps or self.num_steps,
            method=self.method,
            backend=self.backend,
            precision=self.precision,
        )
        return _critic_end(z, lead)

    def freeze(self, num_steps: int | None = None) -> FrozenFlowCritic:
        """The critic as it is now, for values without gradient: what is done to the weights later does not reach it."""
        return FrozenFlowCritic(self, num_steps)

    def start(self, u: Tensor) -> Tensor:
        """z_0 = (1 - u) l + u u' for uniform draws u: the start of the walk in `noise_range` = (l, u')."""
        low, high = self.noise_range
        return (u * (high - low)).add_(low)

    def loss(
        self,
        obs: Tensor,
        action: Tensor | None,
        target: Tensor,
        noise: Tensor | None = None,
        t: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        reduction: str = "mean",
        error: str = "velocity",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Flow-matching loss towards a target value (floq, critic loss): regress v(z_t, t) on target - z_0.

        Args:
            obs: [..., O]. action: [..., A].
            target: [..., 1] or [...], or one for each noise sample, [..., S]; without gradient.
            noise, t: uniform draws in [0, 1], [..., S]; drawn from `generator` if None.
            weight: [..., S] or [...].
            reduction: "mean", "sum" or "none" (over members, rows and samples).
            error: see `fastflow.flow_matching_loss`.

        Returns:
            0-d, or with "none" [..., S], [E, ..., S] with an ensemble.
        """
        cond, lead = _rows(self, obs, action)
        u = self._draws(noise, lead, cond, generator)
        samples = u.shape[1]
        if target.shape not in (lead, (*lead, 1), (*lead, samples)):
            expected = f"{[*lead, 1]}" + (f" or {[*lead, samples]}" if samples > 1 else "")
            raise ValueError(f"FlowCritic.loss: target must be {expected}, got {list(target.shape)}")
        each = samples > 1 and target.shape == (*lead, samples)
        if t is None:
            t = _draw(torch.rand, u.shape[:2], cond, generator)
        if weight is not None:
            weight = weight.reshape(-1) if weight.shape == lead else weight.reshape(-1, samples)
        rows = ops.flow_matching_loss(
            self.field,
            self._starts(u, self.field.spec.ensemble),
            target.reshape(-1, samples, 1) if each else target.reshape(-1, 1),
            t.reshape(-1, samples),
            cond,
            weight=weight,
            reduction=reduction,
            error=error,
            backend=self.backend,
            precision=self.precision,
        )
        return rows if reduction != "none" else rows.reshape(*rows.shape[:-2], *lead, samples)

    def _starts(self, u: Tensor, members: int | None) -> Tensor:
        """The walks' starts [B, S, 1], or [E, B, S, 1]: with its E axis the operators cannot take S for B."""
        # Expanded first, the product is a contiguous tensor of all members.
        return self.start(u if members is None else u.expand(members, *u.shape))

    def _draws(self, noise: Tensor | None, lead: torch.Size, cond: Tensor, generator: torch.Generator | None) -> Tensor:
        """Uniform draws as [B, S, 1]."""
        if noise is None:
            shape = (cond.shape[0], self.num_samples, 1)
            return _draw(torch.rand, shape, cond, generator)
        if noise.shape[:-1] != lead or noise.dim() != len(lead) + 1:
            raise ValueError(f"FlowCritic: noise must be {[*lead, 'S']}, got {list(noise.shape)}")
        return noise.reshape(cond.shape[0], noise.shape[-1], 1)


class FlowPolicy(nn.Module):
    """A policy that walks Gaussian noise to an action through K steps of v(x, t | obs), clipped at the end only (FQL).

    Args:
        obs_dim, action_dim: O and A.
        hidden, activation, norm, norm_first, time_embedding, architecture, output_scale, prediction: of the velocity
            network, see `FieldSpec`.
        num_steps: K of a call, also an argument of every call.
        clip: actions are clipped to [-clip, clip]; None for none.
        method, backend, precision: see `fastflow.integrate`.
    """

    field: VelocityField
    obs_dim: int
    action_dim: int
    num_steps: int
    clip: float | None
    method: str
    backend: str | None
    precision: str | None

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        *,
        hidden: Sequence[int] = (512, 512, 512, 512),
        activation: str = "gelu_tanh",
        norm: str | None = None,
        norm_first: bool = False,
        time_embedding: TimeEmbedding = RawTime(),  # noqa: B008 (frozen)
        architecture: Architecture = MLP(),  # noqa: B008 (frozen)
        output_scale: float = 1.0,
        prediction: str = "velocity",
        num_steps: int = 10,
        clip: float | None = 1.0,
        method: str = "euler",
        backend: str | None = None,
        precision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        spec = FieldSpec(
            action_dim,
            obs_dim,
            tuple(hidden),
            activation=activation,
            norm=norm,
            time_embedding=time_embedding,
            norm_first=norm_first,
            architecture=architecture,
            output_scale=output_scale,
            prediction=prediction,
        )
        self.field = VelocityField(spec, device, dtype)
        self.obs_dim, self.action_dim = obs_dim, action_dim
        self.num_steps, self.clip, self.method = num_steps, clip, method
        self.backend, self.precision = backend, precision

    @classmethod
    def from_field(
        cls,
        field: VelocityField,
        *,
        num_steps: int = 10,
        clip: float | None = 1.0,
        method: str = "euler",
        backend: str | None = None,
        precision: str | None = None,
    ) -> FlowPolicy:
        """A policy that walks through a field which is there already (`VelocityField.from_sequential`), not a copy.

        Args:
            field: its states are actions, its cond observations.
            num_steps, clip, method, backend, precision: as for `FlowPolicy`.

        Raises:
            ValueError: a field with an ensemble.
        """
        spec = field.spec
        if spec.ensemble is not None:
            raise ValueError(f"FlowPolicy.from_field: field must have ensemble None, got {spec.ensemble}")
        policy = cls(
            spec.cond_dim,
            spec.state_dim,
            hidden=(1,),
            num_steps=num_steps,
            clip=clip,
            method=method,
            backend=backend,
            precision=precision,
            device="meta",
        )
        policy.field = field
        return policy

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew from `generator` (torch's global one by default)."""
        self.field.reset_parameters(generator)

    def forward(
        self,
        obs: Tensor,
        noise: Tensor | None = None,
        *,
        num_steps: int | None = None,
        deterministic: bool = False,
        step_noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Actions.

        Args:
            obs: [..., O].
            noise: where the walks start, [..., A]; drawn from N(0, I) by `generator` if None.
            num_steps: K of this call.
            deterministic: start at zero instead (FPO++'s evaluation).
            step_noise: [K, ..., A], added behind each step (FPO's exploration).

        Returns:
            [..., A].
        """
        cond, x_0, step_noise, lead = _policy_start(self, obs, noise, deterministic, step_noise, generator)
        x_1 = ops.integrate(
            self.field,
            x_0,
            cond,
            num_steps=num_steps or self.num_steps,
            method=self.method,
            step_noise=step_noise,
            backend=self.backend,
            precision=self.precision,
        )
        return _policy_end(x_1, self.clip, lead)

    def freeze(self, num_steps: int | None = None) -> FrozenFlowPolicy:
        """The policy as it is now, for acting: actions without gradient, which later changes of the weights do not
        reach. On the CPU a call of one row costs a few microseconds."""
        return FrozenFlowPolicy(self, num_steps)

    def loss(
        self,
        obs: Tensor,
        action: Tensor,
        noise: Tensor | None = None,
        t: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        reduction: str = "mean",
        dim_reduction: str = "mean",
        error: str = "velocity",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Flow-matching (behaviour cloning) loss: mean over A of (v(x_t, t | obs) - (action - noise))^2.

        obs [..., O], action and noise [..., A], t and weight [...]; noise and t are drawn from `generator` if None.
        `reduction`, `dim_reduction` and `error` as in `fastflow.flow_matching_loss`. Returns 0-d, or [...] with
        `reduction="none"`.
        """
        cond, lead = _rows(self, obs, None)
        x_0 = _normal(self, noise, lead, cond, generator)
        if t is None:
            t = _draw(torch.rand, x_0.shape[:1], cond, generator)
        rows = ops.flow_matching_loss(
            self.field,
            x_0,
            action.reshape(x_0.shape),
            t.reshape(-1),
            cond,
            weight=None if weight is None else weight.reshape(-1),
            reduction=reduction,
            dim_reduction=dim_reduction,
            error=error,
            backend=self.backend,
            precision=self.precision,
        )
        return rows if reduction != "none" else rows.reshape(lead)


class FrozenFlowPolicy:
    """A `FlowPolicy` as it was: actions without gradient. Made by `FlowPolicy.freeze`."""

    obs_dim: int
    action_dim: int
    clip: float | None
    walk: FrozenWalk

    def __init__(self, policy: FlowPolicy, num_steps: int | None = None) -> None:
        self.obs_dim, self.action_dim, self.clip = policy.obs_dim, policy.action_dim, policy.clip
        self.walk = FrozenWalk(policy.field, **_options_of(policy, num_steps))

    @torch.no_grad()
    def __call__(
        self,
        obs: Tensor,
        noise: Tensor | None = None,
        *,
        deterministic: bool = False,
        step_noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Actions [..., A] for obs [..., O], as `FlowPolicy.forward`."""
        cond, x_0, step_noise, lead = _policy_start(self, obs, noise, deterministic, step_noise, generator)
        x_0 = cond.new_zeros(cond.shape[0], self.action_dim) if x_0 is None else x_0
        return _policy_end(self.walk(x_0, cond, step_noise=step_noise), self.clip, lead)


class FrozenFlowCritic:
    """A `FlowCritic` as it was: values without gradient. Made by `FlowCritic.freeze`."""

    obs_dim: int
    action_dim: int
    walk: FrozenWalk

    def __init__(self, critic: FlowCritic, num_steps: int | None = None) -> None:
        # The critic's own rules for inputs, on a copy that shares no weight with it.
        self._critic = copy.copy(critic)
        self._critic._modules = {}
        self.obs_dim, self.action_dim = critic.obs_dim, critic.action_dim
        self.walk = FrozenWalk(critic.field, **_options_of(critic, num_steps))
        self._members = critic.field.spec.ensemble

    @torch.no_grad()
    def __call__(
        self,
        obs: Tensor,
        action: Tensor | None = None,
        noise: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Q [..., 1], or [E, ..., 1] with an ensemble, as `FlowCritic.forward`."""
        cond, z_0, lead = _critic_start(self._critic, obs, action, noise, self._members, generator)
        return _critic_end(self.walk(z_0, cond), lead)


def _options_of(module: FlowPolicy | FlowCritic, num_steps: int | None) -> dict[str, Any]:
    steps = module.num_steps if num_steps is None else num_steps
    return dict(num_steps=steps, method=module.method, backend=module.backend, precision=module.precision)


class _Plain(nn.Module):
    """A network without a flow."""

    network: DenseStack
    activation: str
    norm: str | None
    backend: str | None
    precision: str | None
    # Of the hidden layers, see `reference.trunk`; None for one behind the other.
    _wiring: Sequence[tuple[tuple[int, ...], int | None]] | None

    def __init__(self, activation: str, norm: str | None, backend: str | None, precision: str | None) -> None:
        super().__init__()
        self.activation, self.norm = activation, norm
        self.backend, self.precision = backend, precision
        self._wiring = None

    def _dense(self, x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        if self._wiring is not None:
            return reference.dense_stack(
                x, parameters, self.activation, self.norm, precision=self.precision, wiring=self._wiring
            )
        return dense_stack(x, parameters, self.activation, self.norm, precision=self.precision, backend=self._backend)

    def _stack(self) -> Stack:
        return Stack(self.network.parameter_list(), self.activation, self.norm, self.precision)

    @property
    def _backend(self) -> str:
        return ops.DEFAULT_BACKEND if self.backend is None else self.backend

    @property
    def _native(self) -> bool:
        return ops.runs_native(self._backend)


class OneStepPolicy(_Plain):
    """A policy that maps (obs, noise) to an action in one pass: FQL's distilled one-step actor.

    Args:
        obs_dim, action_dim: O and A.
        hidden, activation, norm: of the network [obs, noise] -> action.
        clip: actions are clipped to [-clip, clip] unless a call asks for the raw output; None for none.
        backend: "reference" for plain PyTorch; else native code on the CPU, or kernels on a GPU, run the network where
            they can (in float32 on a GPU with "fused" alone).
        precision: "bf16" rounds the operands of matrix products; None follows torch's settings.
    """

    network: DenseStack
    obs_dim: int
    action_dim: int
    clip: float | None

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        *,
        hidden: Sequence[int] = (512, 512, 512, 512),
        activation: str = "gelu_tanh",
        norm: str | None = None,
        clip: float | None = 1.0,
        backend: str | None = None,
        precision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(activation, norm, backend, precision)
        widths = (obs_dim + action_dim, *hidden, action_dim)
        self.network = DenseStack(tuple(zip(widths[:-1], widths[1:], strict=True)), None, norm, device, dtype)
        self.obs_dim, self.action_dim, self.clip = obs_dim, action_dim, clip

    def forward(
        self,
        obs: Tensor,
        noise: Tensor | None = None,
        *,
        raw: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Actions [..., A] for obs [..., O], clipped unless `raw`.

        `noise` [..., A] is drawn from N(0, I) by `generator` if None.
        """
        cond, lead = _rows(self, obs, None)
        x = torch.cat([cond, _normal(self, noise, lead, cond, generator)], dim=-1)
        out = self._dense(x, self.network.parameter_list())
        return (out if raw else _clip(out, self.clip)).reshape(*lead, self.action_dim)

    def _pass(self, obs: Tensor, noise: Tensor) -> Pass | None:
        """`dense.forward_pass` of actions, not clipped, for obs [M, O] and noise [M, A], for agents."""
        if not self._native:
            return None
        return forward_pass(torch.cat((obs, noise), -1), self._stack())

    def _climb(
        self,
        obs: Tensor,
        noise: Tensor,
        critic: ValueNetwork,
        toward: Tensor,
        alpha: float,
        gradients: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor] | None:
        """`dense.climb` of actions, not clipped, for obs [M, O] and noise [M, A], for agents."""
        if not (self._native and critic._native) or critic._wiring is not None:
            return None
        x = torch.cat((obs, noise), -1)
        return climb(x, self._stack(), critic._stack(), toward, alpha, gradients)


class ValueNetwork(_Plain):
    """A plain (monolithic) critic, [obs, action] -> value: floq's distilled critic, FQL's critic.

    Args:
        obs_dim, action_dim: O and A; `action_dim=0` gives a state value.
        hidden, activation, norm: of the network.
        architecture: `MLP()` or `ResidualMLP(depth)`, which runs in plain PyTorch; see `FieldSpec`.
        ensemble: E members side by side, None for one.
        backend: "reference" for plain PyTorch; else native code on the CPU, or kernels on a GPU, run the network where
            they can (in float32 on a GPU with "fused" alone).
        precision: "bf16" rounds the operands of matrix products; None follows torch's settings.
    """

    network: DenseStack
    obs_dim: int
    action_dim: int
    ensemble: int | None

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        *,
        hidden: Sequence[int] = (512, 512, 512, 512),
        architecture: MLP | ResidualMLP = MLP(),  # noqa: B008 (frozen)
        ensemble: int | None = 2,
        activation: str = "gelu_tanh",
        norm: str | None = "layer",
        backend: str | None = None,
        precision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(activation, norm, backend, precision)
        if not isinstance(architecture, (MLP, ResidualMLP)):
            raise TypeError(f"ValueNetwork: architecture must be MLP or ResidualMLP, got {architecture!r}")
        if isinstance(architecture, ResidualMLP):
            self._wiring = [(layer.inputs, layer.add) for layer in architecture.trunk(tuple(hidden))]
        widths = (obs_dim + action_dim, *hidden, 1)
        self.network = DenseStack(tuple(zip(widths[:-1], widths[1:], strict=True)), ensemble, norm, device, dtype)
        self.obs_dim, self.action_dim, self.ensemble = obs_dim, action_dim, ensemble

    def forward(self, obs: Tensor, action: Tensor | None = None, *, frozen: bool = False) -> Tensor:
        """[..., 1], or [E, ..., 1] with an ensemble; with `frozen` gradients reach obs and action but no parameter."""
        x, lead = _rows(self, obs, action)
        if self.ensemble is not None:
            x = x.expand(self.ensemble, *x.shape)
        parameters = self.network.parameter_list()
        if frozen:
            parameters = [p.detach() for p in parameters]
        out = self._dense(x, parameters)
        return out.reshape(*out.shape[:-2], *lead, 1)

    def _regression(
        self, obs: Tensor, action: Tensor | None, target: Tensor, scale: float, gradients: Sequence[Tensor]
    ) -> Regression | None:
        """`dense.regression` of values of obs [M, O] and action [M, A] on target [M], for all members; `gradients` as
        `network.parameter_list()`."""
        if not self._native or self._wiring is not None:
            return None
        return regression(_rows(self, obs, action)[0], self._stack(), target.unsqueeze(1), scale, gradients)


def value_ranges(
    reward_range: tuple[float, float], discount: float, noise_coverage: float = 0.1, reward_offset: float = 0.01
) -> tuple[tuple[float, float], tuple[float, float]]:
    """The value range of the HL-Gauss embedding and the range of the uniform start, as floq sets them from the rewards.

    value_range = ((r_min - reward_offset) / (1 - discount), (r_max + reward_offset) / (1 - discount)),
    noise_range = noise_coverage * (r_min, r_max) / (1 - discount).
    """
    r_min, r_max = reward_range
    if not 0 <= discount < 1:
        raise ValueError(f"value_ranges: discount must be in [0, 1), got {discount}")
    if r_min > r_max:
        raise ValueError(f"value_ranges: reward_range must be (r_min, r_max), got {reward_range}")
    scale = 1 / (1 - discount)
    value_range = ((r_min - reward_offset) * scale, (r_max + reward_offset) * scale)
    return value_range, (noise_coverage * r_min * scale, noise_coverage * r_max * scale)


# What a critic and a policy do before and behind their walk, frozen or not.


def _critic_start(
    critic: FlowCritic,
    obs: Tensor,
    action: Tensor | None,
    noise: Tensor | None,
    members: int | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, torch.Size]:
    """(cond [B, O + A], starts [B, S, 1] or [E, B, S, 1], the leading shape)."""
    cond, lead = _rows(critic, obs, action)
    return cond, critic._starts(critic._draws(noise, lead, cond, generator), members), lead


def _critic_end(z: Tensor, lead: torch.Size) -> Tensor:
    """The mean over the S walks, [..., 1] or [E, ..., 1]."""
    # A call of one row is mostly the small operators around the walk.
    q = z.squeeze(-2) if z.shape[-2] == 1 else z.mean(-2)
    return q if len(lead) == 1 else q.reshape(*q.shape[:-2], *lead, 1)


def _policy_start(
    policy: FlowPolicy | FrozenFlowPolicy,
    obs: Tensor,
    noise: Tensor | None,
    deterministic: bool,
    step_noise: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, torch.Size]:
    """(cond [B, O], start [B, A] or None for zero, step noise [K, B, A], the leading shape)."""
    cond, lead = _rows(policy, obs, None)
    if deterministic and noise is not None:
        raise ValueError("FlowPolicy: noise must be None where deterministic is True")
    if step_noise is not None:
        if step_noise.shape[1:] != (*lead, policy.action_dim):
            expected = ["K", *lead, policy.action_dim]
            raise ValueError(f"FlowPolicy: step_noise must be {expected}, got {list(step_noise.shape)}")
        step_noise = step_noise.reshape(step_noise.shape[0], cond.shape[0], policy.action_dim)
    x_0 = None if deterministic else _normal(policy, noise, lead, cond, generator)
    return cond, x_0, step_noise, lead


def _policy_end(x_1: Tensor, limit: float | None, lead: torch.Size) -> Tensor:
    """Clipped actions [..., A]."""
    x_1 = _clip(x_1, limit)
    return x_1 if len(lead) == 1 else x_1.reshape(*lead, x_1.shape[-1])


def _rows(
    module: FlowCritic | FlowPolicy | FrozenFlowPolicy | OneStepPolicy | ValueNetwork,
    obs: Tensor,
    action: Tensor | None,
) -> tuple[Tensor, torch.Size]:
    """[obs, action] as [B, O + A] and the leading shape they came with."""
    name = type(module).__name__.removeprefix("Frozen")
    if obs.dim() == 0 or obs.shape[-1] != module.obs_dim:
        raise ValueError(f"{name}: obs must be [..., {module.obs_dim}], got {list(obs.shape)}")
    lead = obs.shape[:-1]
    width = module.action_dim if isinstance(module, (FlowCritic, ValueNetwork)) else 0
    if action is None and width:
        raise ValueError(f"{name}: action must be {[*lead, width]}, got None")
    if action is not None:
        if action.shape != (*lead, width):
            raise ValueError(f"{name}: action must be {[*lead, width]}, got {list(action.shape)}")
        obs = torch.cat([obs, action], dim=-1)
    # Not lead.numel(): torch.export would fix a batch that is to stay free.
    return obs if len(lead) == 1 else obs.reshape(math.prod(lead), obs.shape[-1]), lead


def _normal(
    module: FlowPolicy | FrozenFlowPolicy | OneStepPolicy,
    noise: Tensor | None,
    lead: torch.Size,
    cond: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """Gaussian noise as [B, A]: the caller's, or drawn."""
    width = module.action_dim
    if noise is None:
        return _draw(torch.randn, (cond.shape[0], width), cond, generator)
    if noise.shape != (*lead, width):
        raise ValueError(f"{type(module).__name__}: noise must be {[*lead, width]}, got {list(noise.shape)}")
    return noise if len(lead) == 1 else noise.reshape(cond.shape[0], width)


def _draw(
    sampler: Callable[..., Tensor], shape: Sequence[int], like: Tensor, generator: torch.Generator | None
) -> Tensor:
    # torch.compile follows symbolic shapes only through the overload without a generator.
    given = {} if generator is None else {"generator": generator}
    return sampler(shape, dtype=like.dtype, device=like.device, **given)


def _clip(action: Tensor, limit: float | None) -> Tensor:
    return action if limit is None else action.clamp(-limit, limit)
