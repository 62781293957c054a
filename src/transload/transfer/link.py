"""One open link to one peer: two threads on one socket.

The sender thread takes from the outbox and is the only one that touches the peer's memory; the receiver thread reads
the socket and is the only one that writes into ours. Owns both threads, the socket and the peer's mapping, from
`PeerUp` to `PeerLost`. Never decides anything about a transfer.

How it ends. A two-sided link just shuts its socket down. On a one-sided link the end of the peer's stream is the proof
that the peer writes no more: each side closes its stream only after its sender thread has stopped and unmapped, and the
kernel closes a dead process's sockets after its mappings. So the receiver waits for that end, however long it takes: a
timeout would prove nothing. A peer that hangs holds the link (and the engine its blocks) until somebody kills it.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from transload.control.messages import (
    CancelSends,
    EngineEvent,
    Frame,
    KvAbort,
    KvAbortAck,
    KvCredit,
    KvData,
    KvDone,
    PeerFrame,
    PeerLost,
    PeerUp,
    SendFrame,
    SendsDrained,
    WorkerId,
)
from transload.errors import HandoffError
from transload.transfer.cells import CellMover, Cells
from transload.transfer.gauge import Flow, LinkStats
from transload.transfer.memory import PeerMemory
from transload.transfer.outbox import Key, Outbox, key_of
from transload.transfer.permits import Permit, Permits
from transload.transfer.shm import ShmCarrier
from transload.transfer.tcp import TcpCarrier
from transload.transfer.wire import (
    EndOfStream,
    FrameReader,
    FrameWriter,
    Header,
    Ping,
    Pong,
    Stopped,
    encode,
    prepare,
)

Deliver = Callable[[EngineEvent], None]


class LinkOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of every link of a worker."""

    window_frames: int = 32
    """Data frames of one transfer that may be unacknowledged."""
    max_waiting_frames: int = 65_536
    """Frames that may wait for a peer before it counts as lost."""
    handshake_seconds: float = 5.0
    """For dialing and the whole handshake."""
    silence_seconds: float = 20.0
    """How long a peer on another host may acknowledge nothing before the link counts as cut."""
    stall_seconds: float = 30.0
    """How long a peer may stop in the middle of a frame, or read nothing while we send."""


class Carrier(Protocol):
    """How cells cross. `send` and `close` belong to the sender thread, `receive` to the receiver thread."""

    one_sided: bool
    name: str
    sending: CellMover
    receiving: CellMover

    def check(self, command: SendFrame, frame: KvData, /) -> None: ...
    def send(self, command: SendFrame, frame: KvData, /) -> None: ...
    def receive(self, frame: KvData, payload_bytes: int, permit: Permit | None) -> tuple[KvData, int]: ...
    def close(self) -> None: ...


