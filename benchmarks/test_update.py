"""Whole updates of floq, fused and by the reference."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.cases import UPDATES
from benchmarks.conftest import DEVICE, run, synchronized_clock
from benchmarks.rivals import global_precision

ON_GPU = DEVICE.type == "cuda"

pytestmark = pytest.mark.benchmark(timer=synchronized_clock)


@pytest.mark.parametrize("rival", ["fused", "eager"])
@pytest.mark.parametrize("name", UPDATES if ON_GPU else ["update-demo"])
def test_update(benchmark, precision, name, rival):
    case = UPDATES[name]
    benchmark.group = name
    benchmark.extra_info.update(title=case.title, flops=case.flops, precision=precision)
    backends = {"fused": "fused" if ON_GPU else "auto", "eager": "reference"}
    batches = case.batches(DEVICE)
    with global_precision(precision):
        losses = {}
        for key in ("eager", rival):
            agent = case.agent(DEVICE, backends[key], precision)
            losses[key] = {name: float(value) for name, value in agent.update(batches[0]).items()}
        for key in ("critic/critic_loss", "actor/actor_loss"):
            tolerance = 0.02 if precision == "bf16" else 0.005
            assert losses[rival][key] == pytest.approx(losses["eager"][key], rel=tolerance), key
        turn = itertools.cycle(batches)
        run(benchmark, lambda: agent.update(next(turn)))
    if benchmark.stats is not None:
        benchmark.extra_info["updates_per_second"] = 1 / benchmark.stats.stats.median
