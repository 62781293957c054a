"""Feed-forward calls over a stream socket, for workers on two hosts.

    header bytes u32 | row bytes u32 | slot u32 | xxh3-64 of those twelve bytes, header and rows u64 | header | rows

little-endian. Rows go straight from the sender's slot and straight into the receiver's; nothing is handed on before the
checksum of the whole frame has been found right, or a bit changed on its way would be a wrong answer in the end.
Nothing here blocks: what the socket does not take waits, and is sent when the end is used next or watched by a waiter.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections import deque

import xxhash

from transload.control.ffn_messages import FfnAnswer, SessionId
from transload.control.messages import WorkerId
from transload.errors import HandoffError
from transload.transfer.ffn_link import (
    HEADER_BYTES,
    ArrivedAnswer,
    ArrivedCall,
    CallFrame,
    SlotSizes,
    decode_answer,
    decode_call,
    encode_header,
)

_LENGTHS = struct.Struct("<III")
_PREFIX = struct.Struct("<IIIQ")


class _StreamEnd:
    """Frames in both directions. `_buffers` are what the peer's rows are read into, a slot each."""

    transport = "tcp"
    compiled_ring = None

    def __init__(self, sizes: SlotSizes, sock: socket.socket, *, is_caller: bool) -> None:
        self.sizes = sizes
        self._sock = sock
        sock.setblocking(False)
        calls = [memoryview(bytearray(sizes.call_bytes)) for _ in range(sizes.num_slots)]
        answers = [memoryview(bytearray(sizes.answer_bytes)) for _ in range(sizes.num_slots)]
        self._call_rows, self._answer_rows = calls, answers
        self._incoming = answers if is_caller else calls
        self._out: deque[memoryview] = deque()
        self._prefix = memoryview(bytearray(_PREFIX.size))
        self._target = self._prefix  # what is being read: prefix, then header, then rows
        self._filled = 0
        self._header: bytearray | None = None
        self._rows: memoryview | None = None
        self._slot = 0
        self._num_bytes = 0
        self._checksum = 0
        self._ready: list[tuple[int, bytes, int]] = []
        self._problem: str | None = None

    def has_news(self) -> bool:
        self._advance()
        return bool(self._ready) or self._problem is not None

    def fileno(self) -> int:
        return self._sock.fileno()

    def wants_to_send(self) -> bool:
        return bool(self._out)

    def doze(self) -> bool:
        return not self.has_news()

    def wake(self) -> None:
        self._advance()

    def close(self) -> None:
        self._sock.close()

    def _send(self, slot: int, header: bytes, rows: memoryview) -> None:
        checksum = _checksum(len(header), len(rows), slot, header, rows)
        self._out.append(memoryview(_PREFIX.pack(len(header), len(rows), slot, checksum) + header))
        if len(rows):
            self._out.append(rows)
        self._flush()

    def _flush(self) -> None:
        try:
            while self._out:
                sent = self._sock.sendmsg(list(self._out)[:16])
                while self._out and sent >= len(self._out[0]):
                    sent -= len(self._out.popleft())
                if sent:
                    self._out[0] = self._out[0][sent:]
        except BlockingIOError:
            return
        except OSError as error:
            self._problem = f"the link is broken: {error}"

    def _advance(self) -> None:
        """Send and read what goes without waiting."""
        if self._out:
            self._flush()
        try:
            while self._problem is None and len(self._ready) < self.sizes.num_slots:
                received = self._sock.recv_into(self._target[self._filled :])
                if received == 0:
                    self._problem = "the peer has closed the link"
                    return
                self._filled += received
                if self._filled == len(self._target):
                    self._part_complete()
        except BlockingIOError:
            return
        except (OSError, HandoffError) as error:
            self._problem = f"the link is broken: {error}"

    def _part_complete(self) -> None:
        """Go on to what comes next: the header after the prefix, the rows after the header, the next frame."""
        if self._target is self._prefix:
            header_bytes, self._num_bytes, self._slot, self._checksum = _PREFIX.unpack(self._prefix)
            sizes = self.sizes
            limit = len(self._incoming[0])
            if self._slot >= sizes.num_slots or not 0 < header_bytes <= HEADER_BYTES or self._num_bytes > limit:
                raise HandoffError(
                    f"the peer has sent slot {self._slot} with {header_bytes} and {self._num_bytes} bytes"
                )
            self._check_slot(self._slot)
            self._header = bytearray(header_bytes)
            self._expect(memoryview(self._header))
            return
        assert self._header is not None
        rows = self._incoming[self._slot][: self._num_bytes]
        if self._target is not self._rows and self._num_bytes:
            self._rows = rows
            self._expect(rows)
            return
        header = bytes(self._header)
        arrived = _checksum(len(header), self._num_bytes, self._slot, header, rows)
        if arrived != self._checksum:
            raise HandoffError(f"a frame has checksum {arrived:#018x}, it was sent with {self._checksum:#018x}")
        self._ready.append((self._slot, header, self._num_bytes))
        self._expect(self._prefix)

    def _expect(self, target: memoryview) -> None:
        self._target, self._filled = target, 0

    def _check_slot(self, slot: int) -> None:
        """Raises `HandoffError` if the peer may not use this slot now: its rows are in use here."""
        raise NotImplementedError

    def _take_ready(self) -> list[tuple[int, bytes, int]]:
        self._advance()
        ready, self._ready = self._ready, []
        if not ready and self._problem is not None:
            raise HandoffError(self._problem)
        return ready


