"""floq against a statement of its update that shares no code with it (`floq_statement`), and everything around it."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import floq_statement
import numpy as np
import pytest
import torch
from floq_statement import Statement
from torch.utils._python_dispatch import TorchDispatchMode

import fastflow as ff
from fastflow import agents
from fastflow.agents.floq import PRESETS, FloqAgent, FloqConfig, FloqNoise, preset_for, reward_range

O, A, B = 3, 2, 5
SMALL = {"block_width": 8, "block_depth": 2, "value_hidden_dims": (7, 6), "actor_hidden_dims": (6, 5), "batch_size": B}


# Fixtures -----------------------------------------------------------------------------------------------------------


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
        "next_actions": 2 * uniform(rows, A) - 1,
        "returns": -100 * uniform(rows),
    }


def make_agent(dtype=torch.float32, seed=3, statistics=None, reward_limits=(-2.0, 0.0), **settings):
    return FloqAgent(
        FloqConfig(**{**SMALL, **settings}),
        O,
        A,
        reward_limits,
        seed=seed,
        observation_statistics=statistics,
        dtype=dtype,
    )


def disturb(agent, seed=1):
    """Weights in general position: fresh biases and LayerNorm scales are zeros and ones, and the target is a copy."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in agent.networks.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=g, dtype=parameter.dtype)


def arrays(agent):
    return {name: parameter.detach().numpy().copy() for name, parameter in agent.networks.named_parameters()}


def as_numpy(tensors):
    return {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}


