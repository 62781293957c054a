"""A peer that has proved itself and then breaks the protocol: the link ends, and our memory is as it was."""

from __future__ import annotations

import random
import socket
import struct
import time

import msgspec
import numpy as np
import pytest

from tests.transfer.rig import LARGE, SMALL, RawPeer, Worker
from transload.control.messages import (
    ExpectKv,
    KvCredit,
    KvData,
    KvDone,
    PeerFrame,
    PeerLost,
    TransferId,
    WorkerId,
)
from transload.transfer.link import LinkOptions
from transload.transfer.links import LinkFailed
from transload.transfer.wire import TRAILER, Header, encode, pack

RAW = WorkerId("raw")
GOOD = KvData(TransferId(1), 1, 0, 0, 1, 5, 7, 2 * SMALL.cell_bytes)
change = msgspec.structs.replace


def expect(worker: Worker) -> None:
    """Blocks 3, 8 and 4 for the transfer's blocks 5, 6 and 7."""
    worker.links.expect(ExpectKv(TransferId(1), 1, RAW, 5, (3, 8, 4)))


def payload(frame: KvData) -> bytes:
    return bytes(max(0, frame.num_bytes)) + TRAILER.pack(0)


def assert_link_ends(worker: Worker, reason: str) -> None:
    failed = worker.next()
    assert isinstance(failed, LinkFailed), failed
    assert failed.peer == RAW
    assert reason in failed.reason
    assert worker.next() == PeerLost(RAW)


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (change(GOOD, block_lo=4, block_hi=6), "which were granted"),
        (change(GOOD, block_lo=7, block_hi=9), "which were granted"),
        (change(GOOD, block_lo=-3, block_hi=-1), "which were granted"),
        (change(GOOD, block_lo=7, block_hi=5), "names no cells"),
        (change(GOOD, block_lo=5, block_hi=5, num_bytes=0), "names no cells"),
        (change(GOOD, layer_lo=2, layer_hi=4, num_bytes=4 * SMALL.cell_bytes), "names no cells"),
        (change(GOOD, layer_lo=-1, layer_hi=0), "names no cells"),
        (change(GOOD, layer_lo=1, layer_hi=1, num_bytes=0), "names no cells"),
        (change(GOOD, num_bytes=2 * SMALL.cell_bytes - 1), "says 511 bytes for 1 x 2 cells"),
        (change(GOOD, block_hi=5 + 10**12, num_bytes=10**12 * SMALL.cell_bytes), ""),
    ],
)
@pytest.mark.parametrize("one_sided", [False, True])
def test_cells_outside_the_permission_or_the_layout_end_the_link(frame: KvData, reason: str, one_sided: bool) -> None:
    with Worker("a") as worker, RawPeer(worker, one_sided=one_sided) as raw:
        worker.fill(1)
        before = worker.blocks.copy()
        expect(worker)
        try:
            if one_sided:
                raw.sock.sendall(encode(frame))
            else:
                announced = min(len(payload(GOOD)) if frame.num_bytes > 10**6 else len(payload(frame)), 10**6)
                raw.sock.sendall(encode(frame, announced) + bytes(announced))
        except OSError:
            pass  # the worker had seen enough
        if one_sided:
            raw.sock.shutdown(socket.SHUT_WR)
        assert_link_ends(worker, reason)
        assert np.array_equal(worker.blocks, before)


@pytest.mark.parametrize("payload_bytes", [0, 2 * SMALL.cell_bytes, 2 * SMALL.cell_bytes + 9, 2**32 - 1])
def test_a_payload_that_does_not_fit_its_frame_ends_the_link(payload_bytes: int) -> None:
    with Worker("a") as worker, RawPeer(worker) as raw:
        before = worker.blocks.copy()
        expect(worker)
        raw.sock.sendall(encode(GOOD, payload_bytes))
        assert_link_ends(worker, f"comes with {payload_bytes} bytes, not {2 * SMALL.cell_bytes + 8}")
        assert np.array_equal(worker.blocks, before)


def test_a_payload_on_a_link_that_carries_none_ends_the_link() -> None:
    with Worker("a") as worker, RawPeer(worker, one_sided=True) as raw:
        expect(worker)
        raw.sock.sendall(encode(GOOD, 8) + bytes(8))
        raw.sock.shutdown(socket.SHUT_WR)
        assert_link_ends(worker, "on a link that carries none")


