"""The decode worker's half of a handoff, fed by hand, in every phase in which something can go wrong."""

from __future__ import annotations

import pytest

from tests.control.feeding import D0, P0, P1, EngineFeed, a_request, outputs, reports
from transload.control.messages import (
    Cancel,
    EngineCommand,
    ExpectKv,
    ForgetKv,
    Frame,
    Grant,
    HandoffFailed,
    KvAbort,
    KvAbortAck,
    KvData,
    KvDone,
    KvReady,
    KvRenew,
    KvVerified,
    PeerLost,
    RequestFailed,
    RequestId,
    Reserve,
    Reserved,
    Run,
    SendFrame,
    SetTimer,
    Started,
    StepFailed,
    TimerFired,
    ToController,
    Token,
    TransferId,
)

TRANSFER = TransferId(7)
TICK = TimerFired("leases")
ONE = RequestId(1)


def reserve(feed: EngineFeed, num_prompt: int = 6, *, one_sided: bool = True, epoch: int = 0) -> Grant:
    feed.link(P0, one_sided=one_sided)
    (reserved,) = (
        event
        for event in reports(feed.give(Reserve(a_request(1, num_prompt), epoch, P0)))
        if isinstance(event, Reserved)
    )
    return reserved.grant


def data_of(grant: Grant, sequence: int = 0, layers: tuple[int, int] = (0, 4), epoch: int = 0) -> KvData:
    end = grant.first_block + len(grant.blocks)
    return KvData(grant.transfer, epoch, sequence, *layers, grant.first_block, end, 1024, 5)


def done_of(grant: Grant, num_frames: int = 1, epoch: int = 0) -> KvDone:
    return KvDone(grant.transfer, epoch, num_frames, (1000,))


def receive(feed: EngineFeed, grant: Grant) -> list[EngineCommand]:
    assert feed.from_peer(P0, data_of(grant), 5) == []
    return feed.from_peer(P0, done_of(grant))


def test_a_reservation_names_the_blocks_and_opens_them_to_the_sender() -> None:
    feed = EngineFeed(D0)
    feed.link(P0)
    request = a_request(1, 6)
    commands = feed.give(Reserve(request, 0, P0))
    grant = Grant(commands[0].transfer, (0, 1), 0, 3000)  # type: ignore[union-attr]
    assert commands == [
        ExpectKv(grant.transfer, 0, P0, 0, (0, 1)),
        SetTimer("leases", 1.0),
        ToController(Reserved(D0, request.id, 0, grant, 0)),
    ]


def test_a_verified_request_runs_from_the_token_that_the_sender_drew() -> None:
    feed = EngineFeed(D0)
    grant = reserve(feed)
    feed.now = 2.0
    assert feed.from_peer(P0, data_of(grant, 0, (0, 2)), 5) == []
    feed.now = 2.5
    assert feed.from_peer(P0, data_of(grant, 1, (2, 4)), 5) == []
    commands = feed.from_peer(P0, done_of(grant, num_frames=2))
    assert commands[:-1] == [
        ForgetKv(grant.transfer, 0),
        SendFrame(P0, KvReady(grant.transfer, 0)),
        ToController(KvVerified(D0, ONE, 0, 2048, 0.5, 2)),
        ToController(Started(D0, ONE, 0, 0)),
    ]
    assert feed.chunks == [(1, 6, 1, True)]
    assert feed.step is not None
    assert list(feed.step.chunks[0].tokens) == [*a_request(1, 6).prompt, 1000]
    assert outputs(feed.finish_step()) == [Token(ONE, 0, 1, 1001)]
    while feed.step is not None:
        feed.finish_step()
    assert feed.engine.is_idle


def test_what_is_cached_here_is_not_asked_for_again() -> None:
    feed = EngineFeed(D0)
    feed.give(Run(a_request(9, 8, max_tokens=1, first=100), 0))
    feed.finish_step()
    feed.link(P0)
    (reserved,) = reports(feed.give(Reserve(a_request(1, 10, first=100), 0, P0)))
    assert isinstance(reserved, Reserved)
    assert (reserved.grant.first_block, len(reserved.grant.blocks), reserved.num_cached_tokens) == (2, 1, 8)


def test_a_prompt_that_is_cached_as_a_whole_waits_for_the_last_word_alone() -> None:
    feed = EngineFeed(D0)
    feed.give(Run(a_request(9, 8, max_tokens=1, first=100), 0))
    feed.finish_step()
    feed.link(P0)
    (reserved,) = reports(feed.give(Reserve(a_request(1, 8, first=100), 0, P0)))
    assert isinstance(reserved, Reserved)
    assert reserved.grant.blocks == ()
    assert feed.chunks == []
    feed.from_peer(P0, KvDone(reserved.grant.transfer, 0, 0, (1000,)))
    assert feed.chunks == [(1, 8, 1, True)]


