"""FPO: ratios that begin at exactly 1, the objective against a plain statement of the papers, and what all on-policy
agents do alike: acting, updates, states, bad input."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from conftest import assert_close_rms

from fastflow.advantages import gae
from fastflow.agents import dppo, fpo, on_policy, ppo
from fastflow.agents.fpo import FpoAgent, FpoConfig, pair_times
from fastflow.policy_loss import flow_policy_loss

AGENTS = {
    "fpo": (FpoAgent, FpoConfig, {"num_pairs": 4, "num_steps": 3}),
    "dppo": (dppo.DppoAgent, dppo.DppoConfig, {"num_steps": 3}),
    "ppo": (ppo.PpoAgent, ppo.PpoConfig, {}),
}
SMALL = {"actor_hidden": (16, 16), "critic_hidden": (16,), "num_epochs": 2, "num_minibatches": 2}
every_agent = pytest.mark.parametrize("name", AGENTS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(
    name="fpo", *, obs_dim=3, action_dim=2, num_envs=2, seed=1, dtype=torch.float32, low=None, high=None, **settings
):
    agent, config, own = AGENTS[name]
    bounds = (low or [-1.0] * action_dim, high or [1.0] * action_dim)
    return agent(config(**{**SMALL, **own, **settings}), obs_dim, action_dim, *bounds, num_envs, seed=seed, dtype=dtype)


def rollout(agent, steps=8, seed=0, ends=0.2):
    """A rollout that `agent` acted in, as the training loop makes them; observations and rewards are noise."""
    source, shape = generator(seed), (steps, agent.num_envs)
    normal = functools.partial(torch.randn, generator=source, dtype=agent.dtype)
    observations = 3 * normal(*shape, agent.obs_dim) + 1
    acted = [agent.explore(obs, source) for obs in observations]
    end, kind = torch.rand(2, *shape, generator=source)
    return {
        "observations": observations,
        "actions": torch.stack([actions for actions, _ in acted]),
        "next_observations": observations + normal(*shape, agent.obs_dim),
        "rewards": normal(*shape),
        "terminated": (end < ends) & (kind < 0.5),
        "truncated": (end < ends) & (kind >= 0.5),
        **{name: torch.stack([extras[name] for _, extras in acted]) for name in acted[0][1]},
    }


def update_and_see(agent, batch):
    """The metrics of an update, and its minibatches in turn: their rows and logarithms of ratios."""
    seen, loss = [], agent._actor_loss

    def recording(rows, advantages):
        found = loss(rows, advantages)
        seen.append((dict(rows), found.log_ratio))
        return found

    agent._actor_loss = recording
    try:
        return agent.update(batch), seen
    finally:
        del agent._actor_loss


def prepared(agent, batch):
    """Rows as the minibatches of an update get them."""
    with torch.no_grad():
        rows = {"obs": agent._normalize(batch["observations"]).flatten(0, 1), "actions": batch["actions"].flatten(0, 1)}
        agent._estimate(rows, batch, agent._rewards(batch))
        return rows | agent._prepare(rows["obs"], batch)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


# The loss ----------------------------------------------------------------------------------------------------------


def plain_losses(config, field, rows) -> torch.Tensor:
    """L [R, N] as the papers state it, with time from 0 (noise) to 1 (action)."""
    t, eps, a = rows["t"].unsqueeze(-1), rows["x_0"], rows["actions"].unsqueeze(1)
    x_t = t * a + (1 - t) * eps
    v = field(x_t, rows["t"], rows["obs"].unsqueeze(1))
    error = {"velocity": v - (a - eps), "noise": eps - (x_t - t * v), "endpoint": a - (x_t + (1 - t) * v)}[config.error]
    total = (error**2).sum(-1)
    d = a.shape[-1]
    return config.loss_scale * total / {"sum": 1, "mean": d, "sqrt": math.sqrt(d)}[config.dim_reduction]


@pytest.mark.parametrize("noise", ["stored", "regenerated"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_losses_of_other_errors_and_reductions_are_multiples(noise, dtype):
    def losses(**settings):
        agent = make(action_dim=5, dtype=dtype, noise=noise, **settings)
        rows = prepared(agent, rollout(agent))
        return agent._pairs(rows)[1], rows, rows["old"]

    t, rows, velocity = losses()
    if t is None:
        agent = make(action_dim=5, dtype=dtype, noise=noise)
        rows = prepared(agent, rollout(agent))
        t = agent._points(rows)[1]
    tolerance = dict(rtol=1e-9, atol=1e-12) if dtype == torch.float64 else dict(rtol=2e-4, atol=1e-6)
    # The released code's (1 - t)^2: its time runs the other way.
    torch.testing.assert_close(losses(error="noise")[2], t**2 * velocity, **tolerance)
    torch.testing.assert_close(losses(error="endpoint")[2], (1 - t) ** 2 * velocity, **tolerance)
    torch.testing.assert_close(losses(dim_reduction="sum")[2], 5 * velocity, **tolerance)
    torch.testing.assert_close(losses(dim_reduction="sqrt")[2], math.sqrt(5) * velocity, **tolerance)
    torch.testing.assert_close(losses(loss_scale=200.0)[2], 200 * velocity, **tolerance)


@pytest.mark.parametrize("error", ["velocity", "noise", "endpoint"])
@pytest.mark.parametrize("dim_reduction", ["mean", "sum", "sqrt"])
def test_losses_are_the_papers(error, dim_reduction):
    agent = make(dtype=torch.float64, error=error, dim_reduction=dim_reduction, loss_scale=3.0)
    rows = prepared(agent, rollout(agent))
    expected = plain_losses(agent.config, agent.networks.actor.field, rows)
    torch.testing.assert_close(rows["old"], expected.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dim_reduction", ["mean", "sum"])
def test_regenerated_noise_is_that_of_its_counter(dim_reduction):
    agent = make(noise="regenerated", dim_reduction=dim_reduction)
    rows = prepared(agent, rollout(agent))
    noise, _ = agent._pairs(rows)
    stored = {**rows, "x_0": noise.x_0(agent.action_dim), "t": noise.t()}
    expected = plain_losses(agent.config, agent.networks.actor.field, stored).detach()
    assert_close_rms("losses", rows["old"], expected, 1e-5)


def test_regenerated_noise_is_not_kept():
    agent = make(noise="regenerated", num_pairs=16, action_dim=7)
    rows = prepared(agent, rollout(agent, 32))
    assert set(rows) >= {"ids", "old"}
    assert not {"x_0", "t"} & set(rows)
    assert max(value.numel() for value in rows.values()) <= 64 * 16
    assert not [name for name, value in rows.items() if value.shape[:2] == (64, 16) and value.dim() > 2]
    stored = prepared(make(num_pairs=16, action_dim=7), rollout(agent, 32))
    assert stored["x_0"].numel() == 64 * 16 * 7


@pytest.mark.parametrize("noise", ["stored", "regenerated"])
def test_noise_differs_between_updates_and_rows(noise):
    agent = make(noise=noise)
    batch = rollout(agent)
    first, second = (prepared(agent, batch)["old"] for _ in range(2))
    assert not torch.equal(first, second)
    assert len(first.unique()) == first.numel()


def test_times_of_pairs():
    u = torch.rand(20_000, generator=generator(), dtype=torch.float64)
    assert torch.equal(pair_times(u, "uniform", 10, 1.0), u)
    grid = pair_times(u, "grid", 5, 1.0)
    values, counts = grid.unique(return_counts=True)
    assert values.tolist() == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert (counts / 20_000 - 0.2).abs().max() < 0.02
    skewed = pair_times(u, "skewed", 10, 1.0)
    assert 0.005 <= skewed.min() < 0.006
    assert 0.994 < skewed.max() <= 0.995
    # FPO++ writes 0.005 + 0.99 (1 - (1 - u)^(1 / beta)), in a time that is 1 at the noise.
    theirs = 0.005 + 0.99 * (1 - (1 - u) ** (1 / 1.5))
    torch.testing.assert_close(pair_times(u, "skewed", 10, 1.5), 1 - theirs)
    assert pair_times(u, "skewed", 10, 3.0).mean() > skewed.mean() + 0.1
    for kind in ("uniform", "grid", "skewed"):
        found = pair_times(torch.tensor([0.0, 1 - 2.0**-24]), kind, 10, 1.0)
        assert 0 <= found.min() <= found.max() < 1


# First ratios ------------------------------------------------------------------------------------------------------


FIRST = [
    {},
    {"noise": "regenerated"},
    {"error": "noise", "time_sampling": "grid", "noise": "regenerated"},
    {"error": "endpoint", "dim_reduction": "sum", "ratio": "pair"},
    {"error": "noise", "dim_reduction": "sqrt", "time_sampling": "skewed", "time_beta": 1.5, "loss_scale": 200.0},
    {"noise": "regenerated", "time_sampling": "skewed", "ratio": "pair", "negative": "aspo", "activation": "elu"},
    {"loss_clamp": 1.0, "difference_clamp": 3.0, "time_embed_dim": 0, "activation": "relu", "output_scale": 0.25},
]


@pytest.mark.parametrize("rows", [1, 3, 127])
@pytest.mark.parametrize("settings", FIRST)
def test_first_ratios_are_exactly_one(rows, settings):
    """Of every minibatch before the first step, and again after the statistics of observations have moved."""
    agent = make(num_envs=1, num_pairs=5, num_minibatches=min(rows, 4), num_epochs=1, **settings)
    for seed in range(2):
        _, seen = update_and_see(agent, rollout(agent, rows, seed))
        assert seen[0][1].shape[1] == (5 if settings.get("ratio") == "pair" else 1)
        assert torch.equal(seen[0][1], torch.zeros_like(seen[0][1]))
        assert rows < 3 or any(bool((log_ratio != 0).any()) for _, log_ratio in seen[1:])


@pytest.mark.parametrize("error", ["velocity", "noise", "endpoint"])
@pytest.mark.parametrize("dim_reduction", ["mean", "sum", "sqrt"])
@pytest.mark.parametrize("time_sampling", ["uniform", "grid", "skewed"])
def test_metrics_of_a_single_minibatch_say_that_nothing_changed(error, dim_reduction, time_sampling):
    agent = make(error=error, dim_reduction=dim_reduction, time_sampling=time_sampling, num_epochs=1, num_minibatches=1)
    for seed in range(2):
        metrics = agent.update(rollout(agent, 9, seed))
        assert [float(metrics[f"actor/{key}"]) for key in ("ratio", "ratio_max", "kl", "clip_fraction")] == [1, 1, 0, 0]


@pytest.mark.parametrize("settings", FIRST)
def test_a_rows_losses_do_not_depend_on_the_other_rows(settings):
    agent = make(num_envs=1, num_pairs=5, **settings)
    rows = prepared(agent, rollout(agent, 127))
    order = torch.randperm(127, generator=generator())
    for index in (order, order[:63], order[:3], order[:1], torch.tensor([5, 5, 6])):
        again = agent.pair_losses({name: value[index] for name, value in rows.items()})
        assert torch.equal(again, rows["old"][index])


@pytest.mark.parametrize("settings", FIRST)
def test_first_ratios_of_the_reference(settings):
    # PyTorch's own products and functions round a row by its place in the batch.
    agent = make(num_envs=1, num_pairs=5, num_epochs=1, backend="reference", **settings)
    for seed in range(2):
        _, seen = update_and_see(agent, rollout(agent, 127, seed))
        assert float(seen[0][1].abs().max()) <= 1e-6 * (1 + float(seen[0][0]["old"].max()))


def test_statistics_stand_still_during_an_update():
    agent = make(num_epochs=3)
    agent.update(rollout(agent))
    batch = rollout(agent, seed=1)
    before = agent._normalize(batch["observations"])
    _, seen = update_and_see(agent, batch)
    for rows in (torch.cat([rows["obs"] for rows, _ in seen[i : i + 2]]) for i in (0, 2, 4)):
        assert sorted(rows.tolist()) == sorted(before.flatten(0, 1).tolist())
    assert not torch.equal(agent._normalize(batch["observations"]), before)
    assert int(agent.observation_statistics.count) == 2 * 16


# The objective -----------------------------------------------------------------------------------------------------


def plain_objective(config, field, rows) -> torch.Tensor:
    """Minus the mean over ratios of what the papers maximise, with every case spelled out."""

    def limited(x, low, high):
        cut = x.clamp(low, high)
        return x + (cut - x).detach() if config.straight_through else cut

    old, new = rows["old"], plain_losses(config, field, rows)
    if config.loss_clamp:
        old, new = limited(old, -math.inf, config.loss_clamp), limited(new, -math.inf, config.loss_clamp)
    change = old - new
    if config.difference_clamp:
        change = limited(change, -config.difference_clamp, config.difference_clamp)
    if config.ratio == "action":
        change = change.mean(1, keepdim=True)
    gains = []
    for i, advantage in enumerate(rows["advantages"].tolist()):
        for rho in change[i].exp():
            high, low = (torch.tensor(1 + side * config.clip, dtype=rho.dtype) for side in (1, -1))
            if advantage >= 0:
                gains.append(advantage * torch.minimum(rho, high))
            elif config.negative == "clip":
                gains.append(advantage * torch.maximum(rho, low))
            else:
                gains.append(rho * advantage - abs(advantage) / (2 * config.clip) * (rho - 1) ** 2)
    return -torch.stack(gains).mean()


OBJECTIVES = [
    {"ratio": ratio, "negative": negative, **clamps}
    for ratio in ("action", "pair")
    for negative in ("clip", "aspo")
    for clamps in (
        {},
        {"loss_clamp": 1.5, "difference_clamp": 0.3},
        {"loss_clamp": 1.5, "difference_clamp": 0.3, "straight_through": False},
    )
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("settings", OBJECTIVES)
def test_objective_and_its_gradient_are_the_papers(settings, dtype):
    """A whole minibatch against float64 autograd, with old losses that put ratios on both sides of the clip."""
    changes = dict(error="noise", dim_reduction="sum", max_grad_norm=0.0, num_minibatches=1, **settings)
    agent, exact = (make(dtype=kind, num_pairs=6, **changes) for kind in (dtype, torch.float64))
    rows = prepared(agent, rollout(agent, 11))
    rows["old"] = rows["old"] + 0.5 * torch.randn(rows["old"].shape, generator=generator(7), dtype=dtype)
    doubled = {name: value.double() for name, value in rows.items()}
    expected = plain_objective(exact.config, exact.networks.actor.field, doubled)
    critic = (exact.networks.critic(doubled["obs"]).squeeze(-1) - doubled["returns"]).square().mean()
    grads = torch.autograd.grad(expected + agent.config.value_coef * critic, list(exact.networks.parameters()))

    metrics = agent.gradient_step(rows)
    if dtype == torch.float64 and not settings.get("loss_clamp"):
        assert 0.1 < float(metrics["actor/clip_fraction"]) < 0.95
    ratio = 1e-9 if dtype == torch.float64 else 2e-5
    assert_close_rms("loss", metrics["actor/actor_loss"], expected, ratio)
    assert_close_rms("critic loss", metrics["critic/critic_loss"], critic, ratio)
    for (name, parameter), grad in zip(agent.networks.named_parameters(), grads, strict=True):
        assert_close_rms(name, parameter.grad, grad, 10 * ratio)
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads[: len(list(agent.networks.actor.parameters()))]))
    assert float(metrics["actor/grad_norm"]) == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("noise", ["stored", "regenerated"])
@pytest.mark.parametrize("ratio", ["action", "pair"])
def test_blocks_of_pairs_are_a_matter_of_memory_alone(noise, ratio):
    agent = make(noise=noise, ratio=ratio, negative="aspo", num_pairs=6, max_grad_norm=0.0)
    rows = prepared(agent, rollout(agent, 11))
    old = rows["old"] + 0.3 * torch.randn(rows["old"].shape, generator=generator(7))
    parameters = agent.networks.actor.field.parameter_list()
    options = {name: getattr(agent.config, name) for name in ("clip", "ratio", "negative")}

    def run(old, **blocks):
        found = flow_policy_loss(*agent._losing(rows), old, rows["advantages"], **options, **blocks)
        return found, torch.autograd.grad(3 * found.loss, parameters)

    whole, grads = run(old)
    for size in (1, 6, 30, 131, 132):
        found, pieces = run(old, max_pairs=size)
        assert torch.equal(found.log_ratio, whole.log_ratio)
        assert torch.equal(found.ratio, whole.ratio)
        assert torch.equal(found.clip_fraction, whole.clip_fraction)
        torch.testing.assert_close((found.loss, found.flow_loss), (whole.loss, whole.flow_loss), rtol=1e-5, atol=1e-6)
        for piece, grad in zip(pieces, grads, strict=True):
            assert_close_rms("gradient", piece, grad, 1e-5)
        # What is stored was computed in one piece.
        first, _ = run(rows["old"], max_pairs=size)
        assert torch.equal(first.log_ratio, torch.zeros_like(first.log_ratio))
        with torch.no_grad():
            again = flow_policy_loss(*agent._losing(rows), old, rows["advantages"], **options, max_pairs=size)
        torch.testing.assert_close(again.loss, whole.loss.detach(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="max_pairs must be at least 1, got 0"):
        run(old, max_pairs=0)
    with pytest.raises(ValueError, match=r"expected old \[22, N\] and advantages \[22\], got \[21, 6\] and \[22\]"):
        run(old[1:])


@pytest.mark.parametrize("negative", ["clip", "aspo"])
def test_at_the_old_parameters_the_gradient_per_pair_is_that_per_action(negative):
    grads = []
    for ratio in ("action", "pair"):
        agent = make(dtype=torch.float64, ratio=ratio, negative=negative, max_grad_norm=0.0)
        agent.gradient_step(prepared(agent, rollout(agent)))
        grads.append([parameter.grad for parameter in agent.networks.actor.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_entropy_is_kozachenko_and_leonenkos():
    agent = make(action_dim=3, num_pairs=5, entropy_coef=0.1, dtype=torch.float64)
    rows = prepared(agent, rollout(agent))
    x_t, t = (value.numpy() for value in agent._points(rows))
    with torch.no_grad():
        v = agent.networks.actor.field(torch.from_numpy(x_t), torch.from_numpy(t), rows["obs"].unsqueeze(1)).numpy()
    logs = []
    for i in range(len(t)):
        ends = x_t[i] + (1 - t[i])[:, None] * v[i]
        for j in range(5):
            others = np.delete(ends, j, axis=0)
            logs.append(math.log(np.sqrt(((others - ends[j]) ** 2).sum(1)).min()))
    expected = 3 * float(np.mean(logs))
    objective = plain_objective(agent.config, agent.networks.actor.field, rows).detach()
    metrics = agent.gradient_step(rows)
    assert float(metrics["actor/entropy"]) == pytest.approx(expected, rel=1e-6)
    # It is to grow.
    assert float(metrics["actor/actor_loss"]) == pytest.approx(float(objective) - 0.1 * expected, rel=1e-6)


def test_divergence_of_the_learning_rate_is_that_of_the_predicted_noise():
    agent = make(dtype=torch.float64, adaptive_kl=1e-3, lr=1e-2)
    batch = rollout(agent)
    rows = prepared(agent, batch)
    assert float(agent._divergence(rows).detach()) == 0
    x_t, t = agent._points(rows)
    with torch.no_grad():
        before = agent.networks.actor.field(x_t, t, rows["obs"].unsqueeze(1))
    agent.gradient_step(rows)
    with torch.no_grad():
        after = agent.networks.actor.field(x_t, t, rows["obs"].unsqueeze(1))
        found = float(agent._divergence(rows))
    s = t.unsqueeze(-1)
    assert found == pytest.approx(float(((x_t - s * after) - (x_t - s * before)).square().mean()), rel=1e-9)


# Acting ------------------------------------------------------------------------------------------------------------


@every_agent
@pytest.mark.parametrize("squash", ["tanh", "clip"])
def test_actions_are_within_asymmetric_bounds(name, squash):
    low, high = [-2.0, 0.25, -8.0], [4.0, 0.5, -0.5]
    agent = make(name, action_dim=3, low=low, high=high, squash=squash)
    observations = 100 * torch.randn(200, 3, generator=generator())
    for deterministic in (False, True):
        actions = agent.act(observations, generator(), deterministic=deterministic)
        assert actions.shape == (200, 3)
        assert (actions >= torch.tensor(low)).all()
        assert (actions <= torch.tensor(high)).all()
    raw = torch.tensor([[-1e9, 0.0, 1e9], [-1.0, 0.5, 1.0]])
    inside = raw.tanh() if squash == "tanh" else raw.clamp(-1, 1)
    middle, half = torch.tensor([1.0, 0.375, -4.25]), torch.tensor([3.0, 0.125, 3.75])
    assert torch.equal(agent.to_env(raw), middle + half * inside)
    assert agent.to_env(raw)[0].tolist() == [-2.0, 0.375, -0.5]


@every_agent
def test_acting_is_repeatable(name):
    agent, observations = make(name), torch.randn(6, 3)
    assert torch.equal(agent.act(observations, generator(1)), agent.act(observations, generator(1)))
    assert not torch.equal(agent.act(observations, generator(1)), agent.act(observations, generator(2)))
    assert not torch.equal(agent.act(observations), agent.act(observations))
    assert torch.equal(agent.act(observations, deterministic=True), agent.act(observations, deterministic=True))
    assert torch.equal(make(name).act(observations), make(name).act(observations))
    assert not torch.equal(make(name).act(observations), make(name, seed=2).act(observations))
    first, second = (agent.explore(observations, generator(3)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    # A look at the policy does not move the noise of training.
    before = agent.generator.get_state()
    agent.act(observations, generator(1))
    agent.act(observations, deterministic=True)
    assert torch.equal(agent.generator.get_state(), before)


@pytest.mark.parametrize("name", ["fpo", "dppo"])
def test_deterministic_walks_begin_at_zero(name):
    agent = make(name, num_steps=4, squash="tanh")
    for seed in range(2):
        observations = torch.randn(5, 3, generator=generator(seed))
        obs, x = agent._normalize(observations), torch.zeros(5, 2)
        with torch.no_grad():
            for k in range(4):
                x = x + agent.networks.actor.field(x, torch.full((5,), k / 4), obs) / 4
        torch.testing.assert_close(agent.act(observations, deterministic=True), x.tanh())
        # The frozen weights that act are those of the last update.
        agent.update(rollout(agent, seed=seed))


def test_exploration_noise_is_added_to_the_action():
    quiet, noisy = make(action_noise=0.0), make(action_noise=0.5)
    observations = torch.randn(4000, 3, generator=generator())
    change = noisy.explore(observations, generator(1))[0] - quiet.explore(observations, generator(1))[0]
    assert float(change.std()) == pytest.approx(0.5, rel=0.05)
    assert torch.equal(noisy.act(observations, generator(1)), quiet.act(observations, generator(1)))


@every_agent
def test_moving_average_is_what_evaluations_see(name):
    agent = make(name, actor_ema=0.75, actor_ema_start=2)
    observations = torch.randn(4, 3, generator=generator())
    actor = [parameter.detach().clone() for parameter in agent.networks.actor.parameters()]
    expected = actor
    for update in range(4):
        agent.update(rollout(agent, seed=update))
        actor = [parameter.detach().clone() for parameter in agent.networks.actor.parameters()]
        # A copy until it begins, behind the update that `actor_ema_start` names.
        expected = actor if update < 2 else [0.75 * a + 0.25 * b for a, b in zip(expected, actor)]
        for mine, theirs in zip(agent.average.parameters(), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    plain = make(name)
    with torch.no_grad():
        for parameter, value in zip(plain.networks.actor.parameters(), expected):
            parameter.copy_(value)
    plain.observation_statistics = agent.observation_statistics
    torch.testing.assert_close(
        agent.act(observations, deterministic=True), plain.act(observations, deterministic=True), rtol=1e-4, atol=1e-5
    )
    # Rollouts are the policy's own.
    assert not torch.equal(
        agent.act(observations, generator(1)), agent.to_env(agent.explore(observations, generator(1))[0])
    )


# Updates -----------------------------------------------------------------------------------------------------------


def raw_advantages(agent, batch):
    values, following = (agent.values(batch[key]) for key in ("observations", "next_observations"))
    ends = (batch["terminated"], batch["truncated"])
    return gae(batch["rewards"], values, following, *ends, agent.config.gamma, agent.config.gae_lambda).flatten()


@every_agent
def test_advantages_of_the_objective(name):
    """At ratios of 1 the loss is minus the mean advantage."""

    def loss(**settings):
        agent = make(name, num_epochs=1, num_minibatches=1, **settings)
        batch = rollout(agent)
        raw = raw_advantages(agent, batch)
        return float(agent.update(batch)["actor/actor_loss"]), raw

    for kind in ("batch", "minibatch"):
        assert loss(normalize_advantages=kind)[0] == pytest.approx(0.0, abs=1e-6)
    found, raw = loss(normalize_advantages="none")
    assert found == pytest.approx(-float(raw.mean()), rel=1e-5)
    found, raw = loss(positive_advantages=True)
    normal = (raw - raw.mean()) / raw.std()
    assert found == pytest.approx(-float(normal.exp().log1p().mean()), rel=1e-5)
    found, raw = loss(normalize_advantages="none", advantage_clamp=0.5)
    assert found == pytest.approx(-float(raw.clamp(-0.5, 0.5).mean()), rel=1e-5)


def test_rows_over_which_advantages_are_normalized():
    for kind in ("batch", "minibatch", "none"):
        agent = make(normalize_advantages=kind, num_epochs=1, num_minibatches=3)
        batch = rollout(agent, 10)
        raw = raw_advantages(agent, batch)
        _, seen = update_and_see(agent, batch)
        assert [len(rows["obs"]) for rows, _ in seen] == [7, 7, 6]
        together = torch.cat([rows["advantages"] for rows, _ in seen])
        expected = (raw - raw.mean()) / raw.std() if kind == "batch" else raw
        torch.testing.assert_close(together.sort().values, expected.sort().values, rtol=1e-4, atol=1e-5)


def test_truncated_steps_bootstrap():
    agent = make(gamma=0.5, gae_lambda=0.0, normalize_advantages="none", num_epochs=1, num_minibatches=1)
    batch = rollout(agent, 1)
    values, following = agent.values(batch["observations"])[0], agent.values(batch["next_observations"])[0]
    batch["terminated"], batch["truncated"] = torch.tensor([[True, False]]), torch.tensor([[False, True]])
    _, seen = update_and_see(agent, batch)
    rows = {float(rows["obs"][i, 0]): float(rows["advantages"][i]) for rows, _ in seen for i in range(2)}
    found = [rows[float(x)] for x in batch["observations"][0, :, 0]]
    expected = batch["rewards"][0] - values + torch.tensor([0.0, 0.5 * float(following[1])])
    assert found == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_advantages_are_estimated_anew_if_asked(recompute):
    agent = make(recompute_advantages=recompute, num_minibatches=1, critic_lr=0.1)
    _, ((first, _), (second, _)) = update_and_see(agent, rollout(agent))
    for key in ("advantages", "returns"):
        same = torch.equal(first[key].sort().values, second[key].sort().values)
        assert same != recompute
    assert torch.equal(first["old"].sort(0).values, second["old"].sort(0).values)


def test_value_clipping():
    for limit in (0.0, 0.05):
        agent = make(value_clip=limit, dtype=torch.float64)
        rows = prepared(agent, rollout(agent))
        rows["old_values"] = rows["old_values"] + 0.1 * torch.randn(16, generator=generator(), dtype=torch.float64)
        with torch.no_grad():
            new = agent.networks.critic(rows["obs"]).squeeze(-1).tolist()
        errors = []
        for v, old, target in zip(new, rows["old_values"].tolist(), rows["returns"].tolist()):
            kept = min(max(v, old - limit), old + limit) if limit else v
            errors.append(max((v - target) ** 2, (kept - target) ** 2))
        assert float(agent.gradient_step(rows)["critic/critic_loss"]) == pytest.approx(np.mean(errors), rel=1e-9)


def test_rewards_are_scaled():
    agent = make(reward_scale=10.0, normalize_rewards=True, gamma=0.9)
    seen, sums = [], np.zeros(2)
    for seed in range(2):
        batch = rollout(agent, seed=seed)
        found = agent._rewards(batch)
        ends = (batch["terminated"] | batch["truncated"]).numpy()
        for reward, end in zip(10 * batch["rewards"].double().numpy(), ends):
            sums = 0.9 * sums + reward
            seen.extend(sums)
            sums = np.where(end, 0.0, sums)
        expected = (10 * batch["rewards"] / np.std(seen)).clamp(-10, 10)
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


def test_gradients_are_clipped_for_each_network_by_itself():
    agent = make(max_grad_norm=1e-3, dtype=torch.float64)
    metrics = agent.gradient_step(prepared(agent, rollout(agent)))
    for network, key in ((agent.networks.actor, "actor"), (agent.networks.critic, "critic")):
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in network.parameters()))
        assert norm == pytest.approx(1e-3, rel=1e-3)
        assert float(metrics[f"{key}/grad_norm"]) > 2e-3


def test_learning_rate_decays():
    agent = make(lr=1e-3, critic_lr=1e-2, lr_decay_updates=4, lr_final=0.2)
    rates = []
    for seed in range(6):
        rates.append(float(agent.update(rollout(agent, seed=seed))["actor/lr"]))
        assert agent.optimizer.param_groups[1]["lr"] == pytest.approx(10 * rates[-1])
    assert rates == pytest.approx([1e-3, 8e-4, 6e-4, 4e-4, 2e-4, 2e-4])


@every_agent
@pytest.mark.parametrize(("lr", "target", "bound"), [(1e-2, 1e-12, 1e-2), (1e-7, 1e6, 1e2)])
def test_learning_rate_follows_the_divergence_within_bounds(name, lr, target, bound):
    agent = make(name, lr=lr, adaptive_kl=target, num_epochs=4, max_grad_norm=0.0)
    rates = [float(agent.update(rollout(agent, seed=seed))["actor/lr"]) for seed in range(5)]
    # Four passes per update, and the rate of the last of them is told.
    step = 1.5 if bound > 1 else 1 / 1.5
    assert rates[:2] == pytest.approx([lr * step**3, lr * step**7], rel=1e-4)
    assert rates[-1] == pytest.approx(lr * bound, rel=1e-4)
    # The value network's rate is nobody's business.
    assert agent.optimizer.param_groups[1]["lr"] == pytest.approx(lr)


@every_agent
def test_divergence_ends_an_updates_passes(name):
    settings = dict(lr=1e-2, num_epochs=5)
    for target, passes in ((0.0, 5), (1e-12, 1), (1e6, 5)):
        agent = make(name, target_kl=target, **settings)
        assert float(agent.update(rollout(agent))["actor/passes"]) == passes


@every_agent
def test_rows_in_order_at_once_or_part_by_part(name, monkeypatch):
    found = []
    for limit in (on_policy.SHUFFLED_BYTES, 0):
        monkeypatch.setattr(on_policy, "SHUFFLED_BYTES", limit)
        agent = make(name, num_minibatches=3)
        metrics, seen = update_and_see(agent, rollout(agent))
        found.append((metrics, agent.state_dict(), seen))
    assert_same(found[0][0], found[1][0])
    assert_same(found[0][1], found[1][1])
    for (mine, _), (theirs, _) in zip(found[0][2], found[1][2], strict=True):
        assert_same(mine, theirs)


def test_known_gradients_do_not_outlive_a_loss_without_them():
    """A minibatch of native code, one of PyTorch's, and one of native code again, against PyTorch alone."""
    found = []
    for backends in (("auto", "reference", "auto"), ("reference",) * 3):
        agent = make(lr=1e-3)
        rows = prepared(agent, rollout(agent, 11))
        for backend in backends:
            agent.config = dataclasses.replace(agent.config, backend=backend)
            agent.networks.critic.backend = backend
            agent.gradient_step(rows)
        found.append([(p.detach(), p.grad.clone()) for p in agent.networks.parameters()])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@every_agent
