"""FQL-IQN against `fql_statement`, and its loss against what it must lead to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fql_statement import SMALL, A, O, actor_losses, check_losses, check_updates, dense_stack, onestep

from fastflow.agents import fql
from fastflow.agents.fql_iqn import PRESETS, FqlIqnAgent, FqlIqnConfig, preset_for, quantile_loss

TINY = {**SMALL, "num_quantiles": 3, "quantile_embed_dim": 4}


def make(dtype=torch.float64, **settings):
    return FqlIqnAgent(FqlIqnConfig(**{**TINY, **settings}), O, A, (-2.0, 0.0), seed=3, dtype=dtype)


def iqn_losses(p, frozen, c, batch, n):
    def z(p, net, obs, act, tau):  # [E, B, N]
        rows, levels = tau.shape
        beside = np.concatenate([obs, act], -1)
        beside = np.broadcast_to(beside[:, None], (rows, levels, beside.shape[-1]))
        features = np.cos(np.pi * tau[..., None] * np.arange(1, c.quantile_embed_dim + 1))
        x = np.concatenate([beside, features], -1)
        x = np.broadcast_to(x, (c.num_ensembles, *x.shape))
        return dense_stack(p, f"{net}.network", x, c.layer_norm)[..., 0]

    obs, act, next_obs = batch["observations"], batch["actions"], batch["next_observations"]
    next_act = np.clip(onestep(frozen, c, next_obs, n["next_action"]), -1, 1)
    next_z = z(frozen, "target_critic", next_obs, next_act, n["next_tau"])
    next_z = next_z.min(0) if c.q_agg == "min" else next_z.mean(0)
    y = batch["rewards"][:, None] + c.discount * batch["masks"][:, None] * next_z
    values = z(p, "critic", obs, act, n["tau"])
    loss = 0.0
    for e, b, i in np.ndindex(values.shape):
        for target in y[b]:
            u = target - values[e, b, i]
            rho = u**2
            if c.quantile_loss == "huber":
                rho = u**2 / 2 if abs(u) <= c.kappa else c.kappa * (abs(u) - c.kappa / 2)
            loss += abs(n["tau"][b, i] - (u < 0)) * rho / c.kappa
    loss /= values.size * y.shape[1]
    actor_loss, terms = actor_losses(
        p, frozen, c, batch, n, lambda act: z(frozen, "critic", obs, act, n["value_tau"]).mean((0, 2))
    )
    q = values.mean(-1)
    of_critic = {
        "critic_loss": loss,
        "q_mean": q.mean(),
        "q_min": q.min(),
        "q_max": q.max(),
        "q_std": values.std(-1).mean(),
        "target_mean": y.mean(),
    }
    return loss, actor_loss, terms | {f"critic/{name}": term for name, term in of_critic.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"q_agg": "min", "discount": 0.9, "kappa": 0.5},
        {"quantile_loss": "huber", "kappa": 0.4, "num_ensembles": 3},
        {"layer_norm": False, "num_quantiles": 1, "normalize_q_loss": True},
    ],
    ids=["published", "min", "huber", "one-level"],
)
def test_losses_and_gradients(settings):
    check_losses(make(**settings), iqn_losses)


def test_as_many_rows_as_members_and_levels():
    """Nothing but their place tells the axes apart."""
    check_losses(make(num_quantiles=2), iqn_losses, rows=2)


def test_whole_updates():
    settings = {"value_hidden_dims": (4, 3), "actor_hidden_dims": (4, 3), "num_quantiles": 2, "quantile_embed_dim": 2}
    check_updates(make(tau=0.1, lr=1e-2, **settings), iqn_losses)


def test_loss_of_given_numbers():
    quantiles, targets = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    tau = torch.tensor([[0.25, 0.5]])
    # u = [[-1, 3], [-2, 2]]
    squared = (0.75 * 1 + 0.25 * 9 + 0.5 * 4 + 0.5 * 4) / 4
    torch.testing.assert_close(quantile_loss(quantiles, targets, tau), torch.tensor(squared))
    torch.testing.assert_close(quantile_loss(quantiles, targets, tau, kappa=2.0), torch.tensor(squared / 2))
    huber = (0.75 * 0.5 + 0.25 * 2.5 + 0.5 * 1.5 + 0.5 * 1.5) / 4
    torch.testing.assert_close(quantile_loss(quantiles, targets, tau, 1.0, "huber"), torch.tensor(huber))


@pytest.mark.parametrize("kind, kappa", [("huber", 1e-3), ("squared", 1.0)])
def test_minimum_is_the_quantile_or_the_expectile(kind, kappa):
    """Of the uniform distribution: the level itself; for squared errors sqrt(tau) / (sqrt(tau) + sqrt(1 - tau))."""
    tau = torch.tensor([[0.1, 0.3, 0.5, 0.9]], dtype=torch.float64)
    targets = ((torch.arange(2000, dtype=torch.float64) + 0.5) / 2000).unsqueeze(0)
    quantiles = torch.full_like(tau, 0.5).requires_grad_()
    optimizer = torch.optim.LBFGS([quantiles], max_iter=100, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        loss = quantile_loss(quantiles, targets, tau, kappa, kind)
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = tau if kind == "huber" else tau.sqrt() / (tau.sqrt() + (1 - tau).sqrt())
    torch.testing.assert_close(quantiles.detach(), expected, rtol=0, atol=2e-3)


def test_presets_are_fql_s():
    for name, settings in PRESETS.items():
        config = FqlIqnConfig(**settings)
        other = fql.FqlConfig(**fql.PRESETS[name])
        for field in ("alpha", "discount", "batch_size", "q_agg", "lr", "tau", "value_hidden_dims"):
            assert getattr(config, field) == getattr(other, field), name
        assert (config.num_quantiles, config.quantile_embed_dim, config.kappa) == (8, 64, 1.0)
        assert config.quantile_loss == "squared"
    assert len(PRESETS) == 11
    # The one published command.
    assert PRESETS["antmaze-giant-navigate"] == {"alpha": 10.0, "discount": 0.995, "batch_size": 512, "q_agg": "min"}
    assert preset_for("antmaze-giant-navigate-singletask-v0") == "antmaze-giant-navigate"
    assert preset_for("pointmaze-arena-navigate-singletask-v0") == "pointmaze-arena-demo"
    assert preset_for("pointmaze-large-navigate-singletask-v0") is None


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"num_ensembles": 0}, ValueError, "FqlIqnConfig: num_ensembles must be at least 1"),
        ({"num_quantiles": 0}, ValueError, "num_quantiles must be at least 1"),
        ({"quantile_embed_dim": 1.0}, TypeError, "quantile_embed_dim must be an int"),
        ({"kappa": 0.0}, ValueError, "kappa must be a positive number"),
        ({"quantile_loss": "pinball"}, ValueError, "quantile_loss must be one of"),
        ({"value_hidden_dims": 64}, TypeError, "value_hidden_dims must be a tuple"),
    ],
)
def test_config_errors(settings, error, message):
    with pytest.raises(error, match=message):
        FqlIqnConfig(**settings)
