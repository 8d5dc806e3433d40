"""Value Flows against `fql_statement`, and its critic on a distribution that is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fql_statement import (
    SMALL,
    A,
    O,
    actor_losses,
    check_losses,
    check_updates,
    dense_stack,
    flow_actions,
    onestep,
    random_batch,
)

from fastflow.agents import floq
from fastflow.agents.value_flows import PRESETS, ValueFlowsAgent, ValueFlowsConfig, preset_for

TINY = {**SMALL, "critic_flow_steps": 3, "num_samples": 2, "flow_steps": 2}


def make(dtype=torch.float64, **settings):
    return ValueFlowsAgent(ValueFlowsConfig(**{**TINY, **settings}), O, A, (-2.0, 0.0), seed=3, dtype=dtype)


def value_flows_losses(p, frozen, c, batch, n):
    low, high = -2.0 / (1 - c.discount), 0.0
    obs, act, next_obs = batch["observations"], batch["actions"], batch["next_observations"]

    def velocity(p, net, z, t, obs, act):  # z and t [E, ...], obs and act [..., O], [..., A]
        cond = np.concatenate([obs, act], -1)
        x = [np.broadcast_to(cond, (c.num_ensembles, *cond.shape)), z[..., None], t[..., None]]
        return dense_stack(p, f"{net}.field", np.concatenate(x, -1), c.layer_norm)[..., 0]

    def clip(x):
        return np.clip(x, low, high) if c.clip_flow_returns else x

    def combine(x, how):
        return x.min(0) if how == "min" else x.mean(0)

    def members(x):
        return np.broadcast_to(x, (c.num_ensembles, *x.shape))

    def walk(start, end, obs, act):
        """The target's ends, and their derivatives by start without clipping, [E, B]."""
        z, derivative = members(start), np.ones((c.num_ensembles, *start.shape))
        for k in range(c.critic_flow_steps):
            h, t = end / c.critic_flow_steps, members(end * k / c.critic_flow_steps)
            v = velocity(frozen, "target_critic_flow", z, t, obs, act)
            near = [velocity(frozen, "target_critic_flow", z + d, t, obs, act) for d in (1e-5, -1e-5)]
            derivative = derivative * (1 + h * (near[0] - near[1]) / 2e-5)
            z = clip(z + h * v)
        return z, derivative

    def q(obs, act, noise):
        noise = members(noise)
        return combine(clip(noise + velocity(frozen, "critic_flow", noise, 0 * noise, obs, act)), c.q_agg)

    if c.policy_extraction == "rs":
        many = np.repeat(next_obs[:, None], c.num_samples, axis=1)
        choices = flow_actions(frozen, c, many, n["next_action"])
        best = q(many, choices, n["next_value"]).argmax(1)
        next_act = choices[np.arange(len(best)), best]
    else:
        next_act = np.clip(onestep(frozen, c, next_obs, n["next_action"][:, 0]), -1, 1)

    spread = combine(np.abs(walk(n["confidence"], np.ones_like(n["time"]), obs, act)[1]), c.q_agg)
    weight = 1 - 0.5 * np.tanh(0.5 * c.confidence_weight_temp / spread)  # sigmoid(-temp / spread) + 1/2
    t, rewards, discount = n["time"], batch["rewards"], c.discount * batch["masks"]
    returns = rewards + discount * combine(walk(n["start"], np.ones_like(t), next_obs, next_act)[0], c.ret_agg)
    x_t = (1 - t) * n["start"] + t * returns
    bcfm = (velocity(p, "critic_flow", members(x_t), members(t), obs, act) - (returns - n["start"])) ** 2
    z_t = combine(walk(n["start"], t, next_obs, next_act)[0], c.ret_agg)
    label = velocity(frozen, "target_critic_flow", members(z_t), members(t), next_obs, next_act)
    label = combine(label, c.ret_agg)
    dcfm = (velocity(p, "critic_flow", members(rewards + discount * z_t), members(t), obs, act) - label) ** 2
    bcfm, dcfm = bcfm.sum(0), dcfm.sum(0)
    loss = np.mean(weight * (c.bcfm_lambda * bcfm + c.dcfm_lambda * dcfm))
    actor_loss, terms = actor_losses(p, frozen, c, batch, n, lambda act: q(obs, act, n["value"]))
    of_critic = {
        "critic_loss": loss,
        "bcfm_loss": bcfm.mean(),
        "dcfm_loss": dcfm.mean(),
        "return_mean": returns.mean(),
        "return_min": returns.min(),
        "return_max": returns.max(),
        "q_std": spread.mean(),
        "weight": weight.mean(),
    }
    return loss, actor_loss, terms | {f"critic/{name}": term for name, term in of_critic.items()}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"policy_extraction": "rpg", "actor_layer_norm": False, "bcfm_lambda": 3.0, "dcfm_lambda": 0.5},
        {"q_agg": "min", "ret_agg": "min", "confidence_weight_temp": 3.0, "num_samples": 5},
        {"clip_flow_returns": False, "layer_norm": False, "num_ensembles": 3, "normalize_q_loss": True},
    ],
    ids=["published", "one-step", "min", "unclipped"],
)
def test_losses_and_gradients(settings, backend):
    # The derivative of a walk is a difference in the statement.
    check_losses(make(backend=backend, **settings), value_flows_losses, rtol=1e-8)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_as_many_rows_as_members_and_choices(backend):
    """Nothing but their place tells the axes apart."""
    check_losses(make(backend=backend, num_samples=2), value_flows_losses, rtol=1e-8, rows=2)


