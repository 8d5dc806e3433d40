"""A geometric horizon model: a flow that samples the states a policy will visit.

m(X | s, a) = (1 - gamma) sum_{k >= 1} gamma^(k-1) Pr(S_k = X | s, a, then the policy) is the normalised successor
measure. It starts at the next state S_1, and Q(s, a) = E_{X ~ m} r(X) / (1 - gamma) for any reward of the state that
is reached. How to train one: `fastflow.agents.td2_cfm`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastflow import density, ops
from fastflow.fields import Architecture, FieldSpec, FiLMUNet, Sinusoidal, TimeEmbedding, VelocityField

__all__ = ["SuccessorFlow"]

GAMMA_FEATURES = 3
# Rows of a density that are integrated together: D derivatives of each are in memory at once.
_LOG_PROB_ROWS = 4096


class SuccessorFlow(nn.Module):
    """Samples from m(X | s, a) by walking Gaussian noise through K steps of v(x, t | s, a) (Temporal Difference Flows,
    arXiv:2503.09817).

    Args:
        state_dim, action_dim: D and A.
        gamma: discount, in [0, 1).
        policy_dim: W, width of the policy embedding w; 0 for a model of one policy.
        gamma_range: (low, high) if the model is conditioned on the discount too; `gamma` is then the default of a call.
        state_mean, state_std: [D] each; the field works on (state - mean) / std, the model takes and gives raw states.
        policy_mean, policy_std: [W] each, likewise for w.
        cond_scale: what the field is conditioned on is this many times as large as what it samples: the scaled state
            and w. Where a step is small beside the range of states, larger values let the network tell steps apart.
        hidden, activation, norm, norm_first, time_embedding, architecture: of the velocity network, see `FieldSpec`.
            The defaults are the paper's: a FiLM U-Net of width 512, mish, sinusoids of time.
        num_steps, method: K and the solver of a call (the paper: 10 midpoint steps).
        backend, precision: see `fastflow.integrate`.
        device, dtype: as for every module.

    Raises:
        ValueError: gamma outside [0, 1) or its range, statistics of another shape or without spread, or what
            `FieldSpec` refuses.
    """

    field: VelocityField
    state_dim: int
    action_dim: int
    policy_dim: int
    gamma: float
    gamma_range: tuple[float, float] | None
    cond_scale: float
    num_steps: int
    method: str
    backend: str | None
    precision: str | None
    state_mean: Tensor
    state_std: Tensor
    policy_mean: Tensor
    policy_std: Tensor

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        *,
        gamma: float,
        policy_dim: int = 0,
        gamma_range: tuple[float, float] | None = None,
        state_mean: Tensor | Sequence[float] | None = None,
        state_std: Tensor | Sequence[float] | None = None,
        policy_mean: Tensor | Sequence[float] | None = None,
        policy_std: Tensor | Sequence[float] | None = None,
        cond_scale: float = 1.0,
        hidden: Sequence[int] = (512, 512, 512),
        activation: str = "mish",
        norm: str | None = None,
        norm_first: bool = False,
        time_embedding: TimeEmbedding = Sinusoidal(256, (256, 256)),  # noqa: B008 (frozen)
        architecture: Architecture = FiLMUNet((512, 512, 512)),  # noqa: B008 (frozen)
        num_steps: int = 10,
        method: str = "midpoint",
        backend: str | None = None,
        precision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        low, high = gamma_range or (gamma, gamma)
        if not 0 <= low <= gamma <= high < 1:
            raise ValueError(
                f"SuccessorFlow: gamma must be in [0, 1) and inside gamma_range, got gamma={gamma}, "
                f"gamma_range={gamma_range}"
            )
        self.state_dim, self.action_dim, self.policy_dim = state_dim, action_dim, policy_dim
        self.gamma, self.gamma_range = float(gamma), gamma_range
        if not 0 < cond_scale < math.inf:
            raise ValueError(f"SuccessorFlow: cond_scale must be a positive number, got {cond_scale}")
        self.cond_scale = float(cond_scale)
        features = GAMMA_FEATURES if gamma_range else 0
        spec = FieldSpec(
            state_dim,
            state_dim + action_dim + policy_dim + features,
            tuple(hidden),
            activation=activation,
            norm=norm,
            norm_first=norm_first,
            time_embedding=time_embedding,
            architecture=architecture,
        )
        self.field = VelocityField(spec, device, dtype)
        for name, value, size in (
            ("state_mean", state_mean, state_dim),
            ("state_std", state_std, state_dim),
            ("policy_mean", policy_mean, policy_dim),
            ("policy_std", policy_std, policy_dim),
        ):
            spread = name.endswith("std")
            filled = torch.full((size,), float(spread)) if value is None else torch.as_tensor(value)
            if filled.shape != (size,) or not torch.isfinite(filled).all():
                raise ValueError(f"SuccessorFlow: {name} must be {[size]} finite numbers, got {value}")
            if spread and not bool((filled > 0).all()):
                raise ValueError(f"SuccessorFlow: {name} must be positive, got {value}")
            self.register_buffer(name, filled.to(device=device, dtype=dtype or torch.get_default_dtype(), copy=True))
        self.num_steps, self.method = num_steps, method
        self.backend, self.precision = backend, precision

    # The field's own coordinates ------------------------------------------------------------------------------------

    def encode(self, state: Tensor) -> Tensor:
        """A state [..., D] as the field sees it: centred and scaled."""
        return (state - self.state_mean) / self.state_std

    def decode(self, x: Tensor) -> Tensor:
        """The state that the field's x [..., D] stands for."""
        return x * self.state_std + self.state_mean

    def cond(self, obs: Tensor, action: Tensor, w: Tensor | None = None, gamma: float | Tensor | None = None) -> Tensor:
        """What the field is conditioned on: [state, action, w, features of gamma] side by side, [..., C].

        Args:
            obs: [..., D]. action: [..., A].
            w: [..., W], or [W] for all rows; None where `policy_dim` is 0.
            gamma: a number or [...]; only for a model with a `gamma_range`. Its features are gamma, 1 - gamma and
                -log(1 - gamma) (CompPlan, arXiv:2602.19634).

        Raises:
            ValueError: a shape that does not fit, a w or gamma that is missing or that the model does not take.
        """
        lead = obs.shape[:-1]
        _check("obs", obs, (*lead, self.state_dim))
        _check("action", action, (*lead, self.action_dim))
        parts = [self.cond_scale * self.encode(obs), action]
        if self.policy_dim:
            if w is None:
                raise ValueError(f"SuccessorFlow: w must be [..., {self.policy_dim}], the policy's embedding, got None")
            if w.shape != (self.policy_dim,):
                _check("w", w, (*lead, self.policy_dim))
            w = self.cond_scale * (w.to(obs.dtype) - self.policy_mean) / self.policy_std
            parts.append(w.expand(*lead, self.policy_dim))
        elif w is not None:
            raise ValueError(f"SuccessorFlow: w must be None for a model of one policy, got {list(w.shape)}")
        if self.gamma_range is not None:
            parts.append(self._gamma_features(self._gamma(gamma), obs).expand(*lead, GAMMA_FEATURES))
        else:
            self._gamma(gamma)
        return torch.cat(parts, -1)

    def _gamma(self, gamma: float | Tensor | None) -> float | Tensor:
        """The discount of a call. Whether a tensor is inside the range is not looked at: that waits for the device."""
        if gamma is None:
            return self.gamma
        low, high = self.gamma_range or (self.gamma, self.gamma)
        if not isinstance(gamma, Tensor) and not low <= gamma <= high:
            raise ValueError(f"SuccessorFlow: gamma must be in [{low}, {high}], got {gamma}")
        if isinstance(gamma, Tensor) and self.gamma_range is None:
            raise ValueError(f"SuccessorFlow: gamma must be {self.gamma}: the model has no gamma_range; got a tensor")
        return gamma

    @staticmethod
    def _gamma_features(gamma: float | Tensor, like: Tensor) -> Tensor:
        gamma = torch.as_tensor(gamma, dtype=like.dtype, device=like.device)
        return torch.stack([gamma, 1 - gamma, -torch.log1p(-gamma)], -1)

    # Use ------------------------------------------------------------------------------------------------------------

    def sample(
        self,
        obs: Tensor,
        action: Tensor,
        n: int = 1,
        *,
        w: Tensor | None = None,
        gamma: float | Tensor | None = None,
        noise: Tensor | None = None,
        num_steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`n` states per row that the policy will visit after `action` in `obs`.

        Args:
            obs: [..., D]. action: [..., A]. w, gamma: see `cond`.
            n: samples per row.
            noise: Gaussian, [..., n, D], or [n, D] shared by all rows (common random numbers, which differences
                between rows gain from); drawn from `generator` if None.
            num_steps: K of this call.

        Returns:
            [..., n, D], raw states; differentiable.
        """
        if n < 1:
            raise ValueError(f"SuccessorFlow.sample: n must be at least 1, got {n}")
        lead = obs.shape[:-1]
        c = self.cond(obs, action, w, gamma)
        x_0 = self._noise(noise, lead, n, c, generator)
        x_1 = self._walk(x_0, c.reshape(-1, c.shape[-1]), num_steps or self.num_steps)
        return self.decode(x_1).reshape(*lead, n, self.state_dim)

    forward = sample

    def value(
        self,
        reward_fn: Callable[[Tensor], Tensor],
        obs: Tensor,
        action: Tensor,
        n: int = 128,
        *,
        gamma: float | Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Q(obs, action) = mean of `reward_fn` over n samples / (1 - gamma), [...].

        Args:
            reward_fn: raw states [..., D] -> rewards [...], of the state that is reached.
            obs, action, n, gamma, **options: see `sample`.

        Raises:
            ValueError: `reward_fn` gives another shape, or what `sample` raises.
        """
        states = self.sample(obs, action, n, gamma=gamma, **options)
        rewards = reward_fn(states)
        _check("the result of reward_fn", rewards, states.shape[:-1])
        return rewards.mean(-1) / (1 - self._gamma(gamma))

    def log_prob(
        self,
        x: Tensor,
        obs: Tensor,
        action: Tensor,
        *,
        w: Tensor | None = None,
        gamma: float | Tensor | None = None,
        num_steps: int | None = None,
        divergence: Literal["exact", "hutchinson"] = "exact",
        probes: int = 1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """log m(x | obs, action) by the change of variables along the flow, without gradient.

        Args:
            x: raw states [..., D]. obs, action, w, gamma: see `cond`.
            divergence: "exact" takes D derivatives per evaluation, "hutchinson" estimates with `probes` random ones.

        Returns:
            [...], in nats.
        """
        lead = x.shape[:-1]
        _check("x", x, (*obs.shape[:-1], self.state_dim))
        c = self.cond(obs, action, w, gamma).reshape(-1, self.field.spec.cond_dim)
        inside = density.log_prob(
            self.density_velocity,
            self.encode(x).reshape(-1, self.state_dim),
            num_steps=num_steps or self.num_steps,
            method=self.method,
            divergence=divergence,
            probes=probes,
            generator=generator,
            cond=c,
            chunk=_LOG_PROB_ROWS,
        )
        return (inside - self.state_std.log().sum()).reshape(lead)

    def loss(
        self,
        obs: Tensor,
        action: Tensor,
        future: Tensor,
        *,
        w: Tensor | None = None,
        gamma: float | Tensor | None = None,
        noise: Tensor | None = None,
        t: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Monte-Carlo conditional flow matching: regress on given samples `future` of m(. | obs, action), 0-d.

        obs and future [..., D], action [..., A]; noise [..., D] Gaussian and t [...] uniform, drawn if None. Squared
        errors are summed over D and averaged over rows, as in the paper.
        """
        lead = obs.shape[:-1]
        _check("future", future, (*lead, self.state_dim))
        c = self.cond(obs, action, w, gamma).reshape(-1, self.field.spec.cond_dim)
        x_0 = self._noise(None if noise is None else noise.unsqueeze(-2), lead, 1, c, generator).squeeze(1)
        if t is None:
            t = torch.rand(x_0.shape[:1], dtype=c.dtype, device=c.device, generator=generator)
        x_1 = self.encode(future).reshape(x_0.shape)
        options: dict[str, Any] = {"backend": self.backend, "precision": self.precision, "dim_reduction": "sum"}
        return ops.flow_matching_loss(self.field, x_0, x_1, t.reshape(-1), c, **options)

    # Parts ----------------------------------------------------------------------------------------------------------

    def walk(self, x_0: Tensor, cond: Tensor, t: float | Tensor = 1.0, num_steps: int | None = None) -> Tensor:
        """psi_t(x_0 | cond), the flow from 0 to time t in the field's coordinates: x_0 [B, D] or [B, n, D], cond
        [B, C], t a number or [B]."""
        return ops.integrate(
            self.field,
            x_0,
            cond,
            num_steps=num_steps or self.num_steps,
            method=self.method,
            t_1=t,
            backend=self.backend,
            precision=self.precision,
        )

    def velocity(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """v(x, t | cond) in the field's coordinates, without gradient: x [B, D] or [B, n, D], t its shape without D or
        [B], cond [B, C]."""
        # A walk of one Euler step of length one: the kernels' way to evaluate the field once.
        with torch.no_grad():
            end = ops.integrate(
                self.field,
                x,
                cond,
                num_steps=1,
                t_0=t,
                t_1=t + 1,
                backend=self.backend,
                precision=self.precision,
            )
        return end - x

    def arrive(self, x_0: Tensor, cond: Tensor, t: Tensor, num_steps: int | None = None) -> tuple[Tensor, Tensor]:
        """`walk` to t and `velocity` there, without gradient: x_0 [B, D], cond [B, C], t [B]."""
        with torch.no_grad():
            kind = type(self)
            if kind.walk is SuccessorFlow.walk and kind.velocity is SuccessorFlow.velocity:  # neither is another's
                options = (num_steps or self.num_steps, self.method, self.backend, self.precision)
                found = ops.plain_arrival(self.field, x_0, cond, t, *options)
                if found is not None:
                    return found
            x = self.walk(x_0, cond, t, num_steps)
            return x, self.velocity(x, t, cond)

    def _walk(self, x_0: Tensor, cond: Tensor, num_steps: int) -> Tensor:
        """Samples in the field's coordinates from noise [B, n, D]."""
        return self.walk(x_0, cond, 1.0, num_steps)

    def density_velocity(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """The velocity of the flow that samples follow, differentiable to any order: x [B, D], t [B]."""
        return self.field(x, t, cond)

    def _noise(
        self, noise: Tensor | None, lead: torch.Size, n: int, like: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Noise as [B, n, D]."""
        rows, shape = math.prod(lead), (n, self.state_dim)
        if noise is None:
            return torch.randn(rows, *shape, dtype=like.dtype, device=like.device, generator=generator)
        if noise.shape == shape:
            return noise.expand(rows, *shape)
        _check("noise", noise, (*lead, *shape))
        return noise.reshape(rows, *shape)


def _check(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"SuccessorFlow: {name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.shape != tuple(shape):
        raise ValueError(f"SuccessorFlow: {name} must be {list(shape)}, got {list(tensor.shape)}")
