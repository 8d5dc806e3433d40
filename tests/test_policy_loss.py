"""FPO's objective as one call: equal to its parts, in blocks of any size, in memory that N does not raise."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fastflow as ff
from fastflow.policy_loss import flow_policy_loss, pair_losses
from fastflow.surrogate import flow_log_ratio, surrogate

OPTIONS = (
    {},
    {"ratio": "pair", "negative": "aspo", "dim_reduction": "sqrt", "difference_clamp": 0.05},
    {"error": "noise", "loss_scale": 3.0, "loss_clamp": 2.0, "straight_through": False},
)


def problem(rows: int, pairs: int, dtype: torch.dtype = torch.float32, philox: bool = False):
    generator = torch.Generator().manual_seed(0)
    field = ff.VelocityField(ff.FieldSpec(3, 5, (16, 16), activation="silu", time_embedding=ff.PowerFourier(8)))
    field.reset_parameters(generator)
    field = field.to(dtype)
    draw = {"generator": generator, "dtype": dtype}
    action, cond = torch.randn(rows, 3, **draw), torch.randn(rows, 5, **draw)
    x_0, t = torch.randn(rows, pairs, 3, **draw), torch.rand(rows, pairs, **draw)
    if philox:
        x_0, t = ff.PhiloxNoise(torch.tensor(7), torch.arange(rows), pairs), None
    with torch.no_grad():
        old = pair_losses(field, x_0, action, t, cond)
        # Ratios that are not 1, some of them clipped.
        old += 0.2 * torch.randn(rows, pairs, **draw)
    return field, x_0, action, t, cond, old, torch.randn(rows, **draw)


@pytest.mark.parametrize("philox", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("rows", "pairs"), [(1, 1), (3, 8), (127, 5)])
def test_one_call_is_its_parts(rows, pairs, options, philox):
    field, x_0, action, t, cond, old, advantages = given = problem(rows, pairs, philox=philox)
    found = flow_policy_loss(*given, clip=0.1, **options)
    matching = {k: v for k, v in options.items() if k in ("error", "dim_reduction", "loss_scale")}
    ratios = {k: v for k, v in options.items() if k in ("loss_clamp", "difference_clamp", "straight_through")}
    losses = pair_losses(field, x_0, action, t, cond, **matching)
    log_ratio = flow_log_ratio(old, losses, per=options.get("ratio", "action"), **ratios)
    expected = surrogate(log_ratio, advantages, 0.1, options.get("negative", "clip"))
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.log_ratio, log_ratio)
    assert torch.equal(found.ratio, expected.ratio)
    assert torch.equal(found.clip_fraction, expected.clipped.float().mean())
    assert torch.equal(found.flow_loss, losses.mean())


@pytest.mark.parametrize("philox", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("max_pairs", [1, 40, 333])
def test_blocks_change_nothing_but_the_order_of_sums(max_pairs, options, philox):
    given = problem(127, 5, philox=philox)
    parameters = list(given[0].parameters())
    whole = flow_policy_loss(*given, clip=0.1, **options)
    blocks = flow_policy_loss(*given, clip=0.1, max_pairs=max_pairs, **options)
    assert torch.equal(blocks.log_ratio, whole.log_ratio)
    assert torch.equal(blocks.ratio, whole.ratio)
    torch.testing.assert_close(blocks[0], whole[0])
    torch.testing.assert_close(torch.stack(blocks[3:]), torch.stack(whole[3:]))
    for a, b in zip(torch.autograd.grad(3 * blocks.loss, parameters), torch.autograd.grad(3 * whole.loss, parameters)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(flow_policy_loss(*given, clip=0.1, max_pairs=max_pairs, **options).loss, whole.loss)


def test_float64_blocks_equal_the_whole_closely():
    given = problem(31, 4, torch.float64)
    parameters = list(given[0].parameters())
    whole, blocks = (flow_policy_loss(*given, clip=0.1, max_pairs=n) for n in (1000, 8))
    grads = zip(torch.autograd.grad(whole.loss, parameters), torch.autograd.grad(blocks.loss, parameters))
    for a, b in grads:
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_bad_input_is_named():
    field, x_0, action, t, cond, old, advantages = problem(4, 2)
    with pytest.raises(ValueError, match="max_pairs must be at least 1, got 0"):
        flow_policy_loss(field, x_0, action, t, cond, old, advantages, clip=0.1, max_pairs=0)
    with pytest.raises(ValueError, match=r"expected old \[4, N\] and advantages \[4\]"):
        flow_policy_loss(field, x_0, action, t, cond, old[:3], advantages, clip=0.1)
    with pytest.raises(ValueError, match="negative must be"):
        flow_policy_loss(field, x_0, action, t, cond, old, advantages, clip=0.1, negative="huber")
    with pytest.raises(ValueError, match="per must be"):
        flow_policy_loss(field, x_0, action, t, cond, old, advantages, clip=0.1, ratio="both")


_PEAK = """
import resource, sys, torch
import fastflow as ff
from fastflow.policy_loss import flow_policy_loss, pair_losses
pairs = int(sys.argv[1])
torch.set_num_threads(1)
rows, width = 2048, 256
field = ff.VelocityField(ff.FieldSpec(6, 17, (width,) * 3, activation="silu"))
action, cond, advantages = torch.randn(rows, 6), torch.randn(rows, 17), torch.randn(rows)
def call(pairs):
    noise = ff.PhiloxNoise(torch.tensor(0), torch.arange(rows), pairs)
    with torch.no_grad():
        old = pair_losses(field, noise, action, None, cond, max_pairs=8192)
    flow_policy_loss(field, noise, action, None, cond, old, advantages, clip=0.1, max_pairs=8192).loss.backward()
call(4)  # libraries and buffers
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
call(pairs)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_losses_without_gradient_come_in_blocks():
    field, x_0, action, t, cond, *_ = problem(31, 4, philox=True)
    with torch.no_grad():
        whole, blocks = (pair_losses(field, x_0, action, t, cond, max_pairs=n) for n in (1000, 7))
    assert torch.equal(whole, blocks)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux alone")
def test_peak_memory_does_not_grow_with_pairs():
    def growth(pairs: int) -> int:
        found = subprocess.run([sys.executable, "-c", _PEAK, str(pairs)], capture_output=True, text=True, check=True)
        return int(found.stdout)

    # What may grow are a few numbers per pair; what the pairs' hidden layers hold would be four times as much as this.
    activations = (64 - 4) * 2048 * 3 * 256 * 4
    assert growth(64) < activations / 4
