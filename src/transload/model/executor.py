"""`TorchExecutor`: a `RunStep` in, tokens out. The one place where the engine's wishes meet torch.

Owns the model, the cache and the order of one step: rows, layers, logits, tokens. Never decides what runs or who gets
which block, and keeps nothing of a request between steps but the sampler's counts, which it can rebuild.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from time import perf_counter

import torch

from transload.control.messages import RunStep, Sampled, StepDone
from transload.model.batch import Batch, BatchBuilder
from transload.model.kv_cache import KvCache
from transload.model.llama import LlamaModel
from transload.model.native.runner import NativeRunner
from transload.model.rope import RotaryEmbedding
from transload.model.sampler import Sampler
from transload.model.staging import HostStage
from transload.model.step_graphs import StepGraphs
from transload.transfer.layout import KvLayout

DEFAULT_LAYERS_PER_FRAME = 4


class TorchExecutor:
    """Computes steps with a model that is wholly here. Lives on one thread."""

    def __init__(
        self,
        model: LlamaModel,
        layout: KvLayout,
        num_blocks: int,
        *,
        buffer: memoryview | mmap.mmap | bytearray | None = None,
        staged: bool = False,
        threads: int = 1,
        layers_per_frame: int = DEFAULT_LAYERS_PER_FRAME,
    ) -> None:
        """`buffer` is the memory for the cache, zeroed, at least num_blocks * layout.block_bytes long; None: its own.
        `staged`: the cache is on the device all the same, and `buffer` is where KV lies that crosses to other workers.

        `threads` becomes torch's number of threads for this process. `layers_per_frame` is how often a step that
        streams reports layers.
        """
        arch = model.arch
        assert (layout.num_layers, layout.num_kv_heads, layout.head_dim) == (
            arch.num_layers,
            arch.num_kv_heads,
            arch.head_dim,
        ), "the layout is this model's"
        torch.set_num_threads(threads)
        self._model = model
        self._layers_per_frame = layers_per_frame
        self._cache = KvCache(layout, num_blocks, None if staged else buffer, model.device)
        self._stage = HostStage(self._cache, buffer) if staged and buffer is not None else None
        assert self._cache.tensor.dtype == model.dtype, "the cache holds what the model computes"
        self._batches = BatchBuilder(
            arch,
            self._cache,
            RotaryEmbedding(arch, model.dtype, model.device),
            deterministic=model.deterministic,
            device=model.device,
        )
        self._native = NativeRunner.of(model, self._cache, threads)
        self._sampler = Sampler()
        self._graphs = StepGraphs(model) if StepGraphs.suits(model) else None

    @property
    def layout(self) -> KvLayout:
        return self._cache.layout

    @property
    def num_blocks(self) -> int:
        return self._cache.num_blocks

    @property
    def cache(self) -> KvCache:
        """The cache that the steps write; a transport reads it between `layers_ready` and the end of a handoff."""
        return self._cache

    @torch.inference_mode()
    def run_step(self, step: RunStep, layers_ready: Callable[[int, int], None]) -> StepDone:
        """Compute the step; see `runtime.base.Executor`.

        What torch raises (out of memory, an index outside the vocabulary) passes through, as does the sampler's
        `ArithmeticError`; the cache of the step's requests is then undefined, that of others is untouched.
        """
        started = perf_counter()
        if not step.chunks:
            return StepDone(step=step.step, sampled=(), seconds=perf_counter() - started)
        streams = any(chunk.streams for chunk in step.chunks)
        if self._stage is not None:
            self._stage.fetch(step.arrived)
        logits_RV = self._logits(step, self._reporter(step, layers_ready) if streams else None)
        sampled: tuple[Sampled, ...] = ()
        if len(logits_RV):
            sampled = self._sampler.sample(logits_RV, [chunk for chunk in step.chunks if chunk.samples])
        else:
            self._wait_for_device()
        return StepDone(step=step.step, sampled=sampled, seconds=perf_counter() - started)

    def _logits(self, step: RunStep, layers_ready: Callable[[int, int], None] | None) -> torch.Tensor:
        """[R, V] after the chunks that sample, in their order."""
        if self._native is not None:
            return self._native.run(step.chunks, self._layers_per_frame, layers_ready)
        batch = self._batches.build(step.chunks, step=step.step)
        if self._graphs is not None and self._graphs.takes(step.chunks):
            return self._graphs.logits(batch)
        residual_RE = self._run_layers(batch, layers_ready)
        return self._model.attention.logits(residual_RE) if len(residual_RE) else residual_RE

    def _run_layers(self, batch: Batch, layers_ready: Callable[[int, int], None] | None) -> torch.Tensor:
        """Answer each feed-forward call on the spot; the residual [R, E] of the rows that draw a token."""
        calls = self._model.attention.run(batch)
        feed_forwards = self._model.feed_forwards
        reported = 0
        try:
            call = next(calls)
            while True:
                if layers_ready is not None and call.layer + 1 - reported >= self._layers_per_frame:
                    self._wait_for_device()
                    layers_ready(reported, call.layer + 1)
                    reported = call.layer + 1
                call = calls.send(feed_forwards[call.layer](call.hidden, call.routing))
        except StopIteration as finished:
            residual_RE: torch.Tensor = finished.value
        if layers_ready is not None and reported < len(feed_forwards):
            self._wait_for_device()
            layers_ready(reported, len(feed_forwards))
        return residual_RE

    def _reporter(self, step: RunStep, layers_ready: Callable[[int, int], None]) -> Callable[[int, int], None]:
        """Reports layers once the links can read them."""
        stage = self._stage
        if stage is None:
            return layers_ready

        def put_and_report(layer_lo: int, layer_hi: int) -> None:
            stage.put(step.chunks, layer_lo, layer_hi)
            layers_ready(layer_lo, layer_hi)

        return put_and_report

    def _wait_for_device(self) -> None:
        """Until all queued work is done: a transport may then read the cache, and time is measured honestly."""
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
