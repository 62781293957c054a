"""What commands cost in virtual time. Owns durations; decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from transload.control.messages import Chunk, WorkerId
from transload.runtime.flows import Port, Wire


class CostModel(Protocol):
    """The same work as a duration, in seconds."""

    def step_seconds(self, worker: WorkerId, chunks: Sequence[Chunk], /) -> float: ...

    def decode_line(self, worker: WorkerId, num_decode: int, /) -> tuple[float, float] | None:
        """(fixed, per context token) of a step in which so many requests each compute a token and nobody a prompt.
        None: no such line; then every step is asked for by itself."""
        ...

    def wire(self, source: WorkerId, target: WorkerId, /) -> Wire:
        """The way from one worker to another, asked for once for each pair that meets."""
        ...

    def message_seconds(self) -> float: ...
    def start_seconds(self, worker: WorkerId, /) -> float: ...


class FfnSide(Protocol):
    """Workers that compute feed-forwards for others. They hold no request, so all that is felt of them is how long a
    step of those others takes, and whether it ends well."""

    def serves(self, worker: WorkerId, /) -> bool:
        """Whether this worker's feed-forwards are computed there."""
        ...

    def kill(self, worker: WorkerId, now: float, /) -> Sequence[WorkerId]:
        """One of them dies. Whose steps under way are to be asked for again."""
        ...

    def step(self, worker: WorkerId, chunks: Sequence[Chunk], began: float, /) -> tuple[float, str | None]:
        """Seconds of a step that began then, as far as is known by now, and why it fails, if it does."""
        ...


class LinearCost(msgspec.Struct, frozen=True, kw_only=True):
    """A chip in four numbers: a step costs a fixed time, so much a token, and so much a token of context read."""

    step_floor_seconds: float = 0.008
    seconds_per_token: float = 0.0007
    seconds_per_context_token: float = 2e-6
    link_bytes_per_second: float = 5e9
    link_latency_seconds: float = 1e-4
    control_latency_seconds: float = 1e-4
    load_seconds: float = 2.0

    def step_seconds(self, _worker: WorkerId, chunks: Sequence[Chunk]) -> float:
        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        context = sum(chunk.start + chunk.num_tokens for chunk in chunks)
        return self.step_floor_seconds + num_tokens * self.seconds_per_token + context * self.seconds_per_context_token

    def decode_line(self, _worker: WorkerId, num_decode: int) -> tuple[float, float] | None:
        return self.step_floor_seconds + num_decode * self.seconds_per_token, self.seconds_per_context_token

    def wire(self, _source: WorkerId, _target: WorkerId) -> Wire:
        return Wire([Port(self.link_bytes_per_second)], self.link_latency_seconds)

    def message_seconds(self) -> float:
        return self.control_latency_seconds

    def start_seconds(self, _worker: WorkerId) -> float:
        return self.load_seconds
