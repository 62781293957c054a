"""Attention over the paged cache: plans made once a step, run once a layer.

Owns how queries meet gathered keys: decode rows batched by length, prompt rows in tiles, and the deterministic form.
Never writes the cache and never looks at requests; a `Span` says all it needs.

Shapes: T rows of a span, H query heads, K key/value heads, G = H / K queries that share a key, D head dimension, B
spans of a group, N blocks, S gathered key positions. bmm over [B * K] with the G queries as rows reads each key once,
so nothing is repeated for grouped-query attention.

bmm, not `scaled_dot_product_attention`: torch's CPU flash kernel takes three times as long in bfloat16 (7.2 ms against
1.5 for 512 prompt tokens, 0.89 against 0.24 for 32 decode rows of 256 tokens, SmolLM2-135M's heads, one thread).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from transload.model.kv_cache import IntArray, KvCache

_NEVER = float("-inf")
_TILE_SCORE_ROWS = 1152  # heads x rows of a prompt tile: scores of a tile then stay in the second-level cache
_PADDED_BLOCKS = 48  # a group is closed when padding would gather this many blocks in vain: a group's fixed cost
ALIGNED_ROWS = 16  # rows of a deterministic query tile
_ALIGNED_KEYS = 64  # deterministic key counts are multiples of this


class Span:
    """Consecutive rows of a step that are consecutive positions of one request: [start, start + num_rows)."""

    __slots__ = ("blocks", "first_row", "num_rows", "start")

    def __init__(self, first_row: int, start: int, num_rows: int, blocks: IntArray) -> None:
        self.first_row = first_row
        self.start = start
        self.num_rows = num_rows
        self.blocks = blocks  # of the request, at least up to the last row's position

    @property
    def end(self) -> int:
        return self.start + self.num_rows


class Part(Protocol):
    """Some rows of a step and the keys they see."""

    def attend(self, q_THD: torch.Tensor, pieces: torch.Tensor, out_TE: torch.Tensor) -> None:
        """Write the attention output of this part's rows to `out_TE` [T, H * D]; `pieces` is one layer's cache."""
        ...


class Heads:
    """How queries share keys."""

    __slots__ = ("group", "head_dim", "num_kv_heads", "num_query_heads", "scale")

    def __init__(self, num_query_heads: int, num_kv_heads: int, head_dim: int) -> None:
        self.num_query_heads = num_query_heads
        self.num_kv_heads = num_kv_heads
        self.group = num_query_heads // num_kv_heads
        self.head_dim = head_dim
        self.scale = 1.0 / math.sqrt(head_dim)


class Gather:
    """Which pieces of the cache a part reads, as torch wants it."""

    __slots__ = ("_head_dim", "_num_lanes", "numbers")

    def __init__(self, cache: KvCache, blocks_BN: IntArray) -> None:
        self.numbers = torch.from_numpy(cache.piece_numbers(blocks_BN)).to(cache.tensor.device)
        self._num_lanes = len(blocks_BN) * cache.layout.num_kv_heads
        self._head_dim = cache.layout.head_dim

    def __call__(self, pieces: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each [B * K, S, D], in new memory."""
        kv = pieces.index_select(0, self.numbers).view(2, self._num_lanes, -1, self._head_dim)
        return kv[0], kv[1]


