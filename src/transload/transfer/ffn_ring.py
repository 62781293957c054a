"""Feed-forward calls through memory that both workers of one host have mapped.

    control page: [calls posted] [answers posted] [caller dozes] [callee dozes]  a line of the cache each
                  ring of calls, ring of answers: (slot, header bytes, row bytes) each
    slot:         call's header | answer's header | call's rows | answer's rows

A ring has as many entries as there are slots, and a slot has one call under way, so no ring can overflow. A number is
posted only after all it announces is in place. Everything read from the shared memory is checked before it is used: a
peer that writes nonsense can spoil rows, never memory. The socket beside it carries one byte to wake a dozing peer, and
its end says that the peer is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import socket
import stat
import sys

from transload.control.ffn_messages import FfnAnswer, SessionId
from transload.control.messages import WorkerId
from transload.errors import HandoffError, MachineError
from transload.transfer.ffn_kernels import ClosedRing, PlainRing, Ring, RingKernels, RingPlace
from transload.transfer.ffn_link import (
    HEADER_BYTES,
    MAX_SLOTS,
    ArrivedAnswer,
    ArrivedCall,
    CallFrame,
    SlotSizes,
    decode_answer,
    decode_call,
    encode_header,
)

if sys.platform == "linux":
    import fcntl

    _SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW

_CALLS, _ANSWERS, _CALLER_DOZES, _CALLEE_DOZES = 0, 8, 16, 24  # words; 8 of them are a line of the cache
_CALL_RING, _ANSWER_RING = 64, 64 + 4 * MAX_SLOTS
_CONTROL_BYTES = 8 << 10
_PAGE = 4096
assert (_ANSWER_RING + 4 * MAX_SLOTS) * 8 <= _CONTROL_BYTES


class RingMemory:
    """The mapping, made here or come from the peer."""

    def __init__(self, fd: int, sizes: SlotSizes) -> None:
        """Takes ownership of `fd`. Raises `HandoffError` if it is not such memory."""
        self.sizes = sizes
        try:
            _check_memory(fd, memory_bytes(sizes))
            self._mapping = mmap.mmap(fd, memory_bytes(sizes), mmap.MAP_SHARED)
        except (OSError, ValueError) as error:
            raise HandoffError(f"cannot map the memory of feed-forward calls: {error}") from error
        finally:
            os.close(fd)
        self._views = [memoryview(self._mapping)]
        self._anchor: ctypes.c_char | None = ctypes.c_char.from_buffer(self._mapping)
        self.address = ctypes.addressof(self._anchor)
        self.words = self._keep(self._views[0][:_CONTROL_BYTES].cast("Q"))
        stride = _stride(sizes)
        starts = [_CONTROL_BYTES + slot * stride for slot in range(sizes.num_slots)]
        after_headers = 2 * HEADER_BYTES
        answers_at = after_headers + _padded(sizes.call_bytes)
        self.call_rows = [self._view(start + after_headers, sizes.call_bytes) for start in starts]
        self.answer_rows = [self._view(start + answers_at, sizes.answer_bytes) for start in starts]

    def _view(self, start: int, num_bytes: int) -> memoryview:
        return self._keep(self._views[0][start : start + num_bytes])

    def _keep(self, view: memoryview) -> memoryview:
        self._views.append(view)
        return view

    def close(self) -> None:
        """Unmap; at once, or with the last tensor that still lies in it."""
        self.call_rows = self.answer_rows = []
        self._anchor = None
        with contextlib.suppress(BufferError):
            for view in reversed(self._views):
                view.release()
            self._mapping.close()


def create_memory(sizes: SlotSizes) -> int:
    """A sealed memfd for a ring; the caller owns it. Raises `MachineError` if the machine has not that much memory."""
    if sys.platform != "linux":
        raise MachineError("feed-forward calls through shared memory need Linux; set the link's transport to tcp")
    fd = os.memfd_create("transload-ffn", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, memory_bytes(sizes))  # every page now: later it would be a SIGBUS
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SIZE_SEALS | fcntl.F_SEAL_SEAL)
    except OSError as error:
        os.close(fd)
        size = f"{memory_bytes(sizes) / 2**20:.0f} MiB"
        raise MachineError(f"no memory for feed-forward calls ({size}): {error}; lower limits.step_tokens") from error
    return fd


def memory_bytes(sizes: SlotSizes) -> int:
    return _CONTROL_BYTES + sizes.num_slots * _stride(sizes)


def _stride(sizes: SlotSizes) -> int:
    return 2 * HEADER_BYTES + _padded(sizes.call_bytes) + _padded(sizes.answer_bytes)


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _PAGE) * _PAGE


def _check_memory(fd: int, size_bytes: int) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size != size_bytes:
        raise HandoffError(f"the memory of feed-forward calls is {status.st_size} bytes long, wanted {size_bytes}")
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SIZE_SEALS != _SIZE_SEALS:
        raise HandoffError("the memory of feed-forward calls can still change its size: refused")


def _place(memory: RingMemory, *, is_caller: bool) -> RingPlace:
    """Where one end finds what."""
    sizes, address = memory.sizes, memory.address
    first_slot = address + _CONTROL_BYTES
    rows_at = first_slot + 2 * HEADER_BYTES
    return RingPlace(
        address=address,
        num_slots=sizes.num_slots,
        posted_at=_CALLS if is_caller else _ANSWERS,
        news_at=_ANSWERS if is_caller else _CALLS,
        dozes_at=_CALLER_DOZES if is_caller else _CALLEE_DOZES,
        peer_dozes_at=_CALLEE_DOZES if is_caller else _CALLER_DOZES,
        out_entries=_CALL_RING if is_caller else _ANSWER_RING,
        in_entries=_ANSWER_RING if is_caller else _CALL_RING,
        out_headers=first_slot if is_caller else first_slot + HEADER_BYTES,
        out_rows=rows_at if is_caller else rows_at + _padded(sizes.call_bytes),
        in_headers=first_slot + HEADER_BYTES if is_caller else first_slot,
        slot_bytes=_stride(sizes),
        most_header_bytes=HEADER_BYTES,
        most_sent_bytes=sizes.call_bytes if is_caller else sizes.answer_bytes,
        most_row_bytes=sizes.answer_bytes if is_caller else sizes.call_bytes,
    )


class _RingEnd:
    """What both ends do alike: post an entry, read the entries of the other, doze and wake."""

    transport = "shm"

    def __init__(
        self, memory: RingMemory, sock: socket.socket, kernels: RingKernels | None, *, is_caller: bool
    ) -> None:
        self.sizes = memory.sizes
        self._memory = memory
        self._words = memory.words
        self._sock = sock
        sock.setblocking(False)
        place = _place(memory, is_caller=is_caller)
        self._ring: Ring = kernels.ring(place) if kernels is not None else PlainRing(place, memory.words)
        self.compiled_ring: Ring | None = self._ring if kernels is not None else None
        self._dozes_at, self._peer_dozes_at = place.dozes_at, place.peer_dozes_at
        self._problem: str | None = None

    def has_news(self) -> bool:
        return self._ring.has_news() or self._problem is not None

    def fileno(self) -> int:
        return self._sock.fileno()

    def wants_to_send(self) -> bool:
        return False

    def doze(self) -> bool:
        return self._ring.doze() and self._problem is None

    def wake(self) -> None:
        self._words[self._dozes_at] = 0
        try:
            while True:
                if not self._sock.recv(64):
                    self._problem = "the peer has closed the link"
                    return
        except BlockingIOError:
            return
        except OSError as error:
            self._problem = f"the link is broken: {error}"

    def close(self) -> None:
        self._sock.close()
        self._words = memoryview(bytearray(_CONTROL_BYTES)).cast("Q")
        self._ring, self.compiled_ring = ClosedRing(), None  # nobody touches the memory any more
        self._memory.close()

    def _wake_peer(self) -> None:
        """It dozes: whoever posts for it must say so."""
        self._words[self._peer_dozes_at] = 0
        with contextlib.suppress(OSError):  # full: it has been woken; broken: `wake` will find out
            self._sock.send(b"!")

    def _nothing(self) -> None:
        """Nothing is new. What a peer has posted before its end is read first."""
        if self._problem is not None:
            raise HandoffError(self._problem)


class RingCaller(_RingEnd):
    """The attention side."""

    def __init__(
        self, worker: WorkerId, memory: RingMemory, sock: socket.socket, kernels: RingKernels | None = None
    ) -> None:
        super().__init__(memory, sock, kernels, is_caller=True)
        self.worker = worker
        self._free = list(range(self.sizes.num_slots))
        self._away: set[int] = set()

    def reserve(self) -> int | None:
        return self._free.pop() if self._free else None

    def call_buffer(self, slot: int) -> memoryview:
        return self._memory.call_rows[slot]

    def answer_buffer(self, slot: int) -> memoryview:
        return self._memory.answer_rows[slot]

    def post(self, slot: int, frame: CallFrame, num_bytes: int, rows_address: int = 0) -> None:
        self._away.add(slot)
        if self._ring.post(slot, encode_header(frame), num_bytes, rows_address):
            self._wake_peer()

    def poll(self) -> list[ArrivedAnswer]:
        arrived: list[ArrivedAnswer] = []
        found = self._ring.poll()
        if not found:
            self._nothing()
        for slot, header, num_bytes in found:
            if slot not in self._away:
                raise HandoffError(f"the peer has answered slot {slot}, which holds no call")
            self._away.discard(slot)
            arrived.append(ArrivedAnswer(slot, decode_answer(header), self._memory.answer_rows[slot][:num_bytes]))
        return arrived

    def release(self, slot: int) -> None:
        self._free.append(slot)


class RingCallee(_RingEnd):
    """The FFN side."""

    def __init__(
        self, session: SessionId, memory: RingMemory, sock: socket.socket, kernels: RingKernels | None = None
    ) -> None:
        super().__init__(memory, sock, kernels, is_caller=False)
        self.session = session
        self._held: set[int] = set()

    def poll(self) -> list[ArrivedCall]:
        arrived: list[ArrivedCall] = []
        found = self._ring.poll()
        if not found:
            self._nothing()
        for slot, header, num_bytes in found:
            if slot in self._held:
                raise HandoffError(f"the peer calls with slot {slot}, which holds a call already")
            self._held.add(slot)
            arrived.append(ArrivedCall(slot, decode_call(header), self._memory.call_rows[slot][:num_bytes]))
        return arrived

    def answer_buffer(self, slot: int) -> memoryview:
        return self._memory.answer_rows[slot]

    def answer(self, slot: int, answer: FfnAnswer, num_bytes: int) -> None:
        self._held.discard(slot)
        if self._ring.post(slot, encode_header(answer), num_bytes, 0):
            self._wake_peer()
