"""The attention side of remote feed-forwards, fed by hand: the commands are compared literally."""

from __future__ import annotations

import pytest

from transload.control.ffn_client import FfnClient, FfnClientConfig
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
)
from transload.control.messages import WorkerId

SESSION = SessionId(77)
F0, F1, F2 = (WorkerId(f"ffn-{number}") for number in range(3))
WHOLE = Piece(0)


class Feed:
    """A client that checks itself after every event. Timeout 1 s, deadline 10 s."""

    def __init__(self, *workers: WorkerId, fallback: Fallback = "local", credit: int = 4) -> None:
        self.now = 100.0
        self.client = FfnClient(
            FfnClientConfig(session=SESSION, fallback=fallback, timeout_seconds=1.0, deadline_seconds=10.0)
        )
        for worker in workers:
            assert self.give(FfnUp(worker, frozenset({WHOLE}), credit)) == []

    def give(self, event: FfnClientEvent, after: float = 0.0) -> list[FfnClientCommand]:
        self.now += after
        commands = self.client.handle(event, self.now)
        self.client.check()
        return commands

    def call(self, layer: int, micro_batch: int = 0, rows: int = 3, step: int = 5) -> list[FfnClientCommand]:
        return self.give(CallMade(CallName(step, layer, micro_batch), ((WHOLE, rows),)))

    def reply(self, worker: WorkerId, sequence: int, layer: int = 0, micro_batch: int = 0) -> list[FfnClientCommand]:
        return self.give(FfnAnswered(worker, FfnReply(key(sequence, layer, micro_batch))))


def key(sequence: int, layer: int = 0, micro_batch: int = 0, step: int = 5) -> CallKey:
    return CallKey(SESSION, step, layer, micro_batch, sequence)


def request(sequence: int, layer: int = 0, micro_batch: int = 0, rows: int = 3) -> FfnRequest:
    return FfnRequest(key(sequence, layer, micro_batch), ((WHOLE, rows),))


def call(layer: int = 0, micro_batch: int = 0) -> CallName:
    return CallName(5, layer, micro_batch)


def test_a_call_goes_to_a_worker_and_is_done_with_its_reply() -> None:
    feed = Feed(F0)
    assert feed.call(0) == [SendRequest(F0, request(1))]
    assert feed.client.due_at == 101.0
    assert feed.reply(F0, 1) == [TakeReply(request(1), (WHOLE,)), CallDone(call())]
    assert feed.client.due_at is None
    assert feed.client.counts.calls == feed.client.counts.requests == 1


def test_a_call_without_rows_is_done_at_once() -> None:
    assert Feed(F0).give(CallMade(call(), ())) == [CallDone(call())]


def test_micro_batches_take_turns_among_equal_workers_and_replies_come_in_any_order() -> None:
    feed = Feed(F0, F1)
    assert feed.call(0, 0) == [SendRequest(F0, request(1, 0, 0))]
    assert feed.call(0, 1) == [SendRequest(F1, request(2, 0, 1))]
    assert feed.reply(F1, 2, 0, 1) == [TakeReply(request(2, 0, 1), (WHOLE,)), CallDone(call(0, 1))]
    assert feed.reply(F0, 1, 0, 0) == [TakeReply(request(1, 0, 0), (WHOLE,)), CallDone(call(0, 0))]


def test_the_worker_with_fewer_rows_under_way_is_asked() -> None:
    feed = Feed(F0, F1)
    assert feed.call(0, 0, rows=9) == [SendRequest(F0, request(1, 0, 0, rows=9))]
    assert feed.call(0, 2, rows=1) == [SendRequest(F1, request(2, 0, 2, rows=1))]
    assert feed.call(0, 3, rows=1) == [SendRequest(F1, request(3, 0, 3, rows=1))]