class DecodeGroup:
    """Spans of one row each, of about the same length, in one multiplication."""

    def __init__(self, spans: Sequence[Span], heads: Heads, cache: KvCache, window: int | None) -> None:
        """`spans` lie in consecutive rows."""
        size = cache.layout.block_size
        self._heads = heads
        self._rows = slice(spans[0].first_row, spans[0].first_row + len(spans))
        firsts = [_first_key(span.start, window) // size for span in spans]
        num_blocks = max(span.start // size + 1 - first for span, first in zip(spans, firsts, strict=True))
        blocks_BN = np.empty((len(spans), num_blocks), dtype=np.int64)
        for row, (span, first) in enumerate(zip(spans, firsts, strict=True)):
            own = span.blocks[first : span.start // size + 1]
            blocks_BN[row, : len(own)] = own
            blocks_BN[row, len(own) :] = own[0]  # any block of finite numbers; its weight will be zero
        self._gather = Gather(cache, blocks_BN)
        self._hidden = _hidden_keys(spans, firsts, num_blocks * size, size, window, cache.tensor.device)

    def attend(self, q_THD: torch.Tensor, pieces: torch.Tensor, out_TE: torch.Tensor) -> None:
        heads = self._heads
        keys, values = self._gather(pieces)
        q = torch.mul(q_THD[self._rows], heads.scale).view(-1, heads.group, heads.head_dim)
        scores = torch.bmm(q, keys.transpose(1, 2))
        if self._hidden is not None:
            first, hidden_B1S = self._hidden
            scores.view(-1, heads.num_query_heads, scores.shape[2])[..., first:].masked_fill_(hidden_B1S, _NEVER)
        mixed = torch.bmm(scores.softmax(-1), values)
        out_TE[self._rows] = mixed.view(-1, heads.num_query_heads * heads.head_dim)


class PromptTiles:
    """One span of several rows: tiles of queries against all keys before them."""

    def __init__(self, span: Span, heads: Heads, cache: KvCache, window: int | None) -> None:
        size, device = cache.layout.block_size, cache.tensor.device
        self._heads = heads
        self._span = span
        first_block = _first_key(span.start, window) // size
        self._gather = Gather(cache, span.blocks[None, first_block : (span.end - 1) // size + 1])
        origin = first_block * size  # position of the first gathered key
        rows_per_tile = max(ALIGNED_ROWS, _TILE_SCORE_ROWS // heads.num_query_heads)
        self._tiles: list[tuple[int, int, int, int, torch.Tensor]] = []
        for low in range(0, span.num_rows, rows_per_tile):
            high = min(low + rows_per_tile, span.num_rows)
            first_key = _first_key(span.start + low, window)
            last_key = span.start + high
            # Without a window only the last high - low keys can lie after a query.
            masked_from = first_key if window is not None and first_key < last_key - window else span.start + low
            queries = torch.arange(span.start + low, last_key, device=device)[:, None]
            positions = torch.arange(masked_from, last_key, device=device)[None, :]
            hidden = positions > queries
            if window is not None:
                hidden |= positions <= queries - window
            self._tiles.append((low, high, first_key - origin, last_key - origin, hidden))

    def attend(self, q_THD: torch.Tensor, pieces: torch.Tensor, out_TE: torch.Tensor) -> None:
        heads, first_row = self._heads, self._span.first_row
        keys, values = self._gather(pieces)
        keys_KDS = keys.transpose(1, 2)
        for low, high, first_key, last_key, hidden in self._tiles:
            rows = slice(first_row + low, first_row + high)
            q = _stacked_queries(q_THD[rows], heads)
            scores = torch.bmm(q, keys_KDS[:, :, first_key:last_key])
            per_head = scores.view(heads.num_query_heads, high - low, last_key - first_key)
            per_head[..., last_key - first_key - hidden.shape[1] :].masked_fill_(hidden, _NEVER)
            mixed = torch.bmm(scores.softmax(-1), values[:, first_key:last_key])
            out_THD = out_TE[rows].view(high - low, heads.num_query_heads, heads.head_dim)
            out_THD.copy_(mixed.view(heads.num_query_heads, high - low, heads.head_dim).transpose(0, 1))


class AlignedTile:
    """Deterministic: the rows of a span within one tile of absolute positions [tile * 16, tile * 16 + 16).

    A position always sits at the same place of a multiplication of the same shape over the same keys, whatever else is
    in the step: absent rows are zero, and the number of keys follows from the tile alone. So its output has the same
    bits in a prompt of any chunking and in a decode batch of any size.
    """

    def __init__(
        self, span: Span, tile: int, heads: Heads, cache: KvCache, window: int | None, low: int, high: int
    ) -> None:
        """Rows for positions [low, high), all within the tile."""
        size, device = cache.layout.block_size, cache.tensor.device
        self._heads = heads
        self._rows = slice(span.first_row + low - span.start, span.first_row + high - span.start)
        tile_start = tile * ALIGNED_ROWS
        self._places = slice(low - tile_start, high - tile_start)
        step = math.lcm(size, _ALIGNED_KEYS)
        origin = _first_key(tile_start, window) // step * step
        end = -(-(tile_start + ALIGNED_ROWS) // step) * step
        own = span.blocks[origin // size : min(end, span.end + size - 1) // size]
        blocks = np.full((1, (end - origin) // size), own[0], dtype=np.int64)
        blocks[0, : len(own)] = own
        self._gather = Gather(cache, blocks)
        queries = torch.arange(tile_start, tile_start + ALIGNED_ROWS, device=device)[:, None]
        positions = torch.arange(origin, end, device=device)[None, :]
        self._hidden = positions > queries
        if window is not None:
            self._hidden |= positions <= queries - window

    def attend(self, q_THD: torch.Tensor, pieces: torch.Tensor, out_TE: torch.Tensor) -> None:
        heads = self._heads
        keys, values = self._gather(pieces)
        q_AHD = q_THD.new_zeros(ALIGNED_ROWS, heads.num_query_heads, heads.head_dim)
        q_AHD[self._places] = q_THD[self._rows]
        scores = torch.bmm(_stacked_queries(q_AHD, heads), keys.transpose(1, 2))
        scores.view(heads.num_query_heads, ALIGNED_ROWS, -1).masked_fill_(self._hidden, _NEVER)
        mixed = torch.bmm(scores.softmax(-1), values).view(heads.num_query_heads, ALIGNED_ROWS, heads.head_dim)
        out_TE[self._rows] = mixed[:, self._places].transpose(0, 1).reshape(-1, out_TE.shape[1])


class AttentionPlan:
    """All parts of a step for the layers that share one window."""

    def __init__(
        self, spans: Sequence[Span], heads: Heads, cache: KvCache, window: int | None, *, deterministic: bool
    ) -> None:
        """`spans` in row order: those of one row first, longest first."""
        self.parts: list[Part] = []
        if deterministic:
            for span in spans:
                self.parts += _aligned_tiles(span, heads, cache, window)
            return
        num_decodes = sum(span.num_rows == 1 for span in spans)
        for group in _length_groups(spans[:num_decodes], cache.layout.block_size, window):
            self.parts.append(DecodeGroup(group, heads, cache, window))
        for span in spans[num_decodes:]:
            self.parts.append(PromptTiles(span, heads, cache, window))

    def attend(self, q_THD: torch.Tensor, pieces: torch.Tensor) -> torch.Tensor:
        """Rows [T, H, D] of rotated queries to rows [T, H * D]; the step's own keys are in the cache already."""
        out_TE = q_THD.new_empty(q_THD.shape[0], q_THD.shape[1] * q_THD.shape[2])
        for part in self.parts:
            part.attend(q_THD, pieces, out_TE)
        return out_TE


def _first_key(position: int, window: int | None) -> int:
    """The first position that a query at `position` sees: a window counts the query's own."""
    return 0 if window is None else max(0, position - window + 1)


def _stacked_queries(q_THD: torch.Tensor, heads: Heads) -> torch.Tensor:
    """Scaled queries as [K, G * T, D]: the rows that share a key head lie together."""
    num_rows = q_THD.shape[0]
    q_HTD = q_THD.new_empty(heads.num_query_heads, num_rows, heads.head_dim)
    torch.mul(q_THD.transpose(0, 1), heads.scale, out=q_HTD)
    return q_HTD.view(heads.num_kv_heads, heads.group * num_rows, heads.head_dim)


def _hidden_keys(
    spans: Sequence[Span], firsts: Sequence[int], num_keys: int, size: int, window: int | None, device: torch.device
) -> tuple[int, torch.Tensor] | None:
    """From which gathered key on some are hidden, and which: bool [B, 1, keys from there]. None: every key is seen."""
    origins = np.array(firsts, dtype=np.int64) * size
    ends = np.array([span.end for span in spans], dtype=np.int64) - origins
    starts = np.array([_first_key(span.start, window) for span in spans], dtype=np.int64) - origins
    first = 0 if starts.any() else int(ends.min())
    if first == num_keys:
        return None
    keys = np.arange(first, num_keys)[None, :]
    hidden = (keys >= ends[:, None]) | (keys < starts[:, None])
    return first, torch.from_numpy(hidden[:, None, :]).to(device)


def _length_groups(spans: Sequence[Span], size: int, window: int | None) -> list[Sequence[Span]]:
    """Cut spans, longest first, where padding to the group's longest would cost more than another group."""
    groups: list[Sequence[Span]] = []
    begin, padded, longest = 0, 0, 0
    for place, span in enumerate(spans):
        num_blocks = span.start // size - _first_key(span.start, window) // size + 1
        if place == begin:
            longest = num_blocks
        padded += max(0, longest - num_blocks)
        if padded > _PADDED_BLOCKS:
            groups.append(spans[begin:place])
            begin, padded, longest = place, 0, num_blocks
    if begin < len(spans):
        groups.append(spans[begin:])
    return groups


def _aligned_tiles(span: Span, heads: Heads, cache: KvCache, window: int | None) -> list[AlignedTile]:
    tiles = []
    for tile in range(span.start // ALIGNED_ROWS, (span.end - 1) // ALIGNED_ROWS + 1):
        low = max(span.start, tile * ALIGNED_ROWS)
        high = min(span.end, (tile + 1) * ALIGNED_ROWS)
        tiles.append(AlignedTile(span, tile, heads, cache, window, low, high))
    return tiles
