"""Checkpoints as the JAX code of floq and FQL saves them, made and evaluated by NumPy alone."""

from __future__ import annotations

import math
import struct

import numpy as np

O, A = 5, 2
_erf = np.vectorize(math.erf, otypes=[np.float64])


# Trees --------------------------------------------------------------------------------------------------------------


def stack(rng, inputs, hidden, outputs, members=None, norm=False):
    """A flax MLP: Dense_0, LayerNorm_0, Dense_1, ..., with random numbers everywhere."""
    lead = () if members is None else (members,)
    tree, widths = {}, (inputs, *hidden, outputs)
    for i, (into, out) in enumerate(zip(widths[:-1], widths[1:])):
        kernel = rng.normal(size=(*lead, into, out)) / math.sqrt(into)
        tree[f"Dense_{i}"] = {"kernel": kernel, "bias": 0.1 * rng.normal(size=(*lead, out))}
        if norm and i < len(hidden):
            scale = 1 + 0.1 * rng.normal(size=(*lead, out))
            tree[f"LayerNorm_{i}"] = {"scale": scale, "bias": 0.1 * rng.normal(size=(*lead, out))}
    return tree


def residual(rng, inputs, width, blocks, depth, members):
    """The ResNet of floq's field, or of FQL's critic."""
    lead, tree = (members,), {}
    layers = [("initial_block", 0, inputs, width)]
    layers += [(f"hidden_blocks_{b}", i, width, width) for b in range(blocks) for i in range(depth)]
    for block, i, into, out in (*layers, ("final_block", 0, width, 1)):
        group = tree.setdefault(block, {})
        kernel = rng.normal(size=(*lead, into, out)) / math.sqrt(into)
        group[f"Dense_{i}"] = {"kernel": kernel, "bias": 0.1 * rng.normal(size=(*lead, out))}
        if block != "final_block":
            scale = 1 + 0.1 * rng.normal(size=(*lead, out))
            group[f"LayerNorm_{i}"] = {"scale": scale, "bias": 0.1 * rng.normal(size=(*lead, out))}
    return tree


def networks(
    agent="floq",
    *,
    obs_dim=O,
    features=51,
    width=16,
    depth=2,
    blocks=None,
    members=2,
    critic_members=2,
    value_hidden=(12, 11),
    actor_hidden=(10, 9),
    norm=True,
    actor_norm=False,
    seed=0,
):
    """The parameters of all networks in float32."""
    rng = np.random.default_rng(seed)

    def critic():
        if agent == "fql" and blocks is not None:
            return {"value_net": residual(rng, obs_dim + A, width, blocks, depth, critic_members)}
        return {"value_net": stack(rng, obs_dim + A, value_hidden, 1, critic_members, norm)}

    def flow_critic():
        inputs = obs_dim + A + features
        if blocks is not None:
            return {"mlp": residual(rng, inputs, width, blocks, depth, members)}
        return {"mlp": stack(rng, inputs, (width,) * depth, 1, members, norm)}

    tree = {
        "modules_critic": critic(),
        "modules_actor_bc_flow": {"mlp": stack(rng, obs_dim + A + 1, actor_hidden, A, norm=actor_norm)},
        "modules_actor_onestep_flow": {"mlp": stack(rng, obs_dim + A, actor_hidden, A, norm=actor_norm)},
    }
    if agent == "floq":
        tree |= {"modules_floq": flow_critic(), "modules_target_floq": flow_critic()}
    else:
        tree["modules_target_critic"] = critic()
    return mapped(lambda array: array.astype(np.float32), tree)


def checkpoint(params, *, updates=7, seed=1):
    """What the published code pickles: parameters, Adam's state with zeros for targets, step, random key."""
    rng = np.random.default_rng(seed)

    def moments(scale):
        return {name: mapped(_normal(rng, 0 if "target" in name else scale), tree) for name, tree in params.items()}

    adam = {"count": np.asarray(updates, np.int32), "mu": moments(1e-2), "nu": mapped(np.square, moments(1e-3))}
    network = {"step": updates + 1, "params": params, "opt_state": {"0": adam, "1": {}}}
    return {"agent": {"rng": np.arange(2, dtype=np.uint32), "network": network}}


def _normal(rng, scale):
    return lambda array: (scale * rng.normal(size=array.shape)).astype(np.float32)


def mapped(function, tree):
    """The tree with `function` of every array."""
    return {k: mapped(function, v) if isinstance(v, dict) else function(v) for k, v in tree.items()}


def flat(tree, prefix=""):
    """Arrays by their paths."""
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return found


# Forward passes, in float64 -----------------------------------------------------------------------------------------


def dense(layer, x):
    kernel, bias = (layer[k].astype(np.float64) for k in ("kernel", "bias"))
    return x @ kernel + (bias[:, None] if kernel.ndim == 3 else bias)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(layer, x):
    scale, bias = (layer[k].astype(np.float64) for k in ("scale", "bias"))
    if scale.ndim == 2:
        scale, bias = scale[:, None], bias[:, None]
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return y * scale + bias