def test_update_returns_detached_scalars(name):
    agent = make(name)
    batch = rollout(agent)
    before = {key: value.clone() for key, value in batch.items()}
    metrics = agent.update(batch)
    assert agent.step == 1
    assert agent.update_seconds > 0
    for key, value in metrics.items():
        assert value.shape == () and value.isfinite() and not value.requires_grad, key
    assert {"actor/actor_loss", "critic/critic_loss", "actor/ratio", "critic/explained_variance"} <= set(metrics)
    assert_same(batch, before)
    assert list(agent.update(batch)) == list(metrics)


@every_agent
def test_explained_variance_and_means(name):
    agent = make(name)
    batch = rollout(agent)
    returns = raw_advantages(agent, batch) + agent.values(batch["observations"]).flatten()
    values = agent.values(batch["observations"]).flatten()
    expected = 1 - float((returns - values).var(correction=0) / returns.var(correction=0))
    metrics = agent.update(batch)
    assert float(metrics["critic/explained_variance"]) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert float(metrics["critic/value"]) == pytest.approx(float(values.mean()), rel=1e-4, abs=1e-6)
    assert float(metrics["actor/std"]) == pytest.approx(
        float(batch["actions"].flatten(0, 1).std(0, correction=0).mean())
    )


@every_agent
@pytest.mark.parametrize("key", ["rewards", "observations"])
def test_numbers_that_are_not_finite_surface(name, key):
    agent = make(name, normalize_observations=False)
    batch = rollout(agent)
    batch[key] = batch[key].clone()
    batch[key].view(-1)[3] = math.nan
    assert not float(agent.update(batch)["critic/critic_loss"]) < math.inf


