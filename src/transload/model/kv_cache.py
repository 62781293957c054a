"""The paged KV cache as torch tensors over memory that somebody else may own.

Owns the arithmetic from (block, position in block) to places in memory. Never decides which blocks a request has.

Shapes: [num_blocks, num_layers, 2 (K, V), num_kv_heads, block_size, head_dim], as `transfer.layout` says. A *piece* is
one head's keys (or values) of one cell, [block_size, head_dim], contiguous; a *row* is one position of a piece.
Keys are stored after the rotary embedding.

Every slot that attention may read holds a finite number: a new cache starts at zero, and the unwritten end of a block
is zeroed when its request enters it. Attention reads whole blocks and gives what lies past a request's end the weight
zero, and zero times a leftover NaN would not be zero.
"""

from __future__ import annotations

import mmap

import numpy as np
import numpy.typing as npt
import torch

from transload.transfer.layout import KvLayout

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

IntArray = npt.NDArray[np.int64]


class KvCache:
    """A cache of `num_blocks` blocks; `buffer`, if given, is zeroed writable memory that must outlive it. What of the
    buffer lies behind them can be named by block numbers too: windows into the caches of others."""

    def __init__(
        self,
        layout: KvLayout,
        num_blocks: int,
        buffer: memoryview | mmap.mmap | bytearray | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        dtype = TORCH_DTYPES[layout.dtype]
        shape = (num_blocks, layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)
        if buffer is None:
            self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        else:
            assert device is None or device.type == "cpu", "only host memory can be mapped into"
            view = memoryview(buffer)
            assert not view.readonly, "the cache is written"
            assert view.nbytes >= num_blocks * layout.block_bytes, (view.nbytes, num_blocks, layout.block_bytes)
            num_table_blocks = view.nbytes // layout.block_bytes
            num_elements = num_table_blocks * layout.block_bytes // dtype.itemsize
            table = torch.frombuffer(buffer, dtype=dtype, count=num_elements)
            self.tensor = table.view(num_table_blocks, *shape[1:])
        pieces_per_layer = 2 * layout.num_kv_heads
        pieces = self.tensor.view(-1, layout.block_size * layout.head_dim)
        rows = self.tensor.view(-1, layout.head_dim)
        layers = range(layout.num_layers)
        # Seen from its layer's first piece, a block's pieces have the same numbers in every layer: a step computes
        # its indices once, for layer 0.
        self.pieces = tuple(pieces[layer * pieces_per_layer :] for layer in layers)
        self.rows = tuple(rows[layer * pieces_per_layer * layout.block_size :] for layer in layers)
        self._pieces_per_block = layout.num_layers * pieces_per_layer
        self._heads = np.arange(layout.num_kv_heads, dtype=np.int64)

    def row_numbers(self, blocks: IntArray, offsets: IntArray) -> tuple[IntArray, IntArray]:
        """Where K and V of one token each lie, [T * kv_heads] numbers of rows; `offsets` are places in the block."""
        pieces_TK = blocks[:, None] * self._pieces_per_block + self._heads
        keys_TK = pieces_TK * self.layout.block_size + offsets[:, None]
        values_TK = keys_TK + self.layout.num_kv_heads * self.layout.block_size
        return keys_TK.reshape(-1), values_TK.reshape(-1)

    def piece_numbers(self, blocks_BN: IntArray) -> IntArray:
        """Numbers of the pieces of `blocks_BN` [B, N], in the order [2 (K, V), B, kv_heads, N], flat."""
        first_BKN = (blocks_BN * self._pieces_per_block)[:, None, :] + self._heads[None, :, None]
        return np.concatenate((first_BKN.reshape(-1), (first_BKN + self.layout.num_kv_heads).reshape(-1)))

    def clear_from(self, block: int, offset: int) -> None:
        """Zero a block's slots from `offset` on, in all layers."""
        self.tensor[block, :, :, :, offset:].zero_()
