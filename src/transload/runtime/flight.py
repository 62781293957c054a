"""Tokens on their way from a worker to the controller, told in one message and yet each at its own time.

A request that decodes gets a token in each step of its worker, so its last n tokens were made in the last n steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import overload

import msgspec

from transload.control.messages import Emitted, Token
from transload.runtime.decode_run import DecodeRun


class Segment:
    """Steps of one worker that followed one another: some of a run, or a single one of another kind."""

    __slots__ = ("count", "end_seconds", "first", "run", "step_seconds")

    def __init__(self, run: DecodeRun | None, first: int, last: int, began: float, ended: float) -> None:
        self.run = run
        self.first = first
        self.count = last - first + 1
        self.end_seconds = ended
        self.step_seconds = (ended - began) / self.count
        """Of each of its steps, on average."""

    def end(self, index: int) -> float:
        """When its step of this index, from 0, ended."""
        return self.end_seconds if self.run is None else self.run.end(self.first + index)


class StepTimes(Sequence[float]):
    """When the last `length` steps of some segments ended, and a while after. Not a list: a run may be long."""

    __slots__ = ("_after_seconds", "_length", "_segments", "_skip", "first_step_seconds")

    def __init__(self, segments: Sequence[Segment], length: int, skip: int, after_seconds: float) -> None:
        """`skip`: steps of the first segment that are not meant."""
        self._segments = segments
        self._length = length
        self._skip = skip
        self._after_seconds = after_seconds
        self.first_step_seconds = segments[0].step_seconds
        """How long the first of these steps took, on average over those it stands with."""

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> float: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[float]: ...
    def __getitem__(self, index: int | slice) -> float | Sequence[float]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(self._length))]
        if index == -1:
            return self._segments[-1].end_seconds + self._after_seconds
        if not 0 <= index < self._length:
            raise IndexError(index)
        index += self._skip
        for segment in self._segments:
            if index < segment.count:
                return segment.end(index) + self._after_seconds
            index -= segment.count
        raise AssertionError("fewer steps than tokens")

    def last(self, length: int) -> StepTimes:
        """Of the last so many of these steps."""
        if length == self._length:
            return self
        skip, first = self._skip + self._length - length, 0
        while skip >= self._segments[first].count:
            skip -= self._segments[first].count
            first += 1
        return StepTimes(self._segments[first:], length, skip, self._after_seconds)

    def until(self, now: float) -> int:
        """How many of the steps had ended, and the while after was over, by now."""
        if self[-1] <= now:
            return self._length
        length = self._length
        while length and self[length - 1] > now:
            length -= 1
        return length


class StepLog:
    """The last steps of a worker, as far back as tokens may be held back."""

    __slots__ = ("_keep", "_length", "_segments")

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._segments: deque[Segment] = deque()
        self._length = 0

    def add(self, segment: Segment) -> None:
        """Steps were done."""
        self._segments.append(segment)
        self._length += segment.count
        while self._length - self._segments[0].count >= self._keep:
            self._length -= self._segments.popleft().count

    def times(self, length: int, after_seconds: float) -> StepTimes:
        """Of the last `length` steps."""
        segments: list[Segment] = []
        missing = length
        for segment in reversed(self._segments):
            segments.append(segment)
            missing -= segment.count
            if missing <= 0:
                break
        segments.reverse()
        return StepTimes(segments, length, -missing, after_seconds)


class Flight:
    """One message of tokens. What has got there by some time can be told apart."""

    __slots__ = ("_emitted", "_late", "_times")

    def __init__(self, emitted: Emitted, times: StepTimes) -> None:
        self._emitted = emitted
        self._times = times
        self._late = len(times)
        """So many of the last steps have not been told of."""

    def land(self, now: float | None) -> tuple[Emitted, Sequence[float]] | None:
        """What has arrived by now (None: all of it) and was not told of before, and the times of the last steps of
        that: a token's own are as many as it stands for."""
        length = len(self._times)
        late = 0 if now is None else length - self._times.until(now)
        before, self._late = self._late, min(late, self._late)
        if late >= before:
            return None
        if (before, late) == (length, 0):
            return self._emitted, self._times
        tokens = [cut for token in self._emitted.tokens if (cut := _cut(token, before, late)) is not None]
        return msgspec.structs.replace(self._emitted, tokens=tuple(tokens)), self._times[: length - late]


def _cut(token: Token, before: int, late: int) -> Token | None:
    """Without those of the last `late` steps, and only those of the last `before`."""
    every = (token.token, *token.more)
    begin, end = max(0, len(every) - before), len(every) - late
    if end <= begin:
        return None
    part = every[begin:end]
    return msgspec.structs.replace(
        token,
        index=token.index + begin,
        token=part[0],
        finish=token.finish if end == len(every) else None,
        logprobs=token.logprobs if begin == 0 else None,
        more=part[1:],
    )
