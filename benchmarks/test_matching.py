"""The losses and the gradients of all parameters, beside what else computes them."""

from __future__ import annotations

import pytest

from benchmarks.cases import CASES
from benchmarks.conftest import DEVICE, synchronized_clock

ON_GPU = DEVICE.type == "cuda"

pytestmark = pytest.mark.benchmark(timer=synchronized_clock)


@pytest.mark.parametrize("mode", ["call", "graph"] if ON_GPU else ["call"])
@pytest.mark.parametrize("rival", ["fused", "eager", "jax"])
@pytest.mark.parametrize("name", ["loss-2x2048", "actor-loss-256", "demo-loss", "fpo-loss-30720x8", "td-loss-1024"])
def test_loss(time_case, benchmark, name, rival, mode):
    case = CASES[name] if ON_GPU else CASES[name].with_batch(min(32, CASES[name].batch))
    benchmark.group = f"{name} with gradients, {case.rows} rows"
    time_case(case, rival, mode)


@pytest.mark.parametrize("rival", ["compile", "compile reduce-overhead", "compile max-autotune"])
@pytest.mark.parametrize("name", ["loss-2x2048"] if ON_GPU else ["demo-loss"])
def test_loss_compiled(time_case, benchmark, name, rival):
    case = CASES[name] if ON_GPU else CASES[name].with_batch(min(32, CASES[name].batch))
    benchmark.group = f"{name} with gradients, {case.rows} rows"
    time_case(case, rival)
