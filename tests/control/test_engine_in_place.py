"""Both halves of a handoff where prefill works in the decode worker's blocks."""

from __future__ import annotations

import msgspec
import pytest

from tests.control.feeding import D0, P0, EngineFeed, a_grant, a_request, frames, outputs, reports
from transload.control.messages import (
    Cancel,
    CancelSends,
    Grant,
    HandoffFailed,
    KvAbort,
    KvAbortAck,
    KvData,
    KvDone,
    KvReady,
    KvRenew,
    KvVerified,
    LayersReady,
    PeerLost,
    PeerUp,
    Prefill,
    PrefillSent,
    RequestId,
    Reserve,
    Reserved,
    Run,
    SendFrame,
    SendsDrained,
    Started,
    StepFailed,
    TimerFired,
    TransferId,
)

TRANSFER = TransferId(7)
ONE = RequestId(1)
WINDOW = 100


def prefiller() -> EngineFeed:
    feed = EngineFeed(P0, step_tokens=8)
    assert feed.give(PeerUp(D0, one_sided=True, link=4, window=WINDOW, window_blocks=16)) == []
    return feed


def decoder() -> EngineFeed:
    feed = EngineFeed(D0)
    assert feed.give(PeerUp(P0, one_sided=True, link=2, window=500, window_blocks=16)) == []
    return feed


def granted(blocks: tuple[int, ...], prefix: tuple[int, ...] = ()) -> Grant:
    return msgspec.structs.replace(a_grant(TRANSFER, blocks, len(prefix)), prefix=prefix, in_place=True)


def reserve(feed: EngineFeed, num_prompt: int, first: int) -> Reserved:
    request = a_request(1, num_prompt, first=first)
    (reserved,) = [event for event in reports(feed.give(Reserve(request, 0, P0))) if isinstance(event, Reserved)]
    return reserved


def test_a_prefill_works_in_the_receivers_blocks_from_behind_what_is_cached_there() -> None:
    feed = prefiller()
    commands = feed.give(Prefill(a_request(1, 18), 0, D0, granted((9, 3, 5, 1), prefix=(12,))))
    assert Started(P0, ONE, 0, 4) in reports(commands)
    assert feed.chunks == [(1, 4, 8, False)]
    assert feed.step is not None
    assert list(feed.step.chunks[0].blocks) == [WINDOW + block for block in (12, 9, 3, 5, 1)]
    assert feed.engine.pool.num_free == 16, "no block of our own is taken"
    assert feed.give(LayersReady(1, 0, 4)) == []
    feed.finish_step()
    commands = feed.finish_step()
    assert [token.token for token in outputs(commands)] == [1000]
    sends = [command for command in commands if isinstance(command, SendFrame)]
    assert [send.frame for send in sends] == [
        KvData(TRANSFER, 0, 0, 0, 4, 1, 5, 4 * 4 * 1024, in_place=True),
        KvDone(TRANSFER, 0, 1, (1000,)),
    ]
    assert all(send.link == 4 and send.source_blocks == () for send in sends)
    assert reports(feed.from_peer(D0, KvReady(TRANSFER, 0))) == [PrefillSent(P0, ONE, 0)]
    assert feed.engine.is_idle
    assert feed.engine.pool.num_cached == 0


def test_a_prompt_larger_than_our_own_pool_can_be_prefilled_in_place() -> None:
    feed = EngineFeed(P0, num_blocks=2)
    feed.give(PeerUp(D0, one_sided=True, window=WINDOW, window_blocks=16))
    feed.give(Prefill(a_request(1, 16), 0, D0, granted((0, 1, 2, 3))))
    assert feed.chunks == [(1, 0, 16, True)]


@pytest.mark.parametrize("grant", [granted((16,)), granted((3,), prefix=(-1,))])
def test_blocks_that_the_receiver_does_not_have_are_not_touched(grant: Grant) -> None:
    feed = prefiller()
    commands = feed.give(Prefill(a_request(1, 4 * len((*grant.prefix, *grant.blocks))), 0, D0, grant))
    assert reports(commands) == [HandoffFailed(P0, ONE, 0, "d0 grants blocks that it does not have")]
    assert feed.step is None


def test_blocks_of_a_receiver_that_lets_nobody_in_are_filled_by_copying() -> None:
    """It has run out of addresses for our pool, we have not for its own."""
    feed = prefiller()
    feed.give(Prefill(a_request(1, 6), 0, D0, a_grant(TRANSFER, (9, 3))))
    assert feed.step is not None
    assert list(feed.step.chunks[0].blocks) == [0, 1]
    (frame,) = frames(feed.give(LayersReady(1, 0, 4)))
    assert isinstance(frame, KvData)
    assert not frame.in_place


