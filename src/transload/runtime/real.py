"""Real time: one controller in this process, one process for each worker, asyncio between them.

The controller is touched by this event loop alone. A worker is known dead when its socket closes or when it has been
silent too long; then its process is killed, and the controller says when to start the next one.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from transload.control.controller import Controller, ControllerConfig
from transload.control.messages import (
    Arrived,
    Assignment,
    Cancelled,
    CancelTimer,
    ControllerCommand,
    ControllerEvent,
    Finish,
    LinkMeasured,
    Reject,
    Request,
    RequestId,
    RestartWorker,
    SetTimer,
    Stream,
    TimerFired,
    Token,
    ToWorker,
    WorkerGone,
    WorkerId,
    WorkerJoined,
)
from transload.deploy.placement import place
from transload.deploy.plan import Placement, WorkerPlan
from transload.deploy.resplit import resplit
from transload.errors import DeploymentError, OverCapacity, RequestError, WorkerLost
from transload.runtime.base import Finished, ServedModel, Waterfall
from transload.runtime.event_log import EventLog
from transload.runtime.ffn_move import FfnMove
from transload.runtime.ffn_pools import FfnObserver, FfnPools
from transload.runtime.forks import worker_processes
from transload.runtime.processes import JOIN_TOKEN, Processes
from transload.runtime.records import waterfall
from transload.runtime.remote import RemoteWorker
from transload.runtime.wire import Assign, ConnectPeer, LinkState, Ready, Report

START_SECONDS = 300.0
"""How long the workers may take to load their model."""

Observer = Callable[[ControllerEvent | ControllerCommand, float], None]


class LiveStream:
    """A request as its caller sees it. Holds at most the tokens of that request."""

    def __init__(self, runtime: RealRuntime, request_id: RequestId) -> None:
        self.request_id = request_id
        self._runtime = runtime
        self._tokens: list[Token] = []
        self._finished: Finished | None = None
        self._is_over = False
        self._news = asyncio.Event()

    def put(self, token: Token) -> None:
        self._tokens.append(token)
        self._news.set()

    def end(self, finished: Finished) -> None:
        self._finished = finished
        self._news.set()

    def __aiter__(self) -> LiveStream:
        return self

    async def __anext__(self) -> list[Token] | Finished:
        # No generator: one that is left at its last item costs a task and a wake-up to end.
        while not self._tokens and self._finished is None and not self._is_over:
            self._news.clear()
            await self._news.wait()
        if self._tokens:
            tokens, self._tokens = self._tokens, []
            return tokens
        finished, self._finished = self._finished, None
        if finished is None:
            raise StopAsyncIteration
        self._is_over = True
        return finished

    def stop(self) -> None:
        self._runtime.tell(Cancelled(self.request_id, "stop"))

    def cancel(self) -> None:
        self._runtime.tell(Cancelled(self.request_id, "cancelled"))


class RealRuntime:
    """The `Backend` that really runs. `start` it, and whatever happens, `close` it."""

    def __init__(
        self,
        model: ServedModel,
        placement: Placement,
        config: ControllerConfig,
        *,
        processes: Processes | None = None,
        join: tuple[str, int] = ("127.0.0.1", 0),
        event_log: Path | None = None,
    ) -> None:
        """`join`: address and port where workers join. `processes`: where theirs come from, closed with this."""
        self.model = model
        self._join = join
        self._processes = processes or worker_processes()
        self.controller = Controller(config)
        self._placement = placement
        self._origin = placement.deployment
        self._plans = {WorkerId(plan.name): plan for plan in placement.workers}
        self.observe: Observer | None = None
        """Called with every event before, and every command after, the controller handles it."""
        self.observe_ffn: FfnObserver | None = None
        """Called with what workers have counted of feed-forward calls."""
        self._event_log = event_log
        self._log = EventLog(event_log, "controller") if event_log is not None else None
        self._loop = asyncio.get_running_loop()
        self._token = os.environ.get(JOIN_TOKEN) or secrets.token_hex(16)
        self._link_secret = secrets.token_bytes(32)
        self._remotes: dict[WorkerId, RemoteWorker] = {}
        self._streams: dict[RequestId, LiveStream] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._events: deque[ControllerEvent] = deque()
        self._busy = False
        self._closing = False
        self._last_request = 0
        self._server: asyncio.Server | None = None
        self._changed = asyncio.Event()
        self._request_ended = asyncio.Event()
        self._restarts: set[asyncio.Task[None]] = set()
        self._problems: dict[WorkerId, str] = {}  # of workers that are not back: why they have gone
        self._refusal: Reject | None = None
        self.num_restarts = 0
        self._moving = asyncio.Lock()
        self._ffn_pools = FfnPools(
            self._plans,
            self._remotes,
            restart=self._restart_later,
            changed=self._changed,
            counted=self._ffn_counted,
        )

    # -- Backend ------------------------------------------------------------------------------------------------------

    def next_request_id(self) -> RequestId:
        self._last_request += 1
        return RequestId(self._last_request)

    async def submit(self, request: Request) -> LiveStream:
        """Admit a request. Raises `OverCapacity` if too many wait, `RequestError` while shutting down."""
        if self._closing:
            raise RequestError("the server is shutting down", status=503, code="shutting_down")
        stream = LiveStream(self, request.id)
        self._streams[request.id] = stream
        self.tell(Arrived(request))
        refusal, self._refusal = self._refusal, None
        if refusal is not None and refusal.retry_after_seconds is None:
            raise RequestError(refusal.message, code="exceeds_capacity")
        if refusal is not None:
            raise OverCapacity(refusal.message, retry_after_seconds=refusal.retry_after_seconds or 1.0)
        return stream

    def is_ready(self) -> bool:
        return bool(self.controller.views) and not self._closing

    def waterfall(self, request: RequestId) -> Waterfall | None:
        tracked = self.controller.requests.get(request) or self.controller.ended.get(request)
        return None if tracked is None else waterfall(tracked, time.monotonic())

    def status(self) -> dict[str, object]:
        return {
            "workers": {
                name: {**remote.describe(), "problem": self._problems.get(name), **self._ffn_pools.describe(name)}
                for name, remote in sorted(self._remotes.items())
            },
            "links": {
                f"{source} -> {target}": {"transport": link.transport, "bytes_per_second": link.bytes_per_second}
                for (source, target), link in self.controller.links.items()
            },
            "requests": len(self.controller.requests),
            "waiting": self.controller.num_waiting,
            "restarts": self.num_restarts,
        }

    async def change_split(self, topology: str) -> dict[str, object]:
        """See `Backend`."""
        if self._moving.locked():
            raise RequestError("the split is being changed already", status=409, code="split_changing")
        async with self._moving:
            try:
                wanted = resplit(self._placement.deployment, topology, self._origin)
                placement = place(wanted, self._placement.machine, self.model.arch)
            except DeploymentError as error:
                raise RequestError(str(error), param="topology", code="invalid_split") from None
            started = time.monotonic()
            move = FfnMove(self._ffn_pools, self._plans, self._remotes, self._launch, self._changed)
            try:
                await move.run({WorkerId(plan.name): plan for plan in placement.workers})
            except WorkerLost as error:
                raise RequestError(str(error), status=503, code="split_failed") from None
            self._placement = placement
            switched = self._ffn_pools.last_switch
            return {
                "topology": topology,
                "seconds": time.monotonic() - started,
                "memory_bytes": {name: word.memory_bytes for name, word in sorted(switched.items())},
            }

    # -- the controller -----------------------------------------------------------------------------------------------

    def tell(self, event: ControllerEvent) -> None:
        """Give the controller a fact; its commands are obeyed before the next fact is taken up."""
        self._events.append(event)
        if self._busy:
            return
        self._busy = True
        try:
            while self._events:
                self._handle(self._events.popleft())
        finally:
            self._busy = False

    def _handle(self, event: ControllerEvent) -> None:
        now = time.monotonic()
        if self._log is not None:
            self._log.write(now, event)
        if self.observe is not None:
            self.observe(event, now)
        assignments: dict[WorkerId, list[Assignment]] = {}
        for command in self.controller.handle(event, now):
            if self.observe is not None:
                self.observe(command, now)
            if isinstance(command, ToWorker):
                assignments.setdefault(command.worker, []).append(command.event)
            else:
                self._obey(command)
        for worker, events in assignments.items():
            self._remotes[worker].send(Assign(tuple(events)))

    def _obey(self, command: ControllerCommand) -> None:
        match command:
            case Stream(token):
                self._streams[token.request].put(token)
            case Finish():
                self._finish(command)
            case Reject():
                del self._streams[command.request]
                self._refusal = command
            case SetTimer(key, after_seconds):
                self._timers[key] = self._loop.call_later(after_seconds, self._timer_due, key)
            case CancelTimer(key):
                self._timers.pop(key).cancel()
            case RestartWorker(worker, after_seconds):
                self._restart_later(worker, after_seconds)
            case ToWorker():
                raise AssertionError("assignments are sent together")

    def _finish(self, finish: Finish) -> None:
        self._request_ended.set()
        stream = self._streams.pop(finish.request)
        stream.end(
            Finished(
                reason=finish.reason,
                num_prompt_tokens=finish.num_prompt_tokens,
                num_outputs=finish.num_outputs,
                num_cached_tokens=finish.num_cached_tokens,
                error=finish.error,
                error_code=finish.error_code,
            )
        )

    def _timer_due(self, key: str) -> None:
        del self._timers[key]
        self.tell(TimerFired(key))

    # -- workers ------------------------------------------------------------------------------------------------------

    async def start(self, *, listening: Callable[[], None] | None = None) -> None:
        """Start the workers; return when each is ready and linked. `listening` is called once workers can join.
        Raises `WorkerLost` if one cannot start."""
        self._server = await self._loop.create_server(self._accept, *self._join)
        if listening is not None:
            listening()
        try:
            for name in self._plans:
                await self._launch(name)
            async with asyncio.timeout(START_SECONDS):
                await self._all_ready()
        except TimeoutError:
            await self.close()
            raise WorkerLost(f"the workers did not get ready within {START_SECONDS:g} s") from None
        except OSError as error:
            await self.close()
            raise WorkerLost(f"no process for a worker: {error}") from error
        except BaseException:
            await self.close()
            raise

    def join_commands(self) -> list[str]:
        """How to start the workers that are not started here."""
        host, port = self.join_address
        return [
            f"{JOIN_TOKEN}={self._token} transload worker --join {host}:{port} --name {plan.name}"
            for plan in self._plans.values()
            if not plan.starts_here
        ]

    @property
    def join_address(self) -> tuple[str, int]:
        """Where workers join."""
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()[:2]
        return host, port

    async def _launch(self, name: WorkerId, incarnation: int = 1) -> None:
        """Start a worker. It is known before its process is: it may join before we hear that there is one."""
        remote = self._remotes[name] = RemoteWorker(
            self._plans[name],
            incarnation,
            processes=self._processes,
            token=self._token,
            link_secret=self._link_secret,
            event_log=self._event_log,
            on_ready=self._joined,
            on_report=self._reported,
            on_link=self._link_changed,
            on_ffn=self._ffn_pools.said,
            on_gone=self._gone,
        )
        await remote.start(self.join_address)

    def _accept(self) -> asyncio.Protocol:
        return RemoteWorker.greet(self._token, self._remotes)

    async def _all_ready(self) -> None:
        """Until every worker has joined and can reach those it works with."""
        while True:
            self._changed.clear()
            for remote in self._remotes.values():
                if remote.failure is not None:
                    raise WorkerLost(f"worker {remote.name} could not start: {remote.failure}")
            num_serving = sum(plan.role != "ffn" for plan in self._plans.values())
            is_serving = len(self.controller.views) == num_serving and self._missing_links() == 0
            if is_serving and self._ffn_pools.is_complete():
                return
            await self._changed.wait()

    def _missing_links(self) -> int:
        return sum(pair not in self.controller.links for pair in self._pairs(list(self._plans.values())))

    @staticmethod
    def _pairs(plans: Sequence[WorkerPlan]) -> list[tuple[WorkerId, WorkerId]]:
        """Who hands KV to whom."""
        return [
            (WorkerId(source.name), WorkerId(target.name))
            for source in plans
            if source.role == "prefill"
            for target in plans
            if target.role == "decode"
        ]

    def _joined(self, remote: RemoteWorker, ready: Ready) -> None:
        plan = remote.plan
        self._problems.pop(remote.name, None)
        self._changed.set()
        if plan.role == "ffn":
            self._ffn_pools.ffn_ready(remote)
            return
        self._ffn_pools.attention_ready(remote)
        self.tell(
            WorkerJoined(
                remote.name,
                remote.incarnation,
                plan.pool,
                plan.duty,
                ready.num_blocks,
                ready.block_size,
                ready.kv_bytes_per_token,
                plan.limits.max_batch,
            )
        )
        live = [other.plan for other in self._remotes.values() if other.ready is not None]
        for source, target in self._pairs(live):
            if remote.name in (source, target):
                peer = self._remotes[target].ready
                assert peer is not None
                transport = self._plans[source].transports[self._plans[target].pool]
                self._remotes[source].send(ConnectPeer(target, peer.address, transport))

    def _reported(self, report: Report) -> None:
        for event in report.events:
            self.tell(event)

    def _link_changed(self, remote: RemoteWorker, state: LinkState) -> None:
        if remote.plan.role == "prefill":
            self.tell(
                LinkMeasured(remote.name, state.peer, state.transport, state.bytes_per_second, state.latency_seconds)
            )
        if state.problem is not None and not self._closing:
            remote.link_problem = f"{state.peer}: {state.problem}"
        elif remote.link_problem is not None and remote.link_problem.startswith(f"{state.peer}: "):
            remote.link_problem = None  # it has been dialled again
        self._changed.set()

    def _ffn_counted(self, worker: WorkerId, totals: Mapping[str, float], hops: Sequence[int]) -> None:
        if self.observe_ffn is not None:
            self.observe_ffn(worker, totals, hops)

    def _gone(self, remote: RemoteWorker, reason: str) -> None:
        self._changed.set()
        if self._closing or self._remotes.get(remote.name) is not remote or remote.failure is not None:
            return
        self._problems[remote.name] = reason
        if remote.plan.role == "ffn":
            self._ffn_pools.ffn_gone(remote)
        else:
            self._ffn_pools.attention_gone(remote.name)
            self.tell(WorkerGone(remote.name, remote.incarnation, reason))

    def _restart_later(self, name: WorkerId, after_seconds: float) -> None:
        plan = self._plans.get(name)
        if plan is not None and not plan.starts_here:
            after_seconds = 0.0  # whoever starts it by hand has paused already
        self._loop.call_later(after_seconds, self._restart, name)

    def _restart(self, name: WorkerId) -> None:
        if self._closing or name not in self._plans:
            return
        self.num_restarts += 1
        incarnation = self._remotes[name].incarnation + 1

        async def launch() -> None:
            try:
                await self._launch(name, incarnation)
            except OSError as error:  # no memory for a process, no file left: as if it had died at once
                self._gone(self._remotes[name], f"its process could not be started: {error}")

        task = self._loop.create_task(launch())
        self._restarts.add(task)
        task.add_done_callback(self._restarts.discard)

    # -- the end ------------------------------------------------------------------------------------------------------

    async def drain(self, timeout_seconds: float) -> None:
        """Take no new requests and let those under way finish, up to a time; then cancel them."""
        self._closing = True
        try:
            async with asyncio.timeout(timeout_seconds):
                while self.controller.requests:
                    self._request_ended.clear()
                    await self._request_ended.wait()
        except TimeoutError:
            pass
        for request_id in list(self.controller.requests):
            self.tell(Cancelled(request_id, "cancelled"))

    async def close(self) -> None:
        """Stop every worker, however it is, and free everything. Safe to call twice."""
        self._closing = True
        for request_id in list(self.controller.requests):
            self.tell(Cancelled(request_id, "cancelled"))
        for handle in self._timers.values():
            handle.cancel()
        self._timers.clear()
        if self._server is not None:
            self._server.close()
        for task in self._restarts:
            task.cancel()
        await asyncio.gather(*self._restarts, return_exceptions=True)
        await asyncio.gather(*(remote.stop() for remote in self._remotes.values()))
        self._processes.close()
        if self._log is not None:
            self._log.close()
            self._log = None
