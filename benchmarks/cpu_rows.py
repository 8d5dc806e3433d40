"""The rows of the CPU table: what is measured, by whom, and how many times as fast fastflow is meant to be.

A measurement is one problem on which all entrants take turns. A row of the table is fastflow in one precision in a
measurement; its goals are against the fastest JAX and torch.compile in float32 and the eager reference in float32,
whatever the precision of fastflow's products. What others reach in bf16 is measured and shown where it is listed here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks import floq_update, td2_update
from benchmarks.cases import CASES, FLOQ, UPDATES, Case, UpdateCase
from benchmarks.entrants import CPU, Entrant, of_problem
from benchmarks.td2_update import Td2Case

Way = tuple[str, str, str]  # rival, variant, precision
RIVAL_NAMES = ("jax", "compile", "eager")


@dataclass(frozen=True)
class Measurement:
    """One problem and its entrants.

    Args:
        name: its key in the results.
        case: an operator's case or an update's.
        ways: (rival, variant, precision) of the entrants, in the order in which they are prepared.
        threads: how many; None for as many as the machine has.
        prepare_seconds: how long one entrant may build and compile.
        seconds: after which no further round begins.
    """

    name: str
    case: Case | UpdateCase | Td2Case
    ways: tuple[Way, ...]
    threads: int | None = None
    prepare_seconds: float = 60.0
    seconds: float = 12.0

    @property
    def title(self) -> str:
        """What a reader is told."""
        return self.case.title

    def shrunk(self) -> Measurement:
        """Small enough for a test."""
        return dataclasses.replace(self, case=self.case.shrunk())

    def without(self, *rivals: str) -> Measurement:
        """Without the entrants of these rivals."""
        return dataclasses.replace(self, ways=tuple(way for way in self.ways if way[0] not in rivals))

    def entrants(self) -> Iterator[Entrant]:
        """Those who take turns, not yet prepared."""
        if isinstance(self.case, UpdateCase):
            return floq_update.entrants(self.case, self.ways)
        if isinstance(self.case, Td2Case):
            return td2_update.entrants(self.case, self.ways)
        return of_problem(self.case.build(CPU), self.ways)


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        title: its first cell.
        measurement: where its numbers come from.
        precision: of fastflow.
        goals: how many times as fast as "jax", "compile" and "eager" fastflow is to be.
        variant: "frozen" for a `fastflow.FrozenWalk`, whose weights are packed once and not at every call.
    """

    title: str
    measurement: str
    precision: str
    goals: tuple[float, float, float]
    variant: str = ""

    @property
    def entrant(self) -> str:
        """Whose time it is."""
        return " ".join(part for part in ("fastflow", self.variant, self.precision) if part)

    @property
    def goal(self) -> dict[str, float]:
        """The goals by rival."""
        return dict(zip(RIVAL_NAMES, self.goals, strict=True))


def _ways(*names: str) -> tuple[Way, ...]:
    """ "rival/variant/precision" with empty variants left out."""
    ways = []
    for name in names:
        rival, *variant, precision = name.split("/")
        ways.append((rival, variant[0] if variant else "", precision))
    return tuple(ways)


_BOTH = ("fastflow/bf16", "fastflow/fp32", "eager/fp32", "eager/bf16")
_ENSEMBLE = ("eager baddbmm/fp32", "eager baddbmm/bf16")
_JAX = ("jax/scan/fp32", "jax/unrolled/fp32")
_COMPILE = ("compile/fp32",)

_FPO = CASES["fpo-walk-2048"]
_FPO_WAYS = ("fastflow/fp32", "fastflow/frozen/fp32", "eager/fp32", *_JAX, *_COMPILE)


def _fpo(rows: int) -> Case:
    title = f"FPO sampler, {rows} row{'s' if rows > 1 else ''}, 4x32, K=10"
    return dataclasses.replace(_FPO.with_batch(rows), name=f"fpo-walk-{rows}", title=title)


def _update(name: str, prepare_seconds: float, *ways: str, threads: int | None = None) -> Measurement:
    ways = ways or (*_BOTH, *_JAX, *_COMPILE)
    return Measurement(name, UPDATES[name], _ways(*ways), threads, prepare_seconds, 15.0)


