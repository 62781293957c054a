"""Who answers the feed-forward calls of a step: this worker, on the spot. Also how a step is cut into micro-batches,
and how written layers are reported.

A driver takes micro-batches through all layers. It never decides which requests run and never touches a cache. The
driver that asks other workers is in `remote_driver.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from transload.control.messages import Chunk
from transload.model.llama import FeedForwardLayer, FfnCall, LayerCalls

_FIXED_COST = 1024
"""What a row costs beside its attention, in cached tokens that attention reads: only balance depends on it."""


class LayerDriver(Protocol):
    """One step at a time, on the step thread."""

    @property
    def num_micro_batches(self) -> int:
        """Into how many parts a step is best cut."""
        ...

    def run(self, step: int, batches: Sequence[LayerCalls], written: Callable[[int, int], None]) -> list[torch.Tensor]:
        """Each micro-batch's residual [R, E] of the rows that draw a token, from the calls that it makes.
        `written(place of the batch, layer)` is called when the keys and values of a layer are in the cache."""
        ...


class LocalDriver:
    """Holds the feed-forwards, one a layer, and computes each call when it is made."""

    num_micro_batches = 1

    def __init__(self, feed_forwards: Sequence[FeedForwardLayer]) -> None:
        self.feed_forwards = feed_forwards

    def run(self, _step: int, batches: Sequence[LayerCalls], written: Callable[[int, int], None]) -> list[torch.Tensor]:
        return [self._run_one(calls, place, written) for place, calls in enumerate(batches)]

    def answer(self, call: FfnCall) -> torch.Tensor:
        return self.feed_forwards[call.layer](call.hidden, call.routing)

    def _run_one(self, calls: LayerCalls, place: int, written: Callable[[int, int], None]) -> torch.Tensor:
        try:
            call = next(calls)
            while True:
                written(place, call.layer)
                call = calls.send(self.answer(call))
        except StopIteration as finished:
            residual_RE: torch.Tensor = finished.value
            return residual_RE


class LayerReports:
    """Reports layers to the links, some at a time, once every micro-batch has written them."""

    def __init__(
        self,
        num_layers: int,
        num_batches: int,
        layers_per_frame: int,
        layers_ready: Callable[[int, int], None],
    ) -> None:
        self._num_layers = num_layers
        self._layers_per_frame = layers_per_frame
        self._layers_ready = layers_ready
        self._written = [0] * num_batches
        self._reported = 0

    def written(self, place: int, layer: int) -> None:
        """A micro-batch has written a layer; it writes them in order."""
        self._written[place] = layer + 1
        low = min(self._written)
        if low - self._reported >= self._layers_per_frame:
            self._report(low)

    def end(self) -> None:
        """All layers are written, the last one included though it may have had no call."""
        if self._reported < self._num_layers:
            self._report(self._num_layers)

    def _report(self, layer_hi: int) -> None:
        self._layers_ready(self._reported, layer_hi)
        self._reported = layer_hi


def cut(chunks: Sequence[Chunk], num_parts: int) -> list[Sequence[Chunk]]:
    """Parts of about equal work, none of them empty, each in the order given: fewer if there are fewer chunks."""
    num_parts = min(num_parts, len(chunks))
    if num_parts <= 1:
        return [chunks]
    work = [chunk.num_tokens * (_FIXED_COST + chunk.start + chunk.num_tokens) for chunk in chunks]
    loads = [0] * num_parts
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    for place in sorted(range(len(chunks)), key=lambda place: -work[place]):
        lightest = loads.index(min(loads))
        parts[lightest].append(place)
        loads[lightest] += work[place]
    return [[chunks[place] for place in sorted(part)] for part in parts]
