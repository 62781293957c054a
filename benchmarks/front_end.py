"""What the HTTP front end costs: CPU microseconds a request and a streamed token, with a backend that only counts.

    python benchmarks/front_end.py [--streams 64] [--tokens 200] [--repeats 5] > front_end.json

The server runs in a process of its own; its CPU time comes from /proc/PID/schedstat, so the load generator beside it
does not count. Prompts are token ids: tokenizing is not measured. `bare` is an application of twenty lines on uvicorn
with the same parser, which sends as many chunks of the same size and does nothing else, measured in turns with ours.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import Any

import uvicorn

from transload.arch import ModelArch
from transload.control.messages import Request, RequestId, Token
from transload.deploy.spec import Server
from transload.runtime.base import Finished, RequestStream, ServedModel, Waterfall
from transload.server.app import create_app
from transload.server.serve import serve_http

WORDS = [f" word{number}".encode() for number in range(1000)]


class WordTable:
    """Every token is a word of five to eight bytes."""

    special_ids: frozenset[int] = frozenset()
    strips_first_space = False

    def __getitem__(self, token_id: int) -> bytes:
        return WORDS[token_id]


class WordTokenizer:
    vocab_size = len(WORDS)
    eos_ids = ()
    context_length = 8192
    token_table = WordTable()

    def encode(self, text: str, *, special: bool = True) -> list[int]:  # noqa: ARG002
        return [len(text) % len(WORDS)]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:  # noqa: ARG002
        return b"".join(WORDS[token] for token in ids).decode()

    def render_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,  # noqa: ARG002
        tools: Sequence[Mapping[str, object]] | None = None,  # noqa: ARG002
    ) -> str:
        return str(messages[-1]["content"])

    def token_text(self, token_id: int) -> str:
        return WORDS[token_id].decode()

    def token_bytes(self, token_id: int) -> bytes:
        return WORDS[token_id]


class CountingStream:
    """Tokens as the ticker makes them."""

    def __init__(self, request: Request) -> None:
        self.request_id = request.id
        self.request = request
        self.num_made = 0
        self.over = False
        self._ready: list[list[Token] | Finished] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: list[Token] | Finished) -> None:
        self._ready.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> CountingStream:
        return self

    async def __anext__(self) -> list[Token] | Finished:
        while not self._ready:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._ready.pop(0)

    def stop(self) -> None:
        self.cancel()

    def cancel(self) -> None:
        if not self.over:
            self.over = True
            self.put(finished(self, "cancelled"))


def finished(stream: CountingStream, reason: str) -> Finished:
    return Finished(
        reason=reason,  # type: ignore[arg-type]
        num_prompt_tokens=stream.request.num_prompt_tokens,
        num_outputs=stream.num_made,
        num_cached_tokens=0,
    )


class CountingBackend:
    """One token for every stream at every tick, as an engine's step gives."""

    def __init__(self, step_seconds: float) -> None:
        self._ids = itertools.count(1)
        self._step_seconds = step_seconds
        self._streams: set[CountingStream] = set()
        arch = ModelArch(
            name="words",
            family="llama",
            vocab_size=len(WORDS),
            hidden_size=8,
            intermediate_size=8,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=8,
            max_position=8192,
        )
        self.model = ServedModel(
            name="words", arch=arch, dtype="float32", max_context=8192, layout_digest=b"x" * 16, block_size=16
        )

    async def tick(self) -> None:
        while True:
            await asyncio.sleep(self._step_seconds)
            for stream in list(self._streams):
                if stream.over:
                    self._streams.discard(stream)
                    continue
                self._step(stream)

    def _step(self, stream: CountingStream) -> None:
        index = stream.num_made
        stream.num_made += 1
        last = stream.num_made == stream.request.max_tokens
        token = Token(stream.request_id, 0, index, index % len(WORDS), "length" if last else None)
        stream.put([token])
        if last:
            stream.over = True
            stream.put(finished(stream, "length"))

    def next_request_id(self) -> RequestId:
        return RequestId(next(self._ids))

    async def submit(self, request: Request) -> RequestStream:
        stream = CountingStream(request)
        if request.max_tokens == 1:  # the request benchmark: no waiting for a tick
            self._step(stream)
        else:
            self._streams.add(stream)
        return stream

    def is_ready(self) -> bool:
        return True

    def waterfall(self, _request: RequestId) -> Waterfall | None:
        return None

    def status(self) -> dict[str, object]:
        return {}


