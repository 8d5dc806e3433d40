"""FPO's objective as one call: equal to its parts, in blocks of any size, in memory that N does not raise."""

from __future__ import annotations

import copy
import math
import subprocess
import sys

import pytest
import torch

import fastflow as ff
from fastflow.kernels import cpu
from fastflow.policy_loss import flow_policy_loss, pair_losses, policy_gradients
from fastflow.surrogate import flow_log_ratio, surrogate

needs_native = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=f"no native code: {cpu.why_unavailable()}")

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
    # Native code adds up in its own order and precision; a pair's own numbers are the same bits.
    close = dict(rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.loss, expected.loss, **close)
    torch.testing.assert_close(found.log_ratio, log_ratio.detach(), **close)
    assert options.get("ratio") != "pair" or torch.equal(found.log_ratio, log_ratio)
    torch.testing.assert_close(found.ratio, expected.ratio, **close)
    assert torch.equal(found.clip_fraction, expected.clipped.float().mean())
    torch.testing.assert_close(found.flow_loss, losses.mean().detach(), **close)
    assert not any(x.requires_grad for x in found[1:])
    parameters = list(field.parameters())
    grads = [torch.autograd.grad(2 * loss, parameters) for loss in (found.loss, expected.loss)]
    for mine, theirs in zip(*grads):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def shapes(
    spec: ff.FieldSpec, rows: int, pairs: int, old_noise: float = 0.2, latest: float = 1.0, seed: int = 0, **matching
):
    """float64 inputs of the loss of a field of another spec, and the field."""
    generator = torch.Generator().manual_seed(seed)
    field = ff.VelocityField(spec)
    field.reset_parameters(generator)
    field = field.double()
    draw = {"generator": generator, "dtype": torch.float64}
    action, cond = torch.randn(rows, spec.state_dim, **draw), torch.randn(rows, spec.cond_dim, **draw)
    x_0, t = torch.randn(rows, pairs, spec.state_dim, **draw), latest * torch.rand(rows, pairs, **draw)
    with torch.no_grad():
        old = pair_losses(field, x_0, action, t, cond, **matching) + old_noise * torch.randn(rows, pairs, **draw)
    return field, x_0, action, t, cond, old, torch.randn(rows, **draw)


def single(given):
    """The same in float32."""
    field, *tensors = given
    return [copy.deepcopy(field).float(), *(x.float() for x in tensors)]


@needs_native
@pytest.mark.parametrize("ratio", ["action", "pair"])
@pytest.mark.parametrize("negative", ["clip", "aspo"])
@pytest.mark.parametrize(
    "clamps",
    [
        {},
        {"loss_clamp": 1.5, "difference_clamp": 0.2},
        {"loss_clamp": 1.5, "difference_clamp": 0.2, "straight_through": False},
        {"error": "noise", "dim_reduction": "sum", "loss_scale": 2.0},
        {"error": "endpoint", "dim_reduction": "sqrt", "difference_clamp": 0.2},
    ],
)
def test_native_gradients_err_no_more_than_pytorchs(ratio, negative, clamps):
    options = dict(ratio=ratio, negative=negative, clip=0.1, **clamps)
    matching = {k: v for k, v in clamps.items() if k in ("error", "dim_reduction", "loss_scale")}
    spec = ff.FieldSpec(3, 5, (24, 40), activation="silu", time_embedding=ff.PowerFourier(8))
    every: tuple[list, ...] = ([], [], [])
    # Several problems as one: ratios of few rows make the rounding of a single loss the error of all.
    for seed, (rows, pairs) in enumerate(((1, 1), (37, 8), (127, 4), (9, 50), (3, 100), (64, 8))):
        exact = shapes(spec, rows, pairs, seed=seed, **matching)
        mine, eager = single(exact), single(exact)
        losses = flow_policy_loss(*exact, **options).loss
        truth = torch.autograd.grad(losses, list(exact[0].parameters()))
        found = policy_gradients(*mine, **options)
        assert found is not None
        theirs = flow_policy_loss(*eager, backend="reference", **options)
        grads = torch.autograd.grad(theirs.loss, eager[0].parameter_list())
        scale = float(sum(g.square().sum() for g in truth).sqrt()) or 1.0
        for of_all, of_one in zip(every, (found.gradients, grads, truth), strict=True):
            of_all.extend(g.double() / scale for g in of_one)
        loss, other = (abs(float(x.detach()) - float(losses.detach())) for x in (found.loss, theirs.loss))
        assert loss <= 2 * other + 3e-7 * float(exact[-1].abs().mean())  # what cancels in the mean
        ratios = theirs.ratio
        told = ((found.mean, ratios.mean()), (found.largest, ratios.max()))
        for a, b in (*told, (found.divergence, (ratios - 1 - theirs.log_ratio).mean())):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert_within("gradients", *every)


