"""Virtual time: the shipped machines on an event heap, with a cost model in place of chips and wires.

Every command becomes a duration, every duration an event. Two runs of one seed are identical. Messages between the
controller and a worker, and frames between two workers, each keep their order, as on a socket.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import Protocol

import msgspec

from transload.control.controller import Controller, ControllerConfig
from transload.control.engine import Engine, EngineConfig
from transload.control.messages import (
    Arrived,
    Cancelled,
    CancelSends,
    CancelTimer,
    Chunk,
    ControllerCommand,
    ControllerEvent,
    EngineCommand,
    EngineEvent,
    ExpectKv,
    Finish,
    ForgetKv,
    Frame,
    KvData,
    LayersReady,
    LinkMeasured,
    Message,
    PeerFrame,
    PeerLost,
    PeerUp,
    Reject,
    Request,
    RequestId,
    RestartWorker,
    Role,
    RunStep,
    Sampled,
    SendFrame,
    SendsDrained,
    SetTimer,
    StepDone,
    Stream,
    TimerFired,
    ToController,
    ToWorker,
    TransferId,
    WorkerGone,
    WorkerId,
    WorkerJoined,
)

CONTROLLER = WorkerId("controller")


class CostModel(Protocol):
    """The same work as a duration, in seconds."""

    def step_seconds(self, worker: WorkerId, chunks: Sequence[Chunk], /) -> float: ...
    def frame_seconds(self, source: WorkerId, target: WorkerId, num_bytes: int, /) -> float: ...
    def message_seconds(self) -> float: ...
    def start_seconds(self, worker: WorkerId, /) -> float: ...


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

    def frame_seconds(self, _source: WorkerId, _target: WorkerId, num_bytes: int) -> float:
        return self.link_latency_seconds + num_bytes / self.link_bytes_per_second

    def message_seconds(self) -> float:
        return self.control_latency_seconds

    def start_seconds(self, _worker: WorkerId) -> float:
        return self.load_seconds


class VirtualWorker(msgspec.Struct, frozen=True, kw_only=True):
    """A worker to be simulated."""

    engine: EngineConfig
    pool: str
    role: Role
    layers_per_frame: int
    one_sided: bool = True
    """Whether its links write straight into the peer's memory, as shared memory does."""


class VirtualSink(Protocol):
    """Where the results of a virtual run go."""

    def stream(self, command: Stream, now: float) -> None: ...
    def finish(self, command: Finish, now: float) -> None: ...
    def reject(self, command: Reject, now: float) -> None: ...


class _Link:
    """One direction between two workers: frames wait for the one on the wire."""

    def __init__(self) -> None:
        self.queue: deque[SendFrame] = deque()
        self.current: SendFrame | None = None
        self.drains: list[CancelSends] = []


class _Worker:
    """A live incarnation: its engine and its timers."""

    def __init__(self, spec: VirtualWorker, incarnation: int) -> None:
        self.spec = spec
        self.incarnation = incarnation
        self.engine = Engine(spec.engine)


FrameFault = Callable[[WorkerId, WorkerId, Frame], "list[tuple[float, Frame, int]]"]
"""(source, target, frame) -> what arrives instead: (extra delay, frame, checksum of the bytes that arrived)."""


def faithful(_source: WorkerId, _target: WorkerId, frame: Frame) -> list[tuple[float, Frame, int]]:
    """No fault: what was sent arrives."""
    return [(0.0, frame, frame.checksum if isinstance(frame, KvData) else 0)]


