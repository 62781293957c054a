"""One step whose feed-forwards are computed elsewhere, played in virtual time by the machines that serve.

An `FfnClient` for each attention worker and an `FfnServer` for each FFN worker decide whom to ask, what is merged, and
what becomes of a call whose worker is gone; durations are a `Pipeline`'s. Without losses it is what the closed form of
`hardware/afd/pipeline.py` says, and a test holds it to that: a simulation takes the closed form while everybody is up,
and plays the steps in which somebody goes or comes back. Owns no request and no cache.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from transload.control.ffn_client import FfnClient, FfnClientConfig
from transload.control.ffn_messages import (
    BatchDone,
    CallDone,
    CallFailed,
    CallMade,
    CallName,
    ComputeHere,
    Fallback,
    FfnAnswer,
    FfnAnswered,
    FfnClientEvent,
    FfnDown,
    FfnRequest,
    FfnServerEvent,
    FfnUp,
    Piece,
    RequestCame,
    RunBatch,
    SendAnswer,
    SendRequest,
    SessionId,
    SessionUp,
    StepOver,
    TimeCame,
    Wanted,
)
from transload.control.ffn_server import FfnServer, FfnServerConfig
from transload.control.messages import WorkerId
from transload.hardware.afd.pipeline import LayerTimes, Pipeline

BatchSeconds = Callable[[int, Sequence[FfnRequest]], float]
"""(FFN worker, requests that it computes together) -> seconds."""
CREDIT = 64
NO_LIMIT = 1 << 40
"""Rows: what a chip's memory would limit is not a step's concern."""


class Outage(msgspec.Struct, frozen=True):
    """An FFN worker is not there, from one time to another; seconds since the step began, or before it."""

    server: int
    start: float
    end: float = math.inf


class FfnRules(msgspec.Struct, frozen=True, kw_only=True):
    """What a deployment says of calls, and what an attention worker can do without an FFN worker."""

    fallback: Fallback = "local"
    timeout_seconds: float = 0.5
    deadline_seconds: float = 10.0
    max_wait_seconds: float = 200e-6
    notice_seconds: float = 0.0
    """From an FFN worker's death until those who call it know."""
    local_seconds: float | None = None
    """A layer's feed-forward of one micro-batch at the attention worker itself. None: it cannot hold the weights."""
    load_seconds: float = 0.0
    """Before it can do that for the first time."""
    no_room: str = "the attention worker cannot hold the weights"


