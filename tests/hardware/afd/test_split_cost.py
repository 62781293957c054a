"""A worker with its feed-forwards elsewhere as the simulation sees it: steps, contention, what it holds and costs."""

from __future__ import annotations

import pytest

from transload.hardware.afd.pipeline import step_seconds
from transload.hardware.afd.split_cost import SplitCost
from transload.hardware.afd.stages import SplitWorker, Wire
from transload.hardware.catalog import load_chip, load_model
from transload.hardware.cost.shape import StepShape
from transload.hardware.cost.worker import WorkerCost
from transload.hardware.parallel import Parallel
from transload.hardware.precision import with_weights


def worker(latency: float = 2e-6, model: str = "qwen3-235b-a22b") -> SplitWorker:
    card, chip = load_model(model), load_chip("gb200")
    return SplitWorker(
        card,
        chip,
        chip,
        Wire(latency_seconds=latency, attention_bytes_per_second=900e9, ffn_bytes_per_second=900e9),
        precision=with_weights(card.precision, "fp8"),
        ffn_parallel=Parallel(data_attention=4, expert=4) if card.experts else None,
    )


@pytest.mark.parametrize("batch", [1, 2, 3, 17, 64, 200])
def test_a_decode_step_is_the_pipelines_step(batch: int) -> None:
    cost = SplitCost(worker(), attention_workers=12, micro_batches=2)
    for context in (batch, 1000 * batch, 30_000 * batch):
        said = cost.step_seconds(StepShape(num_decode=batch, decode_context_tokens=context))
        assert said == pytest.approx(step_seconds(cost.pipeline(batch, context)), rel=1e-9)


def test_a_step_with_nothing_in_it_takes_no_time() -> None:
    cost = SplitCost(worker())
    assert cost.step_seconds(StepShape()) == 0.0
    assert cost.breakdown(StepShape()) == ()


def test_more_attention_workers_at_one_ffn_worker_slow_each_other_down() -> None:
    shape = StepShape(num_decode=64, decode_context_tokens=64 * 1000)
    alone, crowded = (SplitCost(worker(), attention_workers=count).step_seconds(shape) for count in (1, 64))
    assert crowded > 1.1 * alone
    relieved = SplitCost(worker(), attention_workers=64, ffn_workers=16).step_seconds(shape)
    assert relieved < crowded


def test_a_step_with_a_prompt_takes_longer_than_one_without() -> None:
    cost = SplitCost(worker(), attention_workers=4)
    plain = StepShape(num_decode=16, decode_context_tokens=16_000)
    mixed = StepShape(prefill=((0, 512),), num_decode=16, decode_context_tokens=16_000)
    assert cost.step_seconds(mixed) > cost.step_seconds(plain)
    assert cost.report(mixed).step_seconds == pytest.approx(cost.step_seconds(mixed))


def test_a_breakdown_adds_up_and_counts_what_crosses() -> None:
    cost = SplitCost(worker(), attention_workers=4)
    shape = StepShape(num_decode=16, decode_context_tokens=16_000)
    parts = cost.breakdown(shape)
    assert sum(part.seconds for part in parts) == pytest.approx(cost.step_seconds(shape), rel=0.05)
    assert parts[-1].bytes == 16 * 94 * 3 * 4096


def test_it_holds_more_kv_than_a_whole_worker() -> None:
    cost = SplitCost(worker(model="llama-3.1-70b"))
    whole = WorkerCost(load_chip("gb200"), cost.worker.card, Parallel(), cost.worker.precision)
    assert cost.kv_tokens > 1.2 * whole.kv_tokens


def test_energy_counts_its_share_of_the_ffn_workers() -> None:
    few = SplitCost(worker(), attention_workers=4, ffn_workers=1)
    many = SplitCost(worker(), attention_workers=8, ffn_workers=1)
    assert few.ffn_chips == 1.0
    assert many.ffn_chips == 0.5
    own = few.worker.attention.energy_joules(1.0, 1.0)
    assert few.energy_joules(1.0, 1.0) == pytest.approx(2 * own)
    assert many.energy_joules(1.0, 1.0) == pytest.approx(1.5 * own)


def test_what_it_takes_for_granted_is_said() -> None:
    said = SplitCost(worker()).assumptions
    assert any("same step" in line for line in said)
    assert any("12,288 B in each layer" in line for line in said)
