"""Ports, start and shutdown."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading

import httpx
import pytest

from tests.server.conftest import Serve
from tests.server.fakes import ByteTokenizer, FakeBackend, Script, wait_for
from transload.deploy.spec import Server
from transload.errors import MachineError
from transload.server.app import create_app
from transload.server.serve import serve_http


def serve_once(server: Server) -> None:
    app = create_app(FakeBackend(), ByteTokenizer(), server, seed=0)
    asyncio.run(serve_http(app, server, started=lambda host, port: None))


def test_a_taken_port_is_named_with_what_to_do(serve: Serve) -> None:
    running = serve()
    with pytest.raises(MachineError, match=rf"port {running.port} of 127.0.0.1 is taken.*--port"):
        serve_once(Server(port=running.port))


@pytest.mark.parametrize(("host", "port"), [("203.0.113.7", 0), ("no.such.host.invalid", 0)])
def test_an_address_that_is_not_this_machines_is_named(host: str, port: int) -> None:
    with pytest.raises(MachineError, match=f"host '{host}' is not an address of this machine.*--host"):
        serve_once(Server(host=host, port=port))


def test_port_zero_reports_the_port_that_was_chosen(serve: Serve) -> None:
    running = serve()
    assert running.host == "127.0.0.1"
    assert running.port > 0
    assert httpx.get(f"http://127.0.0.1:{running.port}/health").status_code == 200


def test_shutdown_lets_a_running_call_finish(serve: Serve) -> None:
    server = serve(Script(text="abcdefgh", step_seconds=0.05), grace_seconds=20)
    texts: list[str] = []
    caller = threading.Thread(
        target=lambda: texts.append(server.post("/v1/completions", json={"prompt": "x"}).json()["choices"][0]["text"])
    )
    caller.start()
    wait_for(lambda: bool(server.backend.seen), "the request is submitted")
    server.begin_stop()
    caller.join(20)
    server.stop()
    assert texts == ["abcdefgh"]
    with pytest.raises(ConnectionRefusedError):
        server.connect()


def test_shutdown_ends_what_takes_too_long_with_an_error_the_caller_sees(serve: Serve) -> None:
    server = serve(Script(text="abcdefgh", hold_after=2), grace_seconds=0.3)
    answers: list[httpx.Response] = []

    def call(stream: bool) -> None:
        answers.append(server.post("/v1/completions", json={"prompt": "x", "stream": stream}))

    callers = [threading.Thread(target=call, args=(stream,)) for stream in (False, True)]
    for caller in callers:
        caller.start()
    wait_for(lambda: [seen.num_made for seen in server.backend.seen] == [2, 2], "both calls have tokens")
    server.begin_stop()
    for caller in callers:
        caller.join(20)
    server.stop()
    whole, streamed = sorted(answers, key=lambda answer: answer.status_code, reverse=True)
    assert (whole.status_code, whole.json()["error"]["code"]) == (503, "shutting_down")
    assert '"code":"shutting_down"' in streamed.text
    assert "[DONE]" not in streamed.text
    assert all(seen.cancelled for seen in server.backend.seen)


def test_shutdown_closes_idle_connections_at_once(serve: Serve) -> None:
    server = serve(grace_seconds=20)
    with server.connect() as connection:
        server.stop()
        assert connection.recv(1) == b""


def test_cancelling_the_task_shuts_down_in_order_and_leaves_signal_handlers_alone() -> None:
    async def main() -> None:
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        server = Server(port=0)
        app = create_app(FakeBackend(), ByteTokenizer(), server, seed=0)
        port = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(serve_http(app, server, started=lambda host, number: port.set_result(number)))
        number = await port
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
        _reader, writer = await asyncio.open_connection("127.0.0.1", number)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        writer.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", number))

    asyncio.run(main())
