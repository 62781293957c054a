"""A chat with a running server: the history, one streamed answer at a time, and what it took.

Prints nothing and reads no keys: `chat.py` and `ask.py` do.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
import msgspec

from transload.errors import RequestError, TransloadError
from transload.runtime.base import Waterfall
from transload.study.answers import NOT_JSON, StreamedAnswer, describe_error
from transload.study.http_client import parse_url
from transload.study.waterfall import decode_waterfalls

CONNECT_SECONDS = 5.0
SILENCE_SECONDS = 300.0
"""Longest wait for the next token."""


@dataclass
class Turn:
    """One answer: what it said and when it came."""

    began_seconds: float
    answer: StreamedAnswer = field(default_factory=lambda: StreamedAnswer(keep_text=True))
    ended_seconds: float | None = None

    @property
    def text(self) -> str:
        return "".join(self.answer.text)

    @property
    def ttft_seconds(self) -> float | None:
        """From sending the question to the first text; None if none came."""
        times = self.answer.token_seconds
        return times[0] - self.began_seconds if times else None

    @property
    def num_tokens(self) -> int:
        """As the server counted, else events with text."""
        told = self.answer.num_output_tokens
        return len(self.answer.token_seconds) if told is None else told

    @property
    def tokens_per_second(self) -> float | None:
        """After the first token; None for fewer than two."""
        times = self.answer.token_seconds
        span = times[-1] - times[0] if times else 0.0
        return (self.num_tokens - 1) / span if span > 0 and self.num_tokens > 1 else None


class Conversation:
    """Holds the history and the connection. Close it."""

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        system: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
    ) -> None:
        """Raises `DeploymentError` for what is not an address. Does not connect yet."""
        address = parse_url(url)
        self.url = address.url
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.last: Turn | None = None
        self._model = model or "default"
        self._is_model_chosen = model is not None
        self._limits: dict[str, object] = {}
        if max_tokens is not None:
            self._limits["max_tokens"] = max_tokens
        if temperature is not None:
            self._limits["temperature"] = temperature
        self._client = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS),
            trust_env=not _is_loopback(address.host),  # a proxy cannot reach this machine's own servers
        )

    def close(self) -> None:
        self._client.close()

    def connect(self) -> str:
        """Check that a server is there; the name of its model. Raises `TransloadError` with what to do."""
        try:
            response = self._client.get("/v1/models", timeout=CONNECT_SECONDS)
        except httpx.HTTPError as problem:
            raise self._unreachable(problem) from None
        if response.status_code in (401, 403):
            raise TransloadError(
                f"{self.url} refuses us: {describe_error(response.content)} (HTTP {response.status_code}); "
                "give the key with --api-key"
            )
        try:
            name = str(msgspec.json.decode(response.content)["data"][0]["id"])
        except (*NOT_JSON, LookupError, TypeError):
            return self._model  # a server need not list its models
        if not self._is_model_chosen:
            self._model = name
        return self._model

    def reset(self) -> None:
        """Forget what was said; the system prompt stays."""
        self.messages.clear()
        self.last = None

    def say(self, text: str) -> Iterator[str]:
        """Ask, and yield the answer's text as it comes. Closing the iterator early ends the answer at the server.

        What was asked and answered joins the history, also if the answer was cut short; a question that failed does
        not. Raises `RequestError` if the server refuses or fails, `TransloadError` if it goes away.
        """
        # bytes that are no UTF-8 come out of pipes and arguments as surrogates, which JSON cannot carry
        question = {"role": "user", "content": text.encode(errors="surrogateescape").decode(errors="replace")}
        turn = self.last = Turn(time.perf_counter())
        asked = False
        try:
            yield from self._stream(turn, [*self._opening(), *self.messages, question])
            asked = True
        except httpx.HTTPError as problem:
            if turn.answer.token_seconds:
                raise TransloadError(f"{self.url} went away in the middle of the answer: {problem}") from None
            raise self._unreachable(problem) from None
        except (GeneratorExit, KeyboardInterrupt):
            asked = bool(turn.text)
            raise
        finally:
            turn.ended_seconds = time.perf_counter()
            if asked:
                self.messages += [question, {"role": "assistant", "content": turn.text}]

    def waterfalls(self) -> list[Waterfall]:
        """Where the last answer's time went, if the server tells: one for each choice."""
        if self.last is None or self.last.answer.id is None:
            return []
        try:
            response = self._client.get(f"/requests/{self.last.answer.id}", timeout=CONNECT_SECONDS)
            return decode_waterfalls(response.content) if response.status_code == 200 else []
        except (httpx.HTTPError, *NOT_JSON):
            return []  # other servers have no such page

    def _opening(self) -> list[dict[str, str]]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _stream(self, turn: Turn, messages: list[dict[str, str]]) -> Iterator[str]:
        answer = turn.answer
        body = {"model": self._model, "messages": messages, "stream": True, **self._limits}
        body["stream_options"] = {"include_usage": True}
        with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            answer.head(response.status_code, {"content-type": response.headers.get("content-type", "")})
            for part in response.iter_bytes():
                num_texts = len(answer.text)
                answer.body(part, time.perf_counter())
                yield from answer.text[num_texts:]
                if answer.error is not None:
                    break
        answer.finish()
        if answer.error is not None and answer.error != "empty":
            raise RequestError(answer.error_detail, status=response.status_code)

    def _unreachable(self, problem: Exception) -> TransloadError:
        return TransloadError(
            f"no server at {self.url}: {problem or type(problem).__name__}; start one with `transload serve`, or give "
            "the address of one"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
