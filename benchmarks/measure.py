"""The clock: variants measured in turn, round after round, so that their ratios survive drifting clocks.

A round times one batch of calls of every variant, in an order that rotates; the medians are over rounds. A batch is
long enough for the clock, and its calls queue up behind one another: timing single launches on an idle GPU would
measure the gap before them.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.intervals import median_interval


@dataclass
class Entry:
    """Something to time.

    Args:
        name: key of its result.
        call: does the work once; may return before it is done.
        finish: given the result of the last call, returns when all calls are done.
        events: time by CUDA events, what the device spent, in place of the wall clock, what the caller waited.
    """

    name: str
    call: Callable[[], Any]
    finish: Callable[[Any], None]
    events: bool = False


@dataclass
class Timing:
    """Seconds per call: the median, 20th and 80th percentile over rounds, and every round's value."""

    median: float
    p20: float
    p80: float
    rounds: int
    calls_per_round: int
    seconds: list[float]

    @property
    def spread(self) -> float:
        """(p80 - p20) / median."""
        return (self.p80 - self.p20) / self.median

    def as_json(self) -> dict[str, Any]:
        """Microseconds, for the results file."""
        out = {f"{name}_us": 1e6 * value for name, value in asdict(self).items() if name in ("median", "p20", "p80")}
        return out | {"spread": self.spread, "rounds": self.rounds, "calls_per_round": self.calls_per_round}


class Timer:
    """Times batches of calls on one device.

    Args:
        device: whose work is timed.
        batch_seconds: how long a batch should last at least.
        max_calls: how many calls it may hold.
    """

    def __init__(self, device: torch.device, batch_seconds: float = 0.015, max_calls: int = 2000) -> None:
        self.device, self.batch_seconds, self.max_calls = device, batch_seconds, max_calls

    def synchronize(self) -> None:
        """Wait until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def finish(self, result: Any) -> None:
        """`Entry.finish` of torch's own work."""
        self.synchronize()

    def batch(self, entry: Entry, calls: int) -> float:
        """Seconds per call of one batch."""
        self.synchronize()
        result = None
        if entry.events and self.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(calls):
                result = entry.call()
            end.record()
            entry.finish(result)
            return start.elapsed_time(end) * 1e-3 / calls
        began = time.perf_counter()
        for _ in range(calls):
            result = entry.call()
        entry.finish(result)
        return (time.perf_counter() - began) / calls

    def measure(self, entries: Sequence[Entry], rounds: int = 21, seconds: float = 10.0) -> dict[str, Timing]:
        """Time the entries in turn.

        Args:
            entries: what to time; names must differ.
            rounds: how many rounds, at least 3 of which are done.
            seconds: no further round begins after this time.

        Returns:
            Timings by name, with equally many rounds each: `ratios` compares two of them.
        """
        calls = {}
        for entry in entries:
            self.batch(entry, 2)
            once = self.batch(entry, 1)
            # The first estimate holds the start of the batch too, which the second one spreads over some calls.
            once = min(once, self.batch(entry, self._calls(once, 0.2)))
            calls[entry.name] = self._calls(once, 1.0)
        if self.device.type == "cuda":
            # Clocks rise under load within this time.
            self.batch(entries[0], 10 * calls[entries[0].name])
        samples: dict[str, list[float]] = {entry.name: [] for entry in entries}
        deadline = time.perf_counter() + seconds
        enabled = gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            for i in range(rounds):
                if i >= 3 and time.perf_counter() > deadline:
                    break
                turn = i % len(entries)
                for entry in (*entries[turn:], *entries[:turn]):
                    samples[entry.name].append(self.batch(entry, calls[entry.name]))
        finally:
            if enabled:
                gc.enable()
        return {name: summarize(values, calls[name]) for name, values in samples.items()}

    def _calls(self, once: float, share: float) -> int:
        return max(1, min(self.max_calls, round(share * self.batch_seconds / max(once, 1e-9))))


def summarize(seconds: Sequence[float], calls: int) -> Timing:
    """The Timing of these rounds."""
    ordered = sorted(seconds)
    return Timing(
        median=statistics.median(ordered),
        p20=_percentile(ordered, 0.2),
        p80=_percentile(ordered, 0.8),
        rounds=len(ordered),
        calls_per_round=calls,
        seconds=list(seconds),
    )


def ratios(numerator: Timing, denominator: Timing) -> dict[str, float]:
    """How many times as long: median, 20th and 80th percentile of the rounds' quotients, which drift does not touch,
    and the ends of the median's 95 % bootstrap interval, "low" and "high"."""
    ordered = sorted(a / b for a, b in zip(numerator.seconds, denominator.seconds))
    interval = median_interval(ordered)
    found = {"median": statistics.median(ordered), "p20": _percentile(ordered, 0.2), "p80": _percentile(ordered, 0.8)}
    return found | {"low": interval.low, "high": interval.high}


def _percentile(ordered: Sequence[float], share: float) -> float:
    at = share * (len(ordered) - 1)
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (at - below) * (ordered[above] - ordered[below])
