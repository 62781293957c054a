"""How long rows of feed-forward calls are on their way: counted in buckets, so that a worker reports few numbers.

A hop is both ways together: from sending a call until its answer is in hand, less what the FFN worker says it had the
call for. Only calls that were waited for count: an answer that comes while something else is computed lies there.
"""

from __future__ import annotations

from bisect import bisect_left

HOP_BOUNDS = (5e-6, 1e-5, 2e-5, 3e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2, 0.1, 0.5, 1.0)
"""Seconds; each bucket ends with one of them, and one more has no end."""


class HopTimes:
    """Since the start."""

    def __init__(self) -> None:
        self.counts = [0] * (len(HOP_BOUNDS) + 1)
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(HOP_BOUNDS, seconds)] += 1
        self.seconds += seconds
