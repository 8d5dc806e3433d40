"""python -m benchmarks.cpu_row NAME: one measurement of the CPU table, in a process of its own, to one JSON file.

A process of its own, because the number of threads is fixed when libraries start: torch's by OMP_NUM_THREADS, XLA's by
the processors that the process may run on. `--threads N` sets both, for all entrants alike, before either is imported.
It also gives every measurement fresh compilers, and lets the caller end one that takes too long.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.cpu_rows import Measurement

ROUNDS = 15
BATCH_SECONDS = 0.25
# Before the clock starts: wait so many seconds at most for other programs to use less than this many processors.
CALM_SECONDS, CALM = 10.0, 0.15


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_row", description=__doc__)
    parser.add_argument("name", help="of a measurement, or curve-steps, curve-rows")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--threads", type=int, help="run on so many processors only")
    parser.add_argument("--without", nargs="*", default=[], help="rivals to leave out")
    parser.add_argument("--seconds", type=float, default=3600.0, help="within which all should be done")
    parser.add_argument("--share", type=float, default=1.0, help="of the time that a measurement is given")
    given = parser.parse_args(arguments)
    until = time.monotonic() + given.seconds
    if given.threads:
        confine(given.threads)
    from benchmarks.cpu_rows import MEASUREMENTS, curve

    if given.name.startswith("curve-"):
        chosen = curve(given.name.removeprefix("curve-"))
    else:
        chosen = [MEASUREMENTS[given.name]]
    results = []
    for measurement in chosen:
        if time.monotonic() > until:
            print(f"  no time left for {measurement.title}", flush=True)
            continue
        print(f"  {measurement.title}", flush=True)
        results.append(measure(measurement.without(*given.without), given.share, until=until))
        # After every point: a caller that ends this keeps what there is.
        temporary = given.output.with_suffix(".partial")
        temporary.write_text(json.dumps(results), encoding="utf-8")
        os.replace(temporary, given.output)
    return 0


def confine(threads: int) -> None:
    """Let this process, and all that it starts, run on so many processors, and torch on so many threads."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if hasattr(os, "sched_setaffinity"):
        # The last ones: what else runs on a machine tends to the first.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])


class Others:
    """What other programs do from now on."""

    def __init__(self) -> None:
        # Not above: with it comes torch, whose threads are not to be counted before `confine`.
        from benchmarks.machine import busy_seconds

        self.read = busy_seconds
        self.began, self.busy, self.own = time.monotonic(), busy_seconds(), time.process_time()

    def processors(self) -> float | None:
        """How many processors they have used; None where that cannot be known."""
        now = self.read()
        if now is None or self.busy is None:
            return None
        used = now - self.busy - (time.process_time() - self.own)
        return round(max(used, 0.0) / max(time.monotonic() - self.began, 1e-9), 2)


def wait_for_calm(seconds: float) -> None:
    """Return when other programs leave the processors alone, at the latest after so many seconds.

    Threads that wait for one another by spinning, as OpenMP's do, are slowed a hundredfold by a program that takes one
    of their processors.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        others = Others()
        time.sleep(min(1.0, seconds))
        if (others.processors() or 0.0) < CALM:
            return


def measure(
    measurement: Measurement, share: float = 1.0, rounds: int = ROUNDS, until: float = math.inf
) -> dict[str, Any]:
    """Prepare and check every entrant, then time all that are right in turn.

    Args:
        measurement: what.
        share: of its seconds.
        rounds: at most.
        until: the time.monotonic() at which all should be done: what cannot be prepared before is left out.

    Returns:
        The measurement as the results file holds it, see `cpu_report`.
    """
    import torch

    from benchmarks.entrants import CPU, Ready
    from benchmarks.gpu import OutOfTime, time_limit
    from benchmarks.measure import Timer, ratios
    from benchmarks.rivals import Skipped, quiet_compiler

    began = time.monotonic()
    out: dict[str, Any] = {
        "name": measurement.name,
        "title": measurement.title,
        "threads": torch.get_num_threads(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "others": None,
        "entrants": [],
        "skipped": [],
    }
    ready: dict[str, Ready] = {}
    for entrant in measurement.entrants():
        since = time.monotonic()
        # The clock takes about twice the time of its rounds.
        limit = min(measurement.prepare_seconds, until - since - 2 * share * measurement.seconds)
        try:
            if limit < 1:
                raise OutOfTime("no time left")
            with time_limit(limit), quiet_compiler():
                done = entrant.prepare()
        except (Skipped, OutOfTime) as reason:
            out["skipped"].append({"entrant": entrant.name, "reason": str(reason)})
            continue
        except Exception as error:  # a rival that breaks here is a finding, not the end of the table
            # Compilers wrap what interrupts them.
            late = f"not prepared within {limit:.0f} s" if "OutOfTime" in str(error) else ""
            reason = late or f"{type(error).__name__}: {error}"[:500]
            out["skipped"].append({"entrant": entrant.name, "reason": reason})
            if not late:
                print("".join(traceback.format_exception(error))[-2000:], file=sys.stderr)
            continue
        row = {"name": entrant.name, "rival": entrant.rival, "variant": entrant.variant, "precision": entrant.precision}
        row |= {"accurate": done.accurate, "errors": done.errors, "eager_errors": done.eager_errors}
        row |= {"note": done.note, "prepare_seconds": round(time.monotonic() - since, 2)}
        out["entrants"].append(row)
        if done.accurate:
            ready[entrant.name] = done
        else:
            reason = f"not timed: errors {done.errors} against float64, eager PyTorch's are {done.eager_errors}"
            out["skipped"].append({"entrant": entrant.name, "reason": reason})
    timings = {}
    if ready:
        entries = [done.entry(name) for name, done in ready.items()]
        wait_for_calm(CALM_SECONDS * share)
        others = Others()
        timings = Timer(CPU, BATCH_SECONDS).measure(entries, rounds, measurement.seconds * share)
        out["others"] = others.processors()
    for row in out["entrants"]:
        timing = timings.get(row["name"])
        if timing is not None:
            row |= timing.as_json()
            # By fastflow's name, how many times as long: what the goals are compared with.
            row["times"] = {
                name: ratios(timing, other) for name, other in timings.items() if name.startswith("fastflow ")
            }
    return out | {"seconds": round(time.monotonic() - began, 1)}


if __name__ == "__main__":
    sys.exit(main())
