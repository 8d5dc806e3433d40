"""Training through the kernels is training through the reference: the same losses, update for update."""

from __future__ import annotations

import pytest
import torch
from conftest import HAS_GPU, assert_close_rms

from fastflow.agents import floq

pytest.importorskip("triton")

CONFIG = dict(
    batch_size=8,
    noise_samples=2,
    critic_flow_steps=3,
    flow_steps=2,
    block_width=16,
    block_depth=2,
    value_hidden_dims=(16,),
    actor_hidden_dims=(16, 16),
    lr=1e-3,
    tau=0.05,
    precision="fp32",
)


def losses(backend: str, device: torch.device, updates: int) -> torch.Tensor:
    """[updates, 4]: floq's loss, the distilled critic's, the behaviour-cloning flow's and the one-step actor's."""
    config = floq.FloqConfig(backend=backend, **CONFIG)
    agent = floq.FloqAgent(config, obs_dim=3, action_dim=2, reward_range=(-1.0, 0.0), device=device, seed=0)
    generator = torch.Generator().manual_seed(1)
    history = []
    for _ in range(updates):
        batch = {
            "observations": torch.randn(8, 3, generator=generator),
            "actions": torch.rand(8, 2, generator=generator) * 2 - 1,
            "next_observations": torch.randn(8, 3, generator=generator),
            "rewards": -torch.ones(8),
            "masks": torch.ones(8),
        }
        metrics = agent.update({name: x.to(device) for name, x in batch.items()})
        names = ("critic/floq_loss", "critic/distill_loss", "actor/bc_flow_loss", "actor/distill_loss")
        history.append(torch.stack([metrics[name] for name in names]).cpu())
    return torch.stack(history)


@pytest.mark.slow
def test_many_updates_give_the_same_losses(device):
    # An interpreted update, all of whose networks run by kernels, takes seconds.
    updates = 100 if HAS_GPU else 24
    fused, reference = (losses(backend, device, updates) for backend in ("fused", "reference"))
    some = updates // 5
    assert reference[-some:, 2].mean() < reference[:some, 2].mean()  # it does learn: behaviour cloning's loss falls
    for i, name in enumerate(("floq", "distilled critic", "behaviour cloning", "one-step actor")):
        # Rounding differences of one update, about 1e-6, grow.
        assert_close_rms(name, fused[:, i], reference[:, i], 1e-3)
        assert_close_rms(f"{name}, first update", fused[0, i], reference[0, i], 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("precision, ratio", [("tf32", 2e-2), ("bf16", 1e-1)])
def test_tensor_core_training_stays_close(precision, ratio, device, monkeypatch):
    reference = losses("reference", device, 100)
    monkeypatch.setitem(CONFIG, "precision", precision)
    for i, name in enumerate(("floq", "distilled critic", "behaviour cloning", "one-step actor")):
        assert_close_rms(name, losses("fused", device, 100)[:, i], reference[:, i], ratio)
