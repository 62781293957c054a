"""What the HTTP front end costs and adds, with a backend that only counts.

    python benchmarks/front_end.py [--streams 64] [--tokens 200] [--repeats 5] > front_end.json

CPU microseconds a request and a streamed token: the server runs in a process of its own, and its CPU time comes from
/proc/PID/schedstat, so the load generator beside it does not count; nor does waking it, for it never sleeps. What
callers see: requests a second, the time of a request whose token is there at once, and how long after it was made a
token of one of many streams has arrived; all streams get theirs at the same moment, as a step gives them, so the last
waits for the others. Prompts are token ids: tokenizing is not measured. `bare` is an application of twenty lines on
uvicorn with the same parser, which sends as many chunks of the same size and does nothing else, measured in turns with
ours.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import uvicorn
from front_end_load import call, calls, calls_alone, listen
from surroundings import surroundings

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
        self.ticks = Ticks()
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
            self.ticks.note()
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
            self.ticks.begin(request.prompt[0])
        return stream

    def is_ready(self) -> bool:
        return True

    async def change_split(self, topology: str) -> dict[str, object]:
        raise NotImplementedError(topology)

    def waterfall(self, _request: RequestId) -> Waterfall | None:
        return None

    def status(self) -> dict[str, object]:
        return {}


class Ticks:
    """When tokens were made: every stream has one at each tick from its first on. Streams go by their first token."""

    def __init__(self) -> None:
        self._at: list[float] = []
        self._first: dict[int, int] = {}

    def note(self) -> None:
        self._at.append(time.monotonic())

    def begin(self, stream: int) -> None:
        self._first[stream] = len(self._at)

    def tell(self, asked: Connection) -> None:
        """What was noted since the last time."""
        asked.recv()
        asked.send((self._at, self._first))
        self._at, self._first = [], {}


class BareApp:
    """Answers a body that asks for `max_tokens` with so many events, one a tick; streamed or not."""

    EVENT = b'data: {"id":"cmpl-1","object":"text_completion","created":1700000000,"model":"words","choices":[{"index":0,"text":" word123","logprobs":null,"finish_reason":null}]}\n\n'  # noqa: E501 - as it goes over the wire
    WHOLE = b'{"id":"cmpl-1","object":"text_completion","choices":[{"index":0,"text":" word123"}],"usage":{"details":{"n":1}}}'  # noqa: E501

    def __init__(self, step_seconds: float) -> None:
        self._step_seconds = step_seconds
        self._waiting: list[asyncio.Future[None]] = []
        self.ticks = Ticks()

    async def tick(self) -> None:
        while True:
            await asyncio.sleep(self._step_seconds)
            self.ticks.note()
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
        if asked["stream"] and asked["max_tokens"] > 1:
            self.ticks.begin(asked["prompt"][0])
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
        asyncio.get_running_loop().add_reader(ready.fileno(), app.ticks.tell, ready)
        ready.send(server.servers[0].sockets[0].getsockname()[1])
        await serving
        ticker.cancel()

    asyncio.run(main())


def run_server(ready: Connection, step_seconds: float) -> None:
    async def main() -> None:
        backend = CountingBackend(step_seconds)
        ticker = asyncio.create_task(backend.tick())
        asyncio.get_running_loop().add_reader(ready.fileno(), backend.ticks.tell, ready)
        server = Server(port=0)
        app = create_app(backend, WordTokenizer(), server, seed=0)
        await serve_http(app, server, started=lambda _host, port: ready.send(port))
        ticker.cancel()

    asyncio.run(main())


def cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/schedstat") as file:
        return int(file.read().split()[0]) / 1e9


class Running(NamedTuple):
    """A server's process."""

    port: int
    pid: int
    pipe: Connection

    def cost(self, times: int, connections: int, body: dict[str, object], path: str) -> float:
        """CPU microseconds of the server for one call."""
        asyncio.run(call(self.port, body, path, 1))
        before = cpu_seconds(self.pid)
        asyncio.run(calls(self.port, body, path, times, connections))
        return (cpu_seconds(self.pid) - before) / times / connections * 1e6

    def lateness(self, bodies: Sequence[dict[str, Any]], path: str) -> list[float]:
        """Milliseconds from when each token of each stream was made to when it was with its caller."""
        self._ticks()
        arrivals = asyncio.run(listen(self.port, bodies, path))
        at, first = self._ticks()
        found = []
        for body, seen in zip(bodies, arrivals, strict=True):
            begin = first[body["prompt"][0]]
            tokens = seen[: body["max_tokens"]]
            assert len(tokens) == body["max_tokens"], f"{len(tokens)} events for {body['max_tokens']} tokens"
            found += [(arrived - made) * 1e3 for arrived, made in zip(tokens, at[begin:], strict=False)]
        return found

    def _ticks(self) -> tuple[list[float], dict[int, int]]:
        self.pipe.send(None)
        ticks: tuple[list[float], dict[int, int]] = self.pipe.recv()
        return ticks


