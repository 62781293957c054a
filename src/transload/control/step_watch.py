"""Whether the step under way takes so long that it will never return.

A step that hangs in the middle of arithmetic or of a device's call cannot be ended from outside; the worker can, and
its requests go to others. Learns from the steps before how long one of this size takes. Counts the ticks of the
worker's own event loop, not what a clock says: a process that has stood still does not hold that against its step. A
step may have to load weights first, because those who had them are gone: that has a limit of its own. Ends nothing.
"""

from __future__ import annotations

from transload.control.messages import RunStep

LONGER_THAN_EXPECTED = 20.0
LEAST_LIMIT_SECONDS = 30.0
"""A machine that swaps or a compiler that runs for the first time is no reason to give up."""
FIRST_LIMIT_SECONDS = 300.0
"""Before any step has returned; and for loading weights in the middle of one."""
EVEN_CONTEXT = 4096
"""At about so much context a token costs twice what it costs without."""


class StepWatch:
    """One worker's. `begin`, `tick`, ..., `end`."""

    def __init__(
        self, *, least_limit_seconds: float = LEAST_LIMIT_SECONDS, first_limit_seconds: float = FIRST_LIMIT_SECONDS
    ) -> None:
        self._least_limit_seconds = least_limit_seconds
        self._first_limit_seconds = first_limit_seconds
        self._longest: dict[int, float] = {}  # seconds of the longest step, by the power of two of its work
        self._step: RunStep | None = None
        self._limit_seconds = 0.0
        self._passed_seconds = 0.0
        self._loading_seconds = 0.0

    def begin(self, step: RunStep) -> None:
        """The step is under way."""
        self._step = step
        self._limit_seconds = self.limit_seconds(step)
        self._passed_seconds = self._loading_seconds = 0.0

    def end(self, seconds: float | None) -> None:
        """It has returned, after so many seconds of work; None: it failed, which teaches nothing. Nor does one that
        had to load weights."""
        if self._step is not None and seconds is not None and not self._loading_seconds:
            size = _size(self._step)
            self._longest[size] = max(seconds, self._longest.get(size, 0.0))
        self._step = None

    def tick(self, seconds: float, *, is_loading: bool = False) -> str | None:
        """So much later: why the worker should be given up, or None. `is_loading`: the step waits for weights."""
        if self._step is None:
            return None
        if is_loading:
            self._loading_seconds += seconds
            passed, limit, what = self._loading_seconds, self._first_limit_seconds, "has been loading weights"
        else:
            self._passed_seconds += seconds
            passed, limit, what = self._passed_seconds, self._limit_seconds, "has not returned"
        if passed <= limit:
            return None
        return f"step {self._step.step} of {len(self._step.chunks)} requests {what} for {passed:.0f} s: it hangs"

    def limit_seconds(self, step: RunStep) -> float:
        """How long this step may take: many times what the longest one of no more work took."""
        if not self._longest:
            return self._first_limit_seconds
        size = _size(step)
        smaller = [known for known in self._longest if known <= size]
        if smaller:
            expected = max(self._longest[known] for known in smaller) * 2.0 ** (size - max(smaller))
        else:
            expected = self._longest[min(self._longest)]
        return max(self._least_limit_seconds, LONGER_THAN_EXPECTED * expected * step.repeats)


def _size(step: RunStep) -> int:
    """The power of two of a step's work, in tokens without context."""
    work = sum(chunk.num_tokens * (1 + (chunk.start + chunk.num_tokens) / EVEN_CONTEXT) for chunk in step.chunks)
    return int(work).bit_length()
