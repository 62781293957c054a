"""Closed-form answers: sane at both ends, refused past capacity, and beside the event simulation below saturation."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from transload.deploy.load import load
from transload.hardware.catalog import load_chip, load_model
from transload.hardware.cost.light import speed_of_light
from transload.hardware.cost.shape import StepShape
from transload.hardware.cost.steady import (
    Load,
    Policy,
    Saturated,
    Split,
    aggregated,
    aggregated_at_rate,
    decode_seconds,
    disaggregated_at_rate,
    matched_rate,
    prompt_seconds,
)
from transload.hardware.cost.worker import WorkerCost
from transload.hardware.parallel import Parallel
from transload.study.fleet import fleet_of
from transload.study.simulate import simulate
from transload.study.workload import Fixed, Poisson, Synthetic, synthetic

LOAD = Load(prompt_tokens=1024, output_tokens=256)


def worker(chip: str = "h100", model: str = "llama-3.1-8b", tensor: int = 1) -> WorkerCost:
    return WorkerCost(load_chip(chip), load_model(model), Parallel(tensor=tensor))


def test_alone_a_request_waits_for_nobody() -> None:
    cost = worker()
    alone = aggregated(cost, LOAD, 1)
    assert alone.tpot_seconds == pytest.approx(decode_seconds(cost, LOAD, 1), rel=0.1)
    served = alone.ttft_seconds - cost.request_seconds(LOAD.prompt_tokens)
    assert served < 2 * prompt_seconds(cost, LOAD, Policy())


def test_more_in_flight_gives_more_throughput_at_a_higher_tpot() -> None:
    steady = [aggregated(worker(), LOAD, concurrency) for concurrency in (1, 4, 16, 64, 256)]
    assert all(a.tpot_seconds < b.tpot_seconds for a, b in itertools.pairwise(steady))
    assert all(a.output_tokens_per_second < b.output_tokens_per_second for a, b in itertools.pairwise(steady))


def test_beyond_memory_requests_wait_and_throughput_stays() -> None:
    cost = worker()
    long = Load(prompt_tokens=16_000, output_tokens=1000)
    some, many = aggregated(cost, long, 40), aggregated(cost, long, 400)
    assert many.ttft_seconds > 5 * some.ttft_seconds
    assert many.requests_per_second == pytest.approx(some.requests_per_second, rel=0.05)


def test_a_closed_loop_and_a_rate_agree_on_the_same_load() -> None:
    cost = worker()
    at_rate = aggregated_at_rate(cost, LOAD, 8)
    in_flight = 8 * (at_rate.ttft_seconds + LOAD.output_tokens * at_rate.tpot_seconds)
    closed = aggregated(cost, LOAD, round(in_flight))
    assert closed.requests_per_second == pytest.approx(8, rel=0.1)
    assert closed.tpot_seconds == pytest.approx(at_rate.tpot_seconds, rel=0.1)


def test_past_capacity_is_refused() -> None:
    with pytest.raises(Saturated):
        aggregated_at_rate(worker(), LOAD, 1e4)
    with pytest.raises(Saturated, match="prefill pool would be busy"):
        disaggregated_at_rate(Split(prefill=worker(), decode=worker()), LOAD, 1e4)


def test_the_matched_rate_fills_one_pool_and_holds_the_target() -> None:
    split = Split(prefill=worker(), decode=worker(), prefill_workers=1, decode_workers=2)
    for target in (0.012, 0.02, 0.04):
        rate = matched_rate(split, LOAD, target)
        assert disaggregated_at_rate(split, LOAD, 0.9 * rate).tpot_seconds <= target
        with pytest.raises(Saturated):
            disaggregated_at_rate(split, LOAD, rate / prompt_share(split, rate) * 1.01)
    assert matched_rate(split, LOAD, 1e-4) == 0.0


def prompt_share(split: Split, rate: float) -> float:
    return rate * prompt_seconds(split.prefill, LOAD, Policy()) / split.prefill_workers


def test_nothing_is_faster_than_light() -> None:
    for chip, model, tensor in (("b200", "llama-3.1-70b", 4), ("h200", "deepseek-v3", 8), ("gb200", "gpt-oss-120b", 1)):
        cost = worker(chip, model, tensor)
        light = speed_of_light(cost)
        for shape in (StepShape((), 1, 100), StepShape((), 200, 200_000), StepShape(((0, 4096),), 3, 999)):
            assert light.step_seconds(shape) < cost.step_seconds(shape)


AGGREGATED = """
model: {path: llama-3.1-8b, precision: {weights: bf16, kv: bf16}, max_context: 16384}
pools:
  - {name: all, role: aggregated, chip: h100_sxm, limits: {max_batch: 512, step_tokens: 8192}}
"""
SPLIT = """
model: {path: llama-3.1-8b, precision: {weights: bf16, kv: bf16}, max_context: 16384}
router: {local_prefill: fallback}
pools:
  - {name: prefill, role: prefill, chip: h100_sxm, limits: {step_tokens: 8192}}
  - {name: decode, role: decode, chip: h100_sxm, limits: {max_batch: 512, step_tokens: 8192}}
links:
  - {between: [prefill, decode], kind: nvlink4}
"""
EVENTS = Policy(mixed=True, max_step_tokens=8192)


def played(text: str, rate: float, where: Path) -> tuple[float, float]:
    """Mean (TTFT, TPOT) of the event simulation."""
    file = where / "deployment.yaml"
    file.write_text(text)
    workload = synthetic(
        Synthetic(
            arrivals=Poisson(rate=rate), input=Fixed(num_tokens=LOAD.prompt_tokens),
            output=Fixed(num_tokens=LOAD.output_tokens), num_requests=400, seed=1,
        )
    )  # fmt: skip
    summary = simulate(load(file), workload).summary
    assert summary.ttft_seconds is not None
    assert summary.tpot_seconds is not None
    return summary.ttft_seconds.mean, summary.tpot_seconds.mean


@pytest.mark.parametrize("rate", [2.0, 8.0])
def test_an_aggregated_worker_is_within_five_percent_of_the_event_simulation(rate: float, tmp_path: Path) -> None:
    ttft, tpot = played(AGGREGATED, rate, tmp_path)
    deployment = load(tmp_path / "deployment.yaml")
    steady = aggregated_at_rate(fleet_of(deployment).worker(deployment.pools[0]), LOAD, rate, EVENTS)
    assert steady.tpot_seconds == pytest.approx(tpot, rel=0.05)
    assert steady.ttft_seconds == pytest.approx(ttft, rel=0.05)


@pytest.mark.parametrize("rate", [2.0, 8.0])
def test_a_split_deployment_is_within_five_percent_of_the_event_simulation(rate: float, tmp_path: Path) -> None:
    ttft, tpot = played(SPLIT, rate, tmp_path)
    deployment = load(tmp_path / "deployment.yaml")
    prefill, decode = (fleet_of(deployment).worker(pool) for pool in deployment.pools)
    steady = disaggregated_at_rate(Split(prefill=prefill, decode=decode), LOAD, rate, EVENTS)
    assert steady.tpot_seconds == pytest.approx(tpot, rel=0.05)
    assert steady.ttft_seconds == pytest.approx(ttft, rel=0.05)
