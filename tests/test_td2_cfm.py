"""TD²-CFM: the losses against plain statements and closed forms, the training loop, the model's use, bad input."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

import fastflow as ff
from fastflow import agents, density, horizon
from fastflow.agents.td2_cfm import LOOP_PRESETS, PRESETS, VARIANTS, Td2CfmAgent, Td2CfmConfig, make_model, preset_for
from fastflow.diffusion import DiffusionSuccessor
from fastflow.distances import emd, gradient_variance
from fastflow.kernels import cpu
from fastflow.planning import PolicyImprovement, play
from fastflow.successor import SuccessorFlow
from fastflow.worlds import make_world

FLOWS = ("td2-cfm", "td-cfm-c", "td-cfm")
SMALL = {"architecture": "mlp", "hidden": (16, 16), "activation": "silu", "batch_size": 8, "num_steps": 3}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_agent(dtype=torch.float32, seed=1, obs_dim=2, action_dim=2, policy_dim=0, statistics=None, **settings):
    config = Td2CfmConfig(**{**SMALL, **settings})
    sizes = dict(policy_dim=policy_dim, state_statistics=statistics)
    return Td2CfmAgent(config, obs_dim, action_dim, seed=seed, dtype=dtype, **sizes)


def random_batch(rows=8, dtype=torch.float32, obs_dim=2, action_dim=2, policy_dim=0, seed=5):
    source = generator(seed)
    widths = {"observations": obs_dim, "next_observations": obs_dim, "futures": obs_dim, "actions": action_dim}
    widths |= {"next_actions": action_dim, "policies": policy_dim}
    batch = {name: torch.randn(rows, width, generator=source, dtype=dtype) for name, width in widths.items()}
    return batch | {"masks": (torch.rand(rows, generator=source) < 0.5).to(dtype)}


# The losses --------------------------------------------------------------------------------------------------------


def plain_loss(agent: Td2CfmAgent, batch, noise, variant: str) -> torch.Tensor:
    """The losses as the paper states them (equations 7 to 9, Algorithm 1), by a Python loop over midpoint steps."""
    config, gamma, x_0, t = agent.config, agent.config.gamma, noise.source, noise.time
    here = torch.cat([batch["observations"], batch["actions"]], -1)
    there = torch.cat([batch["next_observations"], batch["next_actions"]], -1)
    s_1 = batch["next_observations"]

    def walk(end):
        x, h = x_0, (end / config.num_steps).unsqueeze(-1)
        for k in range(config.num_steps):
            begin = k / config.num_steps * end
            middle = x + 0.5 * h * agent.target.field(x, begin, there)
            x = x + h * agent.target.field(middle, begin + 0.5 * h.squeeze(-1), there)
        return x

    def point(start, end):
        c = t.unsqueeze(-1)
        return c * end + (1 - c) * start, end - start

    with torch.no_grad():
        direct = point(x_0, s_1)
        if variant == "td2-cfm":
            x = walk(t)
            bootstrap = x, agent.target.field(x, t, there)
        else:
            bootstrap = point(noise.fresh if variant == "td-cfm" else x_0, walk(torch.ones_like(t)))
    errors = [(agent.online.field(x, t, here) - u).square().sum(-1) for x, u in (direct, bootstrap)]
    return ((1 - gamma) * errors[0] + gamma * errors[1]).mean()


@pytest.mark.parametrize("variant", FLOWS)
def test_loss_and_gradient_are_the_papers(variant):
    agent = make_agent(torch.float64, variant=variant, gamma=0.9)
    with torch.no_grad():
        for parameter in agent.target.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator(3), dtype=torch.float64))
    batch = random_batch(dtype=torch.float64)
    noise = agent.sample_noise(batch)
    loss, metrics = agent.losses(batch, noise)
    expected = plain_loss(agent, batch, noise, variant)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    parameters = list(agent.online.parameters())
    for mine, theirs in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    both = 0.1 * metrics["direct_loss"] + 0.9 * metrics["bootstrap_loss"]
    torch.testing.assert_close(both, loss.detach(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("architecture", ["mlp", "film-unet"])
def test_float32_update_agrees_with_float64(backend, architecture):
    sizes = dict(architecture=architecture, hidden=(16, 16), cond_hidden=(16,), time_hidden=(16,), backend=backend)
    exact, agent = (make_agent(dtype, **sizes, gamma=0.9, lr=1e-3) for dtype in (torch.float64, torch.float32))
    batch = random_batch()
    noise = agent.sample_noise(batch)
    doubled = [{name: value.double() for name, value in given.items()} for given in (batch, dataclasses.asdict(noise))]
    loss = agent.losses(batch, noise)[0]
    expected = exact.losses(doubled[0], type(noise)(**doubled[1]))[0]
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=1e-6)


_GRADIENTS = [
    *(dict(variant=variant) for variant in VARIANTS),
    dict(mixture="bernoulli"),
    dict(path="curved", terminals="absorb"),
    dict(gamma_low=0.5),
    dict(variant="td-cfm", gamma_low=0.5, mixture="bernoulli", terminals="absorb"),
    dict(architecture="film-unet", hidden=(16, 16), cond_hidden=(16,), time_hidden=(16,)),
]


@pytest.mark.parametrize("settings", _GRADIENTS, ids=str)
def test_an_update_has_the_gradients_of_its_loss(settings):
    """What native code differentiates along with the loss, against autograd through plain PyTorch in float64."""
    versions = [(torch.float32, "auto"), (torch.float32, "reference"), (torch.float64, "reference")]
    settings = dict(gamma=0.9, obs_dim=3, ddim_steps=3, **settings)
    agents_ = [make_agent(dtype, backend=backend, **settings) for dtype, backend in versions]
    with torch.no_grad():
        for parameter in (*agents_[0].online.parameters(), *agents_[0].target.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator(3)))
    batch = random_batch(rows=200, obs_dim=3)
    noise = agents_[0].sample_noise(batch)
    found, told = [], []
    for agent in agents_:
        agent.online.load_state_dict(agents_[0].online.state_dict())
        agent.target.load_state_dict(agents_[0].target.state_dict())
        given = [{name: x.to(agent.dtype) for name, x in some.items()} for some in (batch, vars(noise))]
        options = dict(variant=agent.config.variant, direct=agent is agents_[0])
        loss, metrics = agent._losses(given[0], type(noise)(**given[1]), **options)
        covered = cpu.why_unavailable() is None and agent.config.architecture == "mlp"
        assert loss.requires_grad == (not options["direct"] or not covered)
        if loss.requires_grad:
            loss.backward()
        found.append(torch.cat([p.grad.double().flatten() for p in agent.online.parameters()]))
        told.append({name: value.double() for name, value in metrics.items()})
    error, other = ((x - found[2]).norm() for x in found[:2])
    assert error <= 2 * other + 5e-7 * found[2].norm()
    for name, value in told[2].items():
        torch.testing.assert_close(told[0][name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_what_wants_no_gradient_is_not_trained():
    agent = make_agent(lr=1e-2)
    frozen = next(agent.online.parameters()).requires_grad_(False)
    before = [p.clone() for p in agent.online.parameters()]
    for _ in range(2):
        agent.update(random_batch())
    for parameter, was in zip(agent.online.parameters(), before, strict=True):
        assert torch.equal(parameter, was) == (parameter is frozen)


@pytest.mark.parametrize("variant", VARIANTS[:4])
def test_gamma_zero_is_one_step_flow_matching(variant):
    agent = make_agent(torch.float64, variant=variant, gamma=0.0)
    batch = random_batch(dtype=torch.float64)
    batch["futures"] = batch["next_observations"]
    noise = agent.sample_noise(batch)
    expected = agent.online.loss(
        batch["observations"], batch["actions"], batch["next_observations"], noise=noise.source, t=noise.time
    )
    torch.testing.assert_close(agent.losses(batch, noise)[0], expected, rtol=1e-12, atol=0)


def test_bernoulli_mixture_has_the_expectation_of_the_weights():
    weighted, drawn = (
        make_agent(torch.float64, variant="td2-cfm", gamma=0.7, mixture=kind) for kind in ("expectation", "bernoulli")
    )
    batch = random_batch(rows=4, dtype=torch.float64)
    noise = weighted.sample_noise(batch)
    expected = weighted.gradient(batch, noise)
    # All sixteen ways in which four rows can be drawn, each with its probability.
    mean = torch.zeros_like(expected)
    for choice in range(16):
        took = torch.tensor([choice >> i & 1 for i in range(4)], dtype=torch.float64)
        mixture = torch.where(took > 0, 0.0, 1.0).double() * 0.999
        probability = float((0.7**took * 0.3 ** (1 - took)).prod())
        mean += probability * drawn.gradient(batch, dataclasses.replace(noise, mixture=mixture))
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-12)


def test_absorbing_terminals_leave_the_direct_term_alone():
    ignore, absorb = (make_agent(torch.float64, gamma=0.9, terminals=kind) for kind in ("ignore", "absorb"))
    batch = random_batch(dtype=torch.float64)
    noise = ignore.sample_noise(batch)
    going_on = {**batch, "masks": torch.ones_like(batch["masks"])}
    assert torch.equal(ignore.losses(batch, noise)[0], absorb.losses(going_on, noise)[0])
    ended = {**batch, "masks": torch.zeros_like(batch["masks"])}
    loss, metrics = absorb.losses(ended, noise)
    torch.testing.assert_close(loss.detach(), metrics["direct_loss"], rtol=1e-12, atol=0)


def test_curved_path_leaves_the_bootstrap_of_td2_alone():
    straight, curved = (make_agent(torch.float64, path=path) for path in ("straight", "curved"))
    batch = random_batch(dtype=torch.float64)
    noise = straight.sample_noise(batch)
    cond = straight.online.cond(batch["next_observations"], batch["next_actions"])
    for variant in FLOWS:
        pairs = zip(*(agent._bootstrap(variant, cond, noise, noise.time) for agent in (straight, curved)))
        assert all(torch.equal(a, b) for a, b in pairs) == (variant == "td2-cfm")
    x, u = curved._interpolate(noise.source, batch["futures"], noise.time)
    h = 1e-6
    later, _ = curved._interpolate(noise.source, batch["futures"], noise.time + h)
    torch.testing.assert_close((later - x) / h, u, rtol=1e-4, atol=1e-4)
    for t, end in ((0.0, noise.source), (1.0, batch["futures"])):
        torch.testing.assert_close(
            curved._interpolate(noise.source, batch["futures"], torch.full((8,), t).double())[0], end
        )


class Oracle(SuccessorFlow):
    """The closed-form flow of the linear-Gaussian world in a model's place."""

    def velocity(self, x, t, cond):
        state, action = cond.split(2, -1)
        return make_world("linear-gaussian").velocity(x, t, state, action, self.gamma)

    def walk(self, x_0, cond, t=1.0, num_steps=None):
        x, steps = x_0, num_steps or self.num_steps
        t = torch.as_tensor(t, dtype=x.dtype).expand(len(x))
        h = t / steps
        for k in range(steps):
            middle = x + 0.5 * h[:, None] * self.velocity(x, k * h, cond)
            x = x + h[:, None] * self.velocity(middle, (k + 0.5) * h, cond)
        return x


