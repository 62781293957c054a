"""Damaged bodies and damaged HTTP: an answer in OpenAI's form or a closed connection, never a 500, never a hang."""

from __future__ import annotations

import json
import socket
from random import Random
from typing import Any

import pytest

from tests.mutations import EXTREMES, mutations
from tests.server.conftest import RunningServer, Serve
from transload.deploy.spec import Server

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {
        "model": "default",
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        ],
        "max_tokens": 4,
        "temperature": 0.5,
        "stop": ["\n", "end"],
        "logit_bias": {"17": -2.5},
        "stream": False,
        "n": 1,
        "seed": 3,
    },
    COMPLETION: {"prompt": ["hello", "there"], "max_tokens": 3, "logprobs": 2, "echo": False, "top_p": 0.9, "top_k": 5},
    "/tokenize": {"prompt": "hello"},
}  # fmt: skip
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1.5,
    1e308,
    "",
    "x" * 300,
    "\ud800",
    [],
    [[]],
    {},
    [None],
    {"a": {"b": 1}},
    *EXTREMES,
)


@pytest.fixture(scope="module")
def server(serve_module: Serve) -> RunningServer:
    return serve_module(server=Server(port=0, max_body_bytes=100_000, max_waiting=8))


def check(server: RunningServer, path: str, raw: bytes) -> None:
    answer = server.post(path, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, (answer.status_code, raw, answer.text)
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_body_is_answered_or_refused(server: RunningServer, path: str, seed: int) -> None:
    for damaged in mutations(json.dumps(BODIES[path]).encode(), seed, 40):
        check(server, path, damaged)


def places(body: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a value can be put instead of another."""
    found = [at] if at else []
    if isinstance(body, dict):
        return found + [place for key, part in body.items() for place in places(part, (*at, key))]
    if isinstance(body, list):
        return found + [place for index, part in enumerate(body) for place in places(part, (*at, index))]
    return found


@pytest.mark.parametrize("path", BODIES)
def test_any_value_in_any_place_is_answered_or_refused(server: RunningServer, path: str) -> None:
    random = Random(path)
    for place in places(BODIES[path]):
        for value in random.sample(VALUES, 6):
            body = json.loads(json.dumps(BODIES[path]))
            inside = body
            for key in place[:-1]:
                inside = inside[key]
            inside[place[-1]] = value
            check(server, path, json.dumps(body).encode())


@pytest.mark.parametrize("seed", range(3))
def test_damaged_http_is_answered_or_the_connection_is_closed(server: RunningServer, seed: int) -> None:
    body = json.dumps(BODIES[COMPLETION]).encode()
    lines = (f"POST {COMPLETION} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(body)}")
    head = "\r\n".join((*lines, "", ""))
    for damaged in mutations(head.encode() + body, seed, 25):
        with server.connect() as sock:
            sock.settimeout(20)
            try:
                sock.sendall(damaged)
                sock.shutdown(socket.SHUT_WR)
                while part := sock.recv(1 << 16):
                    assert b" 500 " not in part.partition(b"\r\n")[0], damaged
            except ConnectionError:
                pass  # refused in the middle
    check(server, COMPLETION, body)