def spread(values: list[float], digits: int = 1) -> dict[str, object]:
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
        "n": len(values),
    }


@contextlib.contextmanager
def server(run: Callable[[Connection, float], None], step_seconds: float) -> Iterator[Running]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=run, args=(theirs, step_seconds))
    process.start()
    try:
        port, pid = ours.recv(), process.pid
        assert pid is not None
        yield Running(port, pid, ours)
    finally:
        process.terminate()
        process.join(10)


COMPLETION: dict[str, object] = {"model": "default", "prompt": list(range(64))}
CHAT: dict[str, object] = {"messages": [{"role": "user", "content": "hello"}]}


def costs(arguments: argparse.Namespace) -> dict[str, object]:
    """CPU microseconds of the server."""
    figures: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        figures.setdefault(name, []).append(value)

    for step_seconds in (0.01, 0.001):
        with server(run_server, step_seconds) as ours, server(run_bare, step_seconds) as bare:
            asked = (
                ("completion", COMPLETION, "/v1/completions", ours),
                ("chat", CHAT, "/v1/chat/completions", ours),
                ("bare", COMPLETION, "/", bare),
            )
            for _, (name, body, path, running) in itertools.product(range(arguments.repeats), asked):
                if step_seconds == 0.01:
                    for kind in ("whole", "stream"):
                        wanted = {**body, "max_tokens": 1, "stream": kind == "stream"}
                        add(f"request/{name}/{kind}", running.cost(100, 16, wanted, path))
                wanted = {**body, "max_tokens": arguments.tokens, "stream": True}
                cost = running.cost(1, arguments.streams, wanted, path)
                add(f"token/{name}/step {step_seconds * 1000:g} ms", cost / arguments.tokens)
    return {name: spread(values) for name, values in figures.items()}


def seen(arguments: argparse.Namespace) -> dict[str, object]:
    """What callers see: requests a second, and milliseconds."""
    found: dict[str, dict[str, list[float]]] = {}
    with server(run_server, 0.01) as ours, server(run_bare, 0.01) as bare:
        asked = (("completion", "/v1/completions", ours), ("bare", "/", bare))
        for _, (name, path, running) in itertools.product(range(arguments.repeats), asked):
            figures = found.setdefault(name, {})
            one = {**COMPLETION, "max_tokens": 1, "stream": False}
            for callers in (1, 16, 64):
                asyncio.run(call(running.port, one, path, 1))
                seconds = asyncio.run(calls(running.port, one, path, 1600 // callers, callers))
                figures.setdefault(f"requests/s, {callers} callers", []).append(1600 // callers * callers / seconds)
            alone = asyncio.run(calls_alone(running.port, {**one, "stream": True}, path, 300))
            for streams in (1, arguments.streams):
                bodies = [
                    {**COMPLETION, "prompt": [number], "max_tokens": arguments.tokens, "stream": True}
                    for number in range(streams)
                ]
                late = running.lateness(bodies, path)
                for share in (50, 99):
                    figures.setdefault(f"token of {streams}, ms p{share}", []).append(float(np.percentile(late, share)))
            for share in (50, 99):
                figures.setdefault(f"first token, ms p{share}", []).append(float(np.percentile(alone, share)) * 1e3)
    return {f"{what}/{name}": spread(values, 3) for name, all in found.items() for what, values in all.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    result = {
        "what": "CPU microseconds of the server process, and what callers see",
        "command": "python " + " ".join(sys.argv),
        **surroundings(("starlette",)),
        "streams": arguments.streams,
        "tokens_per_stream": arguments.tokens,
        "microseconds": costs(arguments),
        "seen": seen(arguments),
    }
    json.dump(result, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
