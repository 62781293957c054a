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
from torch.nn import functional

from transload.model.kv_cache import IntArray, KvCache

_TILE_SCORE_ROWS = 1152  # heads x rows of a prompt tile: scores of a tile then stay in the second-level cache
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
    """Some consecutive rows of a step and the keys they see."""

    rows: slice

    def attend(self, q_THD: torch.Tensor, pieces: torch.Tensor, sinks_H: torch.Tensor | None) -> torch.Tensor:
        """Attention output [T, H * D] of this part's rows of queries; `pieces` is one layer's cache."""
        ...

    def inputs(self) -> list[torch.Tensor]:
        """What differs between two parts of the same shapes."""
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


class Scratch:
    """Memory that gathered keys and values pass through, one part at a time. Grows to the largest part seen."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=dtype, device=device)

    def of(self, num_elements: int) -> torch.Tensor:
        if self._memory.numel() < num_elements:
            self._memory = self._memory.new_empty(num_elements * 5 // 4)
        return self._memory[:num_elements]


class Gather:
    """Which pieces of the cache a part reads, and where they come to lie."""

    __slots__ = ("_gathered", "_numbers", "keys_LDS", "values_LSD")

    def __init__(self, cache: KvCache, blocks_BN: IntArray, scratch: Scratch) -> None:
        """L = B * K lanes; a lane's N blocks follow each other, so S = N * block size."""
        layout = cache.layout
        self._numbers = torch.from_numpy(cache.piece_numbers(blocks_BN)).to(cache.tensor.device)
        memory = scratch.of(len(self._numbers) * layout.block_size * layout.head_dim)
        self._gathered = memory.view(len(self._numbers), -1)
        keys_LSD, self.values_LSD = memory.view(2, len(blocks_BN) * layout.num_kv_heads, -1, layout.head_dim).unbind(0)
        self.keys_LDS = keys_LSD.transpose(1, 2)

    def inputs(self, bias: torch.Tensor | None) -> list[torch.Tensor]:
        """Of a part that gathers so and adds this bias."""
        return [self._numbers] if bias is None else [self._numbers, bias]

    def load(self, pieces: torch.Tensor) -> None:
        """Fill `keys_LDS` and `values_LSD` from one layer's cache, over what another part or layer left there."""
        torch.index_select(pieces, 0, self._numbers, out=self._gathered)


class Padding:
    """How much decode rows are padded so that they share a multiplication, and its shape stays for a while."""

    __slots__ = ("blocks_in_vain", "least_keys", "steps_an_octave")

    def __init__(self, *, blocks_in_vain: int, least_keys: int, steps_an_octave: int) -> None:
        self.blocks_in_vain = blocks_in_vain  # a group is closed when padding would gather so many: its fixed cost
        self.least_keys = least_keys
        self.steps_an_octave = steps_an_octave  # so many lengths between one power of two and the next


CPU_PADDING = Padding(blocks_in_vain=48, least_keys=32, steps_an_octave=8)
"""oneDNN compiles a kernel for each new shape, 0.4 ms a multiplication: with the exact length, every step would."""
GPU_PADDING = Padding(blocks_in_vain=4096, least_keys=128, steps_an_octave=2)
"""A shape is recorded as a graph, which takes as long as several steps: there must be few of them."""


class Site:
    """What all parts of a worker's steps have in common."""

    __slots__ = ("cache", "fuses_prompts", "heads", "is_gpu", "padding", "scratch")

    def __init__(self, heads: Heads, cache: KvCache, *, sinks: bool = False) -> None:
        self.heads = heads
        self.cache = cache
        self.is_gpu = cache.tensor.device.type != "cpu"
        self.padding = GPU_PADDING if self.is_gpu else CPU_PADDING
        self.fuses_prompts = self.is_gpu and not sinks  # torch's fused kernel knows no sinks
        self.scratch = Scratch(cache.tensor.dtype, cache.tensor.device)

    def bias(self, hidden: torch.Tensor) -> torch.Tensor:
        """What to add to scores so that the hidden ones weigh nothing. Adding is five times as fast as filling."""
        bias = torch.zeros(hidden.shape, dtype=self.cache.tensor.dtype).masked_fill_(hidden, float("-inf"))
        return bias.to(self.cache.tensor.device)


