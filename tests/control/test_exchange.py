"""All transfers of one worker together: what the engine's tests of a single handoff do not show."""

from __future__ import annotations

import pytest

from tests.control.feeding import D0, D1, P0, P1, EngineFeed, a_grant, a_request, frames, reports
from transload.control.exchange import MAX_TOMBSTONES
from transload.control.messages import (
    Cancel,
    HandoffFailed,
    KvAbort,
    KvAbortAck,
    KvCredit,
    KvData,
    KvReady,
    KvRenew,
    PeerLost,
    PeerUp,
    Prefill,
    RequestId,
    Reserve,
    Reserved,
    SendsDrained,
    SetTimer,
    TimerFired,
    TransferId,
)

TICK = TimerFired("leases")


def reserved(feed: EngineFeed, number: int, source: str = "p0") -> TransferId:
    events = reports(feed.give(Reserve(a_request(number, 6), 0, type(P0)(source))))
    (grant,) = [event.grant for event in events if isinstance(event, Reserved)]
    return grant.transfer


def test_transfers_of_one_worker_have_different_names_and_those_of_another_seed_too() -> None:
    feed = EngineFeed(D0)
    feed.link(P0)
    names = {reserved(feed, number) for number in range(1, 9)}
    assert len(names) == 8
    other = EngineFeed(D1)
    other.link(P0)
    assert reserved(other, 1) not in names


def test_one_timer_serves_all_transfers() -> None:
    feed = EngineFeed(D0)
    feed.link(P0)
    assert SetTimer("leases", 1.0) in feed.give(Reserve(a_request(1, 6), 0, P0))
    assert not any(isinstance(command, SetTimer) for command in feed.give(Reserve(a_request(2, 6), 0, P0)))
    commands = feed.give(TICK)
    assert len(frames(commands)) == 2
    assert commands.count(SetTimer("leases", 1.0)) == 1


def test_a_shorter_lease_makes_the_ticks_come_sooner() -> None:
    feed = EngineFeed(P0, lease_seconds=30.0)
    feed.link(D0)
    feed.link(D1)
    assert SetTimer("leases", 10.0) in feed.give(Prefill(a_request(1, 6), 0, D0, a_grant(1, (1, 2), 0, 30_000)))
    assert SetTimer("leases", 1.0) in feed.give(Prefill(a_request(2, 6), 0, D1, a_grant(2, (1, 2), 0, 3000)))
    commands = feed.give(TICK)
    assert SetTimer("leases", 1.0) in commands
    for _ in range(3):
        commands = feed.give(TICK)
    assert reports(commands) == [HandoffFailed(P0, RequestId(2), 0, "no sign of life from d1 for 3 s")]


def test_no_timer_runs_when_nothing_is_under_way() -> None:
    feed = EngineFeed(D0)
    feed.link(P0, one_sided=False)
    reserved(feed, 1)
    feed.give(Cancel(RequestId(1), 0))
    assert feed.give(TICK) == []


def test_a_lost_peer_ends_its_own_transfers_and_no_other() -> None:
    feed = EngineFeed(D0)
    feed.link(P0)
    feed.link(P1)
    reserved(feed, 1, "p0")
    reserved(feed, 2, "p1")
    assert [event.request for event in reports(feed.give(PeerLost(P0))) if isinstance(event, HandoffFailed)] == [1]
    assert feed.engine.exchange.num_open == 1


def test_a_peer_that_comes_back_starts_from_nothing() -> None:
    feed = EngineFeed(D0)
    feed.link(P0)
    transfer = reserved(feed, 1)
    feed.give(PeerLost(P0))
    feed.give(PeerUp(P0, one_sided=False))
    assert feed.from_peer(P0, KvData(transfer, 0, 0, 0, 4, 0, 2, 8, 5), 5) == []
    assert feed.engine.exchange.num_late_frames == 1


@pytest.mark.parametrize("stray", [KvRenew(TransferId(5), 0, 100), KvAbortAck(TransferId(5), 0)])
def test_some_words_on_unknown_transfers_are_expected(stray: KvRenew | KvAbortAck) -> None:
    feed = EngineFeed(D0)
    feed.link(P0)
    assert feed.from_peer(P0, stray) == []
    assert feed.engine.exchange.num_late_frames == 0


def test_other_words_on_unknown_transfers_are_counted() -> None:
    feed = EngineFeed(D0)
    feed.link(P0)
    feed.from_peer(P0, KvReady(TransferId(5), 0))
    feed.from_peer(P0, KvCredit(TransferId(5), 0, 3))
    assert feed.engine.exchange.num_late_frames == 2


def test_withdrawn_transfers_are_remembered_up_to_a_limit() -> None:
    feed = EngineFeed(P0)
    feed.link(D0)
    for number in range(MAX_TOMBSTONES + 10):
        feed.from_peer(D0, KvAbort(TransferId(number), 0, "cancelled"))
    assert len(feed.engine.exchange._tombstones) == MAX_TOMBSTONES
    (failed,) = reports(feed.give(Prefill(a_request(1, 6), 0, D0, a_grant(MAX_TOMBSTONES, (1, 2)))))
    assert isinstance(failed, HandoffFailed)


def test_words_meant_for_another_sender_change_nothing() -> None:
    feed = EngineFeed(P0)
    feed.link(D0)
    feed.link(D1)
    feed.give(Prefill(a_request(1, 6), 0, D0, a_grant(7, (1, 2))))
    assert frames(feed.from_peer(D1, KvAbort(TransferId(7), 0, "not mine"))) == [KvAbortAck(TransferId(7), 0)]
    assert feed.engine._works[RequestId(1)].phase == "running"


def test_a_receiver_that_gives_up_twice_is_answered_twice() -> None:
    feed = EngineFeed(P0)
    feed.link(D0)
    feed.give(Prefill(a_request(1, 6), 0, D0, a_grant(7, (1, 2))))
    feed.finish_step()
    feed.from_peer(D0, KvAbort(TransferId(7), 0, "cancelled"))
    feed.from_peer(D0, KvAbort(TransferId(7), 0, "still waiting"))
    assert frames(feed.give(SendsDrained(TransferId(7), 0))) == [KvAbortAck(TransferId(7), 0)]
    assert frames(feed.from_peer(D0, KvAbort(TransferId(7), 0, "still waiting"))) == [KvAbortAck(TransferId(7), 0)]