def test_a_full_decode_worker_reserves_when_it_has_room() -> None:
    feed = EngineFeed(D0, num_blocks=4)
    feed.link(P0)
    feed.give(Run(a_request(2, 8, max_tokens=2), 0))
    assert reports(feed.give(Reserve(a_request(1, 9), 0, P0))) == []
    feed.finish_step()
    assert any(isinstance(event, Reserved) for event in reports(feed.finish_step()))


def test_a_reservation_without_a_link_fails() -> None:
    feed = EngineFeed(D0)
    assert reports(feed.give(Reserve(a_request(1, 6), 0, P0))) == [HandoffFailed(D0, ONE, 0, "no link to p0")]
    assert feed.engine.is_idle


def test_a_reservation_that_can_never_fit_fails() -> None:
    feed = EngineFeed(D0, num_blocks=2)
    feed.link(P0)
    (failed,) = reports(feed.give(Reserve(a_request(1, 6, max_tokens=9), 0, P0)))
    assert failed == HandoffFailed(D0, ONE, 0, "needs 14 tokens of KV cache, d0 holds 8")


def test_a_changed_frame_fails_the_transfer_and_nothing_runs() -> None:
    feed = EngineFeed(D0)
    grant = reserve(feed)
    reason = "checksum of frame 0 is 0x6, sent as 0x5"
    assert feed.from_peer(P0, data_of(grant), 6) == [
        SendFrame(P0, KvAbort(grant.transfer, 0, reason)),
        ForgetKv(grant.transfer, 0),
        ToController(HandoffFailed(D0, ONE, 0, reason)),
    ]
    assert feed.step is None


@pytest.mark.parametrize("outputs", [(), (1000,), (1000, 1002, 1003), (1001, 1002), (1000, 1001, 1002, 1003)])
def test_a_sender_that_went_on_from_other_tokens_is_refused(outputs: tuple[int, ...]) -> None:
    feed = EngineFeed(D0)
    feed.link(P0)
    (reserved,) = reports(feed.give(Reserve(a_request(1, 6), 1, P0, outputs=(1000, 1001))))
    assert isinstance(reserved, Reserved)
    feed.from_peer(P0, data_of(reserved.grant, epoch=1), 5)
    (failed,) = reports(feed.from_peer(P0, KvDone(reserved.grant.transfer, 1, 1, outputs)))
    assert isinstance(failed, HandoffFailed)
    assert failed.reason == "p0 has not gone on from the tokens made so far"
    assert feed.step is None


def test_one_sided_blocks_are_nobodys_until_the_sender_has_stopped_writing() -> None:
    feed = EngineFeed(D0)
    grant = reserve(feed)
    feed.from_peer(P0, data_of(grant), 6)
    assert feed.engine.pool.num_quarantined == 2
    assert not feed.engine.is_idle
    assert feed.from_peer(P0, KvAbortAck(TransferId(1), 0)) == []  # of another transfer
    assert feed.from_peer(P0, KvAbortAck(grant.transfer, 1)) == []  # of another epoch
    assert feed.engine.pool.num_quarantined == 2
    assert feed.from_peer(P0, KvAbortAck(grant.transfer, 0)) == []
    assert feed.engine.pool.num_quarantined == 0
    assert feed.engine.is_idle


def test_an_acknowledgement_from_another_peer_does_not_free_the_blocks() -> None:
    feed = EngineFeed(D0)
    grant = reserve(feed)
    feed.link(P1)
    feed.give(Cancel(ONE, 0))
    feed.from_peer(P1, KvAbortAck(grant.transfer, 0))
    assert feed.engine.pool.num_quarantined == 2


def test_the_acknowledgement_is_asked_for_until_it_comes() -> None:
    feed = EngineFeed(D0)
    grant = reserve(feed)
    feed.give(Cancel(ONE, 0))
    again = SendFrame(P0, KvAbort(grant.transfer, 0, "still waiting for the acknowledgement"))
    for _ in range(5):
        assert feed.give(TICK) == [again, SetTimer("leases", 1.0)]
    feed.from_peer(P0, KvAbortAck(grant.transfer, 0))
    assert feed.give(TICK) == []


def test_blocks_that_the_receiver_fills_itself_are_free_at_once() -> None:
    feed = EngineFeed(D0)
    reserve(feed, one_sided=False)
    feed.give(Cancel(ONE, 0))
    assert feed.engine.is_idle
    assert feed.engine.pool.num_free == 16


def test_a_shared_prefix_is_not_put_aside_with_the_blocks_of_a_transfer() -> None:
    feed = EngineFeed(D0)
    feed.give(Run(a_request(9, 8, max_tokens=1, first=100), 0))
    feed.finish_step()
    feed.link(P0)
    feed.give(Reserve(a_request(1, 10, first=100), 0, P0))
    feed.give(Cancel(ONE, 0))
    assert (feed.engine.pool.num_cached, feed.engine.pool.num_quarantined) == (2, 1)


