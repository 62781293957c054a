"""The cluster's machine, fed by hand: a request's way through it, and every way it can go wrong."""

from __future__ import annotations

import pytest

from tests.control.feeding import A0, D0, P0, ControllerFeed, a_request, a_token, sent
from tests.control.one_request import GRANT, ONE, REQUEST, emit, ends, phase, streamed, to_phase, to_prefilling
from transload.control.controller import ControllerConfig
from transload.control.messages import (
    Arrived,
    Cancel,
    Cancelled,
    CancelTimer,
    Emitted,
    Finish,
    HandoffFailed,
    KvVerified,
    LinkMeasured,
    Load,
    Prefill,
    PrefillSent,
    Reject,
    RequestFailed,
    Reserve,
    Reserved,
    Run,
    SetTimer,
    Started,
    Stream,
    TimerFired,
    ToWorker,
)

# -- the way through --------------------------------------------------------------------------------------------------


def test_an_aggregated_request_from_arrival_to_end() -> None:
    feed = ControllerFeed("a0")
    assert feed.give(Arrived(REQUEST)) == [SetTimer("deadline/1", 600.0), ToWorker(A0, Run(REQUEST, 0))]
    assert feed.give(Started(A0, ONE, 0, 4)) == []
    assert feed.give(Emitted(A0, (a_token(REQUEST, 0),))) == [Stream(a_token(REQUEST, 0))]
    assert phase(feed) == "decoding"
    last = a_token(REQUEST, 2, finish="length")
    assert feed.give(Emitted(A0, (a_token(REQUEST, 1), last))) == [
        Stream(a_token(REQUEST, 1)),
        Stream(last),
        CancelTimer("deadline/1"),
        Finish(ONE, "length", 6, 3, 4),
    ]
    assert not feed.controller.requests
    assert not feed.controller.views[A0].committed_blocks


def test_a_split_request_from_arrival_to_end() -> None:
    feed = ControllerFeed("p0 d0")
    assert feed.give(Arrived(REQUEST)) == [SetTimer("deadline/1", 600.0), ToWorker(D0, Reserve(REQUEST, 0, P0))]
    assert phase(feed) == "reserving"
    assert feed.give(Reserved(D0, ONE, 0, GRANT, 0)) == [ToWorker(P0, Prefill(REQUEST, 0, D0, GRANT))]
    feed.give(Started(P0, ONE, 0, 4))
    assert phase(feed) == "prefilling"
    assert feed.give(Emitted(P0, (a_token(REQUEST, 0),))) == [Stream(a_token(REQUEST, 0))]
    assert phase(feed) == "transferring"
    assert feed.give(KvVerified(D0, ONE, 0, 100, 0.1, 2)) == []
    assert phase(feed) == "decoding"
    assert feed.give(PrefillSent(P0, ONE, 0)) == []
    assert not feed.controller.views[P0].committed_blocks
    feed.give(Started(D0, ONE, 0, 0))
    assert emit(feed, D0, 1) == [1]
    last = a_token(REQUEST, 2, finish="length")
    assert feed.give(Emitted(D0, (last,))) == [
        Stream(last),
        CancelTimer("deadline/1"),
        Finish(ONE, "length", 6, 3, 4),
    ]
    assert not feed.controller.views[D0].committed_blocks


def test_a_text_that_ends_with_its_first_token_is_cancelled_at_the_decode_worker() -> None:
    feed = ControllerFeed("p0 d0")
    to_prefilling(feed)
    commands = feed.give(Emitted(P0, (a_token(REQUEST, 0, finish="stop"),)))
    assert (str(D0), Cancel(ONE, 0)) in sent(commands)
    assert ends(commands) == [Finish(ONE, "stop", 6, 1, 4)]


def test_requests_wait_while_no_worker_is_alive_and_go_when_one_joins() -> None:
    feed = ControllerFeed()
    assert sent(feed.give(Arrived(REQUEST))) == []
    assert sent(feed.join(A0)) == [(A0, Run(REQUEST, 0))]


