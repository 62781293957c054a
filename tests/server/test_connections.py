"""Peers that misbehave, on raw sockets: they are cut off or answered, and others notice nothing."""

from __future__ import annotations

import json
import os
import resource
import select
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.server.conftest import RunningServer, Serve
from tests.server.fakes import Script, wait_for
from transload.server.bodies import BodyLimits
from transload.server.connection import ConnectionLimits

HURRIED = ConnectionLimits(head_seconds=0.2, idle_seconds=1.0, stalled_seconds=0.3, discarded_bytes=2**20)


def request(body: dict[str, object], path: str = "/v1/completions") -> bytes:
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    return head.encode() + raw


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes; a reset counts as closing."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    got = b""
    while mark not in got:
        part = connection.recv(65536)
        assert part, f"closed before {mark!r}: {got!r}"
        got += part
    return got


def assert_healthy(server: RunningServer) -> None:
    assert server.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200


@contextmanager
def many_files(number: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < number:
        pytest.skip(f"this machine allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, number), hard))
    yield


def test_a_thousand_idle_connections_hinder_no_one_and_stay_usable(serve: Serve) -> None:
    server = serve()
    with many_files(4096), ExitStack() as stack:
        idle = [stack.enter_context(server.connect()) for _ in range(1000)]
        assert_healthy(server)
        for connection in (idle[0], idle[500], idle[999]):
            connection.sendall(request({"prompt": "x"}))
            assert b"200 OK" in read_until(connection, b"}}}")
    assert_healthy(server)


def test_a_connection_that_says_nothing_is_closed_after_a_time(serve: Serve) -> None:
    server = serve(limits=HURRIED)
    with server.connect() as connection:
        assert read_all(connection) == b""
    assert_healthy(server)


@pytest.mark.parametrize("drip", [b"X-Slow: y\r\n", b"z"])
def test_headers_that_never_end_are_cut_off_however_slowly_they_come(serve: Serve, drip: bytes) -> None:
    server = serve(limits=HURRIED)
    with server.connect() as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
        begun = time.monotonic()
        try:
            while time.monotonic() - begun < 15:
                connection.sendall(drip)
                time.sleep(0.02)
        except (ConnectionResetError, BrokenPipeError):
            pass
        assert time.monotonic() - begun < 10
    assert_healthy(server)


def test_a_body_that_does_not_come_is_answered_with_408(serve: Serve) -> None:
    server = serve(bodies=BodyLimits(max_bytes=1000, seconds=0.2))
    for head in (b"Content-Length: 100\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"):
        with server.connect() as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + head)
            answer = read_all(connection)
            assert b"408" in answer.split(b"\r\n")[0]
            assert b'"code":"body_timeout"' in answer
    assert_healthy(server)


def test_unfinished_bodies_are_held_up_to_a_limit_in_all(serve: Serve) -> None:
    server = serve(bodies=BodyLimits(max_bytes=2**20, held_bytes=3 * 2**19))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    with server.connect() as first, server.connect() as second:
        first.sendall(head + b" " * 900_000)
        second.sendall(head + b" " * 900_000)
        readable, _, _ = select.select([first, second], [], [], 20)  # whichever came to be too much
        assert b"429" in readable[0].recv(65536).split(b"\r\n")[0]
        assert_healthy(server)
        kept = second if readable[0] is first else first
        kept.sendall(b" " * 100_000)
        assert b"400" in kept.recv(65536).split(b"\r\n")[0]  # held to its end, and no JSON
    assert_healthy(server)


def test_a_caller_that_asks_before_sending_a_body_is_answered(serve: Serve) -> None:
    server = serve(bodies=BodyLimits(max_bytes=1000))
    raw = request({"prompt": "x"})
    head, _, body = raw.replace(b"Host: x", b"Host: x\r\nExpect: 100-continue").partition(b"\r\n\r\n")
    with server.connect() as connection:
        connection.sendall(head + b"\r\n\r\n")
        assert read_until(connection, b"\r\n\r\n").startswith(b"HTTP/1.1 100")
        connection.sendall(body)
        assert b"200 OK" in read_until(connection, b"}}}")
    with server.connect() as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2000\r\n\r\n"
        )
        assert read_until(connection, b"}}").startswith(b"HTTP/1.1 413")


