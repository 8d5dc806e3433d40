"""TD3 (arXiv:1802.09477) in one file: td3.py with a plain critic, td3_flow.py the same with a flow critic.

    python td3.py --seed 1

reaches a return of -153.9, -154.0 and -152.8 on Pendulum-v1 with seeds 1, 2 and 3 in one minute each on one core;
td3_flow.py -155.1, -159.1 and -162.9 in two minutes each (15,000 steps; evaluation over 20 episodes).

Letters: B batch, A action.
"""

import copy
import dataclasses
import time

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn


@dataclasses.dataclass
class Args:
    env_id: str = "Pendulum-v1"
    seed: int = 0
    device: str = "cpu"
    num_envs: int = 1
    total_steps: int = 15_000
    """Steps of all environments together; one update per step from `learning_starts` on."""
    learning_starts: int = 1_000
    buffer_size: int = 100_000
    batch_size: int = 128
    gamma: float = 0.98
    tau: float = 0.005
    critic_lr: float = 1e-3
    actor_lr: float = 1e-3
    policy_frequency: int = 2
    """Updates of the critic per update of the actor and the targets."""
    exploration_noise: float = 0.1
    """Standard deviation of the noise on the actions that are played, in units of the action space's half width."""
    target_noise: float = 0.2
    """The same for the noise on the target's actions, which is clipped to `noise_clip`."""
    noise_clip: float = 0.5
    hidden: tuple[int, ...] = (128, 128)
    eval_episodes: int = 20


def mlp(*widths: int) -> nn.Sequential:
    layers = []
    for i, o in zip(widths[:-1], widths[1:]):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Critic(nn.Module):
    """Q(obs, action) of two networks: [2, B, 1]."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: tuple[int, ...]):
        super().__init__()
        self.networks = nn.ModuleList(mlp(obs_dim + action_dim, *hidden, 1) for _ in range(2))

    def forward(self, obs, action):
        x = torch.cat([obs, action], dim=-1)
        return torch.stack([network(x) for network in self.networks])


class Actor(nn.Module):
    """A tanh, scaled to the action space."""

    def __init__(self, obs_dim: int, space: gym.spaces.Box, hidden: tuple[int, ...]):
        super().__init__()
        self.network = mlp(obs_dim, *hidden, space.shape[0])
        self.register_buffer("scale", torch.as_tensor((space.high - space.low) / 2))
        self.register_buffer("shift", torch.as_tensor((space.high + space.low) / 2))

    def forward(self, obs, noise=0.0):
        """[B, A]: the action with `noise`, given in units of the space's half width."""
        return (self.network(obs).tanh() + noise).clamp(-1, 1) * self.scale + self.shift


class Buffer:
    def __init__(self, size: int, obs_dim: int, action_dim: int, device: str):
        shapes = dict(obs=obs_dim, action=action_dim, next_obs=obs_dim, reward=1, terminated=1)
        self.tensors = {name: torch.zeros(size, width, device=device) for name, width in shapes.items()}
        self.size, self.count, self.device = size, 0, device

    def add(self, **rows):
        n = len(rows["obs"])
        index = torch.arange(self.count, self.count + n, device=self.device) % self.size
        for name, tensor in self.tensors.items():
            tensor[index] = torch.as_tensor(rows[name], dtype=torch.float32, device=self.device).reshape(n, -1)
        self.count += n

    def sample(self, batch_size: int):
        index = torch.randint(min(self.count, self.size), (batch_size,), device=self.device)
        return [tensor[index] for tensor in self.tensors.values()]


def make_envs(args: Args, num_envs: int):
    # The observation that ends an episode comes in infos["final_obs"], and `next_obs` is already the new episode's.
    mode = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    return gym.make_vec(args.env_id, num_envs, vectorization_mode="sync", vector_kwargs=mode)


