"""A real server on a real socket, in a thread, in front of a scripted backend."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import httpx
import openai
import pytest

from tests.server.fakes import ByteTokenizer, FakeBackend, Script
from transload.control.messages import Request
from transload.deploy.spec import Server
from transload.server.app import App, create_app
from transload.server.bodies import BodyLimits
from transload.server.connection import ConnectionLimits
from transload.server.serve import serve_http


class RunningServer:
    """`serve_http` in a thread of its own."""

    def __init__(
        self,
        backend: FakeBackend,
        server: Server,
        limits: ConnectionLimits,
        grace_seconds: float,
        bodies: BodyLimits | None,
    ) -> None:
        self.backend = backend
        self.tokenizer = ByteTokenizer()
        self.app: App = create_app(backend, self.tokenizer, server, seed=7, bodies=bodies)
        self.host, self.port = "", 0
        self._settings = (server, limits, grace_seconds)
        self._up = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._up.wait(20), "the server did not start"
        if self._error is not None:
            raise self._error
        self._http = httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            self._error = error
            self._up.set()

    async def _main(self) -> None:
        server, limits, grace_seconds = self._settings
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()

        def started(host: str, port: int) -> None:
            self.host, self.port = host, port
            self._up.set()

        await serve_http(self.app, server, started=started, stop=self._stop, limits=limits, grace_seconds=grace_seconds)

    def begin_stop(self) -> None:
        assert self._loop is not None
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)

    def stop(self) -> None:
        """Shut down in order; raises what the server died of, if it did."""
        if self._thread.is_alive():
            self.begin_stop()
            self._thread.join(30)
            assert not self._thread.is_alive(), "the server did not stop"
        self._http.close()
        if self._error is not None:
            raise self._error

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=20)

    def client(self, **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", **{"max_retries": 0, **settings})

    def post(self, path: str, **settings: Any) -> httpx.Response:
        return self._http.post(path, **settings)

    def get(self, path: str, **settings: Any) -> httpx.Response:
        return self._http.get(path, **settings)


class Serve(Protocol):
    """Starts a server that the test's end stops."""

    def __call__(
        self,
        script: Script | Callable[[Request], Script] | None = None,
        *,
        server: Server | None = None,
        limits: ConnectionLimits | None = None,
        grace_seconds: float = 2.0,
        bodies: BodyLimits | None = None,
    ) -> RunningServer: ...


def _serving() -> Iterator[Serve]:
    running: list[RunningServer] = []

    def start(
        script: Script | Callable[[Request], Script] | None = None,
        *,
        server: Server | None = None,
        limits: ConnectionLimits | None = None,
        grace_seconds: float = 2.0,
        bodies: BodyLimits | None = None,
    ) -> RunningServer:
        backend = FakeBackend(script or Script())
        server = server or Server(port=0)
        running.append(RunningServer(backend, server, limits or ConnectionLimits(), grace_seconds, bodies))
        return running[-1]

    yield start
    for one in running:
        one.stop()


@pytest.fixture
def serve() -> Iterator[Serve]:
    yield from _serving()


@pytest.fixture(scope="module")
def serve_module() -> Iterator[Serve]:
    """As `serve`, for servers that all tests of a file share."""
    yield from _serving()