def oracle_agent(gamma=0.9, dtype=torch.float64, **settings) -> Td2CfmAgent:
    agent = make_agent(dtype, **{"gamma": gamma, "num_steps": 6, **settings})
    agent.target = Oracle(2, 2, gamma=gamma, hidden=(4,), architecture=ff.MLP(), time_embedding=ff.RawTime()).to(dtype)
    return agent


def gaussian_batch(rows: int, seed: int = 0, dtype=torch.float64):
    world = make_world("linear-gaussian")
    batch = {name: value.to(dtype) for name, value in world.transitions(rows, generator(seed)).items()}
    batch["next_actions"] = world.act(batch["next_observations"])
    return batch


def test_oracle_field_is_the_fixed_point_of_every_variant():
    # Acceptance test 2 as moments: where the target is the oracle, the oracle's own error has no correlation with
    # any function of (x, t, s, a). Wrong conditions, time scales or weights break it.
    world, rows = make_world("linear-gaussian"), 12_000
    batch = gaussian_batch(rows)
    for variant in ("td2-cfm", "td-cfm"):
        agent = oracle_agent(variant=variant)
        noise = agent.sample_noise(batch, generator(1))
        noise = dataclasses.replace(noise, time=0.95 * noise.time)
        next_cond = agent.online.cond(batch["next_observations"], batch["next_actions"])
        terms = (
            agent._direct(batch["next_observations"], noise, noise.time),
            agent._bootstrap(variant, next_cond, noise, noise.time),
        )
        moments = []
        for (x, u), weight in zip(terms, (0.1, 0.9)):
            here = world.velocity(x, noise.time, batch["observations"], batch["actions"], 0.9)
            features = torch.cat([torch.ones(rows, 1), x, x * noise.time[:, None], batch["observations"], x**2], -1)
            moments.append(weight * (here - u).unsqueeze(1) * features.unsqueeze(2))
        each = moments[0] + moments[1]
        error = each.std(0) / math.sqrt(rows)
        assert (each.mean(0).abs() < 5 * error).all(), variant
        # The terms alone are far from zero: it is their mixture that is.
        assert (moments[0].mean(0).abs() > 6 * moments[0].std(0) / math.sqrt(rows)).any()


