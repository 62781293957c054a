"""The prefill worker's half of a handoff, fed by hand, in every phase in which something can go wrong."""

from __future__ import annotations

from tests.control.feeding import D0, P0, EngineFeed, a_grant, a_request, frames, outputs, reports
from transload.control.messages import (
    Cancel,
    CancelSends,
    EngineCommand,
    HandoffFailed,
    KvAbort,
    KvAbortAck,
    KvData,
    KvDone,
    KvReady,
    KvRenew,
    LayersReady,
    PeerLost,
    Prefill,
    PrefillSent,
    RequestId,
    Run,
    SendFrame,
    SendsDrained,
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


def prefill(feed: EngineFeed, num_prompt: int = 6, *, first_block: int = 0, epoch: int = 0) -> list[EngineCommand]:
    feed.link(D0)
    num_blocks = -(-num_prompt // 4) - first_block
    grant = a_grant(TRANSFER, range(30, 30 + num_blocks), first_block)
    return feed.give(Prefill(a_request(1, num_prompt), epoch, D0, grant))


def test_a_prefill_tells_the_receiver_at_once_and_streams_layer_by_layer() -> None:
    feed = EngineFeed(P0)
    commands = prefill(feed, 6)
    assert commands[:-1] == [
        SendFrame(D0, KvRenew(TRANSFER, 0, 3000)),
        SetTimer("leases", 1.0),
        ToController(Started(P0, ONE, 0, 0)),
    ]
    assert feed.step is not None
    assert feed.step.chunks[0].streams
    assert feed.give(LayersReady(1, 0, 2)) == [
        SendFrame(D0, KvData(TRANSFER, 0, 0, 0, 2, 0, 2, 4096), (0, 1), (30, 31))
    ]
    assert feed.give(LayersReady(1, 2, 4)) == [
        SendFrame(D0, KvData(TRANSFER, 0, 1, 2, 4, 0, 2, 4096), (0, 1), (30, 31))
    ]
    commands = feed.finish_step()
    assert outputs(commands) == [Token(ONE, 0, 0, 1000)]
    assert frames(commands) == [KvDone(TRANSFER, 0, 2, (1000,))]
    assert feed.engine.pool.num_referenced == 2  # held until the receiver has verified them
    assert reports(feed.from_peer(D0, KvReady(TRANSFER, 0))) == [PrefillSent(P0, ONE, 0)]
    assert feed.engine.is_idle
    assert feed.engine.pool.num_cached == 1


def test_chunks_send_whole_blocks_and_the_last_one_the_rest() -> None:
    feed = EngineFeed(P0, step_tokens=8)
    prefill(feed, 14, first_block=1)
    seen: list[tuple[int, int]] = []
    copied: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    while feed.step is not None:
        for command in feed.give(LayersReady(feed.step.step, 0, 4)):
            assert isinstance(command, SendFrame)
            assert isinstance(command.frame, KvData)
            seen.append((command.frame.block_lo, command.frame.block_hi))
            copied.append((command.source_blocks, command.target_blocks))
        feed.finish_step()
    assert seen == [(1, 2), (2, 4)]
    assert copied == [((1,), (30,)), ((2, 3), (31, 32))]  # our blocks 0 to 3; theirs begin at the request's second


def test_a_receiver_that_has_more_than_this_worker_gets_only_the_rest() -> None:
    feed = EngineFeed(P0, step_tokens=4)
    prefill(feed, 12, first_block=2)
    seen: list[tuple[int, int]] = []
    while feed.step is not None:
        seen += [
            (frame.block_lo, frame.block_hi)
            for frame in frames(feed.give(LayersReady(feed.step.step, 0, 4)))
            if isinstance(frame, KvData)
        ]
        feed.finish_step()
    assert seen == [(2, 3)]


def test_what_is_cached_here_is_sent_with_the_first_chunk() -> None:
    feed = EngineFeed(P0)
    feed.give(Run(a_request(9, 8, max_tokens=1, first=100), 0))
    feed.finish_step()
    prefill(feed, 10)
    assert feed.chunks == [(1, 8, 2, True)]
    (frame,) = frames(feed.give(LayersReady(2, 0, 4)))
    assert isinstance(frame, KvData)
    assert (frame.block_lo, frame.block_hi) == (0, 3)


def test_a_text_that_ends_with_its_first_token_is_not_handed_over() -> None:
    feed = EngineFeed(P0)
    feed.link(D0)
    feed.give(Prefill(a_request(1, 6, max_tokens=1), 0, D0, a_grant(TRANSFER, (30, 31))))
    feed.give(LayersReady(1, 0, 4))
    commands = feed.finish_step()
    assert outputs(commands) == [Token(ONE, 0, 0, 1000, "length")]
    assert CancelSends(D0, TRANSFER, 0) in commands
    assert frames(commands) == []
    assert feed.from_peer(D0, KvAbort(TRANSFER, 0, "cancelled")) == []  # it drains: the answer comes after that
    assert feed.give(SendsDrained(TRANSFER, 0)) == [SendFrame(D0, KvAbortAck(TRANSFER, 0))]
    assert feed.engine.is_idle


def test_sent_blocks_stay_until_nothing_reads_them_any_more() -> None:
    feed = EngineFeed(P0)
    prefill(feed)
    feed.give(LayersReady(1, 0, 4))
    feed.finish_step()
    assert feed.give(Cancel(ONE, 0)) == [CancelSends(D0, TRANSFER, 0)]
    assert feed.engine.pool.num_referenced == 2
    assert feed.give(SendsDrained(TRANSFER, 0)) == []
    assert feed.engine.is_idle
    assert feed.give(SendsDrained(TRANSFER, 0)) == []


def test_a_cancel_in_a_step_lets_the_step_return_before_anything_is_drained() -> None:
    feed = EngineFeed(P0)
    prefill(feed)
    feed.give(LayersReady(1, 0, 2))
    assert feed.give(Cancel(ONE, 0)) == []
    assert feed.give(LayersReady(1, 2, 4)) == []  # nothing more is sent
    assert feed.finish_step() == [CancelSends(D0, TRANSFER, 0)]
    assert feed.engine.pool.num_referenced == 2
    feed.give(SendsDrained(TRANSFER, 0))
    assert feed.engine.is_idle


def test_a_cancelled_prefill_that_waits_for_blocks_leaves() -> None:
    feed = EngineFeed(P0, num_blocks=3)
    feed.give(Run(a_request(9, 8, max_tokens=4), 0))
    prefill(feed, 8)
    assert feed.engine._works[ONE].phase == "waiting"
    feed.give(Cancel(ONE, 0))
    feed.give(SendsDrained(TRANSFER, 0))
    while feed.step is not None:
        feed.finish_step()
    assert feed.engine.is_idle


def test_a_failed_step_fails_the_handoff() -> None:
    feed = EngineFeed(P0)
    prefill(feed)
    feed.step = None
    commands = feed.give(StepFailed(1, "bug"))
    assert reports(commands) == [HandoffFailed(P0, ONE, 0, "bug")]
    assert CancelSends(D0, TRANSFER, 0) in commands
    feed.give(SendsDrained(TRANSFER, 0))
    assert feed.engine.is_idle


def test_a_receiver_that_gives_up_ends_the_prefill_and_hears_when_writes_have_stopped() -> None:
    feed = EngineFeed(P0)
    prefill(feed)
    feed.give(LayersReady(1, 0, 4))
    feed.finish_step()
    commands = feed.from_peer(D0, KvAbort(TRANSFER, 0, "lease expired"))
    assert reports(commands) == [HandoffFailed(P0, ONE, 0, "d0 gave up: lease expired")]
    assert frames(commands) == []
    assert frames(feed.give(SendsDrained(TRANSFER, 0))) == [KvAbortAck(TRANSFER, 0)]
    assert frames(feed.from_peer(D0, KvAbort(TRANSFER, 0, "again"))) == [KvAbortAck(TRANSFER, 0)]


def test_a_receiver_that_gives_up_during_a_step_is_answered_after_it() -> None:
    feed = EngineFeed(P0)
    prefill(feed)
    feed.give(LayersReady(1, 0, 4))
    assert frames(feed.from_peer(D0, KvAbort(TRANSFER, 0, "cancelled"))) == []
    assert feed.finish_step() == [CancelSends(D0, TRANSFER, 0)]
    assert frames(feed.give(SendsDrained(TRANSFER, 0))) == [KvAbortAck(TRANSFER, 0)]


def test_an_abort_that_overtakes_its_prefill_withdraws_it() -> None:
    feed = EngineFeed(P0)
    feed.link(D0)
    assert frames(feed.from_peer(D0, KvAbort(TRANSFER, 0, "cancelled"))) == [KvAbortAck(TRANSFER, 0)]
    reason = "the receiver has withdrawn the transfer"
    assert prefill(feed) == [ToController(HandoffFailed(P0, ONE, 0, reason))]
    assert feed.engine.is_idle


def test_a_prefill_without_a_link_fails() -> None:
    feed = EngineFeed(P0)
    commands = feed.give(Prefill(a_request(1, 6), 0, D0, a_grant(TRANSFER, (30, 31))))
    assert commands == [ToController(HandoffFailed(P0, ONE, 0, "no link to d0"))]


def test_a_silent_receiver_is_given_up_after_a_lease() -> None:
    feed = EngineFeed(P0)
    prefill(feed)
    for _ in range(3):
        assert frames(feed.give(TICK)) == [KvRenew(TRANSFER, 0, 3000)]
    commands = feed.give(TICK)
    assert reports(commands) == [HandoffFailed(P0, ONE, 0, "no sign of life from d0 for 3 s")]


def test_a_sender_that_has_sent_all_says_nothing_more_and_waits_a_lease() -> None:
    feed = EngineFeed(P0)
    prefill(feed)
    feed.give(LayersReady(1, 0, 4))
    feed.finish_step()
    for _ in range(3):
        assert feed.give(TICK) == [SetTimer("leases", 1.0)]
    assert reports(feed.give(TICK)) == [HandoffFailed(P0, ONE, 0, "no sign of life from d0 for 3 s")]
    assert not feed.engine.is_idle
    feed.give(SendsDrained(TRANSFER, 0))
    assert feed.engine.is_idle


def test_a_lease_is_as_long_as_the_receiver_says() -> None:
    feed = EngineFeed(P0, lease_seconds=30.0)
    feed.link(D0)
    commands = feed.give(Prefill(a_request(1, 6), 0, D0, a_grant(TRANSFER, (30, 31), lease_ms=750)))
    assert SetTimer("leases", 0.25) in commands
    assert SendFrame(D0, KvRenew(TRANSFER, 0, 750)) in commands


def test_a_lost_link_fails_what_was_going_over_it() -> None:
    feed = EngineFeed(P0)
    prefill(feed)
    feed.give(LayersReady(1, 0, 4))
    feed.finish_step()
    commands = feed.give(PeerLost(D0))
    assert reports(commands) == [HandoffFailed(P0, ONE, 0, "lost the link to d0")]
    assert CancelSends(D0, TRANSFER, 0) in commands
    feed.give(SendsDrained(TRANSFER, 0))
    assert feed.engine.is_idle


def test_a_link_lost_during_a_step_fails_the_handoff_and_frees_the_blocks_after_it() -> None:
    feed = EngineFeed(P0)
    prefill(feed)
    assert reports(feed.give(PeerLost(D0))) == [HandoffFailed(P0, ONE, 0, "lost the link to d0")]
    assert feed.engine.pool.num_referenced == 2
    assert feed.finish_step() == [CancelSends(D0, TRANSFER, 0)]
    feed.give(SendsDrained(TRANSFER, 0))
    assert feed.engine.is_idle


def test_a_link_lost_while_draining_changes_nothing() -> None:
    feed = EngineFeed(P0)
    prefill(feed)
    feed.give(LayersReady(1, 0, 4))
    feed.finish_step()
    feed.give(Cancel(ONE, 0))
    assert feed.give(PeerLost(D0)) == []
    feed.give(SendsDrained(TRANSFER, 0))
    assert feed.engine.is_idle


def test_ready_counts_only_when_all_was_sent() -> None:
    feed = EngineFeed(P0)
    prefill(feed)
    assert feed.from_peer(D0, KvReady(TRANSFER, 0)) == []
    assert feed.engine._works[ONE].phase == "running"


def test_a_recovered_request_hands_over_all_tokens_it_has() -> None:
    feed = EngineFeed(P0)
    feed.link(D0)
    feed.give(Prefill(a_request(1, 6), 1, D0, a_grant(TRANSFER, (30, 31)), outputs=(1000, 1001)))
    assert feed.chunks == [(1, 0, 8, True)]
    (frame,) = frames(feed.finish_step())
    assert frame == KvDone(TRANSFER, 1, 0, (1000, 1001, 1002))
