"""The cluster's machine when workers are lost: who goes on where, with which tokens, and in which order."""

from __future__ import annotations

import pytest

from tests.control.feeding import A0, D0, D1, P0, P1, ControllerFeed, a_request, a_token, sent
from tests.control.one_request import GRANT, ONE, REQUEST, emit, ends, phase, streamed, to_phase, to_prefilling
from transload.control.controller import ControllerConfig
from transload.control.messages import (
    Arrived,
    Cancel,
    Emitted,
    Finish,
    HandoffFailed,
    KvVerified,
    LinkMeasured,
    Preempted,
    Prefill,
    PrefillSent,
    RequestFailed,
    Reserve,
    Reserved,
    RestartWorker,
    Run,
    Started,
    WorkerGone,
    WorkerId,
)


@pytest.mark.parametrize("victim", ["p0", "d0"])
@pytest.mark.parametrize("wanted", ["reserving", "prefilling", "transferring", "decoding"])
def test_losing_a_worker_in_any_phase_starts_over_with_the_tokens_there_are(victim: str, wanted: str) -> None:
    feed = ControllerFeed("p0 p1 d0 d1")
    to_phase(feed, wanted)
    outputs = (1000,) if wanted in ("transferring", "decoding") else ()
    commands = feed.lose(WorkerId(victim))
    if victim == "p0" and wanted == "decoding":
        assert sent(commands) == []  # it was not needed any more
        return
    survivor, source = (D0, P1) if victim == "p0" else (D1, P0)
    assert (survivor, Reserve(REQUEST, 1, source, outputs)) in sent(commands)
    assert phase(feed) == "reserving"
    others = {P0, D0} - {victim}
    assert {worker for worker, event in sent(commands) if event == Cancel(ONE, 0)} == others


def test_a_lost_request_ends_with_its_whole_text_and_its_whole_usage() -> None:
    feed = ControllerFeed("p0 d0 d1")
    to_prefilling(feed)
    emit(feed, P0, 0)
    feed.give(KvVerified(D0, ONE, 0, 100, 0.1, 2))
    assert emit(feed, D0, 1) == [1]
    feed.lose(D0)
    commands = feed.give(Reserved(D1, ONE, 1, GRANT, 4))
    assert sent(commands) == [(P0, Prefill(REQUEST, 1, D1, GRANT, (1000, 1001)))]
    feed.give(Started(P0, ONE, 1, 6))
    commands = feed.give(Emitted(P0, (a_token(REQUEST, 2, 1, finish="length"),)))
    assert streamed(commands) == [2]
    assert ends(commands) == [Finish(ONE, "length", 6, 3, 4)]  # what was cached the first time is what counts


def test_a_first_token_lost_with_its_prefill_worker_is_made_again() -> None:
    feed = ControllerFeed("p0 p1 d0")
    to_prefilling(feed)
    feed.give(KvVerified(D0, ONE, 0, 100, 0.1, 2))
    assert emit(feed, D0, 1) == []
    commands = feed.lose(P0)
    assert sent(commands) == [(D0, Cancel(ONE, 0)), (D0, Reserve(REQUEST, 1, P1))]
    assert emit(feed, D0, 2) == []  # of the attempt before: it never reaches the caller
    feed.give(Reserved(D0, ONE, 1, GRANT, 0))
    assert emit(feed, P1, 0, epoch=1) == [0]


def test_reports_of_an_earlier_attempt_change_nothing() -> None:
    feed = ControllerFeed("p0 p1 d0 d1")
    to_prefilling(feed)
    feed.lose(P0)
    before = feed.controller.requests[ONE].phase
    for event in (
        Reserved(D0, ONE, 0, GRANT, 0),
        Started(D0, ONE, 0, 0),
        KvVerified(D0, ONE, 0, 1, 0.1, 1),
        Preempted(D0, ONE, 0),
        PrefillSent(P0, ONE, 0),
        HandoffFailed(D0, ONE, 0, "late"),
        RequestFailed(D0, ONE, 0, "late"),
    ):
        assert feed.give(event) == []
    assert emit(feed, D0, 0) == []
    assert feed.controller.requests[ONE].phase == before
    assert feed.controller.requests[ONE].epoch == 1


def test_requests_of_a_lost_worker_keep_their_order_before_those_who_wait() -> None:
    feed = ControllerFeed("a0", max_batch=3)
    requests = [a_request(number, 6) for number in range(1, 6)]
    for request in requests:
        feed.give(Arrived(request))
    feed.lose(A0)
    assert feed.controller.num_waiting == 5
    commands = feed.join(A0, incarnation=2)
    assert [event.request.id for _, event in sent(commands) if isinstance(event, Run)] == [1, 2, 3]


def test_without_prefill_workers_the_decode_worker_prefills() -> None:
    feed = ControllerFeed("p0 d0")
    to_prefilling(feed)
    commands = feed.lose(P0)
    assert sent(commands) == [(D0, Cancel(ONE, 0)), (D0, Run(REQUEST, 1))]


def test_without_decode_workers_a_prefill_worker_does_it_all() -> None:
    feed = ControllerFeed("p0 d0")
    to_prefilling(feed)
    commands = feed.lose(D0)
    assert sent(commands) == [(P0, Cancel(ONE, 0)), (P0, Run(REQUEST, 1))]


def test_a_worker_is_started_again_after_pauses_that_double_to_a_limit() -> None:
    config = ControllerConfig(first_restart_seconds=0.5, longest_restart_seconds=3.0)
    feed = ControllerFeed("", config)
    pauses = []
    for incarnation in range(1, 7):
        feed.join(A0, incarnation)
        feed.now += 1
        pauses += [
            command.after_seconds
            for command in feed.lose(A0, incarnation)
            if isinstance(command, RestartWorker) and command.worker == A0
        ]
    assert pauses == [0.5, 1.0, 2.0, 3.0, 3.0, 3.0]
    feed.join(A0, 7)
    feed.now += 61
    assert feed.lose(A0, 7) == [RestartWorker(A0, 0.5)]


def test_a_worker_that_never_starts_is_tried_for_ever() -> None:
    feed = ControllerFeed()
    for _ in range(3000):
        feed.now += 10
        commands = feed.give(WorkerGone(A0, 1, "exited with code 1"))
    assert commands == [RestartWorker(A0, 10.0)]


def test_a_late_word_of_a_loss_does_not_take_the_worker_that_came_after() -> None:
    feed = ControllerFeed()
    feed.join(A0, incarnation=2)
    assert feed.lose(A0, incarnation=1) == []
    assert A0 in feed.controller.views


def test_a_worker_that_joins_anew_has_lost_what_it_had() -> None:
    feed = ControllerFeed("a0")
    feed.give(Arrived(REQUEST))
    assert sent(feed.join(A0, incarnation=2)) == [(A0, Run(REQUEST, 1))]


def test_a_link_to_a_worker_that_is_gone_is_not_believed_in() -> None:
    feed = ControllerFeed("p0 d0 d1")
    feed.lose(D0)
    assert set(feed.controller.links) == {(P0, D1)}
    feed.give(LinkMeasured(P0, D0, "shm", 1e9, 1e-4))
    assert set(feed.controller.links) == {(P0, D1)}
    feed.give(LinkMeasured(P0, D1, "", 0.0, 0.0))
    assert not feed.controller.links