def test_a_body_nobody_wants_is_thrown_away_up_to_a_limit_then_the_connection_is_cut(serve: Serve) -> None:
    server = serve(limits=HURRIED)
    with server.connect() as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
        assert b"413" in read_until(connection, b"}}")
        sent = 0
        with pytest.raises((ConnectionResetError, BrokenPipeError)):  # noqa: PT012
            while sent < 200 * 2**20:
                sent += connection.send(b" " * 65536)
        assert sent < 100 * 2**20
    assert_healthy(server)


def test_behind_a_body_nobody_wants_the_next_request_may_come_in_pieces(serve: Serve) -> None:
    server = serve(bodies=BodyLimits(max_bytes=1000))
    with server.connect() as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n\r\n")
        assert b"413" in read_until(connection, b"}}")
        raw = request({"prompt": "x"})
        connection.sendall(b" " * 300_000 + raw[:20])
        time.sleep(0.1)
        connection.sendall(raw[20:50])
        time.sleep(0.1)
        connection.sendall(raw[50:])
        assert b"200 OK" in read_until(connection, b"}}}")


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS to a plain port
        b"nonsense\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"y" * 300_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"CONNECT x:80 HTTP/1.1\r\nHost: x:80\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
def test_what_is_no_http_is_answered_with_400_in_openais_form_and_closed(serve: Serve, garbage: bytes) -> None:
    server = serve()
    with server.connect() as connection:
        connection.sendall(garbage)
        answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 400")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"
    assert_healthy(server)


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_that_sends_more_than_its_request_and_leaves_is_still_seen_to_leave(
    serve: Serve, stream: bool
) -> None:
    server = serve(Script(text="abc", hold_after=1))
    with server.connect() as connection:
        connection.sendall(request({"prompt": "x", "stream": stream}) + b"\r\n" + request({"prompt": "y"}))
        wait_for(lambda: bool(server.backend.seen), "the request is submitted")
        connection.sendall(b"and more")
    wait_for(lambda: server.backend.seen[0].cancelled, "the request is cancelled")
    assert_healthy(server)


