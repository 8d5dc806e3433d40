"""What a set of timings says, and with what certainty.

Two sources of chance are kept apart. Rounds of one process share its memory layout, its clocks and what else ran: their
spread is `median_interval`'s, a bootstrap. Whole launches of a process differ by more than their rounds tell, by a few
percent for the same code; where two versions of the code are compared, the launches are the sample, and
`launches_interval` takes Student's t over them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """An estimate between the ends of its interval."""

    middle: float
    low: float
    high: float

    @property
    def says_nothing(self) -> bool:
        """Whether a ratio of 1 lies within: no difference was seen."""
        return self.low <= 1.0 <= self.high

    def __str__(self) -> str:
        text = f"{self.middle:.3f} ({self.low:.3f} to {self.high:.3f})"
        return f"{text}, no difference" if self.says_nothing else text


def median_interval(
    values: Sequence[float], confidence: float = CONFIDENCE, resamples: int = 2000, seed: int = 0
) -> Interval:
    """The median and its percentile bootstrap interval.

    Raises:
        ValueError: no values.
    """
    if not len(values):
        raise ValueError("median_interval: values must be at least one number, got none")
    sample = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(seed).choice(sample, (resamples, len(sample)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.median(drawn, axis=1), [tail, 1 - tail])
    return Interval(float(np.median(sample)), float(low), float(high))


def launches_interval(ratios: Sequence[Sequence[float]], confidence: float = CONFIDENCE) -> Interval:
    """Geometric mean over launches of each launch's median ratio, with Student's interval over launches.

    Args:
        ratios: by launch, the ratios of its rounds.

    Returns:
        The interval, without ends for a single launch.

    Raises:
        ValueError: no launches, or one without rounds.
    """
    if not ratios or not all(len(rounds) for rounds in ratios):
        raise ValueError("launches_interval: ratios must hold at least one launch, each with at least one round")
    logs = [math.log(statistics.median(rounds)) for rounds in ratios]
    middle = statistics.fmean(logs)
    if len(logs) < 2:
        return Interval(math.exp(middle), 0.0, math.inf)
    from scipy import stats  # a machine whose GPU is measured need not have it

    wide = stats.t.ppf(0.5 + confidence / 2, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return Interval(math.exp(middle), math.exp(middle - wide), math.exp(middle + wide))
