"""DPPO: the chain of an action, and ratios of its steps against Gaussian densities. What all on-policy agents share is
in test_fpo.py."""

from __future__ import annotations

import pytest
import torch
from test_fpo import generator, make, prepared, rollout, update_and_see


def velocity(agent, x, k, obs):
    t = torch.full(x.shape[:-1], k / agent.config.num_steps, dtype=x.dtype)
    with torch.no_grad():
        return agent.networks.actor.field(x, t, obs)


def log_densities(agent, chain, obs) -> torch.Tensor:
    """log N(x_{k+1}; x_k + v / K, sigma^2) of every step, [R, K]."""
    steps, sigma = agent.config.num_steps, torch.tensor(agent.config.sigma, dtype=chain.dtype)
    found = []
    for k in range(steps):
        mean = chain[:, k] + velocity(agent, chain[:, k], k, obs) / steps
        found.append(torch.distributions.Normal(mean, sigma).log_prob(chain[:, k + 1]).sum(-1))
    return torch.stack(found, 1)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_exploration_is_a_noisy_walk(backend):
    agent = make("dppo", num_steps=5, sigma=0.3, backend=backend)
    observations = torch.randn(7, 3, generator=generator())
    actions, extras = agent.explore(observations, generator(1))
    chain = extras["chain"]
    assert chain.shape == (7, 6, 2)
    assert torch.equal(actions, chain[:, -1])
    noise = torch.randn(6, 7, 2, generator=generator(1))
    assert torch.equal(chain[:, 0], noise[0])
    for k in range(5):
        expected = chain[:, k] + velocity(agent, chain[:, k], k, observations) / 5 + 0.3 * noise[k + 1]
        torch.testing.assert_close(chain[:, k + 1], expected, rtol=1e-5, atol=1e-6)


def test_noise_of_the_steps_has_its_standard_deviation():
    agent = make("dppo", num_steps=4, sigma=0.2)
    observations = torch.randn(3000, 3, generator=generator())
    chain = agent.explore(observations, generator(1))[1]["chain"]
    for k in range(4):
        noise = chain[:, k + 1] - chain[:, k] - velocity(agent, chain[:, k], k, observations) / 4
        assert float(noise.std()) == pytest.approx(0.2, rel=0.05)
        assert float(noise.mean().abs()) < 0.02


@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float64), ("auto", torch.float32)])
@pytest.mark.parametrize("last_steps", [0, 1, 3])
def test_ratios_are_those_of_gaussian_densities(backend, dtype, last_steps):
    settings = dict(num_steps=4, sigma=0.2, last_steps=last_steps, backend=backend, dtype=dtype)
    agent, old = (make("dppo", **settings) for _ in range(2))
    batch = rollout(agent)
    rows = prepared(agent, batch)
    with torch.no_grad():
        for parameter in agent.networks.actor.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator(3), dtype=dtype))
    chain = batch["chain"].flatten(0, 1)
    expected = (log_densities(agent, chain, rows["obs"]) - log_densities(old, chain, rows["obs"]))[:, -last_steps:]
    found = agent._actor_loss(rows, rows["advantages"]).log_ratio
    assert found.shape == (16, last_steps or 4)
    assert float(expected.abs().max()) > 0.1
    tolerance = dict(rtol=1e-9, atol=1e-10) if dtype == torch.float64 else dict(rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found, expected, **tolerance)


def test_gradient_at_the_old_parameters_is_the_policy_gradient():
    """Minus the mean over steps of the advantage times the gradient of the log-density."""
    agent = make("dppo", dtype=torch.float64, num_steps=3, sigma=0.3, max_grad_norm=0.0)
    batch = rollout(agent)
    rows = prepared(agent, batch)
    chain, field, expected = batch["chain"].flatten(0, 1), agent.networks.actor.field, 0.0
    for k in range(3):
        t = torch.full((16,), k / 3, dtype=torch.float64)
        mean = chain[:, k] + field(chain[:, k], t, rows["obs"]) / 3
        density = torch.distributions.Normal(mean, 0.3).log_prob(chain[:, k + 1]).sum(-1)
        expected = expected - (rows["advantages"] * density).sum() / (3 * 16)
    grads = torch.autograd.grad(expected, list(agent.networks.actor.parameters()))
    agent.gradient_step(rows)
    for parameter, grad in zip(agent.networks.actor.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("rows", [1, 3, 127])
@pytest.mark.parametrize("settings", [{}, {"last_steps": 2}, {"activation": "elu", "time_embed_dim": 0, "sigma": 0.01}])
def test_first_ratios_are_exactly_one(rows, settings):
    agent = make("dppo", num_envs=1, num_minibatches=min(rows, 4), num_epochs=1, **settings)
    for seed in range(2):
        _, seen = update_and_see(agent, rollout(agent, rows, seed))
        assert torch.equal(seen[0][1], torch.zeros_like(seen[0][1]))
        assert rows < 3 or any(bool((log_ratio != 0).any()) for _, log_ratio in seen[1:])


def test_a_rows_losses_do_not_depend_on_the_other_rows():
    agent = make("dppo", num_envs=1)
    rows = prepared(agent, rollout(agent, 127))
    order = torch.randperm(127, generator=generator())
    for index in (order, order[:63], order[:1]):
        assert torch.equal(agent._step_losses({k: v[index] for k, v in rows.items()}), rows["old"][index])


def test_first_ratios_of_the_reference():
    # PyTorch's own products and functions round a row by its place in the batch.
    agent = make("dppo", num_envs=1, num_epochs=1, backend="reference")
    for seed in range(2):
        _, seen = update_and_see(agent, rollout(agent, 127, seed))
        assert float(seen[0][1].abs().max()) <= 1e-6 * (1 + float(seen[0][0]["old"].max()))


def test_evaluation_walks_without_the_steps_noise():
    observations = torch.randn(5, 3, generator=generator())
    quiet, noisy = (make("dppo", sigma=sigma) for sigma in (0.01, 1.0))
    assert torch.equal(quiet.act(observations, generator(1)), noisy.act(observations, generator(1)))


def test_a_chain_that_does_not_fit_is_named():
    agent = make("dppo", num_steps=4)
    batch = rollout(agent)
    with pytest.raises(ValueError, match="rollout must have chain, from explore; it is missing"):
        agent.update({name: value for name, value in batch.items() if name != "chain"})
    with pytest.raises(ValueError, match=r"DppoAgent: chain must be \[\d+, \d+, 5, 2\]"):
        agent.update({**batch, "chain": batch["chain"][:, :, :3]})
    with pytest.raises(TypeError, match=r"DppoAgent: chain must be torch\.float32"):
        agent.update({**batch, "chain": batch["chain"].double()})