def evaluate(args: Args, actor: Actor) -> float:
    """Mean return of the actor's first `eval_episodes` episodes, one per environment."""
    envs = make_envs(args, args.eval_episodes)
    obs, _ = envs.reset(seed=args.seed + 1_000_000)
    returns, running = np.zeros(args.eval_episodes), np.ones(args.eval_episodes, bool)
    while running.any():
        with torch.no_grad():
            action = actor(torch.as_tensor(obs, dtype=torch.float32, device=args.device)).cpu().numpy()
        obs, reward, terminated, truncated, _ = envs.step(action)
        returns += reward * running
        running &= ~(terminated | truncated)
    envs.close()
    return float(returns.mean())


def main(args: Args) -> float:
    # Networks this small gain nothing from more threads.
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    envs = make_envs(args, args.num_envs)
    envs.action_space.seed(args.seed)
    obs_dim, action_dim = dims = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]

    actor = Actor(obs_dim, envs.single_action_space, args.hidden).to(device)
    critic = Critic(*dims, args.hidden).to(device)
    target_actor, target_critic = copy.deepcopy(actor), copy.deepcopy(critic)
    actor_optimizer = torch.optim.Adam(actor.parameters(), args.actor_lr, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), args.critic_lr, fused=True)
    updates = 0
    buffer = Buffer(args.buffer_size, *dims, args.device)

    began = time.perf_counter()
    obs, _ = envs.reset(seed=args.seed)
    episode_return = np.zeros(args.num_envs)
    for step in range(0, args.total_steps, args.num_envs):
        if step < args.learning_starts:
            action = envs.action_space.sample()
        else:
            with torch.no_grad():
                noise = args.exploration_noise * torch.randn(args.num_envs, action_dim, device=device)
                action = actor(torch.as_tensor(obs, dtype=torch.float32, device=device), noise).cpu().numpy()
        next_obs, reward, terminated, truncated, infos = envs.step(action)
        ended = terminated | truncated
        last_obs = next_obs.copy()
        for i in np.flatnonzero(ended):
            last_obs[i] = infos["final_obs"][i]
        # An episode that was cut off goes on as far as values are concerned: only `terminated` stops the bootstrap.
        buffer.add(obs=obs, action=action, next_obs=last_obs, reward=reward, terminated=terminated)
        obs = next_obs
        episode_return += reward
        if ended.any():
            mean = episode_return[ended].mean()
            print(f"step {step + args.num_envs} return {mean:.1f} {time.perf_counter() - began:.0f} s")
        episode_return[ended] = 0

        for _ in range(args.num_envs if step >= args.learning_starts else 0):
            b_obs, b_action, b_next_obs, b_reward, b_terminated = buffer.sample(args.batch_size)
            with torch.no_grad():
                noise = (args.target_noise * torch.randn_like(b_action)).clamp(-args.noise_clip, args.noise_clip)
                next_q = target_critic(b_next_obs, target_actor(b_next_obs, noise)).amin(0)
                target = b_reward + args.gamma * (1 - b_terminated) * next_q
            critic_loss = (critic(b_obs, b_action) - target).square().mean()
            critic_optimizer.zero_grad()
            critic_loss.backward()
            critic_optimizer.step()

            updates += 1
            if updates % args.policy_frequency == 0:
                actor_loss = -critic(b_obs, actor(b_obs))[0].mean()
                actor_optimizer.zero_grad()
                actor_loss.backward()
                actor_optimizer.step()
                for network, target_network in ((actor, target_actor), (critic, target_critic)):
                    for p, target_p in zip(network.parameters(), target_network.parameters()):
                        target_p.data.copy_(args.tau * p.data + (1 - args.tau) * target_p.data)
    envs.close()
    result = evaluate(args, actor)
    print(f"evaluation return {result:.1f} after {args.total_steps} steps, {time.perf_counter() - began:.0f} s")
    return result


if __name__ == "__main__":
    main(tyro.cli(Args))
