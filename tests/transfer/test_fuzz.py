"""Frames between workers that are well packed and mean harm, and damaged streams of feed-forward calls."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable
from random import Random

import msgspec
import numpy as np
import pytest

from tests.mutations import EXTREMES, mutations
from tests.transfer.rig import SMALL, RawPeer, Worker
from transload.control.ffn_messages import CallKey, FfnAnswer, FfnBusy, FfnReply, FfnRequest, Piece, SessionId
from transload.control.messages import (
    ExpectKv,
    KvAbort,
    KvCredit,
    KvData,
    KvDone,
    KvReady,
    KvRenew,
    PeerFrame,
    PeerLost,
    TransferId,
    WorkerId,
)
from transload.errors import HandoffError
from transload.transfer.ffn_link import (
    ArrivedAnswer,
    ArrivedCall,
    CallFrame,
    SlotSizes,
    decode_answer,
    decode_call,
    encode_header,
)
from transload.transfer.ffn_stream import StreamCallee, StreamCaller
from transload.transfer.links import LinkFailed
from transload.transfer.wire import TRAILER, Header, encode

GRANTED = (3, 8, 4)
SIZES = SlotSizes(num_slots=3, call_bytes=900, answer_bytes=900)
SESSION = SessionId(5)


def some_frame(random: Random) -> Header:
    """Any frame of a link, with numbers that are right, nearly right, or extreme."""

    def number() -> int:
        return random.choice((0, 1, 2, 5, 7, 8, *EXTREMES[-6:-3], -1))

    transfer, epoch = TransferId(random.choice((1, 1, 1, 2))), random.choice((1, 1, 0, 2))
    match random.randrange(7):
        case 0:
            return KvDone(transfer, epoch, number(), tuple(range(random.randrange(5))))
        case 1:
            return KvCredit(transfer, epoch, number())
        case 2:
            return random.choice((KvReady(transfer, epoch), KvRenew(transfer, epoch, number())))
        case 3:
            return KvAbort(transfer, epoch, "no")
        case _:
            low, layer = random.choice((5, 6, 7, number())), random.choice((0, 1, 2, number()))
            blocks, layers = random.choice((1, 2, number())), random.choice((1, 2, number()))
            right_bytes = layers * blocks * SMALL.cell_bytes
            num_bytes = random.choice((right_bytes, right_bytes, number())) & (2**62 - 1)
            return KvData(transfer, epoch, number(), layer, layer + layers, low, low + blocks, num_bytes)


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_frames_of_any_content_write_nothing_but_what_was_granted(seed: int, one_sided: bool) -> None:
    random = Random(seed)
    with Worker("a") as worker, RawPeer(worker, one_sided=one_sided) as raw:
        worker.fill(1)
        before = worker.blocks.copy()
        worker.links.expect(ExpectKv(TransferId(1), 1, WorkerId("raw"), 5, GRANTED))
        raw.sock.settimeout(2.0)
        try:
            for _ in range(60):
                frame = some_frame(random)
                payload = 0
                if isinstance(frame, KvData) and not one_sided:
                    payload = random.choice((frame.num_bytes + TRAILER.size, frame.num_bytes)) & 0xFFF
                raw.sock.sendall(encode(frame, payload) + random.randbytes(payload))
        except OSError:
            pass  # the worker had seen enough
        with contextlib.suppress(OSError):
            raw.sock.shutdown(socket.SHUT_WR)
        event = worker.next()
        while event != PeerLost(WorkerId("raw")):
            assert isinstance(event, PeerFrame | LinkFailed), event
            event = worker.next()
        outside = np.ones(len(before), bool)
        outside[list(GRANTED)] = False
        assert np.array_equal(worker.blocks[outside], before[outside])


def a_call(sequence: int) -> CallFrame:
    return CallFrame(FfnRequest(CallKey(SESSION, 1, 0, 0, sequence), ((Piece(0), 2), (Piece(7), 1))), 3)


@pytest.mark.parametrize("seed", range(20))
def test_damaged_headers_of_calls_and_answers_are_read_or_refused(seed: int) -> None:
    answers: tuple[FfnAnswer, ...] = (FfnReply(a_call(1).request.key), FfnBusy(a_call(2).request.key))
    for damaged in mutations(encode_header(a_call(1)), seed, 50):
        try:
            assert isinstance(decode_call(damaged), CallFrame)
        except HandoffError:
            pass
    for answer in answers:
        for damaged in mutations(encode_header(answer), seed, 25):
            try:
                assert isinstance(decode_answer(damaged), msgspec.Struct)
            except HandoffError:
                pass


class Ends:
    """The FFN side of a stream over a socket pair, fed with bytes; or the attention side with a call under way."""

    def __init__(self, *, is_caller: bool) -> None:
        self.ours, theirs = socket.socketpair()
        self.end = StreamCaller(WorkerId("f"), SIZES, theirs) if is_caller else StreamCallee(SESSION, SIZES, theirs)
        if isinstance(self.end, StreamCaller):
            slot = self.end.reserve()
            assert slot == SIZES.num_slots - 1
            self.end.post(slot, a_call(1), 0)
            self.ours.recv(1 << 16)

    def feed(self, raw: bytes) -> list[ArrivedCall] | list[ArrivedAnswer]:
        """What comes out until the stream ends. Raises `HandoffError` for a stream that is refused."""
        self.ours.sendall(raw)
        self.ours.shutdown(socket.SHUT_WR)
        try:
            return self.end.poll()
        finally:
            self.ours.close()
            self.end.close()


def stream_of(*, is_caller: bool) -> bytes:
    """What the other side sends: two calls, or the answer to one."""
    ours, theirs = socket.socketpair()
    end = StreamCallee(SESSION, SIZES, theirs) if is_caller else StreamCaller(WorkerId("f"), SIZES, theirs)
    with ours, contextlib.closing(end):
        if isinstance(end, StreamCallee):
            slot = SIZES.num_slots - 1  # the one that a caller reserves first
            end.answer_buffer(slot)[:40] = bytes(range(40))
            end.answer(slot, FfnReply(a_call(1).request.key), 40)
        else:
            for sequence in (1, 2):
                slot_of = end.reserve()
                assert slot_of is not None
                end.call_buffer(slot_of)[:40] = bytes(range(40))
                end.post(slot_of, a_call(sequence), 40)
        return ours.recv(1 << 16)


@pytest.mark.parametrize("is_caller", [False, True])
def test_a_bit_changed_anywhere_in_a_stream_of_calls_is_noticed(
    is_caller: bool,
) -> None:
    raw = stream_of(is_caller=is_caller)
    right = [bytes(arrived.rows) for arrived in Ends(is_caller=is_caller).feed(raw)]
    assert right == [bytes(range(40))] * (1 if is_caller else 2)
    for place in range(len(raw)):
        changed = bytearray(raw)
        changed[place] ^= 1 << place % 8
        try:
            taken = Ends(is_caller=is_caller).feed(bytes(changed))
        except HandoffError:
            continue
        assert [bytes(arrived.rows) for arrived in taken] == right[: len(taken)], f"byte {place} of {len(raw)}"
        assert len(taken) < len(right)


@pytest.mark.parametrize("is_caller", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_a_damaged_stream_of_calls_is_read_or_refused(seed: int, is_caller: bool) -> None:
    for damaged in mutations(stream_of(is_caller=is_caller), seed, 30):
        try:
            Ends(is_caller=is_caller).feed(damaged)
        except HandoffError:
            pass


def test_a_prefix_with_the_right_checksum_and_a_slot_that_is_not_there_is_refused() -> None:
    with pytest.raises(HandoffError, match="slot 9"):
        Ends(is_caller=False).feed(struct.pack("<IIIQ", 4, 0, 9, 0) + bytes(4))


@pytest.mark.parametrize("decode", [decode_call, decode_answer])
def test_a_header_nested_too_deep_is_refused_like_any_other(decode: Callable[[bytes], object]) -> None:
    header = b"\x99" + b"\x91" * 10_000 + b"\xc0"
    with pytest.raises(HandoffError):
        decode(header)
