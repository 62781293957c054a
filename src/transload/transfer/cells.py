"""Cells as rows of bytes: where they lie, how they are copied between two pools, and what their checksum is.

A pool is a matrix [num_blocks * num_layers, cell_bytes]; row `block * num_layers + layer` is a cell. Everything here
goes layer by layer, block by block, which is the order that `KvData.checksum` is defined over. Compiled kernels copy
and sum in one pass where there are any; numpy and the xxhash package give the same without. Knows no sockets and no
permissions: its callers have checked what may be touched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from transload.errors import HandoffError
from transload.transfer.layout import KvLayout

Rows = npt.NDArray[np.intp]

_BATCH_BYTES = 512 << 10  # handled at once: small enough for a core's own cache, large enough to let the GIL go
_LOOP_CELL_BYTES = 64 << 10  # from here on a call a cell costs less than the detour through a scratch buffer
_LOOP_BATCH_BYTES = 256 << 10  # copied before the checksum comes by: both sides of it fit the core's cache
_STRIPE_BYTES = 64  # the kernels sum whole ones
_LEAST_DIGEST_BYTES = 1024  # XXH3-64 is another function below 241 bytes


class CellKernels(Protocol):
    """Compiled functions over the memory at given addresses; they check nothing and let the GIL go. A digest is 80
    bytes that `digest_begin(digest, num_bytes)` fills. Rows are int64."""

    @property
    def digest_begin(self) -> Callable[..., Any]: ...
    @property
    def digest_end(self) -> Callable[..., Any]: ...
    @property
    def sum_cells(self) -> Callable[..., Any]:
        """(digest, source, rows, num_rows, cell_bytes)"""
        ...

    @property
    def copy_cells(self) -> Callable[..., Any]:
        """(digest, source, rows, target, target_rows, num_rows, cell_bytes, stays in this core's cache)"""
        ...


class Cells:
    """The cells of one pool, as rows over its memory."""

    def __init__(
        self, buffer: memoryview, layout: KvLayout, num_blocks: int, kernels: CellKernels | None = None
    ) -> None:
        self.layout = layout
        self.kernels = kernels
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


class Digest:
    """A checksum under way: xxh3-64 over cells that are added in order."""

    def __init__(self) -> None:
        self._sum = xxhash.xxh3_64()

    def add(self, views: Sequence[memoryview]) -> None:
        for view in views:
            self._sum.update(view)

    def value(self) -> int:
        return self._sum.intdigest()


class CompiledDigest:
    """The same, made by kernels. `num_bytes` of cells will be added in all."""

    def __init__(self, kernels: CellKernels, num_bytes: int) -> None:
        self._kernels = kernels
        self._state = np.empty(10, np.uint64)
        self.address: int = self._state.ctypes.data
        kernels.digest_begin(self.address, num_bytes)

    def value(self) -> int:
        return int(self._kernels.digest_end(self.address))


class CellMover:
    """Copies and checks cells for one thread. Its scratch buffer makes it no use to two threads at once."""

    def __init__(self, cell_bytes: int, kernels: CellKernels | None = None) -> None:
        self.checksum_seconds = 0.0
        """Time spent on checksums so far, of all that this mover did; not what kernels add to a copy."""
        self._kernels = kernels if cell_bytes % _STRIPE_BYTES == 0 else None
        self._cell_bytes = cell_bytes
        self._in_loop = cell_bytes >= _LOOP_CELL_BYTES
        self.batch_rows = max(1, (_LOOP_BATCH_BYTES if self._in_loop else _BATCH_BYTES) // cell_bytes)
        self._scratch = np.empty((0 if self._in_loop else self.batch_rows, cell_bytes), np.uint8)
        self._places = np.arange(self.batch_rows, dtype=np.intp)

    def batches(self, rows: Rows) -> Iterator[Rows]:
        """The rows in runs of at most half a megabyte, or one cell."""
        for start in range(0, len(rows), self.batch_rows):
            yield rows[start : start + self.batch_rows]

    def begin(self, num_cells: int) -> Digest | CompiledDigest:
        """A checksum over so many cells."""
        num_bytes = num_cells * self._cell_bytes
        if self._kernels is None or num_bytes < _LEAST_DIGEST_BYTES:
            return Digest()
        return CompiledDigest(self._kernels, num_bytes)

    def copy(self, source: Cells, rows: Rows, target: Cells, target_rows: Rows) -> int:
        """Copy cells into another pool and return the checksum of what they were here."""
        digest = self.begin(len(rows))
        if isinstance(digest, CompiledDigest):
            self._copy_compiled(digest, source, rows, target.matrix, target_rows, stays=False)
            return digest.value()
        of, to = source.matrix, target.matrix
        for batch, target_batch in zip(self.batches(rows), self.batches(target_rows), strict=True):
            if self._in_loop:
                for row, target_row in zip(batch.tolist(), target_batch.tolist(), strict=True):
                    to[target_row] = of[row]
                self.add(digest, source, batch)
            else:
                # Gather and scatter run without the GIL; a loop of slices would keep it and is hardly faster.
                gathered = self._gather(source, batch)
                self._add_views(digest, [gathered.data])
                to[target_batch] = gathered
        return digest.value()

    def checksum(self, cells: Cells, rows: Rows) -> int:
        """xxh3-64 over cells as they lie in memory now."""
        digest = self.begin(len(rows))
        if isinstance(digest, CompiledDigest):
            self.add(digest, cells, rows)
            return digest.value()
        for batch in self.batches(rows):
            if self._in_loop:
                self.add(digest, cells, batch)
            else:
                self._add_views(digest, [self._gather(cells, batch).data])
        return digest.value()

    def pack(self, digest: Digest | CompiledDigest, cells: Cells, rows: Rows) -> Sequence[memoryview]:
        """A batch of cells for `sendmsg`, added to the digest: large ones where they lie, small ones side by side in
        the scratch buffer, where checksum and socket find them in one run. Good until the next batch."""
        if self._in_loop:
            self.add(digest, cells, rows)
            return cells.views(rows)
        if isinstance(digest, CompiledDigest):
            gathered = self._scratch[: len(rows)]
            self._copy_compiled(digest, cells, rows, gathered, self._places[: len(rows)], stays=True)
        else:
            gathered = self._gather(cells, rows)
            self._add_views(digest, [gathered.data])
        return (gathered.reshape(-1).data,)

    def add(self, digest: Digest | CompiledDigest, cells: Cells, rows: Rows) -> None:
        """Add cells where they lie to a digest."""
        if isinstance(digest, Digest):
            self._add_views(digest, cells.views(rows))
            return
        assert self._kernels is not None
        started = time.perf_counter()
        source = cells.matrix.ctypes.data
        self._kernels.sum_cells(digest.address, source, rows.ctypes.data, len(rows), self._cell_bytes)
        self.checksum_seconds += time.perf_counter() - started

    def _add_views(self, digest: Digest, views: Sequence[memoryview]) -> None:
        started = time.perf_counter()
        digest.add(views)
        self.checksum_seconds += time.perf_counter() - started

    def _copy_compiled(
        self,
        digest: CompiledDigest,
        source: Cells,
        rows: Rows,
        target: npt.NDArray[np.uint8],
        target_rows: Rows,
        *,
        stays: bool,
    ) -> None:
        assert self._kernels is not None
        assert len(rows) == len(target_rows)
        assert rows.flags.c_contiguous
        assert target_rows.flags.c_contiguous
        self._kernels.copy_cells(
            digest.address,
            source.matrix.ctypes.data,
            rows.ctypes.data,
            target.ctypes.data,
            target_rows.ctypes.data,
            len(rows),
            self._cell_bytes,
            stays,
        )

    def _gather(self, cells: Cells, rows: Rows) -> npt.NDArray[np.uint8]:
        gathered = self._scratch[: len(rows)]
        # mode="clip" because the default mode copies once more; `Cells.rows` has checked the range.
        np.take(cells.matrix, rows, axis=0, out=gathered, mode="clip")
        return gathered
