"""Workers for tests of the transport: a pool, its links and the events they gave, in one object."""

from __future__ import annotations

import queue
import random
import socket
import time
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from transload.control.messages import (
    EngineEvent,
    ExpectKv,
    KvData,
    KvDone,
    PeerFrame,
    PeerUp,
    SendFrame,
    TransferId,
    WorkerId,
)
from transload.transfer.hello import Handshake, Hello
from transload.transfer.layout import KvLayout
from transload.transfer.link import LinkOptions
from transload.transfer.links import LinkFailed, Links
from transload.transfer.listener import PeerAddress
from transload.transfer.meeting import TransportChoice
from transload.transfer.memory import KvMemory

SECRET = b"only for these tests"
SMALL = KvLayout(model="small", num_layers=3, num_kv_heads=1, head_dim=8, block_size=4, dtype="float32")
"""Cells of 256 bytes."""
LARGE = KvLayout(model="large", num_layers=2, num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16")
"""Cells of 64 KiB, which take another path."""
WAIT_SECONDS = 20.0  # only to end a test that has failed

Event = EngineEvent | LinkFailed
_Kind = TypeVar("_Kind", bound=Event)


class Worker:
    """One worker's end of the transport."""

    def __init__(
        self,
        name: str,
        *,
        layout: KvLayout = SMALL,
        num_blocks: int = 32,
        incarnation: int = 1,
        secret: bytes = SECRET,
        options: LinkOptions | None = None,
        bind_host: str = "127.0.0.1",
        with_windows: bool = False,
    ) -> None:
        self.name = WorkerId(name)
        self.layout = layout
        self.memory = KvMemory(layout, num_blocks, with_windows=with_windows)
        self.events: queue.Queue[Event] = queue.Queue()
        self.link_names: list[int] = []
        """Of the links that came up; in their events, where a test could not foretell it, is 0."""
        self.links = Links(
            me=self.name,
            incarnation=incarnation,
            layout=layout,
            memory=self.memory,
            secret=secret,
            deliver=self._take,
            report=self.events.put,
            bind_host=bind_host,
            options=options,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.links.close(2.0)
        self.memory.close()

    def _take(self, event: EngineEvent) -> None:
        if isinstance(event, PeerUp):
            self.link_names.append(event.name)
            event = msgspec.structs.replace(event, name=0)
        self.events.put(event)

    @property
    def blocks(self) -> npt.NDArray[np.uint8]:
        """[num_blocks, num_layers, cell_bytes]; do not keep it."""
        layout = self.layout
        return np.frombuffer(self.memory.buffer, np.uint8).reshape(-1, layout.num_layers, layout.cell_bytes)

    def fill(self, seed: int) -> None:
        """Random bytes everywhere."""
        blocks = self.blocks
        blocks[:] = np.random.default_rng(seed).integers(0, 256, blocks.shape, np.uint8)

    def next(self) -> Event:
        return self.events.get(timeout=WAIT_SECONDS)

    def wait_for(self, kind: type[_Kind]) -> _Kind:
        """The next event of a kind; the others before it are dropped."""
        while True:
            event = self.next()
            if isinstance(event, kind):
                return event

    def data_frames(self, num_frames: int) -> list[PeerFrame]:
        """So many data frames that came in."""
        frames: list[PeerFrame] = []
        while len(frames) < num_frames:
            event = self.next()
            assert not isinstance(event, LinkFailed), event
            if isinstance(event, PeerFrame) and isinstance(event.frame, KvData):
                frames.append(event)
        return frames


def window_of(worker: Worker, up: PeerUp) -> npt.NDArray[np.uint8]:
    """The peer's pool as this worker's steps find it; laid out as `Worker.blocks`."""
    layout = worker.layout
    assert up.window is not None
    start = up.window * layout.block_bytes
    table = worker.memory.table[start : start + up.window_blocks * layout.block_bytes]
    return np.frombuffer(table, np.uint8).reshape(-1, layout.num_layers, layout.cell_bytes)


def link_up(dialer: Worker, acceptor: Worker, transport: TransportChoice) -> None:
    """Connect two workers and wait for both ends."""
    dialer.links.connect(acceptor.name, acceptor.links.address, transport)
    for worker in (dialer, acceptor):
        event = worker.next()
        assert isinstance(event, PeerUp), event
        assert event.one_sided == (transport != "tcp")


class Handoff:
    """A transfer of random blocks from one worker to another."""

    def __init__(
        self,
        sender: Worker,
        receiver: Worker,
        *,
        num_blocks: int = 8,
        transfer: int = 77,
        epoch: int = 1,
        first_block: int = 0,
        seed: int = 0,
    ) -> None:
        shuffled = random.Random(seed)
        self.sender, self.receiver = sender, receiver
        self.layout = sender.layout
        self.transfer, self.epoch, self.first_block = TransferId(transfer), epoch, first_block
        self.source = tuple(shuffled.sample(range(sender.memory.num_blocks), num_blocks))
        self.target = tuple(shuffled.sample(range(receiver.memory.num_blocks), num_blocks))

    def expect(self) -> None:
        self.receiver.links.expect(ExpectKv(self.transfer, self.epoch, self.sender.name, self.first_block, self.target))

    def command(self, sequence: int, layers: tuple[int, int], blocks: tuple[int, int]) -> SendFrame:
        """Send these layers of these blocks, counted from the first of the transfer."""
        (layer_lo, layer_hi), (low, high) = layers, blocks
        frame = KvData(
            transfer=self.transfer,
            epoch=self.epoch,
            sequence=sequence,
            layer_lo=layer_lo,
            layer_hi=layer_hi,
            block_lo=self.first_block + low,
            block_hi=self.first_block + high,
            num_bytes=(layer_hi - layer_lo) * (high - low) * self.layout.cell_bytes,
        )
        return SendFrame(self.receiver.name, frame, self.source[low:high], self.target[low:high])

    def whole(self, sequence: int = 0) -> SendFrame:
        """Everything in one frame."""
        return self.command(sequence, (0, self.layout.num_layers), (0, len(self.source)))

    def by_layer(self, blocks_a_frame: int) -> list[SendFrame]:
        """Chunk by chunk, and of each chunk layer by layer."""
        commands: list[SendFrame] = []
        for low in range(0, len(self.source), blocks_a_frame):
            high = min(low + blocks_a_frame, len(self.source))
            for layer in range(self.layout.num_layers):
                commands.append(self.command(len(commands), (layer, layer + 1), (low, high)))
        return commands

    def done(self, num_frames: int = 1) -> SendFrame:
        return SendFrame(self.receiver.name, KvDone(self.transfer, self.epoch, num_frames, (1, 2, 3)))

    def assert_arrived(self, before: npt.NDArray[np.uint8]) -> None:
        """Every cell is where it belongs, and nothing else has changed since `before`."""
        expected = before.copy()
        expected[list(self.target)] = self.sender.blocks[list(self.source)]
        assert np.array_equal(self.receiver.blocks, expected)


class RawPeer:
    """A peer that shakes hands as it should and then sends whatever a test wants."""

    def __init__(self, worker: Worker, name: str = "raw", *, one_sided: bool = False) -> None:
        address = worker.links.address
        self.memory = KvMemory(worker.layout, 4)
        if one_sided:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.connect("\0" + address.unix_name)
        else:
            self.sock = socket.create_connection((address.host, address.port))
        hello = hello_to(address, name, worker.layout, one_sided=one_sided)
        handshake = Handshake(self.sock, hello, SECRET, time.monotonic() + WAIT_SECONDS)
        handshake.dial(self.memory.fd if one_sided else None)
        handshake.close()
        self.sock.settimeout(WAIT_SECONDS)
        assert isinstance(worker.next(), PeerUp)

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.sock.close()
        self.memory.close()


def hello_to(address: PeerAddress, name: str, layout: KvLayout = SMALL, *, one_sided: bool = False) -> Hello:
    """A proper first word to a worker."""
    return Hello(
        worker=WorkerId(name),
        incarnation=1,
        peer=address.worker,
        peer_incarnation=address.incarnation,
        layout_digest=layout.digest,
        num_blocks=4,
        one_sided=one_sided,
    )


def at_port(address: PeerAddress, port: int) -> PeerAddress:
    """The same worker behind something else that listens."""
    return msgspec.structs.replace(address, port=port, unix_name="")


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came to hold"
        time.sleep(0.005)
