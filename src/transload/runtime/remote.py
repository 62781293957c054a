"""One worker as the front end sees it: its process, its connection, and whether it still lives."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from transload.control.messages import Message, WorkerId
from transload.deploy.plan import WorkerPlan
from transload.runtime.processes import Process, Processes
from transload.runtime.wire import (
    JOIN_SECONDS,
    Alive,
    Challenge,
    Failed,
    FfnCounted,
    FfnSwitched,
    HopState,
    Join,
    LinkState,
    Ready,
    Refused,
    Report,
    Shutdown,
    ToFrontEndFrame,
    Welcome,
    Wire,
    prove,
)

SILENCE_SECONDS = 10.0
"""A worker that says nothing for this long is killed: it is stopped, or the machine is."""
STARTING_SILENCE_SECONDS = 60.0
"""The same before it is ready, when it may be busy loading."""
STOP_SECONDS = 3.0
"""How long a worker may take to leave before it is killed."""


class RemoteWorker:
    """One incarnation of a worker. Reports through its callbacks; `on_gone` comes exactly once."""

    def __init__(
        self,
        plan: WorkerPlan,
        incarnation: int,
        *,
        processes: Processes,
        token: str,
        link_secret: bytes,
        event_log: Path | None,
        on_ready: Callable[[RemoteWorker, Ready], None],
        on_report: Callable[[Report], None],
        on_link: Callable[[RemoteWorker, LinkState], None],
        on_ffn: Callable[[RemoteWorker, HopState | FfnSwitched | FfnCounted], None],
        on_gone: Callable[[RemoteWorker, str], None],
    ) -> None:
        self.plan = plan
        self.name = WorkerId(plan.name)
        self.incarnation = incarnation
        self.ready: Ready | None = None
        self.failure: str | None = None
        self.link_problem: str | None = None
        self._processes = processes
        self._token = token
        self._welcome = Welcome(plan, incarnation, link_secret, str(event_log) if event_log is not None else None)
        self._on_ready = on_ready
        self._on_report = on_report
        self._on_link = on_link
        self._on_ffn = on_ffn
        self._on_gone = on_gone
        self._process: Process | None = None
        self._wire: Wire[ToFrontEndFrame] | None = None
        self._heard_at = time.monotonic()
        self._gone = False
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, join: tuple[str, int]) -> None:
        """Start the process, unless somebody else does; it joins on its own. Raises `OSError` if there can be none."""
        if self.plan.starts_here:
            self._process = await self._processes.start(f"{join[0]}:{join[1]}", self.name, self._token)
            self._tasks.append(asyncio.create_task(self._watch_process(self._process)))
        self._tasks.append(asyncio.create_task(self._watch_silence()))

    @staticmethod
    def greet(token: str, remotes: Mapping[WorkerId, RemoteWorker]) -> asyncio.Protocol:
        """The protocol for a new connection: challenge it, and hand it to the worker it proves to be."""
        nonce = secrets.token_bytes(16)

        def take(frame: ToFrontEndFrame) -> None:
            if not isinstance(frame, Join):
                wire.close("a worker must join first")
                return
            remote = remotes.get(frame.name)
            if not hmac.compare_digest(frame.proof, prove(token, nonce, frame.name)):
                wire.send(Refused("wrong join token"))
            elif remote is None or remote._wire is not None:
                wire.send(Refused(f"no worker named {frame.name} is expected"))
            else:
                wire.joined = True
                remote._adopt(wire)
                return
            wire.close()

        wire = _Greeted(take, nonce)
        return wire

    def _adopt(self, wire: Wire[ToFrontEndFrame]) -> None:
        self._wire = wire
        self._heard_at = time.monotonic()  # however long nobody has come
        wire.on_message = self._take
        wire.on_lost = self._lost
        wire.send(self._welcome)

    def send(self, message: Message) -> None:
        """To the worker; silently nowhere if it is gone, which is or will be reported by `on_gone`."""
        if self._wire is not None:
            self._wire.send(message)

    def _take(self, frame: ToFrontEndFrame) -> None:
        self._heard_at = time.monotonic()
        if self._gone:
            return
        match frame:
            case Report():
                self._on_report(frame)
            case Ready():
                self.ready = frame
                self._on_ready(self, frame)
            case LinkState():
                self._on_link(self, frame)
            case HopState() | FfnSwitched() | FfnCounted():
                self._on_ffn(self, frame)
            case Failed(reason):
                if self.incarnation == 1 and self.ready is None:
                    self.failure = reason
                self._lost(reason)
            case Alive() | Join():
                pass

    def _lost(self, reason: str) -> None:
        """The worker is gone for us: make that true, and say so once."""
        if self._gone:
            return
        self._gone = True
        self.ready = None
        self.kill()
        self._on_gone(self, reason)

    def kill(self) -> None:
        """End the process at once, or its connection if it is not ours."""
        if self._process is not None:
            self._process.kill()
        elif self._wire is not None:
            self._wire.close("given up")

    async def _watch_process(self, process: Process) -> None:
        reason = f"its process {await process.ended()}"
        if self.ready is None and self.incarnation == 1 and self.failure is None:
            self.failure = reason
        self._lost(reason)

    async def _watch_silence(self) -> None:
        while not self._gone:
            await asyncio.sleep(1.0)
            silent = time.monotonic() - self._heard_at
            limit = SILENCE_SECONDS if self.ready is not None else STARTING_SILENCE_SECONDS
            expected = self._wire is not None or self.plan.starts_here  # somebody may start it any time
            if expected and silent > limit:
                self._lost(f"silent for {silent:.0f} s")

    async def stop(self) -> None:
        """Ask it to leave, then make sure that it has."""
        self.send(Shutdown())
        if self._process is not None:
            if self._wire is None:  # still importing: it cannot hear us, and holds nothing yet
                self.kill()
            try:
                async with asyncio.timeout(STOP_SECONDS):
                    await self._process.ended()
            except TimeoutError:
                self.kill()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(STOP_SECONDS):
                        await self._process.ended()
        elif self._wire is not None:
            self._wire.close()
        self._gone = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def describe(self) -> dict[str, object]:
        """For /health."""
        return {
            "state": "gone" if self._gone else "ready" if self.ready is not None else "starting",
            "role": self.plan.role,
            "pid": self._process.pid if self._process is not None else None,
            "incarnation": self.incarnation,
            "blocks": self.ready.num_blocks if self.ready is not None else None,
            "link_problem": self.link_problem,
        }


class _Greeted(Wire[ToFrontEndFrame]):
    """A connection that has been challenged and has not joined yet."""

    def __init__(self, take: Callable[[ToFrontEndFrame], None], nonce: bytes) -> None:
        super().__init__(ToFrontEndFrame, take, lambda _: None)
        self._nonce = nonce
        self.joined = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.send(Challenge(self._nonce))
        asyncio.get_running_loop().call_later(JOIN_SECONDS, self._too_late)

    def _too_late(self) -> None:
        """Nobody holds a connection open without joining."""
        if not self.joined:
            self.close("did not join in time")