class BareApp:
    """Answers a body that asks for `max_tokens` with so many events, one a tick; streamed or not."""

    EVENT = b'data: {"id":"cmpl-1","object":"text_completion","created":1700000000,"model":"words","choices":[{"index":0,"text":" word123","logprobs":null,"finish_reason":null}]}\n\n'  # noqa: E501 - as it goes over the wire
    WHOLE = b'{"id":"cmpl-1","object":"text_completion","choices":[{"index":0,"text":" word123"}],"usage":{"details":{"n":1}}}'  # noqa: E501

    def __init__(self, step_seconds: float) -> None:
        self._step_seconds = step_seconds
        self._waiting: list[asyncio.Future[None]] = []

    async def tick(self) -> None:
        while True:
            await asyncio.sleep(self._step_seconds)
            waiting, self._waiting = self._waiting, []
            for future in waiting:
                if not future.done():
                    future.set_result(None)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        body = b""
        while True:
            message = await receive()
            body += message["body"]
            if not message.get("more_body"):
                break
        asked = json.loads(body)
        headers = [(b"content-type", b"text/event-stream")]
        if not asked["stream"]:
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(self.WHOLE))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _ in range(asked["max_tokens"] if asked["stream"] else 0):
            if asked["max_tokens"] > 1:
                future = asyncio.get_running_loop().create_future()
                self._waiting.append(future)
                await future
            await send({"type": "http.response.body", "body": self.EVENT, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n" if asked["stream"] else self.WHOLE})


def run_bare(ready: Connection, step_seconds: float) -> None:
    async def main() -> None:
        app = BareApp(step_seconds)
        config = uvicorn.Config(app, port=0, http="httptools", lifespan="off", log_level="warning", access_log=False)
        server = uvicorn.Server(config)
        ticker = asyncio.create_task(app.tick())
        serving = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        ready.send(server.servers[0].sockets[0].getsockname()[1])
        await serving
        ticker.cancel()

    asyncio.run(main())


def run_server(ready: Connection, step_seconds: float) -> None:
    async def main() -> None:
        backend = CountingBackend(step_seconds)
        ticker = asyncio.create_task(backend.tick())
        server = Server(port=0)
        app = create_app(backend, WordTokenizer(), server, seed=0)
        await serve_http(app, server, started=lambda _host, port: ready.send(port))
        ticker.cancel()

    asyncio.run(main())


def cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/schedstat") as file:
        return int(file.read().split()[0]) / 1e9


async def call(port: int, body: dict[str, object], path: str, end: bytes, times: int) -> None:
    """Make calls one after another on one connection."""
    raw = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: application/json\r\nAccept-Encoding: gzip\r\n"
        f"User-Agent: front_end.py\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(times):
        writer.write(head.encode() + raw)
        got = await reader.readuntil(end)
        assert got.startswith(b"HTTP/1.1 200"), got[:300]
    writer.close()
    await writer.wait_closed()


async def measure(pid: int, calls: int, connections: int, port: int, body: dict[str, object], path: str) -> float:
    """CPU microseconds of the server for one call."""
    end = b"0\r\n\r\n" if body.get("stream") else b"}}}"
    await call(port, body, path, end, 1)
    before = cpu_seconds(pid)
    await asyncio.gather(*(call(port, body, path, end, calls) for _ in range(connections)))
    return (cpu_seconds(pid) - before) / calls / connections * 1e6


def spread(values: list[float]) -> dict[str, object]:
    return {
        "median": round(statistics.median(values), 1),
        "min": round(min(values), 1),
        "max": round(max(values), 1),
        "n": len(values),
    }


@contextlib.contextmanager
def server(run: Callable[[Connection, float], None], step_seconds: float) -> Iterator[tuple[int, int]]:
    """Its (port, process id)."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=run, args=(theirs, step_seconds))
    process.start()
    try:
        port, pid = ours.recv(), process.pid
        assert pid is not None
        yield port, pid
    finally:
        process.terminate()
        process.join(10)


def run_all(arguments: argparse.Namespace) -> dict[str, object]:
    chat: dict[str, object] = {"messages": [{"role": "user", "content": "hello"}]}
    completion: dict[str, object] = {"model": "default", "prompt": list(range(64))}
    figures: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        figures.setdefault(name, []).append(value)

    for step_seconds in (0.01, 0.001):
        with server(run_server, step_seconds) as ours, server(run_bare, step_seconds) as bare:
            asked = (
                ("completion", completion, "/v1/completions", ours),
                ("chat", chat, "/v1/chat/completions", ours),
                ("bare", completion, "/", bare),
            )
            for _, (name, body, path, (port, pid)) in itertools.product(range(arguments.repeats), asked):
                if step_seconds == 0.01:
                    for kind in ("whole", "stream"):
                        wanted = {**body, "max_tokens": 1, "stream": kind == "stream"}
                        add(f"request/{name}/{kind}", asyncio.run(measure(pid, 100, 16, port, wanted, path)))
                wanted = {**body, "max_tokens": arguments.tokens, "stream": True}
                cost = asyncio.run(measure(pid, 1, arguments.streams, port, wanted, path))
                add(f"token/{name}/step {step_seconds * 1000:g} ms", cost / arguments.tokens)
    return {name: spread(values) for name, values in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result = {
        "what": "CPU microseconds of the server process",
        "command": "python " + " ".join(sys.argv),
        "commit": commit.stdout.strip(),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("uvicorn", "starlette", "httptools", "msgspec")},
        },
        "streams": arguments.streams,
        "tokens_per_stream": arguments.tokens,
        "microseconds": run_all(arguments),
    }
    json.dump(result, sys.stdout, indent=2)
    print()


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
