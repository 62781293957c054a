"""Amounts over time and counts over size, in memory that does not grow with the length of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator

from transload.study.metrics import Distribution
from transload.study.result import NUM_BINS

FIRST_WIDTH_SECONDS = 1 / 64
BINS_PER_E = 100.0
"""Of a histogram, while values grow to e times as much."""


class TimeBins:
    """How much of something fell into each stretch of time. Bins double their width when there are too many."""

    def __init__(self) -> None:
        self.width = FIRST_WIDTH_SECONDS
        self.amounts = [0.0] * (2 * NUM_BINS)

    def add(self, start: float, end: float, amount: float) -> None:
        """Spread an amount evenly from start to end."""
        while end >= self.width * len(self.amounts):
            self.widen()
        first, last = int(start / self.width), int(end / self.width)
        if first == last:
            self.amounts[first] += amount
            return
        density = amount / (end - start)
        self.amounts[first] += density * ((first + 1) * self.width - start)
        for index in range(first + 1, last):
            self.amounts[index] += density * self.width
        self.amounts[last] += density * (end - last * self.width)

    def widen(self) -> None:
        """Half as many bins, each twice as wide."""
        amounts = self.amounts
        half = [amounts[index] + amounts[index + 1] for index in range(0, len(amounts), 2)]
        self.amounts = half + [0.0] * len(half)
        self.width *= 2


def align(bins: list[TimeBins], duration: float) -> None:
    """Give all the same width, so that there are at most about `NUM_BINS` bins until the end."""
    width = max([each.width for each in bins], default=FIRST_WIDTH_SECONDS)
    while width * NUM_BINS < duration:
        width *= 2
    for each in bins:
        while each.width < width:
            each.widen()


class LogHistogram:
    """Counts of positive values, in bins of 1 % width: percentiles to half a percent, mean and maximum exact."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.num_values = 0
        self.total = 0.0
        self.largest = 0.0

    @staticmethod
    def bin_of(value: float) -> int:
        return math.floor(math.log(value) * BINS_PER_E) if value > 1e-12 else -10_000

    def add(self, index: int, count: int, total: float, largest: float) -> None:
        """So many values of one bin, their sum, and the largest of them."""
        self.counts[index] = self.counts.get(index, 0) + count
        self.num_values += count
        self.total += total
        if largest > self.largest:
            self.largest = largest

    def quantiles(self, shares: list[float]) -> list[float]:
        """Values at rising shares of the values in order; the middles of their bins."""
        found: list[float] = []
        bins = self._cumulated()
        reached, value = next(bins, (0, 0.0))
        for share in shares:
            while reached < share * self.num_values:
                reached, value = next(bins)
            found.append(min(value, self.largest))
        return found

    def _cumulated(self) -> Iterator[tuple[int, float]]:
        reached = 0
        for index in sorted(self.counts):
            reached += self.counts[index]
            yield reached, math.exp((index + 0.5) / BINS_PER_E)

    def distribution(self) -> Distribution | None:
        """None if there are no values."""
        if not self.num_values:
            return None
        p50, p90, p95, p99 = self.quantiles([0.5, 0.9, 0.95, 0.99])
        return Distribution(self.num_values, self.total / self.num_values, p50, p90, p95, p99, self.largest)
