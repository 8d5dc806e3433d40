"""FlowCritic, FlowPolicy, OneStepPolicy, ValueNetwork as other codebases use networks."""

from __future__ import annotations

import copy

import pytest
import torch

import fastflow as ff
from fastflow import modules

OBS, ACTION = 4, 2
CRITIC = dict(obs_dim=OBS, action_dim=ACTION, reward_range=(-1.0, 0.0), discount=0.99, hidden=(16, 16))


def critic(**options):
    return ff.FlowCritic.for_rewards(**(CRITIC | options))


def inputs(*lead):
    return torch.randn(*lead, OBS), torch.randn(*lead, ACTION)


@pytest.mark.parametrize("lead", [(), (3,), (3, 5), (0,)])
@pytest.mark.parametrize("ensemble", [None, 2])
def test_values_have_any_leading_shape_and_last_dim_one(lead, ensemble):
    obs, action = inputs(*lead)
    head = () if ensemble is None else (ensemble,)
    for network in (critic(ensemble=ensemble), ff.ValueNetwork(OBS, ACTION, hidden=(16,), ensemble=ensemble)):
        q = network(obs, action)
        assert q.shape == (*head, *lead, 1)
        assert q.dtype == obs.dtype


@pytest.mark.parametrize("lead", [(), (3,), (3, 5), (0,)])
def test_actions_have_any_leading_shape(lead):
    obs, _ = inputs(*lead)
    for policy in (ff.FlowPolicy(OBS, ACTION, hidden=(16,)), ff.OneStepPolicy(OBS, ACTION, hidden=(16,))):
        action = policy(obs)
        assert action.shape == (*lead, ACTION)
        assert (action.abs() <= 1).all()
        assert policy(obs, torch.zeros(*lead, ACTION)).shape == (*lead, ACTION)


