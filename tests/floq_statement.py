"""floq's update once more, sharing no code with fastflow: NumPy in float64, from forward passes to Adam.

Written from the papers (arXiv:2509.06863, arXiv:2502.02538) and the published code's settings. What stands behind a
stop-gradient is computed first (`constants`); gradients of the rest are complex-step derivatives, exact to rounding
(Squire and Trapp, 1998): f'(x) = Im f(x + ih) / h, so that everything here also works on complex weights.
"""

import math

import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float64])


def clip(x):
    return np.where(x.real > 1, 1, np.where(x.real < -1, -1, x))


def network(p, prefix, x, norm, norm_first=False, block=0):
    """Hidden layers, then Dense, x [..., in], or [E, ..., in] with weights [E, in, out].

    A hidden layer is Dense -> GELU (tanh form) -> LayerNorm, or with `norm_first` Dense -> LayerNorm -> GELU. With
    `block`, every `block` layers behind the first have their input added to their output.
    """
    depth = sum(name.startswith(f"{prefix}.layers.") and name.endswith("weight") for name in p)

    def wide(v):
        return v.reshape(v.shape[0], *(1,) * (x.ndim - 2), -1) if v.ndim == 2 else v

    def dense(x, i):
        w, b = p[f"{prefix}.layers.{i}.weight"], p[f"{prefix}.layers.{i}.bias"]
        return (np.einsum("e...i,eio->e...o", x, w) if w.ndim == 3 else x @ w) + wide(b)

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def layer_norm(x, i):
        if not norm:
            return x
        centred = x - x.mean(-1, keepdims=True)
        x = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return x * wide(p[f"{prefix}.norms.{i}.weight"]) + wide(p[f"{prefix}.norms.{i}.bias"])

    skip = None
    for i in range(depth - 1):
        if block and i % block == 1 % block:
            skip = x
        x = dense(x, i)
        x = gelu(layer_norm(x, i)) if norm_first else layer_norm(gelu(x), i)
        if block and i and i % block == 0:
            x = x + skip
    return dense(x, depth - 1)


