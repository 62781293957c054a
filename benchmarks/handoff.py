"""How fast KV cells cross between two worker processes on one host, against a copy inside one process.

    python benchmarks/handoff.py [--out handoff.json] [--megabytes 8 64 256] [--repeat 7] [--namespaces]

Two processes, each pinned to a core where there are two. The blocks are a random permutation of a pool a quarter larger
than the transfer, on both sides. A transfer is timed from the first command to the answer of the receiver, who has
taken in every frame and computed its checksum: what a request would wait for if nothing else were to wait for. Beside
it, in the same run, the best of three ways to copy the same cells inside one process with numpy, without any checksum.
`direct`: the cells have been written into the receiver's blocks, as a prefill there would; timed is the same, and apart
from that how long the receiver's side takes to know. TCP stands against one stream of iperf3 in the same run, if that
is installed. `--namespaces` (root): over a wire of 1 and 10 Gbit/s between two network namespaces, without and with
1 ms of delay each way. GB are 10^9 bytes; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal, get_args

import msgspec
import numpy as np
import xxhash
from namespaces import Hosts, Unavailable, enter, inside, iperf3, two_hosts
from surroundings import surroundings

from transload.control.messages import (
    EngineEvent,
    ExpectKv,
    ForgetKv,
    KvData,
    KvDone,
    KvReady,
    PeerFrame,
    PeerUp,
    SendFrame,
    TransferId,
    WorkerId,
)
from transload.model.native.library import load as native_library
from transload.transfer.cells import CellMover, Cells
from transload.transfer.layout import KvLayout
from transload.transfer.links import LinkFailed, Links
from transload.transfer.memory import KvMemory

Transport = Literal["direct", "shm", "tcp"]
TRANSPORTS: tuple[Transport, ...] = get_args(Transport)
WIRE_LAYOUT = "64 KiB (Llama-3-8B)"
WIRES = (("1 Gbit/s", 1e9, 64), ("10 Gbit/s", 1e10, 512))
"""Name, bits a second, MB of a transfer."""
LOOPBACK_MEGABYTES = 512
SECRET = b"a secret of a benchmark"
SENDER, RECEIVER = WorkerId("prefill-0"), WorkerId("decode-0")
LAYOUTS = {
    "12 KiB (SmolLM2-135M)": KvLayout(
        model="smollm2", num_layers=30, num_kv_heads=3, head_dim=64, block_size=16, dtype="bfloat16"
    ),
    "16 KiB": KvLayout(model="16k", num_layers=16, num_kv_heads=4, head_dim=64, block_size=16, dtype="bfloat16"),
    "64 KiB (Llama-3-8B)": KvLayout(
        model="llama3", num_layers=32, num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16"
    ),
}
Event = EngineEvent | LinkFailed
Planned = tuple[KvData, tuple[int, ...], tuple[int, ...]]
"""A frame, the sender's blocks and the receiver's."""


class WireFigure(msgspec.Struct, kw_only=True):
    """TCP between two namespaces, or over loopback. Rates in GB/s."""

    wire: str
    line_bits_per_second: float | None
    delay_seconds: float
    num_bytes: int
    repeat: int
    median: float
    best: float
    iperf3: float | None
    share_of_line: float | None
    share_of_iperf3: float | None


class Figure(msgspec.Struct, kw_only=True):
    """One transport at one shape. Rates in GB/s."""

    transport: str
    cell_bytes: int
    num_bytes: int
    num_frames: int
    repeat: int
    median: float
    best: float
    worst: float
    in_process: float
    """The same cells copied with numpy inside one process."""
    in_process_with_checksum: float
    """And with the checksum that a transfer has to compute once on either side."""
    share_of_in_process: float
    microseconds: float
    """Of a whole transfer."""
    known_microseconds: float
    """From the first command until the receiver has everything: without its answer."""
    checksum_share_of_sending: float
    checksum_share_of_receiving: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--frame-kib", type=int, default=1024, help="bytes of one layer of a chunk of blocks")
    parser.add_argument("--transports", nargs="+", default=TRANSPORTS, choices=TRANSPORTS)
    parser.add_argument("--iperf3-seconds", type=int, default=3)
    parser.add_argument("--namespaces", action="store_true", help="and TCP over shaped wires; needs root")
    parser.add_argument("--wire-only", action="store_true", help="only TCP against iperf3 and over wires")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # namespaces are taken down on the way out
    own_core, peer_core = two_cores()
    pin(own_core)
    figures: list[Figure] = []
    wires = measure_wires(options, peer_core)
    print(
        f"{'cell':24}{'MB':>5}  {'':6} {'GB/s':>6} {'best':>6} {'worst':>6} {'copy':>6} {'+sum':>6} {'share':>6} "
        f"{'us':>9} {'known us':>9}"
    )
    for name, layout in () if options.wire_only else LAYOUTS.items():
        for megabytes in options.megabytes:
            for figure in measure(layout, megabytes * 10**6, options, peer_core):
                figures.append(figure)
                print(
                    f"{name:24}{megabytes:5}  {figure.transport:6} {figure.median:6.2f} {figure.best:6.2f} "
                    f"{figure.worst:6.2f} {figure.in_process:6.2f} {figure.in_process_with_checksum:6.2f} "
                    f"{figure.share_of_in_process:6.2f} {figure.microseconds:9.0f} {figure.known_microseconds:9.0f}",
                    flush=True,
                )
    given = {name: value for name, value in vars(options).items() if name != "out"}
    report = {"benchmark": "handoff", "options": given, **surroundings(("xxhash",))}
    report |= {"figures": msgspec.to_builtins(figures), "wires": msgspec.to_builtins(wires)}
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


def measure(layout: KvLayout, num_bytes: int, options: argparse.Namespace, peer_core: int | None) -> list[Figure]:
    """All transports at one shape."""
    num_blocks = max(1, num_bytes // layout.block_bytes)
    pool_blocks = num_blocks * 5 // 4 + 1
    shuffled = random.Random(0)
    source, target = (tuple(shuffled.sample(range(pool_blocks), num_blocks)) for _ in range(2))
    memory = KvMemory(layout, pool_blocks, with_windows=True)
    memory.kernels = native_library()
    np.frombuffer(memory.buffer, np.uint8)[:] = np.random.default_rng(0).integers(0, 256, memory.size_bytes, np.uint8)
    copy, copy_with_checksum = in_process(memory, source, target, options.repeat)
    figures = []
    for transport in options.transports:
        link = Pair(layout, memory, target, transport, peer_core)
        if transport == "direct":
            frames = link.work_in_place(source, target)
        else:
            frames = plan_frames(layout, source, target, options.frame_kib << 10)
        link.transfer(frames)  # the first one meets cold caches and small socket buffers
        before = link.stats()
        times = [link.transfer(frames) for _ in range(options.repeat)]
        seconds, known = [whole for whole, _ in times], [known for _, known in times]
        after = link.stats()
        link.check(memory, source)
        link.close()
        moved = num_blocks * layout.block_bytes
        rates = [moved / second / 1e9 for second in seconds]
        figures.append(
            Figure(
                transport=transport,
                cell_bytes=layout.cell_bytes,
                num_bytes=moved,
                num_frames=len(frames),
                repeat=options.repeat,
                median=statistics.median(rates),
                best=max(rates),
                worst=min(rates),
                in_process=copy,
                in_process_with_checksum=copy_with_checksum,
                share_of_in_process=statistics.median(rates) / copy,
                microseconds=statistics.median(seconds) * 1e6,
                known_microseconds=statistics.median(known) * 1e6,
                checksum_share_of_sending=share(before[0], after[0]),
                checksum_share_of_receiving=share(before[1], after[1]),
            )
        )
    memory.close()
    return figures


def measure_wires(options: argparse.Namespace, peer_core: int | None) -> list[WireFigure]:
    """TCP over loopback and, if asked for, over wires of a known speed; each against iperf3."""
    if "tcp" not in options.transports:
        return []
    figures = [measure_wire("loopback", None, 0.0, LOOPBACK_MEGABYTES, options, peer_core, None)]
    for name, bits, megabytes in WIRES if options.namespaces else ():
        for delay_seconds in (0.0, 1e-3):
            try:
                with two_hosts(bits, delay_seconds) as hosts:
                    figures.append(measure_wire(name, bits, delay_seconds, megabytes, options, peer_core, hosts))
            except Unavailable as reason:
                print(f"{name}, delay {delay_seconds * 1000:g} ms: {reason}", flush=True)
    return figures


def measure_wire(
    name: str,
    bits: float | None,
    delay_seconds: float,
    megabytes: int,
    options: argparse.Namespace,
    peer_core: int | None,
    hosts: Hosts | None,
) -> WireFigure:
    layout = LAYOUTS[WIRE_LAYOUT]
    num_blocks = megabytes * 10**6 // layout.block_bytes
    memory = KvMemory(layout, num_blocks)
    memory.kernels = native_library()
    np.frombuffer(memory.buffer, np.uint8)[:] = 7
    blocks = tuple(random.Random(0).sample(range(num_blocks), num_blocks))
    link = Pair(layout, memory, blocks, "tcp", peer_core, hosts)
    frames = plan_frames(layout, blocks, blocks, options.frame_kib << 10)
    link.transfer(frames)
    repeat = min(options.repeat, 5)
    seconds = [link.transfer(frames)[0] for _ in range(repeat)]
    link.close()
    memory.close()
    peer = iperf3(options.iperf3_seconds, two_cores(), hosts)
    moved = num_blocks * layout.block_bytes
    rate = moved / statistics.median(seconds)
    figure = WireFigure(
        wire=name,
        line_bits_per_second=bits,
        delay_seconds=delay_seconds,
        num_bytes=moved,
        repeat=repeat,
        median=rate / 1e9,
        best=moved / min(seconds) / 1e9,
        iperf3=peer / 1e9 if peer is not None else None,
        share_of_line=rate * 8 / bits if bits is not None else None,
        share_of_iperf3=rate / peer if peer is not None else None,
    )
    print(f"{name:12} delay {delay_seconds * 1000:g} ms  {msgspec.to_builtins(figure)}", flush=True)
    return figure


def plan_frames(layout: KvLayout, source: tuple[int, ...], target: tuple[int, ...], frame_bytes: int) -> list[Planned]:
    """As a prefill worker streams: chunk by chunk, and of each chunk layer by layer."""
    chunk = max(1, frame_bytes // layout.cell_bytes)
    frames: list[Planned] = []
    for low in range(0, len(source), chunk):
        high = min(low + chunk, len(source))
        for layer in range(layout.num_layers):
            frame = KvData(
                transfer=TransferId(1),
                epoch=1,
                sequence=len(frames),
                layer_lo=layer,
                layer_hi=layer + 1,
                block_lo=low,
                block_hi=high,
                num_bytes=(high - low) * layout.cell_bytes,
            )
            frames.append((frame, source[low:high], target[low:high]))
    return frames


class Pair:
    """A link from this process to one that it starts."""

    def __init__(
        self,
        layout: KvLayout,
        memory: KvMemory,
        target: tuple[int, ...],
        transport: Transport,
        core: int | None,
        hosts: Hosts | None = None,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        there = (hosts.names[1], hosts.addresses[1]) if hosts is not None else None
        arguments = theirs, layout, memory.num_blocks, target, core, there
        self._process = context.Process(target=receiver, args=arguments)
        self._process.start()
        self._memory = memory
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        with inside(hosts.names[0] if hosts is not None else None):
            self._links = Links(
                me=SENDER,
                incarnation=1,
                layout=layout,
                memory=memory,
                secret=SECRET,
                deliver=self._events.put,
                report=self._events.put,
                bind_host=hosts.addresses[0] if hosts is not None else "127.0.0.1",
            )
            address = self._pipe.recv()
            self._links.connect(RECEIVER, address, transport)
            event = self._events.get(timeout=10)
        assert isinstance(event, PeerUp), event
        self._up = event

    def work_in_place(self, source: tuple[int, ...], target: tuple[int, ...]) -> list[Planned]:
        """Write the receiver's blocks where they lie, as a prefill would; returns the one frame that says so."""
        layout, window = self._memory.layout, self._up.window
        assert window is not None, "this machine has no windows"
        start = window * layout.block_bytes
        pool = self._memory.table[start : start + self._up.window_blocks * layout.block_bytes]
        blocks = np.frombuffer(pool, np.uint8).reshape(self._up.window_blocks, -1)
        blocks[list(target)] = np.frombuffer(self._memory.buffer, np.uint8).reshape(self._memory.num_blocks, -1)[
            list(source)
        ]
        frame = KvData(
            transfer=TransferId(1),
            epoch=1,
            sequence=0,
            layer_lo=0,
            layer_hi=layout.num_layers,
            block_lo=0,
            block_hi=len(target),
            num_bytes=len(target) * layout.block_bytes,
            in_place=True,
        )
        return [(frame, (), ())]

    def transfer(self, frames: list[Planned]) -> tuple[float, float]:
        """Seconds until the receiver has answered, and until it had everything."""
        commands = [SendFrame(RECEIVER, frame, source, target) for frame, source, target in frames]
        done = SendFrame(RECEIVER, KvDone(TransferId(1), 1, len(frames), ()))
        started = time.perf_counter()
        for command in commands:
            self._links.send(command)
        self._links.send(done)
        event = self._events.get(timeout=60)
        seconds = time.perf_counter() - started
        assert isinstance(event, PeerFrame), event
        assert isinstance(event.frame, KvReady), event
        self._pipe.send("known")
        return seconds, self._pipe.recv() - started

    def stats(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """(busy, checksum) seconds of the sender and of the receiver."""
        self._pipe.send("stats")
        sent = self._links.stats()[0].sent
        return (sent.busy_seconds, sent.checksum_seconds), self._pipe.recv()

    def check(self, memory: KvMemory, source: tuple[int, ...]) -> None:
        """Every byte has arrived."""
        self._pipe.send("digest")
        blocks = np.frombuffer(memory.buffer, np.uint8).reshape(memory.num_blocks, -1)
        assert self._pipe.recv() == xxhash.xxh3_64_intdigest(blocks[list(source)].data), "bytes differ"

    def close(self) -> None:
        self._links.close()
        self._pipe.send("end")
        self._process.join(30)


def receiver(
    pipe: Connection,
    layout: KvLayout,
    num_blocks: int,
    target: tuple[int, ...],
    core: int | None,
    there: tuple[str, str] | None,
) -> None:
    """The other process: answers each transfer when all its frames are in and intact. `there`: namespace and address
    to do that in."""
    pin(core)
    if there is not None:
        enter(there[0])
    memory = KvMemory(layout, num_blocks, with_windows=True)
    memory.kernels = native_library()
    broken: list[EngineEvent] = []
    known = [0.0]

    def deliver(event: EngineEvent) -> None:
        if not isinstance(event, PeerFrame):
            return
        if isinstance(event.frame, KvData):
            if event.frame.checksum != event.arrived_checksum:
                broken.append(event)
        elif isinstance(event.frame, KvDone):
            assert not broken, broken[0]
            known[0] = time.perf_counter()  # one clock for all processes of a machine
            links.send(SendFrame(SENDER, KvReady(TransferId(1), 1)))

    links = Links(
        me=RECEIVER,
        incarnation=1,
        layout=layout,
        memory=memory,
        secret=SECRET,
        deliver=deliver,
        report=lambda failed: print(failed, file=sys.stderr),
        bind_host=there[1] if there is not None else "127.0.0.1",
    )
    links.expect(ExpectKv(TransferId(1), 1, SENDER, 0, target))
    pipe.send(links.address)
    while (question := pipe.recv()) != "end":
        if question == "stats":
            received = links.stats()[0].received
            pipe.send((received.busy_seconds, received.checksum_seconds))
        elif question == "known":
            pipe.send(known[0])
        else:
            blocks = np.frombuffer(memory.buffer, np.uint8).reshape(num_blocks, -1)
            pipe.send(xxhash.xxh3_64_intdigest(blocks[list(target)].data))
    links.forget(ForgetKv(TransferId(1), 1))
    links.close()


def in_process(memory: KvMemory, source: tuple[int, ...], target: tuple[int, ...], repeat: int) -> tuple[float, float]:
    """GB/s of the fastest plain numpy copy of these cells, and of ours with its checksum."""
    layout = memory.layout
    other = KvMemory(layout, memory.num_blocks)
    cells, target_cells = (Cells(pool.buffer, layout, pool.num_blocks) for pool in (memory, other))
    rows = cells.rows(0, layout.num_layers, source)
    target_rows = target_cells.rows(0, layout.num_layers, target)
    mover = CellMover(layout.cell_bytes, memory.kernels)

    def whole() -> None:
        target_cells.matrix[target_rows] = cells.matrix[rows]

    def in_batches() -> None:
        for batch, target_batch in zip(mover.batches(rows), mover.batches(target_rows), strict=True):
            target_cells.matrix[target_batch] = cells.matrix[batch]

    def cell_by_cell() -> None:
        to, of = target_cells.matrix, cells.matrix
        for row, target_row in zip(rows.tolist(), target_rows.tolist(), strict=True):
            to[target_row] = of[row]

    def with_checksum() -> None:
        mover.copy(cells, rows, target_cells, target_rows)

    def rate(copy: Callable[[], None]) -> float:
        seconds = []
        for _ in range(repeat):
            started = time.perf_counter()
            copy()
            seconds.append(time.perf_counter() - started)
        return len(rows) * layout.cell_bytes / statistics.median(seconds) / 1e9

    rates = max(rate(copy) for copy in (whole, in_batches, cell_by_cell)), rate(with_checksum)
    for pool_cells in (cells, target_cells):
        pool_cells.release()
    other.close()
    return rates


def share(before: tuple[float, float], after: tuple[float, float]) -> float:
    """How much of the busy time between two readings went into checksums."""
    return (after[1] - before[1]) / max(after[0] - before[0], 1e-9)


def pin(core: int | None) -> None:
    """This process to one core."""
    if sys.platform == "linux" and core is not None:
        os.sched_setaffinity(0, {core})


def two_cores() -> tuple[int, int] | tuple[None, None]:
    """One for each process, where there are two."""
    if sys.platform == "linux":
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) > 1:
            return cores[0], cores[1]
    return None, None


if __name__ == "__main__":
    main()