def test_a_late_call_is_given_to_another_worker_and_the_first_answer_is_taken() -> None:
    feed = Feed(F0, F1)
    feed.call(0)
    assert feed.give(TimeCame(), 0.9) == []
    assert feed.give(TimeCame(), 0.1) == [SendRequest(F1, request(2))]
    assert feed.reply(F0, 1) == [TakeReply(request(1), (WHOLE,)), CallDone(call())]
    assert feed.reply(F1, 2) == [DropReply(key(2))]
    counts = feed.client.counts
    assert (counts.retries, counts.late, counts.dropped, counts.unknown) == (1, 1, 1, 0)


def test_the_answer_of_the_second_worker_is_taken_if_it_is_first() -> None:
    feed = Feed(F0, F1)
    feed.call(0)
    feed.give(TimeCame(), 1.0)
    assert feed.reply(F1, 2) == [TakeReply(request(2), (WHOLE,)), CallDone(call())]
    assert feed.reply(F0, 1) == [DropReply(key(1))]


def test_a_worker_that_was_late_is_asked_last_until_it_answers() -> None:
    feed = Feed(F0, F1)
    feed.call(0)
    feed.give(TimeCame(), 1.0)
    feed.reply(F1, 2)
    assert feed.call(1) == [SendRequest(F1, request(3, 1))]
    feed.reply(F0, 1)
    assert feed.call(1, 2) == [SendRequest(F0, request(4, 1, 2))]


def test_the_only_worker_is_asked_again_each_time_with_more_patience() -> None:
    feed = Feed(F0)
    feed.call(0)
    assert feed.give(TimeCame(), 1.0) == [SendRequest(F0, request(2))]
    assert feed.client.due_at == 103.0
    assert feed.give(TimeCame(), 2.0) == [SendRequest(F0, request(3))]
    assert feed.client.due_at == 107.0


def test_a_duplicate_reply_is_dropped_and_counted() -> None:
    feed = Feed(F0)
    feed.call(0)
    feed.reply(F0, 1)
    assert feed.reply(F0, 1) == [DropReply(key(1))]
    assert feed.client.counts.unknown == 1


@pytest.mark.parametrize(
    "wrong",
    [
        CallKey(SessionId(78), 5, 0, 0, 1),
        CallKey(SESSION, 4, 0, 0, 1),
        CallKey(SESSION, 5, 1, 0, 1),
        CallKey(SESSION, 5, 0, 1, 1),
        CallKey(SESSION, 5, 0, 0, 2),
    ],
    ids=["session", "step", "layer", "micro-batch", "sequence"],
)
def test_a_reply_whose_key_differs_anywhere_is_dropped(wrong: CallKey) -> None:
    feed = Feed(F0, F1)
    feed.call(0)
    assert feed.give(FfnAnswered(F0, FfnReply(wrong))) == [DropReply(wrong)]
    assert feed.give(FfnAnswered(F1, FfnReply(key(1)))) == [DropReply(key(1))]
    assert feed.client.counts.unknown == 2
    assert feed.reply(F0, 1)[-1] == CallDone(call())


def test_a_worker_that_dies_leaves_its_calls_to_another() -> None:
    feed = Feed(F0, F1)
    feed.call(0, 0)
    feed.call(0, 2)
    assert feed.give(FfnDown(F0)) == [SendRequest(F1, request(3, 0, 0))]
    assert feed.reply(F0, 1, 0, 0) == [DropReply(key(1, 0, 0))]
    assert feed.reply(F1, 3, 0, 0)[-1] == CallDone(call(0, 0))


def test_without_a_worker_the_call_is_computed_here() -> None:
    feed = Feed(F0)
    feed.call(0)
    reason = "no FFN worker is left that has the weights"
    assert feed.give(FfnDown(F0)) == [ComputeHere(call(), ((WHOLE, 3),), reason), CallDone(call())]
    assert feed.call(1) == [ComputeHere(call(1), ((WHOLE, 3),), reason), CallDone(call(1))]


