"""Host memory beside a cache on a device: KV that leaves is put here for the links, KV that came is fetched from here.

The stage mirrors the cache block for block. It never decides what crosses; on CPU there is none, because the links read
and write the cache itself.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch

from transload.control.messages import Chunk
from transload.model.kv_cache import KvCache


class HostStage:
    """`buffer` is the host memory of the links, laid out as the cache is. Copies end before a method returns."""

    def __init__(self, cache: KvCache, buffer: memoryview | mmap.mmap | bytearray) -> None:
        self._cache = cache
        self._host = KvCache(cache.layout, cache.num_blocks, buffer).tensor

    def fetch(self, blocks: Sequence[int]) -> None:
        """Bring blocks that other workers have filled onto the device."""
        if blocks:
            index = torch.tensor(blocks)
            device = self._cache.tensor.device
            self._cache.tensor[index.to(device)] = self._host[index].to(device)

    def put(self, chunks: Sequence[Chunk], layer_lo: int, layer_hi: int) -> None:
        """Put these layers of what the streaming chunks have not sent yet where the links can read it."""
        size = self._cache.layout.block_size
        blocks = [
            block
            for chunk in chunks
            if chunk.streams
            for block in chunk.blocks[chunk.num_sent_blocks : -(-(chunk.start + chunk.num_tokens) // size)]
        ]
        if blocks:
            index = torch.tensor(blocks)
            device = self._cache.tensor.device
            self._host[index, layer_lo:layer_hi] = self._cache.tensor[index.to(device), layer_lo:layer_hi].cpu()
