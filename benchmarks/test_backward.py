"""The walk and its gradients, to cond alone or to all parameters too, beside what else computes them."""

from __future__ import annotations

import pytest

from benchmarks.cases import CASES
from benchmarks.conftest import DEVICE, synchronized_clock

ON_GPU = DEVICE.type == "cuda"

pytestmark = pytest.mark.benchmark(timer=synchronized_clock)


@pytest.mark.parametrize("mode", ["call", "graph"] if ON_GPU else ["call"])
@pytest.mark.parametrize("rival", ["fused", "eager", "jax"])
@pytest.mark.parametrize("name", ["walk-to-actions-2x2048", "walk-backward-2x2048"])
def test_walk(time_case, benchmark, name, rival, mode):
    case = CASES[name] if ON_GPU else CASES[name].with_batch(64)
    benchmark.group = f"{name}, {case.rows} rows"
    time_case(case, rival, mode)


@pytest.mark.parametrize("rival", ["compile", "compile reduce-overhead", "compile max-autotune"])
def test_walk_compiled(time_case, benchmark, rival):
    if not ON_GPU:
        pytest.skip("eight steps and their gradients take torch.compile long on a CPU")
    benchmark.group = "walk-backward-2x2048, 2048 rows"
    time_case(CASES["walk-backward-2x2048"], rival)
