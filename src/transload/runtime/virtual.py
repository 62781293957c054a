"""Virtual time: the shipped machines on an event heap, with a cost model in place of chips and wires.

Every command becomes a duration, every duration an event. Two runs of one seed are identical, and so are a run that
goes step by step and one that goes through many steps of a batch at once. Messages between the controller and a
worker, and frames between two workers, each keep their order, as on a socket. What happens at the same time happens in
the order of its kind and of the workers' places.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import Any

from transload.control.controller import Controller, ControllerConfig
from transload.control.messages import (
    Arrived,
    Cancelled,
    CancelSends,
    CancelTimer,
    ControllerEvent,
    Emitted,
    EndRun,
    EngineEvent,
    ExpectKv,
    Finish,
    ForgetKv,
    HandoffFailed,
    Load,
    Message,
    PeerLost,
    Reject,
    Request,
    RequestFailed,
    RequestId,
    RestartWorker,
    RunStep,
    SendFrame,
    SetTimer,
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
    Watcher,
    faithful,
    never_fails,
)
from transload.runtime.cost import CostModel, FfnSide
from transload.runtime.decode_run import on_tick
from transload.runtime.flight import Flight, StepTimes
from transload.runtime.shared_machine import MachineModel
from transload.runtime.virtual_links import VirtualLinks
from transload.runtime.virtual_steps import DrawToken, VirtualSteps

CONTROLLER = WorkerId("controller")
STEP_ENDS, OUTSIDE, TIMERS, MESSAGES = (kind << 40 for kind in range(4))
"""Kinds of what happens, in the order in which they do if it is at the same time; frames come last."""
READS_PROGRESS = frozenset({Cancelled, TimerFired, WorkerGone, WorkerJoined, HandoffFailed, RequestFailed})
"""What makes the controller look at how many tokens a request has."""


class VirtualRuntime:
    """Drives one controller and its workers. `observe(now, who, event)` sees every event before it is handled."""

    def __init__(
        self,
        controller: ControllerConfig,
        workers: Sequence[VirtualWorker],
        cost: CostModel,
        sink: VirtualSink,
        *,
        draw_token: DrawToken | None = None,
        frame_fault: FrameFault = faithful,
        step_fault: StepFault = never_fails,
        contents: KvContents | None = None,
        observe: Callable[[float, WorkerId, Message], None] | None = None,
        watcher: Watcher | None = None,
        ffn: FfnSide | None = None,
        jumps: bool = True,
        machine: MachineModel | None = None,
    ) -> None:
        """`draw_token` None: all tokens are 0. `ffn`: workers that compute feed-forwards for others, and can be killed.
        `jumps` False: step by step, for comparison. `machine`: the one that all workers share, if they do."""
        self.now = 0.0
        self.controller = Controller(controller)
        self.workers: dict[WorkerId, LiveWorker] = {}
        self.links: dict[tuple[WorkerId, WorkerId], Link] = {}
        self._specs = {spec.engine.worker: spec for spec in workers}
        self._indices = {worker: index for index, worker in enumerate(self._specs, start=1)}
        self._cost = cost
        self._sink = sink
        self._contents = contents
        self._observe = observe
        self._watcher = watcher
        self._ffn = ffn
        self._heap: list[tuple[float, int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = count()
        self._timers: dict[tuple[WorkerId, str], int] = {}
        self._last_message: dict[int, float] = {}
        self._incarnations = dict.fromkeys(self._specs, 0)
        steps_fault = None if step_fault is never_fails else step_fault
        self._steps = VirtualSteps(self, cost, draw_token, steps_fault, contents, watcher, ffn, machine, jumps=jumps)
        self._links = VirtualLinks(self, cost, None if frame_fault is faithful else frame_fault, contents, watcher)
        self._obey_worker: dict[type, Callable[[LiveWorker, Any], None]] = {
            RunStep: self._steps.start,
            EndRun: self._steps.end_run,
            ToController: self._to_controller,
            SendFrame: self._send_frame,
            CancelSends: self._links.cancel,
            ExpectKv: self._expect,
            ForgetKv: self._forget,
            SetTimer: self._set_worker_timer,
            CancelTimer: self._cancel_worker_timer,
        }
        self._obey_controller: dict[type, Callable[[Any], None]] = {
            ToWorker: self._to_worker,
            Finish: lambda command: self._sink.finish(command, self.now),
            Reject: lambda command: self._sink.reject(command, self.now),
            RestartWorker: self._restart_worker,
            SetTimer: self._set_controller_timer,
            CancelTimer: self._cancel_controller_timer,
        }
        for worker in self._specs:
            self.outside(0.0, self._start_worker, worker)

    # -- what a caller does -------------------------------------------------------------------------------------------

    def submit(self, at_seconds: float, request: Request) -> None:
        """A request arrives at this time."""
        self.outside(at_seconds, self.tell_controller, Arrived(request))

    def cancel(self, at_seconds: float, request: RequestId) -> None:
        """Its caller goes away at this time."""
        self.outside(at_seconds, self.tell_controller, Cancelled(request, "cancelled"))

    def kill(self, at_seconds: float, worker: WorkerId) -> None:
        """The worker dies at this time, whatever it is doing."""
        self.outside(at_seconds, self._kill_worker, worker)

    def lose(self, at_seconds: float, worker: WorkerId, lingers_seconds: float) -> None:
        """The controller's connection to the worker breaks at this time; the process lives on for a while."""
        self.outside(at_seconds, self._declare_gone, worker, lingers_seconds)

    def pause(self, at_seconds: float, worker: WorkerId, seconds: float) -> None:
        """The worker stands still at this time, as a stopped process does: what comes in waits in its sockets. What
        others write straight into its memory lands all the same."""
        self.outside(at_seconds, self._pause_worker, worker, seconds)

    def shift_clock(self, at_seconds: float, worker: WorkerId, seconds: float) -> None:
        """The worker's clock jumps at this time."""
        self.outside(at_seconds, self._shift_clock, worker, seconds)

    def scale_link(self, at_seconds: float, source_pool: str, target_pool: str, factor: float) -> None:
        """From this time on the wires from one pool to another give so much of what they should."""
        self.outside(at_seconds, self._links.scale_pools, source_pool, target_pool, factor)

    def cut(self, at_seconds: float, one: WorkerId, other: WorkerId, seconds: float) -> None:
        """The link between two workers breaks at this time and both live on; they are linked again so much later."""
        self.outside(at_seconds, self._links.cut, one, other, seconds)

    def call(self, at_seconds: float, action: Callable[[], None]) -> None:
        """Do something of the caller's own at this time."""
        self.outside(at_seconds, action)

    def run(self, arrivals: Iterable[tuple[float, Request]] = (), *, until: float = float("inf")) -> None:
        """Play the arrivals and everything that follows, to the end or up to a time. Timers alone do not keep a run
        going once every request has ended."""
        self._feed(iter(arrivals))
        while self.run_events(1 << 30, until=until):
            pass

    def run_events(self, most: int, *, until: float = float("inf")) -> bool:
        """Play so many events at most, up to a time at most. Whether there are more by then."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= until:
            at_seconds, _, _, action, arguments = pop(heap)
            if at_seconds > self.now:
                self.now = at_seconds
            action(*arguments)
            most -= 1
            if not most:
                return True
        self.catch_up()
        return False

    def _feed(self, source: Iterator[tuple[float, Request]]) -> None:
        """One arrival at a time is on the heap: memory does not grow with the length of a trace."""
        following = next(source, None)
        if following is not None:
            self.outside(following[0], self._arrive, following[1], source)

    def _arrive(self, request: Request, source: Iterator[tuple[float, Request]]) -> None:
        self.tell_controller(Arrived(request))
        self._feed(source)

    # -- the heap -----------------------------------------------------------------------------------------------------

    def _at(self, at_seconds: float, rank: int, action: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if at_seconds < self.now:
            at_seconds = self.now
        heapq.heappush(self._heap, (at_seconds, rank, next(self._order), action, arguments))

    def outside(self, at_seconds: float, action: Callable[..., None], *arguments: object) -> None:
        """Something that comes from nobody in the cluster."""
        self._at(at_seconds, OUTSIDE, action, arguments)

    def at_step_end(
        self, at_seconds: float, worker: LiveWorker, action: Callable[..., None], *arguments: object
    ) -> None:
        """Something about a worker's step, which comes before everything else at that time."""
        self._at(at_seconds, STEP_ENDS | worker.index, action, arguments)

    def at_frame(self, at_seconds: float, link: Link, action: Callable[..., None], *arguments: object) -> None:
        """Something about a frame on a link."""
        self._at(at_seconds, link.rank, action, arguments)

    def tell_controller(self, event: ControllerEvent, times: Sequence[float] | None = None) -> None:
        """Have the controller handle an event."""
        if type(event) in READS_PROGRESS:
            self.catch_up()
        if self._observe is not None:
            self._observe(self.now, CONTROLLER, event)
        if type(event) is Load and self._watcher is not None:
            self._watcher.load(event, self.now)
        for command in self.controller.handle(event, self.now):
            if type(command) is Stream:
                self._stream(command, times)
            else:
                self._obey_controller[type(command)](command)

    # -- what the controller wishes -----------------------------------------------------------------------------------

    def _stream(self, command: Stream, times: Sequence[float] | None) -> None:
        count = 1 + len(command.token.more)
        if times is None:
            own: Sequence[float] = (self.now,) * count
        else:
            own = times.last(count) if isinstance(times, StepTimes) else times[len(times) - count :]
        self._sink.stream(command, own)

    def _to_worker(self, command: ToWorker) -> None:
        live = self.workers.get(command.worker)
        if live is not None:
            self._message(2 * live.index, self.tell_worker, live, command.event)

    def _restart_worker(self, command: RestartWorker) -> None:
        at_seconds = self.now + command.after_seconds + self._cost.start_seconds(command.worker)
        self.outside(at_seconds, self._start_worker, command.worker)

    def _set_controller_timer(self, command: SetTimer) -> None:
        fire = TimerFired(command.key)
        self._set_timer(CONTROLLER, TIMERS, command.after_seconds, command.key, self.tell_controller, fire)

    def _cancel_controller_timer(self, command: CancelTimer) -> None:
        self._timers.pop((CONTROLLER, command.key), None)

    # -- what happens to workers --------------------------------------------------------------------------------------

    def tell_worker(self, worker: LiveWorker, event: EngineEvent) -> None:
        """Have an engine handle an event, if it is still alive; a paused one does so when it goes on."""
        if not worker.is_alive:
            return
        if worker.backlog is not None:
            worker.backlog.append((self.tell_worker, (worker, event)))
            return
        engine = worker.engine
        if worker.run is not None and self._steps.is_behind(worker) and engine.depends_on_run(event):
            self._steps.catch_up(worker)
        if self._observe is not None:
            self._observe(self.now, worker.name, event)
        obey = self._obey_worker
        for command in engine.handle(event, self.now + worker.clock_offset_seconds):
            obey[type(command)](worker, command)
        if worker.words:
            words, worker.words = worker.words, []
            self._message(2 * worker.index + 1, self._words_arrive, worker, words)

    def catch_up(self) -> None:
        """Have the controller know every token that has got to it by now."""
        for worker in list(self.workers.values()):
            self._settle(worker)

    # -- messages -----------------------------------------------------------------------------------------------------

    def _message(self, channel: int, action: Callable[..., None], *arguments: object) -> None:
        """A socket keeps the order: a message that takes less time than the one before it arrives right behind it."""
        at_seconds = max(self.now + on_tick(self._cost.message_seconds()), self._last_message.get(channel, 0.0))
        self._last_message[channel] = at_seconds
        self._at(at_seconds, MESSAGES | channel, action, arguments)

    def _to_controller(self, worker: LiveWorker, command: ToController) -> None:
        event = command.event
        if type(event) is not Emitted or not worker.is_emitting:
            worker.words.append(event)
            return
        length = max([1 + len(token.more) for token in event.tokens])
        flight = Flight(event, worker.log.times(length, on_tick(self._cost.message_seconds())))
        worker.words.append(flight)
        if self._steps.jumps:
            worker.flights.append(flight)

    def _words_arrive(self, worker: LiveWorker, words: Sequence[ControllerEvent | Flight]) -> None:
        """What a worker says after one event comes in one message. What it said before it died is lost with its socket,
        unless it has arrived."""
        for word in words:
            if not worker.is_alive or worker.is_declared_gone:
                return
            if isinstance(word, Flight):
                if worker.flights:
                    worker.flights.popleft()
                if (landed := word.land(None)) is not None:
                    self.tell_controller(*landed)
            else:
                self.tell_controller(word)

    def _settle(self, worker: LiveWorker) -> None:
        """Tell the controller those tokens that have got there by now, before the run that they are of is over."""
        if not self._steps.jumps:
            return
        self._steps.report_tokens(worker)
        for flight in worker.flights:
            if (landed := flight.land(self.now)) is not None and not worker.is_declared_gone:
                self.tell_controller(*landed)

    # -- what engines wish --------------------------------------------------------------------------------------------

    def _send_frame(self, worker: LiveWorker, command: SendFrame) -> None:
        link = worker.links.get(command.peer)
        assert link is None or link.number == command.link, "the engine sends over another link than it knows"
        if link is not None and link.is_open:  # else it has ended, and PeerLost has said so or will
            self._links.send(link, command)

    @staticmethod
    def _expect(worker: LiveWorker, command: ExpectKv) -> None:
        worker.permissions[command.transfer, command.epoch] = command

    @staticmethod
    def _forget(worker: LiveWorker, command: ForgetKv) -> None:
        worker.permissions.pop((command.transfer, command.epoch), None)

    def _set_worker_timer(self, worker: LiveWorker, command: SetTimer) -> None:
        rank, fire = TIMERS | worker.index, TimerFired(command.key)
        self._set_timer(worker.name, rank, command.after_seconds, command.key, self.tell_worker, worker, fire)

    def _cancel_worker_timer(self, worker: LiveWorker, command: CancelTimer) -> None:
        self._timers.pop((worker.name, command.key), None)

    def _set_timer(
        self,
        owner: WorkerId,
        rank: int,
        after_seconds: float,
        key: str,
        action: Callable[..., None],
        *arguments: object,
    ) -> None:
        token = self._timers[owner, key] = next(self._order)
        self._at(self.now + after_seconds, rank, self._due, (owner, key, token, action, arguments))

    def _due(
        self, owner: WorkerId, key: str, token: int, action: Callable[..., None], arguments: tuple[Any, ...]
    ) -> None:
        if self._timers.get((owner, key)) == token:
            del self._timers[owner, key]
            action(*arguments)

    # -- workers come and go ------------------------------------------------------------------------------------------

    def _start_worker(self, name: WorkerId) -> None:
        spec = self._specs[name]
        if name in self.workers:
            self._kill_worker(name)  # declared gone, and still not dead
        self._incarnations[name] += 1
        worker = LiveWorker(spec, self._indices[name], self._incarnations[name])
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
        self.tell_controller(joined)
        for peer in list(self.workers.values()):
            if {spec.role, peer.spec.role} == {"prefill", "decode"}:
                self._links.link_up(worker, peer)

    def _kill_worker(self, name: WorkerId) -> None:
        worker = self.workers.get(name)
        if worker is None:
            for other in self._ffn.kill(name, self.now) if self._ffn is not None else ():
                if (caller := self.workers.get(other)) is not None:
                    self._steps.look_again(caller)
            return
        self._settle(worker)
        del self.workers[name]
        worker.is_alive = False  # nothing addressed to it, or from it, arrives any more
        self._steps.drop(worker)
        for pair in [pair for pair in self.links if name in pair]:
            self._links.break_link(self.links.pop(pair), source_died=pair[0] == name)
        if self._contents is not None:
            self._contents.worker_ended(name)
        for peer in list(self.workers.values()):
            if {worker.spec.role, peer.spec.role} == {"prefill", "decode"}:
                self._links.tell(peer, PeerLost(name), None)
        if not worker.is_declared_gone:
            gone = WorkerGone(name, worker.incarnation, "killed")
            self._message(2 * worker.index + 1, self.tell_controller, gone)

    def _declare_gone(self, name: WorkerId, lingers_seconds: float) -> None:
        worker = self.workers.get(name)
        if worker is None or worker.is_declared_gone:
            return
        self._settle(worker)
        worker.is_declared_gone = True
        self.tell_controller(WorkerGone(name, worker.incarnation, "lost its connection"))
        self.outside(self.now + lingers_seconds, self._kill_incarnation, worker)

    def _kill_incarnation(self, worker: LiveWorker) -> None:
        if worker.is_alive:
            self._kill_worker(worker.name)

    def _pause_worker(self, name: WorkerId, seconds: float) -> None:
        worker = self.workers.get(name)
        if worker is None or worker.backlog is not None:
            return
        self._settle(worker)
        self._steps.end_run(worker)
        worker.backlog = deque()
        self.outside(self.now + seconds, self._resume_worker, worker)

    def _resume_worker(self, worker: LiveWorker) -> None:
        backlog, worker.backlog = worker.backlog, None
        for action, arguments in backlog or ():
            action(*arguments)

    def _shift_clock(self, name: WorkerId, seconds: float) -> None:
        if (worker := self.workers.get(name)) is not None:
            worker.clock_offset_seconds += seconds
