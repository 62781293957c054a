"""One API call from admission to its last byte: its choices, its caller, its one end.

Streams or collects, watches for the caller leaving, counts. Never parses bodies and never knows which API it speaks:
that is the `Style`'s.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from transload.control.messages import Request
from transload.errors import RequestError, TransloadError
from transload.runtime.base import Backend, Finished, RequestStream
from transload.server.bodies import Receive, Send
from transload.server.choice import Choice
from transload.server.connection import GuardedConnection
from transload.server.faults import error_body, failed_request, internal_error
from transload.server.metrics import Metrics
from transload.server.replies import DONE, Style, Usage

logger = logging.getLogger("transload.server")

OVERDUE_SECONDS = 30.0
"""How much longer than its own deadline a call is waited for before it is a bug of the runtime."""
_EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class Call:
    """One call of `/v1/chat/completions` or `/v1/completions`. Use once: `run`."""

    def __init__(
        self,
        *,
        route: str,
        request_id: str,
        backend: Backend,
        metrics: Metrics,
        style: Style,
        streaming: bool,
        include_usage: bool,
        receive: Receive,
        send: Send,
        connection: GuardedConnection | None,
        arrived: float,
    ) -> None:
        """`arrived`: when the call came in, by `time.monotonic`. `connection`: has shorter ways than ASGI's to send and
        to learn that the caller has left."""
        self._route = route
        self._request_id = request_id
        self._backend = backend
        self._metrics = metrics
        self._style = style
        self._streaming = streaming
        self._include_usage = include_usage
        self._receive = receive
        self._send = send
        self._connection = connection
        self._arrived = arrived
        self._streams: list[RequestStream] = []
        self._error: RequestError | None = None
        self._caller_gone = False
        self._over = False
        self._headers_sent = False

    async def run(self, requests: Sequence[Request], choices: Sequence[Choice], num_prompt_tokens: int) -> None:
        """Submit one request per choice and answer the caller. `num_prompt_tokens` counts each prompt once.

        Raises `RequestError` if the call is refused or fails before the first byte of the answer.
        """
        watcher = asyncio.create_task(self._watch()) if self._connection is None else None
        overdue = asyncio.get_running_loop().call_later(requests[0].deadline_seconds + OVERDUE_SECONDS, self._overdue)
        try:
            if self._connection is not None:
                self._connection.when_gone(self._leave)
            await self._submit(requests)
            closing = await self._follow(choices)
            await self._conclude(choices, closing, num_prompt_tokens)
        except RequestError:
            raise
        except Exception as error:
            await self._break_off(error)
        finally:
            self._over = True
            overdue.cancel()
            if watcher is not None:
                watcher.cancel()
            for stream, choice in zip(self._streams, choices, strict=False):
                if choice.reason is None:
                    stream.cancel()

    def interrupt(self, error: RequestError) -> None:
        """End the call now with an error that the caller gets to see."""
        if self._error is None:
            self._error = error
        self._cancel_all()

    async def _submit(self, requests: Sequence[Request]) -> None:
        try:
            for request in requests:
                self._streams.append(await self._backend.submit(request))
        except RequestError as error:
            self._metrics.call_rejected(self._route, error.code)
            raise
        if self._caller_gone or self._error is not None:
            self._cancel_all()

    async def _follow(self, choices: Sequence[Choice]) -> bytes:
        """Follow all choices to their ends. What is left to say of them is returned, to leave with the ending."""
        if len(choices) == 1:
            return await self._follow_choice(choices[0], self._streams[0])

        async def follow_and_write(choice: Choice, stream: RequestStream) -> None:
            closing = await self._follow_choice(choice, stream)
            if closing:
                await self._write(closing)

        async with asyncio.TaskGroup() as group:
            for choice, stream in zip(choices, self._streams, strict=True):
                group.create_task(follow_and_write(choice, stream))
        return b""

    async def _follow_choice(self, choice: Choice, stream: RequestStream) -> bytes:
        """Take a choice's tokens until its end. If the call streams, text is sent as it comes but for the last."""
        style, metrics = self._style, self._metrics
        last = 0.0
        async for item in stream:
            if isinstance(item, Finished):
                return self._end_choice(choice, item, last)
            now = time.monotonic()
            if last:
                metrics.itl.observe((now - last) / len(item), len(item))
            else:
                choice.first_token_at = now
                metrics.ttft.observe(now - self._arrived)
            last = now
            if choice.stopped:
                continue
            choice.push(item)
            if choice.stopped:
                stream.stop()
            elif self._streaming and choice.has_news() and item[-1].finish is None:
                event = style.delta(choice.index, *choice.take())
                if not choice.opened:
                    choice.opened = True
                    event = style.opening(choice.index) + event
                await self._write(event)
        raise AssertionError(f"the stream of request {stream.request_id} ended without Finished")

    def _end_choice(self, choice: Choice, finished: Finished, last: float) -> bytes:
        """Note how a choice ended. One choice's error ends the call. Returns the events that are still to be sent."""
        choice.end(finished)
        self._metrics.request_ended(finished.num_prompt_tokens, choice.num_tokens, finished.num_cached_tokens)
        if choice.num_tokens > 1:
            self._metrics.tpot.observe((last - choice.first_token_at) / (choice.num_tokens - 1))
        if choice.reason == "error":
            self.interrupt(failed_request(finished.error, finished.error_code))
        elif choice.reason == "cancelled" and not self._caller_gone:
            self.interrupt(RequestError("the server cancelled the request", status=503, code="cancelled"))
        elif self._streaming and self._error is None:
            events = b"" if choice.opened else self._style.opening(choice.index)
            if choice.has_news():
                events += self._style.delta(choice.index, *choice.take())
            return events + self._style.ending(choice.index, choice.reason or "")
        return b""

    async def _conclude(self, choices: Sequence[Choice], closing: bytes, num_prompt_tokens: int) -> None:
        """Say how the call ended, and what it used."""
        if self._caller_gone:
            self._count("cancelled")
            return
        if self._error is not None:
            await self._tell(self._error)
            return
        usage = Usage(
            num_prompt_tokens,
            sum(choice.num_tokens for choice in choices),
            sum(choice.num_cached_tokens for choice in choices if choice.counts_prompt),
        )
        self._count(choices[0].reason or "error")
        if self._streaming:
            await self._write(closing + (self._style.usage(usage) if self._include_usage else b"") + DONE, more=False)
            return
        body = self._style.whole([(*choice.take(), choice.reason or "") for choice in choices], usage)
        if self._connection is None or not self._connection.answer(json_headers(self._request_id), body):
            await send_json(self._send, 200, body, self._request_id)

    async def _break_off(self, error: Exception) -> None:
        """A bug of ours, or a worker that could not be reached: the caller gets a typed end either way."""
        if isinstance(error, TransloadError):
            await self._tell(RequestError(str(error), status=503, code="unavailable"))
            return
        logger.error("call %s failed", self._request_id, exc_info=error)
        await self._tell(internal_error(self._request_id))

    async def _tell(self, error: RequestError) -> None:
        """End with an error: as a status while that is possible, as an event in the stream after that."""
        self._count("error")
        if not self._headers_sent:
            raise error
        await self._write(b"data: " + error_body(error) + b"\n\n", more=False)

    async def _write(self, events: bytes, *, more: bool = True) -> None:
        connection = self._connection
        if self._headers_sent:
            if more and connection is not None and connection.write_chunk(events):
                return
        else:
            self._headers_sent = True
            headers = [*_EVENT_STREAM, (b"x-request-id", self._request_id.encode())]
            if connection is not None and connection.begin_stream(headers, events, more=more):
                return
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": events, "more_body": more})

    async def _watch(self) -> None:
        """Wait for the caller to leave."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._leave()

    def _leave(self) -> None:
        """The caller has left: free everything."""
        if not self._over:
            self._caller_gone = True
            self._cancel_all()

    def _overdue(self) -> None:
        logger.error("call %s is overdue: the runtime did not end it by its deadline", self._request_id)
        self.interrupt(RequestError("the request ran out of time", status=504, code="deadline_exceeded"))

    def _cancel_all(self) -> None:
        for stream in self._streams:
            stream.cancel()

    def _count(self, outcome: str) -> None:
        self._metrics.call_ended(self._route, outcome, time.monotonic() - self._arrived)


def json_headers(request_id: str) -> list[tuple[bytes, bytes]]:
    return [(b"content-type", b"application/json"), (b"x-request-id", request_id.encode())]


async def send_json(
    send: Send, status: int, body: bytes, request_id: str, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """A complete JSON answer."""
    start = [*json_headers(request_id), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body})
