"""Every published setting of floq trains, at full width, on batches with the shapes of its real environment."""

from __future__ import annotations

import pytest
import torch

from fastflow.agents.floq import PRESETS, FloqAgent, FloqConfig

# Observations, actions and the lowest reward: facts of OGBench's tasks.
SHAPES = {
    "antmaze-large-navigate": (29, 8, -1),
    "antmaze-giant-navigate": (29, 8, -1),
    "humanoidmaze-medium-navigate": (69, 21, -1),
    "humanoidmaze-large-navigate": (69, 21, -1),
    "antsoccer-arena-navigate": (42, 8, -1),
    "cube-single-play": (28, 5, -1),
    "cube-double-play": (37, 5, -2),
    "scene-play": (40, 5, -5),
    "puzzle-3x3-play": (55, 5, -9),
    "puzzle-4x4-play": (83, 5, -16),
}


def different() -> list[str]:
    """Names of the presets, one for each setting of an environment."""
    seen, names = set(), []
    for env in SHAPES:
        for name in (env, f"{env}/best", f"{env}/online"):
            setting = (env, FloqConfig(**PRESETS[name]))
            if setting not in seen:
                seen.add(setting)
                names.append(name)
    return names


def train(name: str, updates: int, rows: int | None) -> list[dict[str, float]]:
    """Updates on one batch of `rows`, by default the preset's; their metrics."""
    obs_dim, action_dim, lowest = SHAPES[name.partition("/")[0]]
    config = FloqConfig(**PRESETS[name], precision="bf16")
    agent = FloqAgent(config, obs_dim, action_dim, (float(lowest), -1.0), seed=0)
    assert agent.reward_range == (lowest, 0)
    before = {key: value.clone() for key, value in agent.networks.named_parameters()}
    b, g = rows or config.batch_size, torch.Generator().manual_seed(0)
    batch = {
        "observations": torch.randn(b, obs_dim, generator=g),
        "actions": torch.rand(b, action_dim, generator=g) * 2 - 1,
        "next_observations": torch.randn(b, obs_dim, generator=g),
        "rewards": torch.randint(lowest, 1, (b,), generator=g).float(),
        "masks": torch.ones(b),
    }
    history = []
    for _ in range(updates):
        history.append({key: value.item() for key, value in agent.update(batch).items()})
    for key, value in agent.networks.named_parameters():
        assert value.isfinite().all() and not torch.equal(value, before[key]), key
    return history


def test_presets_with_settings_of_their_own():
    assert len(different()) == 14 and {name.partition("/")[0] for name in different()} == set(SHAPES)


@pytest.mark.parametrize("name", different())
def test_published_settings_train(name):
    """On few rows; `make test-long` takes the published batches."""
    history = train(name, 3, 16)
    assert all(torch.tensor(list(row.values())).isfinite().all() for row in history)
    assert history[-1]["actor/bc_flow_loss"] < 3


@pytest.mark.long
@pytest.mark.parametrize("name", different())
def test_published_settings_train_a_hundred_updates(name):
    history = train(name, 100, None)
    assert all(torch.tensor(list(row.values())).isfinite().all() for row in history)
    for metric in ("critic/distill_loss", "actor/bc_flow_loss"):
        begin, end = (sum(row[metric] for row in rows) / 10 for rows in (history[:10], history[-10:]))
        assert end < begin, metric
    assert all(row["critic/outside_range"] < 0.05 for row in history)