@every_agent
def test_fused_and_reference_updates_are_close(name):
    found = []
    for backend in ("auto", "reference"):
        agent = make(name, backend=backend, lr=1e-3, num_envs=4)
        batches = [rollout(agent, 16, seed) for seed in range(2)]
        found.append([agent.update(batch) for batch in batches])
    for mine, theirs in zip(*found):
        for key, value in mine.items():
            assert float(value) == pytest.approx(float(theirs[key]), rel=1e-3, abs=1e-4), key


def test_seed_decides():
    def trained(seed):
        agent = make(seed=seed)
        agent.update(rollout(agent))
        return agent.state_dict()

    torch.manual_seed(1)
    first = trained(3)
    torch.manual_seed(2)
    assert_same(first, trained(3))
    assert any(not torch.equal(value, first[name]) for name, value in trained(4).items())


# States ------------------------------------------------------------------------------------------------------------


FULL = {"actor_ema": 0.9, "normalize_rewards": True, "adaptive_kl": 1e-3, "lr": 1e-3, "lr_decay_updates": 5}


@every_agent
@pytest.mark.parametrize("noise", ["stored", "regenerated"])
def test_a_state_goes_on_bit_for_bit(name, noise):
    settings = {**FULL, **({"noise": noise} if name == "fpo" else {})}
    if name != "fpo" and noise == "regenerated":
        settings = {}
    first, second = make(name, **settings), make(name, seed=9, **settings)
    batches = []
    for seed in range(4):
        batches.append(rollout(first, seed=seed))
        if seed == 2:
            second.load_state_dict(first.state_dict())
            assert second.step == 2
            assert_same(first.state_dict(), second.state_dict())
        metrics = first.update(batches[-1])
        if seed >= 2:
            assert_same(metrics, second.update(batches[-1]))
            assert_same(first.state_dict(), second.state_dict())
    observations = torch.randn(5, 3)
    assert torch.equal(first.act(observations), second.act(observations))


