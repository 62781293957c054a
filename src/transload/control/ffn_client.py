"""The attention side of feed-forwards that are computed elsewhere: whom to ask, how long to wait, what to do then.

Pure: the driver carries rows and tells the time. Never changes a result: whoever answers a piece first is taken, and
every later answer is dropped, because all of them are the same function of the same rows.

    CallMade -> SendRequest to an owner of each piece -> TakeReply ... -> CallDone
                late: to another owner as well; owner gone or busy: to another owner
                no owner, or no answer in time: ComputeHere (fallback "local") or CallFailed
                no answer for as long as a call may take: DropLink, because what was lost would hold credit for ever
"""

from __future__ import annotations

import msgspec

from transload.control.ffn_messages import (
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
    FfnBusy,
    FfnClientCommand,
    FfnClientEvent,
    FfnDown,
    FfnError,
    FfnReply,
    FfnRequest,
    FfnUp,
    Piece,
    SendRequest,
    SessionId,
    StepOver,
    TakeReply,
    TimeCame,
    Wanted,
)
from transload.control.messages import WorkerId

LOST_AFTER = 2.0
"""How many deadlines after it was sent a request is taken for lost."""
MAX_PATIENCE = 8.0
"""How many times its first timeout an attempt may wait after several that nobody answered."""


class FfnClientConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Times are seconds."""

    session: SessionId
    fallback: Fallback = "local"
    timeout_seconds: float = 0.5
    """After this long without an answer another owner is asked as well."""
    deadline_seconds: float = 10.0
    """After this long a call is computed here, or fails."""


class FfnCounts(msgspec.Struct):
    """What happened so far."""

    calls: int = 0
    requests: int = 0
    retries: int = 0
    """Requests that were sent because an earlier one of theirs was not answered in time, or not at all."""
    late: int = 0
    """Answers that came after their time and were still wanted."""
    dropped: int = 0
    """Answers that nobody waited for: the call was answered by another, or is over."""
    unknown: int = 0
    """Answers to nothing that this worker was ever asked, or that it has answered before."""
    busy: int = 0
    errors: int = 0
    lost_workers: int = 0
    computed_here: int = 0
    failed: int = 0


class _Owner:
    """A worker that can be called."""

    __slots__ = ("busy_until", "credit", "name", "num_rows", "open", "pieces", "suspect_until")

    def __init__(self, name: WorkerId, pieces: frozenset[Piece], credit: int) -> None:
        self.name = name
        self.pieces = pieces
        self.credit = credit
        self.open: dict[int, _Attempt] = {}  # by sequence: requests it has not answered, each takes one of its credit
        self.num_rows = 0  # of them
        self.suspect_until = 0.0  # it was late: others first
        self.busy_until = 0.0  # it said so: nothing before

    @property
    def oldest(self) -> _Attempt | None:
        return next(iter(self.open.values()), None)


class _Attempt:
    """A request that is under way."""

    __slots__ = ("call", "due_at", "is_late", "lost_at", "num_rows", "owner", "request")

    def __init__(self, call: _Call, owner: _Owner, request: FfnRequest, due_at: float, lost_at: float) -> None:
        self.call = call
        self.owner = owner
        self.request = request
        self.num_rows = sum([rows for _, rows in request.pieces])
        self.due_at = due_at
        self.lost_at = lost_at  # then it, or its answer, is taken for lost
        self.is_late = False


class _Call:
    """A call whose pieces are not all there."""

    __slots__ = ("attempts", "give_up_at", "missing", "name", "num_timeouts", "refused_by", "unsent")

    def __init__(self, made: CallMade, give_up_at: float) -> None:
        self.name = made.call
        self.missing: dict[Piece, int] = dict(made.pieces)  # piece -> rows
        self.unsent: set[Piece] = set(self.missing)  # that nobody is asked for now, or nobody in time
        self.attempts: dict[int, _Attempt] = {}
        self.refused_by: set[WorkerId] = set()  # they failed to compute it
        self.num_timeouts = 0
        self.give_up_at = give_up_at


class FfnClient:
    """`handle(event, now)` -> commands, to be obeyed in order. `due_at`: when it wants a `TimeCame`, at the latest."""

    def __init__(self, config: FfnClientConfig) -> None:
        self.config = config
        self.counts = FfnCounts()
        self._owners: dict[WorkerId, _Owner] = {}
        self._calls: dict[CallName, _Call] = {}
        self._sequence = 0
        self._now = 0.0
        self._out: list[FfnClientCommand] = []

    @property
    def due_at(self) -> float | None:
        """None: only an event from outside can change anything."""
        due = [attempt.due_at for call in self._calls.values() for attempt in call.attempts.values()]
        for call in self._calls.values():
            due.append(call.give_up_at)
            if call.unsent:
                due += [owner.busy_until for owner in self._owners.values() if owner.busy_until > self._now]
        due += [oldest.lost_at for owner in self._owners.values() if (oldest := owner.oldest) is not None]
        return min(due, default=None)

    @property
    def workers(self) -> tuple[WorkerId, ...]:
        """Who can be called now."""
        return tuple(self._owners)

    @property
    def num_open(self) -> int:
        """Requests that hold credit."""
        return sum(len(owner.open) for owner in self._owners.values())

    @property
    def owned(self) -> list[frozenset[Piece]]:
        """What each of them owns."""
        return [owner.pieces for owner in self._owners.values()]

    def handle(self, event: FfnClientEvent, now: float) -> list[FfnClientCommand]:
        """Take in a fact. The commands are obeyed before the next one is given."""
        self._now = now
        match event:
            case FfnAnswered(worker, answer):
                self._answered(worker, answer)
            case CallMade():
                self._made(event)
            case TimeCame():
                self._look_at_clock()
            case FfnUp():
                self._up(event)
            case FfnDown(worker):
                self._down(worker)
            case StepOver(step):
                for name in [name for name in self._calls if name.step == step]:
                    self._forget(self._calls[name])
        out, self._out = self._out, []
        return out

    def check(self) -> None:
        """Assert what is always true between events."""
        for owner in self._owners.values():
            assert len(owner.open) <= owner.credit, f"{owner.name}: more requests than credit"
            assert owner.num_rows == sum(attempt.num_rows for attempt in owner.open.values())
        for call in self._calls.values():
            assert call.missing, f"{call.name} is complete and still there"
            asked = {piece for a in call.attempts.values() if not a.is_late for piece, _ in a.request.pieces}
            assert call.unsent == call.missing.keys() - asked, f"{call.name}: nobody sees to some of its pieces"
            for attempt in call.attempts.values():
                assert attempt.owner.open.get(attempt.request.key.sequence) is attempt

    # -- calls --------------------------------------------------------------------------------------------------------

    def _made(self, made: CallMade) -> None:
        assert made.call not in self._calls, f"{made.call} is made twice"
        self.counts.calls += 1
        if not made.pieces:
            self._out.append(CallDone(made.call))
            return
        call = self._calls[made.call] = _Call(made, self._now + self.config.deadline_seconds)
        self._dispatch(call)

    def _dispatch(self, call: _Call) -> None:
        """Ask for every piece that nobody is asked for. What finds no owner with credit waits, or falls back."""
        if len(call.unsent) == 1:
            self._dispatch_one(call, next(iter(call.unsent)))
            return
        chosen: dict[WorkerId, list[Piece]] = {}
        load: dict[WorkerId, int] = {}
        homeless: list[Piece] = []
        able = [owner for owner in self._owners.values() if owner.name not in call.refused_by]
        owners_of = {piece: [owner for owner in able if piece in owner.pieces] for piece in sorted(call.unsent)}
        # Those without a choice first, then the largest: what is dealt out last evens out best.
        in_turn = sorted(owners_of, key=lambda piece: (len(owners_of[piece]) > 1, -call.missing[piece], piece))
        for piece in in_turn:
            owners = owners_of[piece]
            if not owners:
                homeless.append(piece)
                continue
            owner = self._choose(call, piece, owners, chosen, load)
            if owner is not None:
                chosen.setdefault(owner.name, []).append(piece)
                load[owner.name] = load.get(owner.name, 0) + call.missing[piece]
        for name, pieces in sorted(chosen.items(), key=lambda entry: min(entry[1])):
            self._send(call, self._owners[name], sorted(pieces))
        if homeless:
            self._no_owner(call, homeless)

    def _dispatch_one(self, call: _Call, piece: Piece) -> None:
        """What `_dispatch` does, where nothing is to be evened out."""
        refused_by = call.refused_by
        owners = [o for o in self._owners.values() if piece in o.pieces and o.name not in refused_by]
        if not owners:
            self._no_owner(call, [piece])
        elif (owner := self._choose(call, piece, owners, {}, {})) is not None:
            self._send(call, owner, [piece])

    def _choose(
        self,
        call: _Call,
        piece: Piece,
        owners: list[_Owner],
        chosen: dict[WorkerId, list[Piece]],
        load: dict[WorkerId, int],
    ) -> _Owner | None:
        """The least loaded owner that has credit; one that was late, or has been asked for this piece, only last."""
        best: _Owner | None = None
        best_rank: tuple[bool, int, int] = (True, 0, 0)
        for place, owner in enumerate(owners):
            if owner.busy_until > self._now or (len(owner.open) >= owner.credit and owner.name not in chosen):
                continue
            is_asked = bool(call.attempts) and any(
                attempt.owner is owner and any(piece == asked for asked, _ in attempt.request.pieces)
                for attempt in call.attempts.values()
            )
            turn = (place - call.name.micro_batch) % len(owners)  # equals take turns
            is_last = is_asked or owner.suspect_until > self._now
            rank = (is_last, owner.num_rows + load.get(owner.name, 0), turn)
            if best is None or rank < best_rank:
                best, best_rank = owner, rank
        return best

    def _send(self, call: _Call, owner: _Owner, pieces: list[Piece]) -> None:
        self._sequence += 1
        name = call.name
        key = CallKey(self.config.session, name.step, name.layer, name.micro_batch, self._sequence)
        request = FfnRequest(key, tuple([(piece, call.missing[piece]) for piece in pieces]))
        patience = min(MAX_PATIENCE, 2.0**call.num_timeouts) * self.config.timeout_seconds
        lost_at = self._now + max(LOST_AFTER * self.config.deadline_seconds, 2.0 * patience)
        attempt = _Attempt(call, owner, request, self._now + patience, lost_at)
        call.attempts[self._sequence] = owner.open[self._sequence] = attempt
        call.unsent.difference_update(pieces)
        owner.num_rows += attempt.num_rows
        self.counts.requests += 1
        self._out.append(SendRequest(owner.name, request))

    def _no_owner(self, call: _Call, pieces: list[Piece]) -> None:
        """Nobody there computes them, though somebody may come back."""
        if self.config.fallback == "local":
            self._compute_here(call, pieces, "no FFN worker is left that has the weights")
        elif call.refused_by and not any(owner.name not in call.refused_by for owner in self._owners.values()):
            self._fail(call, f"no FFN worker could compute layer {call.name.layer}")

    def _compute_here(self, call: _Call, pieces: list[Piece], reason: str) -> None:
        self.counts.computed_here += 1
        wanted: Wanted = tuple((piece, call.missing[piece]) for piece in pieces)
        self._out.append(ComputeHere(call.name, wanted, reason))
        self._fill(call, pieces)

    def _fill(self, call: _Call, pieces: list[Piece]) -> None:
        for piece in pieces:
            del call.missing[piece]
            call.unsent.discard(piece)
        if not call.missing:
            self._out.append(CallDone(call.name))
            self._forget(call)

    def _fail(self, call: _Call, reason: str) -> None:
        self.counts.failed += 1
        self._out.append(CallFailed(call.name, reason))
        self._forget(call)

    def _forget(self, call: _Call) -> None:
        """Its attempts keep their owners' credit until they are answered."""
        del self._calls[call.name]
        call.attempts.clear()

    # -- answers ------------------------------------------------------------------------------------------------------

    def _answered(self, worker: WorkerId, answer: FfnAnswer) -> None:
        owner = self._owners.get(worker)
        attempt = owner.open.get(answer.key.sequence) if owner is not None else None
        if owner is None or attempt is None or attempt.request.key != answer.key:
            self.counts.unknown += 1
            if isinstance(answer, FfnReply):
                self._out.append(DropReply(answer.key))
            return
        self._close(attempt)
        call = attempt.call
        is_open = self._calls.get(call.name) is call
        match answer:
            case FfnReply():
                owner.suspect_until = 0.0
                self._take(attempt, is_open=is_open)
            case FfnBusy():
                self.counts.busy += 1
                owner.busy_until = self._now + self.config.timeout_seconds / 8
            case FfnError():
                self.counts.errors += 1
                if is_open:
                    call.refused_by.add(worker)
        if is_open and self._calls.get(call.name) is call:
            self._ask_again(call, attempt)
        self._dispatch_waiting()

    def _take(self, attempt: _Attempt, *, is_open: bool) -> None:
        pieces = [piece for piece, _ in attempt.request.pieces if is_open and piece in attempt.call.missing]
        if not pieces:
            self.counts.dropped += 1
            self._out.append(DropReply(attempt.request.key))
            return
        self.counts.late += attempt.is_late
        self._out.append(TakeReply(attempt.request, tuple(pieces)))
        self._fill(attempt.call, pieces)

    def _close(self, attempt: _Attempt) -> None:
        """The request is answered, or never will be."""
        sequence = attempt.request.key.sequence
        del attempt.owner.open[sequence]
        attempt.owner.num_rows -= attempt.num_rows
        attempt.call.attempts.pop(sequence, None)

    def _ask_again(self, call: _Call, attempt: _Attempt) -> None:
        """What this attempt leaves open is for others, unless they are asked already."""
        asked = {piece for a in call.attempts.values() if not a.is_late for piece, _ in a.request.pieces}
        left = [piece for piece, _ in attempt.request.pieces if piece in call.missing and piece not in asked]
        if left and not call.unsent.issuperset(left):
            self.counts.retries += 1
            call.unsent.update(left)
        if call.unsent:
            self._dispatch(call)

    def _dispatch_waiting(self) -> None:
        """Somebody has credit again."""
        for call in list(self._calls.values()):
            if call.unsent:
                self._dispatch(call)

    # -- time and workers ---------------------------------------------------------------------------------------------

    def _look_at_clock(self) -> None:
        for call in list(self._calls.values()):
            if call.give_up_at <= self._now:
                self._give_up(call)
                continue
            for attempt in list(call.attempts.values()):
                if attempt.due_at <= self._now:
                    self._too_late(call, attempt)
            if call.unsent and self._calls.get(call.name) is call:
                self._dispatch(call)
        for owner in list(self._owners.values()):
            if (oldest := owner.oldest) is not None and oldest.lost_at <= self._now:
                self._out.append(DropLink(owner.name, "it has not answered a call for longer than a call may take"))
                self._down(owner.name)

    def _give_up(self, call: _Call) -> None:
        waited = f"no FFN worker has answered for {self.config.deadline_seconds:g} s"
        if self.config.fallback == "local":
            self._compute_here(call, list(call.missing), waited)
        else:
            self._fail(call, f"{waited} in layer {call.name.layer}")

    def _too_late(self, call: _Call, attempt: _Attempt) -> None:
        """Ask somebody else as well. It may still answer: whoever comes first is taken."""
        attempt.owner.suspect_until = self._now + self.config.timeout_seconds
        attempt.due_at = call.give_up_at
        if not attempt.is_late:
            attempt.is_late = True
            call.num_timeouts += 1
            self._ask_again(call, attempt)

    def _up(self, event: FfnUp) -> None:
        if event.worker in self._owners:
            self._down(event.worker)
        self._owners[event.worker] = _Owner(event.worker, event.pieces, event.credit)
        for call in self._calls.values():
            call.refused_by.discard(event.worker)
        self._dispatch_waiting()

    def _down(self, worker: WorkerId) -> None:
        owner = self._owners.pop(worker, None)
        if owner is None:
            return
        self.counts.lost_workers += 1
        for attempt in list(owner.open.values()):
            self._close(attempt)
            call = attempt.call
            if self._calls.get(call.name) is call:
                self._ask_again(call, attempt)