def test_whole_updates():
    settings = {
        "value_hidden_dims": (4,),
        "actor_hidden_dims": (3,),
        "critic_flow_steps": 2,
        "clip_flow_returns": False,
    }
    check_updates(make(tau=0.1, lr=1e-2, policy_extraction="rpg", **settings), value_flows_losses)


@pytest.mark.parametrize("backend", [None, "fused"])
def test_native_walks_and_kernels_agree_with_plain_walks(backend, device):
    if backend == "fused":
        pytest.importorskip("triton")
    results = []
    for which in (backend, "reference"):
        config = ValueFlowsConfig(
            **{
                **TINY,
                "value_hidden_dims": (32, 32),
                "actor_hidden_dims": (16, 16),
                "backend": which,
                "precision": "fp32",
            }
        )
        agent = ValueFlowsAgent(config, O, A, (-2.0, 0.0), seed=3, device=device)
        for i in range(2):
            metrics = agent.update({key: x.to(device) for key, x in random_batch(seed=i).items()})
        results.append(torch.stack(list(metrics.values())).cpu())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_best_action_of_the_flow():
    agent = make(torch.float32, num_samples=6)
    obs = torch.randn(4, O)
    g = torch.Generator().manual_seed(1)
    chosen = agent.act(obs, torch.Generator().manual_seed(1))
    noise, value_noise = torch.randn(4, 6, A, generator=g), torch.randn(4, 6, generator=g)
    many = obs.unsqueeze(1).expand(4, 6, O)
    actions = agent.networks.actor_bc_flow(many, noise)
    q = value_noise + agent.networks.critic_flow.field(
        value_noise.unsqueeze(-1).expand(2, 4, 6, 1), torch.zeros(4, 6), torch.cat((many, actions), -1)
    ).squeeze(-1)
    best = q.clamp(-200.0, 0.0).mean(0).argmax(1)
    torch.testing.assert_close(chosen, actions[torch.arange(4), best])
    assert agent.act(obs[:0]).shape == (0, A)
    one_step = make(torch.float32, policy_extraction="rpg")
    torch.testing.assert_close(
        one_step.act(obs, torch.Generator().manual_seed(1)),
        one_step.networks.actor_onestep_flow(obs, torch.randn(4, A, generator=torch.Generator().manual_seed(1))),
    )


def test_returns_stay_in_their_range():
    agent = make(torch.float32, discount=0.5)
    assert agent.return_range == (-4.0, 0.0)
    with torch.no_grad():
        for parameter in agent.networks.parameters():
            parameter *= 20
    obs, start = torch.randn(50, O), torch.randn(50, 1)
    cond = torch.cat((obs, torch.randn(50, A)), 1)
    ends = agent._walk(start, torch.ones(50, 1), cond)
    assert ends.shape == (2, 50, 1) and ends.min() == -4.0 and ends.max() == 0.0


def walk_ends(agent, noise):
    """The critic's walks for one state and action from given starts, sorted, of the first member."""
    rows = torch.zeros(len(noise), 1)
    with torch.no_grad():
        return agent.networks.critic_flow(rows, rows, noise.unsqueeze(1))[0].flatten().sort().values


def one_state_batch(rewards, mask):
    rows = torch.zeros(len(rewards), 1)
    masks = torch.full((len(rewards),), mask)
    return {"observations": rows, "actions": rows, "next_observations": rows, "rewards": rewards, "masks": masks}


