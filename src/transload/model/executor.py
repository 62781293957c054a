"""`TorchExecutor`: a `RunStep` in, tokens out. The one place where the engine's wishes meet torch.

Owns the model, the cache and the order of one step: rows, layers, logits, tokens. Never decides what runs or who gets
which block, and keeps nothing of a request between steps but the sampler's counts, which it can rebuild.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from time import perf_counter

import torch

from transload.control.messages import Chunk, Request, RunStep, Sampled, StepDone
from transload.model.batch import BatchBuilder
from transload.model.kv_cache import KvCache
from transload.model.layer_driver import LayerDriver, LayerReports, LocalDriver, cut
from transload.model.llama import LayerCalls, LlamaModel
from transload.model.native.attention import NativeAttention
from transload.model.native.runner import NativeRunner
from transload.model.rope import RotaryEmbedding
from transload.model.sampler import Sampler
from transload.model.staging import HostStage
from transload.model.step_graphs import RECORDED_KEYS, StepGraphs, batch_sizes
from transload.transfer.layout import KvLayout

DEFAULT_LAYERS_PER_FRAME = 4


class TorchExecutor:
    """Computes steps with a model, or with its attention side and a driver that asks others. Lives on one thread."""

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
        driver: LayerDriver | None = None,
    ) -> None:
        """`buffer` is the memory for the cache, zeroed, at least num_blocks * layout.block_bytes long; None: its own.
        `staged`: the cache is on the device all the same, and `buffer` is where KV lies that crosses to other workers.

        `threads` becomes torch's number of threads for this process. `layers_per_frame` is how often a step that
        streams reports layers. `driver` answers the feed-forwards; None: the model's own are computed here.
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
        self._threads = threads
        self._sampler = Sampler()
        self._driver: LayerDriver = driver or LocalDriver(model.feed_forwards)
        self._native: NativeRunner | None = None
        self._attention: NativeAttention | None = None
        self._graphs: StepGraphs | None = None
        self._find_short_cuts()

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

    @property
    def driver(self) -> LayerDriver:
        """Who answers the feed-forwards."""
        return self._driver

    def use_driver(self, driver: LayerDriver) -> None:
        """Let another answer the feed-forwards from the next step on. On the step thread, between steps."""
        self._driver = driver
        self._model.feed_forwards = driver.feed_forwards if isinstance(driver, LocalDriver) else ()
        self._find_short_cuts()

    @torch.inference_mode()
    def record_steps(self, request: Request, max_batch: int) -> None:
        """Where decode steps are recorded, do so now for the usual shapes, with a request whose KV lies in the first
        blocks of an empty cache."""
        if self._graphs is None:
            return
        size = self.layout.block_size
        for num_keys in RECORDED_KEYS:
            if num_keys > self.num_blocks * size:
                break
            tokens, blocks = [0] * num_keys, range(-(-num_keys // size))
            chunk = Chunk(request, num_keys - 1, 1, tokens, blocks, samples=True, num_outputs=1)
            for num_rows in batch_sizes(max_batch):
                for _ in range(2):  # seen, then recorded
                    self._graphs.logits(self._batches.build((chunk,) * num_rows, step=0))

    def _find_short_cuts(self) -> None:
        """Ways to compute steps faster than through torch, layer by layer: all of them at once if the whole model is
        here, else its attention side."""
        is_whole = (
            isinstance(self._driver, LocalDriver) and len(self._model.feed_forwards) == self._model.arch.num_layers
        )
        self._native = NativeRunner.of(self._model, self._cache, self._threads) if is_whole else None
        self._attention = (
            NativeAttention.of(self._model, self._cache, self._threads, self._driver.num_micro_batches)
            if self._native is None
            else None
        )
        self._graphs = StepGraphs(self._model) if is_whole and StepGraphs.suits(self._model) else None

    @torch.inference_mode()
    def run_step(self, step: RunStep, layers_ready: Callable[[int, int], None]) -> StepDone:
        """Compute the step; see `runtime.base.Executor`.

        What torch raises (out of memory, an index outside the vocabulary) passes through, as does the sampler's
        `ArithmeticError`; the cache of the step's requests is then undefined, that of others is untouched.
        """
        started = perf_counter()
        if not step.chunks:
            return StepDone(step=step.step, sampled=(), seconds=perf_counter() - started)
        if self._stage is not None:
            self._stage.fetch(step.arrived)
        parts = cut(step.chunks, self._driver.num_micro_batches)
        logits_RV = self._logits(step, parts, layers_ready)
        sampled: tuple[Sampled, ...] = ()
        if len(logits_RV):
            sampled = self._sampler.sample(logits_RV, [chunk for part in parts for chunk in part if chunk.samples])
        else:
            self._wait_for_device()
        return StepDone(step=step.step, sampled=sampled, seconds=perf_counter() - started)

    def _logits(
        self, step: RunStep, parts: Sequence[Sequence[Chunk]], layers_ready: Callable[[int, int], None]
    ) -> torch.Tensor:
        """[R, V] after the chunks that sample, in the order of the parts. `layers_ready` hears of layers if any chunk
        streams."""
        streams = any(chunk.streams for chunk in step.chunks)
        report = self._reporter(step, layers_ready) if streams else None
        if self._native is not None:
            return self._native.run(step.chunks, self._layers_per_frame, report)
        if self._graphs is not None and self._graphs.takes(step.chunks):
            batch = self._batches.build(self._graphs.padded(step.chunks), step=step.step)
            return self._graphs.logits(batch)[: len(step.chunks)]
        if self._attention is not None:
            native = self._attention
            laid_out = [native.lay_out(part, step=step.step, micro_batch=n) for n, part in enumerate(parts)]
            calls = [native.run(one) for one in laid_out]
        else:
            batches = [self._batches.build(part, step=step.step, micro_batch=n) for n, part in enumerate(parts)]
            calls = [self._model.attention.run(batch) for batch in batches]
        residuals = self._run_layers(step.step, calls, report)
        residual_RE = torch.cat(residuals) if len(residuals) > 1 else residuals[0]
        if self._attention is not None:
            return self._attention.logits(residual_RE)
        return self._model.attention.logits(residual_RE) if len(residual_RE) else residual_RE

    def _run_layers(
        self, step: int, batches: Sequence[LayerCalls], report: Callable[[int, int], None] | None
    ) -> list[torch.Tensor]:
        """The residuals [R, E] of the rows that draw a token, by micro-batch."""
        if report is None:
            return self._driver.run(step, batches, _nobody_waits)

        def layers_written(layer_lo: int, layer_hi: int) -> None:
            self._wait_for_device()
            report(layer_lo, layer_hi)

        reports = LayerReports(self._model.attention.num_layers, len(batches), self._layers_per_frame, layers_written)
        residuals = self._driver.run(step, batches, reports.written)
        reports.end()
        return residuals

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


def _nobody_waits(_place: int, _layer: int) -> None:
    """No chunk of the step streams."""