class VirtualRuntime:
    """Drives one controller and its workers. `observe(now, who, event)` sees every event before it is handled."""

    def __init__(
        self,
        controller: ControllerConfig,
        workers: Sequence[VirtualWorker],
        cost: CostModel,
        sink: VirtualSink,
        *,
        draw_token: Callable[[Request, int], int] = lambda request, index: 3 + (request.id * 31 + index) % 997,
        frame_fault: FrameFault = faithful,
        observe: Callable[[float, WorkerId, Message], None] | None = None,
    ) -> None:
        self.now = 0.0
        self.controller = Controller(controller)
        self.workers: dict[WorkerId, _Worker] = {}
        self._specs = {spec.engine.worker: spec for spec in workers}
        self._cost = cost
        self._sink = sink
        self._draw_token = draw_token
        self._frame_fault = frame_fault
        self._observe = observe
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._timers: dict[tuple[WorkerId, str], int] = {}
        self._links: dict[tuple[WorkerId, WorkerId], _Link] = defaultdict(_Link)
        self._incarnations: dict[WorkerId, int] = defaultdict(int)
        self._permissions: dict[WorkerId, set[TransferId]] = defaultdict(set)
        for worker in self._specs:
            self._at(0.0, lambda worker=worker: self._start_worker(worker))  # type: ignore[misc]

    # -- what a caller does -------------------------------------------------------------------------------------------

    def submit(self, at_seconds: float, request: Request) -> None:
        """A request arrives at this time."""
        self._at(at_seconds, lambda: self._tell_controller(Arrived(request)))

    def cancel(self, at_seconds: float, request: RequestId) -> None:
        """Its caller goes away at this time."""
        self._at(at_seconds, lambda: self._tell_controller(Cancelled(request, "cancelled")))

    def kill(self, at_seconds: float, worker: WorkerId) -> None:
        """The worker dies at this time, whatever it is doing."""
        self._at(at_seconds, lambda: self._kill_worker(worker))

    def run(self, arrivals: Iterable[tuple[float, Request]] = (), *, until: float = float("inf")) -> None:
        """Play the arrivals and everything that follows, to the end or up to a time. Timers alone do not keep a run
        going once every request has ended."""
        source = iter(arrivals)
        self._feed(source)
        while self._heap and self._heap[0][0] <= until:
            self.now, _, action = heapq.heappop(self._heap)
            action()

    def _feed(self, source: Iterator[tuple[float, Request]]) -> None:
        """One arrival at a time is on the heap: memory does not grow with the length of a trace."""
        following = next(source, None)
        if following is None:
            return
        at_seconds, request = following

        def arrive() -> None:
            self._tell_controller(Arrived(request))
            self._feed(source)

        self._at(at_seconds, arrive)

    # -- the heap -----------------------------------------------------------------------------------------------------

    def _at(self, at_seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (max(at_seconds, self.now), next(self._order), action))

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        self._at(self.now + seconds, action)

    def _tell_controller(self, event: ControllerEvent) -> None:
        if self._observe is not None:
            self._observe(self.now, CONTROLLER, event)
        for command in self.controller.handle(event, self.now):
            self._obey_controller(command)

    def _tell_worker(self, worker: WorkerId, incarnation: int, event: EngineEvent) -> None:
        alive = self.workers.get(worker)
        if alive is None or alive.incarnation != incarnation:
            return
        if self._observe is not None:
            self._observe(self.now, worker, event)
        for command in alive.engine.handle(event, self.now):
            self._obey_engine(alive, command)

    # -- commands -----------------------------------------------------------------------------------------------------

    def _obey_controller(self, command: ControllerCommand) -> None:
        match command:
            case ToWorker(worker, event):
                incarnation = self._incarnations[worker]
                self._after(self._cost.message_seconds(), lambda: self._tell_worker(worker, incarnation, event))
            case Stream():
                self._sink.stream(command, self.now)
            case Finish():
                self._sink.finish(command, self.now)
            case Reject():
                self._sink.reject(command, self.now)
            case RestartWorker(worker, after_seconds):
                self._after(after_seconds + self._cost.start_seconds(worker), lambda: self._start_worker(worker))
            case SetTimer(key, after_seconds):
                self._set_timer(CONTROLLER, key, after_seconds, lambda: self._tell_controller(TimerFired(key)))
            case CancelTimer(key):
                self._timers.pop((CONTROLLER, key), None)

    def _obey_engine(self, worker: _Worker, command: EngineCommand) -> None:
        name, incarnation = worker.spec.engine.worker, worker.incarnation
        match command:
            case RunStep(step, chunks):
                self._run_step(worker, step, chunks)
            case ToController(event):
                self._after(self._cost.message_seconds(), lambda: self._from_worker(name, incarnation, event))
            case SendFrame(peer):
                link = self._links[name, peer]
                link.queue.append(command)
                self._start_send(name, peer, link)
            case CancelSends(peer):
                self._cancel_sends(name, peer, command)
            case ExpectKv(transfer):
                self._permissions[name].add(transfer)
            case ForgetKv(transfer):
                self._permissions[name].discard(transfer)
            case SetTimer(key, after_seconds):
                fire = TimerFired(key)
                self._set_timer(name, key, after_seconds, lambda: self._tell_worker(name, incarnation, fire))
            case CancelTimer(key):
                self._timers.pop((name, key), None)

    def _from_worker(self, worker: WorkerId, incarnation: int, event: ControllerEvent) -> None:
        """What a worker said before it died is lost with its socket, unless it has arrived."""
        alive = self.workers.get(worker)
        if alive is not None and alive.incarnation == incarnation:
            self._tell_controller(event)

    def _set_timer(self, owner: WorkerId, key: str, after_seconds: float, fire: Callable[[], None]) -> None:
        token = next(self._order)
        self._timers[owner, key] = token

        def due() -> None:
            if self._timers.get((owner, key)) == token:
                del self._timers[owner, key]
                fire()

        self._after(after_seconds, due)

    # -- steps --------------------------------------------------------------------------------------------------------

    def _run_step(self, worker: _Worker, step: int, chunks: tuple[Chunk, ...]) -> None:
        name, incarnation = worker.spec.engine.worker, worker.incarnation
        seconds = self._cost.step_seconds(name, chunks)
        if any(chunk.streams for chunk in chunks):
            num_layers = worker.spec.engine.num_layers
            for low in range(0, num_layers, worker.spec.layers_per_frame):
                high = min(low + worker.spec.layers_per_frame, num_layers)
                ready = LayersReady(step, low, high)
                self._after(
                    seconds * high / num_layers,
                    lambda ready=ready: self._tell_worker(name, incarnation, ready),  # type: ignore[misc]
                )
        sampled = tuple(
            Sampled(chunk.request.id, self._draw_token(chunk.request, chunk.num_outputs))
            for chunk in chunks
            if chunk.samples
        )
        done = StepDone(step, sampled, seconds)
        self._after(seconds, lambda: self._tell_worker(name, incarnation, done))

    # -- links --------------------------------------------------------------------------------------------------------

    def _start_send(self, source: WorkerId, target: WorkerId, link: _Link) -> None:
        if link.current is not None or not link.queue:
            return
        link.current = link.queue.popleft()
        frame = link.current.frame
        num_bytes = frame.num_bytes if isinstance(frame, KvData) else 0
        incarnations = self._incarnations[source], self._incarnations[target]
        self._after(
            self._cost.frame_seconds(source, target, num_bytes),
            lambda: self._finish_send(source, target, link, incarnations),
        )

    def _finish_send(self, source: WorkerId, target: WorkerId, link: _Link, incarnations: tuple[int, int]) -> None:
        if incarnations != (self._incarnations[source], self._incarnations[target]) or link.current is None:
            return  # the link died with one of its ends
        frame, link.current = link.current.frame, None
        if isinstance(frame, KvData):
            self._check_write(target, frame)
        for delay, arriving, checksum in self._frame_fault(source, target, frame):
            event = PeerFrame(source, arriving, checksum)
            self._after(delay, lambda event=event: self._tell_worker(target, incarnations[1], event))  # type: ignore[misc]
        drains, link.drains = link.drains, []
        for drain in drains:
            self._drained(source, drain)
        self._start_send(source, target, link)

    def _check_write(self, target: WorkerId, frame: KvData) -> None:
        """Assert that these bytes may land: a one-sided write cannot be refused by the receiver, so it must hit
        blocks that were granted to this transfer, or that are kept aside because it may still come."""
        worker = self.workers[target]
        granted = frame.transfer in self._permissions[target] or worker.engine.pool.is_quarantined(frame.transfer)
        assert granted or not worker.spec.one_sided, (
            f"{target}: a write of transfer {frame.transfer} hits foreign blocks"
        )

    def _cancel_sends(self, source: WorkerId, target: WorkerId, command: CancelSends) -> None:
        link = self._links[source, target]
        link.queue = deque(send for send in link.queue if send.frame.transfer != command.transfer)
        if link.current is not None and link.current.frame.transfer == command.transfer:
            link.drains.append(command)
        else:
            self._drained(source, command)

    def _drained(self, source: WorkerId, command: CancelSends) -> None:
        incarnation = self._incarnations[source]
        event = SendsDrained(command.transfer, command.epoch)
        self._after(0.0, lambda: self._tell_worker(source, incarnation, event))

    # -- workers come and go ------------------------------------------------------------------------------------------

    def _start_worker(self, name: WorkerId) -> None:
        spec = self._specs[name]
        self._incarnations[name] += 1
        worker = _Worker(spec, self._incarnations[name])
        self.workers[name] = worker
        config = spec.engine
        kv_bytes_per_token = config.num_layers * config.cell_bytes // config.block_size
        joined = WorkerJoined(
            name, worker.incarnation, spec.pool, spec.role, config.num_blocks, config.block_size, kv_bytes_per_token
        )
        self._tell_controller(joined)
        for peer in list(self.workers.values()):
            if {spec.role, peer.spec.role} == {"prefill", "decode"}:
                self._link_up(worker, peer)

    def _link_up(self, one: _Worker, other: _Worker) -> None:
        for here, there in ((one, other), (other, one)):
            up = PeerUp(there.spec.engine.worker, here.spec.one_sided)
            self._tell_worker(here.spec.engine.worker, here.incarnation, up)
        source, target = (one, other) if one.spec.role == "prefill" else (other, one)
        names = source.spec.engine.worker, target.spec.engine.worker
        latency = self._cost.frame_seconds(*names, 0)
        rate = 2**20 / (self._cost.frame_seconds(*names, 2**20) - latency)
        self._tell_controller(LinkMeasured(*names, "virtual", rate, latency))

    def _kill_worker(self, name: WorkerId) -> None:
        worker = self.workers.pop(name, None)
        if worker is None:
            return
        self._incarnations[name] += 1  # nothing addressed to it, or from it, arrives any more
        self._permissions.pop(name, None)
        for pair in [pair for pair in self._links if name in pair]:
            link = self._links.pop(pair)
            for drain in link.drains:
                self._drained(pair[0], drain)
        for peer in list(self.workers.values()):
            if {worker.spec.role, peer.spec.role} == {"prefill", "decode"}:
                self._tell_worker(peer.spec.engine.worker, peer.incarnation, PeerLost(name))
        self._after(
            self._cost.message_seconds(), lambda: self._tell_controller(WorkerGone(name, worker.incarnation, "killed"))
        )
