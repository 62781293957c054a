"""Attention and FFN workers in virtual time, with everything between them that can go wrong, from one seed.

Drives the shipped `FfnClient` and `FfnServer` and computes real (integer) feed-forwards, so that a wrong, missing or
doubled row is a wrong number. After every event it checks what must always hold:

* a reply is taken for the call that asked for it, and its rows are those that were asked for;
* every routed row comes into a call's result exactly once;
* a request waits at an idle FFN worker for others no longer than the maximum wait;
* a call ends by its deadline: with its result, computed here, or as a typed failure.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, deque
from collections.abc import Callable
from random import Random

import msgspec

from transload.control.ffn_client import FfnClient, FfnClientConfig
from transload.control.ffn_messages import (
    BatchDone,
    BatchFailed,
    CallDone,
    CallFailed,
    CallKey,
    CallMade,
    CallName,
    ComputeHere,
    DropLink,
    DropReply,
    Fallback,
    FfnAnswer,
    FfnAnswered,
    FfnClientCommand,
    FfnClientEvent,
    FfnDown,
    FfnReply,
    FfnRequest,
    FfnServerCommand,
    FfnServerEvent,
    FfnUp,
    ForgetRequest,
    Piece,
    RequestCame,
    RunBatch,
    SendAnswer,
    SendRequest,
    SessionDown,
    SessionId,
    SessionUp,
    StepOver,
    TakeReply,
    TimeCame,
)
from transload.control.ffn_server import FfnServer, FfnServerConfig
from transload.control.messages import WorkerId

Rows = dict[Piece, tuple[int, ...]]
PRIME = 2**61 - 1
SLACK = 1e-9
FOREVER = 1e5


def feed_forward(layer: int, piece: int, value: int) -> int:
    """A piece of a layer's feed-forward of one row: wrong inputs cannot give the right output."""
    return (value * (2 * piece + 3) + layer * 7919 + 13 * piece + 1) % PRIME


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a seed decided."""

    attention_workers: int
    ffn_workers: int
    num_layers: int
    micro_batches: int
    num_steps: int
    pieces: int
    """1: whole layers; more: column parts or experts."""
    per_row: int
    """Pieces that a row goes to."""
    owners: tuple[frozenset[Piece], ...]
    fallback: Fallback
    timeout_seconds: float
    deadline_seconds: float
    max_wait_seconds: float
    max_waiting_rows: int
    credit: int
    rates: dict[str, float]
    attention_seconds: float
    ffn_seconds: float
    wire_seconds: float
    disturbances: tuple[tuple[float, str, int], ...]
    """(time, what, whom): kill-ffn, kill-attention, stall-attention, stall-ffn."""


def draw_plan(seed: int) -> Plan:
    """The whole schedule of a seed, but for what the wires do to single messages."""
    random = Random(seed)
    num_ffn, kind = random.randint(1, 3), random.choice(("whole", "column", "experts"))
    pieces = {"whole": 1, "column": num_ffn, "experts": random.randint(num_ffn, 6)}[kind]
    owners: list[set[Piece]] = [set() for _ in range(num_ffn)]
    for piece in range(pieces):
        homes = range(num_ffn) if kind == "whole" else {piece % num_ffn}
        for home in homes:
            owners[home].add(Piece(piece))
        if kind == "experts" and random.random() < 0.4:
            owners[random.randrange(num_ffn)].add(Piece(piece))
    timeout = random.choice((0.01, 0.05, 0.2))
    horizon = random.choice((0.02, 0.1, 0.5))
    attention = random.randint(1, 3)
    disturbances = []
    for _ in range(random.choice((0, 1, 1, 2, 4))):
        what = random.choice(("kill-ffn", "kill-ffn", "kill-attention", "stall-attention", "stall-ffn"))
        whom = random.randrange(num_ffn if what.endswith("ffn") else attention)
        disturbances.append((random.random() * horizon, what, whom))
    return Plan(
        attention_workers=attention,
        ffn_workers=num_ffn,
        num_layers=random.randint(1, 4),
        micro_batches=random.randint(1, 4),
        num_steps=random.randint(1, 4),
        pieces=pieces,
        per_row=pieces if kind == "column" else min(pieces, random.randint(1, 3)),
        owners=tuple(frozenset(own) for own in owners),
        fallback=random.choice(("local", "error")),
        timeout_seconds=timeout,
        deadline_seconds=timeout * random.choice((2, 8, 20)),
        max_wait_seconds=random.choice((0.0, 200e-6, 0.005)),
        max_waiting_rows=random.choice((1, 8, 1 << 16)),
        credit=random.choice((1, 2, 8)),
        rates={name: random.choice((0.0, 0.0, 0.02, 0.15)) for name in ("drop", "repeat", "delay", "fail")},
        attention_seconds=random.choice((20e-6, 1e-3)),
        ffn_seconds=random.choice((20e-6, 1e-3, 0.02)),
        wire_seconds=random.choice((2e-6, 100e-6, 0.003)),
        disturbances=tuple(sorted(disturbances)),
    )


class _Call:
    """A micro-batch that waits for a feed-forward."""

    def __init__(self, name: CallName, wanted: Rows, deadline: float) -> None:
        self.name, self.wanted, self.deadline = name, wanted, deadline
        self.result: Rows = {}


class Attention:
    """An attention worker: every micro-batch through every layer, step after step. A failed step is done again."""

    def __init__(self, world: World, index: int) -> None:
        self.world, self.index = world, index
        self.random = Random(world.seed * 1000 + index)
        self.lives = 0
        self.session = SessionId(0)
        self.steps_done = self.step_number = 0
        self.num_failures = 0
        self.num_dropped_links = 0
        self.stalled_until = 0.0
        self.sent: dict[CallKey, _Call] = {}
        self.start_life()

    def start_life(self) -> None:
        """A process of its own each time: another session, nothing remembered but which steps the front end has."""
        self.lives += 1
        self.session = SessionId(self.index * 1000 + self.lives)
        plan = self.world.plan
        self.client = self.world.make_client(
            FfnClientConfig(
                session=self.session,
                fallback=plan.fallback,
                timeout_seconds=plan.timeout_seconds,
                deadline_seconds=plan.deadline_seconds,
            )
        )
        self.calls: dict[CallName, _Call] = {}
        self.sent = {}
        self.unfinished: set[int] = set()
        self.is_alive = True

    @property
    def at_work(self) -> str:
        """What it is at, for the count of what faults hit."""
        return "with calls open" if self.calls else "idle" if self.is_done else "between calls"

    @property
    def is_done(self) -> bool:
        return self.steps_done == self.world.plan.num_steps

    def start_step(self, session: SessionId) -> None:
        if session != self.session or not self.is_alive or self.is_done:
            return
        if self.world.now < self.stalled_until:
            self.world.at(self.stalled_until, lambda: self.start_step(session))
            return
        self.step_number += 1
        plan = self.world.plan
        self.rows = [
            [self.random.randrange(PRIME) for _ in range(self.random.choice((0, 1, 3)))]
            for _ in range(plan.micro_batches)
        ]
        self.expected = [[self._through_all(value) for value in rows] for rows in self.rows]
        self.unfinished = set(range(plan.micro_batches))
        for micro_batch in range(plan.micro_batches):
            self._attend(micro_batch, 0)

    def _routes(self, layer: int, value: int) -> list[Piece]:
        plan = self.world.plan
        if plan.per_row == plan.pieces:
            return [Piece(piece) for piece in range(plan.pieces)]
        first = (value + layer) % plan.pieces
        return [Piece((first + offset) % plan.pieces) for offset in range(plan.per_row)]

    def _through_all(self, value: int) -> int:
        for layer in range(self.world.plan.num_layers):
            value = sum(feed_forward(layer, piece, value) for piece in self._routes(layer, value)) % PRIME
        return value

    def _attend(self, micro_batch: int, layer: int) -> None:
        session, step = self.session, self.step_number
        seconds = self.world.plan.attention_seconds * (1 + self.random.random())
        at = max(self.world.now, self.stalled_until) + seconds

        def call() -> None:
            if session == self.session and step == self.step_number and self.is_alive and self.unfinished:
                if self.world.now < self.stalled_until:
                    self.world.at(self.stalled_until, call)
                    return
                self._call(micro_batch, layer)

        self.world.at(at, call)

    def _call(self, micro_batch: int, layer: int) -> None:
        wanted: dict[Piece, list[int]] = {}
        for value in self.rows[micro_batch]:
            for piece in self._routes(layer, value):
                wanted.setdefault(piece, []).append(value)
        rows = {piece: tuple(values) for piece, values in sorted(wanted.items())}
        name = CallName(self.step_number, layer, micro_batch)
        deadline = self.world.now + self.world.plan.deadline_seconds
        self.calls[name] = _Call(name, rows, deadline)
        self.give(CallMade(name, tuple((piece, len(values)) for piece, values in rows.items())))

    # -- the machine --------------------------------------------------------------------------------------------------

    def give(self, event: FfnClientEvent, rows: Rows | None = None) -> None:
        commands = self.client.handle(event, self.world.now)
        self.client.check()
        self.world.told(f"attention-{self.index}", event, commands)
        for command in commands:
            self._obey(command, rows)
        self._check_deadlines()
        self._set_timer()

    def _set_timer(self) -> None:
        due, session = self.client.due_at, self.session
        if due is not None:
            self.world.at(max(due, self.world.now), lambda: self._time(session, due))

    def _time(self, session: SessionId, due: float) -> None:
        if session == self.session and self.is_alive and self.client.due_at is not None and self.client.due_at <= due:
            self.give(TimeCame())

    def _check_deadlines(self) -> None:
        for call in self.calls.values():
            assert self.world.now <= call.deadline + SLACK, f"{call.name} is past its deadline"

    def _obey(self, command: FfnClientCommand, rows: Rows | None) -> None:
        match command:
            case SendRequest(worker, request):
                call = self.calls[CallName(request.key.step, request.key.layer, request.key.micro_batch)]
                self.sent[request.key] = call
                for piece, count in request.pieces:
                    assert len(call.wanted[piece]) == count, "asked for another number of rows than there are"
                payload = {piece: call.wanted[piece] for piece, _ in request.pieces}
                self.world.send_request(self, worker, request, payload)
            case TakeReply(request, pieces):
                assert rows is not None, "a reply is taken that did not come"
                self._take(self.sent[request.key], pieces, rows)
            case DropReply():
                assert rows is not None, "a reply is dropped that did not come"
            case ComputeHere(name, pieces, _):
                assert self.world.plan.fallback == "local"
                call = self.calls[name]
                here = {
                    piece: tuple(feed_forward(name.layer, piece, value) for value in call.wanted[piece])
                    for piece, _ in pieces
                }
                self._take(call, tuple(here), here)
            case CallDone(name):
                self._done(name)
            case CallFailed(name):
                self._failed(name)
            case DropLink(worker):
                self.num_dropped_links += 1
                self.world.dial_again(self, worker)

    def _take(self, call: _Call, pieces: tuple[Piece, ...], rows: Rows) -> None:
        assert self.calls.get(call.name) is call, f"{call.name} is over, and its rows are taken"
        for piece in pieces:
            assert piece not in call.result, f"{call.name}: piece {piece} is taken twice"
            right = tuple(feed_forward(call.name.layer, piece, value) for value in call.wanted[piece])
            assert rows[piece] == right, f"{call.name}: rows of another call"
            call.result[piece] = rows[piece]

    def _done(self, name: CallName) -> None:
        call = self.calls.pop(name)
        assert call.result.keys() == call.wanted.keys(), f"{name} is done and pieces of it are missing"
        queues = {piece: list(values) for piece, values in call.result.items()}
        before = self.rows[name.micro_batch]
        self.rows[name.micro_batch] = [
            sum(queues[piece].pop(0) for piece in self._routes(name.layer, value)) % PRIME for value in before
        ]
        assert not any(queues.values()), "a row was computed and nobody asked for it"
        if not self.unfinished:
            return  # the step has failed
        if name.layer + 1 < self.world.plan.num_layers:
            self._attend(name.micro_batch, name.layer + 1)
            return
        assert self.rows[name.micro_batch] == self.expected[name.micro_batch], "another result than without a split"
        self.unfinished.discard(name.micro_batch)
        if not self.unfinished:
            self.steps_done += 1
            self._next_step()

    def _failed(self, name: CallName) -> None:
        """The step's requests go back to the front end, which has them computed anew."""
        assert self.world.plan.fallback == "error"
        del self.calls[name]
        if not self.unfinished:
            return  # another call of the step has failed just now
        self.num_failures += 1
        self.unfinished.clear()
        if self.num_failures > 3:
            self.steps_done = self.world.plan.num_steps  # a typed error ends them
        self._next_step()

    def _next_step(self) -> None:
        step, session = self.step_number, self.session
        self.world.at(self.world.now, lambda: self._step_over(session, step))

    def _step_over(self, session: SessionId, step: int) -> None:
        if session == self.session and self.is_alive:
            self.calls.clear()
            self.give(StepOver(step))
            self.start_step(session)


