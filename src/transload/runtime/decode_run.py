"""When the steps of one batch end, in closed form: a decode step costs a fixed time and so much a token of context.

Whoever goes step by step and whoever goes through many at once read the same line, so the times are equal to the bit.
The clock of steps ticks in parts of a second that sums are exact in, whatever their order.
"""

from __future__ import annotations

from math import floor

TICKS_PER_SECOND = 2.0**30


def on_tick(seconds: float) -> float:
    """The nearest tick."""
    return floor(seconds * TICKS_PER_SECOND + 0.5) / TICKS_PER_SECOND


class DecodeRun:
    """Steps of the same requests, one after the other, each request a token further in each."""

    __slots__ = ("_batch", "_context", "_fixed", "_per_token", "_started", "num_done", "num_planned")

    def __init__(self, started: float, fixed_seconds: float, per_token: float, context_tokens: int, batch: int) -> None:
        self._started = on_tick(started)
        self._fixed = fixed_seconds
        self._per_token = per_token
        self._context = context_tokens
        self._batch = batch
        self.num_done = 0
        """Steps whose end the engine has been told."""
        self.num_planned = 0
        """Steps after which it has to be asked."""

    def end(self, number: int) -> float:
        """When step `number` ends, counted from 1; 0 is when the first one begins."""
        tokens = number * self._context + self._batch * (number * (number - 1) // 2)
        return on_tick(self._started + number * self._fixed + self._per_token * tokens)

    def num_ended(self, now: float) -> int:
        """Planned steps that have ended by now."""
        low, high = self.num_done, self.num_planned
        while low < high:
            middle = (low + high + 1) // 2
            if self.end(middle) <= now:
                low = middle
            else:
                high = middle - 1
        return low