@pytest.mark.slow
def test_regression_on_an_oracle_target_returns_the_oracle():
    world = make_world("linear-gaussian")
    agent = oracle_agent(
        dtype=torch.float32, hidden=(64, 64, 64), lr=3e-3, batch_size=256, lr_decay_steps=1200, tau=1e-3, adam_eps=1e-8
    )
    agent._target = agent._online = []  # the oracle does not follow
    agent.config = dataclasses.replace(agent.config, num_steps=5)
    data = gaussian_batch(256 * 1200, dtype=torch.float32)
    truth = horizon.make_truth(world, None, 0.9, 4, 512)

    def error():
        given = (truth.states, truth.actions, truth.futures)
        return horizon.velocity_error(agent.online, world, *given, generator(2))

    before = error()
    for i in range(1200):
        batch = {name: value[256 * i : 256 * (i + 1)] for name, value in data.items()}
        agent.optimizer.param_groups[0]["lr"] = agent.config.learning_rate(i)
        loss, _ = agent.losses(batch, agent.sample_noise(batch))
        agent.optimizer.zero_grad()
        loss.backward()
        agent.optimizer.step()
    assert before > 0.3
    assert error() < 0.03


def test_midpoint_walk_of_the_exact_field_reaches_the_floor_from_five_steps():
    gamma = 0.8
    truth = horizon.make_truth(make_world("linear-gaussian"), None, gamma, 3, 1024)
    oracle = oracle_agent(gamma).target
    distances = {}
    for steps in (1, 5, 10):
        noise = torch.randn(3, 1024, 2, generator=generator(4), dtype=torch.float64)
        cond = oracle.cond(truth.states.double(), truth.actions.double())
        samples = torch.stack([oracle.walk(x, c.expand(1024, -1), 1.0, steps) for x, c in zip(noise, cond)])
        distances[steps] = sum(emd(a, b.double()) for a, b in zip(samples, truth.futures)) / 3
    floor = float(truth.floor.mean())
    assert distances[1] > 2 * floor
    assert distances[5] < 1.5 * floor
    assert distances[10] < 1.3 * floor


