"""python -m benchmarks.fpo_update: FPO's samples per second beside the same algorithm in plain PyTorch.

One round samples actions for a rollout (a walk of K steps for all environments at each of T steps) and updates on it
(old losses, then passes in minibatches over policy and value network, Adam). Environments are left out: they cost both
alike. The plain version is what a user would write: nn.Sequential networks, a Python loop over Euler steps, pairs
expanded to rows, autograd. Both begin at the same weights; the losses of all pairs and the gradients of a minibatch are
compared before a clock runs. Rounds alternate, so that drift of the machine hits both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import facts
from fastflow.agents.fpo import PRESETS, FpoAgent, FpoConfig
from fastflow.atomic import atomic_write

# CheetahRun's sizes. Fewer rows and passes than in Playground: time goes with rows times passes.
OBS, ACTION, ENVS, STEPS, MINIBATCHES, EPOCHS = 17, 6, 64, 120, 4, 4


class PlainFpo:
    """FPO in plain PyTorch, with the weights of a fastflow agent."""

    def __init__(self, agent: FpoAgent) -> None:
        self.config = config = agent.config
        state = agent.networks.state_dict()
        self.actor = self._network(state, "actor.field.layers", nn.SiLU)
        self.critic = self._network(state, "critic.network.layers", nn.SiLU)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=config.lr, eps=config.adam_eps)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=config.lr, eps=config.adam_eps)

    @staticmethod
    def _network(state: dict[str, Tensor], prefix: str, activation: type[nn.Module]) -> nn.Sequential:
        modules: list[nn.Module] = []
        i = 0
        while f"{prefix}.{i}.weight" in state:
            weight = state[f"{prefix}.{i}.weight"].T
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            with torch.no_grad():
                layer.weight.copy_(weight)
                layer.bias.copy_(state[f"{prefix}.{i}.bias"])
            modules += [layer, activation()]
            i += 1
        return nn.Sequential(*modules[:-1])

    def velocity(self, x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        angle = t * 2.0 ** torch.arange(self.config.time_embed_dim // 2)
        return self.actor(torch.cat([obs, x, angle.cos(), angle.sin()], -1)) * self.config.output_scale

    @torch.no_grad()
    def sample(self, obs: Tensor, noise: Tensor) -> Tensor:
        x, steps = noise, self.config.num_steps
        for k in range(steps):
            x = x + self.velocity(x, torch.full((len(x), 1), k / steps), obs) / steps
        return x

    def pair_losses(self, obs: Tensor, action: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        rows, pairs, dim = eps.shape
        obs, action = (x.unsqueeze(1).expand(rows, pairs, -1).reshape(rows * pairs, -1) for x in (obs, action))
        eps, t = eps.reshape(rows * pairs, dim), t.reshape(rows * pairs, 1)
        x_t = (1 - t) * eps + t * action
        predicted = x_t - t * self.velocity(x_t, t, obs)
        return (predicted - eps).square().mean(-1).view(rows, pairs)

    def update(self, obs: Tensor, action: Tensor, eps: Tensor, t: Tensor, advantage: Tensor, returns: Tensor) -> None:
        config = self.config
        with torch.no_grad():
            old = self.pair_losses(obs, action, eps, t)
        for _ in range(EPOCHS):
            for index in torch.randperm(len(obs)).chunk(MINIBATCHES):
                losses = self.pair_losses(obs[index], action[index], eps[index], t[index])
                ratio = (old[index].mean(1) - losses.mean(1)).exp()
                a = advantage[index]
                a = (a - a.mean()) / (a.std() + 1e-8)
                actor_loss = -torch.min(ratio * a, ratio.clamp(1 - config.clip, 1 + config.clip) * a).mean()
                value_loss = config.value_coef * (self.critic(obs[index]).squeeze(-1) - returns[index]).square().mean()
                self.actor_optimizer.zero_grad()
                actor_loss.backward()
                self.actor_optimizer.step()
                self.critic_optimizer.zero_grad()
                value_loss.backward()
                self.critic_optimizer.step()


def make_agent(precision: str, **changes: Any) -> FpoAgent:
    settings = {
        **PRESETS["playground"],
        "rollout_steps": STEPS,
        "num_minibatches": MINIBATCHES,
        "num_epochs": EPOCHS,
        "recompute_advantages": False,
        "normalize_observations": False,
        "precision": precision,
        **changes,
    }
    return FpoAgent(FpoConfig(**settings), OBS, ACTION, [-1.0] * ACTION, [1.0] * ACTION, ENVS, seed=0)


def fastflow_round(agent: FpoAgent, obs: Tensor, rollout: dict[str, Tensor]) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)

    def run() -> None:
        for step in obs:
            agent.explore(step, generator)
        agent.update(rollout)

    return run


def plain_round(plain: PlainFpo, obs: Tensor, rollout: dict[str, Tensor]) -> Callable[[], None]:
    config = plain.config
    flat, actions = rollout["observations"].flatten(0, 1), rollout["actions"].flatten(0, 1)

    def run() -> None:
        for step in obs:
            plain.sample(step, torch.randn(ENVS, ACTION))
        with torch.no_grad():
            values = plain.critic(flat).view(STEPS, ENVS)
            following = plain.critic(rollout["next_observations"].flatten(0, 1)).view(STEPS, ENVS)
            advantage = torch.zeros_like(values)
            last = torch.zeros(ENVS)
            for i in reversed(range(STEPS)):
                delta = config.reward_scale * rollout["rewards"][i] + config.gamma * following[i] - values[i]
                last = advantage[i] = delta + config.gamma * config.gae_lambda * last
        shape = (len(flat), config.num_pairs)
        t = (torch.rand(shape) * config.num_steps).floor() / config.num_steps
        plain.update(flat, actions, torch.randn(*shape, ACTION), t, advantage.flatten(), (advantage + values).flatten())

    return run


def check(agent: FpoAgent, plain: PlainFpo, rollout: dict[str, Tensor]) -> dict[str, float]:
    """Largest relative differences of pair losses and of the gradients of a minibatch, between the two."""
    rows = {"obs": rollout["observations"][:4].flatten(0, 1), "actions": rollout["actions"][:4].flatten(0, 1)}
    rows["x_0"] = torch.randn(len(rows["obs"]), agent.config.num_pairs, ACTION)
    rows["t"] = torch.rand(len(rows["obs"]), agent.config.num_pairs)
    ours, theirs = agent.pair_losses(rows), plain.pair_losses(rows["obs"], rows["actions"], rows["x_0"], rows["t"])
    losses = float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())
    grads = torch.autograd.grad(ours.mean(), agent.networks.actor.parameters())  # type: ignore[arg-type]
    others = torch.autograd.grad(theirs.mean(), plain.actor.parameters())  # type: ignore[arg-type]
    matched = [(a, b.T if b.dim() == 2 else b) for a, b in zip(grads, others, strict=True)]
    gradients = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in matched)
    return {"losses": losses, "gradients": gradients}


def measure(rounds: int = 7) -> dict[str, Any]:
    """Seconds of alternating rounds by entrant, after the checks."""
    torch.manual_seed(0)
    obs = torch.randn(STEPS, ENVS, OBS)
    rollout = {
        "observations": obs,
        "next_observations": torch.randn(STEPS, ENVS, OBS),
        "actions": torch.randn(STEPS, ENVS, ACTION),
        "rewards": torch.randn(STEPS, ENVS) / 10,
        "terminated": torch.zeros(STEPS, ENVS, dtype=torch.bool),
        "truncated": torch.zeros(STEPS, ENVS, dtype=torch.bool),
    }
    agents = {f"fastflow {precision}": make_agent(precision) for precision in ("fp32", "bf16")}
    agents["fastflow fp32, noise regenerated"] = make_agent("fp32", noise="regenerated")
    plain = PlainFpo(agents["fastflow fp32"])
    differences = check(agents["fastflow fp32"], plain, rollout)
    if max(differences.values()) > 1e-4:
        raise RuntimeError(f"the two are not the same algorithm: {differences}")
    with torch.no_grad():
        kept = {name: _kept(agent, rollout) for name, agent in agents.items()}
    entrants = {name: fastflow_round(agent, obs, rollout) for name, agent in agents.items()}
    entrants["plain PyTorch fp32"] = plain_round(plain, obs, rollout)
    seconds: dict[str, list[float]] = {name: [] for name in entrants}
    for i in range(rounds + 1):
        for name, run in entrants.items():
            began = time.perf_counter()
            run()
            if i:  # the first compiles and allocates
                seconds[name].append(time.perf_counter() - began)
    return {"differences": differences, "seconds": seconds, "bytes kept for an update": kept}


def _kept(agent: FpoAgent, rollout: dict[str, Tensor]) -> int:
    """Bytes of the pairs of a rollout: times and noise, or what both are computed from, and their old losses."""
    rows = agent._prepare(rollout["observations"].flatten(0, 1), rollout)
    return sum(value.nbytes for value in rows.values())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fpo_update", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    found = measure(given.rounds)
    base = statistics.median(found["seconds"]["plain PyTorch fp32"])
    print(f"{STEPS * ENVS:,} samples a round, {EPOCHS} passes, {given.threads} thread(s)")
    for name, seconds in found["seconds"].items():
        middle = statistics.median(seconds)
        kept = found["bytes kept for an update"].get(name)
        pairs = f"  pairs take {kept / 2**20:.2f} MiB" if kept else ""
        print(f"{name:35s} {middle:7.3f} s {STEPS * ENVS / middle:9,.0f} samples/s  {base / middle:5.2f}x{pairs}")
    if given.output:
        found |= {
            "machine": facts(torch.device("cpu")),
            "threads": given.threads,
            "samples": STEPS * ENVS,
            "passes": EPOCHS,
        }
        with atomic_write(given.output) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
