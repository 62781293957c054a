"""HTTP/1.1 for the load generator: keep-alive connections that cost little per token and take the time at once.

h11 does the protocol. CPU time of the client per event, measured with 32 streams of one event every 20 ms: httpx
125 us, h11 31 to 48 us, a hand-written parser 33 us. The time of a token is when its bytes were read from the socket,
taken before anything is parsed. This file must never know what the bodies mean.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Callable
from typing import Protocol
from urllib.parse import urlsplit

import h11
import msgspec

from transload.errors import DeploymentError

MAX_HEAD_BYTES = 64 * 1024


class Answer(Protocol):
    """Takes in an HTTP answer as it comes."""

    def head(self, status: int, headers: dict[str, str]) -> None:
        """Status and headers (names in lower case) are here."""
        ...

    def body(self, part: bytes, at_seconds: float) -> None:
        """Part of the body, and when it was read (on the event loop's clock)."""
        ...


class WholeAnswer:
    """Keeps an answer until it is whole."""

    def __init__(self) -> None:
        self.status = 0
        self.content = b""

    def head(self, status: int, headers: dict[str, str]) -> None:  # noqa: ARG002
        self.status = status

    def body(self, part: bytes, at_seconds: float) -> None:  # noqa: ARG002
        self.content += part


class ConnectFailed(Exception):
    """No connection could be made."""


class ConnectionBroke(Exception):
    """The connection ended before the answer did."""


class NotHttp(Exception):
    """What came is not HTTP."""


class Address(msgspec.Struct, frozen=True):
    """Where a server is. `path` is what the API's paths are appended to, without a slash at its end."""

    host: str
    port: int
    secure: bool
    path: str

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.secure else ''}://{host}:{self.port}{self.path}"


def parse_url(url: str) -> Address:
    """Reads `http://host:port`, `host:port` and the like; a `/v1` at the end is taken off. Raises `DeploymentError`."""
    wanted = "give the server's address, such as http://127.0.0.1:8000"
    text = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as problem:
        raise DeploymentError(f"url {url!r}: {problem}; {wanted}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise DeploymentError(f"url {url!r} is not the address of a server; {wanted}")
    if any(not 32 < ord(letter) < 127 for letter in text):
        raise DeploymentError(f"url {url!r} has letters that an address cannot have; {wanted}")
    secure = parts.scheme == "https"
    path = parts.path.rstrip("/").removesuffix("/v1")
    return Address(parts.hostname, port or (443 if secure else 80), secure, path)


class HttpClient:
    """Connections to one server: as many as there are requests at once, kept open for the next ones."""

    def __init__(self, address: Address, headers: dict[str, str] | None = None) -> None:
        self.address = address
        host = f"[{address.host}]" if ":" in address.host else address.host
        default_port = 443 if address.secure else 80
        self._headers = {
            "Host": host if address.port == default_port else f"{host}:{address.port}",
            "User-Agent": "transload-bench",
            "Accept": "text/event-stream, application/json",
            **(headers or {}),
        }
        self._tls = ssl.create_default_context() if address.secure else None
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()

    async def exchange(
        self, method: str, path: str, body: bytes, answer: Answer, sent: Callable[[], None] | None = None
    ) -> None:
        """One request and its whole answer. `sent` is called when the request is handed to the socket.

        Raises `ConnectFailed`, `ConnectionBroke` or `NotHttp`. If cancelled, the connection is closed. Has no
        deadline of its own: the caller sets one.
        """
        while True:
            connection, is_reused = await self._connection()
            try:
                await connection.exchange(self._request(method, path, body), body, answer, sent)
            except ConnectionBroke:
                if is_reused and not connection.num_answer_bytes:
                    continue  # the server had closed an idle connection; the request was never seen
                raise
            finally:
                self._put_back(connection)
            return

    async def close(self) -> None:
        """Close all connections, those in use too."""
        for connection in list(self._open):
            connection.abort()
        self._idle.clear()
        await asyncio.sleep(0)  # transports finish closing in the loop's next turn

    def _request(self, method: str, path: str, body: bytes) -> h11.Request:
        headers = dict(self._headers)
        if body:
            headers["Content-Type"] = "application/json"
            headers["Content-Length"] = str(len(body))
        return h11.Request(method=method, target=self.address.path + path, headers=list(headers.items()))

    async def _connection(self) -> tuple[_Connection, bool]:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable:
                return connection, True
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(
                lambda: _Connection(loop, self._open), self.address.host, self.address.port, ssl=self._tls
            )
        except OSError as problem:
            raise ConnectFailed(_why(problem)) from None
        return connection, False

    def _put_back(self, connection: _Connection) -> None:
        if connection.is_usable:
            self._idle.append(connection)
        else:
            connection.abort()


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, open_connections: set[_Connection]) -> None:
        self.num_answer_bytes = 0
        self._loop = loop
        self._open = open_connections
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._done: asyncio.Future[None] | None = None

    @property
    def is_usable(self) -> bool:
        """Open, idle, and the last answer was complete with nothing after it."""
        if self._transport is None or self._transport.is_closing():
            return False
        return self._http.our_state is h11.IDLE and not self._http.trailing_data[0]

    async def exchange(self, head: h11.Request, body: bytes, answer: Answer, sent: Callable[[], None] | None) -> None:
        assert self.is_usable
        assert self._transport is not None
        self.num_answer_bytes = 0
        self._answer = answer
        self._done = self._loop.create_future()
        parts = [self._http.send(head), self._http.send(h11.Data(data=body)), self._http.send(h11.EndOfMessage())]
        self._transport.write(b"".join(part for part in parts if part))
        if sent is not None:
            sent()
        try:
            await self._done
        finally:
            self._done = self._answer = None

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._open.add(self)

    def data_received(self, data: bytes) -> None:
        now = self._loop.time()
        self.num_answer_bytes += len(data)
        self._http.receive_data(data)
        self._read(now)

    def eof_received(self) -> bool:
        self._http.receive_data(b"")
        self._read(self._loop.time())
        return False

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._open.discard(self)
        self._fail(self._broke())

    def _read(self, now: float) -> None:
        if self._done is None or self._done.done():
            self.abort()  # nothing is asked, or the asker has gone: whatever this is, it is not for us
            return
        assert self._answer is not None
        try:
            while True:
                match self._http.next_event():
                    case h11.Response() as head:
                        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}
                        self._answer.head(head.status_code, headers)
                    case h11.Data(data=part):
                        self._answer.body(bytes(part), now)
                    case h11.EndOfMessage():
                        self._finish()
                        return
                    case h11.NEED_DATA | h11.PAUSED:
                        return
                    case h11.ConnectionClosed():
                        self._fail(self._broke())
                        return
        except h11.RemoteProtocolError as problem:
            is_closed = self._http.trailing_data[1]  # h11 complains of the end too, in its own words
            self._fail(self._broke() if is_closed else NotHttp(str(problem)))

    def _broke(self) -> ConnectionBroke:
        where = "in the middle of the answer" if self.num_answer_bytes else "before the answer began"
        return ConnectionBroke(f"connection closed {where}")

    def _finish(self) -> None:
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _fail(self, problem: Exception) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(problem)
        self.abort()


def _why(problem: OSError) -> str:
    """In words: asyncio's own say "Connect call failed" for a refused connection."""
    if problem.errno is not None and problem.errno > 0 and not isinstance(problem, socket.gaierror | ssl.SSLError):
        return os.strerror(problem.errno).lower()
    return problem.strerror or str(problem) or type(problem).__name__
