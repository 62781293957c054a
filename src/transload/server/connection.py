"""One HTTP connection: uvicorn's over httptools, with a deadline on everything a peer can leave undone.

A peer that connects and says nothing, sends half a head, never ends a body nobody wants any more, or stops reading is
cut off after a time. Decides nothing about what a request means. httptools takes a third of h11's CPU time; what it
leaves open is closed here: the size of a head, a missing Host, a body behind an offer to upgrade, HTTP/1.0.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import httptools
import msgspec
from starlette.types import ASGIApp, Message, Send
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from transload.errors import RequestError
from transload.server.faults import error_body

logger = logging.getLogger("transload.server")

CONNECTION = "transload.connection"
"""Key of the ASGI scope under which a call finds its `GuardedConnection`."""
Headers = Sequence[tuple[bytes, bytes]]


class ConnectionLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How long, and how much of it, a peer may keep a connection waiting."""

    head_seconds: float = 20.0
    """From the first byte of a request to the end of its headers."""
    idle_seconds: float = 75.0
    """Between connecting or an answer, and the next request."""
    stalled_seconds: float = 30.0
    """How long an answer may wait for the peer to read."""
    head_bytes: int = 65536
    """Request line and headers."""
    discarded_bytes: int = 128 * 2**20
    """Body bytes thrown away after an early answer (413), so that the peer gets to read it."""


