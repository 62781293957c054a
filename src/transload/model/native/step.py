"""A model's attention side and a step's chunks as the kernels see them.

Owns the structs' contents that every way through the kernels shares: norms, projections, windows; rows, spans, blocks,
rotation. Never runs a kernel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from transload.control.messages import Chunk
from transload.model.batch import layer_windows
from transload.model.kv_cache import IntArray, KvCache
from transload.model.linear import Linear
from transload.model.llama import AttentionParts, LlamaModel, RmsNorm
from transload.model.native.library import Library
from transload.model.native.packed import KINDS
from transload.model.native.structs import LayerStruct, LinearStruct, ModelStruct, StepStruct
from transload.model.rope import RotaryEmbedding

MOST_QUERY_ROWS = 96
"""QUERY_ROWS of attention.h: the query heads of one head of keys and values share a tile."""


class AttentionStructs:
    """A model's attention layers, embedding, final norm and head. Must outlive every use of `model`."""

    def __init__(self, model: LlamaModel) -> None:
        arch, side = model.arch, model.attention
        self._kept_alive: list[torch.Tensor] = []
        self._side = side
        self.layers = (LayerStruct * arch.num_layers)()
        for number, (layer, window) in enumerate(zip(side.layers, layer_windows(arch), strict=True)):
            self._describe(self.layers[number], layer.parts)
            self.layers[number].window = window or 0
        self.model = ModelStruct(
            arch.hidden_size,
            arch.intermediate_size,
            arch.num_layers,
            arch.num_heads,
            arch.num_kv_heads,
            arch.head_dim,
            arch.vocab_size,
            KINDS[model.dtype],
            arch.norm_eps,
            self._norm(side.final_norm),
            None if side.embedding is None else side.embedding.data_ptr(),
            linear_struct(side.head),
            self.layers,
        )

    def _describe(self, struct: LayerStruct, parts: AttentionParts) -> None:
        struct.input_norm, struct.ffn_norm = self._norm(parts.input_norm), self._norm(parts.ffn_norm)
        struct.query_norm, struct.key_norm = self._norm(parts.query_norm), self._norm(parts.key_norm)
        struct.qkv, struct.output = linear_struct(parts.qkv), linear_struct(parts.output)

    def _norm(self, norm: RmsNorm | None) -> int | None:
        if norm is None:
            return None
        weight = norm.weight.contiguous()
        self._kept_alive.append(weight)
        return weight.data_ptr()


class StepTables:
    """Lays steps of one model over one cache out."""

    def __init__(self, model: LlamaModel, cache: KvCache) -> None:
        self._vocab_size = model.arch.vocab_size
        self._cache = cache
        self._rotary = RotaryEmbedding(model.arch, torch.float32, model.device)

    def new_step(self) -> StepStruct:
        """A struct to be filled; it says where the cache is."""
        layout, step = self._cache.layout, StepStruct()
        step.cache_base, step.cache_kind = self._cache.tensor.data_ptr(), KINDS[self._cache.tensor.dtype]
        step.cache_num_layers, step.cache_num_kv_heads = layout.num_layers, layout.num_kv_heads
        step.cache_block_size, step.cache_head_dim = layout.block_size, layout.head_dim
        return step

    def lay_out(self, chunks: Sequence[Chunk], step: StepStruct) -> list[np.ndarray]:
        """Fill a step's struct; returns the arrays that it points into, which must outlive its use. Raises `IndexError`
        for a token outside the vocabulary."""
        size = self._cache.layout.block_size
        tokens: list[int] = []
        blocks: list[int] = []
        spans: list[tuple[int, int, int, int, int]] = []
        kept: list[int] = []
        kept_spans: list[tuple[int, int, int, int, int]] = []
        for chunk in chunks:
            end = chunk.start + chunk.num_tokens
            spans.append((len(tokens), chunk.num_tokens, chunk.start, len(blocks), 0))
            tokens += chunk.tokens[chunk.start : end]
            if chunk.samples:
                kept_spans.append((len(kept), 1, end - 1, len(blocks), 0))
                kept.append(len(tokens) - 1)
            blocks += chunk.blocks[: (end - 1) // size + 1]
        assert len(tokens) == sum(chunk.num_tokens for chunk in chunks), "a chunk's tokens are all known"
        token_ids = np.array(tokens, dtype=np.int64)
        if token_ids.min() < 0 or token_ids.max() >= self._vocab_size:
            raise IndexError(f"a token id is outside the vocabulary of {self._vocab_size}")
        block_numbers, span_table = np.array(blocks, dtype=np.int64), np.array(spans, dtype=np.int64)
        positions = _positions(span_table)
        firsts = span_table[:, 3]
        row_blocks = block_numbers[np.repeat(firsts, span_table[:, 1]) + positions // size]
        lengths = np.repeat([chunk.request.num_prompt_tokens for chunk in chunks], span_table[:, 1])
        cosines, sines = self._rotary.angles(torch.from_numpy(positions), torch.from_numpy(lengths))
        kept_rows, kept_table = np.array(kept, dtype=np.int64), np.array(kept_spans, dtype=np.int64)
        arrays: list[np.ndarray] = []

        def address(array: np.ndarray) -> int:
            arrays.append(array)
            return array.ctypes.data

        step.num_rows, step.num_spans, step.num_kept = len(tokens), len(spans), len(kept)
        step.token_ids, step.positions = address(token_ids), address(positions)
        step.cosines, step.sines = address(cosines.numpy()), address(sines.numpy())
        step.row_blocks, step.blocks = address(row_blocks), address(block_numbers)
        step.spans, step.kept, step.kept_spans = address(span_table), address(kept_rows), address(kept_table)
        return arrays


def attention_is_native(model: LlamaModel, library: Library) -> bool:
    """Whether the kernels can compute everything of this model but its feed-forwards, as it is built."""
    arch, lanes = model.arch, library.lanes
    if model.deterministic or model.device.type != "cpu" or model.dtype not in KINDS:
        return False
    if any(size % lanes for size in (arch.hidden_size, arch.head_dim, arch.vocab_size)):
        return False
    if arch.num_heads // arch.num_kv_heads > MOST_QUERY_ROWS:
        return False
    parts = [layer.parts for layer in model.attention.layers if layer.parts.sinks is None]
    if len(parts) < arch.num_layers:
        return False
    linears = [model.attention.head, *(linear for part in parts for linear in (part.qkv, part.output))]
    return all(linear.packed is not None for linear in linears)


def linear_struct(linear: Linear) -> LinearStruct:
    """Of a layer that is packed."""
    assert linear.packed is not None, "somebody has looked"
    return linear.packed.struct


def open_threads(library: Library, model: ModelStruct, threads: int) -> int:
    """A runner's address. Raises `MemoryError`."""
    runner: int | None = library.open(ctypes.byref(model), threads)
    if not runner:
        raise MemoryError("no memory for the kernels' threads")
    return runner


def _positions(spans: IntArray) -> IntArray:
    """int64 [T]: of each span's rows, one after another."""
    num_rows, starts = spans[:, 1], spans[:, 2]
    if len(spans) == num_rows.sum():
        return starts.copy()
    return np.repeat(starts - spans[:, 0], num_rows) + np.arange(num_rows.sum())
