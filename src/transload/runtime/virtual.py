"""Virtual time: the shipped machines on an event heap, with a cost model in place of chips and wires.

Every command becomes a duration, every duration an event. Two runs of one seed are identical. Messages between the
controller and a worker, and frames between two workers, each keep their order, as on a socket.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count

from transload.control.controller import Controller, ControllerConfig
from transload.control.messages import (
    Arrived,
    Cancelled,
    CancelSends,
    CancelTimer,
    ControllerCommand,
    ControllerEvent,
    EngineCommand,
    EngineEvent,
    ExpectKv,
    Finish,
    ForgetKv,
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
    RunStep,
    Sampled,
    SendFrame,
    SendsDrained,
    SetTimer,
    StepDone,
    StepFailed,
    Stream,
    TimerFired,
    ToController,
    ToWorker,
    WorkerGone,
    WorkerId,
    WorkerJoined,
)
from transload.runtime.cluster import (
    FrameFault,
    KvContents,
    Link,
    LiveWorker,
    StepFault,
    VirtualSink,
    VirtualWorker,
    faithful,
    is_intact,
    never_fails,
)
from transload.runtime.cost import CostModel

CONTROLLER = WorkerId("controller")


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
        step_fault: StepFault = never_fails,
        contents: KvContents | None = None,
        observe: Callable[[float, WorkerId, Message], None] | None = None,
    ) -> None:
        self.now = 0.0
        self.controller = Controller(controller)
        self.workers: dict[WorkerId, LiveWorker] = {}
        self.links: dict[tuple[WorkerId, WorkerId], Link] = {}
        self._specs = {spec.engine.worker: spec for spec in workers}
        self._cost = cost
        self._sink = sink
        self._draw_token = draw_token
        self._frame_fault = frame_fault
        self._step_fault = step_fault
        self._contents = contents
        self._observe = observe
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._timers: dict[tuple[WorkerId, str], int] = {}
        self._last_arrival: dict[tuple[WorkerId, WorkerId], float] = {}
        self._incarnations: dict[WorkerId, int] = defaultdict(int)
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

    def lose(self, at_seconds: float, worker: WorkerId, lingers_seconds: float) -> None:
        """The controller's connection to the worker breaks at this time; the process lives on for a while."""
        self._at(at_seconds, lambda: self._declare_gone(worker, lingers_seconds))

    def pause(self, at_seconds: float, worker: WorkerId, seconds: float) -> None:
        """The worker stands still at this time, as a stopped process does: what comes in waits in its sockets. What
        others write straight into its memory lands all the same."""
        self._at(at_seconds, lambda: self._pause_worker(worker, seconds))

    def shift_clock(self, at_seconds: float, worker: WorkerId, seconds: float) -> None:
        """The worker's clock jumps at this time."""
        self._at(at_seconds, lambda: self._shift_clock(worker, seconds))

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
        alive = self._alive(worker, incarnation)
        if alive is None:
            return
        if alive.backlog is not None:
            alive.backlog.append(lambda: self._tell_worker(worker, incarnation, event))
            return
        if self._observe is not None:
            self._observe(self.now, worker, event)
        for command in alive.engine.handle(event, self.now + alive.clock_offset_seconds):
            self._obey_engine(alive, command)

    def _alive(self, worker: WorkerId, incarnation: int) -> LiveWorker | None:
        alive = self.workers.get(worker)
        return alive if alive is not None and alive.incarnation == incarnation else None

    # -- commands -----------------------------------------------------------------------------------------------------

    def _obey_controller(self, command: ControllerCommand) -> None:
        match command:
            case ToWorker(worker, event):
                incarnation = self._incarnations[worker]
                self._send_message(CONTROLLER, worker, lambda: self._tell_worker(worker, incarnation, event))
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

    def _obey_engine(self, worker: LiveWorker, command: EngineCommand) -> None:
        name, incarnation = worker.spec.engine.worker, worker.incarnation
        match command:
            case RunStep():
                self._run_step(worker, command)
            case ToController(event):
                self._send_message(name, CONTROLLER, lambda: self._from_worker(name, incarnation, event))
            case SendFrame(peer):
                link = worker.links.get(peer)
                if link is not None and link.is_open:  # else it has ended, and PeerLost has said so or will
                    link.queue.append(command)
                    self._start_send(name, peer, link)
            case CancelSends(peer):
                self._cancel_sends(worker, peer, command)
            case ExpectKv(transfer, epoch):
                worker.permissions[transfer, epoch] = command
            case ForgetKv(transfer, epoch):
                worker.permissions.pop((transfer, epoch), None)
            case SetTimer(key, after_seconds):
                fire = TimerFired(key)
                self._set_timer(name, key, after_seconds, lambda: self._tell_worker(name, incarnation, fire))
            case CancelTimer(key):
                self._timers.pop((name, key), None)

    def _send_message(self, source: WorkerId, target: WorkerId, arrive: Callable[[], None]) -> None:
        """A socket keeps the order: a message that takes less time than the one before it arrives right behind it."""
        at_seconds = max(self.now + self._cost.message_seconds(), self._last_arrival.get((source, target), 0.0))
        self._last_arrival[source, target] = at_seconds
        self._at(at_seconds, arrive)

    def _from_worker(self, worker: WorkerId, incarnation: int, event: ControllerEvent) -> None:
        """What a worker said before it died is lost with its socket, unless it has arrived."""
        alive = self._alive(worker, incarnation)
        if alive is not None and not alive.is_declared_gone:
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

    def _run_step(self, worker: LiveWorker, step: RunStep) -> None:
        name, incarnation, num_layers = worker.spec.engine.worker, worker.incarnation, worker.spec.engine.num_layers
        seconds = self._cost.step_seconds(name, step.chunks)
        problem = self._step_fault(name, step)
        if self._contents is not None:
            self._contents.step_started(name, step, fails=problem is not None)
        if any(chunk.streams for chunk in step.chunks):
            for low in range(0, num_layers, worker.spec.layers_per_frame):
                high = min(low + worker.spec.layers_per_frame, num_layers)
                ready = LayersReady(step.step, low, high)
                self._after(
                    seconds * high / num_layers,
                    lambda ready=ready: self._layers_written(name, incarnation, step, ready),  # type: ignore[misc]
                )
        sampled = tuple(
            Sampled(chunk.request.id, self._draw_token(chunk.request, chunk.num_outputs))
            for chunk in step.chunks
            if chunk.samples
        )
        done = StepDone(step.step, sampled, seconds) if problem is None else StepFailed(step.step, problem)
        self._after(seconds, lambda: self._end_step(name, incarnation, step, done))

    def _layers_written(self, name: WorkerId, incarnation: int, step: RunStep, ready: LayersReady) -> None:
        if self._contents is not None and self._alive(name, incarnation) is not None:
            self._contents.layers_written(name, step, ready.layer_lo, ready.layer_hi)
        self._tell_worker(name, incarnation, ready)

    def _end_step(self, name: WorkerId, incarnation: int, step: RunStep, event: StepDone | StepFailed) -> None:
        worker = self._alive(name, incarnation)
        if self._contents is not None and worker is not None:
            fails = isinstance(event, StepFailed)
            if not fails:
                self._contents.layers_written(name, step, 0, worker.spec.engine.num_layers)
            self._contents.step_ended(name, step, fails=fails)
        self._tell_worker(name, incarnation, event)

    # -- links --------------------------------------------------------------------------------------------------------

    def _start_send(self, source: WorkerId, target: WorkerId, link: Link) -> None:
        if link.current is not None or not link.queue:
            return
        link.current = link.queue.popleft()
        frame = link.current.frame
        num_bytes = frame.num_bytes if isinstance(frame, KvData) else 0
        if self._contents is not None and isinstance(frame, KvData):
            self._contents.send_started(source, link.current)
        self._after(self._cost.frame_seconds(source, target, num_bytes), lambda: self._end_send(source, target, link))

    def _end_send(self, source: WorkerId, target: WorkerId, link: Link) -> None:
        if not link.is_open or link.current is None:
            return  # it ended with one of its ends
        backlog = self.workers[source].backlog
        if backlog is not None:
            backlog.append(lambda: self._end_send(source, target, link))
            return
        send, link.current = link.current, None
        arrivals = self._frame_fault(source, target, send.frame)
        if isinstance(send.frame, KvData):
            self._end_data(source, target, send, intact=all(map(is_intact, arrivals)))
        incarnation = self.workers[target].incarnation
        for delay, frame, checksum in arrivals:
            event = PeerFrame(source, frame, checksum)
            self._after(delay, lambda event=event: self._arrive(target, incarnation, send, event))  # type: ignore[misc]
        drains, link.drains = link.drains, []
        for drain in drains:
            self._drained(source, self.workers[source].incarnation, drain)
        self._start_send(source, target, link)

    def _end_data(self, source: WorkerId, target: WorkerId, send: SendFrame, *, intact: bool) -> None:
        """The source has been read. A one-sided write is in place with that, whatever becomes of the frame: the
        receiver cannot refuse it, so it must hit blocks that are granted to this transfer or kept aside for it."""
        worker = self.workers[target]
        if self._contents is not None:
            self._contents.send_ended(source, send)
        if worker.spec.one_sided:
            key = send.frame.transfer, send.frame.epoch
            granted = key in worker.permissions or worker.engine.pool.is_quarantined(send.frame.transfer)
            assert granted, f"{target}: a write of transfer {send.frame.transfer} hits foreign blocks"
            if self._contents is not None:
                self._contents.landed(source, send, intact=intact)

    def _arrive(self, target: WorkerId, incarnation: int, send: SendFrame, event: PeerFrame) -> None:
        """A frame comes in. Where the receiver copies, it copies now, if it still may."""
        worker = self._alive(target, incarnation)
        if worker is None:
            return
        if worker.backlog is not None:
            worker.backlog.append(lambda: self._arrive(target, incarnation, send, event))
            return
        frame = event.frame
        permitted = (frame.transfer, frame.epoch) in worker.permissions and not worker.spec.one_sided
        if isinstance(frame, KvData) and permitted and self._contents is not None:
            self._contents.landed(event.peer, send, intact=event.arrived_checksum == frame.checksum)
        self._tell_worker(target, incarnation, event)

    def _cancel_sends(self, worker: LiveWorker, target: WorkerId, command: CancelSends) -> None:
        source, link = worker.spec.engine.worker, worker.links.get(target)
        if link is not None and link.cancel(command):
            link.drains.append(command)
        else:
            self._drained(source, worker.incarnation, command)

    def _drained(self, source: WorkerId, incarnation: int, command: CancelSends) -> None:
        event = SendsDrained(command.transfer, command.epoch)
        self._after(0.0, lambda: self._tell_worker(source, incarnation, event))

    # -- workers come and go ------------------------------------------------------------------------------------------

    def _start_worker(self, name: WorkerId) -> None:
        spec = self._specs[name]
        if name in self.workers:
            self._kill_worker(name)  # declared gone, and still not dead
        self._incarnations[name] += 1
        worker = LiveWorker(spec, self._incarnations[name])
        self.workers[name] = worker
        config = spec.engine
        if self._contents is not None:
            self._contents.worker_started(name, config.num_blocks)
        kv_bytes_per_token = config.num_layers * config.cell_bytes // config.block_size
        joined = WorkerJoined(
            name,
            worker.incarnation,
            spec.pool,
            spec.role,
            config.num_blocks,
            config.block_size,
            kv_bytes_per_token,
            config.max_batch,
        )
        self._tell_controller(joined)
        for peer in list(self.workers.values()):
            if {spec.role, peer.spec.role} == {"prefill", "decode"}:
                self._link_up(worker, peer)

    def _link_up(self, one: LiveWorker, other: LiveWorker) -> None:
        for here, there in ((one, other), (other, one)):
            link = self.links[here.spec.engine.worker, there.spec.engine.worker] = Link()
            self._tell_link(here, PeerUp(there.spec.engine.worker, here.spec.one_sided), link)
        source, target = (one, other) if one.spec.role == "prefill" else (other, one)
        names = source.spec.engine.worker, target.spec.engine.worker
        latency = self._cost.frame_seconds(*names, 0)
        rate = 2**20 / (self._cost.frame_seconds(*names, 2**20) - latency)
        self._tell_controller(LinkMeasured(*names, "virtual", rate, latency))

    def _tell_link(self, worker: LiveWorker, event: PeerUp | PeerLost, link: Link | None) -> None:
        """A link counts from when its engine hears of it: what the engine said before was meant for the one before."""
        if worker.backlog is not None:
            worker.backlog.append(lambda: self._tell_link(worker, event, link))
            return
        if link is not None:
            worker.links[event.peer] = link
        else:
            worker.links.pop(event.peer, None)
        self._tell_worker(worker.spec.engine.worker, worker.incarnation, event)

    def _kill_worker(self, name: WorkerId) -> None:
        worker = self.workers.pop(name, None)
        if worker is None:
            return
        self._incarnations[name] += 1  # nothing addressed to it, or from it, arrives any more
        for pair in [pair for pair in self.links if name in pair]:
            self._break_link(*pair, self.links.pop(pair), source_died=pair[0] == name)
        if self._contents is not None:
            self._contents.worker_ended(name)
        for peer in list(self.workers.values()):
            if {worker.spec.role, peer.spec.role} == {"prefill", "decode"}:
                self._tell_link(peer, PeerLost(name), None)
        if not worker.is_declared_gone:
            gone = WorkerGone(name, worker.incarnation, "killed")
            self._send_message(name, CONTROLLER, lambda: self._tell_controller(gone))

    def _break_link(self, source: WorkerId, target: WorkerId, link: Link, *, source_died: bool) -> None:
        """What is on the wire is lost; a one-sided write has been torn in the middle."""
        link.is_open = False
        if self._contents is not None and link.current is not None and isinstance(link.current.frame, KvData):
            self._contents.send_ended(source, link.current)
            if source_died and self.workers[target].spec.one_sided:
                self._contents.landed(source, link.current, intact=False)
        for drain in link.drains:
            self._drained(source, self._incarnations[source], drain)

    def _declare_gone(self, name: WorkerId, lingers_seconds: float) -> None:
        worker = self.workers.get(name)
        if worker is None or worker.is_declared_gone:
            return
        worker.is_declared_gone = True
        self._tell_controller(WorkerGone(name, worker.incarnation, "lost its connection"))
        self._after(lingers_seconds, lambda: self._kill_incarnation(name, worker.incarnation))

    def _kill_incarnation(self, name: WorkerId, incarnation: int) -> None:
        if self._alive(name, incarnation) is not None:
            self._kill_worker(name)

    def _pause_worker(self, name: WorkerId, seconds: float) -> None:
        worker = self.workers.get(name)
        if worker is None or worker.backlog is not None:
            return
        worker.backlog = deque()
        self._after(seconds, lambda: self._resume_worker(worker))

    def _resume_worker(self, worker: LiveWorker) -> None:
        backlog, worker.backlog = worker.backlog, None
        for action in backlog or ():
            action()

    def _shift_clock(self, name: WorkerId, seconds: float) -> None:
        if (worker := self.workers.get(name)) is not None:
            worker.clock_offset_seconds += seconds