@every_agent
def test_a_state_is_a_copy(name):
    agent = make(name, **FULL)
    state = agent.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    agent.update(rollout(agent))
    assert_same(state, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("lr_factor"), "missing lr_factor"),
        (lambda s: s.update(more=torch.zeros(1)), "unexpected more"),
        (lambda s: s.update({"statistics/observations/mean": torch.zeros(4).double()}), r"mean must be \[3\]"),
        (lambda s: s.update(discounted=torch.zeros(3).double()), r"discounted must be \[2\]"),
        (lambda s: s.update(minibatches=torch.zeros(())), r"minibatches must be \[\] torch.int64"),
        (lambda s: s.update(step=torch.tensor(-1)), "step must be at least 0"),
        (lambda s: s.update(generator=s["generator"][:-8]), "generator"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    agent, other = make(), make(seed=5)
    other.update(rollout(other))
    before, state = agent.state_dict(), other.state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        agent.load_state_dict(state)
    assert_same(agent.state_dict(), before)


def test_a_state_of_other_widths():
    agent = make()
    with pytest.raises(ValueError, match=r"FpoAgent.load_state_dict: .* must be"):
        agent.load_state_dict(make(actor_hidden=(24, 24)).state_dict())
    with pytest.raises(ValueError, match="missing average/"):
        make(actor_ema=0.9).load_state_dict(agent.state_dict())
    with pytest.raises(TypeError, match="must be a Tensor, got int"):
        agent.load_state_dict({**agent.state_dict(), "discounted": 3})


# Configurations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        *(("fpo", field, 0) for field in ("num_steps", "num_pairs", "num_epochs", "num_minibatches", "rollout_steps")),
        *(("fpo", field, 0.0) for field in ("clip", "lr", "loss_scale", "time_beta", "output_scale", "reward_scale")),
        *(("fpo", field, -1.0) for field in ("clip", "loss_clamp", "difference_clamp", "action_noise", "target_kl")),
        *(
            ("fpo", field, "no")
            for field in ("ratio", "error", "dim_reduction", "time_sampling", "noise", "prediction")
        ),
        *(("ppo", field, "no") for field in ("negative", "normalize_advantages", "squash", "activation", "variance")),
        ("fpo", "time_embed_dim", 3),
        ("fpo", "time_embed_dim", -2),
        ("fpo", "actor_hidden", ()),
        ("fpo", "critic_hidden", (0,)),
        ("fpo", "gamma", 1.5),
        ("fpo", "gae_lambda", -0.1),
        ("fpo", "actor_ema", 1.0),
        ("fpo", "clip", math.nan),
        ("fpo", "backend", "cuda"),
        ("fpo", "precision", "fp16"),
        ("dppo", "num_steps", 0),
        ("dppo", "sigma", 0.0),
        ("dppo", "last_steps", 11),
        ("dppo", "entropy_coef", 0.1),
        ("dppo", "time_embed_dim", 5),
        ("ppo", "init_std", 0.0),
        ("ppo", "head_scale", -1.0),
    ],
)
def test_values_that_cannot_be(name, field, value):
    config = AGENTS[name][1]
    with pytest.raises(ValueError, match=rf"{config.__name__}: {field} "):
        config(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_pairs", 2.5),
        ("num_pairs", True),
        ("num_steps", "3"),
        ("clip", "0.2"),
        ("lr", None),
        ("straight_through", 1),
        ("recompute_advantages", "no"),
        ("actor_hidden", 64),
        ("actor_hidden", (64.0,)),
    ],
)
def test_values_of_another_type(field, value):
    with pytest.raises(TypeError, match=rf"FpoConfig: {field} "):
        FpoConfig(**{field: value})