def _checksum(header_bytes: int, row_bytes: int, slot: int, header: bytes, rows: memoryview) -> int:
    checksum = xxhash.xxh3_64(_LENGTHS.pack(header_bytes, row_bytes, slot) + header)
    checksum.update(rows)
    return checksum.intdigest()


class StreamCaller(_StreamEnd):
    """The attention side."""

    def __init__(self, worker: WorkerId, sizes: SlotSizes, sock: socket.socket) -> None:
        super().__init__(sizes, sock, is_caller=True)
        self.worker = worker
        self._call_addresses = [ctypes.addressof(ctypes.c_char.from_buffer(rows)) for rows in self._call_rows]
        self._free = list(range(sizes.num_slots))
        self._away: set[int] = set()

    def reserve(self) -> int | None:
        return self._free.pop() if self._free else None

    def call_buffer(self, slot: int) -> memoryview:
        return self._call_rows[slot]

    def answer_buffer(self, slot: int) -> memoryview:
        return self._answer_rows[slot]

    def post(self, slot: int, frame: CallFrame, num_bytes: int, rows_address: int = 0) -> None:
        assert 0 <= num_bytes <= self.sizes.call_bytes, "rows that no slot has room for"
        self._away.add(slot)
        if rows_address:
            ctypes.memmove(self._call_addresses[slot], rows_address, num_bytes)
        self._send(slot, encode_header(frame), self._call_rows[slot][:num_bytes])

    def poll(self) -> list[ArrivedAnswer]:
        return [
            ArrivedAnswer(slot, decode_answer(header), self._answer_rows[slot][:num_bytes])
            for slot, header, num_bytes in self._take_ready()
        ]

    def release(self, slot: int) -> None:
        self._free.append(slot)

    def _check_slot(self, slot: int) -> None:
        if slot not in self._away:
            raise HandoffError(f"the peer has answered slot {slot}, which holds no call")
        self._away.discard(slot)


class StreamCallee(_StreamEnd):
    """The FFN side."""

    def __init__(self, session: SessionId, sizes: SlotSizes, sock: socket.socket) -> None:
        super().__init__(sizes, sock, is_caller=False)
        self.session = session
        self._held: set[int] = set()

    def poll(self) -> list[ArrivedCall]:
        return [
            ArrivedCall(slot, decode_call(header), self._call_rows[slot][:num_bytes])
            for slot, header, num_bytes in self._take_ready()
        ]

    def answer_buffer(self, slot: int) -> memoryview:
        return self._answer_rows[slot]

    def answer(self, slot: int, answer: FfnAnswer, num_bytes: int) -> None:
        assert 0 <= num_bytes <= self.sizes.answer_bytes, "rows that no slot has room for"
        self._held.discard(slot)
        self._send(slot, encode_header(answer), self._answer_rows[slot][:num_bytes])

    def _check_slot(self, slot: int) -> None:
        if slot in self._held:
            raise HandoffError(f"the peer calls with slot {slot}, which holds a call already")
        self._held.add(slot)
