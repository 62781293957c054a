"""What an FFN worker does: takes calls from its links, lets `FfnServer` group them, computes, answers.

One thread for all of it, so that nothing is handed over between a call and its answer. Attention workers are let in by
threads of their own. It holds no request and no cache; when it dies nothing is lost but time.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import traceback
from collections import deque

import msgspec

from transload.control.ffn_messages import (
    BatchDone,
    BatchFailed,
    CallKey,
    FfnError,
    FfnReply,
    FfnServerCommand,
    ForgetRequest,
    RequestCame,
    RunBatch,
    SendAnswer,
    SessionDown,
    SessionId,
    SessionUp,
    TimeCame,
)
from transload.control.ffn_server import FfnServer, FfnServerConfig
from transload.errors import HandoffError, TransloadError
from transload.runtime.base import FfnCompute
from transload.transfer.ffn_link import ArrivedCall, CalleeEnd
from transload.transfer.ffn_meeting import PROTOCOL, Offer, Party, accept_ffn
from transload.transfer.ffn_waiting import Waiter
from transload.transfer.listener import Listener, PeerAddress, host_id


class FfnServed(msgspec.Struct):
    """What was done so far, and in how much of the time."""

    requests: int = 0
    batches: int = 0
    rows: int = 0
    busy_seconds: float = 0.0
    """Computing."""
    up_seconds: float = 0.0
    """Since the start."""
    sessions: int = 0


class _Held(msgspec.Struct):
    """A call that is not answered."""

    end: CalleeEnd
    call: ArrivedCall
    taken_at: float
    answer_bytes: int = 0


class FfnService:
    """Everything of an FFN worker but its process. Start it, and `close` it."""

    def __init__(
        self,
        me: Party,
        compute: FfnCompute,
        *,
        max_wait_seconds: float,
        max_rows: int,
        spin_seconds: float,
        bind_host: str = "127.0.0.1",
    ) -> None:
        self.served = FfnServed()
        self._me = me
        self._compute = compute
        self._server = FfnServer(
            FfnServerConfig(
                num_layers=compute.weights.num_layers,
                pieces=compute.pieces,
                max_wait_seconds=max_wait_seconds,
                max_rows=max_rows,
            )
        )
        self._offer = Offer(weights=compute.weights, pieces=tuple(sorted(compute.pieces)))
        self._waiter = Waiter(spin_seconds, compute.rings)
        self._ends: dict[SessionId, CalleeEnd] = {}
        self._arrived: deque[CalleeEnd] = deque()
        self._held: dict[CallKey, _Held] = {}
        self._batches: deque[RunBatch] = deque()
        self._stopping = threading.Event()
        self._started_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="ffn", daemon=True)
        self._listener = Listener(me=me.worker, bind_host=bind_host, advertise_host=None, shares_memory=True)
        self.address = PeerAddress(
            worker=me.worker,
            incarnation=me.incarnation,
            host_id=host_id(),
            unix_name=self._listener.unix_name,
            host=self._listener.host,
            port=self._listener.port,
            layout_digest=PROTOCOL,
        )
        self.failure: str | None = None
        """Why the thread has ended, if it was not told to."""

    def start(self) -> None:
        self._thread.start()
        self._listener.start(self._greet)

    def counts(self) -> dict[str, float]:
        """By name; see `FfnServed`."""
        self.served.up_seconds = time.monotonic() - self._started_at
        return {name: float(getattr(self.served, name)) for name in self.served.__struct_fields__}

    def close(self) -> None:
        """End the thread and every link."""
        self._stopping.set()
        self._waiter.nudge()
        self._listener.close()
        if self._thread.is_alive():
            self._thread.join(5.0)
        self._waiter.close()

    def _greet(self, sock: socket.socket, one_sided: bool) -> None:
        threading.Thread(target=self._let_in, args=(sock, one_sided), name="ffn-greet", daemon=True).start()

    def _let_in(self, sock: socket.socket, one_sided: bool) -> None:
        with contextlib.suppress(OSError, TransloadError):  # the caller has been told, and reports it
            self._arrived.append(accept_ffn(self._me, sock, one_sided, self._offer, self._compute.rings))
            if not self._thread.is_alive():
                self._turn_away()
            self._waiter.nudge()

    def _turn_away(self) -> None:
        """Those who came too late for the thread, which has ended."""
        with contextlib.suppress(IndexError):
            while True:
                self._arrived.popleft().close()

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._take_calls()
                if self._batches:
                    self._run_batch(self._batches.popleft())
                    continue
                due_at = self._server.due_at
                self._waiter.wait(list(self._ends.values()), due_at)
                if due_at is not None and time.monotonic() >= due_at:
                    self._obey(self._server.handle(TimeCame(), time.monotonic()))
        except Exception as error:
            traceback.print_exc()
            self.failure = f"{type(error).__name__}: {error}"
        finally:
            for end in self._ends.values():
                end.close()
            self._turn_away()

    def _take_calls(self) -> None:
        while self._arrived:
            self._welcome(self._arrived.popleft())
        for end in list(self._ends.values()):
            try:
                for call in end.poll():
                    self._take(end, call)
            except HandoffError:
                self._part(end)

    def _take(self, end: CalleeEnd, call: ArrivedCall) -> None:
        request = call.frame.request
        if request.key.session != end.session or request.key in self._held:
            raise HandoffError(f"a call of another session, or one that was made already: {request.key}")
        room_bytes = len(end.answer_buffer(call.slot))
        problem = self._compute.problem(call, room_bytes)
        if problem is not None:
            end.answer(call.slot, FfnError(request.key, problem), 0)
            return
        now = time.monotonic()
        self._held[request.key] = _Held(end, call, now)
        self._obey(self._server.handle(RequestCame(request), now))

    def _run_batch(self, batch: RunBatch) -> None:
        held = [self._held[request.key] for request in batch.requests if self._is_live(self._held[request.key].end)]
        started = time.monotonic()
        event: BatchDone | BatchFailed = BatchDone(batch.number)
        try:
            targets = [one.end.answer_buffer(one.call.slot) for one in held]
            sizes = self._compute.compute(batch.layer, [one.call for one in held], targets) if held else []
            for one, num_bytes in zip(held, sizes, strict=True):
                one.answer_bytes = num_bytes
        except Exception as error:
            traceback.print_exc()
            event = BatchFailed(batch.number, f"{type(error).__name__}: {error}")
        self.served.busy_seconds += time.monotonic() - started
        self.served.batches += 1
        self.served.requests += len(held)
        self.served.rows += sum([one.call.frame.num_rows for one in held])
        self._take_calls()  # so that they can join the next batch
        self._obey(self._server.handle(event, time.monotonic()))

    def _obey(self, commands: list[FfnServerCommand]) -> None:
        for command in commands:
            match command:
                case RunBatch():
                    self._batches.append(command)
                case SendAnswer(answer):
                    held = self._held.pop(answer.key)
                    num_bytes = 0
                    if isinstance(answer, FfnReply):
                        num_bytes = held.answer_bytes
                        answer = FfnReply(answer.key, time.monotonic() - held.taken_at)
                    if self._is_live(held.end):
                        held.end.answer(held.call.slot, answer, num_bytes)
                case ForgetRequest(key):
                    del self._held[key]

    # -- links --------------------------------------------------------------------------------------------------------

    def _is_live(self, end: CalleeEnd) -> bool:
        return self._ends.get(end.session) is end

    def _welcome(self, end: CalleeEnd) -> None:
        before = self._ends.get(end.session)
        if before is not None:  # it has dialed again: the link of before is broken, as we shall see
            self._part(before)
        self._ends[end.session] = end
        self.served.sessions = len(self._ends)
        self._obey(self._server.handle(SessionUp(end.session), time.monotonic()))

    def _part(self, end: CalleeEnd) -> None:
        del self._ends[end.session]
        self.served.sessions = len(self._ends)
        self._obey(self._server.handle(SessionDown(end.session), time.monotonic()))
        end.close()
