"""The tokens of a run of steps on their way to the controller, told in one message and yet each at its own time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import msgspec

from transload.control.messages import Emitted, Token
from transload.runtime.decode_run import DecodeRun


class StepTimes(Sequence[float]):
    """When steps [first, last] of a run have ended, and a while after. Not a list: a run may be long."""

    __slots__ = ("_after_seconds", "_first", "_last", "_run")

    def __init__(self, run: DecodeRun, first: int, last: int, after_seconds: float) -> None:
        self._run = run
        self._first = first
        self._last = last
        self._after_seconds = after_seconds

    def __len__(self) -> int:
        return self._last - self._first + 1

    @overload
    def __getitem__(self, index: int) -> float: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[float]: ...
    def __getitem__(self, index: int | slice) -> float | Sequence[float]:
        if isinstance(index, slice):
            low, high, stride = index.indices(len(self))
            assert stride == 1
            return StepTimes(self._run, self._first + low, self._first + high - 1, self._after_seconds)
        number = self._first + index if index >= 0 else self._last + 1 + index
        if not self._first <= number <= self._last:
            raise IndexError(index)
        return self._run.end(number) + self._after_seconds


class Flight:
    """One message with the tokens of several steps. What has got there by some time can be told apart."""

    __slots__ = ("_emitted", "_num_landed", "_times")

    def __init__(self, emitted: Emitted, times: StepTimes) -> None:
        self._emitted = emitted
        self._times = times
        self._num_landed = 0

    def land(self, now: float | None) -> tuple[Emitted, Sequence[float]] | None:
        """What has arrived by now (None: all of it) and was not told of before."""
        begin, end = self._num_landed, len(self._times)
        if now is not None:
            while end > begin and self._times[end - 1] > now:
                end -= 1
        if end == begin:
            return None
        self._num_landed = end
        if (begin, end) == (0, len(self._times)):
            return self._emitted, self._times
        tokens = tuple([_cut(token, begin, end) for token in self._emitted.tokens])
        return msgspec.structs.replace(self._emitted, tokens=tokens), self._times[begin:end]


def _cut(token: Token, begin: int, end: int) -> Token:
    every = (token.token, *token.more)
    part = every[begin:end]
    return msgspec.structs.replace(
        token,
        index=token.index + begin,
        token=part[0],
        finish=token.finish if end == len(every) else None,
        logprobs=token.logprobs if begin == 0 else None,
        more=part[1:],
    )