def test_without_a_worker_and_a_fallback_the_call_waits_for_one_and_fails_at_its_deadline() -> None:
    feed = Feed(F0, fallback="error")
    feed.call(0)
    assert feed.give(FfnDown(F0), 0.5) == []
    assert feed.client.due_at == 110.0
    assert feed.give(TimeCame(), 9.5) == [CallFailed(call(), "no FFN worker has answered for 10 s in layer 0")]
    assert feed.client.due_at is None


def test_a_worker_that_comes_back_is_given_what_waits() -> None:
    feed = Feed(F0, fallback="error")
    feed.call(0)
    feed.give(FfnDown(F0))
    assert feed.give(FfnUp(F0, frozenset({WHOLE}), 4)) == [SendRequest(F0, request(2))]
    assert feed.reply(F0, 1) == [DropReply(key(1))], "the answer of the life before"
    assert feed.reply(F0, 2)[-1] == CallDone(call())


def test_a_call_that_nobody_answers_in_time_is_computed_here() -> None:
    feed = Feed(F0)
    feed.call(0)
    feed.give(TimeCame(), 1.0)
    reason = "no FFN worker has answered for 10 s"
    assert feed.give(TimeCame(), 9.0) == [ComputeHere(call(), ((WHOLE, 3),), reason), CallDone(call())]
    assert feed.reply(F0, 1) == [DropReply(key(1))]


def test_a_call_waits_for_credit() -> None:
    feed = Feed(F0, credit=1)
    feed.call(0, 0)
    assert feed.call(0, 1) == []
    assert feed.reply(F0, 1, 0, 0) == [
        TakeReply(request(1, 0, 0), (WHOLE,)),
        CallDone(call(0, 0)),
        SendRequest(F0, request(2, 0, 1)),
    ]


def test_a_busy_worker_is_left_alone_for_a_while() -> None:
    feed = Feed(F0)
    feed.call(0)
    assert feed.give(FfnAnswered(F0, FfnBusy(key(1)))) == []
    assert feed.client.due_at == 100.125
    assert feed.give(TimeCame(), 0.125) == [SendRequest(F0, request(2))]


def test_a_call_that_one_worker_is_too_busy_for_goes_to_the_other() -> None:
    feed = Feed(F0, F1)
    feed.call(0)
    assert feed.give(FfnAnswered(F0, FfnBusy(key(1)))) == [SendRequest(F1, request(2))]


def test_what_one_worker_cannot_compute_another_is_asked_for_and_then_nobody() -> None:
    feed = Feed(F0, F1)
    feed.call(0)
    assert feed.give(FfnAnswered(F0, FfnError(key(1), "out of memory"))) == [SendRequest(F1, request(2))]
    assert feed.give(FfnAnswered(F1, FfnError(key(2), "out of memory"))) == [
        ComputeHere(call(), ((WHOLE, 3),), "no FFN worker is left that has the weights"),
        CallDone(call()),
    ]


def test_what_no_worker_can_compute_fails_without_a_fallback() -> None:
    feed = Feed(F0, fallback="error")
    feed.call(0)
    assert feed.give(FfnAnswered(F0, FfnError(key(1), "out of memory"))) == [
        CallFailed(call(), "no FFN worker could compute layer 0")
    ]


def test_a_step_that_is_over_wants_no_answers_but_its_requests_keep_their_credit() -> None:
    feed = Feed(F0, credit=1)
    feed.call(0)
    assert feed.give(StepOver(5)) == []
    assert feed.call(0, step=6) == []
    assert feed.reply(F0, 1) == [
        DropReply(key(1)),
        SendRequest(F0, FfnRequest(key(2, step=6), ((WHOLE, 3),))),
    ]


