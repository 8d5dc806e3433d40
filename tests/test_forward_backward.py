"""Forward-Backward representations: the loss, what it converges to, the policies, and exact resumption."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastflow.agents.forward_backward import (
    PRESETS,
    ForwardBackwardAgent,
    ForwardBackwardConfig,
    preset_for,
)

SMALL = ForwardBackwardConfig(
    z_dim=16,
    discount=0.9,
    batch_size=128,
    lr_f=1e-3,
    lr_b=1e-3,
    lr_actor=1e-3,
    tau=0.02,
    goal_prob=0.5,
    hidden_dim=64,
    feature_dim=32,
    backward_hidden_dims=(64, 64),
)
TINY = dataclasses.replace(SMALL, z_dim=4, hidden_dim=8, feature_dim=8, backward_hidden_dims=(8,), batch_size=6)


def train(agent: ForwardBackwardAgent, data: dict[str, torch.Tensor], updates: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        rows = torch.randint(len(data["actions"]), (agent.config.batch_size,), generator=generator)
        agent.update({key: value[rows] for key, value in data.items()})


def room(num: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Uniform transitions in the square [-1, 1]^2: an action moves by a fifth of it."""
    state, action = 2 * torch.rand(2, num, 2, generator=torch.Generator().manual_seed(seed)) - 1
    return {"observations": state, "actions": action, "next_observations": walk(state, action)}


def walk(state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    return (state + 0.2 * action).clamp(-1, 1)


@pytest.fixture(scope="module")
def trained() -> ForwardBackwardAgent:
    agent = ForwardBackwardAgent(SMALL, 2, 2, seed=0)
    train(agent, room(20_000), 600)
    return agent


# What is learnt -----------------------------------------------------------------------------------------------------


def test_measure_of_a_ring():
    """Six states in a ring that any action moves on by one: the density is known, and six features can hold it.

    It starts at the next state: the present one comes last.
    """
    n, gamma = 6, 0.8
    config = dataclasses.replace(SMALL, z_dim=n, discount=gamma, lr_f=2e-3, tau=0.05, q_agg="mean")
    agent = ForwardBackwardAgent(config, n, 1, seed=1)
    generator = torch.Generator().manual_seed(0)
    place = torch.randint(n, (5000,), generator=generator)
    eye = torch.eye(n)
    action = 2 * torch.rand(5000, 1, generator=generator) - 1
    data = {"observations": eye[place], "actions": action, "next_observations": eye[(place + 1) % n]}
    train(agent, data, 600)

    ahead = (torch.arange(n) - torch.arange(n)[:, None] - 1) % n  # steps beyond the first to each state
    truth = n * (1 - gamma) * gamma**ahead / (1 - gamma**n)
    found = agent.density_ratio(eye, torch.zeros(n, 1), agent.sample_embeddings(n), eye)
    assert (found - truth).abs().mean() < 0.1  # of densities from .53 to 1.63
    assert found.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(found.argmax(1), (torch.arange(n) + 1) % n)
    assert torch.equal(found.argmin(1), torch.arange(n))
    features = agent.goal_embedding(eye)
    assert torch.allclose(features.T @ features / n, torch.eye(n), atol=0.15)


def test_policies_walk_to_their_goals(trained):
    generator = torch.Generator().manual_seed(1)
    state, goal = 2 * torch.rand(2, 200, 2, generator=generator) - 1
    before, aimless = (state - goal).norm(dim=1).mean(), state
    w = trained.goal_embedding(goal)
    for _ in range(20):
        state = walk(state, trained.act(state, w))
        aimless = walk(aimless, 2 * torch.rand(200, 2, generator=generator) - 1)
    after, by_chance = (state - goal).norm(dim=1).mean(), (aimless - goal).norm(dim=1).mean()
    assert before > 1 and by_chance > 0.8
    assert after < 0.45


def test_policy_of_a_reward(trained):
    """More to the right is better: all go right. The opposite reward, the opposite policy."""
    states = room(4000, seed=2)["next_observations"]
    w = trained.task_embedding(states, states[:, 0] - states[:, 0].mean())
    assert w.norm().item() == pytest.approx(4, rel=1e-5)
    here = 1.2 * torch.rand(200, 2, generator=torch.Generator().manual_seed(3)) - 0.6
    assert trained.act(here, w)[:, 0].mean() > 0.5
    assert trained.act(here, -w)[:, 0].mean() < -0.5
    right, left = torch.tensor([1.0, 0.0]).expand(200, 2), torch.tensor([-1.0, 0.0]).expand(200, 2)
    better = trained.value(here, right, w) > trained.value(here, left, w)
    assert better.float().mean() > 0.9
    # The value of a policy for another's reward.
    assert (trained.value(here, right, w, task=-w) < trained.value(here, right, w)).all()


def test_density_is_higher_where_the_policy_goes(trained):
    states = room(4000, seed=4)["next_observations"]
    goal = torch.tensor([[0.6, -0.6]])
    ratio = trained.density_ratio(torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), trained.goal_embedding(goal), states)
    assert ratio.shape == (1, 4000)
    distance = (states - goal).norm(dim=1)
    assert ratio[0, distance < 0.3].mean() > 3 > 0.1 > ratio[0, distance > 1.5].mean()


