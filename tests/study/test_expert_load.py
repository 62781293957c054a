"""A split over experts that are not chosen evenly, in virtual time, with copies of hot experts and without."""

from __future__ import annotations

from functools import cache

import msgspec
import pytest

from transload.hardware.afd.pipeline import step_seconds
from transload.hardware.afd.stages import SplitWorker, Wire
from transload.hardware.catalog import load_chip, load_model
from transload.hardware.precision import with_weights
from transload.study.expert_load import SkewedStep, skewed_step, zipf_loads

FFN_WORKERS, CALLERS, ROWS, LAYERS = 8, 64, 128, 6


@cache
def worker() -> SplitWorker:
    card, chip = load_model("qwen3-235b-a22b"), load_chip("gb200")
    wire = Wire(latency_seconds=3e-6, attention_bytes_per_second=900e9, ffn_bytes_per_second=900e9)
    return SplitWorker(
        card, chip, chip, wire, precision=with_weights(card.precision, "fp8"), split="expert", parts=FFN_WORKERS
    )


@cache
def step(exponent: float, *, knows_loads: bool = True, num_replicas: int = 0) -> SkewedStep:
    return skewed_step(
        worker(),
        ROWS,
        ROWS * 2048,
        attention_workers=CALLERS,
        ffn_workers=FFN_WORKERS,
        loads=zipf_loads(128, exponent),
        knows_loads=knows_loads,
        num_replicas=num_replicas,
        num_layers=LAYERS,
    )


def test_evenly_chosen_experts_give_the_step_of_the_closed_form() -> None:
    pipeline = worker().pipeline(ROWS, ROWS * 2048, attention_workers=CALLERS, ffn_workers=FFN_WORKERS, micro_batches=2)
    layer = msgspec.structs.replace(pipeline.layers[0], count=LAYERS)
    pipeline = msgspec.structs.replace(pipeline, layers=(layer,))
    assert step(0.0).seconds == pytest.approx(step_seconds(pipeline), rel=0.1)
    assert step(0.0).busiest < 1.02
    assert step(0.0).experts_held == 16


def test_hot_experts_make_their_workers_the_ones_that_all_wait_for() -> None:
    blind = step(1.0, knows_loads=False)
    assert blind.busiest > 1.3
    assert blind.seconds > 1.15 * step(0.0).seconds


def test_placing_them_by_how_hot_they_are_takes_most_of_that_back() -> None:
    blind, placed = step(1.5, knows_loads=False), step(1.5)
    assert placed.busiest - 1.0 < (blind.busiest - 1.0) / 2
    assert placed.seconds < 0.9 * blind.seconds


def test_copies_of_hot_experts_share_their_rows_at_the_cost_of_memory() -> None:
    placed, copied = step(1.5), step(1.5, num_replicas=32)
    assert copied.busiest < 1.1
    assert copied.seconds < 1.05 * placed.seconds
    assert (placed.experts_held, copied.experts_held) == (16, 20)


def test_an_expert_split_needs_room_for_its_part_only() -> None:
    """Eight chips hold the feed-forwards that one could not."""
    assert worker().ffn_memory.weight_bytes < worker().ffn_memory.usable_bytes / 4
