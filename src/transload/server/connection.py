"""One HTTP connection: uvicorn's, with a deadline on everything a peer can leave undone.

A peer that connects and says nothing, sends half a head, never ends a body nobody wants any more, or stops reading is
cut off after a time. Decides nothing about what a request means.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, ClassVar, cast

import h11
import msgspec
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from transload.errors import RequestError
from transload.server.faults import error_body

logger = logging.getLogger("transload.server")

WRITE_CHUNK = "transload.write_chunk"
"""Key of the ASGI scope under which a call finds `GuardedConnection.write_chunk`."""
WHEN_GONE = "transload.when_gone"
"""The same for `GuardedConnection.when_gone`."""


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


class GuardedConnection(H11Protocol):
    """uvicorn's h11 protocol with `limits`. Made by `guarded`."""

    limits: ClassVar[ConnectionLimits]

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
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
        tell, self._tell_gone = self._tell_gone, None
        if tell is not None:
            tell()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._disarm_head()
            self._num_waiting_bytes = 0
            scope = cast("dict[str, object]", self.scope)
            scope[WHEN_GONE] = self.when_gone
            if scope["http_version"] == "1.1":
                scope[WRITE_CHUNK] = self.write_chunk
            self._keep_listening(len(data))
            return
        if self._num_waiting_bytes == 0:  # from "may be idle" to "has begun and must go on"
            self._disarm_head()
            self._head_timer = self.loop.call_later(self.limits.head_seconds, self._cut_off)
        self._num_waiting_bytes += len(data)
        if self._num_waiting_bytes > self.limits.discarded_bytes:
            self._cut_off()

    def write_chunk(self, body: bytes) -> bool:
        """Send a piece of a chunked answer that has begun. False: not now, `send` it.

        Streams send thousands of pieces a second; this spares each uvicorn's and h11's bookkeeping, which a piece in
        the middle does not change.
        """
        assert body, "an empty chunk would end the answer"
        if self.flow.write_paused or self.transport.is_closing():
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
        return True

    def when_gone(self, tell: Callable[[], None]) -> None:
        """Say so if the peer leaves before the answer that is due now is complete. The body has been read.

        By ASGI a call would wait for that in a task of its own, which costs as much as a good part of its answer.
        """
        if self.cycle.disconnected:
            tell()
            return
        self.flow.resume_reading()  # a large body has paused it, and a peer that leaves is seen by reading
        self._tell_gone = tell

    def _keep_listening(self, num_bytes: int) -> None:
        """uvicorn stops reading at a pipelined request, and with that it stops seeing the peer leave."""
        if self.flow.read_paused and not self.cycle.more_body:
            self._num_early_bytes += num_bytes
            if self._num_early_bytes <= self.limits.head_bytes:
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

    def shutdown(self) -> None:
        try:
            super().shutdown()
        except h11.LocalProtocolError:  # the peer had broken the protocol before
            self._cut_off()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP. Mid-answer there is nothing left to say it with."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE) or self.transport.is_closing():
            self._cut_off()
            return
        body = error_body(RequestError(f"{msg} Nothing was done.", code="invalid_http"))
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        parts = (response, h11.Data(data=body), h11.EndOfMessage())
        self.transport.write(b"".join(self.conn.send(part) or b"" for part in parts))
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


def guarded(limits: ConnectionLimits) -> type[GuardedConnection]:
    """The protocol class for a server with these limits; uvicorn makes one per connection."""

    class Connection(GuardedConnection):
        pass

    Connection.limits = limits
    return Connection
