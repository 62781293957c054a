"""TCP between two network namespaces, as between two hosts: other addresses, other Unix names, a wire in between."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.transfer.rig import SMALL, Handoff, Worker
from transload.control.messages import KvData, PeerUp

pytestmark = [pytest.mark.slow, pytest.mark.netns]
NAMES = (f"tl-{os.getpid()}-0", f"tl-{os.getpid()}-1")
HOSTS = ("10.231.77.1", "10.231.77.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


@pytest.fixture
def namespaces() -> Iterator[None]:
    """Two namespaces with a wire between them."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        pytest.skip("needs Linux and the ip command")
    try:
        for name in NAMES:
            ip("netns", "add", name)
        ip("link", "add", "tl-wire0", "netns", NAMES[0], "type", "veth", "peer", "name", "tl-wire1", "netns", NAMES[1])
        for number, (name, host) in enumerate(zip(NAMES, HOSTS, strict=True)):
            ip("-n", name, "address", "add", f"{host}/24", "dev", f"tl-wire{number}")
            ip("-n", name, "link", "set", f"tl-wire{number}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    except subprocess.CalledProcessError as error:
        pytest.skip(f"may not make network namespaces: {error.stderr.decode().strip()}")
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=20)


@contextmanager
def inside(name: str) -> Iterator[None]:
    """This thread, and the sockets and threads it makes, in a namespace."""
    import ctypes

    libc: Any = ctypes.CDLL(None, use_errno=True)
    clone_newnet = 0x40000000
    with open("/proc/thread-self/ns/net") as before, Path("/var/run/netns", name).open() as there:
        assert libc.setns(there.fileno(), clone_newnet) == 0, os.strerror(ctypes.get_errno())
        try:
            yield
        finally:
            assert libc.setns(before.fileno(), clone_newnet) == 0


@pytest.mark.usefixtures("namespaces")
def test_a_handoff_crosses_between_two_network_namespaces_over_tcp() -> None:
    with inside(NAMES[1]):
        receiver = Worker("b", bind_host=HOSTS[1])
    with receiver, inside(NAMES[0]), Worker("a", bind_host=HOSTS[0]) as sender:
        sender.fill(1)
        before = receiver.blocks.copy()
        assert (
            sender.links.address.host_id == receiver.links.address.host_id
        )  # one kernel, which "auto" must see through
        sender.links.connect(receiver.name, receiver.links.address, "auto")
        assert sender.next() == PeerUp(receiver.name, one_sided=False)
        assert receiver.next() == PeerUp(sender.name, one_sided=False)
        handoff = Handoff(sender, receiver, num_blocks=20)
        handoff.expect()
        frames = handoff.by_layer(7)
        for command in frames:
            sender.links.send(command)
        for event in receiver.data_frames(len(frames)):
            assert isinstance(event.frame, KvData)
            assert event.arrived_checksum == event.frame.checksum
        handoff.assert_arrived(before)
        assert sender.layout is SMALL