def test_requests_wait_for_room_first_come_first_served() -> None:
    feed = ControllerFeed("a0", max_batch=1)
    other, third = a_request(2, 6), a_request(3, 6)
    feed.give(Arrived(REQUEST))
    assert sent(feed.give(Arrived(other))) == []
    assert sent(feed.give(Arrived(third))) == []
    assert feed.controller.num_waiting == 2
    commands = feed.give(Emitted(A0, (a_token(REQUEST, 0, finish="stop"),)))
    assert sent(commands) == [(A0, Run(other, 0))]


# -- tokens that overtake ---------------------------------------------------------------------------------------------


def test_tokens_of_the_decode_worker_wait_for_the_first_of_the_prefill_worker() -> None:
    feed = ControllerFeed("p0 d0")
    to_prefilling(feed)
    feed.give(KvVerified(D0, ONE, 0, 100, 0.1, 2))
    assert emit(feed, D0, 1) == []
    assert emit(feed, P0, 0) == [0, 1]
    assert phase(feed) == "decoding"
    assert emit(feed, D0, 2, finish="length") == [2]


def test_the_whole_text_may_overtake_its_first_token() -> None:
    feed = ControllerFeed("p0 d0")
    to_prefilling(feed)
    feed.give(KvVerified(D0, ONE, 0, 100, 0.1, 2))
    assert emit(feed, D0, 1, 2, finish="length") == []
    commands = feed.give(Emitted(P0, (a_token(REQUEST, 0),)))
    assert streamed(commands) == [0, 1, 2]
    assert ends(commands) == [Finish(ONE, "length", 6, 3, 4)]


def test_a_token_that_comes_twice_is_streamed_once() -> None:
    feed = ControllerFeed("a0")
    feed.give(Arrived(REQUEST))
    assert emit(feed, A0, 0) == [0]
    assert emit(feed, A0, 0) == []
    assert emit(feed, A0, 1) == [1]


# -- failures ---------------------------------------------------------------------------------------------------------


def test_after_two_failed_transfers_the_decode_worker_prefills() -> None:
    feed = ControllerFeed("p0 d0")
    feed.give(Arrived(REQUEST))
    commands = feed.give(HandoffFailed(D0, ONE, 0, "no link to p0"))
    assert (D0, Reserve(REQUEST, 1, P0)) in sent(commands)
    commands = feed.give(HandoffFailed(D0, ONE, 1, "no link to p0"))
    assert (D0, Run(REQUEST, 2)) in sent(commands)


def test_a_prefill_worker_that_missed_the_receipt_does_not_end_a_text_that_goes_on() -> None:
    feed = ControllerFeed("p0 d0")
    to_phase(feed, "decoding")
    assert feed.give(HandoffFailed(P0, ONE, 0, "no sign of life from d0")) == []
    assert not feed.controller.views[P0].committed_blocks
    assert emit(feed, D0, 1) == [1]


def test_a_request_that_fails_everywhere_ends_with_an_error_that_says_why() -> None:
    feed = ControllerFeed("a0", ControllerConfig(max_attempts=3))
    feed.give(Arrived(REQUEST))
    feed.give(Started(A0, ONE, 0, 0))
    emit(feed, A0, 0)
    for epoch in range(2):
        assert ends(feed.give(RequestFailed(A0, ONE, epoch, "out of memory"))) == []
    commands = feed.give(RequestFailed(A0, ONE, 2, "out of memory"))
    assert (A0, Cancel(ONE, 2)) in sent(commands)
    error = "given up after 3 attempts: failed on a0: out of memory"
    assert ends(commands) == [Finish(ONE, "error", 6, 1, 0, error, "worker_failed")]