MEASUREMENTS: dict[str, Measurement] = {
    m.name: m
    for m in (
        Measurement(
            "walk-2x2048",
            CASES["walk-2x2048"],
            _ways(*_BOTH, *_ENSEMBLE, *_JAX, *_COMPILE, "compile/bf16"),
            seconds=20.0,
        ),
        Measurement("walk-2x256", CASES["walk-2x256"], _ways(*_BOTH, *_ENSEMBLE, *_JAX, *_COMPILE)),
        Measurement("fpo-walk-16", _fpo(16), _ways(*_FPO_WAYS), seconds=5.0),
        Measurement("fpo-walk-1", _fpo(1), _ways(*_FPO_WAYS), seconds=5.0),
        Measurement(
            "loss-2x2048", CASES["loss-2x2048"], _ways(*_BOTH, *_ENSEMBLE, "jax/scan/fp32", *_COMPILE), seconds=15.0
        ),
        _update("update-demo", 180.0, "fastflow/fp32", "eager/fp32", *_JAX, *_COMPILE, threads=1),
        Measurement("update-td2", Td2Case(), _ways(*_BOTH, *_JAX, *_COMPILE), prepare_seconds=90.0),
        _update("update-cube-double-depth2", 150.0),
        _update("update-cube-double-depth4", 210.0),
    )
}

TABLE: tuple[Row, ...] = (
    Row("walk 2 x 2,048 rows, 4x512, K=8, bf16 products", "walk-2x2048", "bf16", (3.0, 3.5, 5.0)),
    Row("the same, fp32 products", "walk-2x2048", "fp32", (1.1, 1.25, 1.8)),
    Row("walk, 256 rows (2 nets), 4x512, K=8, bf16", "walk-2x256", "bf16", (3.0, 3.0, 4.0)),
    Row("FPO sampler, 16 rows, 4x32, K=10, frozen copy", "fpo-walk-16", "fp32", (1.0, 1.5, 4.0), "frozen"),
    Row("the same, `ff.integrate`", "fpo-walk-16", "fp32", (1.0, 1.5, 4.0)),
    Row("FPO sampler, 1 row, 4x32, K=10, frozen copy", "fpo-walk-1", "fp32", (1.0, 1.5, 4.0), "frozen"),
    Row("the same, `ff.integrate`", "fpo-walk-1", "fp32", (1.0, 1.5, 4.0)),
    Row(
        "loss forward + backward 2 x 2,048 rows (256 rows x 8 samples, 4x512), bf16",
        "loss-2x2048",
        "bf16",
        (2.5, 2.5, 3.0),
    ),
    Row(
        "whole floq update, cube-double (published, depth 2), B=256, K=8, bf16",
        "update-cube-double-depth2",
        "bf16",
        (2.5, 2.0, 3.0),
    ),
    Row(
        "whole floq update, cube-double, depth 4, B=256, K=8, bf16",
        "update-cube-double-depth4",
        "bf16",
        (2.5, 2.0, 3.0),
    ),
    Row(
        "whole floq update at demo size (width 64, depth 2, B=256, r=1, K=8), fp32, one thread",
        "update-demo",
        "fp32",
        (1.0, 1.5, 3.0),
    ),
    Row("whole TD²-CFM update, CPU configuration, fp32", "update-td2", "fp32", (2.0, 1.5, 2.5)),
)

# The figure: time over K from 1 to 64 at 2 x 256 rows, and over rows from 1 to 4,096 at K = 8. These points are
# measured for it, those of CURVE_FROM_TABLE are there already.
CURVE_STEPS, CURVE_ROWS = (1, 2, 4, 16, 32, 64), (1, 4, 16, 64, 1024, 4096)
CURVE_FROM_TABLE = {"steps": {8: "walk-2x256"}, "rows": {256: "walk-2x256", 2048: "walk-2x2048"}}
CURVE_WAYS = ("fastflow/bf16", "fastflow/fp32", "eager/fp32")
# As far as the JAX rival unrolls: XLA's time to compile grows with K.
UNROLLED_STEPS = 16
# torch.compile takes up to half a minute for a point.
COMPILED_STEPS, COMPILED_ROWS = (1,), (16,)
# Measured behind the figure, because it takes longest.
LAST = "update-cube-double-depth4"


def curve(axis: str) -> list[Measurement]:
    """The points of one panel, axis "steps" or "rows"; those with torch.compile come last, where time may run out."""
    points = []
    for n in CURVE_STEPS if axis == "steps" else CURVE_ROWS:
        rows, steps = (256, n) if axis == "steps" else (n, 8)
        title = f"floq walk, 2 nets x {rows} rows, 4x512, K={steps}"
        case = Case(f"curve-{axis}-{n}", title, "integrate", FLOQ, rows, None, steps)
        ways = [*CURVE_WAYS, *(_JAX if steps <= UNROLLED_STEPS else _JAX[:1])]
        ways += _COMPILE if n in (COMPILED_STEPS if axis == "steps" else COMPILED_ROWS) else ()
        points.append(Measurement(case.name, case, _ways(*ways), seconds=2.0))
    return sorted(points, key=lambda point: point.ways[-1][0] == "compile")
