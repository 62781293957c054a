"""Permissions: who may write what, and that taking one back is final."""

from __future__ import annotations

import threading

import pytest

from transload.control.messages import ExpectKv, ForgetKv, KvData, TransferId, WorkerId
from transload.errors import HandoffError
from transload.transfer.permits import Permits

ALICE, BOB = WorkerId("alice"), WorkerId("bob")
ONE = TransferId(1)


def frame(low: int, high: int, *, transfer: int = 1, epoch: int = 1) -> KvData:
    return KvData(TransferId(transfer), epoch, 0, 0, 1, low, high, 0)


def test_a_permission_holds_for_one_peer_one_transfer_and_one_epoch() -> None:
    permits = Permits(10)
    permits.grant(ExpectKv(ONE, 1, ALICE, 0, (4, 5)))
    assert permits.find(frame(0, 1), ALICE) is not None
    assert permits.find(frame(0, 1), BOB) is None
    assert permits.find(frame(0, 1, epoch=2), ALICE) is None
    assert permits.find(frame(0, 1, transfer=2), ALICE) is None


def test_blocks_count_from_the_first_one_granted() -> None:
    permits = Permits(10)
    permits.grant(ExpectKv(ONE, 1, ALICE, 3, (7, 2, 9)))
    permit = permits.find(frame(3, 4), ALICE)
    assert permit is not None
    assert permit.blocks_of(frame(4, 6)) == (2, 9)
    for low, high in ((2, 4), (3, 7), (5, 5), (6, 4), (-1, 1)):
        with pytest.raises(HandoffError, match="granted"):
            permit.blocks_of(frame(low, high))


def test_blocks_that_the_pool_does_not_have_cannot_be_granted() -> None:
    with pytest.raises(HandoffError, match="outside"):
        Permits(10).grant(ExpectKv(ONE, 1, ALICE, 0, (10,)))
    with pytest.raises(HandoffError, match="outside"):
        Permits(10).grant(ExpectKv(ONE, 1, ALICE, 0, (-1,)))


def test_revoking_waits_for_the_write_under_way_and_forbids_the_next() -> None:
    permits = Permits(10)
    permits.grant(ExpectKv(ONE, 1, ALICE, 0, (1,)))
    permit = permits.find(frame(0, 1), ALICE)
    assert permit is not None
    revoked = threading.Event()

    def revoke() -> None:
        permits.revoke(ForgetKv(ONE, 1))
        revoked.set()

    with permit.lock:
        assert not permit.revoked
        thread = threading.Thread(target=revoke)
        thread.start()
        assert not revoked.wait(0.05)
    thread.join()
    assert permit.revoked
    assert permits.find(frame(0, 1), ALICE) is None
    assert len(permits) == 0


def test_a_second_grant_takes_the_place_of_the_first() -> None:
    permits = Permits(10)
    permits.grant(ExpectKv(ONE, 1, ALICE, 0, (1,)))
    first = permits.find(frame(0, 1), ALICE)
    permits.grant(ExpectKv(ONE, 1, ALICE, 0, (2,)))
    second = permits.find(frame(0, 1), ALICE)
    assert first is not None
    assert first.revoked
    assert second is not None
    assert second.blocks_of(frame(0, 1)) == (2,)


def test_revoking_what_was_never_granted_does_nothing() -> None:
    Permits(10).revoke(ForgetKv(ONE, 1))