@pytest.mark.slow
def test_gradients_agree_on_average_and_td2_varies_least():
    # Acceptance test 4, at parameters near the fixed point, which Monte-Carlo training finds quickly.
    world, gamma = make_world("linear-gaussian"), 0.95
    settings = dict(variant="mc-cfm", gamma=gamma, hidden=(64, 64, 64), lr=2e-3, lr_decay_steps=5000, tau=0.01)
    trained = make_agent(**settings, batch_size=256, adam_eps=1e-8)
    data = gaussian_batch(256 * 400, dtype=torch.float32)
    source = generator(7)
    for i in range(5000):
        rows = slice(256 * (i % 400), 256 * (i % 400 + 1))
        batch = {name: value[rows] for name, value in data.items()}
        batch["futures"] = world.futures(batch["observations"], batch["actions"], None, gamma, 1, source).squeeze(1)
        trained.update(batch)
    agent = make_agent(variant="td2-cfm", gamma=gamma, hidden=(64, 64, 64), num_steps=10)
    for model in (agent.online, agent.target):
        model.load_state_dict(trained.target.state_dict())
    found = {}
    for variant in FLOWS:
        noises = generator(9)
        gradients = []
        for i in range(96):
            batch = {name: value[256 * i : 256 * (i + 1)] for name, value in data.items()}
            gradients.append(agent.gradient(batch, agent.sample_noise(batch, noises), variant).double())
        found[variant] = torch.stack(gradients)
    trace = {variant: gradient_variance(rows)[0] for variant, rows in found.items()}
    assert trace["td2-cfm"] < trace["td-cfm-c"] < trace["td-cfm"]
    assert trace["td-cfm"] > 5 * trace["td2-cfm"]
    # The squared distance of two means has the expectation (tr Cov_a + tr Cov_b) / n if they estimate one gradient.
    apart = float((found["td-cfm"].mean(0) - found["td2-cfm"].mean(0)).square().sum())
    assert apart < 3 * (trace["td-cfm"] + trace["td2-cfm"]) / 96


# Diffusion ---------------------------------------------------------------------------------------------------------


def test_diffusion_losses_regress_on_noise():
    agent = make_agent(torch.float64, variant="td-dd", gamma=0.9, ddim_steps=4)
    batch = random_batch(dtype=torch.float64)
    noise = agent.sample_noise(batch)
    t = agent._times(noise.time)
    level = 1 - t
    assert bool(((level * 1000 - (level * 1000).round()).abs() < 1e-9).all())
    assert float(level.min()) >= 1e-3
    cond = agent.online.cond(batch["next_observations"], batch["next_actions"])
    zeros = torch.zeros(8).double()
    x_1 = agent.target.denoise(noise.source, cond, zeros, 4)
    signal = density.alpha_bar(level).unsqueeze(-1)
    x, u = agent._bootstrap("td-dd", cond, noise, t)
    torch.testing.assert_close(x, signal.sqrt() * x_1 + (1 - signal).sqrt() * noise.fresh)
    assert torch.equal(u, noise.fresh)
    x, u = agent._bootstrap("td2-dd", cond, noise, t)
    torch.testing.assert_close(u, agent.target.field(x, t, cond), rtol=1e-9, atol=1e-9)
    expected = (
        (
            agent.online.field(
                *[
                    agent._direct(batch["next_observations"], noise, t)[0],
                    t,
                    agent.online.cond(batch["observations"], batch["actions"]),
                ]
            )
            - noise.source
        )
        .square()
        .sum(-1)
        .mean()
    )
    torch.testing.assert_close(agent.losses(batch, noise)[1]["direct_loss"], expected.detach())


