"""A split between two hosts (network namespaces): a worker started by hand joins, and KV crosses over TCP."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.live import LiveServer, eventually

pytestmark = [pytest.mark.slow, pytest.mark.netns]
HERE, THERE = "10.213.7.1", "10.213.7.2"
TOKEN = "a-secret-between-two-hosts"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def other_host() -> Iterator[str]:
    """A network namespace joined to this one by a pair of virtual Ethernet ports."""
    name = f"transload-{os.getpid()}"
    try:
        ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    try:
        ip("link", "add", "tl-here", "type", "veth", "peer", "name", "tl-there", "netns", name)
        ip("addr", "add", f"{HERE}/24", "dev", "tl-here")
        ip("link", "set", "tl-here", "up")
        ip("-n", name, "addr", "add", f"{THERE}/24", "dev", "tl-there")
        ip("-n", name, "link", "set", "tl-there", "up")
        ip("-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("link", "del", "tl-here")
        ip("netns", "del", name)


@contextlib.contextmanager
def worker_by_hand(join: str, name: str, host: str | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Started on another host, or on this one."""
    command = [sys.executable, "-m", "transload", "worker", "--join", join, "--name", name]
    environment = {**os.environ, "TRANSLOAD_JOIN_TOKEN": TOKEN}
    there = ["ip", "netns", "exec", host] if host is not None else []
    worker = subprocess.Popen([*there, *command], env=environment)
    try:
        yield worker
    finally:
        worker.terminate()
        worker.wait(20)


def test_a_worker_on_another_host_decodes_what_was_prefilled_here(
    other_host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSLOAD_JOIN_TOKEN", TOKEN)
    deployment = str(Path(__file__).parent / "two_hosts.yaml")
    server = LiveServer(deployment, "--set", f"server.join_host={HERE}", wait=False)
    try:
        join = server.wait_for_output(r"--join (\S+) --name decode-0").group(1)
        with worker_by_hand(join, "decode-0", other_host) as worker:
            server.wait_until_ready()
            answer = server.client.completions.create(model="default", prompt="The capital of France is", max_tokens=2)
            stages = server.get(f"/requests/{answer.id}")["choices"][0]["stages"]
            assert {stage["worker"] for stage in stages if stage["worker"]} == {"prefill-0", "decode-0"}
            assert server.metric("transload_transfer_bytes_total", transport="tcp") > 0
            server.check_idle()
            server.stop(signal.SIGTERM)
            eventually(lambda: worker.poll() is not None)  # it leaves with its front end
    finally:
        server.stop()


def test_a_worker_with_a_wrong_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSLOAD_JOIN_TOKEN", TOKEN)
    server = LiveServer(str(Path(__file__).parent / "two_hosts.yaml"), wait=False)
    try:
        join = server.wait_for_output(r"--join (\S+) --name decode-0").group(1)
        command = [sys.executable, "-m", "transload", "worker", "--join", join, "--name", "decode-0"]
        environment = {**os.environ, "TRANSLOAD_JOIN_TOKEN": "guessed"}
        refused = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert refused.returncode == 1
        assert "wrong join token" in refused.stderr
    finally:
        server.stop()
