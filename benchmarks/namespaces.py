"""Two network namespaces with a wire of a given speed between them: two hosts on one machine, for benchmarks.

Needs root on Linux with iproute2. Without delay the wire is a pair of virtual Ethernet ports and a token bucket.
With delay it is two tun devices and a process between them, which holds each packet as long as a line of that speed and
length would: it passes large segments through whole and bills their headers one by one. Leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import multiprocessing
import os
import queue
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec

CLONE_NEWNET = 0x40000000
DEVICE = "wire"
BURST_SECONDS = 5e-4
LEAST_BURST_BYTES = 128 << 10


TUN_NAME, TUN_OFFLOAD = 0x400454CA, 0x400454D0  # TUNSETIFF, TUNSETOFFLOAD
TUN_FLAGS = 0x0001 | 0x1000 | 0x4000  # a tun device, packets without more than the header of a virtual network card
TUN_SEGMENTS = 1 | 2 | 4  # checksums and TCP segments of both versions are left to us
CARD_HEADER = struct.Struct("<BBHHHH")  # flags, kind, bytes of headers, bytes of a segment, two about checksums
ETHERNET_BYTES = 14
QUEUE_SECONDS = 0.05


class Unavailable(Exception):
    """What this machine cannot do, in words."""


class Hosts(msgspec.Struct, frozen=True):
    """Names of the namespaces and the address of each."""

    names: tuple[str, str]
    addresses: tuple[str, str]


@contextlib.contextmanager
def two_hosts(bits_per_second: float | None, delay_seconds: float = 0.0) -> Iterator[Hosts]:
    """None: as fast as it goes. The delay is added in each direction. Raises `Unavailable`."""
    relay: multiprocessing.process.BaseProcess | None = None
    hosts = Hosts((f"tlb-{os.getpid()}-0", f"tlb-{os.getpid()}-1"), ("10.233.7.1", "10.233.7.2"))
    try:
        for name in hosts.names:
            _run("ip", "netns", "add", name)
        if delay_seconds:
            relay = _start_relay(hosts, bits_per_second, delay_seconds)
        else:
            first, second = hosts.names
            _run("ip", "link", "add", DEVICE, "netns", first, "type", "veth", "peer", "name", DEVICE, "netns", second)
        for name, address in zip(hosts.names, hosts.addresses, strict=True):
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", DEVICE)
            _run("ip", "-n", name, "link", "set", DEVICE, "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")
            if bits_per_second is not None and relay is None:
                _limit(name, bits_per_second)
        yield hosts
    finally:
        if relay is not None:
            relay.kill()
            relay.join()
        for name in hosts.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def _limit(name: str, bits_per_second: float) -> None:
    burst = max(LEAST_BURST_BYTES, round(bits_per_second / 8 * BURST_SECONDS))
    shape = [
        "tbf",
        "rate",
        f"{bits_per_second:.0f}bit",
        "burst",
        str(burst),
        "latency",
        f"{QUEUE_SECONDS * 1000:.0f}ms",
    ]
    _run("tc", "-n", name, "qdisc", "add", "dev", DEVICE, "root", *shape)


def _start_relay(
    hosts: Hosts, bits_per_second: float | None, delay_seconds: float
) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_relay, args=(there, hosts, bits_per_second, delay_seconds), daemon=True)
    process.start()
    problem = here.recv() if here.poll(30) else "the relay does not start"
    if problem is not None:
        process.kill()
        raise Unavailable(problem)
    return process


def _relay(ready: Connection, hosts: Hosts, bits_per_second: float | None, delay_seconds: float) -> None:
    """Carry packets between two tun devices for ever."""
    sys.setswitchinterval(1e-4)
    ports: list[int] = []
    try:
        for name in hosts.names:
            enter(name)
            port = os.open("/dev/net/tun", os.O_RDWR)
            fcntl.ioctl(port, TUN_NAME, struct.pack("16sH22x", DEVICE.encode(), TUN_FLAGS))
            fcntl.ioctl(port, TUN_OFFLOAD, TUN_SEGMENTS)
            ports.append(port)
    except OSError as error:
        ready.send(f"no tun device: {error}")
        return
    threads = []
    for source, target in (ports, reversed(ports)):
        line: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        threads.append(threading.Thread(target=_take_in, args=(source, line, bits_per_second, delay_seconds)))
        threads.append(threading.Thread(target=_give_out, args=(target, line)))
    for thread in threads:
        thread.start()
    ready.send(None)


def _take_in(
    port: int, line: queue.SimpleQueue[tuple[float, bytes]], bits_per_second: float | None, delay_seconds: float
) -> None:
    free_at = 0.0
    while True:
        packet = os.read(port, 1 << 17)
        now = time.monotonic()
        if free_at - now > QUEUE_SECONDS:
            continue  # the queue in front of the line is full
        _, _, header_bytes, segment_bytes, _, _ = CARD_HEADER.unpack_from(packet)
        num_bytes = len(packet) - CARD_HEADER.size
        num_segments = -(-(num_bytes - header_bytes) // segment_bytes) if segment_bytes else 1
        on_the_wire = num_bytes + (num_segments - 1) * header_bytes + num_segments * ETHERNET_BYTES
        free_at = max(free_at, now) + (on_the_wire * 8 / bits_per_second if bits_per_second is not None else 0.0)
        line.put((free_at + delay_seconds, packet))


def _give_out(port: int, line: queue.SimpleQueue[tuple[float, bytes]]) -> None:
    while True:
        due, packet = line.get()
        early = due - time.monotonic()
        if early > 0:
            time.sleep(early)
        with contextlib.suppress(OSError):  # the device is not up yet
            os.write(port, packet)


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