# The loss -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q_agg", ["min", "mean"])
def test_losses_pair_by_pair(q_agg):
    config = dataclasses.replace(TINY, q_agg=q_agg, ortho_coef=0.7, policy_noise=2.0)
    agent = ForwardBackwardAgent(config, 3, 2, seed=0, dtype=torch.float64)
    data = {key: value.double() for key, value in batch(6).items()}
    agent.update(data)  # moves the targets away from the online maps
    noise = agent.sample_noise(data)
    loss, actor_loss, metrics = agent.losses(data, noise)

    networks, obs, next_obs = agent.networks, data["observations"], data["next_observations"]
    with torch.no_grad():
        b_online, b_target = networks.backward_map(next_obs), networks.target_backward_map(next_obs)
        z = torch.stack(
            [
                b_online[noise.goal[i]]
                if noise.mixture[i] < 0.5
                else 2 * noise.direction[i] / noise.direction[i].norm()
                for i in range(6)
            ]
        )
        action = (networks.actor(next_obs, z) + (2.0 * noise.action).clamp(-0.3, 0.3)).clamp(-1, 1)
        f_target = networks.target_forward_map(next_obs, action, z)
        f_online = networks.forward_map(obs, data["actions"], z)
        own = networks.forward_map(obs, networks.actor(obs, z), z)
    reduce = min if q_agg == "min" else lambda values: sum(values) / len(values)
    off, diagonal, ortho, q = 0.0, 0.0, 0.0, 0.0
    for i in range(6):
        q += float(reduce([own[e, i] @ z[i] for e in range(2)])) / 6
        diagonal -= sum(2 * float(f_online[e, i] @ b_online[i]) / 6 for e in range(2))
        ortho -= 2 * float(b_online[i] @ b_online[i]) / 6
        for j in range(6):
            if i != j:
                target = reduce([f_target[e, i] @ b_target[j] for e in range(2)])
                off += sum(float(f_online[e, i] @ b_online[j] - 0.9 * target) ** 2 / 30 for e in range(2))
                ortho += float(b_online[i] @ b_online[j]) ** 2 / 30
    assert loss.item() == pytest.approx(off + diagonal + 0.7 * ortho, rel=1e-9)
    assert actor_loss.item() == pytest.approx(-q, rel=1e-9)
    assert metrics["actor/q"].item() == pytest.approx(q, rel=1e-9)
    assert metrics["fb/off_diagonal"].item() == pytest.approx(off / 2, rel=1e-9)
    assert metrics["fb/diagonal"].item() == pytest.approx(diagonal / 2, rel=1e-9)
    assert metrics["fb/orthonormality"].item() == pytest.approx(ortho + 4, rel=1e-9)


