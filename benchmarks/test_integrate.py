"""The walk over K, over rows and for one row, beside what else computes it. A group is a comparison."""

from __future__ import annotations

import pytest

from benchmarks.cases import CASES, NUM_STEPS, Case
from benchmarks.conftest import DEVICE, synchronized_clock

ON_GPU = DEVICE.type == "cuda"
MODES = ["call", "graph"] if ON_GPU else ["call"]

pytestmark = pytest.mark.benchmark(timer=synchronized_clock)


def sized(name: str) -> Case:
    """The case, with few rows on a CPU, where the whole would take minutes."""
    return CASES[name] if ON_GPU else CASES[name].with_batch(min(64, CASES[name].batch))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rival", ["fused", "eager", "jax"])
@pytest.mark.parametrize("num_steps", NUM_STEPS if ON_GPU else NUM_STEPS[:5])
def test_steps(time_case, benchmark, num_steps, rival, mode):
    case = sized("walk-2x2048" if num_steps == 8 else f"walk-2x2048-k{num_steps}")
    # Padded, because groups are ordered as text.
    benchmark.group = f"walk, 2 nets x {case.rows} rows, K={num_steps:2}"
    time_case(case, rival, mode)


@pytest.mark.parametrize("num_steps", [1, 4, 8] if ON_GPU else [1, 4])
@pytest.mark.parametrize("rival", ["compile", "compile reduce-overhead", "compile max-autotune"])
def test_steps_compiled(time_case, benchmark, num_steps, rival):
    case = sized("walk-2x2048" if num_steps == 8 else f"walk-2x2048-k{num_steps}")
    benchmark.group = f"walk, 2 nets x {case.rows} rows, K={num_steps:2}"
    time_case(case, rival)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rival", ["fused", "eager", "jax"])
@pytest.mark.parametrize("name", ["walk-2x256", "walk-2x8192", "actor-walk-256", "one-row", "demo-walk"])
def test_sizes(time_case, benchmark, name, rival, mode):
    if not ON_GPU and name.startswith("walk-"):
        pytest.skip("on a CPU the walk's rows are those of test_steps")
    case = sized(name)
    benchmark.group = f"{name}, {case.rows} rows"
    time_case(case, rival, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rival", ["fused", "eager", "jax"])
@pytest.mark.parametrize("name", ["fpo-walk-2048", "fpo-plus-walk-4096", "td-walk-1024", "resnet-walk-2x2048"])
def test_papers(time_case, benchmark, name, rival, mode):
    case = sized(name)
    benchmark.group = f"{name}, {case.rows} rows"
    time_case(case, rival, mode)
