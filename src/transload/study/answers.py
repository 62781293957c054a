"""Reads the streamed answers of OpenAI-compatible servers: server-sent events into tokens, usage and errors.

Pure: it is handed bytes and times. It must never raise for what a server sends; what is wrong becomes the error of the
request.
"""

from __future__ import annotations

import msgspec

from transload.study.metrics import ErrorKind

MAX_ERROR_BYTES = 16 * 1024
MAX_LINE_BYTES = 16 * 2**20
NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are not JSON of the wanted form."""


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Event(msgspec.Struct):
    id: str | None = None
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: object = None


class _Error(msgspec.Struct):
    message: str = ""
    error: object = None
    detail: object = None


_decode_event = msgspec.json.Decoder(_Event).decode


class EventLines:
    """Splits a body into the payloads of its server-sent events, wherever the network cut it."""

    def __init__(self) -> None:
        self._rest = b""
        self._payload: list[bytes] = []

    def feed(self, part: bytes) -> list[bytes]:
        """The `data` of every event that is complete now. Comments and other fields are passed over."""
        *lines, self._rest = (self._rest + part).split(b"\n")
        complete: list[bytes] = []
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                self._payload.append(line[5:].removeprefix(b" "))
            elif not line and self._payload:
                complete.append(b"\n".join(self._payload))
                self._payload.clear()
        return complete

    @property
    def num_pending_bytes(self) -> int:
        """Bytes held back because their event is not complete."""
        return len(self._rest) + sum(map(len, self._payload))


class StreamedAnswer:
    """One answer as it comes (see `http_client.Answer`), for whoever wants its tokens, its text or its error."""

    def __init__(self, *, keep_text: bool = False) -> None:
        self.token_seconds: list[float] = []
        """On the clock of the caller of `body`."""
        self.text: list[str] = []
        self.id: str | None = None
        self.finish_reason: str | None = None
        self.num_input_tokens: int | None = None
        self.num_output_tokens: int | None = None
        self.num_cached_tokens: int | None = None
        self.is_done = False
        self.error: ErrorKind | None = None
        self.error_detail = ""
        self._keep_text = keep_text
        self._usage_counts = False
        self._status = 0
        self._is_stream = False
        self._lines = EventLines()
        self._refusal = b""

    def head(self, status: int, headers: dict[str, str]) -> None:
        self._status = status
        self._is_stream = headers.get("content-type", "").startswith("text/event-stream")

    def body(self, part: bytes, at_seconds: float) -> None:
        if self._status != 200 or not self._is_stream:
            self._refusal = (self._refusal + part)[:MAX_ERROR_BYTES]
            return
        for payload in self._lines.feed(part):
            self._take(payload, at_seconds)
        if self._lines.num_pending_bytes > MAX_LINE_BYTES:
            self.fail("malformed", f"an event of more than {MAX_LINE_BYTES} bytes")
            self._lines = EventLines()

    def fail(self, kind: ErrorKind, detail: str) -> None:
        """The first error is the one that counts."""
        if self.error is None:
            self.error, self.error_detail = kind, detail[:500]

    def finish(self) -> None:
        """The HTTP answer is complete: judge it."""
        if self._status != 200:
            self.fail("http_status", f"{self._status}: {describe_error(self._refusal)}")
        elif not self._is_stream:
            self.fail("malformed", f"asked for a stream, got {self._refusal[:200].decode(errors='replace')!r}")
        elif not self.is_done:
            self.fail("truncated", "the stream ended without [DONE]")
        elif not self.token_seconds:
            self.fail("empty", "the stream was complete but had no token")

    def _take(self, payload: bytes, at_seconds: float) -> None:
        if payload == b"[DONE]":
            self.is_done = True
            return
        try:
            event = _decode_event(payload)
        except NOT_JSON as problem:
            self.fail("malformed", f"{problem}: {payload[:200].decode(errors='replace')}")
            return
        if event.error is not None:
            self.fail("error_event", describe_error(payload))
            return
        self.id = self.id or event.id
        for choice in event.choices:
            self._take_choice(choice, at_seconds)
        if event.usage is not None:
            self._take_usage(event.usage)
            # Usage on the way (vLLM's continuous_usage_stats) counts better than events: one may carry many tokens.
            self._usage_counts |= any(choice.finish_reason is None for choice in event.choices)
            if self._usage_counts and self.num_output_tokens is not None:
                self.token_seconds.extend([at_seconds] * (self.num_output_tokens - len(self.token_seconds)))

    def _take_choice(self, choice: _Choice, at_seconds: float) -> None:
        self.finish_reason = choice.finish_reason or self.finish_reason
        text = choice.text
        if choice.delta is not None:
            text = choice.delta.content or choice.delta.reasoning_content or choice.delta.reasoning
        if choice.token_ids is not None:
            self.token_seconds.extend([at_seconds] * len(choice.token_ids))
        elif text and not self._usage_counts:
            self.token_seconds.append(at_seconds)
        if self._keep_text and text:
            self.text.append(text)

    def _take_usage(self, usage: _Usage) -> None:
        self.num_input_tokens = usage.prompt_tokens
        self.num_output_tokens = usage.completion_tokens
        if usage.prompt_tokens_details is not None:
            self.num_cached_tokens = usage.prompt_tokens_details.cached_tokens


def describe_error(body: bytes) -> str:
    """What an error body says, in OpenAI's, FastAPI's or no particular form."""
    try:
        error = msgspec.json.decode(body, type=_Error)
    except NOT_JSON:
        error = _Error()
    inner = error.error if error.error is not None else error.detail
    if isinstance(inner, dict) and isinstance(inner.get("message"), str):
        inner = inner["message"]
    elif inner is not None and not isinstance(inner, str):
        inner = msgspec.json.encode(inner).decode()
    return inner or error.message or body[:300].decode(errors="replace").strip() or "(no message)"