def test_entropy_needs_neighbours():
    with pytest.raises(ValueError, match="entropy_coef needs num_pairs of at least 2"):
        FpoConfig(entropy_coef=0.1, num_pairs=1)


@pytest.mark.parametrize(
    ("name", "preset"),
    [(name, preset) for name, module in (("fpo", fpo), ("dppo", dppo), ("ppo", ppo)) for preset in module.PRESETS],
)
def test_presets_at_their_full_width(name, preset):
    kind, config, _ = AGENTS[name]
    module = {"fpo": fpo, "dppo": dppo, "ppo": ppo}[name]
    assert set(module.LOOP_PRESETS) <= set(module.PRESETS)
    whole = config(**module.PRESETS[preset])
    agent = kind(dataclasses.replace(whole, num_minibatches=2, num_epochs=1), 6, 3, [-1.0] * 3, [1.0] * 3, 2)
    metrics = agent.update(rollout(agent, 4))
    assert all(value.isfinite() for value in metrics.values())
    assert [p.shape[-1] for p in agent.networks.critic.parameters()][:-2:2] == list(whole.critic_hidden)


# Bad input ---------------------------------------------------------------------------------------------------------


@every_agent
@pytest.mark.parametrize(
    ("key", "change", "error", "message"),
    [
        ("rewards", lambda x: None, ValueError, "rewards missing"),
        ("next_observations", lambda x: None, ValueError, "next_observations missing"),
        ("observations", lambda x: x[:, :, :2], ValueError, r"observations must be \[N, 2, 3\], got \[8, 2, 2\]"),
        ("observations", lambda x: x[:, :1], ValueError, r"observations must be \[N, 2, 3\], got \[8, 1, 3\]"),
        ("next_observations", lambda x: x[1:], ValueError, r"next_observations must be \[8, 2, 3\], got \[7, 2, 3\]"),
        ("actions", lambda x: x[..., :1], ValueError, r"actions must be \[8, 2, 2\], got \[8, 2, 1\]"),
        ("rewards", lambda x: x.unsqueeze(-1), ValueError, r"rewards must be \[8, 2\], got \[8, 2, 1\]"),
        ("terminated", lambda x: x[0], ValueError, r"terminated must be \[8, 2\], got \[2\]"),
        ("truncated", lambda x: x.float(), TypeError, "truncated must be torch.bool, got torch.float32"),
        ("observations", lambda x: x.double(), TypeError, "observations must be torch.float32, got torch.float64"),
        ("rewards", lambda x: x.double(), TypeError, "rewards must be torch.float32, got torch.float64"),
        ("actions", lambda x: x.numpy(), TypeError, "actions must be a Tensor, got ndarray"),
    ],
)
def test_rollouts_that_do_not_fit(name, key, change, error, message):
    agent = make(name)
    batch = rollout(agent)
    given = change(batch.pop(key))
    before = agent.state_dict()
    with pytest.raises(error, match=f"{type(agent).__name__}: .*{message}"):
        agent.update(batch if given is None else {**batch, key: given})
    assert_same(agent.state_dict(), before)


