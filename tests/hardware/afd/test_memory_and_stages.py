"""What each side of a split holds and takes: weights once and in one place, refusals by name, stage times from the
cost model's own numbers."""

from __future__ import annotations

import msgspec
import pytest

from transload.errors import DeploymentError
from transload.hardware.afd.memory import (
    attention_memory,
    fewest_ffn_chips,
    ffn_chip_bytes,
    ffn_memory,
    side_weight_bytes,
)
from transload.hardware.afd.pipeline import report, step_seconds
from transload.hardware.afd.stages import SplitWorker, Wire, wire_of
from transload.hardware.catalog import load_chip, load_link, load_model, model_names
from transload.hardware.model_facts import weight_bytes
from transload.hardware.parallel import Parallel, share_of_chip
from transload.hardware.precision import with_weights

FAST = Wire(latency_seconds=2e-6, attention_bytes_per_second=900e9, ffn_bytes_per_second=900e9)


def split(model: str, attention: str = "gb200", ffn: str | None = None, **kwargs: object) -> SplitWorker:
    card = load_model(model)
    return SplitWorker(
        card,
        load_chip(attention),
        load_chip(ffn or attention),
        FAST,
        precision=with_weights(card.precision, "fp8"),
        **kwargs,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("name", model_names())
def test_the_two_sides_hold_all_weights_between_them(name: str) -> None:
    card = load_model(name)
    sides = side_weight_bytes(card, "attention", card.precision) + side_weight_bytes(card, "ffn", card.precision)
    assert sides == pytest.approx(weight_bytes(card), abs=2)


@pytest.mark.parametrize("parallel", [Parallel(), Parallel(tensor=4), Parallel(data_attention=8, expert=8)])
def test_an_attention_chip_holds_what_the_experts_leave(parallel: Parallel) -> None:
    card, chip = load_model("qwen3-235b-a22b"), load_chip("gb200")
    precision = with_weights(card.precision, "nvfp4")
    whole = share_of_chip(card, parallel, precision).weight_bytes
    held = attention_memory(chip, card, parallel, precision).weight_bytes
    assert held + ffn_chip_bytes(card, parallel, precision) == whole
    assert held < whole / 3


def test_an_ffn_side_that_does_not_fit_is_refused_with_the_chips_it_needs() -> None:
    card, chip = load_model("qwen3-235b-a22b"), load_chip("lp30")
    precision = with_weights(card.precision, "fp8")
    with pytest.raises(DeploymentError, match=r"FFN side .* does not fit 64 x groq3_lp30.* it needs 512 chips"):
        ffn_memory(chip, card, Parallel(data_attention=64, expert=64), precision)
    fitting = fewest_ffn_chips(chip, card, precision)
    assert fitting is not None
    ffn_memory(chip, card, fitting, precision)
    total = side_weight_bytes(card, "ffn", precision)
    assert total / 500e6 < fitting.num_chips < 1.5 * total / 500e6


def test_an_attention_side_that_does_not_fit_is_refused() -> None:
    with pytest.raises(DeploymentError, match="its attention side does not fit 1 x groq3_lp30"):
        split("qwen3-235b-a22b", "lp30", "gb200", ffn_parallel=Parallel(data_attention=8, expert=8))


def test_an_attention_worker_with_pipeline_stages_is_refused() -> None:
    with pytest.raises(DeploymentError, match="no pipeline stages"):
        split("llama-3.1-70b", attention_parallel=Parallel(pipeline=2), ffn_parallel=Parallel(tensor=4))


def test_the_sides_of_a_step_add_up_to_the_whole_step_less_what_is_paid_once() -> None:
    """One worker a side and one micro-batch: a serial pipeline is the unsplit step, but for the hops and floors."""
    worker = split("llama-3.1-70b", "h100", attention_parallel=Parallel(tensor=4), ffn_parallel=Parallel(tensor=4))
    from transload.hardware.cost.worker import WorkerCost

    whole = WorkerCost(load_chip("h100"), worker.card, Parallel(tensor=4), worker.precision)
    fixed, each = whole.decode_coefficients(32)
    unsplit = fixed + each * 32 * 2048
    pipeline = worker.pipeline(32, 32 * 2048, micro_batches=1)
    assert step_seconds(pipeline) == pytest.approx(unsplit, rel=0.05)


def test_more_attention_workers_make_ffn_calls_longer_but_less_than_in_proportion() -> None:
    worker = split("qwen3-235b-a22b", ffn_parallel=Parallel(data_attention=4, expert=4))
    few = worker.pipeline(48, 48 * 8192, attention_workers=8).layers[0].ffn_seconds
    many = worker.pipeline(48, 48 * 8192, attention_workers=64).layers[0].ffn_seconds
    assert few < many < 8 * few


def test_three_bytes_a_hidden_element_cross_in_each_layer() -> None:
    worker = split("qwen3-235b-a22b", ffn_parallel=Parallel(data_attention=4, expert=4))
    assert worker.bytes_per_token_layer == 3 * 4096


def test_column_parts_are_shorter_calls_and_more_bytes() -> None:
    whole = split("llama-3.1-70b", "h100", ffn_parallel=Parallel(tensor=1), attention_parallel=Parallel(tensor=4))
    parts = split("llama-3.1-70b", "h100", split="column", attention_parallel=Parallel(tensor=4))
    one = whole.pipeline(64, 64 * 1024).layers[0]
    four = parts.pipeline(64, 64 * 1024, ffn_workers=4).layers[0]
    assert four.ffn_seconds < one.ffn_seconds / 2
    assert four.out.attention_port_seconds == pytest.approx(4 * one.out.attention_port_seconds)


def test_stages_of_an_ffn_worker_serve_as_many_cohorts_at_once() -> None:
    staged = split("qwen3-235b-a22b", "r200", "lp30", ffn_parallel=Parallel(data_attention=128, expert=128, pipeline=4))
    pipeline = staged.pipeline(32, 32 * 8192, attention_workers=8)
    assert (pipeline.ffn_workers, pipeline.cohort_size) == (4, 2)


def test_fewer_requests_than_micro_batches_make_fewer_micro_batches() -> None:
    worker = split("qwen3-235b-a22b", ffn_parallel=Parallel(data_attention=4, expert=4))
    assert worker.pipeline(1, 1000, micro_batches=4).micro_batches == 1


def test_a_slow_link_shows_and_two_micro_batches_hide_a_fast_one() -> None:
    card = load_model("qwen3-235b-a22b")
    slow = msgspec.structs.replace(FAST, latency_seconds=500e-6)
    workers = [
        SplitWorker(card, load_chip("gb200"), load_chip("gb200"), wire, precision=with_weights(card.precision, "fp8"),
                    ffn_parallel=Parallel(data_attention=4, expert=4))
        for wire in (FAST, slow)
    ]  # fmt: skip
    fast, exposed = (report(worker.pipeline(96, 96 * 8192, attention_workers=28)) for worker in workers)
    assert fast.exposed_share < 0.03
    assert exposed.exposed_share > 0.3


def test_a_link_without_numbers_is_refused_by_name() -> None:
    with pytest.raises(DeploymentError, match="lpx_nvl_bridge: bandwidth is unknown"):
        wire_of(load_link("lpx_nvl_bridge"))
    assert wire_of(load_link("lpx_nvl_bridge"), bandwidth=1e11, latency=1e-6).latency_seconds == 1e-6
