"""python -m benchmarks.overhead: what a module costs around its operator, for one row on a CPU, without gradient.

Entrants of a module take turns: the module as it is called; `fastflow.integrate` on the tensors that it would make; the
operator itself on tensors that are ready, which is the walk and its allocations; a frozen copy. The overhead of the
module is its time less the operator's, round by round. Goal: at most 30 microseconds.

    --seconds 6     of each module
    --json FILE     all figures, and the machine
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import fastflow as ff
from benchmarks import machine
from benchmarks.intervals import median_interval
from benchmarks.measure import Entry, Timer
from fastflow import operators, ops

CPU = torch.device("cpu")
GOAL_US = 30.0
Call = Callable[[], Any]


def _operator(field: ff.VelocityField, x_0: torch.Tensor, cond: torch.Tensor, num_steps: int) -> Call:
    """The walk behind `fastflow.integrate`, everything checked and shaped beforehand."""
    call = ops.check_walk(field, num_steps)
    x, rows = call.canonical(x_0, cond, "x_0")
    arguments = (x, rows, call.parameters, None, None, None, call.key, num_steps, 0.0, 1.0)
    options = ("euler", call.precision, call.runner(None), False, False)
    return lambda: operators.integrate(*arguments, *options)


def entrants() -> dict[str, dict[str, Call]]:
    """By module, the entrants."""
    torch.manual_seed(0)
    obs, action, noise = torch.randn(1, 37), torch.randn(1, 5), torch.randn(1, 5)
    sizes: dict[str, Any] = dict(hidden=(64, 64), ensemble=2, num_steps=8)
    critic = ff.FlowCritic.for_rewards(37, 5, reward_range=(-1.0, 0.0), discount=0.99, **sizes)
    policy = ff.FlowPolicy(37, 5, hidden=(32,) * 4, num_steps=10)
    frozen_critic, frozen_policy = critic.freeze(), policy.freeze()
    z_0, cond = torch.rand(2, 1, critic.num_samples, 1), torch.cat([obs, action], -1)
    return {
        "FlowCritic, 2 nets of 2x64, K=8": {
            "module": lambda: critic(obs, action),
            "ff.integrate": lambda: ff.integrate(critic.field, z_0, cond, num_steps=8),
            "operator": _operator(critic.field, z_0, cond, 8),
            "frozen": lambda: frozen_critic(obs, action),
        },
        "FlowPolicy, 4x32, K=10": {
            "module": lambda: policy(obs, noise),
            "ff.integrate": lambda: ff.integrate(policy.field, noise, obs, num_steps=10),
            "operator": _operator(policy.field, noise, obs, 10),
            "frozen": lambda: frozen_policy(obs, noise),
        },
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description="Modules around operators.")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each module")
    parser.add_argument("--json", type=Path, default=None, help="file for all figures")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    timer, report = Timer(CPU), {}
    for title, calls in entrants().items():
        with torch.no_grad():
            entries = [Entry(name, call, timer.finish) for name, call in calls.items()]
            timings = timer.measure(entries, rounds=101, seconds=given.seconds)
        medians = {name: 1e6 * timing.median for name, timing in timings.items()}
        pairs = zip(timings["module"].seconds, timings["operator"].seconds, strict=True)
        overhead = median_interval([1e6 * (a - b) for a, b in pairs])
        report[title] = {"medians_us": medians, "overhead_us": overhead._asdict()}
        print(title + ":  " + "  ".join(f"{name} {value:.1f} us" for name, value in medians.items()))
        verdict = "met" if overhead.middle <= GOAL_US else "missed"
        ends = f"({overhead.low:.1f} to {overhead.high:.1f})"
        print(f"    overhead {overhead.middle:.1f} us {ends}; goal {GOAL_US:g}: {verdict}")
    if given.json is not None:
        from fastflow.atomic import atomic_write

        facts = machine.public_facts(CPU)
        with atomic_write(given.json) as temporary:
            temporary.write_text(json.dumps({**facts, "modules": report}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
