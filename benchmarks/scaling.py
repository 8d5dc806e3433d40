"""python -m benchmarks.scaling NAME: one published shape over steps, rows or widths, fastflow beside its rivals.

Prints, for every point, each rival's median per call and how many times as long as fastflow it takes, with 95 %
bootstrap intervals over rounds; a ratio whose interval holds 1 is "no difference". Rivals take turns within a point.
With --json all of it is kept, and drawn beside it: time over the axis with the floor that FLOPs and bytes leave, and
the ratios.

    --list              the names, with rows, FLOPs, bytes
    --over steps        or rows, width
    --values 1 8 64     by default benchmarks.published.AXES
    --rivals NAME ...   of benchmarks.rivals.RIVALS; fastflow is always among them
    --precision fp32    of matrix products; by default bf16 on a GPU and fp32 on a CPU
    --seconds 3         that the clock runs at each point
    --json FILE         where results go; the figure is FILE with .png
    --draw FILE         only the figure, from results that are there
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, scaling_figure
from benchmarks.cases import CASES, Case
from benchmarks.floors import Rates, rates
from benchmarks.intervals import Interval, median_interval
from benchmarks.measure import Timer, Timing
from benchmarks.published import AXES, PUBLISHED, along
from benchmarks.rivals import (
    FUSED_TIMES,
    RIVAL_TIMES,
    RIVALS,
    Skipped,
    Variant,
    check,
    global_precision,
    graphed,
    quiet_compiler,
)
from fastflow.record import write_json

FORMAT = 1
OURS = "fastflow"
DEFAULT_RIVALS = ("eager", "torchdiffeq", "compile", "compile max-autotune", "graph sampler", "jax")


def entrants(case: Case, names: Sequence[str], device: torch.device, precision: str) -> tuple[dict[str, Variant], dict]:
    """(what can be timed, by name; why the others cannot). Each has computed the case and was compared with float64."""
    problem = case.build(device)
    ready: dict[str, Variant] = {}
    skipped: dict[str, str] = {}
    for name in ("fused", *names):
        label = OURS if name == "fused" else name
        try:
            with quiet_compiler():
                variant = RIVALS[name](problem, precision)
                verdict = check(problem, variant, precision)
                if not verdict.within(FUSED_TIMES if name == "fused" else RIVAL_TIMES):
                    raise Skipped(f"wrong by {verdict.times_eager:.2g} times eager PyTorch's error")
                ready[label] = variant
                if device.type == "cuda" and variant.capturable:
                    ready[f"{label} + graph"] = graphed(problem, variant)
        except Skipped as reason:
            skipped[label] = str(reason)
        except (RuntimeError, MemoryError) as error:  # no room, or a compiler's own
            skipped[label] = f"{type(error).__name__}: {error}"[:200]
    return ready, skipped


def measure_point(
    case: Case, n: int, names: Sequence[str], device: torch.device, precision: str, least: Rates, seconds: float
) -> dict[str, Any]:
    """One point of a curve as the results file holds it."""
    ready, skipped = entrants(case, names, device, precision)
    timer = Timer(device)
    timings = timer.measure([v.entry(timer) for v in _renamed(ready)], 41, seconds) if OURS in ready else {}
    point: dict[str, Any] = {"n": n, "rows": case.rows, "evaluations": case.evaluations}
    point |= {"flops": case.flops, "bytes": case.bytes, "floor_us": 1e6 * least.seconds(case.flops, case.bytes)}
    point["entrants"] = {name: _row(timing, timings[OURS]) for name, timing in timings.items()}
    return point | {"skipped": skipped}


def _renamed(ready: Mapping[str, Variant]) -> list[Variant]:
    for name, variant in ready.items():
        variant.name = name
    return list(ready.values())


def _row(timing: Timing, ours: Timing) -> dict[str, Any]:
    times = median_interval([a / b for a, b in zip(timing.seconds, ours.seconds, strict=True)])
    return {
        "us": median_interval([1e6 * s for s in timing.seconds])._asdict(),
        "times": times._asdict(),
        "rounds": timing.rounds,
        "calls_per_round": timing.calls_per_round,
    }


def report(point: Mapping[str, Any], axis: str) -> str:
    """A point in words."""
    lines = [f"{axis} {point['n']:,}: {point['rows']:,} rows, floor {point['floor_us']:.4g} us"]
    for name, row in point["entrants"].items():
        us, times = Interval(**row["us"]), Interval(**row["times"])
        beside = "" if name == OURS else f"  {times} x {OURS}"
        lines.append(f"  {name:24} {us.middle:12,.1f} us ({us.low:,.1f} to {us.high:,.1f}){beside}")
    lines += [f"  {name:24} left out: {reason}" for name, reason in point["skipped"].items()]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__, formatter_class=style)
    known = {**PUBLISHED, **CASES}
    parser.add_argument("name", nargs="?", help="of a case, see --list")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--over", choices=AXES, default="steps")
    parser.add_argument("--values", type=int, nargs="+")
    parser.add_argument("--rivals", nargs="*", default=DEFAULT_RIVALS)
    parser.add_argument("--precision", choices=("bf16", "tf32", "fp32"))
    parser.add_argument("--device", type=torch.device)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--draw", type=Path)
    given = parser.parse_args(arguments)
    if given.list or given.draw is not None:
        return given
    if given.name not in known:
        parser.error(f"expected a name that --list prints, got {given.name!r}")
    given.case = known[given.name]
    if given.over == "steps" and given.case.kind != "integrate":
        parser.error(f"--over steps: {given.name} is a loss, which has no steps; take rows or width")
    unknown = [name for name in given.rivals if name not in RIVALS]
    if unknown:
        parser.error(f"--rivals: expected some of {', '.join(RIVALS)}, got {unknown[0]!r}")
    given.values = given.values or AXES[given.over]
    if min(given.values) < 1:
        parser.error(f"--values: expected numbers of at least 1, got {min(given.values)}")
    given.device = given.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given.precision = given.precision or ("bf16" if given.device.type == "cuda" else "fp32")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    given = parse(arguments)
    if given.list:
        for name, case in {**PUBLISHED, **CASES}.items():
            print(f"{name:45} {case.flops / 1e9:10.4g} GFLOP {case.bytes / 1e6:8.4g} MB  {case.title}")
        return 0
    if given.draw is not None:
        print(scaling_figure.draw(json.loads(given.draw.read_text(encoding="utf-8")), given.draw.with_suffix(".png")))
        return 0
    case, names = given.case, [name for name in given.rivals if name != "fused"]
    with global_precision(given.precision):
        least = rates(given.device, given.precision)
        results = {"format": FORMAT, "kind": "scaling", "case": case.name, "title": case.title, "axis": given.over}
        results |= {"precision": given.precision, "threads": torch.get_num_threads(), "rates": least._asdict()}
        results |= {**machine.public_facts(given.device), "points": []}
        print(f"{case.name}: {case.title}, {given.precision} products, {results['threads']} threads")
        for n in given.values:
            torch.compiler.reset()
            sized = along(case, given.over, n)
            point = measure_point(sized, n, names, given.device, given.precision, least, given.seconds)
            results["points"].append(point)
            print(report(point, given.over), flush=True)
            if given.json is not None:
                write_json(given.json, results)
    if given.json is not None:
        print(scaling_figure.draw(results, given.json.with_suffix(".png")))
    return 0 if any(point["entrants"] for point in results["points"]) else 1


if __name__ == "__main__":
    sys.exit(main())
