"""What all agents with FQL's actor are tested against: NumPy in float64, from forward passes to Adam, which shares no
code with the agents. Gradients are central differences of the statement, in which everything behind a stop-gradient
reads a second copy of the weights.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

O, A, B = 3, 2, 5
SMALL = {"value_hidden_dims": (7, 6), "actor_hidden_dims": (6, 5), "batch_size": B, "flow_steps": 4}


def dense_stack(p, prefix, x, norm, block_depth=None):
    """Dense -> GELU (tanh form) -> LayerNorm, then Dense, x [..., in], or [E, ..., in] with weights [E, in, out]. With
    `block_depth` blocks of so many layers behind the first are added to their input."""
    depth = sum(name.startswith(f"{prefix}.layers.") and name.endswith("weight") for name in p)
    block = None
    for i in range(depth):
        w, b = p[f"{prefix}.layers.{i}.weight"], p[f"{prefix}.layers.{i}.bias"]
        if w.ndim == 3:
            x = np.einsum("e...i,eio->e...o", x, w) + b.reshape(b.shape[0], *(1,) * (x.ndim - 2), -1)
        else:
            x = x @ w + b
        if i + 1 == depth:
            return x
        x = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        if norm:
            scale, shift = p[f"{prefix}.norms.{i}.weight"], p[f"{prefix}.norms.{i}.bias"]
            if scale.ndim == 2:
                scale, shift = (v.reshape(v.shape[0], *(1,) * (x.ndim - 2), -1) for v in (scale, shift))
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale + shift
        if block_depth is not None and i % block_depth == 0:
            x = block = x if block is None else x + block
    raise AssertionError(f"no layers under {prefix}")


def onestep(p, c, obs, noise):
    return dense_stack(p, "actor_onestep_flow.network", np.concatenate([obs, noise], -1), c.actor_layer_norm)


def flow_actions(p, c, obs, noise):
    x = noise
    for k in range(c.flow_steps):
        t = np.full((*x.shape[:-1], 1), k / c.flow_steps)
        x = (
            x
            + dense_stack(p, "actor_bc_flow.field", np.concatenate([obs, x, t], -1), c.actor_layer_norm) / c.flow_steps
        )
    return np.clip(x, -1, 1)


def actor_losses(p, frozen, c, batch, n, value):
    """Loss and terms of FQL's actor that climbs `value(actions)` [B]; `p` is differentiated, `frozen` are the same
    weights behind stop-gradients."""
    obs, act, t = batch["observations"], batch["actions"], n["bc_time"][:, None]
    x_t = np.concatenate([obs, (1 - t) * n["bc_noise"] + t * act, t], -1)
    velocity = dense_stack(p, "actor_bc_flow.field", x_t, c.actor_layer_norm)
    bc_loss = np.mean((velocity - (act - n["bc_noise"])) ** 2)
    a = onestep(p, c, obs, n["action"])
    distill = np.mean((a - flow_actions(frozen, c, obs, n["action"])) ** 2)
    q = value(np.clip(a, -1, 1))
    q_loss = -q.mean()
    if c.normalize_q_loss:
        q_loss = q_loss / np.abs(value(np.clip(onestep(frozen, c, obs, n["action"]), -1, 1))).mean()
    loss = bc_loss + c.alpha * distill + q_loss
    terms = {"actor_loss": loss, "bc_flow_loss": bc_loss, "distill_loss": distill, "q_loss": q_loss, "q": q.mean()}
    return loss, {f"actor/{name}": term for name, term in terms.items()}


def random_batch(dtype=torch.float32, rows=B, seed=0):
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(shape, generator=g, dtype=dtype)

    return {
        "observations": 2 * uniform(rows, O) - 1,
        "actions": 2 * uniform(rows, A) - 1,
        "next_observations": 2 * uniform(rows, O) - 1,
        "rewards": -2 * uniform(rows),
        "masks": (uniform(rows) > 0.3).to(dtype),
        "terminals": torch.zeros(rows, dtype=dtype),
    }


def disturb(agent, seed=1):
    """Weights in general position: fresh biases and LayerNorm scales are zeros and ones, and the target is a copy."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in agent.networks.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=g, dtype=parameter.dtype)