class Played(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the step."""

    seconds: tuple[float, ...]
    """Of each attention worker, from its own begin, tail included; until it failed where it did."""
    problems: tuple[str | None, ...]
    """Why it failed; None: it did not."""
    num_batches: int
    """That FFN workers computed in the step."""
    num_retries: int
    num_computed_here: int
    """Calls, in whole or in part."""
    has_loaded: tuple[bool, ...]
    """Attention workers that have the weights of feed-forwards by now."""


class _Attention:
    def __init__(self, index: int, rules: FfnRules) -> None:
        self.index = index
        config = FfnClientConfig(
            session=SessionId(index + 1),
            fallback=rules.fallback,
            timeout_seconds=rules.timeout_seconds,
            deadline_seconds=rules.deadline_seconds,
        )
        self.client = FfnClient(config)
        self.jobs: deque[tuple[float, Callable[[], None]]] = deque()
        self.is_computing = False
        self.outbox: deque[tuple[int, FfnRequest]] = deque()
        self.is_sending = False
        self.port_in = 0.0
        self.local: dict[CallName, float] = {}
        self.step = 0
        self.began = 0.0
        self.num_left = 0
        self.seconds = 0.0
        self.problem: str | None = None
        self.has_weights = False
        self.wakes_at = math.inf


class _Server:
    def __init__(self, index: int) -> None:
        self.index = index
        self.name = WorkerId(f"ffn-{index}")
        self.machine: FfnServer | None = None  # None: it is dead
        self.life = 0
        self.inbox: deque[FfnAnswer] = deque()  # answers on their way home
        self.is_sending = False
        self.port_in = 0.0
        self.wakes_at = math.inf


def play_step(
    pipeline: Pipeline,
    rules: FfnRules,
    *,
    of: int = 0,
    outages: Sequence[Outage] = (),
    spares: int = 0,
    rows: int = 1,
    batch_seconds: BatchSeconds | None = None,
    owners: Sequence[frozenset[Piece]] | None = None,
    wanted: Callable[[CallName], Wanted] | None = None,
    has_weights: bool = False,
) -> Played:
    """Play a step, after one in which everybody finds into step.

    `outages` count from when attention worker `of` begins. `spares`: further FFN workers, which nobody calls while its
    own is there. `rows` of a micro-batch. `batch_seconds`: by default the pipeline's, whatever is in a batch. `owners`
    and `wanted`: which pieces each FFN worker has and each call asks for, where that is not what the split says.
    """
    return _Player(pipeline, rules, of, outages, spares, rows, batch_seconds, owners, wanted, has_weights).run()


class _Player:
    def __init__(
        self,
        pipeline: Pipeline,
        rules: FfnRules,
        of: int,
        outages: Sequence[Outage],
        spares: int,
        rows: int,
        batch_seconds: BatchSeconds | None,
        owners: Sequence[frozenset[Piece]] | None,
        wanted: Callable[[CallName], Wanted] | None,
        has_weights: bool,
    ) -> None:
        self.pipeline, self.rules, self.of, self.outages = pipeline, rules, of, outages
        self.layers: list[LayerTimes] = [layer for layer in pipeline.layers for _ in range(layer.count)]
        self.batch_seconds = batch_seconds or self._pipelines_seconds
        parts = pipeline.parts
        self.owners = owners or [
            frozenset({Piece(index if parts > 1 else 0)}) for index in range(pipeline.ffn_workers + spares)
        ]
        asked: Wanted = tuple((Piece(part), rows) for part in range(parts))
        self.wanted = wanted or (lambda _call: asked)
        self.now = 0.0
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.attention = [_Attention(index, rules) for index in range(pipeline.attention_workers)]
        self.servers = [_Server(index) for index in range(len(self.owners))]
        self.home = [self._homes_of(index) for index in range(pipeline.attention_workers)]
        self.spine_out = self.spine_back = 0.0
        self.num_batches = self.num_computed_here = 0
        # Who is away when the step begins is away before it too, and then nobody finds into step.
        self.last_step = 1 if any(outage.start <= 0.0 for outage in outages) else 2
        for worker in self.attention:
            worker.has_weights = has_weights

    def run(self) -> Played:
        away = {outage.server for outage in self.outages if outage.start <= 0.0}
        for server in self.servers:
            if server.index not in away:
                self._start(server)
        for worker in self.attention:
            for index in self._callable_by(worker.index):
                self._introduce(worker, self.servers[index])
        for worker in self.attention:
            self._begin(worker)
        while self.heap and not self._is_over():
            self.now, _, happens = heapq.heappop(self.heap)
            happens()
        return Played(
            seconds=tuple(worker.seconds for worker in self.attention),
            problems=tuple(worker.problem for worker in self.attention),
            num_batches=self.num_batches,
            num_retries=sum(worker.client.counts.retries for worker in self.attention),
            num_computed_here=self.num_computed_here,
            has_loaded=tuple(worker.has_weights for worker in self.attention),
        )

    def _is_over(self) -> bool:
        return all(worker.step > self.last_step for worker in self.attention)

    def _at(self, time: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self.heap, (time, next(self.order), happens))

    def _pipelines_seconds(self, _server: int, requests: Sequence[FfnRequest]) -> float:
        return self.layers[requests[0].key.layer].ffn_seconds

    # -- who calls whom -----------------------------------------------------------------------------------------------

    def _homes_of(self, worker: int) -> list[int]:
        """The FFN workers of an attention worker, as the closed form deals them out."""
        pipeline = self.pipeline
        if pipeline.split != "replica":
            return list(range(len(self.servers)))
        if pipeline.ffn_workers >= pipeline.attention_workers:
            return list(range(worker * pipeline.replicas, (worker + 1) * pipeline.replicas))
        return [worker // pipeline.cohort_size]

    def _callable_by(self, worker: int) -> list[int]:
        """Its own FFN workers; the others only if it has none."""
        alive = [index for index in self.home[worker] if self.servers[index].machine is not None]
        return alive or [server.index for server in self.servers if server.machine is not None]

    def _start(self, server: _Server) -> None:
        server.life += 1
        server.machine = FfnServer(
            FfnServerConfig(
                num_layers=len(self.layers),
                pieces=self.owners[server.index],
                max_wait_seconds=self.rules.max_wait_seconds,
                idle_seconds=math.inf,
                max_rows=NO_LIMIT,
                max_waiting_rows=NO_LIMIT,
            )
        )

    def _introduce(self, worker: _Attention, server: _Server) -> None:
        if server.name not in worker.client.workers:
            self._tell_server(server, SessionUp(worker.client.config.session))
            self._tell(worker, FfnUp(server.name, self.owners[server.index], CREDIT))

    def _kill(self, server: _Server) -> None:
        if server.machine is None:
            return
        server.machine, server.is_sending, server.wakes_at = None, False, math.inf
        server.life += 1
        server.inbox.clear()
        self._at(self.now + self.rules.notice_seconds, partial(self._notice, server))

    def _notice(self, server: _Server) -> None:
        """Its attention workers hear of it. Those that have nobody else are given others first."""
        if server.machine is not None:
            return
        for worker in self.attention:
            if server.name in worker.client.workers:
                for index in self._callable_by(worker.index):
                    self._introduce(worker, self.servers[index])
                self._tell(worker, FfnDown(server.name))

    def _revive(self, server: _Server) -> None:
        self._start(server)
        for worker in self.attention:
            if server.index in self.home[worker.index] or not worker.client.workers:
                self._introduce(worker, server)

    # -- attention workers --------------------------------------------------------------------------------------------

    def _begin(self, worker: _Attention) -> None:
        worker.step += 1
        if worker.step > self.last_step:
            return
        worker.began, worker.num_left = self.now, self.pipeline.micro_batches
        if worker.step == self.last_step and worker.index == self.of:
            self.num_batches = 0
            self._schedule_outages()
        for micro_batch in range(self.pipeline.micro_batches):
            self._attend(worker, CallName(worker.step, 0, micro_batch))

    def _schedule_outages(self) -> None:
        for outage in self.outages:
            server = self.servers[outage.server]
            if outage.start > 0.0:
                self._at(self.now + outage.start, partial(self._kill, server))
            if outage.end < math.inf:
                self._at(self.now + max(0.0, outage.end), partial(self._revive, server))

    def _attend(self, worker: _Attention, call: CallName) -> None:
        worker.jobs.append((self.layers[call.layer].attention_seconds, partial(self._call, worker, call)))
        self._compute(worker)

    def _compute(self, worker: _Attention) -> None:
        """The next of what it has to compute itself, one after the other."""
        if worker.is_computing or not worker.jobs:
            return
        seconds, then = worker.jobs.popleft()
        worker.is_computing = True
        self._at(self.now + seconds, partial(self._computed, worker, then))

    def _computed(self, worker: _Attention, then: Callable[[], None]) -> None:
        worker.is_computing = False
        then()
        self._compute(worker)

    def _call(self, worker: _Attention, call: CallName) -> None:
        if call.step == worker.step:
            self._tell(worker, CallMade(call, self.wanted(call)))

    def _tell(self, worker: _Attention, event: FfnClientEvent) -> None:
        for command in worker.client.handle(event, self.now):
            match command:
                case SendRequest(target, request):
                    worker.outbox.append((int(target.removeprefix("ffn-")), request))
                    self._send_out(worker)
                case ComputeHere(call, pieces):
                    self._compute_here(worker, call, pieces)
                case CallDone(call):
                    self._done(worker, call)
                case CallFailed(_, reason):
                    self._end(worker, reason)
        due = worker.client.due_at
        if due is not None and due < worker.wakes_at:
            worker.wakes_at = due
            self._at(due, partial(self._wake, worker))

    def _wake(self, worker: _Attention) -> None:
        worker.wakes_at = math.inf
        if worker.client.due_at is not None:
            self._tell(worker, TimeCame())

    def _compute_here(self, worker: _Attention, call: CallName, pieces: Wanted) -> None:
        if call.step != worker.step:
            return
        if self.rules.local_seconds is None:
            self._end(worker, f"no FFN worker is left, and {self.rules.no_room}")
            return
        self.num_computed_here += 1
        share = sum(rows for _, rows in pieces) / sum(rows for _, rows in self.wanted(call))
        seconds = share * self.rules.local_seconds
        if not worker.has_weights:
            worker.has_weights = True
            seconds += self.rules.load_seconds
        worker.local[call] = worker.local.get(call, 0.0) + seconds

    def _done(self, worker: _Attention, call: CallName) -> None:
        """All of a call is there, but for what the worker has still to compute of it."""
        if call.step != worker.step:
            return
        seconds = worker.local.pop(call, None)
        if seconds is None:
            self._home(worker, call)
        else:
            worker.jobs.append((seconds, partial(self._home, worker, call)))
            self._compute(worker)

    def _home(self, worker: _Attention, call: CallName) -> None:
        if call.step != worker.step:
            return
        if call.layer + 1 < len(self.layers):
            self._attend(worker, CallName(call.step, call.layer + 1, call.micro_batch))
            return
        worker.num_left -= 1
        if not worker.num_left:
            self._end(worker, None)

    def _end(self, worker: _Attention, problem: str | None) -> None:
        """The step is over for it, well or not."""
        ended = self.now + (0.0 if problem is not None else self.pipeline.tail_seconds)
        worker.seconds, worker.problem = ended - worker.began, problem
        step, worker.jobs = worker.step, deque()
        worker.local.clear()
        if problem is not None:
            worker.step = self.last_step + 1
        self._tell(worker, StepOver(step))
        if problem is None:
            self._at(ended, partial(self._begin, worker))

    # -- wires --------------------------------------------------------------------------------------------------------

    def _send_out(self, worker: _Attention) -> None:
        if worker.is_sending or not worker.outbox:
            return
        target, request = worker.outbox.popleft()
        hop, parts, server = self.layers[request.key.layer].out, self.pipeline.parts, self.servers[target]
        worker.is_sending = True
        sent = self.now + hop.attention_port_seconds / parts
        self._at(sent, partial(self._sent, worker))
        server.port_in = max(server.port_in, self.now) + hop.ffn_port_seconds
        there = max(sent, server.port_in)
        if hop.shared_seconds:
            self.spine_out = max(self.spine_out, self.now) + hop.shared_seconds / parts
            there = max(there, self.spine_out)
        self._at(there + hop.latency_seconds, partial(self._came, server, server.life, request))

    def _sent(self, worker: _Attention) -> None:
        worker.is_sending = False
        self._send_out(worker)

    def _came(self, server: _Server, life: int, request: FfnRequest) -> None:
        if server.life == life:
            self._tell_server(server, RequestCame(request))

    def _send_back(self, server: _Server) -> None:
        if server.is_sending or not server.inbox:
            return
        answer = server.inbox.popleft()
        hop, parts = self.layers[answer.key.layer].back, self.pipeline.parts
        worker = self.attention[answer.key.session - 1]
        server.is_sending = True
        sent = self.now + hop.ffn_port_seconds
        self._at(sent, partial(self._sent_back, server, server.life))
        worker.port_in = max(worker.port_in, self.now) + hop.attention_port_seconds / parts
        there = max(sent, worker.port_in)
        if hop.shared_seconds:
            self.spine_back = max(self.spine_back, self.now) + hop.shared_seconds / parts
            there = max(there, self.spine_back)
        answered = FfnAnswered(server.name, answer)
        self._at(there + hop.latency_seconds, partial(self._tell, worker, answered))

    def _sent_back(self, server: _Server, life: int) -> None:
        if server.life == life:
            server.is_sending = False
            self._send_back(server)

    # -- FFN workers --------------------------------------------------------------------------------------------------

    def _tell_server(self, server: _Server, event: FfnServerEvent) -> None:
        if server.machine is None:
            return
        for command in server.machine.handle(event, self.now):
            match command:
                case RunBatch(number, _, requests):
                    self.num_batches += 1
                    ended = self.now + self.batch_seconds(server.index, requests)
                    self._at(ended, partial(self._batch_done, server, server.life, number))
                case SendAnswer(answer):
                    server.inbox.append(answer)
                    self._send_back(server)
        due = server.machine.due_at
        if due is not None and due < server.wakes_at:
            server.wakes_at = due
            self._at(due, partial(self._wake_server, server, server.life))

    def _batch_done(self, server: _Server, life: int, number: int) -> None:
        if server.life == life:
            self._tell_server(server, BatchDone(number))

    def _wake_server(self, server: _Server, life: int) -> None:
        if server.life == life:
            server.wakes_at = math.inf
            self._tell_server(server, TimeCame())
