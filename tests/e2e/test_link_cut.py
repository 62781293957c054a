"""The link between two hosts (network namespaces) is cut and comes back, and both workers live on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.e2e.live import LiveServer, eventually
from tests.e2e.test_kills import Streaming
from tests.e2e.test_two_hosts import HERE, THERE, TOKEN, ip, other_host, worker_by_hand

pytestmark = [pytest.mark.slow, pytest.mark.netns]
__all__ = ["other_host"]
PROMPT = "The history of the steam engine begins"
LEASE = "links=[{between: [prefill, decode], lease: 2 s}]"


@contextmanager
def cut(host: str, port: int) -> Iterator[None]:
    """Nothing leaves the host from this port any more; everything else goes on."""
    rule = ("ipproto", "tcp", "sport", str(port), "blackhole")
    try:
        ip("-n", host, "rule", "add", "priority", "1", *rule)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no rules for single ports here: {error.stderr.decode().strip()}")
    try:
        yield
    finally:
        ip("-n", host, "rule", "delete", "priority", "1", *rule)


def port_of_the_link(server: LiveServer, join: str) -> int:
    """Where the prefill worker has reached the decode worker."""
    connections = psutil.Process(server.pid("prefill-0")).net_connections("tcp")
    (port,) = [peer.raddr.port for peer in connections if peer.raddr and peer.raddr.ip == THERE]
    assert str(port) != join.rpartition(":")[2]
    return int(port)


def workers_of(server: LiveServer, max_tokens: int = 4) -> tuple[str, set[str]]:
    """A short answer, and who has made it."""
    answer = server.client.completions.create(
        model="default", prompt=PROMPT, max_tokens=max_tokens, temperature=0, extra_body={"ignore_eos": True}
    )
    stages = server.get(f"/requests/{answer.id}")["choices"][0]["stages"]
    return answer.choices[0].text, {stage["worker"] for stage in stages if stage["worker"]}


def test_a_cut_link_changes_no_text_and_is_dialed_again(other_host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSLOAD_JOIN_TOKEN", TOKEN)
    deployment = str(Path(__file__).parent / "two_hosts.yaml")
    exact = ("--dtype", "float32", "--deterministic", "--set", f"server.join_host={HERE}", "--set", LEASE)
    server = LiveServer(deployment, *exact, wait=False)
    try:
        join = server.wait_for_output(r"--join (\S+) --name decode-0").group(1)
        with worker_by_hand(join, "decode-0", other_host):
            server.wait_until_ready()
            undisturbed, workers = workers_of(server, 24)
            assert workers == {"prefill-0", "decode-0"}
            pids = {name: worker["pid"] for name, worker in server.workers().items()}
            running = Streaming(server, PROMPT, 24)
            running.start()
            running.wait_for_pieces(3)
            with cut(other_host, port_of_the_link(server, join)):
                waiting = Streaming(server, PROMPT, 24)
                waiting.start()  # its handoff cannot succeed now
                for caller in (running, waiting):
                    caller.finish()
                    assert caller.text == undisturbed
                    assert caller.completion_tokens == 24
                eventually(lambda: not server.get("/health")["links"])
                assert workers_of(server)[1] == {"decode-0"}  # it prefills itself, and nobody waits for the link
            eventually(lambda: server.get("/health")["links"])
            eventually(lambda: workers_of(server)[1] == {"prefill-0", "decode-0"})
            assert workers_of(server, 24)[0] == undisturbed
            assert {name: worker["pid"] for name, worker in server.workers().items()} == pids, "nobody was restarted"
            server.check_idle()
    finally:
        server.stop()