@pytest.mark.parametrize("early", [b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: ", b""])
def test_what_comes_during_a_call_is_read_up_to_a_limit(serve: Serve, early: bytes) -> None:
    server = serve(Script(text="abc", hold_after=1))
    flood = early + b"y" * 65536 if early else request({"prompt": "y"}) * 500
    with server.connect() as connection:
        connection.sendall(request({"prompt": "x"}))
        wait_for(lambda: bool(server.backend.seen), "the request is submitted")
        connection.settimeout(0.5)
        sent = 0
        with pytest.raises(TimeoutError):  # noqa: PT012
            while sent < 64 * 2**20:
                sent += connection.send(flood)
        assert sent < 32 * 2**20  # what the two sockets hold
    assert_healthy(server)


def test_a_caller_with_a_large_body_is_still_seen_to_leave(serve: Serve) -> None:
    """Reading pauses while so much waits to be taken."""
    server = serve(Script(text="abc", hold_after=0))
    with server.connect() as connection:
        connection.sendall(request({"prompt": "x", "user": "u" * (1 << 20)}))
        wait_for(lambda: bool(server.backend.seen), "the request is submitted")
    wait_for(lambda: server.backend.seen[0].cancelled, "the request is cancelled")


def test_a_caller_that_leaves_mid_stream_frees_its_request(serve: Serve) -> None:
    server = serve(Script(text="abcdef", hold_after=2))
    with server.connect() as connection:
        connection.sendall(request({"prompt": "x", "stream": True}))
        read_until(connection, b'"text":"b"')
        assert not server.backend.seen[0].cancelled
    wait_for(lambda: server.backend.seen[0].finished == "cancelled", "the request is cancelled")
    wait_for(lambda: 'outcome="cancelled"' in server.get("/metrics").text, "the call is counted as cancelled")
    assert "transload_calls_open 0.0" in server.get("/metrics").text


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_that_leaves_before_the_first_token_frees_all_its_choices(serve: Serve, stream: bool) -> None:
    server = serve(Script(text="abc", hold_after=0))
    with server.connect() as connection:
        connection.sendall(request({"prompt": "x", "stream": stream, "n": 3}))
        wait_for(lambda: len(server.backend.seen) == 3, "the requests are submitted")
    wait_for(lambda: all(seen.finished == "cancelled" for seen in server.backend.seen), "all are cancelled")


def test_a_reader_that_stops_reading_is_cut_off_and_its_requests_freed(serve: Serve) -> None:
    server = serve(Script(text="x" * 400, step_tokens=4, step_seconds=0.0005), limits=HURRIED)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((server.host, server.port))
        # 50 times 200 tokens with 20 log-probabilities each: more than the buffers between the two sockets hold.
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 200, "n": 50, "stream": True}
        connection.sendall(request({**body, "logprobs": True, "top_logprobs": 20}, "/v1/chat/completions"))
        wait_for(lambda: any(seen.cancelled for seen in server.backend.seen), "the stalled reader's requests are freed")
        wait_for(lambda: "transload_calls_open 0.0" in server.get("/metrics").text, "the call is over")
        assert 0 < sum(seen.num_made for seen in server.backend.seen) < 50 * 200
    assert_healthy(server)


def test_pipelined_requests_are_answered_in_order(serve: Serve) -> None:
    server = serve(lambda request: Script(text=chr(request.prompt[-1])))
    with server.connect() as connection:
        connection.sendall(request({"prompt": "a"}) + request({"prompt": "b"}) + request({"prompt": "c"}))
        got = b""
        while got.count(b'"text":') < 3:
            got += connection.recv(65536)
        assert [got.index(b'"text":"%c"' % letter) for letter in b"abc"] == sorted(
            got.index(b'"text":"%c"' % letter) for letter in b"abc"
        )


@pytest.mark.parametrize("piece", [1, 7, 100_000])
def test_an_offer_to_upgrade_is_passed_over_and_the_body_behind_it_is_read(serve: Serve, piece: int) -> None:
    """Java's HttpClient offers HTTP/2 with every first request, curl with --http2."""
    server = serve(lambda request: Script(text=chr(request.prompt[-1])))
    offer = b"HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n"
    offered = [request({"prompt": letter}).replace(b"HTTP/1.1\r\n", offer) for letter in "abc"]
    chunked = b"HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
    offered[1] = b"POST /v1/completions " + chunked + b'\r\ne\r\n{"prompt": "b"\r\n1\r\n}\r\n0\r\n\r\n'
    raw = b"".join(offered) + request({"prompt": "d"})
    with server.connect() as connection:
        for start in range(0, len(raw), piece):
            connection.sendall(raw[start : start + piece])
        got = b""
        while got.count(b'"text":') < 4:
            got += read_until(connection, b"}}}")
        assert got.count(b"200 OK") == 4
        places = [got.index(b'"text":"%c"' % letter) for letter in b"abcd"]
        assert places == sorted(places)


def test_accepted_connections_send_small_writes_at_once(serve: Serve) -> None:
    """TCP_NODELAY: without it headers go out and the first token waits for the peer's 40 ms delayed ACK."""
    server = serve(Script(text="abc", hold_after=1))
    with server.connect() as connection:
        connection.sendall(request({"prompt": "x", "stream": True}))
        read_until(connection, b'"text":"a"')
        options = [
            end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            for end in sockets_of_this_process()
            if is_connected_to(end, connection.getsockname())
        ]
        assert options == [1]


def sockets_of_this_process() -> Iterator[socket.socket]:
    """All sockets, the server's too: it runs in a thread here. Each is a duplicate, closed behind its turn."""
    for number in os.listdir("/proc/self/fd"):
        try:
            end = socket.socket(fileno=os.dup(int(number)))
        except OSError:  # no socket, or the listing's own descriptor
            continue
        with end:
            yield end


def is_connected_to(end: socket.socket, address: object) -> bool:
    try:
        return bool(end.getpeername() == address)
    except OSError:
        return False


def test_an_http_1_0_caller_gets_a_stream_that_ends_with_the_connection(serve: Serve) -> None:
    server = serve(Script(text="abc"))
    raw = request({"prompt": "x", "stream": True}).replace(b"HTTP/1.1", b"HTTP/1.0")
    with server.connect() as connection:
        connection.sendall(raw)
        answer = read_all(connection)
    assert answer.endswith(b"data: [DONE]\n\n")
    assert b"chunked" not in answer


def test_an_http_1_0_caller_gets_a_whole_answer_with_its_length(serve: Serve) -> None:
    server = serve(Script(text="abc"))
    with server.connect() as connection:
        connection.sendall(request({"prompt": "x"}).replace(b"HTTP/1.1", b"HTTP/1.0"))
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert json.loads(body)["choices"][0]["text"] == "abc"
    assert b"content-length: %d\r\n" % len(body) in head + b"\r\n"