class Ffn:
    """An FFN worker: a machine, its rows, and when it was computing."""

    def __init__(self, world: World, index: int) -> None:
        self.world, self.index = world, index
        self.name = WorkerId(f"ffn-{index}")
        self.lives = 0
        self.stalled_until = 0.0
        self.start_life()

    def start_life(self) -> None:
        self.lives += 1
        plan = self.world.plan
        self.server = self.world.make_server(
            FfnServerConfig(
                num_layers=plan.num_layers,
                pieces=plan.owners[self.index],
                max_wait_seconds=plan.max_wait_seconds,
                max_waiting_rows=plan.max_waiting_rows,
            )
        )
        self.rows: dict[CallKey, Rows] = {}
        self.came_at: dict[CallKey, list[tuple[float, float]]] = {}
        """Of each copy that is not answered: time, and how long this worker had been computing by then."""
        self.busy_seconds = 0.0
        self.busy_since: float | None = None
        self.is_alive = True

    @property
    def at_work(self) -> str:
        """What it is at, for the count of what faults hit."""
        return "idle" if self.busy_since is None else "in a batch"

    def give(self, event: FfnServerEvent) -> None:
        commands = self.server.handle(event, self.world.now)
        self.server.check()
        self.world.told(str(self.name), event, commands)
        for command in commands:
            self._obey(command)
        due, life = self.server.due_at, self.lives
        if due is not None:
            self.world.at(max(due, self.world.now), lambda: self._time(life, due))

    def _time(self, life: int, due: float) -> None:
        if life == self.lives and self.is_alive and self.server.due_at is not None and self.server.due_at <= due:
            self.give(TimeCame())

    def request_came(self, request: FfnRequest, rows: Rows) -> None:
        self.rows[request.key] = rows
        self.came_at.setdefault(request.key, []).append((self.world.now, self._busy_until_now()))
        self.give(RequestCame(request))

    def _busy_until_now(self) -> float:
        return self.busy_seconds + (0.0 if self.busy_since is None else self.world.now - self.busy_since)

    def _obey(self, command: FfnServerCommand) -> None:
        match command:
            case RunBatch(number, layer, requests):
                self._run(number, layer, requests)
            case SendAnswer(answer):
                self._answer(answer)
            case ForgetRequest(key):
                self._forget(key)

    def _run(self, number: int, layer: int, requests: tuple[FfnRequest, ...]) -> None:
        assert self.busy_since is None, "two batches at once"
        self.busy_since = self.world.now
        for request in requests:
            assert request.key.layer == layer, "a batch of two layers"
            assert request.key in self.rows, "a batch with rows that are not there"
            came, busy = self.came_at[request.key][-1]
            idle = self.world.now - came - (self.busy_seconds - busy)
            limit = self.world.plan.max_wait_seconds
            assert idle <= limit + SLACK, f"{request.key} waited {idle:g} s at an idle worker, at most {limit:g}"
        life = self.lives
        fails = self.world.happens("fail")
        done: FfnServerEvent = BatchFailed(number, "out of luck") if fails else BatchDone(number)
        seconds = self.world.plan.ffn_seconds * (0.5 + self.world.random.random())
        self.world.at(max(self.world.now, self.stalled_until) + seconds, lambda: self._end(life, done))

    def _end(self, life: int, done: FfnServerEvent) -> None:
        if life != self.lives or not self.is_alive:
            return
        if self.world.now < self.stalled_until:
            self.world.at(self.stalled_until, lambda: self._end(life, done))
            return
        assert self.busy_since is not None
        self.busy_seconds += self.world.now - self.busy_since
        self.busy_since = None
        self.give(done)

    def _answer(self, answer: FfnAnswer) -> None:
        key = answer.key
        rows: Rows | None = None
        if isinstance(answer, FfnReply):
            rows = {
                piece: tuple(feed_forward(key.layer, piece, value) for value in values)
                for piece, values in self.rows[key].items()
            }
        self._forget(key)
        self.world.send_answer(self, answer, rows)

    def _forget(self, key: CallKey) -> None:
        """One copy of a request is answered. Rows stay until none is left."""
        copies = self.came_at.get(key)
        if copies:
            copies.pop(0)
        if not copies:
            self.rows.pop(key, None)
            self.came_at.pop(key, None)


