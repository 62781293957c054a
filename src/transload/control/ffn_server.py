"""The FFN side: which requests are computed together, and when waiting for more is over.

Pure: the driver holds rows and weights and tells the time. Keeps nothing of a request but that it waits or runs, so a
worker that dies loses nothing. Requests of one layer form a batch when everybody who is expected has come, when the
first has waited long enough, or when it is large enough: one stalled attention worker delays the others once, by the
maximum wait, and is then not expected any more.
"""

from __future__ import annotations

import msgspec

from transload.control.ffn_messages import (
    BatchDone,
    BatchFailed,
    CallKey,
    FfnAnswer,
    FfnBusy,
    FfnError,
    FfnReply,
    FfnRequest,
    FfnServerCommand,
    FfnServerEvent,
    ForgetRequest,
    Piece,
    RequestCame,
    RunBatch,
    SendAnswer,
    SessionDown,
    SessionId,
    SessionUp,
    TimeCame,
)

Lane = tuple[SessionId, int]
"""A micro-batch of an attention worker: it has one call under way at a time."""


class FfnServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Times are seconds."""

    num_layers: int
    pieces: frozenset[Piece]
    """What this worker has weights of, in every layer."""
    max_wait_seconds: float = 200e-6
    """How long a request may wait for others of its layer while nothing else is computed."""
    idle_seconds: float = 0.02
    """A session that has not called for this long is not expected at the first layer."""
    max_rows: int = 4096
    """Rows that are computed together; one request may have more."""
    max_waiting_rows: int = 1 << 16
    """Beyond it requests are sent back."""


class _Waiting:
    """A request that is not under way yet."""

    __slots__ = ("arrived_at", "expected", "num_rows", "request")

    def __init__(self, request: FfnRequest, arrived_at: float, expected: frozenset[Lane]) -> None:
        self.request = request
        self.arrived_at = arrived_at
        self.expected = expected
        self.num_rows = _rows_of(request)


class FfnServer:
    """`handle(event, now)` -> commands, to be obeyed in order. `due_at`: when it wants a `TimeCame`, at the latest."""

    def __init__(self, config: FfnServerConfig) -> None:
        self.config = config
        self.num_requests = 0
        self.num_batches = 0
        self.num_rows = 0
        """Computed so far."""
        self.num_superseded = 0
        self.num_busy = 0
        self._last_seen: dict[SessionId, float] = {}  # of those that are up
        self._lanes: dict[Lane, CallKey] = {}  # what each lane has asked for last
        self._last_step: dict[SessionId, int] = {}
        self._companions: dict[Lane, frozenset[Lane]] = {}  # who was in its last batch
        self._waiting: dict[CallKey, _Waiting] = {}  # in the order they came
        self._running: RunBatch | None = None
        self._out: list[FfnServerCommand] = []

    @property
    def due_at(self) -> float | None:
        """None: only an event from outside can change anything."""
        if self._running is not None or not self._waiting:
            return None
        return min(waiting.arrived_at for waiting in self._waiting.values()) + self.config.max_wait_seconds

    @property
    def is_computing(self) -> bool:
        return self._running is not None

    def handle(self, event: FfnServerEvent, now: float) -> list[FfnServerCommand]:
        """Take in a fact. The commands are obeyed before the next one is given."""
        match event:
            case RequestCame(request):
                self._came(request, now)
            case BatchDone(number):
                for request in self._end_batch(number):
                    self._answer(FfnReply(request.key))
            case BatchFailed(number, reason):
                for request in self._end_batch(number):
                    self._answer(FfnError(request.key, reason))
            case SessionUp(session):
                self._last_seen[session] = now
            case SessionDown(session):
                self._session_down(session)
            case TimeCame():
                pass
        if self._running is None and self._waiting:
            self._start(now)
        out, self._out = self._out, []
        return out

    def check(self) -> None:
        """Assert what is always true between events."""
        assert all(key.session in self._last_seen for key in self._waiting), "a request of nobody waits"
        calls: dict[Lane, tuple[int, int]] = {}
        for key in self._waiting:
            call = calls.setdefault((key.session, key.micro_batch), (key.step, key.layer))
            assert call == (key.step, key.layer), "a lane waits for two calls"

    # -- requests -----------------------------------------------------------------------------------------------------

    def _came(self, request: FfnRequest, now: float) -> None:
        key = request.key
        if key.session not in self._last_seen:
            self._out.append(ForgetRequest(key))
            return
        self._last_seen[key.session] = now
        problem = self._problem(request)
        if problem is not None:
            self._answer(FfnError(key, problem))
            return
        self._supersede(request)
        if self._waiting and self._waiting_rows() + _rows_of(request) > self.config.max_waiting_rows:
            self.num_busy += 1
            self._answer(FfnBusy(key))
            return
        self._waiting[key] = _Waiting(request, now, self._expected_with(key, now))
        self._lanes[key.session, key.micro_batch] = key
        self._last_step[key.session] = key.step

    def _waiting_rows(self) -> int:
        return sum([waiting.num_rows for waiting in self._waiting.values()])

    def _problem(self, request: FfnRequest) -> str | None:
        """Why it can never be computed here."""
        if not 0 <= request.key.layer < self.config.num_layers:
            return f"layer {request.key.layer}: there are layers 0..{self.config.num_layers - 1}"
        ours = self.config.pieces
        foreign = [piece for piece, _ in request.pieces if piece not in ours]
        if foreign:
            return f"pieces {sorted(foreign)[:8]} are not here"
        if min([rows for _, rows in request.pieces], default=0) < 1:
            return "a request without rows"
        return None

    def _supersede(self, request: FfnRequest) -> None:
        """A lane asks for the same pieces anew, or for another layer: what it wanted before is not wanted any more."""
        key = request.key
        for old in list(self._waiting.values()):
            of = old.request.key
            if (of.session, of.micro_batch) != (key.session, key.micro_batch):
                continue
            is_same_call = (of.step, of.layer) == (key.step, key.layer)
            if is_same_call and old.request.pieces != request.pieces:
                continue  # another part of one call
            del self._waiting[of]
            self.num_superseded += 1
            self._answer(FfnBusy(of))

    def _expected_with(self, key: CallKey, now: float) -> frozenset[Lane]:
        """Who will come with a request of this layer soon, if all goes on as before."""
        if key.layer > 0:
            return self._companions.get((key.session, key.micro_batch), frozenset())
        return frozenset(
            (session, micro_batch)
            for (session, micro_batch), last in self._lanes.items()
            if session != key.session
            and micro_batch == key.micro_batch
            and last.layer >= self.config.num_layers - 2  # at the end of a step; the last layer may have no rows
            and last.step >= self._last_step[session] - 1  # it may have fewer micro-batches now
            and now - self._last_seen[session] < self.config.idle_seconds
        )

    def _answer(self, answer: FfnAnswer) -> None:
        is_up = answer.key.session in self._last_seen
        self._out.append(SendAnswer(answer) if is_up else ForgetRequest(answer.key))

    # -- batches ------------------------------------------------------------------------------------------------------

    def _start(self, now: float) -> None:
        """Start the oldest batch that need not wait any longer, with all others of its layer that need not either.

        Each micro-batch is waited for by itself: one that waited for another of the same worker's would come back with
        it, and never again be away while the other is at attention."""
        if len(self._waiting) == 1:
            only = list(self._waiting.values())
            if self._is_ripe(only, now):
                self._run(only[0].request.key.layer, only)
            return
        groups: dict[tuple[int, int], list[_Waiting]] = {}
        for waiting in self._waiting.values():
            groups.setdefault((waiting.request.key.layer, waiting.request.key.micro_batch), []).append(waiting)
        ripe = {key: group for key, group in groups.items() if self._is_ripe(group, now)}
        if ripe:
            layer, _ = next(iter(ripe))
            self._run(layer, [waiting for key, group in ripe.items() if key[0] == layer for waiting in group])

    def _is_ripe(self, group: list[_Waiting], now: float) -> bool:
        if now >= group[0].arrived_at + self.config.max_wait_seconds:  # as `due_at` says it, to the bit
            return True
        if sum([waiting.num_rows for waiting in group]) >= self.config.max_rows:
            return True
        if not any(waiting.expected for waiting in group):
            return True
        present = {(waiting.request.key.session, waiting.request.key.micro_batch) for waiting in group}
        return all(lane in present or lane[0] not in self._last_seen for waiting in group for lane in waiting.expected)

    def _run(self, layer: int, group: list[_Waiting]) -> None:
        taken: list[_Waiting] = []
        num_rows = 0
        for waiting in group:
            if taken and num_rows + waiting.num_rows > self.config.max_rows:
                break
            taken.append(waiting)
            num_rows += waiting.num_rows
        lanes = frozenset([(w.request.key.session, w.request.key.micro_batch) for w in taken])
        for lane in lanes:
            # Of the same micro-batch only: waiting for others as well would end the ping-pong for good.
            self._companions[lane] = frozenset([o for o in lanes if o[0] != lane[0] and o[1] == lane[1]])
        for waiting in taken:
            del self._waiting[waiting.request.key]
        self.num_batches += 1
        self.num_requests += len(taken)
        self.num_rows += num_rows
        self._running = RunBatch(self.num_batches, layer, tuple([waiting.request for waiting in taken]))
        self._out.append(self._running)

    def _end_batch(self, number: int) -> tuple[FfnRequest, ...]:
        batch, self._running = self._running, None
        assert batch is not None, "no batch is under way"
        assert batch.number == number, "another batch is under way"
        return batch.requests

    # -- sessions -----------------------------------------------------------------------------------------------------

    def _session_down(self, session: SessionId) -> None:
        self._last_seen.pop(session, None)
        self._last_step.pop(session, None)
        for key in [key for key in self._waiting if key.session == session]:
            del self._waiting[key]
            self._out.append(ForgetRequest(key))
        for lane in [lane for lane in self._lanes if lane[0] == session]:
            del self._lanes[lane]
        for lane in [lane for lane in self._companions if lane[0] == session]:
            del self._companions[lane]


def _rows_of(request: FfnRequest) -> int:
    return sum([rows for _, rows in request.pieces])