def test_an_attempt_sent_to_a_worker_that_was_dead_already_does_not_count() -> None:
    feed = ControllerFeed("p0 d0", ControllerConfig(max_attempts=2, local_prefill="fallback"))
    to_prefilling(feed)
    feed.give(LinkMeasured(P0, D0, "", 0.0, 0.0))
    commands = feed.give(HandoffFailed(P0, ONE, 0, "lost the link to d0"))  # heard before the loss of d0 itself
    assert (D0, Run(REQUEST, 1)) in sent(commands)
    commands = feed.lose(D0)
    assert ends(commands) == []
    assert sent(commands) == [(P0, Run(REQUEST, 2))]


def test_attempts_that_nobody_takes_up_have_an_end_too() -> None:
    feed = ControllerFeed("", ControllerConfig(max_attempts=2))
    feed.give(Arrived(REQUEST))
    finished: list[Finish] = []
    for incarnation in range(1, 9):
        feed.join(A0, incarnation)
        finished += ends(feed.lose(A0, incarnation))
    assert [finish.error_code for finish in finished] == ["worker_lost"]


@pytest.mark.parametrize("wanted", ["reserving", "prefilling", "transferring", "decoding"])
def test_a_deadline_ends_the_request_in_any_phase(wanted: str) -> None:
    feed = ControllerFeed("p0 d0")
    to_phase(feed, wanted)
    commands = feed.give(TimerFired("deadline/1"))
    assert sent(commands) == [(D0, Cancel(ONE, 0)), (P0, Cancel(ONE, 0))]
    (finish,) = ends(commands)
    assert (finish.reason, finish.error_code) == ("error", "deadline_exceeded")
    assert finish.error == f"not finished within 600 s (while {wanted})"
    assert feed.give(TimerFired("deadline/1")) == []


def test_a_deadline_ends_a_request_that_waits() -> None:
    feed = ControllerFeed()
    feed.give(Arrived(REQUEST))
    (finish,) = ends(feed.give(TimerFired("deadline/1")))
    assert finish.error == "not finished within 600 s (with no worker alive)"
    assert feed.controller.num_waiting == 0
    assert sent(feed.join(A0)) == []


@pytest.mark.parametrize("wanted", ["reserving", "prefilling", "transferring", "decoding"])
def test_a_caller_that_goes_away_frees_both_workers_in_any_phase(wanted: str) -> None:
    feed = ControllerFeed("p0 d0")
    to_phase(feed, wanted)
    commands = feed.give(Cancelled(ONE, "cancelled"))
    assert sent(commands) == [(D0, Cancel(ONE, 0)), (P0, Cancel(ONE, 0))]
    assert [finish.reason for finish in ends(commands)] == ["cancelled"]
    assert not any(view.committed_blocks for view in feed.controller.views.values())
    assert feed.give(Cancelled(ONE, "cancelled")) == []


def test_a_stop_string_ends_the_request_with_stop() -> None:
    feed = ControllerFeed("a0")
    feed.give(Arrived(REQUEST))
    emit(feed, A0, 0, 1)
    assert ends(feed.give(Cancelled(ONE, "stop"))) == [Finish(ONE, "stop", 6, 2, 0)]
    assert emit(feed, A0, 2) == []


# -- refusals and limits ----------------------------------------------------------------------------------------------


def test_more_than_may_wait_are_refused_with_a_time_to_come_back() -> None:
    feed = ControllerFeed("", ControllerConfig(max_waiting=2))
    for number in (1, 2):
        feed.give(Arrived(a_request(number, 6)))
    (refusal,) = feed.give(Arrived(a_request(3, 6)))
    assert isinstance(refusal, Reject)
    assert refusal.request == 3
    assert refusal.retry_after_seconds == 1.0
    assert refusal.message == "2 requests are waiting already; try again in 1 s"
    assert len(feed.controller.requests) == 2


