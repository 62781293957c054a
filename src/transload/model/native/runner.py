"""A step of a whole model through the kernels: from chunks to logits in a few calls.

Owns the structs that describe a model and a step to the kernels. `NativeRunner.of` says whether a model can go this
way; what cannot (a mixture of experts, deterministic mode, another device) goes through torch. Never decides what runs.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch

from transload.control.messages import Chunk
from transload.model.batch import layer_windows
from transload.model.kv_cache import IntArray, KvCache
from transload.model.linear import Linear
from transload.model.llama import FeedForward, LlamaModel, RmsNorm
from transload.model.native.library import LayerStruct, Library, LinearStruct, ModelStruct, StepStruct, load
from transload.model.native.packed import KINDS
from transload.model.rope import RotaryEmbedding

LayersReady = Callable[[int, int], None]


class NativeRunner:
    """One model over one cache, for one thread at a time."""

    @classmethod
    def of(cls, model: LlamaModel, cache: KvCache, threads: int) -> NativeRunner | None:
        """None if the kernels cannot compute this model as it is built."""
        library = load()
        if library is None or not _is_native(model, library):
            return None
        return cls(library, model, cache, threads)

    def __init__(self, library: Library, model: LlamaModel, cache: KvCache, threads: int) -> None:
        self._library = library
        self._model = model
        self._cache = cache
        self._rotary = RotaryEmbedding(model.arch, torch.float32, model.device)
        self._layers = (LayerStruct * model.arch.num_layers)()
        self._kept_alive: list[torch.Tensor] = []
        self._struct = self._describe(model)
        self._step = self._describe_cache(cache)
        self._logits = torch.empty(0)
        self._runner = library.open(ctypes.byref(self._struct), threads)
        if not self._runner:
            raise MemoryError("no memory for the kernels' threads")
        weakref.finalize(self, library.close, self._runner)

    def run(self, chunks: Sequence[Chunk], frame_layers: int, layers_ready: LayersReady | None) -> torch.Tensor:
        """Logits float32 [R, V] after the chunks that sample, in their order; they stay as they are until the next
        call. Every `frame_layers` layers `layers_ready` learns that they are in the cache.

        Raises `IndexError` for a token outside the vocabulary and `MemoryError`.
        """
        arrays = self._lay_out(chunks)  # their memory must outlive the calls below
        num_layers = self._model.arch.num_layers
        frame = frame_layers if layers_ready is not None else num_layers
        for low in range(0, num_layers, frame):
            high = min(low + frame, num_layers)
            if self._library.run_layers(self._runner, ctypes.byref(self._step), low, high):
                raise MemoryError(f"no memory for a step of {self._step.num_rows} tokens")
            if layers_ready is not None:
                layers_ready(low, high)
        del arrays
        num_kept, vocab_size = self._step.num_kept, self._model.arch.vocab_size
        if num_kept > len(self._logits):
            self._logits = torch.empty(num_kept, vocab_size)
        if num_kept:
            self._library.logits(self._runner, self._logits.data_ptr())
        return self._logits[:num_kept]

    def _lay_out(self, chunks: Sequence[Chunk]) -> list[np.ndarray]:
        """Fill the step's struct; the arrays that it points into."""
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
        if token_ids.min() < 0 or token_ids.max() >= self._model.arch.vocab_size:
            raise IndexError(f"a token id is outside the vocabulary of {self._model.arch.vocab_size}")
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

        step = self._step
        step.num_rows, step.num_spans, step.num_kept = len(tokens), len(spans), len(kept)
        step.token_ids, step.positions = address(token_ids), address(positions)
        step.cosines, step.sines = address(cosines.numpy()), address(sines.numpy())
        step.row_blocks, step.blocks = address(row_blocks), address(block_numbers)
        step.spans, step.kept, step.kept_spans = address(span_table), address(kept_rows), address(kept_table)
        return arrays

    def _describe(self, model: LlamaModel) -> ModelStruct:
        arch = model.arch
        for number, (layer, window) in enumerate(zip(model.attention.layers, layer_windows(arch), strict=True)):
            parts, struct, ffn = layer.parts, self._layers[number], model.feed_forwards[number]
            assert isinstance(ffn, FeedForward)
            struct.input_norm, struct.ffn_norm = self._norm(parts.input_norm), self._norm(parts.ffn_norm)
            struct.query_norm, struct.key_norm = self._norm(parts.query_norm), self._norm(parts.key_norm)
            struct.qkv, struct.output = _struct(parts.qkv), _struct(parts.output)
            struct.gate_up, struct.down = (_struct(linear) for linear in ffn.linears)
            struct.window = window or 0
        side = model.attention
        return ModelStruct(
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
            _struct(side.head),
            self._layers,
        )

    def _describe_cache(self, cache: KvCache) -> StepStruct:
        layout = cache.layout
        step = StepStruct()
        step.cache_base, step.cache_kind = cache.tensor.data_ptr(), KINDS[cache.tensor.dtype]
        step.cache_num_layers, step.cache_num_kv_heads = layout.num_layers, layout.num_kv_heads
        step.cache_block_size, step.cache_head_dim = layout.block_size, layout.head_dim
        return step

    def _norm(self, norm: RmsNorm | None) -> int | None:
        if norm is None:
            return None
        weight = norm.weight.contiguous()
        self._kept_alive.append(weight)
        return weight.data_ptr()


def _positions(spans: IntArray) -> IntArray:
    """int64 [T]: of each span's rows, one after another."""
    num_rows, starts = spans[:, 1], spans[:, 2]
    if len(spans) == num_rows.sum():
        return starts.copy()
    return np.repeat(starts - spans[:, 0], num_rows) + np.arange(num_rows.sum())


def _struct(linear: Linear) -> LinearStruct:
    assert linear.packed is not None, "_is_native has looked"
    return linear.packed.struct


def _is_native(model: LlamaModel, library: Library) -> bool:
    arch, lanes = model.arch, library.lanes
    if model.deterministic or model.device.type != "cpu" or model.dtype not in KINDS:
        return False
    if any(size % lanes for size in (arch.hidden_size, arch.head_dim, arch.intermediate_size, arch.vocab_size)):
        return False
    feed_forwards = [ffn for ffn in model.feed_forwards if isinstance(ffn, FeedForward) and ffn.is_plain]
    if len(feed_forwards) < len(model.feed_forwards):
        return False
    parts = [layer.parts for layer in model.attention.layers if layer.parts.sinks is None]
    if len(parts) < arch.num_layers:
        return False
    linears = [model.attention.head, *(linear for part in parts for linear in (part.qkv, part.output))]
    linears += [linear for ffn in feed_forwards for linear in ffn.linears]
    splits = [ffn.linears[0].packed.struct.split for ffn in feed_forwards if ffn.linears[0].packed is not None]
    return all(linear.packed is not None for linear in linears) and all(splits)