def test_a_request_that_was_lost_on_the_way_gives_its_credit_back_with_its_link() -> None:
    feed = Feed(F0, credit=1)
    feed.call(0)
    feed.give(TimeCame(), 1.0)
    assert feed.give(TimeCame(), 9.0)[-1] == CallDone(call(0))  # computed here
    assert feed.call(1) == []  # no credit
    assert feed.client.due_at == 111.0 + 9.0 or feed.client.due_at is not None
    commands = feed.give(TimeCame(), 9.9)
    assert commands == []
    (dropped, *rest) = feed.give(TimeCame(), 0.2)
    assert isinstance(dropped, ComputeHere | DropLink)
    assert DropLink(F0, "it has not answered a call for longer than a call may take") in (dropped, *rest)
    assert feed.client.num_open == 0
    assert feed.give(FfnUp(F0, frozenset({WHOLE}), 1)) == []
    assert feed.call(2) == [SendRequest(F0, request(2, 2))]


def test_pieces_go_to_their_owners_and_the_call_is_done_with_the_last() -> None:
    feed = Feed()
    feed.give(FfnUp(F0, frozenset({Piece(0), Piece(1)}), 4))
    feed.give(FfnUp(F1, frozenset({Piece(2), Piece(3)}), 4))
    asked = CallMade(call(), ((Piece(3), 1), (Piece(0), 2), (Piece(1), 5)))
    first = FfnRequest(key(1), ((Piece(0), 2), (Piece(1), 5)))
    second = FfnRequest(key(2), ((Piece(3), 1),))
    assert feed.give(asked) == [SendRequest(F0, first), SendRequest(F1, second)]
    assert feed.reply(F1, 2) == [TakeReply(second, (Piece(3),))]
    assert feed.reply(F0, 1) == [TakeReply(first, (Piece(0), Piece(1))), CallDone(call())]


def test_a_replicated_expert_goes_to_the_owner_with_fewer_rows_in_this_very_call() -> None:
    feed = Feed()
    feed.give(FfnUp(F0, frozenset({Piece(0), Piece(2)}), 4))
    feed.give(FfnUp(F1, frozenset({Piece(1), Piece(2)}), 4))
    commands = feed.give(CallMade(call(), ((Piece(0), 9), (Piece(1), 2), (Piece(2), 4))))
    assert commands == [
        SendRequest(F0, FfnRequest(key(1), ((Piece(0), 9),))),
        SendRequest(F1, FfnRequest(key(2), ((Piece(1), 2), (Piece(2), 4)))),
    ]


def test_only_the_pieces_of_the_worker_that_died_are_asked_for_again() -> None:
    feed = Feed()
    feed.give(FfnUp(F0, frozenset({Piece(0)}), 4))
    feed.give(FfnUp(F1, frozenset({Piece(1)}), 4))
    feed.give(FfnUp(F2, frozenset({Piece(0), Piece(1)}), 4))
    feed.give(FfnDown(F2))
    feed.give(CallMade(call(), ((Piece(0), 1), (Piece(1), 1))))
    assert feed.give(FfnDown(F1)) == [
        ComputeHere(call(), ((Piece(1), 1),), "no FFN worker is left that has the weights"),
    ]
    assert feed.reply(F0, 1)[-1] == CallDone(call())


def test_a_late_reply_fills_only_the_pieces_that_are_still_missing() -> None:
    feed = Feed()
    feed.give(FfnUp(F0, frozenset({Piece(0), Piece(1)}), 4))
    both = FfnRequest(key(1), ((Piece(0), 1), (Piece(1), 8)))
    assert feed.give(CallMade(call(), both.pieces)) == [SendRequest(F0, both)]
    feed.give(FfnUp(F1, frozenset({Piece(0)}), 4))
    assert feed.give(TimeCame(), 1.0) == [
        SendRequest(F1, FfnRequest(key(2), ((Piece(0), 1),))),
        SendRequest(F0, FfnRequest(key(3), ((Piece(1), 8),))),
    ]
    assert feed.reply(F1, 2) == [TakeReply(FfnRequest(key(2), ((Piece(0), 1),)), (Piece(0),))]
    assert feed.reply(F0, 1) == [TakeReply(both, (Piece(1),)), CallDone(call())]
    assert feed.reply(F0, 3) == [DropReply(key(3))]