@pytest.mark.parametrize("frame", [KvDone(TransferId(1), 1, 1, ()), KvCredit(TransferId(1), 1, 1)])
def test_a_payload_with_a_control_frame_ends_the_link(frame: Header) -> None:
    with Worker("a") as worker, RawPeer(worker) as raw:
        raw.sock.sendall(encode(frame, 4) + bytes(4))
        assert_link_ends(worker, "comes with 4 bytes of payload")


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("one_sided", [False, True])
def test_noise_ends_the_link_and_writes_nothing(seed: int, one_sided: bool) -> None:
    shuffled = random.Random(seed)
    with Worker("a") as worker, RawPeer(worker, one_sided=one_sided) as raw:
        worker.fill(1)
        before = worker.blocks.copy()
        expect(worker)
        noise = shuffled.randbytes(shuffled.randrange(17, 5000))
        if seed % 2:
            noise = pack(noise[:100]) + noise
        try:
            raw.sock.sendall(noise)
            raw.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the worker had seen enough
        assert_link_ends(worker, "header")
        assert np.array_equal(worker.blocks, before)


def test_an_endless_header_ends_the_link_before_it_is_read() -> None:
    with Worker("a") as worker, RawPeer(worker) as raw:
        raw.sock.sendall(struct.pack("<IIQ", 2**31, 0, 0))
        assert_link_ends(worker, "announces a header of 2147483648 bytes")


def test_a_transfer_broken_off_in_the_middle_of_a_frame_ends_the_link() -> None:
    with Worker("a") as worker, RawPeer(worker) as raw:
        expect(worker)
        raw.sock.sendall(encode(GOOD, len(payload(GOOD))) + b"\xee" * 300)
        raw.sock.close()
        assert worker.next() == PeerLost(RAW)
        changed = {int(block) for block in np.flatnonzero(worker.blocks.any(axis=(1, 2)))}
        assert changed <= {3, 8}


def test_a_peer_that_stalls_in_the_middle_of_a_frame_is_given_up() -> None:
    with Worker("a", options=LinkOptions(stall_seconds=0.1)) as worker, RawPeer(worker) as raw:
        expect(worker)
        raw.sock.sendall(encode(GOOD, len(payload(GOOD))) + b"\xee" * 300)
        assert_link_ends(worker, "stopped in the middle of a frame for 0.1 s")


def test_a_wrong_checksum_reaches_the_engine_as_such() -> None:
    for one_sided in (False, True):
        with Worker("a") as worker, RawPeer(worker, one_sided=one_sided) as raw:
            expect(worker)
            worker.fill(1)
            if one_sided:
                raw.sock.sendall(encode(change(GOOD, checksum=12345)))
            else:
                raw.sock.sendall(encode(GOOD, len(payload(GOOD))) + bytes(GOOD.num_bytes) + TRAILER.pack(12345))
            event = worker.next()
            assert isinstance(event, PeerFrame)
            assert event.frame == change(GOOD, checksum=12345)
            assert event.arrived_checksum not in (0, 12345)


def test_a_peer_that_closes_while_much_is_on_its_way_is_lost_once() -> None:
    with Worker("a", layout=LARGE) as worker, RawPeer(worker) as raw:
        frame = KvData(TransferId(9), 1, 0, 0, 1, 0, 1, LARGE.cell_bytes)
        raw.sock.sendall(b"".join(encode(frame, LARGE.cell_bytes + 8) + bytes(LARGE.cell_bytes + 8) for _ in range(30)))
        raw.sock.close()
        events = [worker.next()]
        while events[-1] != PeerLost(RAW):
            events.append(worker.next())
        assert all(isinstance(event, PeerFrame) and event.arrived_checksum == 0 for event in events[:-1])
        assert worker.events.empty()


def test_a_peer_that_shares_memory_is_not_lost_for_breaking_the_protocol_before_it_lets_go() -> None:
    with Worker("a") as worker, RawPeer(worker, one_sided=True) as raw:
        raw.sock.sendall(b"\xff" * 100)
        assert isinstance(worker.next(), LinkFailed)
        raw.sock.sendall(b"\xff" * 100_000)  # read, so that a peer in the middle of sending can come to its end
        time.sleep(0.3)
        assert worker.events.empty()
        raw.sock.shutdown(socket.SHUT_WR)
        assert worker.next() == PeerLost(RAW)
