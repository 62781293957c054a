"""From the chunks of a step to tensors: which rows the model computes, at which positions, over which keys.

Owns the order of rows: single tokens first, longest context first, so that attention batches neighbours; then runs of
several tokens. Computes nothing of the model, and reads a chunk's lists without keeping them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from transload.arch import ModelArch
from transload.control.messages import Chunk
from transload.model.attention import AttentionPlan, Heads, Site, Span
from transload.model.kv_cache import IntArray, KvCache
from transload.model.rope import RotaryEmbedding, Rotation


class Batch:
    """One micro-batch of a step: T rows through all layers, and the R rows after which a token is drawn.

    Only those R rows need the last layer's output: the others are there for their keys and values. So the last layer
    has a plan of its own, for the rows `kept`.
    """

    __slots__ = (
        "cache",
        "drawn",
        "kept",
        "key_rows",
        "micro_batch",
        "plans",
        "rotation",
        "step",
        "token_ids",
        "value_rows",
    )

    def __init__(
        self,
        *,
        step: int,
        micro_batch: int,
        token_ids: torch.Tensor,
        rotation: Rotation,
        cache: KvCache,
        key_rows: torch.Tensor,
        value_rows: torch.Tensor,
        plans: tuple[AttentionPlan, ...],
        kept: torch.Tensor,
        drawn: torch.Tensor,
    ) -> None:
        self.step = step
        self.micro_batch = micro_batch
        self.token_ids = token_ids  # int64 [T]
        self.rotation = rotation
        self.cache = cache
        self.key_rows = key_rows  # int64 [T * kv_heads]: where in the cache this step's keys go, in any layer
        self.value_rows = value_rows
        self.plans = plans  # one per layer; layers with the same window share one
        self.kept = kept  # int64 [R]: rows of T
        self.drawn = drawn  # int64 [R]: places in `kept`, in the order of the chunks that sample

    def inputs(self) -> list[torch.Tensor]:
        """Every tensor that differs from one batch of these shapes to the next."""
        plans = list(dict.fromkeys(self.plans))
        of_plans = [tensor for plan in plans for part in plan.parts for tensor in part.inputs()]
        rows = [self.token_ids, self.key_rows, self.value_rows, self.drawn]
        return [*rows, *self.rotation.inputs(), *of_plans]


class BatchBuilder:
    """Builds batches for one model over one cache."""

    def __init__(
        self, arch: ModelArch, cache: KvCache, rotary: RotaryEmbedding, *, deterministic: bool, device: torch.device
    ) -> None:
        self._cache = cache
        self._rotary = rotary
        self._deterministic = deterministic
        self._device = device
        self._site = Site(Heads(arch.num_heads, arch.num_kv_heads, arch.head_dim), cache, sinks=arch.sinks)
        self._windows = layer_windows(arch)

    def build(self, chunks: Sequence[Chunk], *, step: int, micro_batch: int = 0) -> Batch:
        """Lay the chunks out as rows and open their new blocks in the cache. At least one chunk."""
        order = sorted(range(len(chunks)), key=lambda place: (chunks[place].num_tokens > 1, -chunks[place].start))
        spans: list[Span] = []
        tokens: list[int] = []
        for place in order:
            chunk = chunks[place]
            end = chunk.start + chunk.num_tokens
            blocks = chunk.blocks[: (end - 1) // self._cache.layout.block_size + 1]
            spans.append(Span(len(tokens), chunk.start, chunk.num_tokens, np.array(blocks, dtype=np.int64)))
            tokens += chunk.tokens[chunk.start : end]
            self._clear_block_end(spans[-1])
        assert len(tokens) == sum(chunk.num_tokens for chunk in chunks), "a chunk's tokens are all known"
        kept, drawn, last_spans = _drawn_rows(chunks, order, spans)
        key_rows, value_rows = self._cache_rows(spans)
        return Batch(
            step=step,
            micro_batch=micro_batch,
            token_ids=self._to_device(tokens),
            rotation=self._rotation(spans, [chunks[place].request.num_prompt_tokens for place in order]),
            cache=self._cache,
            key_rows=torch.from_numpy(key_rows).to(self._device),
            value_rows=torch.from_numpy(value_rows).to(self._device),
            plans=self._plans(spans, last_spans),
            kept=self._to_device(kept),
            drawn=self._to_device(drawn),
        )

    def _to_device(self, numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64).to(self._device)

    def _clear_block_end(self, span: Span) -> None:
        """Zero what the last block held before, if this span is the first to write into it: see `kv_cache`."""
        size = self._cache.layout.block_size
        used = span.end % size
        if used and span.end - used >= span.start:
            self._cache.clear_from(int(span.blocks[-1]), used)

    def _cache_rows(self, spans: Sequence[Span]) -> tuple[IntArray, IntArray]:
        size = self._cache.layout.block_size
        positions = _positions(spans)
        blocks = np.concatenate([span.blocks[np.arange(span.start, span.end) // size] for span in spans])
        return self._cache.row_numbers(blocks, positions % size)

    def _rotation(self, spans: Sequence[Span], num_prompt_tokens: Sequence[int]) -> Rotation:
        per_row = np.repeat(np.array(num_prompt_tokens, dtype=np.int64), [span.num_rows for span in spans])
        return self._rotary.at(torch.from_numpy(_positions(spans)), torch.from_numpy(per_row))

    def _plans(self, spans: Sequence[Span], last_spans: Sequence[Span]) -> tuple[AttentionPlan, ...]:
        by_window = {window: self._plan(spans, window) for window in dict.fromkeys(self._windows[:-1])}
        last_window = self._windows[-1]
        all_drawn = len(last_spans) == spans[-1].first_row + spans[-1].num_rows  # then the rows are the same ones
        last = by_window.get(last_window) if all_drawn else None
        plans = (by_window[window] for window in self._windows[:-1])
        return (*plans, last or self._plan(last_spans, last_window))

    def _plan(self, spans: Sequence[Span], window: int | None) -> AttentionPlan:
        return AttentionPlan(spans, self._site, window, deterministic=self._deterministic)


def _drawn_rows(
    chunks: Sequence[Chunk], order: Sequence[int], spans: Sequence[Span]
) -> tuple[list[int], list[int], list[Span]]:
    """Rows that the last layer keeps, longest context first; their places by chunk; and they as spans of one row."""
    sampling = [(place, span) for place, span in zip(order, spans, strict=True) if chunks[place].samples]
    sampling.sort(key=lambda entry: -entry[1].end)
    kept = [span.first_row + span.num_rows - 1 for _, span in sampling]
    places = [place for place, _ in sampling]
    drawn = sorted(range(len(places)), key=places.__getitem__)
    return kept, drawn, [Span(row, span.end - 1, 1, span.blocks) for row, (_, span) in enumerate(sampling)]


def layer_windows(arch: ModelArch) -> tuple[int | None, ...]:
    """How many positions, its own included, a query of each layer sees; None: all before it."""
    if arch.sliding_window is None:
        return (None,) * arch.num_layers
    slides = arch.sliding_layers if arch.sliding_layers is not None else (True,) * arch.num_layers
    return tuple(arch.sliding_window if slide else None for slide in slides)


def _positions(spans: Sequence[Span]) -> IntArray:
    return np.concatenate([np.arange(span.start, span.end, dtype=np.int64) for span in spans])