def arrays(agent):
    return {name: parameter.detach().numpy().copy() for name, parameter in agent.networks.named_parameters()}


def as_numpy(tensors):
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def equal_states(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def _statement(agent, losses, batch, noise):
    """(weights, a function of nothing that gives both losses and the terms with these weights)."""
    p = arrays(agent)
    frozen = {name: value.copy() for name, value in p.items()}
    given = as_numpy(batch), as_numpy(dataclasses.asdict(noise))
    return p, lambda: losses(p, frozen, agent.config, *given)


def _difference(p, statement, name, index, step=1e-5):
    at, values = p[name][index], []
    for shift in (step, -step):
        p[name][index] = at + shift
        values.append(sum(statement()[:2]))
    p[name][index] = at
    return (values[0] - values[1]) / (2 * step)


def check_losses(agent, losses, rtol=1e-10, rows=B):
    """Losses, metrics and a gradient of every parameter of a float64 agent against `losses(p, frozen, config, batch,
    noise)` -> (critic loss, actor loss, terms)."""
    disturb(agent)
    batch = random_batch(torch.float64, rows)
    noise = agent.sample_noise(batch)
    critic_loss, actor_loss, metrics = agent.losses(batch, noise)
    (critic_loss + actor_loss).backward()
    p, statement = _statement(agent, losses, batch, noise)
    expected_critic, expected_actor, terms = statement()
    np.testing.assert_allclose(critic_loss.item(), expected_critic, rtol=rtol)
    np.testing.assert_allclose(actor_loss.item(), expected_actor, rtol=rtol)
    assert metrics.keys() == terms.keys()
    for term, value in terms.items():
        assert metrics[term].shape == () and not metrics[term].requires_grad
        np.testing.assert_allclose(metrics[term].item(), value, rtol=rtol, atol=1e-12, err_msg=term)
    rng = np.random.default_rng(0)
    for name, parameter in agent.networks.named_parameters():
        if name.startswith("target_"):
            assert parameter.grad is None
            continue
        index = tuple(rng.integers(n) for n in parameter.shape)
        scale = float(parameter.grad.abs().max())
        np.testing.assert_allclose(
            parameter.grad[index].item(),
            _difference(p, statement, name, index),
            rtol=1e-5,
            atol=1e-6 * (1 + scale),
            err_msg=name,
        )


def check_updates(agent, losses, updates=2):
    """Whole updates of a float64 agent: every weight against Adam on differences of the statement, and the targets
    against the average of the weights before each update."""
    disturb(agent)
    c, batch = agent.config, random_batch(torch.float64)
    mean = dict.fromkeys(arrays(agent), 0.0)
    square = dict(mean)
    for step in range(1, updates + 1):
        state = agent.generator.get_state()
        noise = agent.sample_noise(batch)
        agent.generator.set_state(state)
        p, statement = _statement(agent, losses, batch, noise)
        expected = {}
        for name, value in p.items():
            if name.startswith("target_"):
                expected[name] = c.tau * p[name.removeprefix("target_")] + (1 - c.tau) * value
                continue
            g = np.zeros_like(value)
            for index in np.ndindex(value.shape):
                g[index] = _difference(p, statement, name, index)
            mean[name] = 0.9 * mean[name] + 0.1 * g
            square[name] = 0.999 * square[name] + 0.001 * g**2
            m, v = mean[name] / (1 - 0.9**step), square[name] / (1 - 0.999**step)
            expected[name] = value - c.lr * m / (np.sqrt(v) + 1e-8)
        agent.update(batch)
        assert agent.step == step
        for name, value in arrays(agent).items():
            # A gradient close to zero has hardly a sign, which is what Adam's first step takes.
            np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-3 * c.lr, err_msg=name)
