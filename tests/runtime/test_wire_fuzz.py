"""Damaged bytes on the connection of front end and workers: a message of a known type, or the end of the connection."""

from __future__ import annotations

import asyncio
import struct
from random import Random
from typing import Any

import msgspec
import pytest

from tests.mutations import mutations
from transload.control.messages import Cancel, Emitted, RequestId, Token, WorkerId
from transload.runtime import wire
from transload.runtime.wire import Assign, Challenge, Join, LinkState, Refused, Report, Wire

TO_WORKER: tuple[msgspec.Struct, ...] = (
    Challenge(b"0123456789abcdef"),
    Assign((Cancel(RequestId(3), 1), Cancel(RequestId(4), 0))),
    Refused("no"),
)
TO_FRONT_END: tuple[msgspec.Struct, ...] = (
    Join(WorkerId("decode-0"), b"proof", 17),
    Report((Emitted(WorkerId("decode-0"), (Token(RequestId(1), 0, 0, 17), Token(RequestId(2), 0, 5, 3, "stop"))),)),
    LinkState(WorkerId("decode-0"), "shm", 1e9, 1e-5),
)
SEEDS = range(40)
COPIES = 25


class Recorder(asyncio.Transport):
    """What the wire does to its connection."""

    def __init__(self) -> None:
        super().__init__()
        self.is_closed = False

    def abort(self) -> None:
        self.is_closed = True

    def close(self) -> None:
        self.is_closed = True


def feed(kind: Any, stream: bytes, random: Random) -> tuple[list[msgspec.Struct], Recorder]:
    """Give bytes to a wire in pieces, as a socket would: nothing more once it has closed."""
    taken: list[msgspec.Struct] = []
    receiver = Wire[Any](kind, taken.append, lambda _: None)
    transport = Recorder()
    receiver.connection_made(transport)
    position = 0
    while position < len(stream) and not transport.is_closed:
        length = random.randint(1, 64)
        receiver.data_received(stream[position : position + length])
        position += length
    return taken, transport


def framed(messages: tuple[msgspec.Struct, ...]) -> bytes:
    payloads = [msgspec.msgpack.encode(message) for message in messages]
    return b"".join(struct.pack("<I", len(payload)) + payload for payload in payloads)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("kind", "messages"), [(wire.ToWorkerFrame, TO_WORKER), (wire.ToFrontEndFrame, TO_FRONT_END)])
def test_damaged_frames_are_messages_or_the_end(kind: Any, messages: tuple[msgspec.Struct, ...], seed: int) -> None:
    for damaged in mutations(framed(messages), seed, COPIES):
        taken, transport = feed(kind, damaged, Random(seed))
        assert all(isinstance(message, kind) for message in taken)
        assert transport.is_closed or len(taken) <= len(messages) + 4  # repeated stretches may hold whole messages


def test_a_frame_that_is_not_understood_takes_nothing_after_it_along() -> None:
    good = framed((Refused("first"),))
    stream = good + struct.pack("<I", 3) + b"\xc1\xc1\xc1" + framed((Refused("after"),))
    taken, transport = feed(wire.ToWorkerFrame, stream, Random(0))
    assert taken == [Refused("first")]
    assert transport.is_closed
