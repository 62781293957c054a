"""What a virtual cluster is made of: live workers, links, and the seams at which a run is watched or disturbed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from transload.control.engine import Engine
from transload.control.messages import (
    CancelSends,
    ControllerEvent,
    ExpectKv,
    Finish,
    Frame,
    KvData,
    KvDone,
    Load,
    Reject,
    RunStep,
    SendFrame,
    Stream,
    TransferId,
    WorkerId,
)
from transload.runtime.decode_run import DecodeRun
from transload.runtime.flight import Flight, StepLog
from transload.runtime.flows import Flow, Wire
from transload.runtime.virtual_worker import VirtualWorker as VirtualWorker


class VirtualSink(Protocol):
    """Where the results of a virtual run go."""

    def stream(self, command: Stream, times: Sequence[float], /) -> None:
        """One or more tokens, and when each was there."""

    def finish(self, command: Finish, now: float, /) -> None: ...
    def reject(self, command: Reject, now: float, /) -> None: ...


class Watcher(Protocol):
    """Is told how the time was spent."""

    def steps(
        self, worker: WorkerId, start: float, end: float, num_steps: int, num_prefill_tokens: int, num_decode: int, /
    ) -> None:
        """Steps of the same shape, one after the other."""

    def sent(self, source: WorkerId, target: WorkerId, start: float, end: float, num_bytes: int, /) -> None:
        """A frame of KV was on the wire."""

    def load(self, load: Load, now: float, /) -> None: ...


class KvContents(Protocol):
    """Follows what the KV memory of every worker holds, byte for byte or in some likeness of it. A run that only wants
    times has none; a run that looks for mistakes has one that asserts."""

    def step_started(self, worker: WorkerId, step: RunStep, /, *, fails: bool) -> None:
        """The step takes in the blocks that have arrived, reads what its chunks rest on, and begins to write their own
        positions. One that `fails` may do any part of that."""

    def layers_written(self, worker: WorkerId, step: RunStep, layer_lo: int, layer_hi: int, /) -> None:
        """These layers of the step's own positions are complete."""

    def step_ended(self, worker: WorkerId, step: RunStep, /, *, fails: bool) -> None:
        """The step touches nothing any more."""

    def send_started(self, source: WorkerId, send: SendFrame, /) -> None:
        """The frame's cells are being read at the source; a one-sided write has begun at the target."""

    def send_ended(self, source: WorkerId, send: SendFrame, /) -> None:
        """The source has been read."""

    def landed(self, source: WorkerId, send: SendFrame, /, *, intact: bool) -> None:
        """The cells lie at the target, or, if not `intact`, others than were sent."""

    def window_opened(self, worker: WorkerId, window: int, peer: WorkerId, /) -> None:
        """From now on the worker's blocks from this one on are the peer's."""

    def window_closed(self, worker: WorkerId, window: int, /) -> None:
        """What it touches there from now on is nobody's."""

    def worker_started(self, worker: WorkerId, num_blocks: int, /) -> None: ...
    def worker_ended(self, worker: WorkerId, /) -> None: ...


class Link:
    """One direction between two workers: frames wait for the one on the wire."""

    def __init__(self, source: LiveWorker, target: LiveWorker, wire: Wire, rank: int, number: int) -> None:
        self.source = source
        self.number = number
        """Of the links that the source has had, this is the so manieth."""
        self.window: int | None = None
        """Where the source's steps find the target's blocks."""
        self.target = target
        self.wire = wire
        self.rank = rank
        self.queue: deque[SendFrame] = deque()
        self.current: SendFrame | None = None
        self.flow: Flow | None = None
        self.drains: list[CancelSends] = []
        self.is_open = True

    def cancel(self, command: CancelSends) -> bool:
        """Drop what waits of this transfer. Whether something of it is on the wire."""
        self.queue = deque(send for send in self.queue if not self._takes_back(command, send.frame))
        return self.is_open and self.current is not None and self.current.frame.transfer == command.transfer

    @staticmethod
    def _takes_back(command: CancelSends, frame: Frame) -> bool:
        """Data and its end; an abort or its answer still has to get there."""
        return frame.transfer == command.transfer and isinstance(frame, KvData | KvDone)


class LiveWorker:
    """A live incarnation: its engine, its clock, the step it is in, and what it may be written by whom."""

    def __init__(self, spec: VirtualWorker, index: int, incarnation: int) -> None:
        self.spec = spec
        self.name = spec.engine.worker
        self.index = index
        """Its place among the workers, for the order of what happens at the same time."""
        self.incarnation = incarnation
        # another seed: a transfer must not be named like one of the incarnation before
        self.engine = Engine(msgspec.structs.replace(spec.engine, seed=spec.engine.seed + (incarnation << 32)))
        self.is_alive = True
        self.clock_offset_seconds = 0.0
        self.backlog: deque[tuple[Callable[..., None], tuple[Any, ...]]] | None = None
        """What waits for a paused worker; None while it runs."""
        self.is_declared_gone = False
        self.links: dict[WorkerId, Link] = {}
        """Outgoing ones, as far as its engine has heard of them."""
        self.num_links = 0
        self.window_end = spec.engine.num_blocks
        """Blocks from here on are in no window yet."""
        self.num_windows = 0
        self.permissions: dict[tuple[TransferId, int], ExpectKv] = {}
        self.step: RunStep | None = None
        self.step_began = self.step_ends = 0.0
        self.step_version = 0
        """Goes up when the end of its step is known anew: an end that was foretold before does not count."""
        self.run: DecodeRun | None = None
        """The steps its step is one of, if they only decode."""
        self.log = StepLog(spec.engine.hold_tokens + spec.engine.run_steps)
        self.is_emitting = False
        """While its engine is told of steps: what it reports of tokens was made in the last of them."""
        self.words: list[ControllerEvent | Flight] = []
        """What its engine has to tell the controller after the event of the moment."""
        self.flights: deque[Flight] = deque()
        """Tokens on their way to the controller."""


FrameFault = Callable[[WorkerId, WorkerId, Frame], "list[tuple[float, Frame, int]]"]
"""(source, target, frame) -> what arrives instead: (extra delay, frame, checksum of the bytes that arrived)."""

StepFault = Callable[[WorkerId, RunStep], "str | None"]
"""(worker, step) -> why it fails, or None."""


def never_fails(_worker: WorkerId, _step: RunStep) -> None:
    """No fault: every step is computed."""


def faithful(_source: WorkerId, _target: WorkerId, frame: Frame) -> list[tuple[float, Frame, int]]:
    """No fault: what was sent arrives."""
    return [(0.0, frame, frame.checksum if isinstance(frame, KvData) else 0)]


def is_intact(arrival: tuple[float, Frame, int]) -> bool:
    """Whether the bytes that arrive are those that were sent."""
    _, frame, checksum = arrival
    return not isinstance(frame, KvData) or checksum == frame.checksum