class DecodeGroup:
    """Spans of one row each, of about the same length, in one multiplication."""

    def __init__(self, spans: Sequence[Span], site: Site, window: int | None) -> None:
        """`spans` lie in consecutive rows."""
        size = site.cache.layout.block_size
        self._heads = site.heads
        self.rows = slice(spans[0].first_row, spans[0].first_row + len(spans))
        firsts = [_first_key(span.start, window) // size for span in spans]
        longest = max(span.start // size + 1 - first for span, first in zip(spans, firsts, strict=True))
        num_blocks = _rounded_up(longest, size, site.padding)
        blocks_BN = np.empty((len(spans), num_blocks), dtype=np.int64)
        for row, (span, first) in enumerate(zip(spans, firsts, strict=True)):
            own = span.blocks[first : span.start // size + 1]
            blocks_BN[row, : len(own)] = own
            blocks_BN[row, len(own) :] = own[0]  # any block of finite numbers; its weight will be zero
        self._gather = Gather(site.cache, blocks_BN, site.scratch)
        num_keys = num_blocks * size
        self._first_biased, hidden_B1S = _hidden_keys(spans, firsts, num_keys, size, window, whole=site.is_gpu)
        self._bias_B1S = site.bias(hidden_B1S) if hidden_B1S.numel() else None

    def inputs(self) -> list[torch.Tensor]:
        return self._gather.inputs(self._bias_B1S)

    def attend(self, q_THD: torch.Tensor, pieces: torch.Tensor, sinks_H: torch.Tensor | None) -> torch.Tensor:
        heads, gather = self._heads, self._gather
        gather.load(pieces)
        q_LGD = torch.mul(q_THD, heads.scale).view(-1, heads.group, heads.head_dim)
        scores_LGS = torch.bmm(q_LGD, gather.keys_LDS)
        if self._bias_B1S is not None:
            scores_BHS = scores_LGS.view(len(q_THD), heads.num_query_heads, -1)
            scores_BHS[..., self._first_biased :].add_(self._bias_B1S)
        return torch.bmm(_softmax(scores_LGS, heads, sinks_H), gather.values_LSD).view(len(q_THD), -1)


class PromptTiles:
    """One span of several rows: tiles of queries against all keys before them."""

    def __init__(self, span: Span, site: Site, window: int | None) -> None:
        size = site.cache.layout.block_size
        self._heads = site.heads
        self.rows = slice(span.first_row, span.first_row + span.num_rows)
        first_block = _first_key(span.start, window) // size
        self._gather = Gather(site.cache, span.blocks[None, first_block : (span.end - 1) // size + 1], site.scratch)
        origin = first_block * size  # position of the first gathered key
        rows_per_tile = max(ALIGNED_ROWS, _TILE_SCORE_ROWS // site.heads.num_query_heads)
        self._tiles: list[tuple[slice, slice, torch.Tensor]] = []  # queries, keys, bias of the last keys
        for low in range(0, span.num_rows, rows_per_tile):
            high = min(low + rows_per_tile, span.num_rows)
            first, last = _first_key(span.start + low, window), span.start + high
            # Without a window in sight only the tile's own keys can lie after a query.
            biased_from = first if window is not None and first < last - window else span.start + low
            bias = site.bias(_hidden(span.start + low, last, biased_from, last, window))
            self._tiles.append((slice(low, high), slice(first - origin, last - origin), bias))

    def inputs(self) -> list[torch.Tensor]:
        return [*self._gather.inputs(None), *(bias for _, _, bias in self._tiles)]

    def attend(self, q_THD: torch.Tensor, pieces: torch.Tensor, sinks_H: torch.Tensor | None) -> torch.Tensor:
        heads, gather = self._heads, self._gather
        gather.load(pieces)
        out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        for queries, keys, bias in self._tiles:
            q_KXD = _stacked_queries(q_THD[queries], heads)
            scores_KXS = torch.bmm(q_KXD, gather.keys_LDS[:, :, keys])
            num_queries, num_biased = bias.shape
            scores_HTS = scores_KXS.view(heads.num_query_heads, num_queries, -1)
            scores_HTS[..., scores_HTS.shape[2] - num_biased :].add_(bias)
            mixed_KXD = torch.bmm(_softmax(scores_KXS, heads, sinks_H), gather.values_LSD[:, keys])
            mixed_HTD = mixed_KXD.view(heads.num_query_heads, num_queries, heads.head_dim)
            out_THD[queries] = mixed_HTD.transpose(0, 1)
        return out_THD.view(len(q_THD), -1)


class FlashPrompt:
    """As `PromptTiles`, for a GPU: one fused call a layer, where tiles would be thousands of launches."""

    def __init__(self, span: Span, site: Site, window: int | None) -> None:
        size = site.cache.layout.block_size
        first_block = _first_key(span.start, window) // size
        origin = first_block * size
        self.rows = slice(span.first_row, span.first_row + span.num_rows)
        self._heads = site.heads
        self._num_keys = span.end - origin
        self._gather = Gather(site.cache, span.blocks[None, first_block : (span.end - 1) // size + 1], site.scratch)
        self._bias: torch.Tensor | None = None
        if window is not None and span.end - origin > window:
            self._bias = site.bias(_hidden(span.start, span.end, origin, span.end, window))

    def inputs(self) -> list[torch.Tensor]:
        return self._gather.inputs(self._bias)

    def attend(self, q_THD: torch.Tensor, pieces: torch.Tensor, sinks_H: torch.Tensor | None) -> torch.Tensor:
        """Rows [T, H, D] of queries to rows [T, H * D]."""
        from torch.nn.attention.bias import causal_lower_right  # brings torch's compiler: half of a worker's start

        assert sinks_H is None, "the fused kernel knows no sinks"
        heads, gather = self._heads, self._gather
        gather.load(pieces)
        k_1KSD = gather.keys_LDS.transpose(1, 2)[None, :, : self._num_keys]
        v_1KSD = gather.values_LSD[None, :, : self._num_keys]
        mask = self._bias if self._bias is not None else causal_lower_right(len(q_THD), self._num_keys)
        out_1HTD = functional.scaled_dot_product_attention(
            q_THD.transpose(0, 1)[None], k_1KSD, v_1KSD, attn_mask=mask, scale=heads.scale, enable_gqa=heads.group > 1
        )
        return out_1HTD[0].transpose(0, 1).reshape(len(q_THD), -1)


class AlignedTile:
    """Deterministic: the rows of a span within one tile of absolute positions [tile * 16, tile * 16 + 16).

    A position always sits at the same place of a multiplication of the same shape over the same keys, whatever else is
    in the step: absent rows are zero, and the number of keys follows from the tile alone. So its output has the same
    bits in a prompt of any chunking and in a decode batch of any size.
    """

    def __init__(self, span: Span, tile: int, site: Site, window: int | None) -> None:
        size = site.cache.layout.block_size
        tile_start = tile * ALIGNED_ROWS
        low, high = max(span.start, tile_start), min(span.end, tile_start + ALIGNED_ROWS)
        self._heads = site.heads
        self.rows = slice(span.first_row + low - span.start, span.first_row + high - span.start)
        self._places = slice(low - tile_start, high - tile_start)
        step = math.lcm(size, _ALIGNED_KEYS)
        first = _first_key(tile_start, window) // step * step
        last = -(-(tile_start + ALIGNED_ROWS) // step) * step
        own = span.blocks[first // size : min(last // size, (span.end - 1) // size + 1)]
        blocks_1N = np.full((1, (last - first) // size), own[0], dtype=np.int64)
        blocks_1N[0, : len(own)] = own
        self._gather = Gather(site.cache, blocks_1N, site.scratch)
        self._bias = site.bias(_hidden(tile_start, tile_start + ALIGNED_ROWS, first, last, window))

    def inputs(self) -> list[torch.Tensor]:
        return self._gather.inputs(self._bias)

    def attend(self, q_THD: torch.Tensor, pieces: torch.Tensor, sinks_H: torch.Tensor | None) -> torch.Tensor:
        heads, gather = self._heads, self._gather
        gather.load(pieces)
        q_AHD = q_THD.new_zeros(ALIGNED_ROWS, heads.num_query_heads, heads.head_dim)
        q_AHD[self._places] = q_THD
        scores_KXS = torch.bmm(_stacked_queries(q_AHD, heads), gather.keys_LDS)
        scores_KXS.view(heads.num_query_heads, ALIGNED_ROWS, -1).add_(self._bias)
        mixed_KXD = torch.bmm(_softmax(scores_KXS, heads, sinks_H), gather.values_LSD)
        mixed_HAD = mixed_KXD.view(heads.num_query_heads, ALIGNED_ROWS, heads.head_dim)
        return mixed_HAD[:, self._places].transpose(0, 1).reshape(len(q_THD), -1)


class AttentionPlan:
    """All parts of a step for the layers that share one window."""

    def __init__(self, spans: Sequence[Span], site: Site, window: int | None, *, deterministic: bool) -> None:
        """`spans` in row order: those of one row first, longest first."""
        self.parts: list[Part] = []
        if deterministic:
            for span in spans:
                tiles = range(span.start // ALIGNED_ROWS, (span.end - 1) // ALIGNED_ROWS + 1)
                self.parts += [AlignedTile(span, tile, site, window) for tile in tiles]
            return
        num_decodes = sum(span.num_rows == 1 for span in spans)
        size = site.cache.layout.block_size
        for group in _length_groups(spans[:num_decodes], size, window, site.padding.blocks_in_vain):
            self.parts.append(DecodeGroup(group, site, window))
        prompt = FlashPrompt if site.fuses_prompts else PromptTiles
        for span in spans[num_decodes:]:
            self.parts.append(prompt(span, site, window))

    def attend(self, q_THD: torch.Tensor, pieces: torch.Tensor, sinks_H: torch.Tensor | None = None) -> torch.Tensor:
        """Rows [T, H, D] of rotated queries to rows [T, H * D]; the step's own keys are in the cache already.

        `sinks_H`: a logit of each head that its softmax is over as well, and that has no value.
        """
        if len(self.parts) == 1:
            return self.parts[0].attend(q_THD, pieces, sinks_H)
        return torch.cat([part.attend(q_THD[part.rows], pieces, sinks_H) for part in self.parts])


def _first_key(position: int, window: int | None) -> int:
    """The first position that a query at `position` sees: a window counts the query's own."""
    return 0 if window is None else max(0, position - window + 1)


def _stacked_queries(q_THD: torch.Tensor, heads: Heads) -> torch.Tensor:
    """Scaled queries as [K, G * T, D]: the rows that share a key head lie together."""
    num_rows = q_THD.shape[0]
    q_HTD = q_THD.new_empty(heads.num_query_heads, num_rows, heads.head_dim)
    torch.mul(q_THD.transpose(0, 1), heads.scale, out=q_HTD)
    return q_HTD.view(heads.num_kv_heads, heads.group * num_rows, heads.head_dim)


def _softmax(scores_LXS: torch.Tensor, heads: Heads, sinks_H: torch.Tensor | None) -> torch.Tensor:
    """Weights of the keys. L = B * K lanes, X = G * T rows in each; the sinks' own weights are left out."""
    if sinks_H is None:
        return scores_LXS.softmax(-1)
    num_lanes, num_rows, _ = scores_LXS.shape
    spans, rows = num_lanes // heads.num_kv_heads, num_rows // heads.group
    sinks_BKGT = sinks_H.view(1, heads.num_kv_heads, heads.group, 1).expand(spans, -1, -1, rows)
    return torch.cat((scores_LXS, sinks_BKGT.reshape(num_lanes, num_rows, 1)), -1).softmax(-1)[..., :-1]


def _hidden(first_query: int, last_query: int, first_key: int, last_key: int, window: int | None) -> torch.Tensor:
    """bool [queries, keys]: what positions [first_key, last_key) the queries [first_query, last_query) do not see."""
    queries = torch.arange(first_query, last_query)[:, None]
    keys = torch.arange(first_key, last_key)[None, :]
    hidden = keys > queries
    return hidden if window is None else hidden | (keys <= queries - window)


def _hidden_keys(
    spans: Sequence[Span], firsts: Sequence[int], num_keys: int, size: int, window: int | None, *, whole: bool
) -> tuple[int, torch.Tensor]:
    """From which gathered key on some are hidden from a row, and which: bool [B, 1, keys from there on].

    `whole`: from the first on, so that the shape does not follow the contexts as they grow.
    """
    origins = np.array(firsts, dtype=np.int64) * size
    ends = np.array([span.end for span in spans], dtype=np.int64) - origins
    starts = np.array([_first_key(span.start, window) for span in spans], dtype=np.int64) - origins
    first = 0 if whole or starts.any() else int(ends.min())
    keys = np.arange(first, num_keys)[None, :]
    hidden = (keys >= ends[:, None]) | (keys < starts[:, None])
    return first, torch.from_numpy(hidden[:, None, :])


def _rounded_up(num_blocks: int, size: int, padding: Padding) -> int:
    """A number of blocks that a growing context keeps for a while."""
    num_keys = num_blocks * size
    quantum = max(padding.least_keys, (1 << num_keys.bit_length()) // (2 * padding.steps_an_octave))
    blocks_a_quantum = max(1, quantum // size)
    return -(-num_blocks // blocks_a_quantum) * blocks_a_quantum


def _length_groups(spans: Sequence[Span], size: int, window: int | None, blocks_in_vain: int) -> list[Sequence[Span]]:
    """Cut spans, longest first, where padding to the group's longest would cost more than another group."""
    groups: list[Sequence[Span]] = []
    begin, padded, longest = 0, 0, 0
    for place, span in enumerate(spans):
        num_blocks = span.start // size - _first_key(span.start, window) // size + 1
        if place == begin:
            longest = num_blocks
        padded += max(0, longest - num_blocks)
        if padded > blocks_in_vain:
            groups.append(spans[begin:place])
            begin, padded, longest = place, 0, num_blocks
    if begin < len(spans):
        groups.append(spans[begin:])
    return groups
