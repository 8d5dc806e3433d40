"""Offline RL on a dataset in OGBench's format: a FlowCritic, and an actor of one's own."""

import copy

import torch
import tyro
from torch import nn

import fastflow as ff
from fastflow.data import load_dataset
from fastflow.evaluate import evaluate


def main(data: str = "data", updates: int = 6000, episodes: int = 50, seed: int = 0):
    name = "pointmaze-arena-navigate-singletask-v0"
    generator, dataset = torch.manual_seed(seed), load_dataset(name, dataset_dir=data)[0]
    o, a, (std, mean) = dataset.obs_dim, dataset.action_dim, torch.std_mean(dataset.tensors["observations"], dim=0)
    actor = nn.Sequential(nn.Linear(o, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, a), nn.Tanh())
    ranges = dict(reward_range=(-1, 0), discount=0.99, noise_coverage=0.03, sigma=3.0)
    critic = ff.FlowCritic.for_rewards(o, a, **ranges, hidden=(64, 64), ensemble=2, num_steps=8)
    target_critic = copy.deepcopy(critic).requires_grad_(False)
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], fused=True)
    for i in range(updates):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, 2 - 2 * i / updates)
        batch = dataset.sample(256, generator)
        obs, next_obs = (4 * (batch[key] - mean) / std for key in ("observations", "next_observations"))
        with torch.no_grad():
            target = batch["rewards"] + 0.99 * batch["masks"] * target_critic(next_obs, actor(next_obs)).mean(0)[:, 0]
        action = actor(obs)
        actor_loss = 0.3 * (action - batch["actions"]).square().mean() - target_critic(obs, action).mean()
        optimizer.zero_grad()
        (critic.loss(obs, batch["actions"], target) + actor_loss).backward()
        optimizer.step()
        torch._foreach_lerp_(list(target_critic.parameters()), [p.detach() for p in critic.parameters()], 0.02)
    actor.device, actor.act = "cpu", lambda obs, generator: actor(4 * (obs - mean) / std).detach()
    print(evaluate(actor, name, episodes=episodes))


if __name__ == "__main__":
    tyro.cli(main)