class World:
    """Everybody, the wires between them, and the clock."""

    def __init__(
        self,
        seed: int,
        make_client: Callable[[FfnClientConfig], FfnClient] = FfnClient,
        make_server: Callable[[FfnServerConfig], FfnServer] = FfnServer,
    ) -> None:
        self.seed, self.plan = seed, draw_plan(seed)
        self.random = Random(seed ^ 0x5EED)
        self.make_client, self.make_server = make_client, make_server
        self.now = 0.0
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.log: deque[tuple[float, str, object, object]] = deque(maxlen=200)
        """(when, who, event, commands)"""
        self.num_events = 0
        self.struck: Counter[str] = Counter()
        """How often each fault has hit what."""
        self.ffn = [Ffn(self, index) for index in range(self.plan.ffn_workers)]
        self.attention = [Attention(self, index) for index in range(self.plan.attention_workers)]

    def run(self) -> World:
        """Play it to the end. Raises AssertionError, with the story, for whatever must not happen."""
        try:
            for worker in self.attention:
                self._join(worker)
            for at, what, whom in self.plan.disturbances:
                self.at(at, self._disturbance(what, whom))
            while self.heap:
                self.now, _, happens = heapq.heappop(self.heap)
                self.num_events += 1
                assert self.num_events < FOREVER, "it does not end"
                happens()
            for worker in self.attention:
                assert worker.is_done, f"attention-{worker.index} has stopped in step {worker.step_number}"
                assert not worker.calls
                assert worker.client.num_open == 0 or not worker.is_alive, "credit is never given back"
        except AssertionError as error:
            last = [*self.log][-40:]
            story = "\n".join([f"{now:.6f} {who}: {event} -> {commands}" for now, who, event, commands in last])
            raise AssertionError(f"seed {self.seed} at {self.now:.6f} s: {error}\n{self.plan}\n{story}") from error
        return self

    def at(self, time: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self.heap, (time, next(self.order), happens))

    def told(self, who: str, event: object, commands: object) -> None:
        self.log.append((self.now, who, event, commands))

    def happens(self, fault: str) -> bool:
        if self.random.random() >= self.plan.rates[fault]:
            return False
        self.struck["batches: fail" if fault == "fail" else f"messages: {fault}"] += 1
        return True

    # -- wires --------------------------------------------------------------------------------------------------------

    def _delays(self) -> list[float]:
        """When a message arrives: never, once or twice, overtaking others or not."""
        if self.happens("drop"):
            return []
        delays = [self.plan.wire_seconds]
        if self.happens("repeat"):
            delays.append(self.plan.wire_seconds * (1 + 20 * self.random.random()))
        if self.happens("delay"):
            delays = [delay + self.plan.timeout_seconds * 3 * self.random.random() for delay in delays]
        return delays

    def send_request(self, worker: Attention, target: WorkerId, request: FfnRequest, rows: Rows) -> None:
        ffn = self.ffn[int(target.removeprefix("ffn-"))]
        life = ffn.lives

        def arrive() -> None:
            if ffn.is_alive and ffn.lives == life:
                ffn.request_came(request, rows)

        for delay in self._delays():
            self.at(self.now + delay, arrive)

    def send_answer(self, ffn: Ffn, answer: FfnAnswer, rows: Rows | None) -> None:
        session = answer.key.session
        worker = next((each for each in self.attention if each.session == session), None)
        if worker is None:
            return

        def arrive() -> None:
            # An answer of an earlier life of the FFN worker may still come: it is one to nothing that is open.
            if worker.session == session and worker.is_alive:
                worker.give(FfnAnswered(ffn.name, answer), rows if isinstance(answer, FfnReply) else None)

        for delay in self._delays():
            self.at(self.now + delay, arrive)

    # -- coming and going ---------------------------------------------------------------------------------------------

    def _join(self, worker: Attention) -> None:
        for ffn in self.ffn:
            if ffn.is_alive:
                ffn.give(SessionUp(worker.session))
                worker.give(FfnUp(ffn.name, self.plan.owners[ffn.index], self.plan.credit))
        session = worker.session
        self.at(self.now, lambda: worker.start_step(session))

    def dial_again(self, worker: Attention, target: WorkerId) -> None:
        """A link is ended and made anew, if there is somebody at both ends by then."""
        ffn, session = self.ffn[int(target.removeprefix("ffn-"))], worker.session
        life = ffn.lives

        def hang_up() -> None:
            if ffn.is_alive and ffn.lives == life:
                ffn.give(SessionDown(session))
                self.at(self.now + self.plan.wire_seconds, answer)

        def answer() -> None:
            if ffn.is_alive and ffn.lives == life and worker.is_alive and worker.session == session:
                ffn.give(SessionUp(session))
                worker.give(FfnUp(ffn.name, self.plan.owners[ffn.index], self.plan.credit))

        self.at(self.now + self.plan.wire_seconds, hang_up)

    def _disturbance(self, what: str, whom: int) -> Callable[[], None]:
        worker = self.ffn[whom] if what.endswith("ffn") else self.attention[whom]
        happens: Callable[[], None] = {
            "kill-ffn": lambda: self._kill_ffn(self.ffn[whom]),
            "kill-attention": lambda: self._kill_attention(self.attention[whom]),
            "stall-attention": lambda: self._stall(self.attention[whom]),
            "stall-ffn": lambda: self._stall(self.ffn[whom]),
        }[what]

        def disturb() -> None:
            self.struck[f"{what}: {worker.at_work if worker.is_alive else 'of nobody, it was down'}"] += 1
            happens()

        return disturb

    def _stall(self, worker: Attention | Ffn) -> None:
        worker.stalled_until = self.now + self.random.choice((0.01, 0.1, 1.0))

    def _kill_ffn(self, ffn: Ffn) -> None:
        if not ffn.is_alive:
            return
        ffn.is_alive = False
        noticed = self.now + self.random.choice((0.0, 1e-4, 0.02))
        self.at(noticed, lambda: self._tell_all(FfnDown(ffn.name)))
        if self.random.random() < 0.6:
            self.at(noticed + self.random.random() * 0.3, lambda: self._revive(ffn))

    def _revive(self, ffn: Ffn) -> None:
        ffn.start_life()
        for worker in self.attention:
            if worker.is_alive:
                ffn.give(SessionUp(worker.session))
        self._tell_all(FfnUp(ffn.name, self.plan.owners[ffn.index], self.plan.credit))

    def _tell_all(self, event: FfnClientEvent) -> None:
        for worker in self.attention:
            if worker.is_alive:
                worker.give(event)

    def _kill_attention(self, worker: Attention) -> None:
        if not worker.is_alive:
            return
        worker.is_alive = False
        gone = worker.session
        self.at(self.now + self.random.choice((0.0, 0.001, 0.02)), lambda: self._session_down(gone))
        self.at(self.now + 0.05, lambda: self._restart_attention(worker))

    def _session_down(self, session: SessionId) -> None:
        for ffn in self.ffn:
            if ffn.is_alive:
                ffn.give(SessionDown(session))

    def _restart_attention(self, worker: Attention) -> None:
        worker.start_life()
        self._join(worker)
