"""Decode steps on a GPU as CUDA graphs: recorded once for a shape, replayed in one launch.

A step of a small batch is a thousand small kernels, and launching them takes longer than running them. Owns which
shapes are recorded and the tensors a recording reads; computes nothing of its own. Prompts, feed-forwards that are
computed elsewhere and deterministic mode never come here.

A recording reads the tensors of the batch it was made with: a later batch of the same shape is copied into them. Those
of the cache and the weights are where they always are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch

from transload.control.messages import Chunk
from transload.model.attention import DecodeGroup
from transload.model.batch import Batch
from transload.model.llama import FeedForward, LlamaModel

MOST_GRAPHS = 256
"""Recordings kept, least recently used first out. They share one pool of memory for intermediate results."""
REMEMBERED_SHAPES = 1024
RECORDED_KEYS = (128, 256, 384, 512, 768, 1024, 1536, 2048)
"""Lengths of context that are recorded before the first caller comes, for every size of batch."""

Shape = tuple[tuple[int, ...], ...]


def batch_size(num_rows: int) -> int:
    """The smallest size of a recorded batch that holds so many rows: a power of two, or one and a half of it."""
    power = 1 << (num_rows - 1).bit_length()
    return power * 3 // 4 if power >= 8 and num_rows <= power * 3 // 4 else power


def batch_sizes(most_rows: int) -> list[int]:
    """All of them up to the one that holds `most_rows`."""
    return sorted({batch_size(num_rows) for num_rows in range(1, most_rows + 1)})


class Recording:
    """One graph, the batch whose tensors it reads, and the logits it leaves."""

    __slots__ = ("batch", "graph", "logits_RV")

    def __init__(self, batch: Batch, graph: torch.cuda.CUDAGraph, logits_RV: torch.Tensor) -> None:
        self.batch = batch
        self.graph = graph
        self.logits_RV = logits_RV


class StepGraphs:
    """Runs whole decode steps of one model, recording a shape when it comes a second time."""

    def __init__(self, model: LlamaModel) -> None:
        self._model = model
        self._recordings: OrderedDict[Shape, Recording] = OrderedDict()
        self._seen: OrderedDict[Shape, None] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()

    @staticmethod
    def suits(model: LlamaModel) -> bool:
        """Whether all of a step's shapes follow from the batch: not where rows are dealt out to experts."""
        dense = all(type(layer) is FeedForward for layer in model.feed_forwards)
        return model.device.type == "cuda" and not model.deterministic and dense

    @staticmethod
    def padded(chunks: tuple[Chunk, ...]) -> tuple[Chunk, ...]:
        """The chunks, and the last of them again until the batch has one of a few sizes: it writes the same keys to the
        same places once more, and the logits after it are left unread."""
        return (*chunks, *(chunks[-1:] * (batch_size(len(chunks)) - len(chunks))))

    def takes(self, chunks: Sequence[Chunk]) -> bool:
        """Whether every chunk is one token that draws the next and goes nowhere else."""
        return all(chunk.num_tokens == 1 and chunk.samples and not chunk.streams for chunk in chunks)

    def logits(self, batch: Batch) -> torch.Tensor:
        """[R, V], in the order of the chunks. Valid until the next step."""
        tensors = batch.inputs()
        shape = tuple(tuple(tensor.shape) for tensor in tensors)
        found = self._recordings.get(shape)
        if found is not None:
            self._recordings.move_to_end(shape)
            for target, source in zip(found.batch.inputs(), tensors, strict=True):
                target.copy_(source, non_blocking=True)
            found.graph.replay()
            return found.logits_RV
        if shape in self._seen and all(isinstance(part, DecodeGroup) for plan in batch.plans for part in plan.parts):
            return self._record(shape, batch)
        self._seen[shape] = None
        if len(self._seen) > REMEMBERED_SHAPES:
            self._seen.popitem(last=False)
        return self._compute(batch)

    def _record(self, shape: Shape, batch: Batch) -> torch.Tensor:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits_RV = self._compute(batch)
        self._recordings[shape] = Recording(batch, graph, logits_RV)
        if len(self._recordings) > MOST_GRAPHS:
            self._recordings.popitem(last=False)
        graph.replay()  # recording computes nothing
        return logits_RV

    def _compute(self, batch: Batch) -> torch.Tensor:
        calls = self._model.attention.run(batch)
        try:
            call = next(calls)
            while True:
                call = calls.send(self._model.feed_forwards[call.layer](call.hidden))
        except StopIteration as finished:
            residual_RE: torch.Tensor = finished.value
        return self._model.attention.logits(residual_RE)