def equal_states(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


# The update ---------------------------------------------------------------------------------------------------------

# Small enough for the derivative by every weight.
TINY = {
    "block_width": 5,
    "block_depth": 2,
    "value_hidden_dims": (4, 3),
    "actor_hidden_dims": (4, 3),
    "num_bins": 6,
    "sigma": 2.0,
    "lr": 1e-2,
    "tau": 0.1,
    "noise_samples": 2,
    "critic_flow_steps": 3,
    "flow_steps": 4,
}
VARIANTS = {
    "published": {
        "num_bins": 51,
        "sigma": 16.0,
        "noise_samples": 8,
        "critic_flow_steps": 8,
        "flow_steps": 10,
        "tau": 0.005,
        "lr": 3e-4,
    },
    "min": {"q_agg": "min", "discount": 0.9, "flow_num_ensembles": 3},
    "four_layers": {"block_depth": 4, "noise_samples": 3},
    "one_layer_scalar": {"block_depth": 1, "use_prob_embed": False, "noise_samples": 1},
    "fourier": {"time_embedding": "fourier", "time_embed_dim": 4},
    "raw_time_no_norm": {"time_embedding": "raw", "layer_norm": False},
    "at_zero": {"train_at_zero_only": True, "critic_flow_steps": 1},
    "normalized_actor_norm": {"normalize_q_loss": True, "actor_layer_norm": True, "noise_coverage": 0.25},
    "more_members": {"flow_num_ensembles": 3, "num_ensembles": 1, "noise_samples": 4},
    "fewer_members": {"flow_num_ensembles": 1, "num_ensembles": 3},
    "residual": {"use_resnets": True, "num_transformations": 2, "block_depth": 2},
    "residual_norm_first": {
        "use_resnets": True,
        "num_transformations": 3,
        "block_depth": 1,
        "activate_before_layernorm": False,
        "q_agg": "min",
    },
    "endpoint": {"prediction": "endpoint"},
    "distributional": {"backup": "distributional", "q_agg": "min", "noise_samples": 3},
    "sarsa_noise": {"critic_target": "data", "target_noise": 2.0},
    "distributional_noise": {"backup": "distributional", "target_noise": 2.0},
    "monte_carlo": {"critic_target": "returns"},
    "candidates": {"num_candidates": 3, "q_agg": "min", "num_ensembles": 3},
    # The range is [-2.2, 0] then, and some values are outside.
    "clipped_candidates": {"num_candidates": 2, "clip_values": True, "discount": 0.1, "noise_samples": 1},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_two_updates(name):
    """Metrics, all gradients, Adam's moments, weights and the target's lag."""
    settings = {**TINY, **VARIANTS[name]}
    agents_ = [make_agent(torch.float64, backend=backend, **settings) for backend in (None, "reference")]
    for agent in agents_:
        disturb(agent)
    agent, config = agents_[0], agents_[0].config
    batch = random_batch(torch.float64)
    given = as_numpy(batch)
    weights, moments = arrays(agent), {}
    for step in (1, 2):
        noise = upcoming_noise(agent, batch)
        statement = Statement(config, -2.0, -0.5, given, as_numpy(dataclasses.asdict(noise)))
        metrics, gradients = statement.metrics(weights), statement.gradients(weights)
        for other in agents_:
            critic_loss, actor_loss, found = other.losses(batch, noise)
            assert found.keys() == metrics.keys() | {"critic/outside_range"}
            for term, value in metrics.items():
                assert found[term].shape == () and not found[term].requires_grad
                np.testing.assert_allclose(found[term].item(), value, rtol=1e-9, atol=1e-12, err_msg=term)
            parameters = dict(other.networks.named_parameters())
            own = torch.autograd.grad(critic_loss + actor_loss, [parameters[n] for n in gradients])
            for (parameter, expected), gradient in zip(gradients.items(), own, strict=True):
                np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-7, atol=1e-10, err_msg=parameter)
        weights, moments = floq_statement.update(weights, moments, step, gradients, config.lr, config.tau)
        for other in agents_:
            other.update(batch)
            state = other.state_dict()
            for parameter, expected in weights.items():
                # Adam divides small gradients by themselves, rounding included.
                np.testing.assert_allclose(state[parameter].numpy(), expected, rtol=1e-6, atol=1e-8, err_msg=parameter)
            for parameter, pair in moments.items():
                for key, expected in zip(("exp_avg", "exp_avg_sq"), pair, strict=True):
                    moment = state[f"adam/{key}/{parameter}"].numpy()
                    np.testing.assert_allclose(moment, expected, rtol=1e-6, atol=1e-10, err_msg=parameter)


def upcoming_noise(agent, batch):
    """The noise of the agent's next update."""
    state = agent.generator.get_state()
    noise = agent.sample_noise(batch)
    agent.generator.set_state(state)
    return noise


def test_as_many_rows_as_members_and_samples():
    """Nothing but their place tells the axes apart."""
    for settings in ({}, {"backup": "distributional"}):
        agent = make_agent(torch.float64, noise_samples=2, **settings)
        batch = random_batch(torch.float64, rows=2)
        noise = agent.sample_noise(batch)
        metrics = agent.losses(batch, noise)[2]
        statement = Statement(agent.config, -2.0, 0.0, as_numpy(batch), as_numpy(dataclasses.asdict(noise)))
        for name, value in statement.metrics(arrays(agent)).items():
            np.testing.assert_allclose(metrics[name].item(), value, rtol=1e-10, atol=1e-12, err_msg=name)


def test_endpoint_walks_end_at_the_last_prediction():
    agent = make_agent(torch.float64, prediction="endpoint", critic_flow_steps=4)
    disturb(agent)
    batch, u = random_batch(torch.float64), torch.rand(B, 3, dtype=torch.float64)
    path = agent.flow_paths(batch["observations"], batch["actions"], u)
    field = agent.networks.floq.field
    cond = torch.cat((batch["observations"], batch["actions"]), -1).unsqueeze(1)
    before, t = path[..., -2:-1], torch.tensor(0.75, dtype=torch.float64)
    velocity = field(before, t, cond)
    torch.testing.assert_close(path[..., -1:], before + velocity / 4)
    prediction = before + velocity * (1 - 0.75)
    torch.testing.assert_close(path[..., -1:], prediction)


def test_distributional_backups_keep_what_expected_ones_average():
    """With one target for all samples the two are the same; else the mean target is, and the spread is learnt."""
    both = [make_agent(torch.float64, noise_samples=3, backup=backup) for backup in ("expected", "distributional")]
    batch = random_batch(torch.float64)
    noise = both[0].sample_noise(batch)
    expected, distributional = (agent.losses(batch, noise)[2] for agent in both)
    torch.testing.assert_close(expected["critic/target_mean"], distributional["critic/target_mean"])
    assert not torch.equal(expected["critic/floq_loss"], distributional["critic/floq_loss"])
    batch["masks"].zero_()
    expected, distributional = (agent.losses(batch, noise)[2] for agent in both)
    torch.testing.assert_close(expected["critic/floq_loss"], distributional["critic/floq_loss"])


def test_frozen_features_and_a_new_head():
    settings = {**TINY, "freeze_features_at": 2}
    agent, free = make_agent(**settings), make_agent(**{**settings, "freeze_features_at": 0})
    batch = random_batch()
    for _ in range(2):
        agent.update(batch)
        free.update(batch)
    assert all(torch.equal(value, free.state_dict()[name]) for name, value in agent.state_dict().items())
    before = agent.state_dict()
    agent.update(batch)
    resumed = make_agent(**settings)
    resumed.load_state_dict(agent.state_dict())
    after = agent.state_dict()
    head = ("floq.field.layers.2.weight", "floq.field.layers.2.bias")
    for name in (n for n in before if n.startswith("floq.")):
        assert torch.equal(before[name], after[name]) == (name not in head), name
    # Drawn anew with its target, then one update of Adam's first size.
    old, new, target = (x[head[0]] for x in (before, after, {head[0]: after[f"target_{head[0]}"]}))
    assert (new - old).abs().max() > 5 * settings["lr"]
    torch.testing.assert_close((new - target).abs(), torch.full_like(new, settings["lr"]), rtol=1e-2, atol=0)
    assert not torch.equal(before["critic.network.layers.0.weight"], after["critic.network.layers.0.weight"])
    for _ in range(3):
        ours, theirs = agent.update(batch), resumed.update(batch)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert equal_states(agent.state_dict(), resumed.state_dict())
    assert torch.equal(agent.state_dict()["floq.field.layers.0.weight"], before["floq.field.layers.0.weight"])
    # Back to before: everything learns again.
    agent.load_state_dict({**before, "step": torch.tensor(0)})
    agent.update(batch)
    assert not torch.equal(agent.state_dict()["floq.field.layers.0.weight"], before["floq.field.layers.0.weight"])


def test_statistics_of_walks():
    agent = make_agent(torch.float64, critic_flow_steps=4, noise_samples=3)
    disturb(agent)
    batch, u = random_batch(torch.float64), torch.rand(B, 3, dtype=torch.float64)
    path = agent.flow_paths(batch["observations"], batch["actions"], u).numpy()
    found = {
        name: float(value) for name, value in agent.flow_statistics(batch["observations"], batch["actions"], u).items()
    }
    steps = np.diff(path)
    whole = path[..., -1] - path[..., 0]
    low, high = agent.networks.floq.value_range
    expected = {f"flow/displacement.{k}": np.abs(steps[..., k]).mean() for k in range(4)} | {
        "flow/curvature": ((4 * steps - whole[..., None]) ** 2).mean() / (whole**2).mean(),
        "flow/variance": path[..., -1].var(2).mean(),
        "flow/outside_range": ((path < low) | (path > high)).mean(),
    }
    norm = found.pop("flow/feature_norm")
    assert found == pytest.approx(expected)
    # The head is linear in the features: with every weight 1, it adds them up.
    field = agent.networks.floq.field
    cond = torch.cat((batch["observations"], batch["actions"]), -1).unsqueeze(1)
    z_0 = torch.from_numpy(path[..., :1].copy())
    rows = []
    with torch.no_grad():
        field.layers[-1].bias.zero_()
        for i in range(8):
            field.layers[-1].weight.zero_()[:, i] = 1
            rows.append(field(z_0, torch.zeros(()), cond))
    assert norm == pytest.approx(torch.cat(rows, -1).norm(dim=-1).mean().item())


def test_values_outside_their_range_are_counted_and_said():
    agent = make_agent(noise_samples=2)
    batch = random_batch()
    metrics = {name: value.item() for name, value in agent.update(batch).items()}
    assert metrics["critic/outside_range"] == 0 and agent.advise(metrics) is None
    with torch.no_grad():
        agent.networks.floq.field.layers[-1].bias[0] = 500.0
    metrics = {name: value.item() for name, value in agent.update(batch).items()}
    share = metrics["critic/outside_range"]
    assert 0.25 <= share < 0.4  # one of two members, of one of two fields, and what strays
    advice = agent.advise(metrics)
    assert advice.startswith(
        f"{share:.1%} of the flow critic's values lie outside [-201, 1], all that rewards in [-2, 0]"
    )
    # Far outside, where the published features are 0 / 0, they are clamped.
    with torch.no_grad():
        agent.networks.floq.field.layers[-1].bias[0] = -1e6
    assert all(value.isfinite() for value in agent.update(batch).values())


def test_each_network_gets_its_gradient_from_one_loss():
    agent = make_agent(noise_samples=2)
    batch = random_batch()
    critic_loss, actor_loss, _ = agent.losses(batch, agent.sample_noise(batch))
    reached = {}
    for loss in (critic_loss, actor_loss):
        for parameter in agent.networks.parameters():
            parameter.grad = None
        loss.backward()
        for name, network in agent.networks.named_children():
            grads = [p.grad is not None for p in network.parameters()]
            assert all(grads) or not any(grads)
            reached.setdefault(name, []).append(all(grads))
    assert reached == {
        "floq": [True, False],
        "target_floq": [False, False],
        "critic": [True, False],
        "actor_bc_flow": [False, True],
        "actor_onestep_flow": [False, True],
    }


def test_the_target_lags_one_step():
    agent = make_agent(torch.float64, tau=0.1, lr=1e-2, noise_samples=2)
    batch = random_batch(torch.float64)
    theta = [arrays(agent)]
    for _ in range(2):
        agent.update(batch)
        theta.append(arrays(agent))
    for name in (n for n in theta[0] if n.startswith("floq.")):
        first, second, third = (weights[f"target_{name}"] for weights in theta)
        assert np.array_equal(first, theta[0][name]) and np.array_equal(second, first)
        np.testing.assert_allclose(third, 0.1 * theta[1][name] + 0.9 * theta[0][name], rtol=1e-12, atol=1e-15)
    # No history hangs on the target: it would grow with every update.
    assert not any(p.requires_grad or p.grad_fn for p in agent.networks.target_floq.parameters())


def test_noise():
    agent = make_agent(noise_samples=4)
    noise = agent.sample_noise(random_batch(rows=2000))
    assert noise.target is None
    shapes = {f.name: list(getattr(noise, f.name).shape) for f in dataclasses.fields(FloqNoise) if f.name != "target"}
    assert shapes == {
        "next_action": [2000, 4, A],
        "target_start": [2000, 4],
        "start": [2000, 4],
        "time": [2000, 4],
        "bc_noise": [2000, A],
        "bc_time": [2000],
        "action": [2000, A],
    }
    for name in ("next_action", "bc_noise", "action"):
        x = getattr(noise, name)
        assert abs(x.mean()) < 0.08 and abs(x.std() - 1) < 0.05
    for name in ("target_start", "start", "time", "bc_time"):
        x = getattr(noise, name)
        assert x.min() >= 0 and x.max() < 1 and abs(x.mean() - 0.5) < 0.03
    assert not torch.equal(noise.target_start, noise.start)
    choosing = make_agent(noise_samples=4, num_candidates=3).sample_noise(random_batch(rows=20))
    assert choosing.next_action.shape == (20, 4, 3, A) and choosing.action.shape == (20, A)
    noisy = make_agent(noise_samples=4, target_noise=1.0).sample_noise(random_batch(rows=2000))
    assert torch.equal(noisy.start, noise.start) and abs(noisy.target.std() - 1) < 0.05


def test_observation_statistics():
    mean, std = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 0.5, 3.0])
    plain, scaled = make_agent(), make_agent(statistics=(mean, std))
    batch = random_batch()
    moved = dict(batch)
    for key in ("observations", "next_observations"):
        moved[key] = batch[key] * std + mean
    noise = plain.sample_noise(batch)
    for a, b in zip(plain.losses(batch, noise)[:2], scaled.losses(moved, noise)[:2], strict=True):
        torch.testing.assert_close(a, b)

    def generator():
        return torch.Generator().manual_seed(0)

    torch.testing.assert_close(
        plain.act(batch["observations"], generator()), scaled.act(moved["observations"], generator())
    )
    u = torch.rand(B, 2)
    paths = [agent.flow_paths(x["observations"], x["actions"], u) for agent, x in ((plain, batch), (scaled, moved))]
    torch.testing.assert_close(*paths)


