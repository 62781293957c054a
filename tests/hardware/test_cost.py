"""The cost of a step: counted exactly, a straight line in decode, monotone, refused where a number is unknown."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transload.errors import DeploymentError
from transload.hardware.catalog import load_chip, load_model, model_names
from transload.hardware.cost.shape import StepShape
from transload.hardware.cost.worker import WorkerCost
from transload.hardware.model_facts import (
    count_parameters,
    decode_flops,
    decode_read_bytes,
    kv_bytes,
    prefill_flops,
)
from transload.hardware.parallel import Parallel
from transload.hardware.precision import with_kv, with_weights
from transload.hardware.slots import parse_assumption


def cost(chip: str = "h100", model: str = "llama-3.1-8b", engine: str = "generic", **parallel: int) -> WorkerCost:
    return WorkerCost(load_chip(chip), load_model(model), Parallel(**parallel), engine=engine)


def test_flops_and_bytes_are_those_of_the_closed_forms_but_for_biases_and_norms() -> None:
    for name in model_names():
        card = load_model(name)
        worker = WorkerCost(load_chip("b200"), card)
        context = max(4096, card.sliding_window or 0)
        small = count_parameters(card).attention * 0.002 + count_parameters(card).routed_experts * 0.002
        decode = worker.breakdown(StepShape((), 1, context))
        flops = math.fsum(operation.flops for operation in decode)
        assert flops == pytest.approx(decode_flops(card, context), rel=0.004), name
        weights_and_cache = math.fsum(
            operation.bytes for operation in decode if operation.kind not in ("elementwise", "overhead")
        )
        assert weights_and_cache == pytest.approx(decode_read_bytes(card, 1, context), rel=0.01, abs=small), name
        chunk = worker.breakdown(StepShape(((0, 2048),)))
        assert math.fsum(operation.flops for operation in chunk) == pytest.approx(
            prefill_flops(card, 2048), rel=0.004
        ), name


@pytest.mark.parametrize("model", ["llama-3.1-8b", "deepseek-v3", "gpt-oss-120b", "qwen3-235b-a22b"])
@pytest.mark.parametrize("split", [{}, {"tensor": 4}, {"tensor": 2, "pipeline": 2}])
def test_the_breakdown_adds_up_to_the_step(model: str, split: dict[str, int]) -> None:
    worker = WorkerCost(load_chip("b200"), load_model(model), Parallel(**split))
    for shape in (
        StepShape((), 7, 9000),
        StepShape(((0, 900),)),
        StepShape(((512, 300), (0, 40)), 5, 4000),
    ):
        total = math.fsum(operation.seconds for operation in worker.breakdown(shape))
        assert total == pytest.approx(worker.step_seconds(shape), rel=1e-12)


def test_nothing_to_do_takes_no_time() -> None:
    assert cost().step_seconds(StepShape()) == 0.0
    assert cost().breakdown(StepShape()) == ()


@settings(max_examples=60, deadline=None)
@given(
    num_decode=st.integers(1, 600),
    contexts=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)),
    model=st.sampled_from(["llama-3.1-8b", "deepseek-v3", "gpt-oss-120b", "mistral-7b"]),
)
def test_a_decode_step_is_a_straight_line_in_its_context(
    num_decode: int, contexts: tuple[int, int], model: str
) -> None:
    worker = WORKERS[model]
    fixed, each = worker.decode_coefficients(num_decode)
    for context in contexts:
        assert worker.step_seconds(StepShape((), num_decode, context)) == fixed + each * context
    assert fixed > 0
    assert each > 0


WORKERS = {name: cost("h200", name, tensor=2) for name in ("llama-3.1-8b", "deepseek-v3", "gpt-oss-120b", "mistral-7b")}


@settings(max_examples=60, deadline=None)
@given(
    prefill=st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 8000)), max_size=4),
    num_decode=st.integers(0, 300),
    per_request=st.integers(1, 20_000),
    model=st.sampled_from(sorted(WORKERS)),
)
def test_more_work_never_takes_less_time(
    prefill: list[tuple[int, int]], num_decode: int, per_request: int, model: str
) -> None:
    worker = WORKERS[model]
    shape = StepShape(tuple(prefill), num_decode, num_decode * per_request)
    seconds = worker.step_seconds(shape)
    more = (
        StepShape((*prefill, (0, 64)), shape.num_decode, shape.decode_context_tokens),
        StepShape(tuple(prefill), num_decode + 1, shape.decode_context_tokens + per_request),
        StepShape(tuple(prefill), num_decode, shape.decode_context_tokens + (1000 if num_decode else 0)),
        StepShape(tuple((start, num + 1) for start, num in prefill), num_decode, shape.decode_context_tokens),
        StepShape(tuple((start + 100, num) for start, num in prefill), num_decode, shape.decode_context_tokens),
    )
    for larger in more:
        assert worker.step_seconds(larger) >= seconds * (1 - 1e-12), larger


def test_no_step_beats_the_speed_of_light() -> None:
    chip, card = load_chip("b200"), load_model("llama-3.1-70b")
    worker = WorkerCost(chip, card, Parallel(tensor=8))
    bandwidth = chip.need("memory.hbm.bandwidth").value * 8
    for num_decode, context in ((1, 100), (64, 4096), (512, 1024)):
        bound = decode_read_bytes(card, num_decode, context) / bandwidth
        assert worker.step_seconds(StepShape((), num_decode, num_decode * context)) > bound
    assert worker.step_seconds(StepShape(((0, 8192),))) > prefill_flops(card, 8192) / (8 * chip.peak("bf16").value)


def test_few_tokens_touch_few_experts() -> None:
    worker = cost("b200", "qwen3-235b-a22b", tensor=8)
    one, many = (
        next(op for op in worker.breakdown(StepShape((), num, num * 10)) if op.kind == "grouped_gemm")
        for num in (1, 512)
    )
    assert many.bytes / one.bytes == pytest.approx(128 / 8, rel=0.15)


def test_the_busiest_of_the_ranks_reads_more_experts_than_their_mean() -> None:
    def read(ranks: int, tokens: int) -> float:
        worker = cost("h200", "deepseek-v3", tensor=8, expert=ranks)
        parts = worker.breakdown(StepShape((), tokens, tokens))
        return next(part.bytes for part in parts if part.kind == "grouped_gemm")

    assert 1.3 < read(8, 4) / read(1, 4) < 2.5  # by chance one of eight ranks gets about twice the mean of four rows
    assert read(8, 8192) < 1.3 * read(1, 8192)


def test_experts_dealt_out_beyond_a_node_have_the_curve_of_libraries_made_for_that() -> None:
    def experts(ranks: int, chip: str = "h800") -> float:
        found = cost(chip, "deepseek-v3", data_attention=ranks, expert=ranks).plan.experts
        assert found is not None
        return found.seconds_per_flop

    assert experts(32) == experts(64) < experts(8)
    assert experts(32, "gb200") == experts(8, "gb200")  # 72 of them are one domain


def test_attention_by_data_keeps_a_latent_cache_once() -> None:
    tensor = cost("h200", "deepseek-v3", tensor=16)
    data = cost("h200", "deepseek-v3", data_attention=16, expert=16)
    assert data.kv_tokens > 8 * tensor.kv_tokens
    shape = StepShape((), 256, 256 * 8000)
    attention = [
        next(op.bytes for op in worker.breakdown(shape) if op.kind == "mla_decode") for worker in (tensor, data)
    ]
    assert attention[0] == 16 * attention[1]


def test_what_does_not_fit_is_refused_with_the_number_of_chips_that_would_do() -> None:
    worker = cost("lp30", "llama-3.1-8b")
    with pytest.raises(DeploymentError, match=r"llama-3\.1-8b does not fit 1 x groq3_lp30.*it needs \d+ chips or more"):
        _ = worker.capacity
    assert cost("lp30", "llama-3.1-8b", tensor=32, pipeline=2).kv_tokens > 0


def test_an_unknown_number_is_refused_by_name_and_an_assumed_one_is_listed() -> None:
    card = load_model("llama-3.1-8b")
    chip = load_chip("wse3")
    with pytest.raises(DeploymentError, match=r'--assume "cerebras_wse3\.dense_flops\.fp16='):
        WorkerCost(chip, card)
    assumed = chip.assuming([parse_assumption("wse3.dense_flops.fp16=12 PFLOP/s")])
    worker = WorkerCost(assumed, card)
    assert any("cerebras_wse3.dense_flops.fp16 = 12 PFLOP/s" in line for line in worker.assumptions)
    assert worker.classes["assumption"] == 1
    with pytest.raises(DeploymentError, match=r"price\.per_hour is unknown"):
        worker.usd(1.0)
    with pytest.raises(DeploymentError, match=r"no such engine: trtlm"):
        cost(engine="trtlm")


def test_a_wafer_at_batch_one_is_bound_by_latency_and_not_by_its_bandwidth() -> None:
    chip = load_chip("wse3").assuming([parse_assumption("wse3.dense_flops.fp16=12 PFLOP/s")])
    card = load_model("llama-3.1-8b")
    seconds = WorkerCost(chip, card).step_seconds(StepShape((), 1, 1000))
    assert seconds > 100 * decode_read_bytes(card, 1, 1000) / chip.need("memory.sram.bandwidth").value


def test_power_and_price_are_those_of_the_catalog() -> None:
    worker = cost("h100", tensor=4)
    assert worker.energy_joules(10.0, 1.0) == pytest.approx(4 * 10 * 1730)
    assert worker.usd(3600) == pytest.approx(4 * 1.69)


def test_capacity_is_what_weights_leave() -> None:
    card = load_model("llama-3.1-70b")
    precision = with_kv(with_weights(card.precision, "fp8"), "fp8")
    chip = load_chip("h200")
    worker = WorkerCost(chip, card, Parallel(tensor=2), precision)
    usable = chip.need("memory.hbm.capacity").value * worker.efficiency.memory_share
    assert worker.capacity.weight_bytes + worker.kv_tokens * worker.capacity.kv_bytes_per_token <= usable
    assert worker.kv_tokens * kv_bytes(card, 1, "fp8") == pytest.approx(2 * usable - 70.5e9, rel=0.05)
