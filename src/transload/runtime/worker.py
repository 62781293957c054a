"""One worker process: an Engine, a thread that runs its steps, and links to its peers.

    front end --Assign--> [ Engine on the event loop ] --RunStep--> [ step thread: torch ]
              <--Report--                               <-StepDone, LayersReady-
                                   | SendFrame, ExpectKv, ...
                             [ links: a thread or two per peer ]

The Engine is touched by the event loop alone; the other threads hand it events. It exits when its front end is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from transload.control.engine import Engine, EngineConfig
from transload.control.messages import (
    CancelSends,
    CancelTimer,
    EndRun,
    EngineCommand,
    EngineEvent,
    EngineReport,
    ExpectKv,
    ForgetKv,
    Message,
    PeerLost,
    PeerUp,
    RunStep,
    SendFrame,
    SetTimer,
    StepDone,
    TimerFired,
    ToController,
    WorkerId,
)
from transload.control.redial import Redial
from transload.control.step_watch import StepWatch
from transload.deploy.plan import WorkerPlan
from transload.errors import TransloadError, WorkerLost
from transload.runtime.base import Executor, FfnCompute, FfnSource
from transload.runtime.event_log import EventLog
from transload.runtime.ffn_hop import HopSide
from transload.runtime.ffn_service import FfnService
from transload.runtime.last_words import lenient_stderr
from transload.runtime.process_memory import resident_bytes
from transload.runtime.step_thread import StepThread, StepWindows
from transload.runtime.wire import (
    JOIN_SECONDS,
    Alive,
    Assign,
    Challenge,
    ConnectFfn,
    ConnectPeer,
    DisconnectFfn,
    Failed,
    FfnCounted,
    Join,
    LinkState,
    OpenHop,
    Ready,
    Refused,
    Report,
    Shutdown,
    SwitchFfn,
    ToWorkerFrame,
    Welcome,
    Wire,
    prove,
)
from transload.transfer.arena import Window
from transload.transfer.ffn_meeting import Party
from transload.transfer.layout import KvLayout
from transload.transfer.link import LinkOptions
from transload.transfer.links import LinkFailed, Links
from transload.transfer.memory import KvMemory

ALIVE_SECONDS = 1.0
"""Between two signs of life."""
SLOW_LINK_SECONDS = 1e-3
"""Latency of a link whose peer was too busy to answer."""
T = TypeVar("T")
SHUT_DOWN = "the front end has shut down"
Built = tuple[Executor, KvMemory, FfnSource]
BuildExecutor = Callable[[WorkerPlan], Built]
BuildFfn = Callable[[WorkerPlan], FfnCompute]


class WorkerProcess:
    """Everything of one worker. `run` returns when the front end is gone or says so."""

    def __init__(self, join: str, name: str, token: str, build: BuildExecutor, build_ffn: BuildFfn) -> None:
        self._host, _, port = join.rpartition(":")
        self._port = int(port)
        self._name = WorkerId(name)
        self._token = token
        self._build = build
        self._build_ffn = build_ffn
        self._loop = asyncio.get_running_loop()
        self._closed: asyncio.Future[str] = self._loop.create_future()
        self._wire = Wire[ToWorkerFrame](ToWorkerFrame, self._take, self._lost)
        self._plan: WorkerPlan | None = None
        self._engine: Engine | None = None
        self._steps: StepThread | None = None
        self._windows: StepWindows | None = None
        self._watch = StepWatch()
        self._links: Links | None = None
        self._memory: KvMemory | None = None
        self._hop: HopSide | None = None
        self._service: FfnService | None = None
        self._log: EventLog | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._link_bytes: dict[WorkerId, int] = {}  # sent when last reported
        self._link_latency: dict[WorkerId, float] = {}
        self._redial = Redial()
        self._dials: dict[WorkerId, ConnectPeer] = {}
        self._background: set[asyncio.Task[None]] = set()

    async def run(self) -> str:
        """Join, work, and say why it ended."""
        try:
            async with asyncio.timeout(JOIN_SECONDS):
                await self._loop.create_connection(lambda: self._wire, self._host, self._port)
        except (OSError, TimeoutError) as error:
            raise WorkerLost(f"--join {self._host}:{self._port}: no front end answers there ({error})") from error
        try:
            return await self._closed
        finally:
            self._close()

    # -- the front end's words ----------------------------------------------------------------------------------------

    def _take(self, frame: ToWorkerFrame) -> None:
        match frame:
            case Assign(events):
                for event in events:
                    self._handle(event)
            case Challenge(nonce):
                self._wire.send(Join(self._name, prove(self._token, nonce, self._name), os.getpid()))
            case Welcome():
                self._spawn(self._start(frame))
            case ConnectPeer(peer):
                self._dials[peer] = frame
                self._redial.wanted(peer)
                self._dial(frame)
            case ConnectFfn() | DisconnectFfn() | OpenHop() | SwitchFfn():
                assert self._hop is not None
                self._hop.take(frame)
            case Shutdown():
                self._end(SHUT_DOWN)
            case Refused(reason):
                self._end(f"refused: {reason}")

    def _lost(self, reason: str) -> None:
        self._end(f"lost the front end: {reason}")

    def stop(self, reason: str) -> None:
        """End for a reason of this process's own."""
        self._end(reason)

    def crash(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A bug of our own: better no worker than a wrong one. Its requests go to others, and it is started anew."""
        error = context.get("exception")
        if error is not None:
            traceback.print_exception(error)
        self._end(f"crashed: {context['message']} {error!r}")

    def _end(self, reason: str) -> None:
        if not self._closed.done():
            if reason != SHUT_DOWN:
                sys.stderr.write(f"{self._name}: {reason}\n")
                sys.stderr.flush()
            self._closed.set_result(reason)

    def _spawn(self, coroutine: Coroutine[object, object, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # -- start --------------------------------------------------------------------------------------------------------

    async def _start(self, welcome: Welcome) -> None:
        self._plan = plan = welcome.plan
        self._spawn(self._stay_alive())
        started = time.monotonic()
        if plan.cores:
            os.sched_setaffinity(0, plan.cores)
        if plan.role == "ffn":
            compute = await self._built(self._build_ffn, plan)
            if compute is not None:
                self._open_ffn(welcome, plan, compute, started)
            return
        built = await self._built(self._build, plan)
        if built is None:
            return
        executor, self._memory, _ = built
        self._open(welcome, plan, built)
        assert self._links is not None
        layout = executor.layout
        self._wire.send(
            Ready(
                num_blocks=executor.num_blocks,
                block_size=layout.block_size,
                kv_bytes_per_token=layout.block_bytes // layout.block_size,
                layout_digest=layout.digest,
                dtype=layout.dtype,
                address=self._links.address,
                load_seconds=time.monotonic() - started,
                memory_bytes=resident_bytes(),
            )
        )

    async def _built(self, build: Callable[[WorkerPlan], T], plan: WorkerPlan) -> T | None:
        """What it builds; None if it cannot, which has been said, or if nobody wants it any more."""
        try:
            built = await asyncio.to_thread(build, plan)
        except TransloadError as error:
            self._fail(str(error))
            return None
        except Exception as error:
            traceback.print_exc()
            self._fail(f"{type(error).__name__}: {error}")
            return None
        return None if self._closed.done() else built

    def _open_ffn(self, welcome: Welcome, plan: WorkerPlan, compute: FfnCompute, started: float) -> None:
        """An FFN worker: no engine, no cache, no requests."""
        assert plan.share is not None
        self._service = FfnService(
            self._party(welcome),
            compute,
            max_wait_seconds=plan.share.max_wait_seconds,
            max_rows=plan.share.max_rows,
            spin_seconds=plan.spin_seconds,
            bind_host=self._wire.local_host or "127.0.0.1",
        )
        self._service.start()
        self._wire.send(
            Ready(
                num_blocks=0,
                block_size=plan.block_size,
                kv_bytes_per_token=0,
                layout_digest=b"",
                dtype=plan.dtype,
                address=self._service.address,
                load_seconds=time.monotonic() - started,
                memory_bytes=resident_bytes(),
            )
        )

    def _party(self, welcome: Welcome) -> Party:
        return Party(worker=self._name, incarnation=welcome.incarnation, secret=welcome.link_secret)

    def _open(self, welcome: Welcome, plan: WorkerPlan, built: Built) -> None:
        executor, memory, feed_forwards = built
        layout = executor.layout
        if welcome.event_log is not None:
            self._log = EventLog(welcome.event_log, self._name, welcome.incarnation)
        self._engine = Engine(engine_config(plan, layout, executor.num_blocks, welcome.incarnation))
        self._windows = StepWindows(executor.num_blocks)
        self._steps = StepThread(executor, self._hand_over, self._hand_over_step)
        self._hop = HopSide(feed_forwards, self._party(welcome), self._steps.call, self._send_from_thread)
        if plan.hop is not None:
            self._hop.begin(plan.hop)
        self._steps.start()
        local = self._wire.local_host or "127.0.0.1"
        self._links = Links(
            me=self._name,
            incarnation=welcome.incarnation,
            layout=layout,
            memory=memory,
            secret=welcome.link_secret,
            deliver=self._hand_over,
            report=self._hand_over_failure,
            bind_host=local,
            options=LinkOptions(window_frames=plan.window_frames, silence_seconds=2 * plan.lease_seconds),
        )

    def _fail(self, reason: str) -> None:
        self._end(reason)  # first: the front end kills us as soon as it hears of it
        self._wire.send(Failed(reason))

    async def _stay_alive(self) -> None:
        while True:
            await asyncio.sleep(ALIVE_SECONDS)
            hangs = self._watch.tick(ALIVE_SECONDS, is_loading=self._hop is not None and self._hop.is_loading)
            if hangs is not None:
                self._fail(hangs)
            self._wire.send(Alive())
            self._report_links()
            self._report_feed_forwards()

    def _report_feed_forwards(self) -> None:
        if self._service is not None and self._service.failure is not None:
            self._end(f"crashed: {self._service.failure}")
        if self._service is not None:
            self._wire.send(FfnCounted(self._service.counts()))
        elif self._hop is not None:
            counted = FfnCounted(self._hop.counts(), self._hop.hops(), self._hop.loads())
            if counted.counts or counted.loads:
                self._wire.send(counted)

    def _send_from_thread(self, message: Message) -> None:
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._wire.send, message)

    # -- the engine ---------------------------------------------------------------------------------------------------

    def _hand_over(self, event: EngineEvent) -> None:
        """From any thread: let the event loop give this to the engine."""
        with contextlib.suppress(RuntimeError):  # the loop has ended: so has this worker
            self._loop.call_soon_threadsafe(self._handle, event)

    def _hand_over_step(self, event: EngineEvent, closed: Sequence[Window]) -> None:
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._step_returned, event, closed)

    def _step_returned(self, event: EngineEvent, closed: Sequence[Window]) -> None:
        assert self._windows is not None
        self._watch.end(event.seconds if isinstance(event, StepDone) else None)
        self._handle(self._windows.judge(event, closed))

    def _handle(self, event: EngineEvent) -> None:
        engine = self._engine
        if engine is None or self._closed.done():
            return
        now = time.monotonic()
        if self._log is not None:
            self._log.write(now, event)
        if isinstance(event, PeerUp | PeerLost):
            self._link_changed(event)
        reports: list[EngineReport] = []
        for command in engine.handle(event, now):
            self._obey(command, reports)
        if reports:
            self._wire.send(Report(tuple(reports)))

    def _obey(self, command: EngineCommand, reports: list[EngineReport]) -> None:
        assert self._links is not None
        match command:
            case ToController(event):
                reports.append(event)  # type: ignore[arg-type]
            case RunStep():
                assert self._steps is not None
                assert self._windows is not None
                self._watch.begin(command)
                self._steps.submit(command, self._windows.of_step(command))
            case SendFrame():
                self._links.send(command)
            case ExpectKv():
                self._links.expect(command)
            case ForgetKv():
                self._links.forget(command)
            case CancelSends():
                self._links.cancel_sends(command)
            case SetTimer(key, after_seconds):
                self._cancel_timer(key)
                self._timers[key] = self._loop.call_later(after_seconds, self._timer_due, key)
            case CancelTimer(key):
                self._cancel_timer(key)
            case EndRun():
                pass  # every step is a run of its own here

    def _cancel_timer(self, key: str) -> None:
        handle = self._timers.pop(key, None)
        if handle is not None:
            handle.cancel()

    def _timer_due(self, key: str) -> None:
        self._timers.pop(key, None)
        self._handle(TimerFired(key))

    def _hand_over_failure(self, failed: LinkFailed) -> None:
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._link_failed, failed)

    # -- links --------------------------------------------------------------------------------------------------------

    def _dial(self, wanted: ConnectPeer) -> None:
        assert self._links is not None
        self._links.connect(wanted.peer, wanted.address, wanted.transport)

    def _dial_again(self, peer: WorkerId) -> None:
        """If it was us who dialed: the link is down, and nobody says that the peer is."""
        pause_seconds = self._redial.down(peer)
        if pause_seconds is not None:
            self._loop.call_later(pause_seconds, self._pause_over, peer)

    def _pause_over(self, peer: WorkerId) -> None:
        if not self._closed.done() and self._redial.due(peer):
            self._dial(self._dials[peer])

    def _link_changed(self, event: PeerUp | PeerLost) -> None:
        assert self._links is not None
        assert self._windows is not None
        self._windows.link_changed(event, self._links.windows())
        match event:
            case PeerUp(peer):
                self._redial.up(peer)
                self._link_bytes[peer] = 0
                transport, rate = _first_guess(event)
                self._spawn(self._measure_link(peer, transport, rate))
            case PeerLost(peer):
                self._link_bytes.pop(peer, None)
                self._wire.send(LinkState(peer, "", 0.0, 0.0, "the link was lost"))
                self._dial_again(peer)

    async def _measure_link(self, peer: WorkerId, transport: str, bytes_per_second: float) -> None:
        """Say that the link is up, and how long a word takes over it."""
        assert self._links is not None
        measured = await asyncio.to_thread(self._links.measure, peer)
        if peer in self._link_bytes:
            latency_seconds = measured.latency_seconds if measured is not None else SLOW_LINK_SECONDS
            self._link_latency[peer] = latency_seconds
            self._wire.send(LinkState(peer, transport, bytes_per_second, latency_seconds))

    def _link_failed(self, failed: LinkFailed) -> None:
        """A link that did not come up, or broke: the front end shows it, and stops routing over it."""
        peer = failed.peer or WorkerId("unknown")
        self._wire.send(LinkState(peer, "", 0.0, 0.0, failed.reason))
        self._dial_again(peer)

    def _report_links(self) -> None:
        """Tell the router what the links have given lately."""
        if self._links is None:
            return
        for stats in self._links.stats():
            sent, peer = stats.sent, stats.peer
            if peer in self._link_latency and sent.num_bytes != self._link_bytes.get(peer, sent.num_bytes):
                self._link_bytes[peer] = sent.num_bytes
                self._wire.send(LinkState(peer, stats.transport, sent.bytes_per_second, self._link_latency[peer]))

    # -- the end ------------------------------------------------------------------------------------------------------

    def _close(self) -> None:
        for task in self._background:
            task.cancel()
        for key in list(self._timers):
            self._cancel_timer(key)
        if self._steps is not None:
            self._steps.stop()
        if self._service is not None:
            self._service.close()
        if self._links is not None:
            self._links.close(2.0)
        if self._log is not None:
            self._log.close()
        self._wire.close()


def _first_guess(link: PeerUp) -> tuple[str, float]:
    """Transport and bytes a second of a link, until something has been sent."""
    if link.window is not None:
        return "direct", 1e12
    return ("shm", 8e9) if link.one_sided else ("tcp", 1e9)


def engine_config(plan: WorkerPlan, layout: KvLayout, num_blocks: int, incarnation: int) -> EngineConfig:
    """What the Engine of this plan is told."""
    return EngineConfig(
        worker=WorkerId(plan.name),
        num_blocks=num_blocks,
        block_size=layout.block_size,
        num_layers=layout.num_layers,
        cell_bytes=layout.cell_bytes,
        namespace=layout.digest,
        max_batch=plan.limits.max_batch,
        step_tokens=plan.limits.step_tokens,
        lease_seconds=plan.lease_seconds,
        seed=int.from_bytes(os.urandom(8)) ^ incarnation,
    )


def main(join: str, name: str, token: str) -> int:
    """What a worker process does: work until the front end is gone. Ends the process."""
    from transload.model.load import build_executor, build_ffn

    sys.setswitchinterval(0.0005)  # the step thread and the event loop share the interpreter: give way quickly

    async def work() -> str:
        worker = WorkerProcess(join, name, token, build_executor, build_ffn)
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(worker.crash)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, worker.stop, f"received {signal.Signals(number).name}")
        return await worker.run()

    with lenient_stderr():
        reason = asyncio.run(work())
    os._exit(0 if reason == SHUT_DOWN else 1)  # torch's threads have nothing left to say
