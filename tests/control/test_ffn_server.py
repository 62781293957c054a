"""The FFN side of remote feed-forwards, fed by hand: who is computed with whom, and when."""

from __future__ import annotations

import pytest

from transload.control.ffn_messages import (
    BatchDone,
    BatchFailed,
    CallKey,
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
from transload.control.ffn_server import FfnServer, FfnServerConfig

A, B, C = SessionId(1), SessionId(2), SessionId(3)
WHOLE = Piece(0)


class Feed:
    """A server of 4 layers that waits 1 s for others; a session is idle after 100 s."""

    def __init__(self, *sessions: SessionId, max_rows: int = 100, max_waiting_rows: int = 1000) -> None:
        self.now = 0.0
        self.sequence = 0
        self.server = FfnServer(
            FfnServerConfig(
                num_layers=4,
                pieces=frozenset({WHOLE}),
                max_wait_seconds=1.0,
                idle_seconds=100.0,
                max_rows=max_rows,
                max_waiting_rows=max_waiting_rows,
            )
        )
        for session in sessions:
            assert self.give(SessionUp(session)) == []

    def give(self, event: FfnServerEvent, after: float = 0.0) -> list[FfnServerCommand]:
        self.now += after
        commands = self.server.handle(event, self.now)
        self.server.check()
        return commands

    def request(self, session: SessionId, layer: int, micro_batch: int = 0, rows: int = 2, step: int = 1) -> FfnRequest:
        self.sequence += 1
        return FfnRequest(CallKey(session, step, layer, micro_batch, self.sequence), ((WHOLE, rows),))

    def come(self, request: FfnRequest, after: float = 0.0) -> list[FfnServerCommand]:
        return self.give(RequestCame(request), after)

    def end_steps(self) -> None:
        """A and B have ended a step, each for itself; they are expected at the first layer."""
        for session in (A, B):
            self.come(self.request(session, 3, step=0))
            self.give(BatchDone(self.server.num_batches))


def replies(*requests: FfnRequest) -> list[FfnServerCommand]:
    return [SendAnswer(FfnReply(request.key)) for request in requests]


def test_a_lonely_request_is_computed_at_once_and_answered() -> None:
    feed = Feed(A)
    request = feed.request(A, 0)
    assert feed.come(request) == [RunBatch(1, 0, (request,))]
    assert feed.give(BatchDone(1)) == replies(request)


def test_requests_of_a_layer_that_come_during_a_batch_are_computed_together_next() -> None:
    feed = Feed(A, B, C)
    first, second, third = feed.request(A, 1), feed.request(B, 2), feed.request(C, 2)
    assert feed.come(first) == [RunBatch(1, 1, (first,))]
    assert feed.come(second) == []
    assert feed.come(third) == []
    assert feed.give(BatchDone(1)) == [*replies(first), RunBatch(2, 2, (second, third))]
    assert feed.give(BatchDone(2)) == replies(second, third)


def test_those_who_were_computed_together_are_waited_for_at_the_next_layer() -> None:
    feed = Feed(A, B)
    feed.end_steps()
    a, b = feed.request(A, 0), feed.request(B, 0)
    assert feed.come(a) == []
    assert feed.server.due_at == feed.now + 1.0
    assert feed.come(b, 0.5) == [RunBatch(3, 0, (a, b))]
    feed.give(BatchDone(3))
    a, b = feed.request(A, 1), feed.request(B, 1)
    assert feed.come(b) == []
    assert feed.come(a) == [RunBatch(4, 1, (b, a))]


def test_a_stalled_attention_worker_delays_the_others_once_and_by_the_maximum_wait() -> None:
    feed = Feed(A, B)
    feed.end_steps()
    a, b = feed.request(A, 0), feed.request(B, 0)
    feed.come(a)
    feed.come(b)
    feed.give(BatchDone(3))
    a = feed.request(A, 1)
    assert feed.come(a) == []
    assert feed.give(TimeCame(), 0.9) == []
    assert feed.give(TimeCame(), 0.1) == [RunBatch(4, 1, (a,))]
    feed.give(BatchDone(4))
    for layer in (2, 3):
        a = feed.request(A, layer)
        assert feed.come(a) == [RunBatch(layer + 3, layer, (a,))]
        feed.give(BatchDone(layer + 3))


def test_an_idle_attention_worker_is_not_waited_for() -> None:
    feed = Feed(A, B)
    feed.end_steps()
    request = feed.request(A, 0)
    assert feed.come(request, after=100.0) == [RunBatch(3, 0, (request,))]


def test_an_attention_worker_in_the_middle_of_its_step_is_not_waited_for() -> None:
    feed = Feed(A, B)
    feed.come(feed.request(B, 1))
    feed.give(BatchDone(1))
    request = feed.request(A, 0)
    assert feed.come(request) == [RunBatch(2, 0, (request,))]


def test_micro_batches_of_one_worker_do_not_wait_for_each_other() -> None:
    feed = Feed(A)
    first, second = feed.request(A, 0, 0), feed.request(A, 0, 1)
    assert feed.come(first) == [RunBatch(1, 0, (first,))]
    assert feed.give(BatchDone(1)) == replies(first)
    assert feed.come(second) == [RunBatch(2, 0, (second,))]


def test_another_layer_runs_while_one_waits() -> None:
    feed = Feed(A, B, C)
    feed.end_steps()
    waits = feed.request(A, 0)
    assert feed.come(waits) == []
    runs = feed.request(C, 3)
    assert feed.come(runs) == [RunBatch(3, 3, (runs,))]
    assert feed.give(BatchDone(3)) == replies(runs)
    assert feed.give(TimeCame(), 1.0) == [RunBatch(4, 0, (waits,))]


def test_a_batch_takes_no_more_rows_than_it_may() -> None:
    feed = Feed(A, B, C, max_rows=10)
    blocker = feed.request(A, 0)
    feed.come(blocker)
    large, small, other = feed.request(A, 1, rows=8), feed.request(B, 1, rows=2), feed.request(C, 1, rows=1)
    for request in (large, small, other):
        assert feed.come(request) == []
    assert feed.give(BatchDone(1)) == [*replies(blocker), RunBatch(2, 1, (large, small))]
    assert feed.give(BatchDone(2)) == [*replies(large, small), RunBatch(3, 1, (other,))]


def test_a_request_larger_than_a_batch_runs_alone() -> None:
    feed = Feed(A, max_rows=10)
    request = feed.request(A, 0, rows=500)
    assert feed.come(request) == [RunBatch(1, 0, (request,))]


def test_too_much_is_sent_back_busy() -> None:
    feed = Feed(A, B, C, max_waiting_rows=5)
    feed.come(feed.request(A, 0))
    assert feed.come(feed.request(B, 1, rows=4)) == []
    request = feed.request(C, 1, rows=2)
    assert feed.come(request) == [SendAnswer(FfnBusy(request.key))]
    assert feed.server.num_busy == 1


def test_a_request_that_is_asked_anew_takes_the_place_of_the_old_one() -> None:
    feed = Feed(A, B)
    feed.come(feed.request(B, 0))
    old, new = feed.request(A, 1), feed.request(A, 1)
    assert feed.come(old) == []
    assert feed.come(new) == [SendAnswer(FfnBusy(old.key))]
    assert feed.give(BatchDone(1))[-1] == RunBatch(2, 1, (new,))


def test_a_lane_that_has_gone_on_does_not_want_what_it_asked_for_before() -> None:
    feed = Feed(A, B)
    feed.come(feed.request(B, 0))
    old, other_lane, new = feed.request(A, 1), feed.request(A, 1, 1), feed.request(A, 2)
    feed.come(old)
    feed.come(other_lane)
    assert feed.come(new) == [SendAnswer(FfnBusy(old.key))]
    assert feed.server.num_superseded == 1


def test_a_batch_that_fails_is_an_error_for_each_of_its_requests() -> None:
    feed = Feed(A)
    request = feed.request(A, 0)
    feed.come(request)
    assert feed.give(BatchFailed(1, "out of memory")) == [SendAnswer(FfnError(request.key, "out of memory"))]


@pytest.mark.parametrize(
    ("layer", "pieces", "reason"),
    [
        (4, ((WHOLE, 1),), "layer 4: there are layers 0..3"),
        (-1, ((WHOLE, 1),), "layer -1: there are layers 0..3"),
        (0, ((Piece(3), 1),), "pieces [3] are not here"),
        (0, ((WHOLE, 0),), "a request without rows"),
        (0, (), "a request without rows"),
    ],
)
def test_what_cannot_be_computed_here_is_refused(
    layer: int, pieces: tuple[tuple[Piece, int], ...], reason: str
) -> None:
    feed = Feed(A)
    key = CallKey(A, 1, layer, 0, 1)
    assert feed.come(FfnRequest(key, pieces)) == [SendAnswer(FfnError(key, reason))]


def test_nobody_is_answered_who_is_not_there() -> None:
    feed = Feed(A)
    stranger = feed.request(B, 0)
    assert feed.come(stranger) == [ForgetRequest(stranger.key)]
    running, waiting = feed.request(A, 0), feed.request(A, 1, 1)
    feed.come(running)
    feed.come(waiting)
    assert feed.give(SessionDown(A)) == [ForgetRequest(waiting.key)]
    assert feed.give(BatchDone(1)) == [ForgetRequest(running.key)]


def test_a_session_that_is_gone_is_not_waited_for() -> None:
    feed = Feed(A, B)
    feed.end_steps()
    request = feed.request(A, 0)
    assert feed.come(request) == []
    assert feed.give(SessionDown(B)) == [RunBatch(3, 0, (request,))]