class NoSync(TorchDispatchMode):
    """Refuses what makes the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if any(word in name for word in ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal.default")):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def test_update_never_waits_for_the_device():
    with pytest.raises(AssertionError, match="waits"), NoSync():
        float(torch.ones(()) + 1)
    for settings in ({}, {"q_agg": "min", "normalize_q_loss": True, "lr_decay_steps": 10}):
        agent = make_agent(backend="reference", **settings)
        batch = random_batch()
        with NoSync():
            agent.update(batch)
            agent.update(batch)


# Using the agent ----------------------------------------------------------------------------------------------------


def test_act():
    agent = make_agent()
    disturb(agent)
    obs = 10 * torch.randn(200, O)
    actions = agent.act(obs, torch.Generator().manual_seed(1))
    assert actions.shape == (200, A) and not actions.requires_grad
    assert actions.abs().max() == 1.0  # such observations saturate some
    assert torch.equal(actions, agent.act(obs, torch.Generator().manual_seed(1)))
    assert not torch.equal(actions, agent.act(obs))
    assert agent.act(obs[:0]).shape == (0, A)


@pytest.mark.parametrize("clip_values", [False, True])
def test_act_on_the_best_of_candidates(clip_values):
    mean, std = (x.double() for x in STATISTICS)
    agent = make_agent(torch.float64, statistics=(mean, std), num_candidates=4, clip_values=clip_values)
    disturb(agent)
    with torch.no_grad():
        agent.networks.critic.network.layers[-1].bias += 0.8  # some values are above 0, and some are not
    obs = torch.randn(50, O, dtype=torch.float64)
    actions = agent.act(obs, torch.Generator().manual_seed(1))
    assert actions.shape == (50, A) and not actions.requires_grad
    assert torch.equal(actions, agent.act(obs, torch.Generator().manual_seed(1)))
    assert agent.act(obs[:0]).shape == (0, A)
    with pytest.raises(ValueError, match=r"observations must be \[N, 3\]"):
        agent.act(obs[:, :2])
    noise = torch.randn(50, 4, A, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    networks, scaled = agent.networks, (obs - mean) / std
    alike = 0
    for row, z, action in zip(scaled, noise, actions, strict=True):
        candidates = networks.actor_onestep_flow(row.expand(4, O), z)
        values = networks.critic(row.expand(4, O), candidates).mean(0).squeeze(-1)
        found = int((candidates - action).abs().sum(-1).argmin())
        torch.testing.assert_close(candidates[found], action)
        if clip_values:
            values = values.clamp(-200.0, 0.0)
            alike += int((values == 0).sum() > 1)
        torch.testing.assert_close(values[found], values.max())
    assert (0 < alike < 50) == clip_values


def test_next_values_are_clipped_to_what_rewards_can_add_up_to():
    agents_ = [make_agent(torch.float64, clip_values=clipped) for clipped in (False, True)]
    batch = random_batch(torch.float64)
    for bias, bound in ((500.0, 0.0), (-500.0, -200.0)):
        for agent in agents_:
            with torch.no_grad():
                agent.networks.target_floq.field.layers[-1].bias.fill_(bias)
        noise = agents_[0].sample_noise(batch)
        free, clipped = (agent.losses(batch, noise)[2] for agent in agents_)
        expected = (batch["rewards"] + 0.99 * batch["masks"] * bound).mean()
        torch.testing.assert_close(clipped["critic/target_mean"], expected)
        assert (free["critic/target_mean"] - expected).abs() > 10
        # Walks are counted as they are.
        assert torch.equal(free["critic/outside_range"], clipped["critic/outside_range"])


def test_flow_paths():
    agent = make_agent(critic_flow_steps=5)
    disturb(agent)
    batch, u = random_batch(), torch.rand(B, 4)
    paths = agent.flow_paths(batch["observations"], batch["actions"], u)
    assert paths.shape == (2, B, 4, 6) and not paths.requires_grad
    floq = agent.networks.floq
    torch.testing.assert_close(paths[..., 0], floq.start(u).expand(2, B, 4))
    cond = torch.cat((batch["observations"], batch["actions"]), -1)
    start = floq.start(u).unsqueeze(-1).expand(2, B, 4, 1)
    torch.testing.assert_close(paths[..., -1:], ff.integrate(floq.field, start, cond, num_steps=5))


def test_validate_changes_nothing():
    agent = make_agent()
    batch = random_batch()
    agent.update(batch)
    before = agent.state_dict()
    first, second = agent.validate(batch), agent.validate(batch)
    assert equal_states(before, agent.state_dict())
    updated = agent.update(batch).keys()
    walks = [f"flow/displacement.{k}" for k in range(8)]
    walks += [f"flow/{name}" for name in ("curvature", "variance", "outside_range", "feature_norm")]
    assert list(first) == [*updated, *walks]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_seed_fixes_weights_and_noise():
    state = torch.random.get_rng_state()
    a, b, other = make_agent(), make_agent(), make_agent(seed=4)
    double = make_agent(torch.float64)
    assert torch.equal(state, torch.random.get_rng_state())
    batch = random_batch()
    assert equal_states(a.state_dict(), b.state_dict())
    assert not torch.equal(a.sample_noise(batch).start, other.sample_noise(batch).start)
    for (name, x), y in zip(a.networks.named_parameters(), double.networks.parameters(), strict=True):
        assert torch.equal(x.double(), y), name
    weight = dict(other.networks.named_parameters())["floq.field.layers.1.weight"]
    assert not torch.equal(weight, dict(a.networks.named_parameters())["floq.field.layers.1.weight"])
    assert weight.abs().max() <= math.sqrt(6 / 16) and weight.std() > 0.5 * math.sqrt(6 / 16) / math.sqrt(3)


# State --------------------------------------------------------------------------------------------------------------

STATISTICS = (torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 0.5, 3.0]))


def test_state_round_trip_continues_bit_for_bit():
    settings = {"noise_samples": 2, "lr_decay_steps": 6}
    agent = make_agent(statistics=STATISTICS, **settings)
    for i in range(4):
        agent.update(random_batch(seed=i))
    state = agent.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    kept = {name: value.clone() for name, value in state.items()}

    other = make_agent(seed=99, statistics=(torch.zeros(O), torch.ones(O)), **settings)
    other.load_state_dict(state)
    assert other.step == 4 and equal_states(state, other.state_dict())
    for i in range(4, 7):
        ours, theirs = agent.update(random_batch(seed=i)), other.update(random_batch(seed=i))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert equal_states(agent.state_dict(), other.state_dict())
    assert equal_states(state, kept)  # a state is a copy
    obs = random_batch()["observations"]
    assert torch.equal(agent.act(obs), other.act(obs))


@pytest.mark.parametrize(
    "change, error",
    [
        (lambda s: s.pop("floq.field.layers.0.weight"), r"missing floq\.field\.layers\.0\.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda s: s.update({"critic.network.layers.0.bias": torch.zeros(2, 8)}), r"must be \[2, 7\]"),
        (lambda s: s.update({"critic.network.layers.0.bias": torch.zeros(2, 7).double()}), "float64"),
        (lambda s: s.update(reward_range=torch.tensor([-3.0, 0.0]).double()), "reward_range must be"),
        (lambda s: s.update(step=torch.tensor(-1)), "step must be"),
        (lambda s: s.update(generator=s["generator"] * 0 + 255), "generator does not fit"),
    ],
)
def test_load_refuses_and_leaves_the_agent_alone(change, error):
    agent = make_agent()
    before = agent.state_dict()
    state = make_agent(seed=8).state_dict()
    change(state)
    with pytest.raises(ValueError, match=error):
        agent.load_state_dict(state)
    assert equal_states(before, agent.state_dict())


def test_load_refuses_other_types():
    state = make_agent().state_dict() | {"step": 3}
    with pytest.raises(TypeError, match="step must be a Tensor, got int"):
        make_agent().load_state_dict(state)


# Sizes, ranges, presets ---------------------------------------------------------------------------------------------


def test_parameter_counts_of_cube_double():
    agent = FloqAgent(FloqConfig(), 37, 5, (-2.0, 0.0))
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in agent.networks.named_children()}
    assert counts == {
        "floq": 1_681_410,
        "target_floq": 1_681_410,
        "critic": 1_629_186,
        "actor_bc_flow": 813_061,
        "actor_onestep_flow": 812_549,
    }
    shallow = FloqAgent(FloqConfig(**PRESETS["cube-double-play"]), 37, 5, (-2.0, 0.0))
    assert sum(p.numel() for p in shallow.networks.floq.parameters()) == 626_690


def test_ranges():
    assert reward_range(torch.tensor([-1.0, -2.0])) == (-2.0, 0.0)
    assert reward_range(torch.tensor([-1.0, 3.0])) == (-1.0, 3.0)
    assert reward_range(torch.tensor([1.0, 3.0])) == (0.0, 3.0)
    with pytest.raises(ValueError, match="at least one reward"):
        reward_range(torch.zeros(0))
    with pytest.raises(ValueError, match="finite"):
        reward_range(torch.tensor([-1.0, float("nan")]))
    floq = FloqAgent(FloqConfig(**SMALL), O, A, (-2.0, -1.0)).networks.floq
    assert floq.value_range == pytest.approx((-201.0, 1.0)) and floq.noise_range == pytest.approx((-20.0, 0.0))
    assert floq.field.spec.state_embedding == ff.HLGauss(*floq.value_range, bins=51, sigma=16.0)
    settings = {**SMALL, "noise_coverage": 0.25, "discount": 0.995, "use_prob_embed": False}
    floq = FloqAgent(FloqConfig(**settings), O, A, (-1.0, 0.0)).networks.floq
    assert floq.value_range == pytest.approx((-202.0, 2.0)) and floq.noise_range == pytest.approx((-50.0, 0.0))
    assert floq.field.spec.state_embedding == ff.Scaled(*floq.value_range)


# environment, alpha, discount, batch_size, q_agg, block_depth, change for best, change online
TABLE = """
antmaze-large-navigate        10    .99   256  mean  4  -                    -
antmaze-giant-navigate        10    .995  512  min   4  critic_flow_steps=4  critic_flow_steps=4
humanoidmaze-medium-navigate  30    .995  256  mean  4  -                    -
humanoidmaze-large-navigate   20    .995  512  mean  4  -                    critic_flow_steps=16
antsoccer-arena-navigate      10    .995  256  mean  4  -                    alpha=30
cube-single-play              300   .99   256  mean  2  -                    -
cube-double-play              300   .99   256  mean  2  -                    -
scene-play                    300   .99   256  mean  4  -                    -
puzzle-3x3-play               1000  .99   256  mean  4  -                    -
puzzle-4x4-play               1000  .99   256  mean  4  noise_coverage=.25   noise_coverage=.25
"""


def test_published_presets():
    rows = [line.split() for line in TABLE.strip().splitlines()]
    names = {row[0] + suffix for row in rows for suffix in ("", "/best", "/online")}
    assert set(PRESETS) == names | {"pointmaze-arena-demo", "pointmaze-medium-navigate/cpu", "cube-single-play/cpu"}
    for name, alpha, discount, batch_size, q_agg, depth, *changes in rows:
        for suffix, change in zip(("", "/best", "/online"), ("-", *changes), strict=True):
            expected = {
                "lr": 3e-4,
                "alpha": float(alpha),
                "discount": float(discount),
                "batch_size": int(batch_size),
                "q_agg": q_agg,
                "block_depth": int(depth),
                "flow_num_ensembles": 2,
                "num_ensembles": 2,
                "noise_samples": 8,
                "critic_flow_steps": 8,
                "flow_steps": 10,
                "noise_coverage": 0.1,
                "tau": 0.005,
                "num_bins": 51,
                "sigma": 16.0,
                "reward_offset": 0.01,
                "block_width": 512,
                "value_hidden_dims": (512,) * 4,
                "actor_hidden_dims": (512,) * 4,
                "layer_norm": True,
                "actor_layer_norm": False,
                "normalize_q_loss": False,
                "train_at_zero_only": False,
                "use_prob_embed": True,
                "time_embedding": "cosine",
                "lr_decay_steps": 0,
            }
            if change != "-":
                key, value = change.split("=")
                expected[key] = type(expected[key])(float(value))
            config = FloqConfig(**PRESETS[name + suffix])
            assert {key: getattr(config, key) for key in expected} == expected, name + suffix


@pytest.mark.parametrize(
    "env, preset",
    [
        ("cube-single-play-singletask-v0", "cube-single-play"),
        ("puzzle-4x4-play-singletask-task3-v0", "puzzle-4x4-play"),
        ("humanoidmaze-large-navigate-v0", "humanoidmaze-large-navigate"),
        ("pointmaze-arena-navigate-singletask-task1-v0", "pointmaze-arena-demo"),
        ("pointmaze-medium-navigate-singletask-v0", None),
        ("cube-single-noisy-singletask-v0", None),
    ],
)
def test_preset_for(env, preset):
    assert preset_for(env) == preset


def test_agents_by_name():
    assert agents.config_class("floq") is FloqConfig
    agent = agents.make(
        "floq", FloqConfig(**SMALL), obs_dim=O, action_dim=A, reward_range=(-1.0, 0.0), device="cpu", seed=0
    )
    assert isinstance(agent, FloqAgent)
    with pytest.raises(
        ValueError, match=r"expected one of \['dppo', 'fb', 'floq', .*'td2-cfm', 'value-flows'\], got 'flow'"
    ):
        agents.config_class("flow")


def test_learning_rate():
    config = FloqConfig(**PRESETS["pointmaze-arena-demo"])
    rates = [config.learning_rate(step) for step in (0, 7500, 11250, 15000, 20000)]
    assert rates == pytest.approx([1e-3, 1e-3, 5.1e-4, 2e-5, 2e-5])
    assert FloqConfig().learning_rate(10**7) == 3e-4
    agent = make_agent(lr=1e-3, lr_decay_steps=4, lr_final=0.0)
    used = []
    for _ in range(5):
        agent.update(random_batch())
        used.append(agent.optimizer.param_groups[0]["lr"])
    assert used == pytest.approx([1e-3, 1e-3, 1e-3, 5e-4, 0.0])


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"lr": 0.0}, ValueError, "lr must be a positive number"),
        ({"lr": "3e-4"}, TypeError, "lr must be a number, got '3e-4'"),
        ({"alpha": -1.0}, ValueError, "alpha must be at least 0"),
        ({"alpha": float("nan")}, ValueError, "alpha must be"),
        ({"discount": 1.0}, ValueError, r"discount must be in \[0, 1\)"),
        ({"tau": 0.0}, ValueError, r"tau must be in \(0, 1\]"),
        ({"q_agg": "max"}, ValueError, "q_agg must be one of"),
        ({"critic_flow_steps": 0}, ValueError, "critic_flow_steps must be at least 1"),
        ({"flow_steps": 0}, ValueError, "flow_steps must be at least 1"),
        ({"noise_samples": 0}, ValueError, "noise_samples must be at least 1"),
        ({"noise_samples": 2.0}, TypeError, r"noise_samples must be an int, got 2\.0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"flow_num_ensembles": 0}, ValueError, "flow_num_ensembles must be"),
        ({"num_ensembles": 0}, ValueError, "num_ensembles must be"),
        ({"num_bins": 1}, ValueError, "num_bins must be at least 2"),
        ({"sigma": 0.0}, ValueError, "sigma must be"),
        ({"noise_coverage": -0.1}, ValueError, "noise_coverage must be"),
        ({"reward_offset": 0.0}, ValueError, "reward_offset must be"),
        ({"time_embedding": "sine"}, ValueError, "time_embedding must be one of"),
        ({"prediction": "noise"}, ValueError, "prediction must be one of"),
        ({"backup": "quantile"}, ValueError, "backup must be one of"),
        ({"critic_target": "sarsa"}, ValueError, "critic_target must be one of"),
        ({"target_noise": -1.0}, ValueError, "target_noise must be at least 0"),
        ({"freeze_features_at": -1}, ValueError, "freeze_features_at must be at least 0"),
        ({"num_candidates": 0}, ValueError, "num_candidates must be at least 1"),
        ({"clip_values": 1}, TypeError, "clip_values must be True or False"),
        ({"use_resnets": 1}, TypeError, "use_resnets must be True or False"),
        ({"num_transformations": 0}, ValueError, "num_transformations must be at least 1"),
        ({"time_embed_dim": 0}, ValueError, "time_embed_dim must be"),
        ({"block_width": 0}, ValueError, "block_width must be"),
        ({"block_depth": True}, TypeError, "block_depth must be an int"),
        ({"value_hidden_dims": ()}, ValueError, "value_hidden_dims must name"),
        ({"actor_hidden_dims": 64}, TypeError, "actor_hidden_dims must be a tuple"),
        ({"actor_hidden_dims": (64, 0)}, ValueError, "actor_hidden_dims must be at least 1"),
        ({"layer_norm": 1}, TypeError, "layer_norm must be True or False"),
        ({"lr_decay_steps": -1}, ValueError, "lr_decay_steps must be"),
        ({"lr_decay_start": 1.0}, ValueError, "lr_decay_start must be"),
        ({"lr_final": 2.0}, ValueError, "lr_final must be"),
        ({"backend": "triton"}, ValueError, "backend must be one of"),
        ({"precision": "fp16"}, ValueError, "precision must be one of"),
    ],
)
def test_config_errors(settings, error, message):
    with pytest.raises(error, match=message):
        FloqConfig(**settings)


def test_config_is_hashable_and_takes_lists():
    config = FloqConfig(value_hidden_dims=[4, 4])
    assert config.value_hidden_dims == (4, 4) and hash(config) == hash(FloqConfig(value_hidden_dims=(4, 4)))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"config": SimpleNamespace()}, TypeError, "config must be a FloqConfig"),
        ({"reward_range": (0.0, -1.0)}, ValueError, "r_min <= r_max"),
        ({"reward_range": (float("-inf"), 0.0)}, ValueError, "finite"),
        ({"observation_statistics": (torch.zeros(2), torch.ones(3))}, ValueError, r"mean must be \[3\], got \[2\]"),
        ({"observation_statistics": (torch.zeros(3), torch.zeros(3))}, ValueError, "every std positive"),
    ],
)
def test_constructor_errors(arguments, error, message):
    given = {"config": FloqConfig(**SMALL), "obs_dim": O, "action_dim": A, "reward_range": (-1.0, 0.0)}
    with pytest.raises(error, match=message):
        FloqAgent(**{**given, **arguments})


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda b: b.pop("masks"), ValueError, "masks missing"),
        (lambda b: b.update(actions=b["actions"][:, :1]), ValueError, r"actions must be \[5, 2\], got \[5, 1\]"),
        (lambda b: b.update(rewards=b["rewards"][:, None]), ValueError, r"rewards must be \[5\], got \[5, 1\]"),
        (lambda b: b.update(next_observations=b["next_observations"][:3]), ValueError, "next_observations must be"),
        (lambda b: b.update(masks=b["masks"].bool()), TypeError, r"masks must be torch\.float32, got torch\.bool"),
        (lambda b: b.update(observations=b["observations"].double()), TypeError, "observations must be"),
        (lambda b: b.update(observations=b["observations"].numpy()), TypeError, "must be a Tensor, got ndarray"),
        (lambda b: b.update(actions=b["actions"].to("meta")), ValueError, "actions must be on cpu, got meta"),
        (lambda b: b.update({k: v[:0] for k, v in b.items()}), ValueError, "at least one row"),
    ],
)
def test_batch_errors(change, error, message):
    agent, batch = make_agent(), random_batch()
    before = agent.state_dict()
    change(batch)
    for call in (agent.update, agent.validate):
        with pytest.raises(error, match=message):
            call(batch)
    assert equal_states(before, agent.state_dict())


def test_batches_hold_what_the_target_needs():
    for target, key, shape in (("data", "next_actions", r"\[5, 2\]"), ("returns", "returns", r"\[5\]")):
        agent, batch = make_agent(critic_target=target), random_batch()
        assert agent.update(batch)["critic/critic_loss"].isfinite()
        with pytest.raises(ValueError, match=f"{key} must be {shape}"):
            agent.update({**batch, key: batch[key][:3]})
        del batch[key]
        with pytest.raises(ValueError, match=f"batch must have {key} where critic_target is '{target}'"):
            agent.update(batch)


def test_observation_errors():
    agent = make_agent()
    with pytest.raises(ValueError, match=r"observations must be \[N, 3\], got \[3\]"):
        agent.act(torch.zeros(O))
    with pytest.raises(TypeError, match="observations must be"):
        agent.act(torch.zeros(1, O, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"actions must be \[2, 2\]"):
        agent.flow_paths(torch.zeros(2, O), torch.zeros(3, A), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"noise must be \[2, N\]"):
        agent.flow_paths(torch.zeros(2, O), torch.zeros(2, A), torch.zeros(2))


@pytest.mark.parametrize("settings", [{}, {"num_candidates": 2, "clip_values": True}])
def test_losses_compile_as_one_graph(settings):
    agent, batch = make_agent(**settings), random_batch()
    noise = agent.sample_noise(batch)
    torch._dynamo.reset()
    compiled = torch.compile(agent.losses, fullgraph=True, backend="eager")
    for mine, theirs in zip(compiled(batch, noise)[:2], agent.losses(batch, noise)[:2], strict=True):
        torch.testing.assert_close(mine, theirs)
