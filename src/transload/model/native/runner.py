"""A step of a whole model through the kernels: from chunks to logits in a few calls.

Owns the structs that describe a model and a step to the kernels. `NativeRunner.of` says whether a model can go this
way; what cannot (a mixture of experts, deterministic mode, another device) goes through torch. Never decides what runs.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence

import torch

from transload.control.messages import Chunk
from transload.model.kv_cache import KvCache
from transload.model.llama import FeedForward, LlamaModel
from transload.model.native.library import Library, load
from transload.model.native.step import AttentionStructs, StepTables, attention_is_native, linear_struct, open_threads

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
        self._tables = StepTables(model, cache)
        self._step = self._tables.new_step()
        self._structs = AttentionStructs(model)
        for struct, ffn in zip(self._structs.layers, model.feed_forwards, strict=True):
            assert isinstance(ffn, FeedForward)
            struct.gate_up, struct.down = (linear_struct(linear) for linear in ffn.linears)
        self._logits = torch.empty(0)
        self._runner = open_threads(library, self._structs.model, threads)
        weakref.finalize(self, library.close, self._runner)

    def run(self, chunks: Sequence[Chunk], frame_layers: int, layers_ready: LayersReady | None) -> torch.Tensor:
        """Logits float32 [R, V] after the chunks that sample, in their order; they stay as they are until the next
        call. Every `frame_layers` layers `layers_ready` learns that they are in the cache.

        Raises `IndexError` for a token outside the vocabulary and `MemoryError`.
        """
        arrays = self._tables.lay_out(chunks, self._step)  # their memory must outlive the calls below
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


def _is_native(model: LlamaModel, library: Library) -> bool:
    if not attention_is_native(model, library) or model.arch.intermediate_size % library.lanes:
        return False
    feed_forwards = [ffn for ffn in model.feed_forwards if isinstance(ffn, FeedForward) and ffn.is_native]
    return len(feed_forwards) == len(model.feed_forwards)
