"""Frames on a stream socket.

    header bytes u32 | payload bytes u32 | xxh3-64 of those eight bytes and the header u64 | header (msgpack) | payload

little-endian. Only a `KvData` over TCP has a payload: its cells, layer by layer, block by block, and after them eight
bytes with their xxh3-64, which the sender knows only when it has read them all. Owns reading and writing in time;
never decides what a frame means or whether its payload may be stored.
"""

from __future__ import annotations

import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence

import msgspec
import xxhash

from transload.control.messages import Frame
from transload.errors import HandoffError

PREFIX = struct.Struct("<IIQ")
TRAILER = struct.Struct("<Q")
MAX_HEADER_BYTES = 2 << 20  # the longest is KvDone: the outputs of a request, at most five bytes each
MAX_IOVECS = 64
_STAGING_BYTES = 4096  # a few dozen control frames; more would only pull payload in that has to be copied out again
_MAX_HELD = 8  # small parts that wait for company on their way out
_MAX_HELD_FOR_BYTES = 4 << 20
_TICK_SECONDS = 0.1  # how soon a thread in a blocking call sees that its link is to end


class Ping(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Asks for a `Pong`; its payload, if any, is read and dropped. Stays inside the transport."""

    sent_nanoseconds: int


class Pong(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The answer to a `Ping`, with its sender's own clock in it."""

    sent_nanoseconds: int


Header = Frame | Ping | Pong
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Header] = msgspec.msgpack.Decoder(Header)


class EndOfStream(Exception):
    """The peer has closed its side."""


class Stopped(Exception):
    """This side wants the link to end."""


def pack(header: bytes, payload_bytes: int = 0) -> bytes:
    """Prefix and header, ready to send. Raises `HandoffError` if the header is too long for any reader."""
    if len(header) > MAX_HEADER_BYTES:
        raise HandoffError(f"a frame's header is {len(header)} bytes long, at most {MAX_HEADER_BYTES} are read")
    lengths = struct.pack("<II", len(header), payload_bytes)
    return lengths + TRAILER.pack(xxhash.xxh3_64_intdigest(lengths + header)) + header


def unpack_prefix(prefix: bytes | bytearray, max_header_bytes: int = MAX_HEADER_BYTES) -> tuple[int, int, int]:
    """Header bytes, payload bytes and checksum. Raises `HandoffError` if no such frame is sent."""
    header_bytes, payload_bytes, checksum = PREFIX.unpack(prefix)
    if not 0 < header_bytes <= max_header_bytes:
        raise HandoffError(f"a frame announces a header of {header_bytes} bytes, 1..{max_header_bytes} are read")
    return header_bytes, payload_bytes, checksum


def check_header(prefix: bytes | bytearray, header: bytes | bytearray, checksum: int) -> None:
    """Raises `HandoffError` if the header was changed on its way."""
    arrived = xxhash.xxh3_64_intdigest(bytes(prefix[:8]) + header)
    if arrived != checksum:
        raise HandoffError(f"a frame's header has checksum {arrived:#018x}, it was sent with {checksum:#018x}")


def encode(header: Header, payload_bytes: int = 0) -> bytes:
    """A header of a link, packed."""
    return pack(_encoder.encode(header), payload_bytes)


def tune_tcp(sock: socket.socket, silence_seconds: float = 20.0) -> None:
    """Send small frames at once, and notice a host that is gone without a word for so long; nothing for other
    sockets."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        probe_seconds = max(1, round(silence_seconds / 4))
        for option, value in (
            (socket.TCP_KEEPIDLE, probe_seconds),
            (socket.TCP_KEEPINTVL, probe_seconds),
            (socket.TCP_KEEPCNT, 3),
            (socket.TCP_USER_TIMEOUT, round(silence_seconds * 1000)),
        ):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def prepare(sock: socket.socket) -> None:
    """Make calls on the socket return every tick, so that threads see the end of their link."""
    sock.setblocking(True)
    tick = struct.pack("@ll", 0, int(_TICK_SECONDS * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, tick)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, tick)


class FrameWriter:
    """Sends whole buffers for one thread; gives up when told or when the peer takes nothing for `stall_seconds`."""

    def __init__(self, sock: socket.socket, stall_seconds: float, stopping: Callable[[], bool]) -> None:
        self._sock = sock
        self._stall_seconds = stall_seconds
        self._stopping = stopping
        self._held: list[bytes] = []
        self._held_for_bytes = 0

    def hold(self, part: bytes, for_bytes: int = 0) -> None:
        """Send this with what comes next, or with `flush`: a call a frame would cost as much as copying 100 kB. What
        it announces, `for_bytes` of cells, does not wait for long."""
        self._held.append(part)
        self._held_for_bytes += for_bytes
        if len(self._held) >= _MAX_HELD or self._held_for_bytes >= _MAX_HELD_FOR_BYTES:
            self.flush()

    def flush(self) -> None:
        """Send what is held."""
        if self._held:
            self.write(())

    def write(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Send all of it, after what is held, in calls of at most `MAX_IOVECS` buffers."""
        if self._held:
            buffers = (*self._held, *buffers)
            self._held.clear()
            self._held_for_bytes = 0
        for start in range(0, len(buffers), MAX_IOVECS):
            self._write([memoryview(buffer) for buffer in buffers[start : start + MAX_IOVECS]])

    def _write(self, buffers: list[memoryview]) -> None:
        progress_at = time.monotonic()
        while buffers:
            try:
                sent = self._sock.sendmsg(buffers)
            except BlockingIOError:
                if self._stopping():
                    raise Stopped from None
                if time.monotonic() - progress_at > self._stall_seconds:
                    raise HandoffError(f"the peer has read nothing for {self._stall_seconds:g} s") from None
                continue
            progress_at = time.monotonic()
            drop_front(buffers, sent)


