"""Attention over the paged cache against a plain loop, for layouts that the families' tests do not reach."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from transload.model.attention import ALIGNED_ROWS, AttentionPlan, DecodeGroup, FlashPrompt, Heads, Site, Span
from transload.model.kv_cache import KvCache
from transload.transfer.layout import KvLayout


class World:
    """A cache filled with random keys and values of several requests, its unused slots with huge numbers."""

    def __init__(self, lengths: Sequence[int], heads: Heads, block_size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        num_blocks = sum(-(-length // block_size) for length in lengths) + 5
        layout = KvLayout(
            model="test",
            num_layers=2,
            num_kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
            block_size=block_size,
            dtype="float32",
        )
        self.cache = KvCache(layout, num_blocks)
        self.cache.tensor.fill_(1e30)
        free = random.Random(0).sample(range(num_blocks), k=num_blocks)
        self.tables: list[list[int]] = []
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        for length in lengths:
            table = [free.pop() for _ in range(-(-length // block_size))]
            keys, values = torch.randn(2, length, heads.num_kv_heads, heads.head_dim, generator=generator)
            for position in range(length):
                slot = self.cache.tensor[table[position // block_size], 1, :, :, position % block_size]
                slot[0], slot[1] = keys[position], values[position]
            self.tables.append(table)
            self.keys.append(keys)
            self.values.append(values)
        self.generator = generator


def attended(
    q_HD: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, heads: Heads, sinks_H: torch.Tensor | None = None
) -> torch.Tensor:
    """One query by the definition: softmax(q k / sqrt(d)) v, key head h // group. A sink is a key without a value."""
    out = torch.empty_like(q_HD)
    for head in range(heads.num_query_heads):
        shared = head // heads.group
        scores = keys[:, shared] @ q_HD[head] / math.sqrt(heads.head_dim)
        if sinks_H is not None:
            scores = torch.cat((scores, sinks_H[head : head + 1]))
        weights = scores.softmax(0)[: len(keys)]
        out[head] = weights @ values[:, shared]
    return out


def check(
    lengths: Sequence[int],
    rows: Sequence[int],
    *,
    heads: Heads,
    block_size: int,
    window: int | None,
    deterministic: bool,
    sinks: bool = False,
) -> AttentionPlan:
    """The last `rows[i]` positions of each request as one step; `lengths` sorted as a batch sorts them."""
    world = World(lengths, heads, block_size)
    spans, first_row = [], 0
    for table, length, num_rows in zip(world.tables, lengths, rows, strict=True):
        spans.append(Span(first_row, length - num_rows, num_rows, np.array(table)))
        first_row += num_rows
    q_THD = torch.randn(first_row, heads.num_query_heads, heads.head_dim, generator=world.generator)
    plan = AttentionPlan(spans, Site(heads, world.cache), window, deterministic=deterministic)
    sinks_H = torch.randn(heads.num_query_heads, generator=world.generator) * 3 if sinks else None
    got = plan.attend(q_THD, world.cache.pieces[1], sinks_H).view_as(q_THD)
    for request, span in enumerate(spans):
        for row in range(span.num_rows):
            end = span.start + row + 1
            first = 0 if window is None else max(0, end - window)
            q_HD = q_THD[span.first_row + row]
            want = attended(q_HD, world.keys[request][first:end], world.values[request][first:end], heads, sinks_H)
            torch.testing.assert_close(got[span.first_row + row], want, rtol=1e-5, atol=1e-5)
    return plan


HEADS = [Heads(4, 2, 8), Heads(3, 3, 16), Heads(6, 1, 32), Heads(9, 3, 64)]


@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: f"{heads.num_query_heads}q{heads.num_kv_heads}kv")
@pytest.mark.parametrize("block_size", [1, 4, 16, 48])
@pytest.mark.parametrize("window", [None, 1, 5, 64, 1000])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_step_of_single_tokens_and_prompts(
    heads: Heads, block_size: int, window: int | None, deterministic: bool
) -> None:
    lengths = [200, 97, 96, 95, 17, 16, 1, 150, 33, 20]
    rows = [1, 1, 1, 1, 1, 1, 1, 150, 16, 7]
    check(lengths, rows, heads=heads, block_size=block_size, window=window, deterministic=deterministic)


@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: f"{heads.num_query_heads}q{heads.num_kv_heads}kv")
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("deterministic", [False, True])
def test_sinks_take_part_in_the_softmax(heads: Heads, window: int | None, deterministic: bool) -> None:
    lengths, rows = [200, 97, 17, 16, 1, 150, 20], [1, 1, 1, 1, 1, 150, 7]
    check(lengths, rows, heads=heads, block_size=16, window=window, deterministic=deterministic, sinks=True)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_long_prompt_spans_many_tiles(deterministic: bool) -> None:
    heads = Heads(16, 4, 8)
    check([700], [600], heads=heads, block_size=16, window=None, deterministic=deterministic)
    check([700], [600], heads=heads, block_size=16, window=100, deterministic=deterministic)


@pytest.mark.parametrize("window", [None, 1, 24, 1000])
@pytest.mark.parametrize(("length", "num_rows"), [(70, 70), (87, 50), (2, 2), (133, 33)])
def test_the_form_for_accelerators_agrees_with_the_definition(length: int, num_rows: int, window: int | None) -> None:
    heads = Heads(6, 2, 32)
    world = World([length], heads, 16)
    span = Span(0, length - num_rows, num_rows, np.array(world.tables[0]))
    q_THD = torch.randn(num_rows, 6, 32, generator=world.generator)
    part = FlashPrompt(span, Site(heads, world.cache), window)
    got = part.attend(q_THD, world.cache.pieces[1], None).view_as(q_THD)
    for row in range(num_rows):
        end = span.start + row + 1
        first = 0 if window is None else max(0, end - window)
        want = attended(q_THD[row], world.keys[0][first:end], world.values[0][first:end], heads)
        torch.testing.assert_close(got[row], want, rtol=1e-5, atol=1e-5)


def test_lengths_far_apart_are_not_padded_to_each_other() -> None:
    heads = Heads(2, 1, 8)
    plan = check([900, 890, 30, 20, 10], [1] * 5, heads=heads, block_size=8, window=None, deterministic=False)
    assert [type(part) for part in plan.parts] == [DecodeGroup, DecodeGroup]
    assert [part.rows for part in plan.parts] == [slice(0, 2), slice(2, 5)]


def test_lengths_close_together_are_one_multiplication() -> None:
    heads = Heads(2, 1, 8)
    plan = check([90, 80, 60, 50, 40], [1] * 5, heads=heads, block_size=8, window=None, deterministic=False)
    assert len(plan.parts) == 1


def test_deterministic_tiles_lie_at_absolute_positions() -> None:
    heads = Heads(2, 1, 8)
    plan = check([100], [60], heads=heads, block_size=16, window=None, deterministic=True)
    assert [part.rows for part in plan.parts] == [
        slice(0, 8),
        slice(8, 24),
        slice(24, 40),
        slice(40, 56),
        slice(56, 60),
    ]
    assert ALIGNED_ROWS == 16
