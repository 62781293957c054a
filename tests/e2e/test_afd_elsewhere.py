"""FFN workers that are started by hand, on another host or on this one: 2a1f and 1a2f over TCP, and kills there."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.live import LiveServer, eventually
from tests.e2e.test_afd import STREAMED, counts, golden, stream
from tests.e2e.test_exact import EXACT
from tests.e2e.test_two_hosts import HERE, TOKEN, other_host, worker_by_hand

__all__ = ["other_host"]  # a fixture
pytestmark = pytest.mark.slow
FOLDER = Path(__file__).parent
EXPECTED = [golden(prompt) for prompt in STREAMED]


@contextlib.contextmanager
def waiting_server(file: str, *changes: str) -> Iterator[LiveServer]:
    """A server that waits for workers to join."""
    flags = [flag for change in changes for flag in ("--set", change)]
    server = LiveServer(str(FOLDER / file), *EXACT, *flags, wait=False)
    try:
        yield server
        server.check_idle()
        server.stop(signal.SIGTERM)
    finally:
        server.stop()


def address(server: LiveServer) -> str:
    return server.wait_for_output(r"--join (\S+) --name ffn-0").group(1)


def calls_by(server: LiveServer, worker: str) -> float:
    return server.metric("transload_ffn_calls_total", worker=worker)


@pytest.mark.netns
def test_two_attention_workers_call_one_on_another_host_and_go_on_when_it_is_killed(
    other_host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSLOAD_JOIN_TOKEN", TOKEN)
    with waiting_server("two_attention_ffn_elsewhere.yaml", f"server.join_host={HERE}") as server:
        join = address(server)
        with worker_by_hand(join, "ffn-0", other_host) as worker:
            server.wait_until_ready()
            assert stream(server, lambda: None) == EXPECTED
            assert stream(server, lambda: None) == EXPECTED
            for attention in ("attention-0", "attention-1"):
                assert server.workers()[attention]["ffn_links"] == {"ffn-0": "tcp"}
            eventually(lambda: all(calls_by(server, f"attention-{number}") > 0 for number in (0, 1)))
            assert server.metric("transload_ffn_fallbacks_total") == 0
            assert server.metric("transload_ffn_busy_share", worker="ffn-0") > 0
            assert server.metric("transload_ffn_hop_seconds_count") > 0
            assert stream(server, worker.kill) == EXPECTED
        eventually(lambda: server.metric("transload_ffn_fallbacks_total") > 0)
        with worker_by_hand(join, "ffn-0", other_host):
            eventually(lambda: server.workers()["attention-0"].get("ffn_links") == {"ffn-0": "tcp"})
            pid = server.pid("attention-0")
            assert stream(server, lambda: server.kill("attention-0")) == EXPECTED
            server.wait_for_worker("attention-0", other_than=pid)
            eventually(lambda: server.metric("transload_ffn_computed_rows_total", worker="ffn-0") > 0)


def test_one_of_two_workers_that_were_started_by_hand_is_enough_and_another_may_join_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRANSLOAD_JOIN_TOKEN", TOKEN)
    with waiting_server("one_attention_two_ffn_elsewhere.yaml") as server, contextlib.ExitStack() as workers:
        join = address(server)

        def start(name: str) -> subprocess.Popen[bytes]:
            return workers.enter_context(worker_by_hand(join, name))

        first, _ = start("ffn-0"), start("ffn-1")
        server.wait_until_ready()
        assert stream(server, first.kill) == EXPECTED
        eventually(lambda: server.workers()["attention-0"].get("ffn_links") == {"ffn-1": "tcp"})
        start("ffn-0")
        eventually(lambda: len(server.workers()["attention-0"].get("ffn_links", {})) == 2)
        before = counts(server, "ffn-0").get("requests", 0)
        assert stream(server, lambda: None) == EXPECTED
        eventually(lambda: counts(server, "ffn-0").get("requests", 0) > before)
        assert server.metric("transload_ffn_fallbacks_total") == 0
