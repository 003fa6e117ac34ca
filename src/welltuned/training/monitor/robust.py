"""Statistics that a few wild values, or rows of very different difficulty, do not upset."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from welltuned.training.monitor.thresholds import limit

MAD_TO_DEVIATION = 1.4826  # of a normal distribution


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean difference and its standard error; None where that is not known."""

    mean: float
    error: float | None

    @property
    def is_rise(self) -> bool:
        """Whether it lies above zero by more than the noise."""
        return self.error is not None and self.mean > limit("standard_errors") * self.error


def difference(now: Sequence[float], then: Sequence[float], weights: Sequence[int]) -> Difference:
    """now - then, paired by row and weighted by tokens: what rows differ by among themselves drops out.

    The error is that of a ratio of sums over rows (Cochran, Sampling Techniques, 1977, section 6.4).
    """
    total = sum(weights)
    changes = [w * (a - b) for w, a, b in zip(weights, now, then, strict=True)]
    mean = math.fsum(changes) / total
    squares = math.fsum((c - mean * w) ** 2 for c, w in zip(changes, weights, strict=True))
    n = len(weights)
    return Difference(mean, math.sqrt(squares * n / (n - 1)) / total if n > 1 else None)


def spread_of(values: Sequence[float]) -> float:
    """The standard deviation as the median distance from the median tells it."""
    centre = median(values)
    return MAD_TO_DEVIATION * median(abs(v - centre) for v in values)


def is_outlier(value: float, others: Sequence[float], level: float) -> bool:
    """Whether a value lies `spike_z` robust deviations above the others, none taken below a share of `level`."""
    spread = max(spread_of(others), limit("spread_floor") * level)
    return value - median(others) > limit("spike_z") * spread
