"""Clipped objectives against closed forms, and what a flow's ratio is made of."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastflow.surrogate import advantages_for, clamp, flow_log_ratio, surrogate

CLIP = 0.2
RATIOS = [0.3, 0.79, 0.81, 1.0, 1.19, 1.21, 3.0]


def losses(rows=5, pairs=4, seed=0, scale=1.0):
    source = torch.Generator().manual_seed(seed)
    return scale * torch.rand(rows, pairs, generator=source, dtype=torch.float64)


def both(ratio: float, advantage: float, negative: str) -> tuple[float, float]:
    """The gain of one ratio, and its derivative by the ratio, from `surrogate`."""
    x = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    found = surrogate(x, torch.tensor([advantage], dtype=torch.float64), CLIP, negative)
    (grad,) = torch.autograd.grad(found.loss, x)
    return -float(found.loss.detach()), -float(grad) / ratio


# The flow's ratio


def test_log_ratio_per_action_is_the_mean_of_those_per_pair():
    old, new = losses(seed=1), losses(seed=2)
    pair, action = (flow_log_ratio(old, new, per=per) for per in ("pair", "action"))
    assert (pair.shape, action.shape) == ((5, 4), (5, 1))
    for i in range(5):
        for j in range(4):
            assert float(pair[i, j]) == float(old[i, j]) - float(new[i, j])
        assert float(action[i]) == pytest.approx(sum(pair[i].tolist()) / 4, rel=1e-14)


@pytest.mark.parametrize("per", ["action", "pair"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clamps", [{}, {"loss_clamp": 0.5}, {"difference_clamp": 1e-3, "straight_through": False}])
def test_log_ratio_of_equal_losses_is_zero_to_the_last_bit(per, dtype, clamps):
    old = losses(127, 7, scale=1e3).to(dtype)
    found = flow_log_ratio(old, old.clone().requires_grad_(), per=per, **clamps)
    assert torch.equal(found, torch.zeros_like(found))


@pytest.mark.parametrize("straight", [True, False])
def test_clamps_of_losses_and_differences(straight):
    old = torch.tensor([[30.0, 1.0, 5.0, 1.0]], dtype=torch.float64)
    new = torch.tensor([[1.0, 30.0, 4.5, 8.0]], dtype=torch.float64, requires_grad=True)
    found = flow_log_ratio(old, new, per="pair", loss_clamp=20.0, difference_clamp=10.0, straight_through=straight)
    assert found.tolist() == [[10.0, -10.0, 0.5, -7.0]]
    (grad,) = torch.autograd.grad(found.sum(), new)
    assert grad.tolist() == [[-1.0] * 4 if straight else [0.0, 0.0, -1.0, -1.0]]


def test_a_clamp_that_cuts_nothing_off_leaves_the_last_bit():
    x = losses(scale=0.1).float().requires_grad_()
    y = clamp(x, -1.0, 1.0, straight_through=True)
    assert torch.equal(y, x)
    (grad,) = torch.autograd.grad((3 * y).sum(), x)
    assert torch.equal(grad, torch.full_like(grad, 3.0))


# The objective


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_clipped_objective_is_ppos(ratio, advantage):
    gain, slope = both(ratio, advantage, "clip")
    if advantage > 0:
        kept, held = ratio <= 1 + CLIP, 1 + CLIP
    else:
        kept, held = ratio >= 1 - CLIP, 1 - CLIP
    assert gain == pytest.approx(advantage * (ratio if kept else held), rel=1e-12)
    # d gain / d log rho = rho A where unclipped; here by rho.
    assert slope == pytest.approx(advantage if kept else 0.0, rel=1e-12)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_aspo_pulls_back_where_the_clip_lets_go(ratio, advantage):
    gain, slope = both(ratio, advantage, "aspo")
    if advantage > 0:
        assert (gain, slope) == both(ratio, advantage, "clip")
        return
    assert gain == pytest.approx(ratio * advantage - abs(advantage) / (2 * CLIP) * (ratio - 1) ** 2, rel=1e-12)
    assert slope == pytest.approx(-abs(advantage) * (1 + (ratio - 1) / CLIP), rel=1e-9)
    # Down to 1 - clip it pushes the action away, below it pulls it back; it never lets go.
    assert (slope > 0) == (ratio < 1 - CLIP)


@pytest.mark.parametrize("negative", ["clip", "aspo"])
@pytest.mark.parametrize("pairs", [1, 3])
def test_gradcheck(negative, pairs):
    source = torch.Generator().manual_seed(0)
    # Away from the kinks at log(1 - clip) and log(1 + clip).
    values = torch.tensor([-1.0, -0.4, -0.1, 0.02, 0.1, 0.4, 1.0], dtype=torch.float64)
    x = values[torch.randint(7, (6, pairs), generator=source)].requires_grad_()
    advantages = torch.randn(6, generator=source, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: surrogate(x, advantages, CLIP, negative).loss, x)


@pytest.mark.parametrize("negative", ["clip", "aspo"])
def test_at_the_old_losses_pairs_and_actions_have_the_same_gradient(negative):
    source = torch.Generator().manual_seed(0)
    advantages, old = torch.randn(5, generator=source, dtype=torch.float64), losses()
    grads = []
    for per in ("action", "pair"):
        new = old.clone().requires_grad_()
        loss = surrogate(flow_log_ratio(old, new, per=per), advantages, CLIP, negative).loss
        grads.extend(torch.autograd.grad(loss, new))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-14, atol=0)
    # rho A / N of the paper, over B rows.
    torch.testing.assert_close(grads[0], (advantages / (5 * 4)).unsqueeze(1).expand(5, 4), rtol=1e-14, atol=0)


@given(log_ratio=st.floats(-3, 3), advantage=st.floats(-5, 5), clip=st.floats(0.01, 0.9), aspo=st.sampled_from([0, 1]))
def test_objective_is_never_above_the_unclipped_one(log_ratio, advantage, clip, aspo):
    found = surrogate(
        torch.tensor([[log_ratio]], dtype=torch.float64),
        torch.tensor([advantage], dtype=torch.float64),
        clip,
        ("clip", "aspo")[aspo],
    )
    assert -float(found.loss) <= math.exp(log_ratio) * advantage * (1 + 1e-12 * math.copysign(1, advantage))
    assert bool(found.clipped) == (abs(math.exp(log_ratio) - 1) > clip)


def test_ratio_and_clipped_are_told_without_gradient():
    x = torch.tensor([[0.0, 1.0], [-1.0, 0.05]], requires_grad=True)
    found = surrogate(x, torch.ones(2), CLIP)
    assert not found.ratio.requires_grad
    assert found.clipped.tolist() == [[False, True], [True, False]]
    torch.testing.assert_close(found.ratio, x.detach().exp())


# Advantages


def test_advantages():
    a = torch.tensor([3.0, -1.0, 4.0, 1.0, -5.0], dtype=torch.float64)
    normal = advantages_for(a, normalize=True)
    mean = sum(a.tolist()) / 5
    std = math.sqrt(sum((x - mean) ** 2 for x in a.tolist()) / 4)
    assert normal.tolist() == pytest.approx([(x - mean) / std for x in a.tolist()], rel=1e-6)
    positive = advantages_for(a, normalize=True, positive=True)
    assert positive.tolist() == pytest.approx([math.log1p(math.exp(x)) for x in normal.tolist()], rel=1e-6)
    assert torch.equal(advantages_for(a, normalize=False), a)
    assert advantages_for(a, normalize=False, limit=2.0).tolist() == [2.0, -1.0, 2.0, 1.0, -2.0]


@pytest.mark.parametrize("rows", [1, 4])
def test_equal_advantages_stay_finite(rows):
    assert advantages_for(torch.full((rows,), 3.0), normalize=True).tolist() == [0.0] * rows


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flow_log_ratio(torch.zeros(2, 3), torch.zeros(2, 4)), r"\[2, 3\] and \[2, 4\]"),
        (lambda: flow_log_ratio(torch.zeros(2), torch.zeros(2)), r"expected old and new as \[B, N\], got \[2\]"),
        (lambda: flow_log_ratio(torch.zeros(2, 3), torch.zeros(2, 3), per="row"), "per must be 'action' or 'pair'"),
        (lambda: surrogate(torch.zeros(2, 3), torch.zeros(3), 0.2), r"advantages \[B\], got \[2, 3\] and \[3\]"),
        (lambda: surrogate(torch.zeros(2), torch.zeros(2), 0.2), r"log_ratio \[B, N\]"),
        (lambda: surrogate(torch.zeros(2, 3), torch.zeros(2), 0.2, "spo"), "negative must be 'clip' or 'aspo'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
