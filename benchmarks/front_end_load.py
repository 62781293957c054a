"""The load on a front end, and what a caller sees of it. Knows neither who serves nor what it costs them.

Callers never sleep while they wait: waking a process on another core costs the one that sends to it as much as sending,
and callers of a real front end are on other machines.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence

END_OF_STREAM = b"0\r\n\r\n"
END_OF_WHOLE = b"}}}"


def request(port: int, body: dict[str, object], path: str) -> bytes:
    raw = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: application/json\r\nAccept-Encoding: gzip\r\n"
        f"User-Agent: front_end.py\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    )
    return head.encode() + raw


async def call(port: int, body: dict[str, object], path: str, times: int) -> list[float]:
    """Make calls one after another on one connection. Returns the seconds of each until all of it was there."""
    raw, end = request(port, body, path), END_OF_STREAM if body.get("stream") else END_OF_WHOLE
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    seconds = []
    for _ in range(times):
        sent = time.monotonic()
        writer.write(raw)
        got = await reader.readuntil(end)
        seconds.append(time.monotonic() - sent)
        assert got.startswith(b"HTTP/1.1 200"), got[:300]
    writer.close()
    await writer.wait_closed()
    return seconds


async def calls(port: int, body: dict[str, object], path: str, times: int, connections: int) -> float:
    """So many callers with so many calls each. Returns the seconds it took."""
    async with awake():
        began = time.monotonic()
        await asyncio.gather(*(call(port, body, path, times) for _ in range(connections)))
        return time.monotonic() - began


async def calls_alone(port: int, body: dict[str, object], path: str, times: int) -> list[float]:
    """One caller; the seconds of each call."""
    async with awake():
        return await call(port, body, path, times)


@contextlib.asynccontextmanager
async def awake() -> AsyncIterator[None]:
    """Keep the event loop, and with it this process, from sleeping."""

    async def spin() -> None:
        while True:  # noqa: ASYNC110 - nothing is waited for
            await asyncio.sleep(0)

    spinning = asyncio.create_task(spin())
    try:
        yield
    finally:
        spinning.cancel()


class Listener(asyncio.Protocol):
    """One stream: when each of its events came."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._tail = b""
        self.arrivals: list[float] = []
        self.over = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._raw)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        text = self._tail + data
        self.arrivals += [now] * (text.count(b'"text":') - self._tail.count(b'"text":'))
        self._tail = text[-6:]
        if text.endswith(END_OF_STREAM):
            self._transport.close()
            self.over.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.over.done():
            self.over.set_exception(exc or ConnectionError("closed before its end"))


async def listen(port: int, bodies: Sequence[dict[str, object]], path: str) -> list[list[float]]:
    """All streams at once: when the events of each came, by `time.monotonic`."""
    loop = asyncio.get_running_loop()
    made = [
        await loop.create_connection(lambda body=body: Listener(request(port, body, path)), "127.0.0.1", port)  # type: ignore[misc]
        for body in bodies
    ]
    async with awake():
        await asyncio.gather(*(listener.over for _, listener in made))
    return [listener.arrivals for _, listener in made]
