"""From walks to targets: native code against plain PyTorch, in float64 and where numbers are not finite."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastflow.agents.backup import Backup
from fastflow.kernels import cpu, launch

RUNNERS = [
    pytest.param("native", marks=pytest.mark.skipif(cpu.why_unavailable() is not None, reason="no native code")),
    pytest.param("triton", marks=pytest.mark.skipif(not launch.HAS_TRITON, reason="no triton")),
]
needs_native = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=f"no native code: {cpu.why_unavailable()}")
RULES = [
    dict(q_agg=q_agg, backup=backup, critic_target=target)
    for q_agg, backup, target in itertools.product(
        ("mean", "min"), ("expected", "distributional"), ("policy", "data", "returns")
    )
]


def make(**rule):
    return Backup(**rule, discount=0.97, target_noise=0.5, value_range=(-2.0, 1.0))


def problem(e, b, s, dtype=torch.float32, device="cpu"):
    draw = {"generator": torch.Generator().manual_seed(b), "dtype": torch.float64}
    target_q, q = (torch.randn(e, b, s, **draw) for _ in range(2))
    batch = {"rewards": torch.randn(b, **draw), "masks": (torch.rand(b, **draw) > 0.3).to(torch.float64)}
    batch["returns"] = torch.randn(b, **draw)
    noise = torch.randn(b, **draw)
    to = {"dtype": dtype, "device": device}
    return (target_q.to(**to), q.to(**to), {key: x.to(**to) for key, x in batch.items()}, noise.to(**to))


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(rule.values()))
@pytest.mark.parametrize("sizes", [(2, 256, 1), (1, 1, 1), (3, 37, 8), (2, 2, 2)])
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("clip", [None, (-0.4, 0.3)])
def test_targets_are_those_of_pytorch(rule, sizes, noisy, clip, runner, device):
    if runner == "native" and device.type != "cpu":
        pytest.skip("native code is the CPU's")
    backup = make(**rule, clip=clip)
    *given, noise = problem(*sizes, device=device)
    *exact, noise_64 = problem(*sizes, torch.float64, device)
    found = backup(*given, noise if noisy else None, runner)
    eager = backup(*given, noise if noisy else None, None)
    truth = backup(*exact, noise_64 if noisy else None, None)
    assert list(found.metrics) == list(eager.metrics)
    for mine, theirs, expected in zip(flat(found), flat(eager), flat(truth), strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        error, other = ((x.double() - expected).abs().max() for x in (mine, theirs))
        assert error <= 2 * other + 3e-7 * expected.abs().max()


def flat(found):
    return [found.target, found.value, *found.metrics.values()]


# Numpy, which interprets kernels, warns where infinities cancel.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rule", RULES[:4], ids=lambda rule: "-".join(rule.values()))
@pytest.mark.parametrize("where", ["target_q", "q"])
@pytest.mark.parametrize("clip", [None, (-0.4, 0.3)])
def test_numbers_that_are_not_finite_are_told_alike(bad, rule, where, clip, runner, device):
    if runner == "native" and device.type != "cpu":
        pytest.skip("native code is the CPU's")
    target_q, q, batch, noise = problem(2, 5, 3, device=device)
    (target_q if where == "target_q" else q)[1, 2, 1] = bad
    backup = make(**rule, clip=clip)
    for mine, theirs in zip(
        flat(backup(target_q, q, batch, noise, runner)), flat(backup(target_q, q, batch, noise, None)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


@needs_native
def test_what_native_code_does_not_cover_is_plain_pytorchs(monkeypatch):
    from fastflow.agents import backup as module

    called = []
    native = module.call
    monkeypatch.setattr(module, "call", lambda *a: called.append(1) or native(*a))
    rule = make(**RULES[0])
    rule(*problem(2, 4, 3, torch.float64), "native")
    target_q, q, batch, noise = problem(2, 4, 3)
    rule(target_q, q, {key: x.clone().requires_grad_() for key, x in batch.items()}, noise, "native")
    assert not called
    rule(target_q, q, batch, noise, "native")
    assert called == [1]
