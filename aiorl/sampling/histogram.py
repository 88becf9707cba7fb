"""Distributions of measured values in bounded memory.

A histogram's buckets are an eighth of an octave wide (9 %), from 2^-30 (a nanosecond) up to 2^34, so that one shape
fits times in seconds and sizes of batches alike. A percentile is the mean of the values in its bucket: exact where they
are all the same, as whole numbers up to 11 are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_BUCKETS_PER_OCTAVE = 8
_LOWEST_OCTAVE = -30
_NUM_BUCKETS = (34 - _LOWEST_OCTAVE) * _BUCKETS_PER_OCTAVE


@dataclass(frozen=True, slots=True)
class Distribution:
    """What a histogram has seen; every figure but the count is nan before the first value.

    Attributes:
        count: Number of values.
        mean: Their mean, exact.
        p50: Their median, to 9 %; ``p90`` and ``p99`` are the other percentiles, to the same.
        max: The largest, exact.
    """

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class Histogram:
    """Counts non-negative values into logarithmic buckets; 8 KB for ever."""

    __slots__ = ("_counts", "_max", "_sums")

    def __init__(self) -> None:
        self._counts = [0] * _NUM_BUCKETS
        self._sums = [0.0] * _NUM_BUCKETS
        self._max = math.nan

    def add(self, value: float) -> None:
        """Counts one value (0.3 µs); values outside of the buckets' range go to the outermost ones."""
        bucket = 0
        if value > 1e-9:
            bucket = min(int((math.log2(value) - _LOWEST_OCTAVE) * _BUCKETS_PER_OCTAVE), _NUM_BUCKETS - 1)
        self._counts[bucket] += 1
        self._sums[bucket] += value
        if not value <= self._max:  # also true for the nan of an empty histogram
            self._max = value

    def distribution(self) -> Distribution:
        """What was counted until now, as a frozen record."""
        count = sum(self._counts)
        mean = sum(self._sums) / count if count else math.nan
        p50, p90, p99 = (self._percentile(count * share) for share in (0.5, 0.9, 0.99))
        return Distribution(count=count, mean=mean, p50=p50, p90=p90, p99=p99, max=self._max)

    def _percentile(self, rank: float) -> float:
        """The mean of the bucket that holds the value of this rank (from 0 to the count)."""
        seen = 0
        for count, total in zip(self._counts, self._sums, strict=True):
            seen += count
            if count and seen >= rank:
                return total / count
        return math.nan