class Link:
    """See the module. `start` once; then any thread may `send`, `cancel`, `ping` and `fail`."""

    def __init__(
        self,
        *,
        peer: WorkerId,
        incarnation: int,
        sock: socket.socket,
        cells: Cells,
        peer_memory: PeerMemory | None,
        permits: Permits,
        deliver: Deliver,
        report: Callable[[WorkerId, str], None],
        options: LinkOptions,
    ) -> None:
        self.peer = peer
        self.incarnation = incarnation
        self.number = 0
        """Of the links to this peer, this is the so manieth: set before it is started."""
        self.name = 0
        """The same at both ends; set before it is started too."""
        self.window = peer_memory.window if peer_memory is not None else None
        """Where our steps can work in the peer's blocks."""
        self.ended = threading.Event()
        """Set when `PeerLost` has been delivered: no event of this link comes after it."""
        self._sock = sock
        self._cells = cells
        self._permits = permits
        self._deliver = deliver
        self._report = report
        self._outbox = Outbox(peer, window_frames=options.window_frames, max_frames=options.max_waiting_frames)
        self._credit_every = max(1, options.window_frames // 4)
        self._taken: dict[Key, int] = {}  # data frames taken in since the last credit
        self._num_unexpected_frames = 0
        self._sent, self._received = Flow(), Flow()
        self._latency_seconds = 0.0
        self._pong = threading.Event()
        self._state_lock = threading.Lock()
        self._failed = self._abandoned = False
        self._writer = FrameWriter(sock, options.stall_seconds, self._is_failed)
        self._reader = FrameReader(sock, options.stall_seconds, self._is_failed)
        self._carrier: Carrier = (
            TcpCarrier(cells, self._writer, self._reader)
            if peer_memory is None
            else ShmCarrier(cells, peer_memory, self._writer)
        )
        self._sender = threading.Thread(target=self._run_sender, name=f"kv-send-{peer}", daemon=True)
        self._receiver = threading.Thread(target=self._run_receiver, name=f"kv-receive-{peer}", daemon=True)

    # ----- any thread

    def start(self) -> None:
        """Report the peer as up, then move bytes."""
        prepare(self._sock)
        self._sender.start()
        self._receiver.start()

    def discard(self) -> None:
        """End a link that could not be started."""
        self.fail(None)
        if self._sender.ident is not None:
            self._sender.join()
        self._carrier.close()
        self._sock.close()
        self.ended.set()

    def send(self, command: SendFrame) -> None:
        """Queue a frame. Raises `HandoffError` for cells that are not in this pool, or have no place in the peer's."""
        if isinstance(command.frame, KvData):
            self._check_sizes(command.frame)
            if not command.frame.in_place:
                self._check_sources(command, command.frame)
            self._carrier.check(command, command.frame)
        if not (isinstance(command.frame, KvData) and not command.frame.in_place) and self._send_now(command.frame):
            return
        try:
            self._outbox.put(command)
        except HandoffError as error:
            self.fail(str(error))

    def _send_now(self, frame: Frame) -> bool:
        """A frame without cells, if nobody is ahead of it."""

        def write(message: bytes) -> int:
            try:
                return self._sock.send(message, socket.MSG_DONTWAIT)
            except OSError:
                return 0  # full, or broken: the sender waits, or finds out

        ends = key_of(frame) if isinstance(frame, KvDone) else None
        if not self._outbox.send_now(encode(frame), write, ends):
            return False
        self._sent.count_frame()
        if isinstance(frame, KvData):
            self._sent.count_cells(frame.num_bytes, 1e-6)
        return True

    def cancel(self, command: CancelSends) -> None:
        """`SendsDrained` follows: from the sender thread or, if that has ended, from here."""
        if not self._outbox.cancel(command):
            self._deliver(SendsDrained(command.transfer, command.epoch))

    def ping(self, timeout_seconds: float) -> float | None:
        """Seconds one way, measured now; None if no answer came in time. One caller at a time."""
        self._pong.clear()
        self._outbox.put_probe(Ping(time.monotonic_ns()))
        return self._latency_seconds if self._pong.wait(timeout_seconds) else None

    def fail(self, reason: str | None) -> None:
        """End the link. A reason is reported; None (one side just hung up) is not. Returns at once."""
        with self._state_lock:
            first, self._failed = not self._failed, True
        if not first:
            return
        if reason is not None:
            self._report(self.peer, reason)
        self._outbox.close()
        if not self._carrier.one_sided:
            self._shutdown(socket.SHUT_RDWR)

    def abandon(self) -> None:
        """This process gives its memory up: do not wait for the peer, and do not claim that it has let go."""
        self._abandoned = True
        self.fail(None)
        self._sender.join()  # one copy long: the peer relies on us as we on it
        self._shutdown(socket.SHUT_RDWR)

    def join(self) -> None:
        """After `ended` or `abandon`: wait for the last lines of both threads."""
        if self._receiver.ident is not None:
            self._receiver.join()

    def stats(self) -> LinkStats:
        return LinkStats(
            peer=self.peer,
            incarnation=self.incarnation,
            transport=self._carrier.name,
            open=not self._failed,
            sent=self._sent.stats(self._carrier.sending.checksum_seconds),
            received=self._received.stats(self._carrier.receiving.checksum_seconds),
            num_waiting_frames=len(self._outbox),
            num_unexpected_frames=self._num_unexpected_frames,
            latency_seconds=self._latency_seconds,
        )

    def is_open(self) -> bool:
        return not self._failed

    def _is_failed(self) -> bool:
        return self._failed

    def _shutdown(self, how: int) -> None:
        try:
            self._sock.shutdown(how)
        except OSError:
            pass  # the peer was faster, or the socket is closed already

    def _check_sizes(self, frame: KvData) -> None:
        num_layers, num_blocks = frame.layer_hi - frame.layer_lo, frame.block_hi - frame.block_lo
        if not 0 <= frame.layer_lo < frame.layer_hi <= self._cells.layout.num_layers or num_blocks < 1:
            raise HandoffError(f"{frame} names no cells of a cache of {self._cells.layout.num_layers} layers")
        if frame.num_bytes != num_layers * num_blocks * self._cells.cell_bytes:
            raise HandoffError(f"{frame} says {frame.num_bytes} bytes for {num_layers} x {num_blocks} cells")

    def _check_sources(self, command: SendFrame, frame: KvData) -> None:
        num_blocks = frame.block_hi - frame.block_lo
        if len(command.source_blocks) != num_blocks:
            raise HandoffError(f"{frame} has {num_blocks} blocks, but {len(command.source_blocks)} sources")
        if min(command.source_blocks) < 0 or max(command.source_blocks) >= self._cells.num_blocks:
            raise HandoffError(f"{frame} has sources outside our blocks 0..{self._cells.num_blocks}")

    # ----- the sender thread

    def _run_sender(self) -> None:
        try:
            while True:
                item = self._outbox.take(wait=False)
                if item is None:
                    self._writer.flush()
                    item = self._outbox.take()
                match item:
                    case None:
                        break
                    case CancelSends():
                        self._deliver(SendsDrained(item.transfer, item.epoch))
                    case SendFrame():
                        self._send(item)
                    case bytes():
                        self._writer.write([item])
                    case _:
                        self._writer.write([encode(item)])
        except (Stopped, BrokenPipeError, ConnectionResetError):
            pass
        except (OSError, HandoffError) as error:
            self.fail(str(error))
        finally:
            self.fail(None)
            try:
                self._carrier.close()
            finally:
                self._shutdown(socket.SHUT_WR)  # on a one-sided link, this is what the peer waits for
            for command in self._outbox.stop():
                self._deliver(SendsDrained(command.transfer, command.epoch))

    def _send(self, command: SendFrame) -> None:
        if isinstance(command.frame, KvData):
            started = time.perf_counter()
            self._carrier.send(command, command.frame)
            self._sent.count_cells(command.frame.num_bytes, time.perf_counter() - started)
        else:
            self._writer.hold(encode(command.frame))
        self._sent.count_frame()

    # ----- the receiver thread

    def _up(self) -> PeerUp:
        window = self.window
        first_block, num_blocks = (window.first_block, window.num_blocks) if window is not None else (None, 0)
        return PeerUp(self.peer, self._carrier.one_sided, self.number, first_block, num_blocks, self.name)

    def _run_receiver(self) -> None:
        self._deliver(self._up())
        try:
            while True:
                self._receive(*self._reader.read_header())
        except (EndOfStream, Stopped, ConnectionResetError):
            pass
        except (OSError, HandoffError) as error:
            self.fail(str(error))
        finally:
            self.fail(None)
            if self._carrier.one_sided:
                self._reader.drain()
            self._sender.join()
            self._sock.close()
            if not self._abandoned:
                self._deliver(PeerLost(self.peer))
            self.ended.set()

    def _receive(self, header: Header, payload_bytes: int) -> None:
        if self._failed:
            raise Stopped
        self._received.count_frame()
        if isinstance(header, KvData):
            self._receive_cells(header, payload_bytes)
            return
        if payload_bytes:
            raise HandoffError(f"{type(header).__name__} comes with {payload_bytes} bytes of payload")
        match header:
            case KvCredit():
                self._outbox.credit(header)
            case Ping():
                self._outbox.put_probe(Pong(header.sent_nanoseconds))
            case Pong():
                self._latency_seconds = max(0, time.monotonic_ns() - header.sent_nanoseconds) / 2e9
                self._pong.set()
            case _:
                if isinstance(header, KvDone | KvAbort | KvAbortAck):
                    self._taken.pop(key_of(header), None)  # no more data comes
                self._deliver(PeerFrame(self.peer, header))

    def _receive_cells(self, frame: KvData, payload_bytes: int) -> None:
        self._check_sizes(frame)
        started = time.perf_counter()
        permit = self._permits.find(frame, self.peer)
        frame, arrived_checksum = self._carrier.receive(frame, payload_bytes, permit)
        if permit is None:
            self._num_unexpected_frames += 1
        self._received.count_cells(frame.num_bytes, time.perf_counter() - started)
        self._deliver(PeerFrame(self.peer, frame, arrived_checksum))
        key = key_of(frame)
        taken = self._taken.get(key, 0) + 1
        if taken < self._credit_every:
            self._taken[key] = taken
        else:
            self._taken.pop(key, None)
            self._outbox.put_credit(key, frame.sequence + 1)
