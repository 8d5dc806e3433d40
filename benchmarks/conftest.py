"""pytest-benchmark done for devices that work while the clock runs: a synchronising timer, facts about the machine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import machine
from benchmarks.cases import Case
from benchmarks.measure import Timer
from benchmarks.rivals import FUSED_TIMES, RIVAL_TIMES, RIVALS, Skipped, check, global_precision, graphed

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TIMER = Timer(DEVICE)


def synchronized_clock() -> float:
    """`time.perf_counter` once the device is idle: a clock that does not wait times launches, not work."""
    TIMER.synchronize()
    return time.perf_counter()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["fastflow"] = {**machine.facts(DEVICE), "clocks": machine.clocks(DEVICE)}


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return DEVICE


@pytest.fixture
def precision() -> str:
    """Of matrix products: bf16 on a GPU, fp32 on a CPU."""
    return "bf16" if DEVICE.type == "cuda" else "fp32"


def run(benchmark: Any, call: Callable[[], Any]) -> None:
    """Time `call` in rounds of as many calls as the clock needs."""
    # Two calls compile and record whatever there is to compile and record, the third is an estimate.
    for _ in range(2):
        call()
    began = synchronized_clock()
    call()
    once = synchronized_clock() - began
    slow = DEVICE.type == "cpu"
    rounds, least = (7, 0.02) if slow else (31, 0.01)
    benchmark.pedantic(call, rounds=rounds, iterations=max(1, min(1000, round(least / once))), warmup_rounds=1)


@pytest.fixture
def time_case(benchmark: Any, precision: str) -> Callable[[Case, str, str], None]:
    """Check one rival on one case, then time it: "call" is what a caller pays, "graph" the replay of a CUDA graph."""

    def measure(case: Case, rival: str, mode: str = "call") -> None:
        problem = case.build(DEVICE)
        torch.compiler.reset()
        with global_precision(precision), contextlib.ExitStack() as stack:
            stack.callback(torch.compiler.reset)
            try:
                variant = RIVALS[rival](problem, precision)
                variant = variant if mode == "call" else graphed(problem, variant)
                verdict = check(problem, variant, precision)
            except Skipped as reason:
                pytest.skip(str(reason))
            assert verdict.within(FUSED_TIMES if rival == "fused" else RIVAL_TIMES), verdict
            benchmark.extra_info.update(
                case=case.name,
                title=case.title,
                rows=case.rows,
                num_steps=case.num_steps,
                precision=precision,
                flops=case.flops,
                bytes=case.bytes,
                errors=verdict.errors,
                eager_errors=verdict.eager,
            )
            if DEVICE.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                variant.call()
                benchmark.extra_info["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
            # JAX runs on streams of its own, which the clock does not see.
            finish = variant.finish
            run(benchmark, variant.call if finish is None else lambda: finish(variant.call()))

    return measure
