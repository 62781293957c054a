"""What happened when: steps, transfers and stages of requests, put together from the events that machines were told.

`observe` has the form of the virtual runtime's own observer, and `read_timeline` replays the event logs of a real run
into it: one code for both. It never looks at a clock and never asks a machine; what the events do not say is not here.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import msgspec

from transload.control.messages import (
    Arrived,
    Cancelled,
    ControllerEvent,
    Emitted,
    EngineEvent,
    HandoffFailed,
    KvVerified,
    LinkMeasured,
    Load,
    Message,
    Preempted,
    Prefill,
    RequestFailed,
    Reserve,
    Reserved,
    Started,
    StepDone,
    Token,
    WorkerGone,
    WorkerJoined,
)
from transload.errors import DeploymentError
from transload.runtime.event_log import read_event_log

MAX_STEPS = 400_000
"""More are counted and not kept: a viewer of traces would not open them."""
CONTROLLER = "controller"


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One forward pass of a worker. Times in seconds since the timeline began."""

    worker: str
    start_seconds: float
    end_seconds: float
    num_prefill_tokens: int
    num_decode: int
    """Requests that decode in it."""
    num_requests: int
    """That have tokens in it."""
    num_steps: int = 1
    """More: a run of steps of the same requests, one after another."""

    @property
    def kind(self) -> str:
        if self.num_prefill_tokens and self.num_decode:
            return "mixed"
        return "prefill" if self.num_prefill_tokens else "decode"


class TransferSpan(msgspec.Struct, frozen=True, kw_only=True):
    """A handoff's bytes on their way: from the first frame that came in to the verified whole."""

    request: int
    epoch: int
    source: str | None
    """None: the logs do not say."""
    target: str
    start_seconds: float
    end_seconds: float
    num_bytes: int
    num_frames: int


