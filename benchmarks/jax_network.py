"""Velocity networks, walks and plain stacks in JAX, as its users write them: the JAX rivals are made of these.

All functions are of one network; an ensemble is `jax.vmap` over its parameters. Parameters are lists of arrays in the
order of `DenseStack.parameter_list`. Importing this module needs jax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

import fastflow as ff

ACTIVATIONS = {"gelu_tanh": jax.nn.gelu, "silu": jax.nn.silu, "relu": jax.nn.relu, "elu": jax.nn.elu}
Velocity = Callable[[Any, Any, Any, Any], Any]


def array(x: Tensor) -> jax.Array:
    """A torch tensor's numbers, in memory of JAX's own: a result may be written over a donated argument."""
    return jnp.array(x.detach().cpu().numpy(), copy=True)


def tensor(x: Any) -> Tensor:
    """An array's numbers as a torch tensor."""
    # A copy: JAX's memory is read-only.
    return torch.from_numpy(np.array(x))


def product(x: Any, w: Any, precision: str = "fp32") -> Any:
    """x @ w; "bf16" rounds both and adds in float32."""
    if precision == "bf16":
        x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    # JAX's default for float32 is tf32 on GPUs that have it.
    exact = jax.lax.Precision.HIGHEST if precision == "fp32" else None
    return jnp.matmul(x, w, precision=exact, preferred_element_type=jnp.float32)


def layer_norm(x: Any, scale: Any, shift: Any, eps: float) -> Any:
    """LayerNorm over the last axis."""
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + eps) * scale + shift


def stack(
    parameters: Sequence[Any],
    x: Any,
    activation: str,
    norm: str | None,
    eps: float = 1e-6,
    precision: str = "fp32",
    add: Sequence[int | None] = (),
) -> Any:
    """Dense -> activation -> optional LayerNorm per hidden layer, then Dense: [N, in] -> [N, out].

    `add` names for every hidden layer an earlier one whose output is added to its own, or None.
    """
    layers = (len(parameters) + 2) // 4 if norm else len(parameters) // 2
    outputs: list[Any] = []
    for i in range(layers):
        x = product(x, parameters[2 * i], precision) + parameters[2 * i + 1]
        if i < layers - 1:
            x = ACTIVATIONS[activation](x)
            if norm:
                x = layer_norm(x, *parameters[2 * (layers + i) : 2 * (layers + i) + 2], eps)
            if add and add[i] is not None:
                x = x + outputs[add[i]]
            outputs.append(x)
    return x


def embed_state(spec: ff.FieldSpec, x: Any) -> Any:
    """Features of the flow state, [..., D] -> [..., features]."""
    state = spec.state_embedding
    if isinstance(state, ff.Scaled):
        return (x - state.low) / (state.high - state.low)
    if not isinstance(state, ff.HLGauss):
        return x
    std = state.sigma * (state.high - state.low) / (state.bins - 1)
    edges = jnp.linspace(state.low, state.high, state.bins)
    z = jnp.clip(x, state.low - 3 * std, state.high + 3 * std)
    c = jax.lax.erf((edges - z) / (2**0.5 * std))
    return jnp.diff(c, axis=-1) / (c[..., -1:] - c[..., :1])


def embed_time(spec: ff.FieldSpec, t: Any) -> Any:
    """Features of time, [...] -> [..., features]."""
    time = spec.time_embedding
    if isinstance(time, ff.Cosine):
        return jnp.cos(t)[..., None]
    if isinstance(time, ff.CosineFourier):
        return jnp.cos(jnp.pi * t[..., None] * jnp.arange(1, time.dim + 1))
    if isinstance(time, ff.PowerFourier):
        angles = t[..., None] * 2.0 ** jnp.arange(time.dim // 2)
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)
    return t[..., None]


def velocity(spec: ff.FieldSpec, precision: str = "fp32") -> Velocity:
    """v(parameters, x [N, D], t [N] or [], cond [N, C]) -> [N, D] of one member of `spec`'s network.

    What of a spec there is: see `rivals._beyond_jax`.
    """
    add = [layer.add for layer in spec.trunk]

    def v(parameters: Sequence[Any], x: Any, t: Any, cond: Any) -> Any:
        time = embed_time(spec, t)
        time = jnp.broadcast_to(time, (*x.shape[:-1], time.shape[-1]))
        features = jnp.concatenate([cond, embed_state(spec, x), time], -1)
        out = stack(parameters, features, spec.activation, spec.norm, spec.norm_eps, precision, add)
        return out * spec.output_scale

    return v


def walk(
    v: Velocity, parameters: Any, x_0: Any, cond: Any, num_steps: int, method: str = "euler", t_1: Any = 1.0,
    unrolled: bool = False,
) -> Any:  # fmt: skip
    """x_K of dx/dt = v from 0 to `t_1` (a number, or [N]) in K steps, "euler" or "midpoint"; a scan or unrolled."""
    h = t_1 / num_steps
    h_x = h[..., None] if getattr(h, "ndim", 0) else h

    def step(x: Any, k: Any) -> tuple[Any, None]:
        if method == "euler":
            return x + h_x * v(parameters, x, k * h, cond), None
        middle = x + 0.5 * h_x * v(parameters, x, k * h, cond)
        return x + h_x * v(parameters, middle, (k + 0.5) * h, cond), None

    if unrolled:
        x = x_0
        for k in range(num_steps):
            x, _ = step(x, jnp.float32(k))
        return x
    return jax.lax.scan(step, x_0, jnp.arange(num_steps, dtype=jnp.float32))[0]
