"""Running the front end on a socket: port, file limit, shutdown in order. Knows no route."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import resource
import socket
from collections.abc import Callable, Iterator

import uvicorn

from transload.deploy.spec import Server
from transload.errors import MachineError, RequestError
from transload.server.app import App
from transload.server.connection import ConnectionLimits, guarded

logger = logging.getLogger("transload.server")

BACKLOG = 2048
WANTED_FILES = 65536
"""Open files to ask for: every connection is one."""


async def serve_http(
    app: App,
    server: Server,
    *,
    started: Callable[[str, int], None],
    stop: asyncio.Event | None = None,
    hurry: asyncio.Event | None = None,
    listener: socket.socket | None = None,
    limits: ConnectionLimits | None = None,
    grace_seconds: float = 10.0,
) -> None:
    """Serve until `stop` is set or this task is cancelled; then let running calls finish for `grace_seconds`, or until
    `hurry` is set.

    Calls that are not done by then end in an error that their callers see. `started(host, port)` is called once
    connections are accepted; port 0 picks a free one. `listener` comes from `reserve_address` and is closed in the
    end. Installs no signal handlers. Raises `MachineError` if the address cannot be had.
    """
    _raise_file_limit()
    listener = listener or reserve_address(server)
    try:
        listener.listen(BACKLOG)
    except OSError as error:  # somebody else bound the same address at the same time, and was first to listen
        listener.close()
        raise MachineError(_why_not(server.host, server.port, error)) from None
    host, port = listener.getsockname()[:2]
    limits = limits or ConnectionLimits()
    config = uvicorn.Config(
        app,
        http=guarded(limits),
        ws="none",
        loop="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=int(limits.idle_seconds),
        timeout_graceful_shutdown=int(grace_seconds) + 5,
    )
    runner = _QuietServer(config)
    serving = asyncio.create_task(runner.serve(sockets=[listener]))
    try:
        await _either(serving, runner.accepting)
        if runner.accepting.is_set():
            started(host, port)
            await _either(serving, stop or asyncio.Event())
    finally:
        await _wind_down(app, runner, serving, grace_seconds, hurry or asyncio.Event())
        listener.close()
        app.close()


class _QuietServer(uvicorn.Server):
    """uvicorn without its signal handlers: the process has one owner, and it is not the HTTP server."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.accepting = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.accepting.set()


async def _either(serving: asyncio.Task[None], event: asyncio.Event) -> None:
    """Wait for the end of the server or for the event."""
    wished = asyncio.create_task(event.wait())
    try:
        await asyncio.wait({serving, wished}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        wished.cancel()


async def _wind_down(
    app: App, runner: uvicorn.Server, serving: asyncio.Task[None], grace_seconds: float, hurry: asyncio.Event
) -> None:
    """Stop accepting, wait for running calls, end the rest by name."""
    runner.should_exit = True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(grace_seconds):
            await _either(serving, hurry)
    if not serving.done():
        app.interrupt_all(RequestError("the server is shutting down", status=503, code="shutting_down"))
        await asyncio.wait({serving}, timeout=6.0 + grace_seconds)
    if not serving.done():
        serving.cancel()
        await asyncio.wait({serving}, timeout=1.0)
    if serving.done() and not serving.cancelled() and (error := serving.exception()) is not None:
        raise error


def reserve_address(server: Server) -> socket.socket:
    """A socket bound to the first address of the server's host. Callers are refused until it listens, so it can be
    taken before the workers start. Raises `MachineError` if it cannot be had."""
    host, port = server.host, server.port
    try:
        family, kind, protocol, _name, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise MachineError(
            f"host {host!r} is not an address of this machine ({error.strerror}); choose another with --host"
        ) from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise MachineError(_why_not(host, port, error)) from None
    return listener


def _why_not(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is taken; choose another with --port, or --port 0 for any free one"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"port {port} needs privileges this process does not have; choose one above 1023 with --port"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"host {host!r} is not an address of this machine; choose another with --host"
    return f"cannot listen on {host} port {port}: {error.strerror}; choose others with --host and --port"


def _raise_file_limit() -> None:
    """Every connection is an open file, and the usual soft limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(WANTED_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
