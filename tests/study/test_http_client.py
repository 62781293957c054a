from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest

from tests.study.scripted_server import Call, Script, scripted_server
from transload.errors import DeploymentError
from transload.study.http_client import ConnectFailed, ConnectionBroke, HttpClient, NotHttp, parse_url


class Kept:
    """An answer, as it came."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.content = b""
        self.times: list[float] = []

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.status, self.headers = status, headers

    def body(self, part: bytes, at_seconds: float) -> None:
        self.content += part
        self.times.append(at_seconds)


def with_server(script: Script, test: Callable[[HttpClient], Awaitable[None]], **headers: str) -> None:
    async def main() -> None:
        async with scripted_server(script) as url:
            client = HttpClient(parse_url(url), headers)
            try:
                await asyncio.wait_for(test(client), 60)
            finally:
                await client.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("localhost:8000/v1/", "http://localhost:8000"),
        ("https://api.example.com/v1", "https://api.example.com:443"),
        ("http://[::1]:9/serve/v1", "http://[::1]:9/serve"),
    ],
)
def test_addresses_are_read_as_people_write_them(url: str, wanted: str) -> None:
    assert parse_url(url).url == wanted


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://",
        "ftp://host",
        "http://host:99999",
        "http://a b",
        "http://h/?x=1",
        "http://u:p@h",
        "http://h/\r\nX:",
    ],
)
def test_what_is_not_an_address_is_refused(url: str) -> None:
    with pytest.raises(DeploymentError, match="give the server's address"):
        parse_url(url)


def test_a_connection_is_used_again_and_a_second_one_opened_only_for_a_request_at_the_same_time() -> None:
    ports: list[str] = []
    both_in = asyncio.Event

    async def script(call: Call) -> None:
        ports.append(call._writer.get_extra_info("peername")[1])
        if call.path == "/together":
            waiting.append(call)
            if len(waiting) == 2:
                met.set()
            await met.wait()
        await call.json(200, {})

    waiting: list[Call] = []
    met = both_in()

    async def test(client: HttpClient) -> None:
        for _ in range(3):
            await client.exchange("POST", "/alone", b"{}", Kept())
        assert len(set(ports)) == 1
        await asyncio.gather(*(client.exchange("POST", "/together", b"{}", Kept()) for _ in range(2)))
        assert len(set(ports)) == 2

    with_server(script, test)


def test_the_request_arrives_as_sent_with_its_headers() -> None:
    seen: list[Call] = []

    async def script(call: Call) -> None:
        seen.append(call)
        await call.json(200, {"ok": True})

    async def test(client: HttpClient) -> None:
        answer = Kept()
        body = b'{"prompt": "' + b"x" * 300_000 + b'"}'
        await client.exchange("POST", "/v1/completions", body, answer)
        assert seen[0].body == body
        assert seen[0].headers["authorization"] == "Bearer k"
        assert seen[0].headers["host"] == f"127.0.0.1:{client.address.port}"
        assert (answer.status, answer.content) == (200, b'{"ok":true}')
        assert answer.headers["content-type"] == "application/json"

    with_server(script, test, Authorization="Bearer k")


def test_parts_of_a_body_are_handed_on_as_they_come() -> None:
    go_on = asyncio.Event()

    async def script(call: Call) -> None:
        await call.stream()
        await call.chunk(b"one")
        await go_on.wait()
        await call.chunk(b"two")
        await call.end()

    async def test(client: HttpClient) -> None:
        class Continue(Kept):
            def body(self, part: bytes, at_seconds: float) -> None:
                super().body(part, at_seconds)
                go_on.set()

        answer = Continue()
        await client.exchange("POST", "/", b"{}", answer)
        assert answer.content == b"onetwo"
        assert len(answer.times) == 2
        assert answer.times[0] <= answer.times[1]

    with_server(script, test)


def test_an_idle_connection_that_the_server_has_closed_is_replaced_unseen() -> None:
    num_calls = 0

    async def script(call: Call) -> None:
        nonlocal num_calls
        num_calls += 1
        await call.json(200, {})
        call.hang_up()

    async def test(client: HttpClient) -> None:
        for _ in range(3):
            await client.exchange("POST", "/", b"{}", Kept())
        assert num_calls == 3

    with_server(script, test)


def test_a_connection_closed_while_a_request_waits_on_it_is_tried_again_only_if_it_was_used_before() -> None:
    num_calls = 0

    async def script(call: Call) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls in (2, 4):
            call.hang_up()  # as a server whose keep-alive ends just now
            return
        await call.json(200, {})

    async def test(client: HttpClient) -> None:
        await client.exchange("POST", "/", b"{}", Kept())
        await client.exchange("POST", "/", b"{}", Kept())
        assert num_calls == 3
        await client.close()
        with pytest.raises(ConnectionBroke, match="before the answer began"):
            await client.exchange("POST", "/", b"{}", Kept())

    with_server(script, test)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", NotHttp),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf", ConnectionBroke),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel", ConnectionBroke),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", NotHttp),
        (b"HTTP/1.1 200", ConnectionBroke),
        (b"", ConnectionBroke),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000, NotHttp),
    ],
)
def test_answers_that_break_off_are_told_from_answers_that_are_not_http(
    content: bytes, problem: type[Exception]
) -> None:
    async def script(call: Call) -> None:
        await call.raw(content)
        call._writer.write_eof()
        await asyncio.sleep(0)
        call._writer.close()

    async def test(client: HttpClient) -> None:
        with pytest.raises(problem):
            await client.exchange("POST", "/", b"{}", Kept())

    with_server(script, test)


def test_an_answer_that_ends_with_the_connection_is_complete() -> None:
    async def script(call: Call) -> None:
        await call.raw(b"HTTP/1.0 200 OK\r\n\r\nall of it")
        call._writer.close()

    async def test(client: HttpClient) -> None:
        answer = Kept()
        await client.exchange("POST", "/", b"{}", answer)
        assert answer.content == b"all of it"

    with_server(script, test)


def test_a_cancelled_exchange_closes_its_connection_and_the_next_gets_its_own_answer() -> None:
    first_here = asyncio.Event()

    async def script(call: Call) -> None:
        if call.path == "/slow":
            await call.stream()
            first_here.set()
            await asyncio.sleep(3600)
        await call.json(200, call.path)

    async def test(client: HttpClient) -> None:
        slow = asyncio.create_task(client.exchange("POST", "/slow", b"{}", Kept()))
        await first_here.wait()
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        answer = Kept()
        await client.exchange("POST", "/next", b"{}", answer)
        assert answer.content == b'"/next"'

    with_server(script, test)


def test_an_answer_nobody_asked_for_closes_the_connection() -> None:
    async def script(call: Call) -> None:
        await call.json(200, call.path)
        if call.path == "/first":
            await call.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged")

    async def test(client: HttpClient) -> None:
        await client.exchange("POST", "/first", b"{}", Kept())
        answer = Kept()
        await client.exchange("POST", "/second", b"{}", answer)
        assert answer.content == b'"/second"'

    with_server(script, test)


def test_no_server_is_a_failure_to_connect_in_plain_words() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]

        async def main() -> None:
            client = HttpClient(parse_url(f"127.0.0.1:{port}"))
            with pytest.raises(ConnectFailed, match="connection refused"):
                await client.exchange("GET", "/", b"", Kept())

        asyncio.run(main())
