"""An HTTP server that does exactly what a test scripts, right or wrong: it writes the bytes it is told to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import msgspec


class Call:
    """One request as it came, and the means to answer it."""

    def __init__(
        self, method: str, path: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter
    ) -> None:
        self.method = method
        self.path = path
        self.headers = headers
        self.body = body
        self._writer = writer

    @property
    def fields(self) -> Any:
        return msgspec.json.decode(self.body)

    async def raw(self, content: bytes) -> None:
        self._writer.write(content)
        await self._writer.drain()

    async def json(self, status: int, content: object) -> None:
        body = msgspec.json.encode(content)
        head = f"HTTP/1.1 {status} Scripted\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        await self.raw(head.encode() + body)

    async def stream(self) -> None:
        """Begin a streamed answer."""
        await self.raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")

    async def chunk(self, content: bytes) -> None:
        await self.raw(b"%x\r\n%b\r\n" % (len(content), content))

    async def event(self, content: object) -> None:
        await self.chunk(b"data: " + msgspec.json.encode(content) + b"\n\n")

    async def text(self, text: str) -> None:
        """A token, in the words of the endpoint that was called."""
        if "chat" in self.path:
            await self.event({"id": "chatcmpl-1", "choices": [{"index": 0, "delta": {"content": text}}]})
        else:
            await self.event({"id": "cmpl-1", "choices": [{"index": 0, "text": text}]})

    async def usage(self, num_input_tokens: int, num_output_tokens: int) -> None:
        usage = {"prompt_tokens": num_input_tokens, "completion_tokens": num_output_tokens}
        await self.event({"id": "cmpl-1", "choices": [], "usage": usage})

    async def done(self) -> None:
        await self.chunk(b"data: [DONE]\n\n")
        await self.end()

    async def end(self) -> None:
        """End of the HTTP body, well-formed."""
        await self.raw(b"0\r\n\r\n")

    def hang_up(self) -> None:
        self._writer.transport.abort()


Script = Callable[[Call], Awaitable[None]]


async def answer_in_full(call: Call) -> None:
    """As a good server: as many tokens as asked, usage, done."""
    await call.stream()
    count = call.fields["max_tokens"]
    for number in range(count):
        await call.text(f" w{number}")
    prompt = call.fields.get("prompt") or call.fields["messages"][0]["content"]
    await call.usage(len(prompt) if isinstance(prompt, list) else len(prompt.split()), count)
    await call.done()


@asynccontextmanager
async def scripted_server(script: Script) -> AsyncIterator[str]:
    """Runs in the test's own loop; the address is yielded."""
    calls: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        calls.add(task)
        try:
            while (call := await _read_call(reader, writer)) is not None:
                await script(call)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            calls.discard(task)
            writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in list(calls):
            task.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await asyncio.sleep(0)


async def _read_call(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Call | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.strip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Call(method, path, headers, body, writer)


@contextmanager
def server_in_thread(script: Script) -> Iterator[str]:
    """For tests of what runs its own event loop, or none."""
    ready: list[str] = []
    started, ending = threading.Event(), threading.Event()

    async def main() -> None:
        async with scripted_server(script) as url:
            ready.append(url)
            started.set()
            await asyncio.to_thread(ending.wait)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        assert started.wait(30)
        yield ready[0]
    finally:
        ending.set()
        thread.join(30)
        assert not thread.is_alive()
