"""FQL against `fql_statement`, its residual and ensemble critics included, and its presets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fql_statement import SMALL, A, O, actor_losses, check_losses, check_updates, dense_stack, onestep

import fastflow as ff
from fastflow.agents.fql import PRESETS, FqlAgent, FqlConfig, preset_for


def make(dtype=torch.float64, **settings):
    return FqlAgent(FqlConfig(**{**SMALL, **settings}), O, A, (-2.0, 0.0), seed=3, dtype=dtype)


def fql_losses(p, frozen, c, batch, n):
    def q(p, net, obs, act):
        x = np.concatenate([obs, act], -1)
        x = np.broadcast_to(x, (c.num_ensembles, *x.shape))
        return dense_stack(p, f"{net}.network", x, c.layer_norm, c.block_depth if c.use_resnets else None)[..., 0]

    next_act = np.clip(onestep(frozen, c, batch["next_observations"], n["next_action"]), -1, 1)
    next_q = q(frozen, "target_critic", batch["next_observations"], next_act)
    next_q = next_q.min(0) if c.q_agg == "min" else next_q.mean(0)
    y = batch["rewards"] + c.discount * batch["masks"] * next_q
    values = q(p, "critic", batch["observations"], batch["actions"])
    loss = np.mean((values - y) ** 2)
    actor_loss, terms = actor_losses(
        p, frozen, c, batch, n, lambda act: q(frozen, "critic", batch["observations"], act).mean(0)
    )
    of_critic = {
        "critic_loss": loss,
        "q_mean": values.mean(),
        "q_min": values.min(),
        "q_max": values.max(),
        "target_mean": y.mean(),
    }
    return loss, actor_loss, terms | {f"critic/{name}": term for name, term in of_critic.items()}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"q_agg": "min", "discount": 0.9, "normalize_q_loss": True, "actor_layer_norm": True},
        {"layer_norm": False, "num_ensembles": 1},
        {"num_ensembles": 5, "q_agg": "min"},
        {"use_resnets": True, "block_width": 6, "block_depth": 2, "num_transformations": 2},
        {"use_resnets": True, "block_width": 5, "block_depth": 1, "num_transformations": 3, "layer_norm": False},
    ],
    ids=["published", "min-normalized", "no-norm", "ensemble", "resnet", "resnet-no-norm"],
)
def test_losses_and_gradients(settings, backend):
    check_losses(make(backend=backend, **settings), fql_losses)


def test_as_many_rows_as_members():
    """Nothing but their place tells the axes apart."""
    check_losses(make(), fql_losses, rows=2)


def test_whole_updates():
    check_updates(make(tau=0.1, lr=1e-2, value_hidden_dims=(4, 3), actor_hidden_dims=(4, 3)), fql_losses)


def test_native_networks_agree_with_plain_ones():
    """float32, where the CPU's own code runs the plain networks."""
    results = []
    for backend in (None, "reference"):
        agent = make(torch.float32, backend=backend, value_hidden_dims=(32, 32))
        g = torch.Generator().manual_seed(0)
        batch = {
            "observations": torch.randn(16, O, generator=g),
            "actions": torch.rand(16, A, generator=g) * 2 - 1,
            "next_observations": torch.randn(16, O, generator=g),
            "rewards": -torch.rand(16, generator=g),
            "masks": torch.ones(16),
        }
        results.append(torch.stack([agent.update(batch)["critic/critic_loss"] for _ in range(3)]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_residual_value_network():
    network = ff.ValueNetwork(O, A, hidden=(6,) * 5, architecture=ff.ResidualMLP(2), ensemble=None)
    field = ff.VelocityField(ff.FieldSpec(1, O + A - 2, (6,) * 5, norm="layer", architecture=ff.ResidualMLP(2)))
    with torch.no_grad():
        for ours, theirs in zip(network.network.parameter_list(), field.parameter_list(), strict=True):
            ours.copy_(theirs)
    cond, x, t = torch.randn(9, O + A - 2), torch.randn(9, 1), torch.rand(9)
    inputs = torch.cat((cond, x, t.unsqueeze(1)), 1)  # a field's order
    torch.testing.assert_close(network(inputs[:, :O], inputs[:, O:]), field(x, t, cond))
    with pytest.raises(ValueError, match=r"hidden must be 1 \+ n \* 2 equal widths"):
        ff.ValueNetwork(O, A, hidden=(6, 6), architecture=ff.ResidualMLP(2))
    with pytest.raises(TypeError, match="architecture must be MLP or ResidualMLP, got FiLMUNet"):
        ff.ValueNetwork(O, A, architecture=ff.FiLMUNet())


# environment, alpha, discount, batch_size, q_agg, alpha online
TABLE = """
antmaze-large-navigate        10    .99   256  min   10
antmaze-giant-navigate        10    .995  512  min   10
humanoidmaze-medium-navigate  30    .995  256  mean  100
humanoidmaze-large-navigate   30    .995  512  mean  40
antsoccer-arena-navigate      10    .995  256  mean  30
cube-single-play              300   .99   256  mean  300
cube-double-play              300   .99   256  mean  300
scene-play                    300   .99   256  mean  300
puzzle-3x3-play               1000  .99   256  mean  1000
puzzle-4x4-play               1000  .99   256  mean  1000
"""


def test_published_presets():
    names = set()
    for line in TABLE.strip().splitlines():
        name, alpha, discount, batch_size, q_agg, online = line.split()
        names |= {name + suffix for suffix in ("", "/online", "/resnet", "/ensemble")}
        for suffix, expected_alpha in (("", alpha), ("/online", online)):
            config = FqlConfig(**PRESETS[name + suffix])
            assert config == FqlConfig(
                alpha=float(expected_alpha), discount=float(discount), batch_size=int(batch_size), q_agg=q_agg
            ), name
    resnets = {"antmaze-giant-navigate": (10.0, 4, 2), "humanoidmaze-large-navigate": (20.0, 2, 4)}
    for name, sizes in resnets.items():
        config = FqlConfig(**PRESETS[f"{name}/resnet-published"])
        assert config.use_resnets and config.block_width == 512 and config.batch_size == 512
        assert (config.alpha, config.block_depth, config.num_transformations) == sizes
        assert config.critic_hidden == (512,) * 9
    names |= {f"{name}/resnet-published" for name in resnets}
    assert set(PRESETS) == names | {f"pointmaze-arena-demo{suffix}" for suffix in ("", "/resnet", "/ensemble")}


@pytest.mark.parametrize(
    "env, preset",
    [
        ("cube-single-play-singletask-v0", "cube-single-play"),
        ("pointmaze-arena-navigate-singletask-task1-v0", "pointmaze-arena-demo"),
        ("cube-triple-play-singletask-v0", None),
    ],
)
def test_preset_for(env, preset):
    assert preset_for(env) == preset


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"num_ensembles": 0}, ValueError, "FqlConfig: num_ensembles must be at least 1"),
        ({"value_hidden_dims": ()}, ValueError, "value_hidden_dims must name"),
        ({"use_resnets": 1}, TypeError, "use_resnets must be True or False"),
        ({"block_depth": 0}, ValueError, "block_depth must be at least 1"),
        ({"block_width": 2.0}, TypeError, "block_width must be an int"),
        ({"num_transformations": -1}, ValueError, "num_transformations must be at least 1"),
    ],
)
def test_config_errors(settings, error, message):
    with pytest.raises(error, match=message):
        FqlConfig(**settings)