class GaussianNoise(DiffusionSuccessor):
    """The exact noise prediction for data N(mean, std^2 I)."""

    mean, std = 1.5, 0.4

    def velocity(self, x, t, cond):
        signal = density.alpha_bar(1 - t).unsqueeze(-1)
        return (1 - signal).sqrt() * (x - signal.sqrt() * self.mean) / (signal * self.std**2 + 1 - signal)


def test_ddim_of_the_exact_noise_gives_the_data():
    model = GaussianNoise(1, 1, gamma=0.5, hidden=(4,), architecture=ff.MLP(), time_embedding=ff.RawTime()).double()
    noise = torch.randn(20_000, 1, generator=generator(), dtype=torch.float64)
    cond = torch.zeros(20_000, 2, dtype=torch.float64)
    x = model.denoise(noise, cond, torch.zeros((), dtype=torch.float64), 400)
    assert float(x.mean()) == pytest.approx(1.5, abs=0.02)
    assert float(x.std()) == pytest.approx(0.4, abs=0.02)
    # To a level on the way: what the data noised to that level are distributed as.
    level = torch.full((), 0.3, dtype=torch.float64)
    signal = float(density.alpha_bar(level))
    x = model.denoise(noise, cond, level, 400)
    assert float(x.mean()) == pytest.approx(math.sqrt(signal) * 1.5, abs=0.03)
    assert float(x.std()) == pytest.approx(math.sqrt(signal * 0.16 + 1 - signal), abs=0.02)


# The agent ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_update_trains_the_online_field_and_the_target_follows(variant):
    agent = make_agent(variant=variant, lr=1e-2, tau=0.25, ddim_steps=3)
    target = copy.deepcopy(agent.target.state_dict())
    metrics = agent.update(random_batch())
    assert all(value.dim() == 0 and torch.isfinite(value) and not value.requires_grad for value in metrics.values())
    online = agent.online.state_dict()
    moved = 0.0
    for name, after in agent.target.state_dict().items():
        if name.startswith("field"):
            torch.testing.assert_close(after, target[name].lerp(online[name], 0.25))
            moved += float((after - target[name]).abs().sum())
    assert moved > 0
    assert agent.step == 1
    assert not any(p.requires_grad or p.grad_fn for p in agent.target.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumes_bit_for_bit(variant):
    settings = dict(variant=variant, lr=1e-3, tau=0.1, lr_decay_steps=10, policy_dim=1, ddim_steps=3)
    agent, other = make_agent(**settings), make_agent(seed=99, **settings)
    batch = random_batch(policy_dim=1)
    for _ in range(2):
        agent.update(batch)
    other.load_state_dict(agent.state_dict())
    for _ in range(2):
        first, second = agent.update(batch), other.update(batch)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name, value in agent.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_state_of_another_agent_is_refused():
    agent = make_agent()
    with pytest.raises(ValueError, match=r"missing .*adam/exp_avg/field"):
        agent.load_state_dict({"step": torch.tensor(0)})
    wider = make_agent(hidden=(16, 32)).state_dict()
    with pytest.raises(ValueError, match="must be"):
        agent.load_state_dict(wider)


def test_seed_fixes_weights_and_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, b, c = make_agent(seed=3), make_agent(seed=3), make_agent(seed=4)
    assert torch.equal(before, torch.get_rng_state())
    first, again, other = (agent.online.field.layers[0].weight for agent in (a, b, c))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_tau_follows_the_convergence_rule():
    rule = dict(tau=None, lr_decay_steps=24_000)
    assert Td2CfmConfig(gamma=0.95, **rule).target_rate == pytest.approx(0.01)
    assert Td2CfmConfig(gamma=0.99, **rule).target_rate == pytest.approx(0.05)
    assert Td2CfmConfig(gamma=0.999, **rule).target_rate == 0.05
    assert Td2CfmConfig(gamma=0.5, **rule).target_rate == pytest.approx(0.001)
    config = Td2CfmConfig(lr=1e-3, lr_decay_steps=100, lr_final=0.05)
    assert config.learning_rate(0) == pytest.approx(1e-3)
    assert config.learning_rate(50) == pytest.approx(1e-3 * 0.525)
    assert config.learning_rate(400) == pytest.approx(5e-5)


def test_gamma_conditioned_model_draws_horizons():
    agent = make_agent(gamma=0.99, gamma_low=0.5)
    batch = random_batch(rows=4096)
    gammas = agent._gammas(agent.sample_noise(batch))
    assert float(gammas.min()) >= 0.5
    assert float(gammas.max()) <= 0.99
    logs = torch.log(1 / (1 - gammas))
    assert float(logs.mean()) == pytest.approx((math.log(2) + math.log(100)) / 2, abs=0.06)
    assert torch.isfinite(agent.update(batch)["loss"])
    args = batch["observations"][:3], batch["actions"][:3], 2
    near, far = (agent.model.sample(*args, gamma=g, generator=generator()) for g in (0.5, 0.99))
    assert not torch.equal(near, far)
    with pytest.raises(ValueError, match=r"gamma must be in \[0.5, 0.99\]"):
        agent.model.sample(*args, gamma=0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": 1.0}, r"gamma must be in \[0, 1\), got 1.0"),
        ({"gamma": -0.1}, r"gamma must be in \[0, 1\)"),
        ({"gamma_low": 0.995}, "gamma_low must be at least 0 and at most gamma"),
        ({"gamma_low": 0.5, "variant": "mc-cfm"}, "gamma_low must be None for mc-cfm"),
        ({"variant": "td3"}, "variant must be one of"),
        ({"tau": None}, "tau must be a number where lr_decay_steps is 0"),
        ({"tau": 0.0}, r"tau must be in \(0, 1\]"),
        ({"variant": "td-dd", "path": "curved"}, "path must be straight for td-dd"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"hidden": ()}, "hidden must name at least one width"),
        ({"policy": ""}, "policy must be the name of a policy"),
    ],
)
def test_configuration_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        Td2CfmConfig(**changes)