def assert_within(what, found, eager, truth):
    """The error of `found` is at most twice that of `eager`, both over all tensors, but for a few units in the last
    place."""
    flat = [torch.cat([g.double().flatten() for g in grads]) for grads in (found, eager, truth)]
    mine, theirs = ((x - flat[2]).square().mean().sqrt() for x in flat[:2])
    scale = flat[2].square().mean().sqrt()
    assert mine <= 2 * theirs + 3e-7 * scale, f"{what}: {float(mine / scale):.2e} against {float(theirs / scale):.2e}"


@needs_native
@pytest.mark.parametrize("straight_through", [True, False])
@pytest.mark.parametrize("negative", ["clip", "aspo"])
def test_native_gradients_at_the_bounds_are_autograds(negative, straight_through):
    """Ratios at the bounds of the clip, differences at those of their clamp, advantages of zero."""
    spec = ff.FieldSpec(2, 3, (16,), activation="relu")
    field, x_0, action, t, cond, old, advantages = single(shapes(spec, 64, 4, old_noise=0.0))
    with torch.no_grad():
        now = pair_losses(field, x_0, action, t, cond)
    clip, limit = 0.25, 0.5
    steps = torch.tensor([0.0, limit, -limit, 2.0, -2.0, math.log(1 + clip), math.log(1 - clip), 1e-9])
    old = now + steps.repeat(64 * 4 // len(steps)).view_as(now)
    assert bool((old - now == limit).any())
    advantages[::5] = 0.0
    options = dict(
        clip=clip, negative=negative, ratio="pair", difference_clamp=limit, straight_through=straight_through
    )
    found = policy_gradients(field, x_0, action, t, cond, old, advantages, **options)
    losses = pair_losses(field, x_0, action, t, cond)
    change = flow_log_ratio(old, losses, per="pair", difference_clamp=limit, straight_through=straight_through)
    expected = surrogate(change, advantages, clip, negative)
    assert torch.equal(found.log_ratio, change)
    # torch's exponential may lie one bit beside: then a ratio at the bound is on its other side.
    same = (found.ratio > 1 + clip) == (change.exp() > 1 + clip)
    same &= (found.ratio < 1 - clip) == (change.exp() < 1 - clip)
    keep = same.all(1)
    assert int(keep.sum()) > 32
    part = [x[keep] for x in (x_0, action, t, cond, old, advantages)]
    found = policy_gradients(field, *part, **options)
    change = flow_log_ratio(
        part[4], pair_losses(field, *part[:4]), per="pair", difference_clamp=limit, straight_through=straight_through
    )
    expected = torch.autograd.grad(surrogate(change, part[5], clip, negative).loss, field.parameter_list())
    for mine, theirs in zip(found.gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


@needs_native
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "silu", "relu", "elu", "mish", "tanh"])
@pytest.mark.parametrize("norm", [None, "layer"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_first_ratios_of_every_network_are_one(activation, norm, precision):
    spec = ff.FieldSpec(3, 5, (33, 64), activation=activation, norm=norm, time_embedding=ff.PowerFourier(8))
    for pairs in (1, 5, 8):
        field, x_0, action, t, cond, _, advantages = single(shapes(spec, 127, pairs))
        with torch.no_grad():
            old = pair_losses(field, x_0, action, t, cond, precision=precision)
        found = policy_gradients(field, x_0, action, t, cond, old, advantages, clip=0.2, precision=precision)
        assert torch.equal(found.log_ratio, torch.zeros_like(found.log_ratio))
        assert [float(x) for x in (found.mean, found.largest, found.divergence, found.clip_fraction)] == [1, 1, 0, 0]
        assert float(found.loss) == pytest.approx(-float(advantages.mean()), rel=1e-5)


@needs_native
@pytest.mark.parametrize("threads", [1, 3])
def test_wide_networks_and_threads(threads):
    spec = ff.FieldSpec(2, 4, (160, 130), activation="elu", prediction="endpoint", output_scale=0.25)
    exact = shapes(spec, 300, 8, latest=0.9)
    options = dict(clip=0.1, ratio="pair")
    truth = torch.autograd.grad(flow_policy_loss(*exact, **options).loss, list(exact[0].parameters()))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = policy_gradients(*single(exact), **options)
        torch.set_num_threads(threads)
        found = policy_gradients(*single(exact), **options)
    finally:
        torch.set_num_threads(before)
    eager = single(exact)
    grads = torch.autograd.grad(
        flow_policy_loss(*eager, backend="reference", **options).loss, list(eager[0].parameters())
    )
    assert_within("gradients", found.gradients, grads, truth)
    assert all(torch.equal(a, b) for a, b in zip(found.gradients, alone.gradients, strict=True))


@needs_native
def test_numbers_that_are_not_finite_are_told():
    field, x_0, action, t, cond, old, advantages = single(shapes(ff.FieldSpec(2, 3, (16,)), 20, 4))
    for tensor in (action, old, advantages, x_0):
        kept = tensor.view(-1)[5].item()
        tensor.view(-1)[5] = math.nan
        found = policy_gradients(field, x_0, action, t, cond, old, advantages, clip=0.2)
        assert math.isnan(float(found.loss))
        assert tensor is advantages or math.isnan(float(found.largest))
        tensor.view(-1)[5] = kept


@needs_native
def test_what_native_code_leaves_to_the_parts():
    given = single(shapes(ff.FieldSpec(2, 3, (16,)), 6, 4))
    field, x_0, action, t, cond, old, advantages = given
    assert policy_gradients(*given, clip=0.2) is not None
    assert policy_gradients(*given, clip=0.2, backend="reference") is None
    assert policy_gradients(*given, clip=0.2, negative="huber") is None
    assert policy_gradients(*shapes(ff.FieldSpec(2, 3, (16,)), 6, 4), clip=0.2) is None
    with torch.no_grad():
        assert policy_gradients(*given, clip=0.2) is None
    wanted = (field, x_0, action, t, cond.clone().requires_grad_(), old, advantages)
    assert policy_gradients(*wanted, clip=0.2) is None
    (grad,) = torch.autograd.grad(flow_policy_loss(*wanted, clip=0.2).loss, wanted[4])
    assert grad.shape == cond.shape
    many = single(shapes(ff.FieldSpec(2, 3, (16,)), 2, 300))
    assert policy_gradients(*many, clip=0.2) is None
    assert flow_policy_loss(*many, clip=0.2).loss.requires_grad


@needs_native
def test_second_derivatives_are_refused():
    given = single(shapes(ff.FieldSpec(2, 3, (16,)), 6, 4))
    (grad, *_) = torch.autograd.grad(
        flow_policy_loss(*given, clip=0.2).loss, given[0].parameter_list(), create_graph=True
    )
    with pytest.raises(RuntimeError, match="second derivatives do not go through the fused operators"):
        grad.sum().backward()


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
