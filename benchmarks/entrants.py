"""What a row of the CPU table times: one way to compute it, checked against float64 before the clock starts.

On a CPU torch multiplies float32 as float32 unless it is told otherwise, so nothing here needs `global_precision`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastflow as ff
from benchmarks.cases import Problem
from benchmarks.measure import Entry, Timer
from benchmarks.rivals import FUSED_TIMES, RIVAL_TIMES, RIVALS, Variant, check, torch_variant
from fastflow.kernels import cpu, launch

CPU = torch.device("cpu")
NATIVE, PLAIN = "fastflow's own kernels", "plain PyTorch, for want of a kernel"
# Names in RIVALS where they differ.
_RIVALS = {("jax", "scan"): "jax", ("jax", "unrolled"): "jax unrolled"}


@dataclass
class Ready:
    """An entrant that has run and been checked.

    Args:
        call: one computation; may return before it is done.
        finish: waits for the result of the last call.
        errors: relative errors against float64, by name.
        eager_errors: those of eager PyTorch in the same precision.
        accurate: whether the errors are small enough for the time to count.
        note: what a reader of its time has to know.
    """

    call: Callable[[], Any]
    finish: Callable[[Any], Any]
    errors: dict[str, float]
    eager_errors: dict[str, float]
    accurate: bool
    note: str = ""

    def entry(self, name: str) -> Entry:
        """For the timer."""
        return Entry(name, self.call, self.finish)


@dataclass
class Entrant:
    """One way to compute a row.

    Args:
        rival: "fastflow", or what the goals are against: "jax", "compile", "eager"; else only shown.
        variant: which of several of that kind. Of rivals' the fastest counts.
        precision: of matrix products.
        prepare: builds, compiles and checks it. Raises `rivals.Skipped` where it cannot run here.
    """

    rival: str
    variant: str
    precision: str
    prepare: Callable[[], Ready]

    @property
    def name(self) -> str:
        """Its key in the results."""
        return " ".join(part for part in (self.rival, self.variant, self.precision) if part)


def of_problem(problem: Problem, ways: Sequence[tuple[str, str, str]]) -> Iterator[Entrant]:
    """Entrants of an operator's case, for (rival, variant, precision)."""

    def prepare(rival: str, variant: str, precision: str) -> Ready:
        if rival == "fastflow":
            built = frozen(problem, precision) if variant else fastflow(problem, precision)
        else:
            built = RIVALS[_RIVALS.get((rival, variant), rival)](problem, precision)
        verdict = check(problem, built, precision)
        within = verdict.within(FUSED_TIMES if rival == "fastflow" else RIVAL_TIMES)
        note = native(lambda: problem.results("fused", precision)) if rival == "fastflow" else ""
        return Ready(built.call, built.finish or Timer(CPU).finish, verdict.errors, verdict.eager, within, note)

    return bound(prepare, ways)


def bound(prepare: Callable[[str, str, str], Ready], ways: Sequence[tuple[str, str, str]]) -> Iterator[Entrant]:
    """An Entrant per (rival, variant, precision)."""
    for way in ways:
        yield Entrant(*way, functools.partial(prepare, *way))


def fastflow(problem: Problem, precision: str) -> Variant:
    """fastflow as its users call it, which chooses by itself what runs."""

    def run(**inputs: Tensor) -> Tensor:
        return problem.case.run(problem.field, inputs, "auto", precision)

    return torch_variant("fastflow", problem, run)


def frozen(problem: Problem, precision: str) -> Variant:
    """A walk whose weights were packed before: what acts in a control loop."""
    case = problem.case
    walk = ff.FrozenWalk(problem.field, num_steps=case.num_steps, method=case.method, precision=precision)
    return torch_variant("fastflow frozen", problem, lambda x_0, cond: walk(x_0, cond))


def native(fused: Callable[[], Any]) -> str:
    """What fastflow's "auto" runs here, found out by asking for its own kernels alone, in words for a reader."""
    if launch.interpreted():
        # There "fused" runs Triton's interpreter, and "auto" does not.
        return PLAIN if cpu.why_unavailable() else NATIVE
    try:
        fused()
    except NotImplementedError:
        return PLAIN
    return NATIVE