class StageSpan(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    worker: str | None
    start_seconds: float
    end_seconds: float


class RequestSpan(msgspec.Struct, frozen=True, kw_only=True):
    """A request from its arrival to its end. Its stages follow each other without gap."""

    request: int
    num_prompt_tokens: int
    num_outputs: int
    end: str
    """length, stop, cancelled, or unfinished when the events end before it does."""
    stages: tuple[StageSpan, ...]

    @property
    def start_seconds(self) -> float:
        return self.stages[0].start_seconds

    @property
    def end_seconds(self) -> float:
        return self.stages[-1].end_seconds


class LoadPoint(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker held after a step."""

    worker: str
    at_seconds: float
    num_running: int
    num_waiting: int
    kv_used_share: float
    """Of its KV blocks, those that requests hold."""


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """Something worth a flag: a worker joined or was lost, a request was preempted or begun anew."""

    worker: str
    at_seconds: float
    name: str


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """A run, or a part of it. Each list is in the order of its starts."""

    pools: dict[str, tuple[str, str]]
    """Worker: its pool and role."""
    kv_tokens: dict[str, int]
    """Worker: the tokens its KV cache holds."""
    transports: tuple[str, ...]
    """What carries KV between workers, as they told."""
    clock_seconds: float
    """When it began, on the clock of the run."""
    duration_seconds: float
    steps: tuple[Step, ...]
    num_steps_left_out: int
    transfers: tuple[TransferSpan, ...]
    requests: tuple[RequestSpan, ...]
    loads: tuple[LoadPoint, ...]
    marks: tuple[Mark, ...]


class _LiveRequest:
    """A request whose end has not been seen."""

    def __init__(self, num_prompt_tokens: int, now: float) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.num_outputs = 0
        self.is_handed_off = False
        """In this attempt another worker prefills."""
        self.is_verified = False
        self.stages: list[tuple[str, str | None, float]] = [("queue", None, now)]

    def begin(self, name: str, worker: str | None, now: float) -> None:
        if self.stages[-1][:2] != (name, worker):
            self.stages.append((name, worker, now))

    def close(self, request: int, end: str, now: float) -> RequestSpan:
        ends = [start for _, _, start in self.stages[1:]] + [now]
        stages = tuple(
            StageSpan(name=name, worker=worker, start_seconds=start, end_seconds=max(start, stage_end))
            for (name, worker, start), stage_end in zip(self.stages, ends, strict=True)
        )
        return RequestSpan(
            request=request,
            num_prompt_tokens=self.num_prompt_tokens,
            num_outputs=self.num_outputs,
            end=end,
            stages=stages,
        )


class TimelineRecorder:
    """Collects a timeline. Hand `observe` every event before it is handled, in order of time."""

    def __init__(self, max_steps: int = MAX_STEPS) -> None:
        self._max_steps = max_steps
        self._began: float | None = None
        self._last = 0.0
        self._pools: dict[str, tuple[str, str]] = {}
        self._kv_tokens: dict[str, int] = {}
        self._transports: set[str] = set()
        self._steps: list[Step] = []
        self._num_left_out = 0
        self._unreported: dict[str, deque[tuple[float, float, int]]] = {}
        """Ends, seconds and numbers of steps by worker, whose shape the controller has not been told yet."""
        self._sources: dict[tuple[int, int], str] = {}
        self._transfers: list[TransferSpan] = []
        self._live: dict[int, _LiveRequest] = {}
        self._requests: list[RequestSpan] = []
        self._loads: list[LoadPoint] = []
        self._marks: list[Mark] = []

    def observe(self, now: float, who: str, event: Message) -> None:
        """One event, at `now` seconds on the clock of the run."""
        if self._began is None:
            self._began = now
        now -= self._began
        self._last = max(self._last, now)
        match event:
            case StepDone(_, _, seconds, count) if seconds > 0:
                self._unreported.setdefault(who, deque()).append((now, seconds, count))
            case Reserve(request, epoch, source):
                self._sources[request.id, epoch] = source
            case Prefill(request, epoch):
                self._sources[request.id, epoch] = who
            case _ if who == CONTROLLER:
                self._observe_controller(now, event)
            case _:
                pass

    def add_step(
        self,
        worker: str,
        start_seconds: float,
        end_seconds: float,
        num_prefill_tokens: int,
        num_decode: int,
        num_steps: int = 1,
    ) -> None:
        """A step, or a run of them, that is known otherwise than by its events, on the clock of the run."""
        began = self._began or 0.0
        self._keep(
            Step(
                worker=worker,
                start_seconds=start_seconds - began,
                end_seconds=end_seconds - began,
                num_prefill_tokens=num_prefill_tokens,
                num_decode=num_decode,
                num_requests=num_decode + (num_prefill_tokens > 0),
                num_steps=num_steps,
            )
        )

    def timeline(self) -> Timeline:
        """Everything so far. Requests that have not ended end now, and say so."""
        unfinished = [live.close(request, "unfinished", self._last) for request, live in self._live.items()]
        return Timeline(
            pools=dict(sorted(self._pools.items())),
            kv_tokens=self._kv_tokens,
            transports=tuple(sorted(self._transports)),
            clock_seconds=self._began or 0.0,
            duration_seconds=self._last,
            steps=tuple(sorted(self._steps, key=lambda step: (step.start_seconds, step.worker))),
            num_steps_left_out=self._num_left_out,
            transfers=tuple(sorted(self._transfers, key=lambda transfer: transfer.start_seconds)),
            requests=tuple(sorted([*self._requests, *unfinished], key=lambda request: request.start_seconds)),
            loads=tuple(self._loads),
            marks=tuple(self._marks),
        )

    # -- what the controller was told ---------------------------------------------------------------------------------

    def _observe_controller(self, now: float, event: Message) -> None:
        match event:
            case Load():
                self._take_load(now, event)
            case Emitted(worker, tokens):
                for token in tokens:
                    self._take_token(now, worker, token)
            case Arrived(request):
                self._live[request.id] = _LiveRequest(request.num_prompt_tokens, now)
            case Cancelled(request, reason):
                self._end(request, reason, now)
            case WorkerJoined(worker, incarnation, pool, role):
                self._pools[worker] = pool, role
                self._kv_tokens[worker] = event.num_blocks * event.block_size
                if incarnation > 1:
                    self._mark(worker, now, f"joined again, incarnation {incarnation}")
            case LinkMeasured(_, _, transport) if transport:
                self._transports.add(transport)
            case WorkerGone(worker, _, reason):
                self._unreported.pop(worker, None)
                self._mark(worker, now, f"lost: {reason}")
            case Reserved() | Started() | KvVerified() | Preempted() | HandoffFailed() | RequestFailed():
                live = self._live.get(event.request)
                if isinstance(event, KvVerified):
                    self._take_transfer(now, event)
                if live is not None:
                    self._progress(live, now, event)
            case _:
                pass

    def _progress(
        self,
        live: _LiveRequest,
        now: float,
        event: Reserved | Started | KvVerified | Preempted | HandoffFailed | RequestFailed,
    ) -> None:
        worker = str(event.worker)
        match event:
            case Reserved():
                live.is_handed_off = True
                live.is_verified = False
                live.begin("prefill queue", None, now)
            case Started():
                computes_prompt = live.stages[-1][0] in ("queue", "prefill queue", "recovery queue", "preempted")
                live.begin("prefill" if computes_prompt else "decode", worker, now)
            case KvVerified():
                live.is_verified = True
                if live.stages[-1][0] == "transfer":
                    live.begin("decode queue", worker, now)
            case Preempted():
                live.begin("preempted", worker, now)
                self._mark(worker, now, f"request {event.request} preempted")
            case HandoffFailed() | RequestFailed():
                live.is_handed_off = False
                live.begin("recovery queue", None, now)
                self._mark(worker, now, f"request {event.request} begun anew: {event.reason}")

    def _take_token(self, now: float, worker: str, token: Token) -> None:
        live = self._live.get(token.request)
        if live is None or token.index < live.num_outputs:
            return
        live.num_outputs = token.index + 1 + len(token.more)
        if live.stages[-1][0] in ("prefill", "queue", "prefill queue"):
            if not live.is_handed_off:
                live.begin("decode", worker, now)
            else:
                live.begin("decode queue" if live.is_verified else "transfer", None, now)
        elif live.stages[-1][0] in ("preempted", "recovery queue"):
            live.begin("decode", worker, now)
        if token.finish is not None:
            self._end(token.request, token.finish, now)

    def _end(self, request: int, end: str, now: float) -> None:
        live = self._live.pop(request, None)
        if live is not None:
            self._requests.append(live.close(request, end, now))

    def _take_transfer(self, now: float, verified: KvVerified) -> None:
        self._transfers.append(
            TransferSpan(
                request=verified.request,
                epoch=verified.epoch,
                source=self._sources.pop((verified.request, verified.epoch), None),
                target=verified.worker,
                start_seconds=max(0.0, now - verified.wire_seconds),
                end_seconds=now,
                num_bytes=verified.num_bytes,
                num_frames=verified.num_frames,
            )
        )

    def _take_load(self, now: float, load: Load) -> None:
        self._loads.append(
            LoadPoint(
                worker=load.worker,
                at_seconds=now,
                num_running=load.num_running,
                num_waiting=load.num_waiting,
                kv_used_share=load.blocks_referenced / load.blocks_total if load.blocks_total else 0.0,
            )
        )
        if load.step_seconds <= 0:
            return
        end, seconds = self._computed(load, now)
        self._keep(
            Step(
                worker=load.worker,
                start_seconds=max(0.0, end - seconds),
                end_seconds=end,
                num_prefill_tokens=load.step_prefill_tokens,
                num_decode=load.step_decode_tokens,
                num_requests=load.step_requests,
                num_steps=load.num_steps,
            )
        )

    def _computed(self, load: Load, now: float) -> tuple[float, float]:
        """When the steps that this load is about ended, and how long they took: as the worker itself said, else as far
        as the controller can know."""
        waiting = self._unreported.get(load.worker)
        end, seconds, count = now, load.step_seconds * load.num_steps, 0
        spent = 0.0
        while waiting and count < load.num_steps:
            end, took, steps = waiting.popleft()
            if load.num_steps == 1 and took != load.step_seconds:
                end = now  # of a step that nobody was told of
                continue
            spent += took
            count += steps
        return (end, max(spent, seconds)) if count == load.num_steps else (now, seconds)

    def _keep(self, step: Step) -> None:
        if len(self._steps) < self._max_steps:
            self._steps.append(step)
        else:
            self._num_left_out += 1

    def _mark(self, worker: str, now: float, name: str) -> None:
        self._marks.append(Mark(worker=worker, at_seconds=now, name=name))


# ---------------------------------------------------------------------------------------------------------------------
# Event logs of a real run


def read_timeline(folder: str | Path) -> Timeline:
    """From what `transload serve --event-log FOLDER` wrote. Workers of other hosts have clocks of their own: their
    logs do not belong in the same folder; without them steps end when the controller hears of them.

    Raises `DeploymentError` if there is no event log in the folder or a line is none.
    """
    path = Path(folder)
    files = sorted(path.glob("*.jsonl"))
    if not any(file.name.startswith(f"{CONTROLLER}.") for file in files):
        raise DeploymentError(
            f"{folder}: no event log of a controller there; want the folder that `transload serve --event-log` wrote"
        )
    recorder = TimelineRecorder()
    lines: list[tuple[float, str, Message]] = []
    for file in files:
        who = file.name.rsplit(".", 2)[0]
        try:
            lines += [(line["at"], who, _event(who, line)) for line in read_event_log(file)]
        except (msgspec.DecodeError, KeyError) as problem:
            raise DeploymentError(f"{file}: not an event log of this version of Transload: {problem}") from None
    # At equal times what a worker did comes before what the controller was told of it.
    for at, who, event in sorted(lines, key=lambda line: (line[0], line[1] == CONTROLLER)):
        recorder.observe(at, who, event)
    return recorder.timeline()


def _event(who: str, line: dict[str, Any]) -> Message:
    """A line of a log as the message it was."""
    kind: Any = ControllerEvent if who == CONTROLLER else EngineEvent
    fields = [value for key, value in line.items() if key not in ("at", "event")]
    event: Message = msgspec.convert([line["event"], *fields], type=kind, strict=True)
    return event