def test_batch_that_does_not_fit():
    agent = make_agent()
    batch = random_batch()
    without = {name: value for name, value in batch.items() if name != "next_actions"}
    with pytest.raises(ValueError, match="next_actions missing"):
        agent.update(without)
    with pytest.raises(ValueError, match=r"observations must be \[8, 2\], got \[8, 3\]"):
        agent.update({**batch, "observations": torch.zeros(8, 3)})
    with pytest.raises(TypeError, match=r"futures must be torch.float32, got torch.float64"):
        make_agent(variant="mc-cfm").update({**batch, "futures": batch["futures"].double()})
    with pytest.raises(ValueError, match="at least one row"):
        agent.update(random_batch(rows=0))
    with pytest.raises(ValueError, match="policies must be"):
        make_agent(policy_dim=3).update(batch)
    with pytest.raises(ValueError, match="variant must be of the kind of td2-cfm"):
        agent.losses(batch, agent.sample_noise(batch), "td-dd")


def test_every_preset_makes_an_agent_and_belongs_to_a_loop():
    assert set(LOOP_PRESETS) == set(PRESETS)
    for name, settings in PRESETS.items():
        Td2CfmConfig(**settings)
        agents.settings_class("td2-cfm")(env="circle", agent=Td2CfmConfig(**settings), **LOOP_PRESETS[name])
    for world in ("linear-gaussian", "circle", "pointmaze-medium", "pointmass-maze"):
        assert preset_for(world) in PRESETS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["single-policy", "multi-policy"])
def test_published_presets_train_at_full_width(name):
    # Only the batch is cut: networks, solver and optimiser are the paper's.
    config = Td2CfmConfig(**{**PRESETS[name], "batch_size": 8})
    policy_dim = 3 if config.policy == "all" else 0
    agent = Td2CfmAgent(config, 4, 2, policy_dim=policy_dim)
    millions = sum(p.numel() for p in agent.online.parameters()) / 1e6
    assert 7 < millions < 8 if name == "single-policy" else 25 < millions < 30
    before = [p.detach().clone() for p in agent.online.parameters()]
    for seed in range(50):
        metrics = agent.update(random_batch(8, obs_dim=4, policy_dim=policy_dim, seed=seed))
        assert all(map(math.isfinite, metrics.values()))
    # Adam moves a weight by about its learning rate, and the target follows by tau.
    moved = max(float((p.detach() - q).abs().max()) for p, q in zip(agent.online.parameters(), before))
    followed = max(float((p - q).abs().max()) for p, q in zip(agent.target.parameters(), before))
    assert 10 * config.lr < moved < 60 * config.lr
    assert 0 < followed < 50 * config.target_rate * moved