class Statement:
    """One update's losses for a configuration `c`, rewards in [r_min, r_max], a batch and noise `n`."""

    def __init__(self, c, r_min, r_max, batch, n):
        horizon = 1 / (1 - c.discount)
        r_min, r_max = min(0.0, r_min), max(0.0, r_max)
        self.c, self.batch, self.n = c, batch, n
        self.low, self.high = (r_min - c.reward_offset) * horizon, (r_max + c.reward_offset) * horizon
        self.noise_low, self.noise_high = c.noise_coverage * r_min * horizon, c.noise_coverage * r_max * horizon
        self.lowest, self.highest = r_min * horizon, r_max * horizon
        self.shape = (c.flow_num_ensembles, len(batch["rewards"]), c.noise_samples)

    # Networks

    def head(self, p, net, cond, z, t):
        """What the flow critic's network puts out: cond [B, S, C], z [E, B, S], t [B, S]."""
        c = self.c
        if c.use_prob_embed:
            width = (self.high - self.low) / (c.num_bins - 1)
            edges = self.low + width * np.arange(c.num_bins)
            cdf = _erf((edges - z[..., None]) / (math.sqrt(2) * c.sigma * width))
            features = (cdf[..., 1:] - cdf[..., :-1]) / (cdf[..., -1:] - cdf[..., :1])
        else:
            features = ((z - self.low) / (self.high - self.low))[..., None]
        time = {
            "cosine": lambda: np.cos(t)[..., None],
            "fourier": lambda: np.cos(np.pi * t[..., None] * np.arange(1, c.time_embed_dim + 1)),
            "raw": lambda: t[..., None],
        }[c.time_embedding]()
        x = np.concatenate([np.broadcast_to(f, (*self.shape, f.shape[-1])) for f in (cond, features, time)], -1)
        block = c.block_depth if c.use_resnets else 0
        return network(p, f"{net}.field", x, c.layer_norm, not c.activate_before_layernorm, block)[..., 0]

    def walk(self, p, net, cond, u):
        steps = self.c.critic_flow_steps
        z = np.broadcast_to(self.start(u), self.shape)
        for k in range(steps):
            out = self.head(p, net, cond, z, np.full(self.shape[1:], k / steps))
            velocity = out if self.c.prediction == "velocity" else (out - z) / (1 - k / steps)
            z = z + velocity / steps
        return z

    def start(self, u):
        return (1 - u) * self.noise_low + u * self.noise_high

    def samples(self, x):
        return np.repeat(x[:, None], self.c.noise_samples, axis=1)

    def actor(self, p, obs, noise):
        return network(p, "actor_onestep_flow.network", np.concatenate([obs, noise], -1), self.c.actor_layer_norm)

    def critic(self, p, obs, act):
        x = np.concatenate([obs, act], -1)
        x = np.broadcast_to(x, (self.c.num_ensembles, *x.shape))
        return network(p, "critic.network", x, self.c.layer_norm)[..., 0]

    def best(self, p, obs, noise):
        """Of the actions on noise [B, S, N, A], the one of highest value by the distilled critic."""
        obs = np.repeat(obs[:, :, None], self.c.num_candidates, axis=2)
        actions = clip(self.actor(p, obs, noise))
        values = self.possible(self.critic(p, obs, actions).mean(0))
        chosen = np.empty(actions.shape[:2] + actions.shape[3:])
        for b, s in np.ndindex(chosen.shape[:2]):
            chosen[b, s] = max(zip(values[b, s], actions[b, s], strict=True), key=lambda pair: pair[0])[1]
        return chosen

    def possible(self, values):
        return np.clip(values, self.lowest, self.highest) if self.c.clip_values else values

    def bc_velocity(self, p, x, t):
        x = np.concatenate([self.batch["observations"], x, t], -1)
        return network(p, "actor_bc_flow.field", x, self.c.actor_layer_norm)

    # Losses

    def constants(self, p):
        """Everything behind a stop-gradient."""
        c, batch, n = self.c, self.batch, self.n
        obs, next_obs = batch["observations"], batch["next_observations"]
        if c.critic_target == "returns":
            y = self.samples(batch["returns"])
        else:
            if c.num_candidates > 1:
                next_act = self.best(p, self.samples(next_obs), n["next_action"])
            else:
                next_act = clip(self.actor(p, self.samples(next_obs), n["next_action"]))
            if c.critic_target == "data":
                next_act = self.samples(batch["next_actions"])
            next_q = self.walk(
                p, "target_floq", np.concatenate([self.samples(next_obs), next_act], -1), n["target_start"]
            )
            next_q = self.possible(next_q.min(0) if c.q_agg == "min" else next_q.mean(0))
            y = batch["rewards"][:, None] + c.discount * batch["masks"][:, None] * next_q
            if c.backup == "expected":
                y = self.samples(y.mean(1))
        if c.target_noise:
            y = y + c.target_noise * n["target"][:, None]
        cond = np.concatenate([self.samples(obs), self.samples(batch["actions"])], -1)
        x = n["action"]
        for k in range(c.flow_steps):
            x = x + self.bc_velocity(p, x, np.full((len(obs), 1), k / c.flow_steps)) / c.flow_steps
        own_q = self.critic(p, obs, clip(self.actor(p, obs, n["action"]))).mean(0)
        return {
            "y": y,
            "cond": cond,
            "q": self.walk(p, "floq", cond, n["start"]),
            "flow_action": clip(x),
            "q_scale": np.abs(own_q).mean() if c.normalize_q_loss else 1.0,
            "critic": {name: value for name, value in p.items() if name.startswith("critic.")},
        }

    def losses(self, p, k):
        """(critic loss, actor loss, terms) at weights `p`, given `constants`."""
        c, batch, n = self.c, self.batch, self.n
        obs, act, y = batch["observations"], batch["actions"], k["y"]
        t = np.zeros_like(n["time"]) if c.train_at_zero_only else n["time"]
        x_0 = self.start(n["start"])
        out = self.head(p, "floq", k["cond"], np.broadcast_to((1 - t) * x_0 + t * y, self.shape), t)
        error = out - (y - x_0 if c.prediction == "velocity" else y)
        floq_loss = np.sum(error**2) / (self.shape[0] * self.shape[1])
        critic_distill = np.mean((self.critic(p, obs, act) - k["q"].mean((0, 2))) ** 2)

        t = n["bc_time"][:, None]
        bc_error = self.bc_velocity(p, (1 - t) * n["bc_noise"] + t * act, t) - (act - n["bc_noise"])
        bc_loss = np.mean(bc_error**2)
        a = self.actor(p, obs, n["action"])
        distill = np.mean((a - k["flow_action"]) ** 2)
        q_pi = self.critic(k["critic"], obs, clip(a)).mean(0)
        q_loss = -q_pi.mean() / k["q_scale"]
        terms = {
            "critic/floq_loss": floq_loss,
            "critic/distill_loss": critic_distill,
            "critic/critic_loss": floq_loss + critic_distill,
            "actor/bc_flow_loss": bc_loss,
            "actor/distill_loss": distill,
            "actor/q_loss": q_loss,
            "actor/q": q_pi.mean(),
            "actor/actor_loss": bc_loss + c.alpha * distill + q_loss,
        }
        return terms["critic/critic_loss"], terms["actor/actor_loss"], terms

    def metrics(self, p):
        """Everything that an update reports."""
        k = self.constants(p)
        q, value = k["q"], k["q"].mean((0, 2))
        return self.losses(p, k)[2] | {
            "critic/target_mean": k["y"].mean(),
            "critic/q_mean": value.mean(),
            "critic/q_min": value.min(),
            "critic/q_max": value.max(),
            "critic/var_flow_returns": q.var(2).mean(),
            "critic/td_error": np.abs(k["y"] - value[:, None]).mean(),
        }

    def gradients(self, p):
        """d(critic loss + actor loss) / dp of every weight but the target's."""
        k = self.constants(p)
        moved = {name: value.astype(complex) for name, value in p.items()}
        found = {}
        for name in trained(p):
            at, gradient = moved[name], np.empty(p[name].shape)
            for index in np.ndindex(at.shape):
                at[index] += 1e-30j
                gradient[index] = sum(self.losses(moved, k)[:2]).imag / 1e-30
                at[index] = p[name][index]
            found[name] = gradient
        return found


def trained(p):
    return [name for name in p if not name.startswith("target_")]


def update(p, moments, step, gradients, lr, tau):
    """Adam's update number `step` (from 1) of all weights at once, and the target's, which follows the weights from
    before it. Returns new weights and moments; no moments begin as zeros."""
    new, following = dict(p), {}
    for name, g in gradients.items():
        m, v = moments.get(name, (0.0, 0.0))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        new[name] = p[name] - lr * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        following[name] = (m, v)
        if f"target_{name}" in p:
            new[f"target_{name}"] = tau * p[name] + (1 - tau) * p[f"target_{name}"]
    return new, following
