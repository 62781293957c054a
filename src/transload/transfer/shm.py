"""Cells between two workers of one host: the sender copies them into the receiver's mapped pool, then says so.

Owns the peer's mapping. Never touches a block that the command does not name, and nothing at all after `close`, which
the sender thread calls itself.
"""

from __future__ import annotations

import msgspec

from transload.control.messages import KvData, SendFrame
from transload.errors import HandoffError
from transload.transfer.cells import CellMover, Cells
from transload.transfer.memory import PeerMemory
from transload.transfer.permits import Permit
from transload.transfer.wire import FrameWriter, encode


class ShmCarrier:
    """Moves the cells of one one-sided link."""

    one_sided = True

    def __init__(self, cells: Cells, peer_memory: PeerMemory, writer: FrameWriter) -> None:
        self._cells = cells
        self._memory = peer_memory
        self.name = "shm" if peer_memory.window is None else "direct"
        self._peer_cells = Cells(peer_memory.buffer, cells.layout, peer_memory.num_blocks)
        self._writer = writer
        self.sending = CellMover(cells.cell_bytes, cells.kernels)
        self.receiving = CellMover(cells.cell_bytes, cells.kernels)

    def check(self, command: SendFrame, frame: KvData) -> None:
        """Raises `HandoffError` if the frame's cells have no place in the peer's pool."""
        if frame.in_place:
            if self._memory.window is None:
                raise HandoffError(f"{frame} is in place, but our steps cannot work in the peer's blocks")
            return
        num_blocks = frame.block_hi - frame.block_lo
        if len(command.target_blocks) != num_blocks:
            raise HandoffError(f"{frame} has {num_blocks} blocks, but {len(command.target_blocks)} are to be filled")
        if min(command.target_blocks) < 0 or max(command.target_blocks) >= self._peer_cells.num_blocks:
            raise HandoffError(f"{frame} is to fill blocks outside the peer's 0..{self._peer_cells.num_blocks}")

    def send(self, command: SendFrame, frame: KvData) -> None:
        """Copy, then tell: the peer sees the header only when the cells are in place, one in a while for several."""
        if frame.in_place:
            self._writer.hold(encode(frame))
            return
        rows = self._cells.rows(frame.layer_lo, frame.layer_hi, command.source_blocks)
        target_rows = self._peer_cells.rows(frame.layer_lo, frame.layer_hi, command.target_blocks)
        checksum = self.sending.copy(self._cells, rows, self._peer_cells, target_rows)
        self._writer.hold(encode(msgspec.structs.replace(frame, checksum=checksum)), frame.num_bytes)

    def receive(self, frame: KvData, payload_bytes: int, permit: Permit | None) -> tuple[KvData, int]:
        """The frame and the checksum of its cells as they lie in our blocks; 0 without permission. There is none where
        nothing was copied: what a step has written is as good as what our own would have."""
        if payload_bytes:
            raise HandoffError(f"{frame} comes with {payload_bytes} bytes on a link that carries none")
        if frame.in_place and self._memory.window is None:
            raise HandoffError(f"{frame} is in place, but we have not let the peer's steps into our blocks")
        if permit is None or frame.in_place:
            return frame, 0
        rows = self._cells.rows(frame.layer_lo, frame.layer_hi, permit.blocks_of(frame))
        return frame, self.receiving.checksum(self._cells, rows)

    def close(self) -> None:
        """Unmap the peer's pool."""
        self._peer_cells.release()
        self._memory.close()
