"""Frames on a stream: what is read is what was written, or an error."""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transload.control.messages import KvCredit, KvDone, TransferId
from transload.errors import HandoffError
from transload.transfer.wire import (
    MAX_HEADER_BYTES,
    EndOfStream,
    FrameReader,
    FrameWriter,
    Header,
    Ping,
    Stopped,
    drop_front,
    encode,
    pack,
    prepare,
)

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = socket.socketpair()
    for sock in (left, right):
        prepare(sock)
    with left, right:
        yield left, right


def reader(sock: socket.socket, stall_seconds: float = 20.0) -> FrameReader:
    return FrameReader(sock, stall_seconds, lambda: False)


def test_a_frame_arrives_as_it_was_sent(pair: Pair) -> None:
    frames: list[Header] = [
        KvDone(TransferId(2**64 - 1), 3, 4, tuple(range(70_000))),
        KvCredit(TransferId(1), 2, 3),
        Ping(5),
    ]
    writer = threading.Thread(
        target=lambda: FrameWriter(pair[0], 20.0, lambda: False).write([encode(frame) for frame in frames])
    )
    writer.start()
    incoming = reader(pair[1])
    assert [incoming.read_header() for _ in frames] == [(frame, 0) for frame in frames]
    writer.join()


def test_payload_is_read_into_place_or_dropped(pair: Pair) -> None:
    payload = os.urandom(100_000)
    first, second = encode(Ping(1), len(payload)), encode(Ping(2))
    writer = threading.Thread(
        target=lambda: FrameWriter(pair[0], 20.0, lambda: False).write(
            [first, *(payload[i : i + 1000] for i in range(0, len(payload), 1000)), first, payload, second]
        )
    )
    writer.start()
    incoming = reader(pair[1])
    assert incoming.read_header() == (Ping(1), len(payload))
    arrived = bytearray(len(payload))
    incoming.read(memoryview(arrived))
    assert arrived == payload
    assert incoming.read_header() == (Ping(1), len(payload))
    incoming.discard(len(payload))
    assert incoming.read_header() == (Ping(2), 0)
    writer.join()


@pytest.mark.parametrize("position", range(len(encode(KvCredit(TransferId(9), 2, 3)))))
def test_a_changed_byte_anywhere_in_a_header_is_noticed(pair: Pair, position: int) -> None:
    frame = bytearray(encode(KvCredit(TransferId(9), 2, 3)))
    frame[position] ^= 0x10
    pair[0].sendall(frame)
    pair[0].shutdown(socket.SHUT_WR)
    with pytest.raises((HandoffError, EndOfStream)):
        reader(pair[1]).read_header()


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_frame(pair: Pair, seed: int) -> None:
    pair[0].sendall(random.Random(seed).randbytes(300))
    pair[0].shutdown(socket.SHUT_WR)
    with pytest.raises((HandoffError, EndOfStream)):
        reader(pair[1]).read_header()


def test_a_well_packed_header_of_no_known_frame_is_refused(pair: Pair) -> None:
    for header in (b"\x93\xa7Unknown\x01\x02", b"\xc1", b"\x92\xa8KvCredit\xa1x", b"\x92\xa8KvCredit\xa1\xff"):
        pair[0].sendall(pack(header))
        with pytest.raises(HandoffError, match="cannot be read"):
            reader(pair[1]).read_header()


def test_a_header_longer_than_any_is_refused_on_both_sides(pair: Pair) -> None:
    with pytest.raises(HandoffError, match="at most"):
        pack(bytes(MAX_HEADER_BYTES + 1))
    pair[0].sendall(b"\xff\xff\xff\x7f" + bytes(12))
    with pytest.raises(HandoffError, match="announces a header of"):
        reader(pair[1]).read_header()


def test_a_peer_that_stops_in_the_middle_of_a_frame_is_given_up(pair: Pair) -> None:
    pair[0].sendall(encode(Ping(1))[:10])
    with pytest.raises(HandoffError, match="in the middle of a frame"):
        reader(pair[1], stall_seconds=0.05).read_header()


def test_a_peer_that_reads_nothing_is_given_up(pair: Pair) -> None:
    with pytest.raises(HandoffError, match="has read nothing"):
        FrameWriter(pair[0], 0.05, lambda: False).write([bytes(10_000_000)])


def test_a_writer_and_a_reader_that_are_told_to_stop_do(pair: Pair) -> None:
    with pytest.raises(Stopped):
        FrameWriter(pair[0], 20.0, lambda: True).write([bytes(10_000_000)])
    with pytest.raises(Stopped):
        FrameReader(pair[1], 20.0, lambda: True).discard(10_000_000)


def test_the_end_of_the_stream_is_seen_between_frames_and_inside_one(pair: Pair) -> None:
    pair[0].sendall(encode(Ping(1)) + encode(Ping(2))[:5])
    pair[0].shutdown(socket.SHUT_WR)
    incoming = reader(pair[1])
    assert incoming.read_header() == (Ping(1), 0)
    for _ in range(2):
        with pytest.raises(EndOfStream):
            incoming.read_header()


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(0, 80))
def test_dropping_the_front_leaves_the_rest(lengths: list[int], num_bytes: int) -> None:
    whole = bytes(range(sum(lengths)))
    buffers: list[memoryview] = []
    for length in lengths:
        start = sum(map(len, buffers))
        buffers.append(memoryview(whole)[start : start + length])
    num_bytes = min(num_bytes, len(whole))
    drop_front(buffers, num_bytes)
    assert b"".join(buffers) == whole[num_bytes:]


def test_small_parts_wait_for_company_but_keep_their_order(pair: Pair) -> None:
    writer = FrameWriter(pair[0], 20.0, lambda: False)

    def arrived() -> bytes:
        try:
            return pair[1].recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return b""

    writer.hold(b"a")
    writer.hold(b"b")
    assert arrived() == b""
    writer.write([b"c", b"d"])
    assert arrived() == b"abcd"
    writer.hold(b"e")
    writer.flush()
    assert arrived() == b"e"
    for _ in range(8):
        writer.hold(b"f")
    assert arrived() == b"f" * 8
    writer.hold(b"g", for_bytes=1 << 23)  # it announces a lot
    assert arrived() == b"g"
    writer.flush()
    assert arrived() == b""