def test_frames_of_another_epoch_change_nothing() -> None:
    feed = EngineFeed(D0)
    grant = reserve(feed, epoch=2)
    for epoch in (1, 3):
        assert feed.from_peer(P0, data_of(grant, epoch=epoch), 5) == []
        assert feed.from_peer(P0, done_of(grant, epoch=epoch)) == []
    assert feed.step is None
    assert feed.engine.exchange.num_late_frames == 4


def test_frames_of_another_peer_change_nothing() -> None:
    feed = EngineFeed(D0)
    grant = reserve(feed)
    feed.link(P1)
    feed.from_peer(P1, data_of(grant), 5)
    feed.from_peer(P1, done_of(grant))
    assert feed.step is None


def test_frames_after_the_end_are_counted_and_dropped() -> None:
    feed = EngineFeed(D0)
    grant = reserve(feed)
    receive(feed, grant)
    assert feed.from_peer(P0, data_of(grant), 6) == []
    assert feed.from_peer(P0, done_of(grant)) == []
    assert feed.engine.exchange.num_late_frames == 2


def test_a_silent_sender_is_given_up_after_a_lease() -> None:
    feed = EngineFeed(D0)
    grant = reserve(feed)
    renewal = SendFrame(P0, KvRenew(grant.transfer, 0, 3000))
    for _ in range(3):
        assert feed.give(TICK) == [renewal, SetTimer("leases", 1.0)]
    commands = feed.give(TICK)
    assert reports(commands) == [HandoffFailed(D0, ONE, 0, "no sign of life from p0 for 3 s")]
    assert SendFrame(P0, KvAbort(grant.transfer, 0, "lease expired")) in commands


@pytest.mark.parametrize("sign", ["renewal", "cells", "last word"])
def test_any_frame_of_a_sender_is_a_sign_of_life(sign: str) -> None:
    feed = EngineFeed(D0)
    grant = reserve(feed)
    frame: Frame = KvRenew(grant.transfer, 0, 3000)
    if sign == "cells":
        frame = data_of(grant, layers=(0, 2))
    elif sign == "last word":
        frame = done_of(grant, num_frames=9)
    for _ in range(9):
        feed.give(TICK)
        feed.from_peer(P0, frame, 5)
    assert feed.engine._works[ONE].phase == "receiving"


def test_a_clock_that_jumps_ends_no_lease() -> None:
    feed = EngineFeed(D0)
    reserve(feed)
    feed.now = 1e9
    feed.give(TICK)
    feed.now = -1e9
    feed.give(TICK)
    assert feed.engine._works[ONE].phase == "receiving"


def test_a_lost_link_fails_what_was_coming_over_it_and_ends_its_quarantine() -> None:
    feed = EngineFeed(D0)
    reserve(feed)
    feed.give(Reserve(a_request(2, 6), 0, P0))
    feed.give(Cancel(RequestId(2), 0))
    assert feed.engine.pool.num_quarantined == 2
    assert reports(feed.give(PeerLost(P0))) == [HandoffFailed(D0, ONE, 0, "lost the link to p0")]
    assert feed.engine.is_idle
    assert feed.engine.pool.num_free == 16


def test_a_lost_link_does_not_touch_what_has_been_verified() -> None:
    feed = EngineFeed(D0)
    receive(feed, reserve(feed))
    assert reports(feed.give(PeerLost(P0))) == []
    while feed.step is not None:
        last = outputs(feed.finish_step())
    assert last == [Token(ONE, 0, 3, 1003, "length")]


def test_a_step_that_fails_after_a_handoff_is_no_failure_of_the_handoff() -> None:
    feed = EngineFeed(D0)
    receive(feed, reserve(feed))
    assert feed.step is not None
    number, feed.step = feed.step.step, None
    assert reports(feed.give(StepFailed(number, "bug"))) == [RequestFailed(D0, ONE, 0, "bug")]


def test_blocks_that_came_are_named_to_the_next_step_until_one_succeeds() -> None:
    feed = EngineFeed(D0)
    grant = reserve(feed)
    receive(feed, grant)
    assert feed.arrived == grant.blocks
    assert feed.step is not None
    number, feed.step = feed.step.step, None
    feed.give(StepFailed(number, "bug"))  # the executor may not have fetched them, and the cache still has them
    feed.give(Run(a_request(2, 6, max_tokens=2, first=100), 0))
    assert feed.chunks == [(2, 4, 2, True)]
    assert feed.arrived == grant.blocks
    feed.finish_step()
    assert feed.arrived == ()


def test_a_request_that_was_handed_over_may_be_preempted_and_computes_itself_anew() -> None:
    feed = EngineFeed(D0, num_blocks=6)
    feed.give(Run(a_request(2, 8, max_tokens=12), 0))
    receive(feed, reserve(feed, 8))
    tokens: list[Token] = []
    while feed.step is not None:
        tokens += outputs(feed.finish_step())
    assert [token.index for token in tokens if token.request == 1] == [1, 2, 3]
    assert feed.engine.is_idle
