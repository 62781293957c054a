"""The framed connection between front end and workers: whole messages only, and nothing hostile gets through."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from transload.control.messages import Cancel, RequestId
from transload.runtime.remote import RemoteWorker
from transload.runtime.wire import (
    MAX_FRAME_BYTES,
    Assign,
    Challenge,
    Join,
    Refused,
    ToFrontEndFrame,
    ToWorkerFrame,
    Wire,
    prove,
)


class Ends:
    """A worker-side wire on one end and raw bytes on the other."""

    def __init__(self) -> None:
        self.taken: list[ToWorkerFrame] = []
        self.lost: list[str] = []
        self._news = asyncio.Event()

    def _take(self, frame: ToWorkerFrame) -> None:
        self.taken.append(frame)
        self._news.set()

    async def has_taken(self, count: int) -> None:
        while len(self.taken) < count:
            self._news.clear()
            await self._news.wait()

    async def play(self, talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: Wire[ToWorkerFrame](ToWorkerFrame, self._take, self.lost.append), "127.0.0.1", 0
        )
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        try:
            async with asyncio.timeout(10):
                await talk(reader, writer)
        finally:
            writer.close()
            server.close()


def framed(message: object) -> bytes:
    payload = msgspec.msgpack.encode(message)
    return struct.pack("<I", len(payload)) + payload


def test_messages_come_whole_however_the_bytes_are_cut() -> None:
    ends = Ends()
    sent = [Assign((Cancel(RequestId(number), 0),)) for number in range(20)]

    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = b"".join(framed(message) for message in sent)
        for start in range(0, len(stream), 7):
            writer.write(stream[start : start + 7])
            await writer.drain()
        await ends.has_taken(len(sent))

    asyncio.run(ends.play(talk))
    assert ends.taken == sent


@pytest.mark.parametrize(
    "garbage",
    [
        struct.pack("<I", MAX_FRAME_BYTES + 1),
        struct.pack("<I", 5) + b"hello",
        framed(["Assign", [["NoSuchEvent", 1]]]),
        framed(["Assign", "not a list"]),
        framed({"a": 1}),
    ],
)
def test_what_is_not_understood_ends_the_connection(garbage: bytes) -> None:
    ends = Ends()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(garbage)
        try:
            assert await reader.read() == b""
        except ConnectionResetError:
            pass

    asyncio.run(ends.play(talk))
    assert ends.taken == []
    assert len(ends.lost) == 1
    assert "frame" in ends.lost[0]


async def _join(answer: Callable[[bytes], bytes]) -> list[object]:
    """Connect to a front end that expects no worker; send what `answer` makes of its nonce; return what it says."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: RemoteWorker.greet("the token", {}), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    said: list[object] = []
    decoder = msgspec.msgpack.Decoder(ToWorkerFrame)
    try:
        async with asyncio.timeout(10):
            while True:
                (length,) = struct.unpack("<I", await reader.readexactly(4))
                frame = decoder.decode(await reader.readexactly(length))
                said.append(frame)
                if isinstance(frame, Challenge):
                    writer.write(answer(frame.nonce))
    except (asyncio.IncompleteReadError, ConnectionResetError):
        return said
    finally:
        writer.close()
        server.close()


def join_frame(nonce: bytes, token: str) -> bytes:
    return framed(Join("decode-0", prove(token, nonce, "decode-0"), 1))  # type: ignore[arg-type]


def test_a_worker_must_know_the_token() -> None:
    said = asyncio.run(_join(lambda nonce: join_frame(nonce, "a guess")))
    assert said[1:] == [Refused("wrong join token")]


def test_a_worker_that_nobody_expects_is_told_so() -> None:
    said = asyncio.run(_join(lambda nonce: join_frame(nonce, "the token")))
    assert said[1:] == [Refused("no worker named decode-0 is expected")]


def test_a_proof_cannot_be_used_again() -> None:
    said = asyncio.run(_join(lambda nonce: join_frame(bytes(len(nonce)), "the token")))
    assert said[1:] == [Refused("wrong join token")]


def test_whoever_does_not_begin_with_joining_is_cut_off() -> None:
    said = asyncio.run(_join(lambda _: framed(["Alive"])))
    assert [type(frame) for frame in said] == [Challenge]


def test_frames_of_the_front_end_survive_encoding() -> None:
    frame: ToFrontEndFrame = Join("decode-0", b"proof", 17)  # type: ignore[arg-type]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(frame), type=ToFrontEndFrame) == frame
