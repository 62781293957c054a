"""Two network namespaces with a wire of a given speed between them: two hosts on one machine, for benchmarks.

Needs root on Linux with iproute2; delay needs netem in the kernel. Leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

CLONE_NEWNET = 0x40000000
DEVICE = "wire"
BURST_SECONDS = 5e-4
LEAST_BURST_BYTES = 128 << 10


class Unavailable(Exception):
    """What this machine cannot do, in words."""


class Hosts(msgspec.Struct, frozen=True):
    """Names of the namespaces and the address of each."""

    names: tuple[str, str]
    addresses: tuple[str, str]


@contextlib.contextmanager
def two_hosts(bits_per_second: float | None, delay_seconds: float = 0.0) -> Iterator[Hosts]:
    """None: as fast as it goes. The delay is added in each direction. Raises `Unavailable`."""
    hosts = Hosts((f"tlb-{os.getpid()}-0", f"tlb-{os.getpid()}-1"), ("10.233.7.1", "10.233.7.2"))
    try:
        for name in hosts.names:
            _run("ip", "netns", "add", name)
        first, second = hosts.names
        _run("ip", "link", "add", DEVICE, "netns", first, "type", "veth", "peer", "name", DEVICE, "netns", second)
        for name, address in zip(hosts.names, hosts.addresses, strict=True):
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", DEVICE)
            _run("ip", "-n", name, "link", "set", DEVICE, "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _limit(name, bits_per_second, delay_seconds)
        yield hosts
    finally:
        for name in hosts.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def _limit(name: str, bits_per_second: float | None, delay_seconds: float) -> None:
    parent = ["root"]
    if bits_per_second is not None:
        burst = max(LEAST_BURST_BYTES, round(bits_per_second / 8 * BURST_SECONDS))
        shape = ["tbf", "rate", f"{bits_per_second:.0f}bit", "burst", str(burst), "latency", "50ms"]
        _run("tc", "-n", name, "qdisc", "add", "dev", DEVICE, "root", "handle", "1:", *shape)
        parent = ["parent", "1:1"]
    if delay_seconds:
        delay = ["netem", "delay", f"{delay_seconds * 1e6:.0f}us", "limit", "100000"]
        _run("tc", "-n", name, "qdisc", "add", "dev", DEVICE, *parent, *delay)


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        raise Unavailable(f"{command[0]} is not installed") from None
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{' '.join(command)}: {error.stderr.strip()}") from None


def enter(name: str) -> None:
    """This thread from now on, and the sockets and threads it makes, in a namespace."""
    libc: Any = ctypes.CDLL(None, use_errno=True)
    with Path("/var/run/netns", name).open() as there:
        if libc.setns(there.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@contextlib.contextmanager
def inside(name: str | None) -> Iterator[None]:
    """`enter`, and back; nothing for None."""
    if name is None:
        yield
        return
    libc: Any = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as before:
        enter(name)
        try:
            yield
        finally:
            libc.setns(before.fileno(), CLONE_NEWNET)


def iperf3(
    seconds: int, cores: tuple[int, int] | tuple[None, None], hosts: Hosts | None = None, port: int = 5331
) -> float | None:
    """Bytes a second of one stream, sender and receiver on a core each; None where iperf3 is not installed."""
    try:
        subprocess.run(["iperf3", "--version"], check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None

    def command(number: int, *arguments: str) -> list[str]:
        pinned = ["taskset", "-c", str(cores[number])] if cores[number] is not None else []
        there = ["ip", "netns", "exec", hosts.names[number]] if hosts is not None else []
        return [*there, *pinned, "iperf3", "-p", str(port), *arguments]

    address = hosts.addresses[1] if hosts is not None else "127.0.0.1"
    server = subprocess.Popen(command(1, "-s", "-1"), stdout=subprocess.DEVNULL)
    try:
        time.sleep(0.5)
        done = subprocess.run(
            command(0, "-c", address, "-t", str(seconds), "-J"),
            capture_output=True,
            text=True,
            timeout=seconds + 30,
            check=True,
        )
        return float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"]) / 8
    finally:
        server.kill()
        server.wait()