@every_agent
def test_rollouts_that_are_too_short(name):
    agent = make(name, num_minibatches=5)
    batch = rollout(agent)
    with pytest.raises(ValueError, match="at least one step, got none"):
        agent.update({key: value[:0] for key, value in batch.items()})
    with pytest.raises(ValueError, match="num_minibatches must be at most the rows of a rollout, 2 x 2 = 4, got 5"):
        agent.update({key: value[:2] for key, value in batch.items()})


@every_agent
def test_a_rollout_of_one_row(name):
    agent = make(name, num_envs=1, num_minibatches=1)
    assert all(value.isfinite() for value in agent.update(rollout(agent, 1)).values())


@every_agent
def test_observations_that_do_not_fit(name):
    agent = make(name)
    for act in (agent.act, lambda obs: agent.explore(obs, generator())):
        with pytest.raises(ValueError, match=r"observations must be \[N, 3\], got \[5, 4\]"):
            act(torch.zeros(5, 4))
        with pytest.raises(TypeError, match=r"observations must be torch\.float32, got torch\.float64"):
            act(torch.zeros(5, 3).double())


@every_agent
def test_arguments_that_cannot_be(name):
    kind, config, _ = AGENTS[name]
    other = AGENTS["ppo" if name == "fpo" else "fpo"][1]
    with pytest.raises(TypeError, match=f"config must be a {config.__name__}, got {other.__name__}"):
        kind(other(), 3, 1, [-1.0], [1.0])
    with pytest.raises(ValueError, match="obs_dim must be at least 1, got 0"):
        kind(config(), 0, 1, [-1.0], [1.0])
    with pytest.raises(TypeError, match="num_envs must be an int"):
        kind(config(), 3, 1, [-1.0], [1.0], 2.0)
    with pytest.raises(ValueError, match="action_high must be 1 finite numbers, got"):
        kind(config(), 3, 1, [-1.0], [math.inf])
    with pytest.raises(ValueError, match="action_low must be 2 finite numbers"):
        kind(config(), 3, 2, [-1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="action_low must be below action_high"):
        kind(config(), 3, 1, [1.0], [1.0])


@every_agent
def test_one_minibatch_per_update_sees_its_divergence(name):
    """It is measured behind the passes, where the policy has moved, not by the ratios of the last minibatch."""
    agent = make(name, num_epochs=1, num_minibatches=1, adaptive_kl=1e-12, lr=1e-2)
    rates = [float(agent.update(rollout(agent, seed=i))["actor/lr"]) for i in range(3)]
    assert rates[2] < rates[0]


@every_agent
def test_bounds_hold_to_the_last_bit(name):
    low, high = torch.rand(2, 50, 3, generator=generator())
    low, high = -5 * low, 5 * high
    for a, b in zip(low.tolist(), high.tolist()):
        agent = make(name)
        other = type(agent)(agent.config, 3, 3, a, b, 2)
        for action in (torch.full((1, 3), -9.0), torch.full((1, 3), 9.0)):
            found = other.to_env(action)
            assert bool((found >= torch.tensor(a)).all()) and bool((found <= torch.tensor(b)).all())


def test_end_points_need_times_before_the_end():
    with pytest.raises(ValueError, match="prediction 'endpoint' needs time_sampling 'grid' or 'skewed', got 'uniform'"):
        FpoConfig(prediction="endpoint")
    agent = make(prediction="endpoint", time_sampling="grid")
    for i in range(3):
        assert all(bool(value.isfinite()) for value in agent.update(rollout(agent, seed=i)).values())


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1, "adam_beta2": 0.9, "critic_lr": 1e-2}])
def test_steps_without_the_optimizers_bookkeeping_are_its_own(settings):
    agents = make(lr=1e-3, **settings), make(lr=1e-3, **settings)
    plain = agents[1]
    plain._descend = lambda complete: plain.optimizer.step()
    for seed in range(2):
        batch = rollout(agents[0], seed=seed)
        for agent in agents:
            agent.update(batch)
    assert_same(agents[0].state_dict(), plain.state_dict())
    assert all(float(m["step"]) == 8 for m in agents[0].optimizer.state.values())
    # A state that is loaded by torch's own means has other tensors.
    agents[0].optimizer.load_state_dict(agents[0].optimizer.state_dict())
    for agent in agents:
        agent.update(batch)
    assert_same(agents[0].state_dict(), plain.state_dict())
