"""Cells over a stream socket: straight from the sender's blocks, straight into the receiver's.

Never stores a byte outside the blocks of a permission, nor after that was taken back: what comes then is read and
dropped.
"""

from __future__ import annotations

import time

import msgspec

from transload.control.messages import KvData, SendFrame
from transload.errors import HandoffError
from transload.transfer.cells import CellMover, Cells
from transload.transfer.permits import Permit
from transload.transfer.wire import TRAILER, FrameReader, FrameWriter, drop_front, encode


class TcpCarrier:
    """Moves the cells of one two-sided link."""

    one_sided = False
    name = "tcp"

    def __init__(self, cells: Cells, writer: FrameWriter, reader: FrameReader) -> None:
        self._cells = cells
        self._writer = writer
        self._reader = reader
        self.sending = CellMover(cells.cell_bytes, cells.kernels)
        self.receiving = CellMover(cells.cell_bytes, cells.kernels)

    def check(self, _command: SendFrame, frame: KvData) -> None:
        """The receiver decides where the cells go. Raises `HandoffError` for a frame that says they are there."""
        if frame.in_place:
            raise HandoffError(f"{frame} is in place, which no frame is on a link that does not share memory")

    def send(self, command: SendFrame, frame: KvData) -> None:
        """Header, cells, checksum. The kernel has taken its copy of the cells when this returns."""
        rows = self._cells.rows(frame.layer_lo, frame.layer_hi, command.source_blocks)
        digest = self.sending.begin(len(rows))
        self._writer.hold(encode(frame, frame.num_bytes + TRAILER.size))
        for batch in self.sending.batches(rows):
            self._writer.write(self.sending.pack(digest, self._cells, batch))
        self._writer.hold(TRAILER.pack(digest.value()))

    def receive(self, frame: KvData, payload_bytes: int, permit: Permit | None) -> tuple[KvData, int]:
        """The frame with its sender's checksum, and that of the cells as they were stored; 0 if they were not."""
        if payload_bytes != frame.num_bytes + TRAILER.size:
            raise HandoffError(f"{frame} comes with {payload_bytes} bytes, not {frame.num_bytes + TRAILER.size}")
        arrived = self._discard(frame.num_bytes) if permit is None else self._store(frame, permit)
        trailer = bytearray(TRAILER.size)
        self._reader.read(memoryview(trailer))
        return msgspec.structs.replace(frame, checksum=TRAILER.unpack(trailer)[0]), arrived

    def close(self) -> None:
        """Nothing of the peer's is held."""

    def _store(self, frame: KvData, permit: Permit) -> int:
        rows = self._cells.rows(frame.layer_lo, frame.layer_hi, permit.blocks_of(frame))
        digest = self.receiving.begin(len(rows))
        missing_bytes = frame.num_bytes
        for batch in self.receiving.batches(rows):
            missing_bytes -= self._fill(self._cells.views(batch), permit)
            if permit.revoked:
                return self._discard(missing_bytes)
            self.receiving.add(digest, self._cells, batch)
        return digest.value()

    def _fill(self, views: list[memoryview], permit: Permit) -> int:
        """Receive into the views until they are full or the permission is gone; returns how many bytes came."""
        filled = 0
        progress_at = time.monotonic()
        while views:
            with permit.lock:
                if permit.revoked:
                    break
                received = self._reader.read_available(views)
            if received:
                filled += received
                drop_front(views, received)
                progress_at = time.monotonic()
            else:
                self._reader.wait_readable(progress_at)
        return filled

    def _discard(self, num_bytes: int) -> int:
        self._reader.discard(num_bytes)
        return 0
