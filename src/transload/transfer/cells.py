"""Cells as rows of bytes: where they lie, how they are copied between two pools, and what their checksum is.

A pool is a matrix [num_blocks * num_layers, cell_bytes]; row `block * num_layers + layer` is a cell. Everything here
goes layer by layer, block by block, which is the order that `KvData.checksum` is defined over. Knows no sockets and no
permissions: its callers have checked what may be touched.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from transload.errors import HandoffError
from transload.transfer.layout import KvLayout

Rows = npt.NDArray[np.intp]

_BATCH_BYTES = 512 << 10  # handled at once: small enough for a core's own cache, large enough to let the GIL go
_LOOP_CELL_BYTES = 64 << 10  # from here on a call a cell costs less than the detour through a scratch buffer
_LOOP_BATCH_BYTES = 256 << 10  # copied before the checksum comes by: both sides of it fit the core's cache


class Cells:
    """The cells of one pool, as rows over its memory."""

    def __init__(self, buffer: memoryview, layout: KvLayout, num_blocks: int) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.cell_bytes = layout.cell_bytes
        self.buffer = buffer
        num_rows = num_blocks * layout.num_layers
        self.matrix: npt.NDArray[np.uint8] = np.frombuffer(buffer, np.uint8, num_rows * self.cell_bytes).reshape(
            num_rows, self.cell_bytes
        )

    def rows(self, layer_lo: int, layer_hi: int, blocks: Sequence[int]) -> Rows:
        """Rows of these layers of these blocks, in checksum order. Raises `HandoffError` if any is not in the pool."""
        if not 0 <= layer_lo < layer_hi <= self.layout.num_layers:
            raise HandoffError(f"layers {layer_lo}..{layer_hi}: the cache has layers 0..{self.layout.num_layers}")
        if not blocks or min(blocks) < 0 or max(blocks) >= self.num_blocks:
            raise HandoffError(f"blocks {blocks!r:.80}: the pool has blocks 0..{self.num_blocks}, and one is the least")
        first = np.array(blocks, np.intp) * self.layout.num_layers
        if layer_hi == layer_lo + 1:
            return first + layer_lo
        return (first + np.arange(layer_lo, layer_hi, dtype=np.intp)[:, None]).ravel()

    def views(self, rows: Rows) -> list[memoryview]:
        """The cells as buffers for `sendmsg` and `recvmsg_into`."""
        buffer, size = self.buffer, self.cell_bytes
        return [buffer[start : start + size] for start in (rows * size).tolist()]

    def release(self) -> None:
        """Let go of the memory, so that its owner can unmap it."""
        self.matrix = np.empty((0, self.cell_bytes), np.uint8)
        self.buffer = memoryview(b"")


class CellMover:
    """Copies and checks cells for one thread. Its scratch buffer makes it no use to two threads at once."""

    def __init__(self, cell_bytes: int) -> None:
        self.checksum_seconds = 0.0
        """Time spent on checksums so far, of all that this mover did."""
        self._in_loop = cell_bytes >= _LOOP_CELL_BYTES
        self.batch_rows = max(1, (_LOOP_BATCH_BYTES if self._in_loop else _BATCH_BYTES) // cell_bytes)
        self._scratch = np.empty((0 if self._in_loop else self.batch_rows, cell_bytes), np.uint8)

    def batches(self, rows: Rows) -> Iterator[Rows]:
        """The rows in runs of at most half a megabyte, or one cell."""
        for start in range(0, len(rows), self.batch_rows):
            yield rows[start : start + self.batch_rows]

    def copy(self, source: Cells, rows: Rows, target: Cells, target_rows: Rows) -> int:
        """Copy cells into another pool and return the checksum of what they were here."""
        checksum = xxhash.xxh3_64()
        of, to = source.matrix, target.matrix
        for batch, target_batch in zip(self.batches(rows), self.batches(target_rows), strict=True):
            if self._in_loop:
                for row, target_row in zip(batch.tolist(), target_batch.tolist(), strict=True):
                    to[target_row] = of[row]
                self.update(checksum, source.views(batch))
            else:
                # Gather and scatter run without the GIL; a loop of slices would keep it and is hardly faster.
                gathered = self._gather(source, batch)
                self.update(checksum, [gathered.data])
                to[target_batch] = gathered
        return checksum.intdigest()

    def checksum(self, cells: Cells, rows: Rows) -> int:
        """xxh3-64 over cells as they lie in memory now."""
        started = time.perf_counter()
        checksum = xxhash.xxh3_64()
        for batch in self.batches(rows):
            for view in cells.views(batch) if self._in_loop else (self._gather(cells, batch).data,):
                checksum.update(view)
        self.checksum_seconds += time.perf_counter() - started
        return checksum.intdigest()

    def pack(self, cells: Cells, rows: Rows) -> Sequence[memoryview]:
        """A batch of cells for `sendmsg`: large ones where they lie, small ones side by side in the scratch buffer,
        where checksum and socket find them in one run. Good until the next batch."""
        return cells.views(rows) if self._in_loop else (self._gather(cells, rows).reshape(-1).data,)

    def update(self, checksum: xxhash.xxh3_64, views: Sequence[memoryview]) -> None:
        """Add cells that are on their way through this core's cache."""
        started = time.perf_counter()
        for view in views:
            checksum.update(view)
        self.checksum_seconds += time.perf_counter() - started

    def _gather(self, cells: Cells, rows: Rows) -> npt.NDArray[np.uint8]:
        gathered = self._scratch[: len(rows)]
        # mode="clip" because the default mode copies once more; `Cells.rows` has checked the range.
        np.take(cells.matrix, rows, axis=0, out=gathered, mode="clip")
        return gathered