class FrameReader:
    """Reads frames for one thread. Between frames it waits as long as the link lives, inside one `stall_seconds`."""

    def __init__(self, sock: socket.socket, stall_seconds: float, stopping: Callable[[], bool]) -> None:
        self._sock = sock
        self._stall_seconds = stall_seconds
        self._stopping = stopping
        self._staging = memoryview(bytearray(_STAGING_BYTES))
        self._low = self._high = 0  # what of the staging buffer is still to be used
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def read_header(self) -> tuple[Header, int]:
        """The next frame's header and how many bytes of payload to read before the next call."""
        prefix = bytearray(PREFIX.size)
        self._read_idle(memoryview(prefix))
        header_bytes, payload_bytes, checksum = unpack_prefix(prefix)
        header = bytearray(header_bytes)
        self.read(memoryview(header))
        check_header(prefix, header, checksum)
        try:
            return _decoder.decode(header), payload_bytes
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise HandoffError(f"a frame's header cannot be read: {error}") from None

    def _read_idle(self, target: memoryview) -> None:
        """Read the first bytes of a frame: they may take forever to come, but not to continue."""
        while self._low == self._high:
            try:
                self._fill(self._sock.recv_into(self._staging))
            except BlockingIOError:
                self._poll.poll()  # without a deadline: the socket's end, on either side, ends it
        self.read(target)

    def read(self, target: memoryview) -> None:
        """Fill `target`."""
        progress_at = time.monotonic()
        done = self._take_staged(target)
        while done < len(target):
            small = len(target) - done < _STAGING_BYTES
            try:
                received = self._sock.recv_into(self._staging if small else target[done:])
            except BlockingIOError:
                self._check_patience(progress_at)
                continue
            progress_at = time.monotonic()
            if small:
                self._fill(received)
                received = self._take_staged(target[done:])
            elif received == 0:
                raise EndOfStream
            done += received

    def discard(self, num_bytes: int) -> None:
        """Read payload that nobody wants."""
        scratch = memoryview(bytearray(min(num_bytes, 1 << 20)))
        while num_bytes > 0:
            self.read(scratch[:num_bytes])
            num_bytes -= min(num_bytes, len(scratch))

    def read_available(self, buffers: list[memoryview]) -> int:
        """Take what is there, without waiting, into the buffers; 0 if nothing is."""
        if self._low < self._high:
            return self._take_staged(buffers[0])
        try:
            received = self._sock.recvmsg_into(buffers[:MAX_IOVECS], 0, socket.MSG_DONTWAIT)[0]
        except BlockingIOError:
            return 0
        if received == 0:
            raise EndOfStream
        return received

    def wait_readable(self, progress_at: float) -> None:
        """Wait until something is there. Raises if the peer has sent nothing since `progress_at` for too long."""
        while not self._poll.poll(_TICK_SECONDS * 1000):
            self._check_patience(progress_at)

    def drain(self) -> None:
        """Throw away what still comes, until the peer closes its side. Ends only then: see `Link`."""
        scratch = bytearray(1 << 16)
        while True:
            try:
                if self._sock.recv_into(scratch) == 0:
                    return
            except BlockingIOError:
                self._poll.poll()
            except OSError:
                return

    def _fill(self, received: int) -> None:
        if received == 0:
            raise EndOfStream
        self._low, self._high = 0, received

    def _take_staged(self, target: memoryview) -> int:
        taken = min(len(target), self._high - self._low)
        target[:taken] = self._staging[self._low : self._low + taken]
        self._low += taken
        return taken

    def _check_patience(self, progress_at: float) -> None:
        if self._stopping():
            raise Stopped
        if time.monotonic() - progress_at > self._stall_seconds:
            raise HandoffError(f"the peer stopped in the middle of a frame for {self._stall_seconds:g} s")


def drop_front(buffers: list[memoryview], num_bytes: int) -> None:
    """Remove the first `num_bytes` of a list of buffers."""
    done = 0
    while done < len(buffers) and num_bytes >= len(buffers[done]):
        num_bytes -= len(buffers[done])
        done += 1
    del buffers[:done]
    if num_bytes:
        buffers[0] = buffers[0][num_bytes:]