def batch(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draws = {"observations": 3, "actions": 2, "next_observations": 3}
    return {key: torch.randn(rows, width, generator=generator).clamp(-1, 1) for key, width in draws.items()}


def test_each_network_learns_from_its_own_loss():
    """Neither the policies' loss nor their learning rate reaches F and B; no target has a gradient."""
    one, other = (ForwardBackwardAgent(dataclasses.replace(TINY, lr_actor=lr), 3, 2, seed=0) for lr in (1e-3, 1e-9))
    start = one.state_dict()
    for agent in (one, other):
        agent.update(batch(6))
    after, quiet = one.state_dict(), other.state_dict()
    for name in after:
        if name.startswith(("forward_map.", "backward_map.")):
            assert torch.equal(after[name], quiet[name])
            assert not torch.equal(after[name], start[name])
            assert not one.networks.get_parameter(f"target_{name}").requires_grad
            target = torch.lerp(start[f"target_{name}"], after[name], 0.02)
            assert torch.allclose(after[f"target_{name}"], target, rtol=0, atol=1e-7)
    head = "actor.head.last.weight"
    assert (after[head] - start[head]).abs().max() > 1e-4 > (quiet[head] - start[head]).abs().max()
    # The actor's gradient is that of its own loss: a fresh agent's first step of Adam has its sign.
    fresh = ForwardBackwardAgent(TINY, 3, 2, seed=0)
    _, actor_loss, _ = fresh.losses(batch(6), fresh.sample_noise(batch(6)))
    (gradient,) = torch.autograd.grad(actor_loss, fresh.networks.actor.head.last.weight)
    big = gradient.abs() > 1e-5
    assert big.any()
    assert torch.equal((after[head] - start[head])[big].sign(), -gradient[big].sign())


# Embeddings ---------------------------------------------------------------------------------------------------------


def test_embeddings_lie_on_the_sphere():
    agent = ForwardBackwardAgent(TINY, 3, 2, seed=0)
    generator = torch.Generator().manual_seed(0)
    uniform = agent.sample_embeddings(4000, generator)
    assert uniform.shape == (4000, 4)
    assert torch.allclose(uniform.norm(dim=1), torch.full((4000,), 2.0))
    assert uniform.mean(0).abs().max() < 0.06
    assert torch.allclose(uniform.T @ uniform / 4000, torch.eye(4), atol=0.08)
    goals = batch(5)["observations"]
    mixed = agent.sample_embeddings(4000, generator, goals)
    towards = (torch.cdist(mixed, agent.goal_embedding(goals)) < 1e-2).any(1).float().mean()
    assert towards.item() == pytest.approx(0.5, abs=0.03)
    assert torch.equal(
        agent.sample_embeddings(3, torch.Generator().manual_seed(1)),
        agent.sample_embeddings(3, torch.Generator().manual_seed(1)),
    )
    rewards = torch.tensor([0.0, 2.0, 0.0, 0.0, 0.0])
    assert torch.allclose(agent.task_embedding(goals, rewards), agent.goal_embedding(goals[1:2])[0], atol=1e-6)


def test_acting():
    agent = ForwardBackwardAgent(TINY, 3, 2, seed=0)
    obs, w = batch(5)["observations"], agent.sample_embeddings(5)
    actions = agent.act(obs, w)
    assert actions.shape == (5, 2) and actions.abs().max() <= 1 and not actions.requires_grad
    assert torch.equal(actions, agent.act(obs, w))
    assert torch.equal(agent.act(obs, w[0]), agent.act(obs, w[:1].expand(5, 4)))
    assert agent.act(obs[:0], w[0]).shape == (0, 2)


def test_observation_statistics_are_applied_everywhere():
    mean, std = torch.tensor([5.0, 0.0, -2.0]), torch.tensor([2.0, 1.0, 10.0])
    plain = ForwardBackwardAgent(TINY, 3, 2, seed=0, dtype=torch.float64)
    scaled = ForwardBackwardAgent(TINY, 3, 2, seed=0, dtype=torch.float64, observation_statistics=(mean, std))
    data = {key: value.double() for key, value in batch(6).items()}
    raw = data | {key: data[key] * std + mean for key in ("observations", "next_observations")}
    first, second = plain.update(data), scaled.update(raw)
    assert all(torch.allclose(first[key], second[key], rtol=1e-9) for key in first)
    w = plain.sample_embeddings(1)[0]
    assert torch.allclose(plain.act(data["observations"], w), scaled.act(raw["observations"], w))
    assert torch.allclose(plain.goal_embedding(data["observations"]), scaled.goal_embedding(raw["observations"]))


# State --------------------------------------------------------------------------------------------------------------


def test_resumption_is_bit_for_bit():
    agent, other = (ForwardBackwardAgent(TINY, 3, 2, seed=seed) for seed in (0, 7))
    for i in range(3):
        agent.update(batch(6, seed=i))
    other.load_state_dict(agent.state_dict())
    assert other.step == 3
    for i in range(3, 6):
        ours, theirs = agent.update(batch(6, seed=i)), other.update(batch(6, seed=i))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = agent.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(agent.sample_embeddings(2), other.sample_embeddings(2))


def test_seed_decides_and_nothing_else_is_touched():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    agents = [ForwardBackwardAgent(TINY, 3, 2, seed=seed) for seed in (0, 0, 1)]
    for agent in agents:
        agent.update(batch(6))
        before = agent.state_dict()
        validated = agent.validate(batch(6))
        assert set(validated) == {"fb/loss", "fb/off_diagonal", "fb/diagonal", "fb/orthonormality", "actor/q"}
        assert all(value.dim() == 0 for value in validated.values())
        assert all(torch.equal(value, agent.validate(batch(6))[key]) for key, value in validated.items())
        assert all(torch.equal(value, before[key]) for key, value in agent.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    first, second, third = (agent.state_dict()["actor.head.last.weight"] for agent in agents)
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_states_that_do_not_fit():
    agent = ForwardBackwardAgent(TINY, 3, 2)
    state = agent.state_dict()
    before = agent.state_dict()
    with pytest.raises(ValueError, match="missing step"):
        agent.load_state_dict({key: value for key, value in state.items() if key != "step"})
    with pytest.raises(ValueError, match=r"actor\.head\.last\.bias must be \[2\]"):
        agent.load_state_dict(state | {"actor.head.last.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="generator does not fit cpu"):
        agent.load_state_dict(state | {"generator": torch.zeros_like(state["generator"]), "step": torch.tensor(5)})
    assert all(torch.equal(value, before[key]) for key, value in agent.state_dict().items())


# Configuration and errors -------------------------------------------------------------------------------------------


def test_presets():
    published = ForwardBackwardConfig(**PRESETS["pointmass-maze"])
    assert (published.z_dim, published.discount, published.batch_size) == (100, 0.99, 1024)
    assert (published.lr_f, published.lr_b, published.lr_actor) == (1e-4, 1e-6, 1e-6)
    assert (published.goal_prob, published.ortho_coef, published.tau) == (0.5, 1.0, 0.01)
    assert (published.policy_noise, published.noise_clip) == (0.2, 0.3)
    agent = ForwardBackwardAgent(ForwardBackwardConfig(**PRESETS["pointmass-maze-cpu"]), 4, 2)
    rows = {key: torch.rand(256, width) for key, width in (("observations", 4), ("actions", 2))}
    assert torch.isfinite(agent.update(rows | {"next_observations": rows["observations"]})["fb/loss"])
    assert preset_for("pointmass-maze") == "pointmass-maze-cpu"
    assert preset_for("pointmaze-arena") == "pointmaze-cpu"
    assert all(ForwardBackwardConfig(**changes) for changes in PRESETS.values())
    assert preset_for("linear-gaussian") is None


@pytest.mark.parametrize(
    "changed, kind, message",
    [
        (dict(z_dim=1), ValueError, "z_dim must be at least 2, got 1"),
        (dict(batch_size=1), ValueError, "batch_size must be at least 2, got 1"),
        (dict(discount=1.0), ValueError, r"discount must be in \[0, 1\), got 1.0"),
        (dict(goal_prob=1.5), ValueError, r"goal_prob must be in \[0, 1\], got 1.5"),
        (dict(lr_b="fast"), TypeError, "lr_b must be a number, got 'fast'"),
        (dict(q_agg="max"), ValueError, "q_agg must be one of"),
        (dict(backward_hidden_dims=()), ValueError, "backward_hidden_dims must name at least one width"),
    ],
)
def test_configuration_errors(changed, kind, message):
    with pytest.raises(kind, match=f"ForwardBackwardConfig: {message}"):
        ForwardBackwardConfig(**changed)


def test_errors():
    agent = ForwardBackwardAgent(TINY, 3, 2)
    good, w = batch(6), agent.sample_embeddings(6)
    with pytest.raises(TypeError, match="config must be a ForwardBackwardConfig, got dict"):
        ForwardBackwardAgent({}, 3, 2)
    with pytest.raises(ValueError, match=r"observation_statistics mean must be \[3\], got \[2\]"):
        ForwardBackwardAgent(TINY, 3, 2, observation_statistics=(torch.zeros(2), torch.ones(3)))
    with pytest.raises(ValueError, match="every std positive"):
        ForwardBackwardAgent(TINY, 3, 2, observation_statistics=(torch.zeros(3), torch.zeros(3)))
    with pytest.raises(ValueError, match=r"batch must have .*; next_observations missing"):
        agent.update({key: good[key] for key in ("observations", "actions")})
    with pytest.raises(ValueError, match=r"actions must be \[6, 2\], got \[6, 3\]"):
        agent.update(good | {"actions": torch.zeros(6, 3)})
    with pytest.raises(TypeError, match=r"next_observations must be torch\.float32, got torch\.float64"):
        agent.update(good | {"next_observations": torch.zeros(6, 3, dtype=torch.float64)})
    with pytest.raises(ValueError, match="at least two rows, got 1"):
        agent.update({key: value[:1] for key, value in good.items()})
    with pytest.raises(ValueError, match=r"w must be \[6, 4\], got \[5, 4\]"):
        agent.act(good["observations"], w[:5])
    with pytest.raises(ValueError, match=r"w must be \[4\], got \[3\]"):
        agent.act(good["observations"], w[0, :3])
    with pytest.raises(ValueError, match="rewards must be finite and not all 0"):
        agent.task_embedding(good["observations"], torch.zeros(6))
    with pytest.raises(ValueError, match=r"rewards must be \[6\], got \[5\]"):
        agent.task_embedding(good["observations"], torch.zeros(5))
    with pytest.raises(ValueError, match="num must be at least 0, got -1"):
        agent.sample_embeddings(-1)
    with pytest.raises(ValueError, match="observations must have at least one row"):
        agent.sample_embeddings(2, observations=good["observations"][:0])
    assert agent.step == 0