# The bootstrapped loss alone: the other one takes over the velocity at the next state unscaled, and so leads to the
# return's distribution only as the discount nears 1.
ONE_STATE = dict(
    value_hidden_dims=(32, 32),
    actor_hidden_dims=(4,),
    batch_size=128,
    flow_steps=1,
    critic_flow_steps=5,
    lr=5e-3,
    lr_decay_steps=200,
    tau=0.1,
    dcfm_lambda=0.0,
    policy_extraction="rpg",
)
NOISE = torch.special.ndtri(torch.linspace(0.02, 0.98, 49, dtype=torch.float64)).float()


def test_learns_a_distribution():
    """One step, whose reward is -1 or -3 by chance: about half of the walks end near each."""
    agent = ValueFlowsAgent(ValueFlowsConfig(**ONE_STATE), 1, 1, (-3.0, 0.0), seed=0)
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        agent.update(one_state_batch(-1.0 - 2.0 * torch.randint(2, (128,), generator=g), 0.0))
    ends = walk_ends(agent, NOISE)
    for reward in (-1, -3):
        assert ((ends - reward).abs() < 0.5).float().mean() > 0.35, ends


def test_bootstraps_to_the_return():
    """Reward -1 for ever: with discount 0.5 walks end at -2."""
    agent = ValueFlowsAgent(ValueFlowsConfig(**ONE_STATE, discount=0.5), 1, 1, (-1.0, 0.0), seed=0)
    for _ in range(200):
        metrics = agent.update(one_state_batch(-torch.ones(128), 1.0))
    ends = walk_ends(agent, NOISE)
    assert (ends + 2).abs().mean() < 0.25 and metrics["critic/q_std"] < 0.3, ends


# environment, discount, batch_size, q_agg, ret_agg, bcfm_lambda, confidence_weight_temp; then what is floq's
TABLE = """
cube-double-play  .995  256  mean  mean  1   3
cube-triple-play  .995  256  mean  mean  3   .03
scene-play        .99   256  mean  min   1   .3
puzzle-3x3-play   .99   256  mean  min   .5  .3
puzzle-4x4-play   .99   256  min   mean  3   100
"""


def test_published_presets():
    named = set()
    for line in TABLE.strip().splitlines():
        name, discount, batch_size, q_agg, ret_agg, bcfm, temp = line.split()
        named.add(name)
        assert ValueFlowsConfig(**PRESETS[name]) == ValueFlowsConfig(
            discount=float(discount),
            batch_size=int(batch_size),
            q_agg=q_agg,
            ret_agg=ret_agg,
            bcfm_lambda=float(bcfm),
            confidence_weight_temp=float(temp),
        )
    others = set(PRESETS) - named
    assert others == {name for name in floq.PRESETS if "/" not in name} - named
    for name in others - {"pointmaze-arena-demo"}:
        config, theirs = ValueFlowsConfig(**PRESETS[name]), floq.FloqConfig(**floq.PRESETS[name])
        for field in ("alpha", "discount", "batch_size", "q_agg"):
            assert getattr(config, field) == getattr(theirs, field), name
        assert config.policy_extraction == "rs" and config.num_samples == 16 and config.actor_layer_norm
    assert preset_for("cube-triple-play-singletask-task2-v0") == "cube-triple-play"
    assert preset_for("pointmaze-arena-navigate-singletask-v0") == "pointmaze-arena-demo"
    assert preset_for("pointmaze-large-navigate-singletask-v0") is None


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"num_ensembles": 0}, ValueError, "ValueFlowsConfig: num_ensembles must be at least 1"),
        ({"critic_flow_steps": 0}, ValueError, "critic_flow_steps must be at least 1"),
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1"),
        ({"confidence_weight_temp": 0.0}, ValueError, "confidence_weight_temp must be a positive number"),
        ({"bcfm_lambda": -1.0}, ValueError, "bcfm_lambda must be at least 0"),
        ({"dcfm_lambda": "1"}, TypeError, "dcfm_lambda must be a number"),
        ({"ret_agg": "max"}, ValueError, "ret_agg must be one of"),
        ({"policy_extraction": "sfbc"}, ValueError, "policy_extraction must be one of"),
        ({"clip_flow_returns": 1}, TypeError, "clip_flow_returns must be True or False"),
    ],
)
def test_config_errors(settings, error, message):
    with pytest.raises(error, match=message):
        ValueFlowsConfig(**settings)