def test_a_request_that_no_worker_can_hold_is_refused_for_good() -> None:
    feed = ControllerFeed("p0 d0")
    (refusal,) = feed.give(Arrived(a_request(1, 250, max_tokens=8)))
    assert refusal == Reject(ONE, "needs 257 tokens of KV cache; no worker holds more than 256")
    assert len(sent(feed.give(Arrived(a_request(2, 250, max_tokens=7))))) == 1


def test_a_request_that_came_before_the_workers_and_fits_none_ends_and_holds_nobody_up() -> None:
    feed = ControllerFeed()
    feed.give(Arrived(a_request(1, 250, max_tokens=8)))
    feed.give(Arrived(a_request(2, 6)))
    commands = feed.join(A0)
    (finish,) = ends(commands)
    assert (finish.request, finish.error_code) == (1, "exceeds_capacity")
    assert [event.request.id for _, event in sent(commands) if isinstance(event, Run)] == [2]


def test_only_the_last_ended_requests_are_remembered() -> None:
    feed = ControllerFeed("a0", ControllerConfig(keep_ended=3))
    for number in range(1, 8):
        request = a_request(number, 6)
        feed.give(Arrived(request))
        feed.give(Cancelled(request.id, "cancelled"))
    assert list(feed.controller.ended) == [5, 6, 7]


def test_words_of_unknown_workers_and_requests_are_ignored() -> None:
    feed = ControllerFeed("a0")
    assert feed.give(Started(A0, ONE, 0, 0)) == []
    assert feed.give(Emitted(A0, (a_token(REQUEST, 0),))) == []
    assert feed.give(Load(D0, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0.1, 1, 1, 1)) == []
    assert feed.give(Cancelled(ONE, "cancelled")) == []


# -- the waterfall ----------------------------------------------------------------------------------------------------


def test_the_stages_of_a_split_request_follow_one_another() -> None:
    feed = ControllerFeed("p0 d0")
    for at, event in enumerate(
        (
            Arrived(REQUEST),
            Reserved(D0, ONE, 0, GRANT, 4),
            Started(P0, ONE, 0, 4),
            Emitted(P0, (a_token(REQUEST, 0),)),
            KvVerified(D0, ONE, 0, 100, 0.1, 2),
            Started(D0, ONE, 0, 4),
            Emitted(D0, (a_token(REQUEST, 1), a_token(REQUEST, 2, finish="length"))),
        )
    ):
        feed.now = float(at)
        feed.give(event)  # type: ignore[arg-type]
    tracked = feed.controller.ended[ONE]
    assert [(stage.name, stage.worker, stage.start) for stage in tracked.stages] == [
        ("queue", None, 0.0),
        ("reserve", D0, 0.0),
        ("prefill queue", P0, 1.0),
        ("prefill", P0, 2.0),
        ("transfer", D0, 3.0),
        ("decode queue", D0, 4.0),
        ("decode", D0, 5.0),
    ]
    assert (tracked.arrived_at, tracked.first_token_at, tracked.ended_at) == (0.0, 3.0, 6.0)
    assert tracked.stages[1].detail == {"cached_tokens_here": 4}
    assert tracked.stages[4].detail == {
        "bytes": 100,
        "frames": 2,
        "wire_seconds": 0.1,
        "hidden_seconds": 0.0,
        "waiting_seconds": 0.9,
    }


def test_a_decode_that_starts_before_the_first_token_is_heard_is_no_prefill() -> None:
    feed = ControllerFeed("p0 d0")
    feed.give(Arrived(REQUEST))
    feed.give(Reserved(D0, ONE, 0, GRANT, 0))
    feed.give(KvVerified(D0, ONE, 0, 100, 0.1, 2))
    feed.give(Started(D0, ONE, 0, 4))
    feed.give(Started(P0, ONE, 0, 0))
    tracked = feed.controller.requests[ONE]
    assert tracked.stages[-1].name == "decode"
    assert tracked.num_cached == 0  # by the worker that prefilled