class GuardedConnection(HttpToolsProtocol):
    """uvicorn's protocol with `limits`. Made by `guarded`.

    `cycle` is the request that was parsed last, `_running` the one that is being answered: a peer may send its next
    requests early.
    """

    limits: ClassVar[ConnectionLimits]

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._running: RequestResponseCycle | None = None
        self._is_in_head = self._offers_upgrade = False
        self._num_head_bytes = 0  # of a head, without the piece in which it begins
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._num_waiting_bytes = 0  # came in while no call was under way: a head, or a body nobody wants
        self._num_early_bytes = 0  # came in during a call, behind its body
        self._tell_gone: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(self.limits.idle_seconds, self._cut_off)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm_head()
        self._disarm_stall()
        super().connection_lost(exc)
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        tell, self._tell_gone = self._tell_gone, None
        if tell is not None:
            tell()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        running, was_in_head = self._running, self._is_in_head
        is_early = running is not None and not running.response_complete and not running.more_body
        try:
            self._parse(memoryview(data))
        except httptools.HttpParserError as error:
            self.send_400_response(f"This is no HTTP request: {error.__context__ or error}.")
            return
        if self._running is not None and not self._running.response_complete:
            self._disarm_head()
            self._num_waiting_bytes = 0
            self._num_early_bytes += len(data) if is_early else 0
            self._keep_listening()
            return
        if self._num_waiting_bytes == 0:  # from "may be idle" to "has begun and must go on"
            self._disarm_head()
            self._head_timer = self.loop.call_later(self.limits.head_seconds, self._cut_off)
        self._num_waiting_bytes += len(data)
        if self._is_in_head and was_in_head:
            self._num_head_bytes += len(data)
        if self._num_head_bytes > self.limits.head_bytes:
            self.send_400_response(f"Request line and headers are over {self.limits.head_bytes} bytes.")
        elif self._num_waiting_bytes > self.limits.discarded_bytes:
            self._cut_off()

    def _parse(self, data: memoryview) -> None:
        """An offer to upgrade (HTTP/2 in clear, websockets) is passed over, as a server may.

        httptools takes whatever follows such a head for the other protocol: it gets the head again, without the offer.
        """
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                kept = [header for header in self.headers if header[0] not in (b"upgrade", b"http2-settings")]
                head = b"".join(b"%b: %b\r\n" % header for header in kept)
                self.parser.feed_data(b"%b %b HTTP/1.1\r\n%b\r\n" % (self.parser.get_method(), self.url, head))

    def on_message_begin(self) -> None:
        self._is_in_head, self._num_head_bytes, self._offers_upgrade = True, 0, False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._is_in_head, self._num_head_bytes = False, 0
        if self.parser.get_method() == b"CONNECT":
            raise httptools.HttpParserError("CONNECT is for proxies")
        self._offers_upgrade = self.parser.should_upgrade()
        if self._offers_upgrade:
            return
        version = self.parser.get_http_version()
        if version == "1.1" and sum(name == b"host" for name, _ in self.headers) != 1:
            raise httptools.HttpParserError("HTTP/1.1 needs one Host header")
        cast("dict[str, object]", self.scope)[CONNECTION] = self
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self._offers_upgrade:
            super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:  # type: ignore[override]
        self._running = cycle
        if cycle.scope["http_version"] != "1.1":
            cycle.send = _until_closed(cycle)  # type: ignore[assignment, method-assign]
        super()._start_asgi_task(cycle, app)  # type: ignore[arg-type]

    def whole_body(self) -> bytes | None:
        """The body of the call, once, if all of it is there: no waiting for what has come. None: `receive` it."""
        running = self._running
        if running is None or running.more_body or running.disconnected:
            return None
        body = bytes(running.body)
        running.body.clear()
        running.message_event.clear()
        return body

    def answer(self, headers: Headers, body: bytes) -> bool:
        """Send a whole answer as one packet; by ASGI its head would be one of its own. False: not now, `send` it."""
        head = self._head(headers, b"content-length: %d" % len(body))
        if head is None:
            return False
        self.transport.write(head + body)
        self._complete()
        return True

    def begin_stream(self, headers: Headers, body: bytes, *, more: bool) -> bool:
        """Send the head and the first piece of a chunked answer as one packet. False: not now, `send` them."""
        running = self._running
        if running is None or running.scope["http_version"] != "1.1":
            return False
        head = self._head(headers, b"transfer-encoding: chunked")
        if head is None:
            return False
        running.chunked_encoding = True
        self.transport.write(b"%b%x\r\n%b\r\n%b" % (head, len(body), body, b"" if more else b"0\r\n\r\n"))
        if not more:
            self._complete()
        return True

    def write_chunk(self, body: bytes) -> bool:
        """Send a piece of a chunked answer that has begun. False: not now, `send` it.

        Streams send thousands of pieces a second; this spares each uvicorn's bookkeeping, which a piece in the middle
        does not change.
        """
        assert body, "an empty chunk would end the answer"
        if self._running is None or not self._running.chunked_encoding or not self._can_write():
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
        return True

    def _can_write(self) -> bool:
        return not self.flow.write_paused and not self.transport.is_closing()

    def _head(self, headers: Headers, length: bytes) -> bytes | None:
        """Of an answer with status 200. From here on the answer has begun. None: it cannot be sent now."""
        running = self._running
        if running is None or running.response_started or not self._can_write():
            return None
        running.response_started, running.waiting_for_100_continue = True, False
        lines = [b"%b: %b" % header for header in (*running.default_headers, *headers)]
        lines.append(length if running.keep_alive else length + b"\r\nconnection: close")
        return STATUS_LINE[200] + b"\r\n".join(lines) + b"\r\n\r\n"

    def _complete(self) -> None:
        """What uvicorn does behind an answer's last byte."""
        assert self._running is not None
        self._running.response_complete = True
        self._running.message_event.set()
        if not self._running.keep_alive:
            self.transport.close()
        self._running.on_response()

    def when_gone(self, tell: Callable[[], None]) -> None:
        """Say so if the peer leaves before the answer that is due now is complete. The body has been read.

        By ASGI a call would wait for that in a task of its own, which costs as much as a good part of its answer.
        """
        if self._running is None or self._running.disconnected:
            tell()
            return
        self.flow.resume_reading()  # a large body has paused it, and a peer that leaves is seen by reading
        self._tell_gone = tell

    def _keep_listening(self) -> None:
        """uvicorn stops reading at a pipelined request, and with that it stops seeing the peer leave."""
        if self._num_early_bytes > self.limits.head_bytes:
            self.flow.pause_reading()
        elif self.flow.read_paused and self._running is not None and not self._running.more_body:
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        self._num_early_bytes = 0
        self._tell_gone = None
        super().on_response_complete()
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self._arm_stall()  # closing waits for the peer to read the rest

    def pause_writing(self) -> None:
        super().pause_writing()
        self._arm_stall()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._disarm_stall()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():  # closing would wait for a peer that does not read
            self._cut_off()
        else:
            super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP. Mid-answer there is nothing left to say it with."""
        logger.debug("%s sent what is no HTTP: %s", self.client, msg)
        running = self._running
        if self.transport.is_closing() or (running and running.response_started and not running.response_complete):
            self._cut_off()
            return
        body = error_body(RequestError(f"{msg} Nothing was done.", code="invalid_http"))
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[400] + head + body)
        self.transport.close()

    def _cut_off(self) -> None:
        """Drop the connection and what is still unsent. A running call sees its caller leave."""
        if not self.transport.is_closing() or self.transport.get_write_buffer_size():
            logger.debug("connection of %s cut off", self.client)
            self.transport.abort()

    def _disarm_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _arm_stall(self) -> None:
        self._disarm_stall()
        self._stall_timer = self.loop.call_later(self.limits.stalled_seconds, self._cut_off)

    def _disarm_stall(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None


def _until_closed(cycle: RequestResponseCycle) -> Send:
    """`cycle.send` for HTTP/1.0, which knows no chunks: an answer of unknown length ends with the connection."""
    send = cycle.send

    async def send_plain(message: Message) -> None:
        if message["type"] == "http.response.start":
            if not any(name.lower() == b"content-length" for name, _ in message["headers"]):
                cycle.chunked_encoding = False
        elif cycle.chunked_encoding is False and not cycle.expected_content_length:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)  # type: ignore[arg-type]

    return send_plain


def guarded(limits: ConnectionLimits) -> type[GuardedConnection]:
    """The protocol class for a server with these limits; uvicorn makes one per connection."""

    class Connection(GuardedConnection):
        pass

    Connection.limits = limits
    return Connection