def test_noise_decides_the_result_and_a_generator_repeats_it():
    obs, action = inputs(6)
    for network, args, noise in (
        (critic(num_samples=3), (obs, action), torch.rand(6, 3)),
        (ff.FlowPolicy(OBS, ACTION, hidden=(16,)), (obs,), torch.randn(6, ACTION)),
        (ff.OneStepPolicy(OBS, ACTION, hidden=(16,)), (obs,), torch.randn(6, ACTION)),
    ):
        assert torch.equal(network(*args, noise=noise), network(*args, noise=noise))
        drawn = [network(*args, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
        assert torch.equal(*drawn)
        assert not torch.equal(network(*args), network(*args))


def test_a_value_is_the_mean_of_its_walks():
    q = critic(ensemble=2)
    obs, action = inputs(5)
    noise = torch.rand(5, 4)
    walks = [q(obs, action, noise[:, i : i + 1]) for i in range(4)]
    torch.testing.assert_close(q(obs, action, noise), torch.stack(walks).mean(0))


def test_ranges_follow_the_rewards_as_in_the_paper():
    """cube-double: rewards in {-2, -1, 0}, discount 0.99, kappa 0.1."""
    value_range, noise_range = modules.value_ranges((-2.0, 0.0), 0.99)
    assert value_range == pytest.approx((-201.0, 1.0))
    assert noise_range == pytest.approx((-20.0, 0.0))
    q = critic()
    assert q.field.spec.state_embedding == ff.HLGauss(*modules.value_ranges((-1.0, 0.0), 0.99)[0])
    assert q.start(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([-10.0, 0.0])


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_critic_loss_regresses_on_target_minus_start(reduction, targets):
    q = critic(ensemble=2)
    obs, action = inputs(5)
    target, noise, t, weight = torch.randn(5, targets), torch.rand(5, 3), torch.rand(5, 3), torch.rand(5)
    got = q.loss(obs, action, target, noise, t, weight=weight, reduction=reduction)
    z_0 = q.start(noise)
    z_t = (1 - t) * z_0 + t * target
    cond = torch.cat([obs, action], -1).unsqueeze(1).expand(5, 3, -1)
    v = q.field(z_t.expand(2, 5, 3).unsqueeze(-1), t, cond).squeeze(-1)
    rows = weight[:, None] * (v - (target - z_0)).square()
    torch.testing.assert_close(got, {"none": rows, "mean": rows.mean(), "sum": rows.sum()}[reduction])


def test_policy_loss_is_behaviour_cloning():
    policy = ff.FlowPolicy(OBS, ACTION, hidden=(16,))
    obs, action = inputs(5)
    noise, t = torch.randn(5, ACTION), torch.rand(5)
    x_t = (1 - t[:, None]) * noise + t[:, None] * action
    expected = (policy.field(x_t, t, obs) - (action - noise)).square().mean()
    torch.testing.assert_close(policy.loss(obs, action, noise, t), expected)


def test_losses_pass_their_options_on():
    policy = ff.FlowPolicy(OBS, ACTION, hidden=(16,))
    obs, action = inputs(3, 2)
    noise, t = torch.randn(3, 2, ACTION), torch.rand(3, 2)
    rows = policy.loss(obs, action, noise, t, reduction="none")
    other = policy.loss(obs, action, noise, t, reduction="none", dim_reduction="sum", error="noise")
    torch.testing.assert_close(other, ACTION * t.square() * rows)
    q, u = critic(), torch.rand(3, 2, 1)
    target, t = torch.randn(3, 2), torch.rand(3, 2, 1)
    rows = q.loss(obs, action, target, u, t, reduction="none")
    torch.testing.assert_close(q.loss(obs, action, target, u, t, reduction="none", error="noise"), t.square() * rows)


NETWORKS = {
    "residual, norm first": dict(hidden=(16, 16, 16), architecture=ff.ResidualMLP(2), norm="layer", norm_first=True),
    "film": dict(
        hidden=(16, 8), architecture=ff.FiLMUNet((16,)), norm=None, time_embedding=ff.Sinusoidal(8, (8,)), method="heun"
    ),
    "fpo": dict(hidden=(16,), output_scale=0.25, time_embedding=ff.PowerFourier(8), method="midpoint"),
    "endpoint": dict(hidden=(16,), prediction="endpoint"),
}


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_networks_of_every_field(options):
    obs, action = inputs(5)
    policy, q = ff.FlowPolicy(OBS, ACTION, clip=None, **options), critic(**options)
    noise, u = torch.randn(5, ACTION), torch.rand(5, 2)
    method = options.get("method", "euler")
    walked = ff.integrate(policy.field, noise, obs, num_steps=3, method=method)
    assert torch.equal(policy(obs, noise, num_steps=3), walked)
    assert policy.field.spec.output_scale == options.get("output_scale", 1.0)
    cond = torch.cat([obs, action], -1)
    walked = ff.integrate(q.field, q.start(u).unsqueeze(-1), cond, num_steps=3, method=method)
    assert torch.equal(q(obs, action, u, num_steps=3), walked.mean(1))
    (policy.loss(obs, action) + q.loss(obs, action, torch.randn(5))).backward()


@pytest.mark.parametrize("lead", [(), (3, 5)])
def test_a_deterministic_policy_starts_at_zero(lead):
    policy = ff.FlowPolicy(OBS, ACTION, hidden=(16,), num_steps=2)
    obs, _ = inputs(*lead)
    zeros, noise = torch.zeros(*lead, ACTION), 0.1 * torch.randn(2, *lead, ACTION)
    assert torch.equal(policy(obs, deterministic=True), policy(obs, zeros))
    explored = policy(obs, deterministic=True, step_noise=noise)
    assert explored.shape == (*lead, ACTION)
    assert torch.equal(explored, policy(obs, zeros, step_noise=noise))
    assert not torch.equal(explored, policy(obs, zeros))


def test_one_step_policy_clips_unless_raw():
    policy = ff.OneStepPolicy(OBS, ACTION, hidden=(16,))
    with torch.no_grad():
        policy.network.layers[-1].bias.fill_(3.0)
    obs, _ = inputs(5)
    noise = torch.randn(5, ACTION)
    raw = policy(obs, noise, raw=True)
    assert raw.max() > 1
    assert torch.equal(policy(obs, noise), raw.clamp(-1, 1))


@pytest.mark.parametrize("make", [critic, lambda: ff.FlowPolicy(OBS, ACTION, hidden=(16,))], ids=["critic", "policy"])
def test_updates_through_the_side_are_seen(make):
    """Nothing derived from weights outlives a call: .data edits, lerp_, functional_call, load_state_dict, deepcopy."""
    network = make()
    obs, action = inputs(5)
    noise = torch.rand(5, ACTION if isinstance(network, ff.FlowPolicy) else 1)
    args = (obs, noise) if isinstance(network, ff.FlowPolicy) else (obs, action, noise)
    other = make()
    target = copy.deepcopy(network)
    assert torch.equal(target(*args), network(*args))

    for p, q in zip(target.parameters(), other.parameters()):
        p.data.copy_(0.995 * p.data + 0.005 * q.data)
    by_data = target(*args)
    assert not torch.equal(by_data, network(*args))

    target.load_state_dict(network.state_dict())
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(other.parameters()), 0.005)
    torch.testing.assert_close(target(*args), by_data)

    swapped = torch.func.functional_call(network, dict(other.named_parameters()), args)
    assert torch.equal(swapped, other(*args))


def test_modules_move_and_build_on_meta():
    assert all(p.is_meta for p in critic(device="meta").parameters())
    obs, action = inputs(3)
    assert critic().double()(obs.double(), action.double()).dtype == torch.float64


def test_a_critic_learns_a_constant():
    """End to end through the operators' backward: the walk ends at the target whatever the start."""
    q = critic(hidden=(32, 32), num_steps=4, sigma=3.0)
    optimizer = torch.optim.Adam(q.parameters(), 1e-2)
    obs, action = inputs(64)
    target = torch.full((64, 1), -7.0)
    for _ in range(400):
        optimizer.zero_grad()
        q.loss(obs, action, target).backward()
        optimizer.step()
    with torch.no_grad():
        assert (q(obs, action) - target).abs().mean() < 1.0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: critic()(torch.zeros(3, 5), torch.zeros(3, ACTION)), r"FlowCritic: obs must be \[..., 4\], got"),
        (lambda: critic()(*inputs(3)[:1]), r"FlowCritic: action must be \[3, 2\], got None"),
        (lambda: critic()(torch.zeros(3, OBS), torch.zeros(4, ACTION)), r"action must be \[3, 2\], got \[4, 2\]"),
        (lambda: critic()(*inputs(3), noise=torch.zeros(4, 1)), r"noise must be \[3, 'S'\], got \[4, 1\]"),
        (lambda: critic().loss(*inputs(3), torch.zeros(4, 1)), r"target must be \[3, 1\], got \[4, 1\]"),
        (lambda: critic(num_samples=0), "num_samples must be at least 1, got 0"),
        (lambda: ff.FlowCritic(4, 2, value_range=(0.0, 1.0), noise_range=(1.0, 0.0)), r"noise_range must be \(low,"),
        (lambda: modules.value_ranges((-1, 0), 1.0), r"discount must be in \[0, 1\), got 1.0"),
        (lambda: modules.value_ranges((1, 0), 0.9), r"reward_range must be \(r_min, r_max\), got \(1, 0\)"),
        (lambda: ff.FlowPolicy(OBS, ACTION)(torch.zeros(3, 5)), r"FlowPolicy: obs must be \[..., 4\]"),
        (lambda: ff.FlowPolicy(OBS, ACTION)(*inputs(3), deterministic=True), "noise must be None where deterministic"),
        (lambda: ff.FlowPolicy(OBS, ACTION)(inputs(3)[0], step_noise=torch.zeros(10, 4, 2)), "step_noise must be"),
        (lambda: ff.FlowPolicy(OBS, ACTION)(inputs(3)[0], step_noise=torch.zeros(9, 3, 2)), r"must be \[10, 3, 2\]"),
        (lambda: ff.FlowPolicy(OBS, ACTION, method="rk4")(inputs(3)[0]), "method must be 'euler', 'midpoint' or"),
        (lambda: ff.OneStepPolicy(OBS, ACTION)(torch.zeros(3, OBS), torch.zeros(3, 1)), r"noise must be \[3, 2\]"),
        (lambda: critic()(*inputs(3), num_steps=-1), "num_steps must be at least 1"),
    ],
)  # fmt: skip
def test_modules_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
