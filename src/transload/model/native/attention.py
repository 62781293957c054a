"""The attention side of a model through the kernels: one call a layer, up to where the feed-forward is asked for.

The same generator as `AttentionSide.run`, so whoever answers the calls need not know which of the two made them. Owns a
runner for each micro-batch. Never computes a feed-forward; a mixture's router, which is on this side, is torch's.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence

import numpy as np
import torch

from transload.control.messages import Chunk
from transload.model.kv_cache import KvCache
from transload.model.llama import FfnCall, LayerCalls, LlamaModel
from transload.model.native.library import Library, load
from transload.model.native.packed import KINDS
from transload.model.native.step import AttentionStructs, StepTables, attention_is_native, open_threads


class _Lane:
    """What one micro-batch needs for itself."""

    __slots__ = ("normed", "runner", "step")

    def __init__(self, runner: int, tables: StepTables, hidden_size: int, dtype: torch.dtype) -> None:
        self.runner = runner
        self.step = tables.new_step()
        self.normed = torch.empty(0, hidden_size, dtype=dtype)


class NativeBatch:
    """A micro-batch that is laid out."""

    __slots__ = ("arrays", "micro_batch", "step")

    def __init__(self, step: int, micro_batch: int, arrays: list[np.ndarray]) -> None:
        self.step = step
        self.micro_batch = micro_batch
        self.arrays = arrays


class NativeAttention:
    """One model's attention side over one cache, for one thread; one step at a time."""

    @classmethod
    def of(cls, model: LlamaModel, cache: KvCache, threads: int, num_micro_batches: int) -> NativeAttention | None:
        """None if the kernels cannot compute this model as it is built."""
        library = load()
        if library is None or not attention_is_native(model, library):
            return None
        return cls(library, model, cache, threads, num_micro_batches)

    def __init__(
        self, library: Library, model: LlamaModel, cache: KvCache, threads: int, num_micro_batches: int
    ) -> None:
        self._library = library
        self._model = model
        self._tables = StepTables(model, cache)
        self._structs = AttentionStructs(model)
        first = open_threads(library, self._structs.model, threads)
        others = [library.open_lane(first) for _ in range(num_micro_batches - 1)]
        weakref.finalize(self, _close, library, first, others)
        if not all(others):
            raise MemoryError("no memory for the kernels' micro-batches")
        self._lanes = [_Lane(runner, self._tables, model.arch.hidden_size, model.dtype) for runner in (first, *others)]
        self._logits = torch.empty(0)

    def lay_out(self, chunks: Sequence[Chunk], *, step: int, micro_batch: int) -> NativeBatch:
        """A micro-batch of a step. Raises `IndexError` for a token outside the vocabulary."""
        lane = self._lanes[micro_batch]
        arrays = self._tables.lay_out(chunks, lane.step)
        if lane.step.num_rows > len(lane.normed):
            lane.normed = lane.normed.new_empty(max(64, lane.step.num_rows), lane.normed.shape[1])
        return NativeBatch(step, micro_batch, arrays)

    def run(self, batch: NativeBatch) -> LayerCalls:
        """See `AttentionSide.run`. A call's rows stay until its result has been sent. Raises `MemoryError`."""
        lane, attend = self._lanes[batch.micro_batch], self._library.attend
        step, normed = ctypes.addressof(lane.step), lane.normed.data_ptr()
        ffn_TE: torch.Tensor | None = None
        hidden_TE = lane.normed
        for number, layer in enumerate(self._model.attention.layers):
            address, kind = (None, 0) if ffn_TE is None else (ffn_TE.data_ptr(), KINDS[ffn_TE.dtype])
            num_rows = attend(lane.runner, step, number, address, kind, normed)
            if num_rows <= 0:
                if num_rows < 0:
                    raise MemoryError(f"no memory for a micro-batch of {lane.step.num_rows} tokens")
                return torch.empty(0, hidden_TE.shape[1])
            if num_rows != len(hidden_TE):
                hidden_TE = lane.normed[:num_rows]
            given_TE = yield FfnCall(batch.step, number, batch.micro_batch, hidden_TE, layer.route(hidden_TE))
            ffn_TE = given_TE if given_TE.is_contiguous() else given_TE.contiguous()
        assert ffn_TE is not None, "a model has layers"
        self._library.take_ffn(lane.runner, ffn_TE.data_ptr(), KINDS[ffn_TE.dtype])
        residual_RE = torch.empty(len(hidden_TE), hidden_TE.shape[1])
        self._library.residual(lane.runner, residual_RE.data_ptr())
        return residual_RE

    def logits(self, residual_RE: torch.Tensor) -> torch.Tensor:
        """float32 [R, V] of rows [R, E], float32, that `run` returned; they stay until the next call."""
        num_rows = len(residual_RE)
        if num_rows > len(self._logits):
            self._logits = torch.empty(num_rows, self._model.arch.vocab_size)
        if num_rows and self._library.head(
            self._lanes[0].runner, residual_RE.data_ptr(), num_rows, self._logits.data_ptr()
        ):
            raise MemoryError(f"no memory for the logits of {num_rows} tokens")
        return self._logits[:num_rows]


def _close(library: Library, first: int, others: Sequence[int | None]) -> None:
    for runner in others:
        if runner:
            library.close_lane(runner)
    library.close(first)
