"""A backend that says what it is told to, and a tokenizer whose tokens are bytes. No model, no processes."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from transload.arch import ModelArch
from transload.control.messages import FinishReason, Request, RequestId, Token, TokenLogprobs
from transload.errors import RequestError
from transload.runtime.base import Finished, RequestStream, ServedModel, Stage, Waterfall

EOS = 256
VOCAB = 260
CONTEXT = 512


class ByteTable:
    """Tokens 0 to 255 are bytes, the rest are special."""

    special_ids = frozenset(range(256, VOCAB))
    strips_first_space = False

    def __getitem__(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b"<|%d|>" % token_id


class ByteTokenizer:
    """Each UTF-8 byte is a token."""

    vocab_size = VOCAB
    eos_ids = (EOS,)
    context_length = CONTEXT

    def __init__(self) -> None:
        self.token_table = ByteTable()
        self.threads: set[str] = set()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        self.threads.add(threading.current_thread().name)
        return [*((257,) if special else ()), *text.encode()]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        kept = [i for i in ids if not (skip_special and i in self.token_table.special_ids)]
        return b"".join(self.token_table[i] for i in kept).decode(errors="replace")

    def render_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> str:
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        return "".join(lines) + ("assistant: " if add_generation_prompt else "")

    def token_text(self, token_id: int) -> str:
        return self.token_table[token_id].decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return self.token_table[token_id]


@dataclass
class Script:
    """What the backend does with a request."""

    text: str | bytes = "Hello"
    step_tokens: int = 1
    """Tokens handed over at once."""
    step_seconds: float = 0.0
    ends: FinishReason = "stop"
    """At the end of the text; a text longer than max_tokens ends with "length" whatever this says."""
    error: str | None = None
    error_code: str | None = None
    refuse: Exception | None = None
    crash: Exception | None = None
    """Raised out of the stream once the text is out."""
    hold_after: int | None = None
    """After this many tokens nothing more comes until the caller stops or cancels."""
    num_cached_tokens: int = 0


@dataclass
class Seen:
    """What became of a request, written by the server's thread and read by the test's."""

    request: Request
    stopped: bool = False
    cancelled: bool = False
    num_made: int = 0
    finished: FinishReason | None = None


class FakeStream:
    """One scripted request."""

    def __init__(self, seen: Seen, script: Script) -> None:
        self.request_id = seen.request.id
        self._seen = seen
        self._script = script
        self._ended = asyncio.Event()

    def stop(self) -> None:
        self._seen.stopped = True
        self._ended.set()

    def cancel(self) -> None:
        self._seen.cancelled = True
        self._ended.set()

    async def __aiter__(self) -> AsyncIterator[list[Token] | Finished]:
        script, seen = self._script, self._seen
        tokens = self._tokens()
        for start in range(0, len(tokens), script.step_tokens):
            step = tokens[start : start + script.step_tokens]
            await self._pause(script.step_seconds)
            if script.hold_after is not None and start >= script.hold_after:
                await self._ended.wait()
            if self._ended.is_set():
                break
            seen.num_made += len(step)
            yield step
        if script.crash is not None:
            raise script.crash
        yield self._finished(tokens)

    async def _pause(self, seconds: float) -> None:
        if seconds:
            try:
                await asyncio.wait_for(self._ended.wait(), seconds)
            except TimeoutError:
                pass
        else:
            await asyncio.sleep(0)

    def _tokens(self) -> list[Token]:
        request, script = self._seen.request, self._script
        raw = script.text.encode() if isinstance(script.text, str) else script.text
        ids = list(raw)
        if script.ends == "stop":
            ids.append(EOS)
        ids = ids[: request.max_tokens]
        return [
            Token(request.id, 0, index, token, self._finish_of(index, token, len(ids)), self._logprobs(token))
            for index, token in enumerate(ids)
        ]

    def _finish_of(self, index: int, token: int, num_tokens: int) -> Literal["stop", "length"] | None:
        if token == EOS:
            return "stop"
        if index == num_tokens - 1 and self._script.ends in ("stop", "length"):
            return "length"
        return None

    def _logprobs(self, token: int) -> TokenLogprobs | None:
        wanted = self._seen.request.sampling.logprobs
        if wanted is None:
            return None
        best = tuple(((token + i) % 256, -0.5 - i) for i in range(wanted))
        return TokenLogprobs(-0.5, best)

    def _finished(self, tokens: list[Token]) -> Finished:
        seen, script = self._seen, self._script
        if seen.stopped:
            reason: FinishReason = "stop"
        elif seen.cancelled:
            reason = "cancelled"
        elif tokens and tokens[-1].finish is not None:
            reason = tokens[-1].finish
        else:
            reason = script.ends
        seen.finished = reason
        return Finished(
            reason=reason,
            num_prompt_tokens=seen.request.num_prompt_tokens,
            num_outputs=seen.num_made,
            num_cached_tokens=script.num_cached_tokens,
            error=script.error if reason == "error" else None,
            error_code=script.error_code if reason == "error" else None,
        )


@dataclass
class FakeBackend:
    """Answers each request by its script: one for all, or a function of the request."""

    script: Script | Callable[[Request], Script] = field(default_factory=Script)
    ready: bool = True
    seen: list[Seen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ids = itertools.count(1)
        self.model = ServedModel(
            name="tiny/bytes",
            arch=ModelArch(
                name="bytes",
                family="llama",
                vocab_size=VOCAB,
                hidden_size=8,
                intermediate_size=16,
                num_layers=1,
                num_heads=1,
                num_kv_heads=1,
                head_dim=8,
                max_position=CONTEXT,
            ),
            dtype="float32",
            max_context=CONTEXT,
            layout_digest=b"0123456789abcdef",
            block_size=16,
        )

    def next_request_id(self) -> RequestId:
        return RequestId(next(self._ids))

    async def submit(self, request: Request) -> RequestStream:
        script = self.script(request) if callable(self.script) else self.script
        if script.refuse is not None:
            raise script.refuse
        seen = Seen(request)
        self.seen.append(seen)
        return FakeStream(seen, script)

    def is_ready(self) -> bool:
        return self.ready

    def waterfall(self, request: RequestId) -> Waterfall | None:
        if not any(seen.request.id == request for seen in self.seen):
            return None
        return Waterfall(
            request=request,
            state="finished",
            decision="remote prefill: scripted",
            epoch=0,
            num_prompt_tokens=3,
            num_cached_tokens=0,
            num_outputs=2,
            total_seconds=0.5,
            stages=(
                Stage(name="queue", worker=None, start_seconds=0.0, seconds=0.1),
                Stage(name="decode", worker="decode-0", start_seconds=0.1, seconds=0.4, detail={"bytes": 10}),
            ),
        )

    async def change_split(self, topology: str) -> dict[str, object]:
        if topology != "1p1a1f":
            raise RequestError(f"split {topology}: no", param="topology", code="invalid_split")
        return {"topology": topology, "seconds": 0.5, "memory_bytes": {"decode-0": 1 << 20}}

    def status(self) -> dict[str, object]:
        return {"workers": {"decode-0": "up"}}


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    """Wait for another thread to make something true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} s for: {what}"
        time.sleep(0.005)