# The model ---------------------------------------------------------------------------------------------------------


def small_model(**settings) -> SuccessorFlow:
    sizes = dict(hidden=(16, 16), architecture=ff.MLP(), time_embedding=ff.PowerFourier(8), activation="silu")
    torch.manual_seed(0)
    return SuccessorFlow(3, 2, gamma=0.9, **{**sizes, **settings})


def test_samples_have_the_leading_shape_and_follow_the_noise():
    model = small_model(policy_dim=2)
    obs, action, w = torch.randn(2, 5, 3), torch.randn(2, 5, 2), torch.randn(2, 5, 2)
    samples = model.sample(obs, action, 7, w=w, generator=generator())
    assert samples.shape == (2, 5, 7, 3)
    assert torch.equal(samples, model(obs, action, 7, w=w, generator=generator()))
    noise = torch.randn(7, 3)
    shared = model.sample(obs, action, 7, w=w, noise=noise)
    own = model.sample(obs, action, 7, w=w, noise=noise.expand(2, 5, 7, 3))
    assert torch.equal(shared, own)
    one = model.sample(obs[0, 1], action[0, 1], 7, w=w[0, 1], noise=noise)
    torch.testing.assert_close(one, shared[0, 1], rtol=1e-5, atol=1e-6)
    assert model.sample(obs, action, w=w).requires_grad


def test_normalised_model_is_the_plain_one_in_other_units():
    mean, std = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 2.0, 4.0])
    plain, scaled = small_model(), small_model(state_mean=mean, state_std=std)
    obs, action, noise = torch.randn(4, 3), torch.randn(4, 2), torch.randn(4, 6, 3)
    raw = obs * std + mean
    samples = scaled.sample(raw, action, 6, noise=noise)
    torch.testing.assert_close(samples, plain.sample(obs, action, 6, noise=noise) * std + mean, rtol=1e-4, atol=1e-4)
    inside = plain.log_prob(obs, obs, action)
    torch.testing.assert_close(scaled.log_prob(raw, raw, action), inside - std.log().sum(), rtol=1e-4, atol=1e-4)
    assert set(scaled.state_dict()) >= {"state_mean", "state_std"}


def test_value_is_the_mean_reward_over_one_minus_gamma():
    model = small_model()
    obs, action, noise = torch.randn(4, 3), torch.randn(4, 2), torch.randn(4, 32, 3)
    states = model.sample(obs, action, 32, noise=noise)
    value = model.value(lambda x: x[..., 0].square(), obs, action, 32, noise=noise)
    torch.testing.assert_close(value, 10 * states[..., 0].square().mean(-1))
    with pytest.raises(ValueError, match="the result of reward_fn must be"):
        model.value(lambda x: x, obs, action, 32)


def test_one_velocity_is_the_fields():
    model = small_model()
    x, t, cond = torch.randn(6, 4, 3), torch.rand(6), torch.randn(6, 5)
    expected = model.field(x, t.unsqueeze(-1), cond.unsqueeze(1))
    torch.testing.assert_close(model.velocity(x, t, cond), expected.detach(), rtol=1e-4, atol=1e-5)


def test_density_of_an_untrained_zero_head_is_the_sources():
    model = small_model(state_std=torch.tensor([2.0, 1.0, 0.5]))
    with torch.no_grad():
        model.field.layers[-1].weight.zero_()
    x, obs, action = torch.randn(5, 3), torch.randn(5, 3), torch.randn(5, 2)
    expected = torch.distributions.Normal(0.0, model.state_std).log_prob(x).sum(-1)
    torch.testing.assert_close(model.log_prob(x, obs, action), expected)
    estimate = model.log_prob(x, obs, action, divergence="hutchinson", generator=generator())
    torch.testing.assert_close(estimate, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.sample(torch.zeros(2, 4), torch.zeros(2, 2)), r"obs must be \[2, 3\], got \[2, 4\]"),
        (lambda m: m.sample(torch.zeros(2, 3), torch.zeros(3, 2)), r"action must be \[2, 2\], got \[3, 2\]"),
        (lambda m: m.sample(torch.zeros(2, 3), torch.zeros(2, 2), 0), "n must be at least 1"),
        (lambda m: m.sample(torch.zeros(2, 3), torch.zeros(2, 2), w=torch.zeros(1)), "w must be None"),
        (lambda m: m.sample(torch.zeros(2, 3), torch.zeros(2, 2), gamma=0.5), r"gamma must be in \[0.9, 0.9\]"),
        (lambda m: m.sample(torch.zeros(2, 3), torch.zeros(2, 2), noise=torch.zeros(2, 3)), "noise must be"),
        (lambda m: m.log_prob(torch.zeros(2, 2), torch.zeros(2, 3), torch.zeros(2, 2)), "x must be"),
        (lambda m: SuccessorFlow(3, 2, gamma=1.0), r"gamma must be in \[0, 1\)"),
        (lambda m: SuccessorFlow(3, 2, gamma=0.9, state_std=[1.0, 0.0, 1.0]), "state_std must be positive"),
        (lambda m: SuccessorFlow(3, 2, gamma=0.9, state_mean=[1.0]), r"state_mean must be \[3\] finite numbers"),
    ],
)
def test_bad_input_of_the_model(call, message):
    with pytest.raises(ValueError, match=message):
        call(small_model())


