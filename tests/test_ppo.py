"""PPO: the Gaussian against torch.distributions, and its objective against a plain statement. What all on-policy agents
share is in test_fpo.py."""

from __future__ import annotations

import math

import pytest
import torch
from test_fpo import generator, make, prepared, rollout, update_and_see

from fastflow.agents.ppo import GaussianPolicy


def policy(dtype=torch.float64, **settings) -> GaussianPolicy:
    made = GaussianPolicy(3, 2, hidden=(16, 16), activation="tanh", dtype=dtype, **settings)
    made.reset_parameters(generator())
    return made


def distribution(made, obs) -> torch.distributions.Distribution:
    """Of actions, by torch; the network by plain products."""
    x, layers = obs, made.network.layers
    for i, layer in enumerate(layers):
        x = x @ layer.weight + layer.bias
        x = x if i == len(layers) - 1 else x.tanh()
    return torch.distributions.Independent(torch.distributions.Normal(x, made.log_std.exp().expand_as(x)), 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_density_and_entropy_are_torchs(dtype, tolerance):
    made = policy(dtype, init_std=0.7, head_scale=1.0)
    with torch.no_grad():
        made.log_std += torch.tensor([0.3, -0.5], dtype=dtype)
    obs, actions = (torch.randn(9, width, generator=generator(1), dtype=dtype) for width in (3, 2))
    expected = distribution(made, obs)
    found, density = made.log_prob(obs, actions), expected.log_prob(actions)
    torch.testing.assert_close(found, density, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(made.entropy(), expected.entropy()[0], rtol=tolerance, atol=tolerance)
    parameters = list(made.parameters())
    for mine, theirs in zip(
        torch.autograd.grad(found.sum(), parameters), torch.autograd.grad(density.sum(), parameters)
    ):
        torch.testing.assert_close(mine, theirs, rtol=100 * tolerance, atol=100 * tolerance)


def test_initial_standard_deviation_and_mean():
    made = policy(init_std=0.25)
    assert made.log_std.exp().tolist() == pytest.approx([0.25] * 2)
    obs = torch.randn(50, 3, dtype=torch.float64)
    assert float(made(obs).detach().abs().max()) < 0.05
    torch.testing.assert_close(made(obs), 0.01 * policy(head_scale=1.0)(obs))


def test_exploration_is_gaussian():
    agent = make("ppo", init_std=0.5, head_scale=1.0)
    obs = torch.randn(1, 3, generator=generator())
    actions, extras = agent.explore(obs.expand(20_000, 3), generator(1))
    assert extras == {}
    with torch.no_grad():
        mean = agent.networks.actor(obs)[0]
    assert actions.mean(0).tolist() == pytest.approx(mean.tolist(), abs=0.02)
    assert actions.std(0).tolist() == pytest.approx([0.5, 0.5], rel=0.03)


@pytest.mark.parametrize("squash", ["tanh", "clip"])
def test_deterministic_acts_give_the_mean(squash):
    agent = make("ppo", head_scale=1.0, squash=squash)
    obs = torch.randn(6, 3, generator=generator())
    with torch.no_grad():
        mean = agent.networks.actor(agent._normalize(obs))
    expected = mean.tanh() if squash == "tanh" else mean.clamp(-1, 1)
    torch.testing.assert_close(agent.act(obs, deterministic=True), expected)
    assert not torch.equal(agent.act(obs), expected)


def test_fixed_variance_is_not_trained():
    for variance in ("fixed", "learned"):
        agent = make("ppo", variance=variance, lr=1e-2, entropy_coef=0.1, weight_decay=0.1)
        before = [p.detach().clone() for p in agent.networks.actor.parameters()]
        for seed in range(2):
            agent.update(rollout(agent, seed=seed))
        moved = [not torch.equal(p, q) for p, q in zip(agent.networks.actor.parameters(), before)]
        names = [name for name, _ in agent.networks.actor.named_parameters()]
        assert {name for name, yes in zip(names, moved) if not yes} == ({"log_std"} if variance == "fixed" else set())


@pytest.mark.parametrize("negative", ["clip", "aspo"])
def test_objective_and_its_gradient_are_ppos(negative):
    settings = dict(negative=negative, entropy_coef=0.1, max_grad_norm=0.0, init_std=0.5, head_scale=1.0)
    agent = make("ppo", dtype=torch.float64, **settings)
    rows = prepared(agent, rollout(agent, 11))
    rows["old"] = rows["old"] + 0.5 * torch.randn(22, generator=generator(7), dtype=torch.float64)
    actor = agent.networks.actor
    x, layers = rows["obs"], actor.network.layers
    for i, layer in enumerate(layers):
        x = x @ layer.weight + layer.bias
        x = x if i == len(layers) - 1 else torch.nn.functional.silu(x)
    normal = torch.distributions.Normal(x, actor.log_std.exp().expand_as(x))
    density, gains = normal.log_prob(rows["actions"]).sum(-1), []
    for rho, a in zip((density - rows["old"]).exp(), rows["advantages"].tolist(), strict=True):
        if a >= 0:
            gains.append(a * rho.clamp(max=1.2))
        else:
            gains.append(a * rho.clamp(min=0.8) if negative == "clip" else rho * a + a / 0.4 * (rho - 1) ** 2)
    expected = -torch.stack(gains).mean() - 0.1 * normal.entropy().sum(-1).mean()
    grads = torch.autograd.grad(expected, list(actor.parameters()))
    metrics = agent.gradient_step(rows)
    assert 0.1 < float(metrics["actor/clip_fraction"]) < 0.95
    assert float(metrics["actor/actor_loss"]) == pytest.approx(float(expected.detach()), rel=1e-9)
    assert float(metrics["actor/entropy"]) == pytest.approx(1 + math.log(2 * math.pi * 0.25), rel=1e-6)
    for parameter, grad in zip(actor.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("rows", [1, 3, 127])
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_first_ratios_are_exactly_one(backend, rows, activation):
    agent = make(
        "ppo", num_envs=1, num_minibatches=min(rows, 4), num_epochs=1, backend=backend, activation=activation, lr=1e-2
    )
    for seed in range(2):
        _, seen = update_and_see(agent, rollout(agent, rows, seed))
        if backend == "auto":
            assert torch.equal(seen[0][1], torch.zeros_like(seen[0][1]))
        else:
            # PyTorch's own products round a row by its place in the batch.
            assert float(seen[0][1].abs().max()) < 1e-5
        assert rows < 3 or any(bool((log_ratio != 0).any()) for _, log_ratio in seen[1:])


def test_a_rows_density_does_not_depend_on_the_other_rows():
    agent = make("ppo", num_envs=1, head_scale=1.0)
    rows = prepared(agent, rollout(agent, 127))
    order = torch.randperm(127, generator=generator())
    for index in (order, order[:63], order[:1]):
        assert torch.equal(agent._log_prob(rows["obs"][index], rows["actions"][index]).detach(), rows["old"][index])