def hidden_layers(tree, x, count, norm_first=False):
    for i in range(count):
        x = dense(tree[f"Dense_{i}"], x)
        steps = [gelu, lambda x, i=i: layer_norm(tree[f"LayerNorm_{i}"], x) if f"LayerNorm_{i}" in tree else x]
        for step in reversed(steps) if norm_first else steps:
            x = step(x)
    return x


def forward(tree, x, norm_first=False):
    """[rows, in] or, with an ensemble, [E, rows, in] -> the network's outputs."""
    if "initial_block" in tree:
        x = hidden_layers(tree["initial_block"], x, 1, norm_first)
        for b in range(sum(name.startswith("hidden_blocks_") for name in tree)):
            block = tree[f"hidden_blocks_{b}"]
            x = x + hidden_layers(block, x, sum(name.startswith("Dense_") for name in block), norm_first)
        return dense(tree["final_block"]["Dense_0"], x)
    last = sum(name.startswith("Dense_") for name in tree) - 1
    return dense(tree[f"Dense_{last}"], hidden_layers(tree, x, last))


def value(params, obs, action):
    """The plain critic, [E, rows]."""
    tree = params["modules_critic"]["value_net"]
    x = np.concatenate([obs, action], -1)
    return forward(tree, np.broadcast_to(x, (members_of(tree), *x.shape)))[..., 0]


def members_of(tree):
    first = tree["initial_block"]["Dense_0"] if "initial_block" in tree else tree["Dense_0"]
    return len(first["kernel"])


def one_step_action(params, obs, noise):
    return forward(params["modules_actor_onestep_flow"]["mlp"], np.concatenate([obs, noise], -1)).clip(-1, 1)


def bc_action(params, obs, noise, steps=10):
    x = noise
    for k in range(steps):
        time = np.full((len(x), 1), k / steps)
        x = x + forward(params["modules_actor_bc_flow"]["mlp"], np.concatenate([obs, x, time], -1)) / steps
    return x.clip(-1, 1)


def flow_value(
    params, obs, action, u, *, r_min, r_max, gamma=0.99, coverage=0.1, steps=8, bins=51, sigma=16.0, time=np.cos, **how
):
    """floq's walks, [E, rows, S], from uniform draws u [rows, S]; `time` gives the features of t."""
    tree = params["modules_floq"]["mlp"]
    low, high = (r_min - 0.01) / (1 - gamma), (r_max + 0.01) / (1 - gamma)
    members, samples = members_of(tree), u.shape[1]
    cond = np.repeat(np.concatenate([obs, action], -1), samples, axis=0)
    z = coverage * ((1 - u) * r_min + u * r_max) / (1 - gamma)
    z = np.broadcast_to(z.reshape(1, -1, 1), (members, u.size, 1))
    for k in range(steps):
        t = np.atleast_1d(time(k / steps))
        state = (z - low) / (high - low) if bins is None else hl_gauss(z, low, high, bins, sigma)
        x = [np.broadcast_to(part, (members, u.size, part.shape[-1])) for part in (cond, state, t)]
        z = z + forward(tree, np.concatenate(x, -1), **how) / steps
    return z.reshape(members, *u.shape)


def hl_gauss(z, low, high, bins, sigma):
    spacing = (high - low) / (bins - 1)
    edges = low + spacing * np.arange(bins)
    cdf = _erf((edges - z) / (math.sqrt(2) * sigma * spacing))
    return (cdf[..., 1:] - cdf[..., :-1]) / (cdf[..., -1:] - cdf[..., :1])


# Pickles, instruction by instruction --------------------------------------------------------------------------------


def text(word):
    word = word.encode()
    return b"X" + struct.pack("<I", len(word)) + word


def name(module, attribute):
    return text(module) + text(attribute) + b"\x93"


def number(value):
    return b"J" + struct.pack("<i", value)


def sequence(*items):
    return b"(" + b"".join(items) + b"t"


def raw(data):
    return b"B" + struct.pack("<I", len(data)) + data


def array(value, core="core", jax=True):
    """An array as numpy (`core` or `_core`) pickles it, or jax around numpy."""
    kind = value.dtype.str
    state = sequence(number(3), text(kind[0]), b"N", b"N", b"N", number(-1), number(-1), number(0))
    dtype = name("numpy", "dtype") + sequence(text(kind[1:]), b"\x89", b"\x88") + b"R" + state + b"b"
    shape = sequence(*map(number, value.shape))
    state = sequence(number(1), shape, dtype, b"\x89", raw(value.tobytes()))
    made = [name(f"numpy.{core}.multiarray", "_reconstruct")]
    made.append(sequence(name("numpy", "ndarray"), sequence(number(0)), raw(b"b")))
    if not jax:
        return b"".join(made) + b"R" + state + b"b"
    weak = b"}" + text("weak_type") + b"\x89s" + text("named_shape") + b"}s"
    return name("jax._src.array", "_reconstruct_array") + sequence(*made, state, weak) + b"R"


def pickled(value, **how):
    """A whole pickle of dicts of arrays and ints."""

    def body(value):
        if isinstance(value, dict):
            return b"}(" + b"".join(text(k) + body(v) for k, v in value.items()) + b"u"
        return number(value) if isinstance(value, int) else array(value, **how)

    return b"\x80\x04" + body(value) + b"."