def test_blocks_that_we_cannot_reach_are_filled_by_copying_though_we_may_work_there() -> None:
    """We have run out of addresses for the receiver's pool."""
    feed = EngineFeed(P0, step_tokens=8)
    feed.link(D0)
    feed.give(Prefill(a_request(1, 10), 0, D0, granted((9, 3), prefix=(12,))))
    feed.give(LayersReady(1, 0, 4))
    feed.finish_step()
    (frame,) = frames(feed.give(LayersReady(2, 0, 4)))
    assert isinstance(frame, KvData)
    assert (frame.block_lo, frame.block_hi, frame.in_place) == (2, 3, False)


def test_a_receiver_says_whether_its_peer_may_work_in_its_blocks() -> None:
    assert reserve(decoder(), 10, first=100).grant.in_place
    feed = EngineFeed(D0)
    feed.link(P0)
    cached(feed)
    grant = reserve(feed, 10, first=100).grant
    assert (grant.in_place, grant.prefix, grant.first_block) == (False, (), 2)


def test_the_receiver_hears_that_nothing_is_written_only_when_the_step_has_returned() -> None:
    feed = prefiller()
    feed.give(Prefill(a_request(1, 6), 0, D0, granted((0, 1))))
    commands = feed.from_peer(D0, KvAbort(TRANSFER, 0, "cancelled"))
    assert frames(commands) == []
    assert CancelSends(D0, TRANSFER, 0, 4) not in commands
    commands = feed.finish_step()
    assert outputs(commands) == []
    assert CancelSends(D0, TRANSFER, 0, 4) in commands
    assert frames(feed.give(SendsDrained(TRANSFER, 0))) == [KvAbortAck(TRANSFER, 0)]
    assert feed.engine.is_idle


def test_a_link_lost_under_a_step_drops_what_the_step_has_drawn() -> None:
    feed = prefiller()
    feed.give(Prefill(a_request(1, 6), 0, D0, granted((0, 1))))
    (failed,) = reports(feed.give(PeerLost(D0)))
    assert isinstance(failed, HandoffFailed)
    assert outputs(feed.finish_step()) == []
    feed.give(SendsDrained(TRANSFER, 0))
    assert feed.engine.is_idle


def test_a_failed_step_gives_the_blocks_back_to_the_receiver_alone() -> None:
    feed = prefiller()
    feed.give(Prefill(a_request(1, 6), 0, D0, granted((0, 1))))
    feed.step = None
    (failed,) = reports(feed.give(StepFailed(1, "out of memory")))
    assert isinstance(failed, HandoffFailed)
    feed.give(SendsDrained(TRANSFER, 0))
    assert feed.engine.is_idle
    assert feed.engine.pool.num_free == 16


def cached(feed: EngineFeed) -> None:
    """Two blocks of a prompt that others share are in the cache."""
    feed.give(Run(a_request(9, 8, max_tokens=1, first=100), 0))
    feed.finish_step()


def test_the_receiver_names_its_prefix_and_keeps_back_a_block_for_the_last_token() -> None:
    feed = decoder()
    cached(feed)
    reserved = reserve(feed, 8, first=100)
    assert (reserved.grant.first_block, len(reserved.grant.blocks)) == (1, 1)
    assert len(reserved.grant.prefix) == 1
    frame = KvData(reserved.grant.transfer, 0, 0, 0, 4, 1, 2, 4096, in_place=True)
    assert feed.from_peer(P0, frame) == []
    commands = feed.from_peer(P0, KvDone(reserved.grant.transfer, 0, 1, (1000,)))
    assert any(isinstance(event, KvVerified) for event in reports(commands))


def test_what_a_peers_step_may_still_read_is_kept_until_it_says_that_it_is_done() -> None:
    feed = decoder()
    cached(feed)
    reserved = reserve(feed, 10, first=100)
    pool = feed.engine.pool
    feed.give(Cancel(ONE, 0))
    assert (pool.num_referenced, pool.num_quarantined) == (2, 1)
    feed.from_peer(P0, KvAbortAck(reserved.grant.transfer, 0))
    assert (pool.num_referenced, pool.num_quarantined, pool.num_cached) == (0, 0, 2)
    assert feed.engine.is_idle


def test_a_lost_peer_reads_no_more() -> None:
    feed = decoder()
    cached(feed)
    reserve(feed, 10, first=100)
    feed.give(Cancel(ONE, 0))
    feed.give(PeerLost(P0))
    assert feed.engine.pool.num_referenced == 0
    assert feed.engine.is_idle


def test_renewals_go_over_the_link_that_is_known() -> None:
    feed = decoder()
    reserved = reserve(feed, 10, first=100)
    (send,) = [command for command in feed.give(TimerFired("leases")) if isinstance(command, SendFrame)]
    assert (send.frame, send.link) == (KvRenew(reserved.grant.transfer, 0, 3000), 2)