def test_diffusion_agent_samples_and_has_a_density():
    agent = make_agent(variant="td2-dd", ddim_steps=4)
    assert isinstance(agent.model, DiffusionSuccessor)
    obs, action = torch.randn(3, 2), torch.randn(3, 2)
    assert agent.model.sample(obs, action, 5, generator=generator()).shape == (3, 5, 2)
    assert torch.isfinite(agent.model.log_prob(torch.randn(3, 2), obs, action)).all()


# Planning ----------------------------------------------------------------------------------------------------------


def test_planning_ranks_policies_as_their_rollouts_do():
    # Acceptance test 7: three rotations of the circle, a model of all of them from Monte-Carlo training.
    world, gamma = make_world("circle"), 0.9
    embeddings = torch.tensor(list(world.policies.values()))
    config = Td2CfmConfig(
        variant="mc-cfm", gamma=gamma, architecture="mlp", hidden=(64, 64), activation="silu", lr=2e-3, tau=0.01,
        lr_decay_steps=2500, adam_eps=1e-8,
    )  # fmt: skip
    scale = float(embeddings.abs().max())
    agent = Td2CfmAgent(config, 2, 1, policy_dim=1)
    source = generator(3)
    data = world.transitions(50_000, source)
    for _ in range(2500):
        rows = torch.randint(50_000, (256,), generator=source)
        w = embeddings[torch.randint(len(embeddings), (256,), generator=source)]
        obs, actions = data["observations"][rows], data["actions"][rows]
        futures = world.futures(obs, actions, w, gamma, 1, source).squeeze(1)
        agent.update({"observations": obs, "actions": actions / scale, "policies": w / scale, "futures": futures})
    task = world.tasks[0]
    planner = PolicyImprovement(
        agent.model,
        lambda s, w: world.act(s, w * scale) / scale,
        embeddings / scale,
        lambda s: world.reward(task, s),
        num_samples=128,
        generator=source,
    )
    states = world.starts(64, source)
    q, actions = planner.values(states)
    assert q.shape == (64, len(embeddings))
    truth = torch.stack([world.values(task, states, world.act(states, w), w, gamma, source) for w in embeddings], dim=1)
    gap = truth.amax(1) - truth.gather(1, q.argmax(1, keepdim=True)).squeeze(1)
    spread = truth.amax(1) - truth.amin(1)
    assert float(gap.mean()) < 0.15 * float(spread.mean())
    chosen = planner.act(states)
    assert torch.equal(chosen, actions[torch.arange(64), planner.chosen])


def test_play_adds_discounted_rewards():
    world = make_world("circle")
    states = world.starts(3, generator())
    total = play(world, lambda s: world.act(s), lambda s: torch.ones(len(s)), states, horizon=4, gamma=0.5,
                 generator=generator())  # fmt: skip
    torch.testing.assert_close(total, torch.full((3,), 1.875, dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": small_model()}, "model must be conditioned on the policy"),
        ({"policies": torch.zeros(4, 3)}, r"policies must be \[P, 2\], got \[4, 3\]"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
    ],
)
def test_planner_that_cannot_be(changes, message):
    given = {"model": small_model(policy_dim=2), "act": lambda s, w: s, "policies": torch.zeros(4, 2)}
    given |= {"reward_fn": lambda s: s[..., 0], "generator": generator()}
    with pytest.raises(ValueError, match=message):
        PolicyImprovement(**{**given, **changes})


def test_make_model_reads_the_configuration():
    model = make_model(Td2CfmConfig(), 4, 2, 3)
    assert model.field.spec.cond_dim == 9
    assert isinstance(model.field.spec.architecture, ff.FiLMUNet)
    assert (model.num_steps, model.method) == (10, "midpoint")


def test_losses_compile_as_one_graph():
    agent, batch = make_agent(), random_batch()
    noise = agent.sample_noise(batch)
    torch._dynamo.reset()
    compiled = torch.compile(agent.losses, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(batch, noise)[0], agent.losses(batch, noise)[0])
