"""A comparison's columns and sentences, from results made by hand."""

from __future__ import annotations

import csv
import io

import msgspec
import pytest
from rich.console import Console

from transload.deploy.load import loads
from transload.deploy.spec import Deployment, Targets
from transload.study.compare import Comparison, compare
from transload.study.metrics import RequestRecord, summarize
from transload.study.result import Cost, Interval, LinkResult, PoolResult, Result
from transload.study.show_compare import show_comparison, to_csv

TOGETHER = """
model: {path: llama-3.1-70b, precision: {weights: fp8, kv: fp8}}
pools: [{name: both, role: aggregated, chip: b200_sxm, workers: 4, parallel: {tensor: 2}}]
"""
APART = """
model: {path: llama-3.1-70b}
pools:
  - {name: prefill, role: prefill, chip: rubin_cpx, workers: 2, parallel: {tensor: 2}}
  - {name: decode, role: decode, chip: rubin_r200, workers: 2}
assume: ["rubin_cpx.dense_flops.fp8=10 PFLOP/s", "rubin_cpx.price.per_hour=2 USD/h"]
"""
FFN = """
model: {path: llama-3.1-70b}
pools:
  - {name: both, role: aggregated, chip: rubin_r200, ffn: {pool: lpus}}
  - {name: lpus, role: ffn, chip: groq3_lp30, parallel: {tensor: 64, pipeline: 2}}
"""


def record(index: int, tpot: float) -> RequestRecord:
    tokens = [0.5 + tpot * place for place in range(11)]
    return RequestRecord(
        index=index, due_seconds=0.0, start_seconds=0.0, end_seconds=tokens[-1], token_seconds=tokens,
        num_input_tokens=100, num_output_tokens=11, num_output_asked=11,
    )  # fmt: skip


def result(
    name: str,
    deployment: Deployment,
    *,
    tpot: float = 0.02,
    usd: float | None = 1.0,
    targets: float | None = 0.05,
    high: float = 1.25,
    links: tuple[LinkResult, ...] = (),
) -> Result:
    pools = tuple(
        PoolResult(
            name=pool.name, role=pool.role, chip=pool.chip or "cpu", num_workers=pool.workers,
            num_chips=pool.workers * pool.parallel.num_chips, busy_share=0.5, mean_batch=4.0, num_steps=10,
            num_prefill_tokens=100, num_decode_tokens=100, num_preemptions=0, kv_tokens=1000, kv_share=0.1,
            peak_kv_share=0.2,
        )
        for pool in deployment.pools
    )  # fmt: skip
    records = [record(index, tpot) for index in range(4)]
    return Result(
        name=name, simulated=True, deployment="", model="llama-3.1-70b", workload="4 requests", seed=0,
        summary=summarize(records, Targets(tpot_seconds=targets)), pools=pools, links=links,
        cost=Cost(
            num_chips=8, usd=usd, usd_per_million_output_tokens=usd and 0.4, energy_joules=100.0, mean_watts=100.0,
            joules_per_output_token=2.5, unknown=() if usd else ("rubin_cpx: price.per_hour is unknown",),
        ),
        ttft_interval=Interval(low=0.7, high=1.4, basis="fitted"),
        tpot_interval=Interval(low=0.8, high=high, basis="fitted"),
        assumptions=deployment.assume, classes={"datasheet": 6, "estimate": 2}, bottleneck="decode",
    )  # fmt: skip


def kv_link() -> LinkResult:
    return LinkResult(
        source="prefill", target="decode", kind="eth800", crosses="kv", num_transfers=4, num_bytes=400,
        bytes_per_second_limit=1e11, busy_seconds=1.0, exposed_seconds=0.8, wire_seconds=2.0,
    )  # fmt: skip


def two(*, apart_tpot: float = 0.02, apart_usd: float | None = 1.0, high: float = 1.25) -> Comparison:
    together, apart = loads(TOGETHER), loads(APART)
    return compare(
        [
            (together, result("together", together)),
            (apart, result("apart", apart, tpot=apart_tpot, usd=apart_usd, links=(kv_link(),), high=high)),
        ]
    )


def test_columns_say_where_what_crosses_and_how_often() -> None:
    first, second = two().rows
    assert (first.split, first.prefill_on, first.decode_on) == ("aggregated", "4 x 2 b200_sxm", "4 x 2 b200_sxm")
    assert (first.crosses, first.how_often, first.bytes_per_request) == ("nothing", "never", 0.0)
    assert (second.prefill_on, second.decode_on) == ("2 x 2 rubin_cpx", "2 rubin_r200")
    assert (second.crosses, second.how_often) == ("KV cache", "once a request")
    assert (second.bytes_per_request, second.exposed_seconds) == (100.0, 0.2)


def test_feed_forwards_elsewhere_are_told_with_the_bytes_of_a_token() -> None:
    deployment = loads(FFN)
    (row,) = compare([(deployment, result("afd", deployment))]).rows
    assert row.split == "attention/FFN"
    assert row.decode_on == "1 rubin_r200, FFN on 1 x 128 groq3_lp30"
    assert row.how_often == "once a request; 80 layers a token, both ways"
    assert row.bytes_per_token == 3 * 8192 * 80
    assert "a hop out and back at each of 80 layers" in row.drawback


def test_prices_carry_the_class_of_the_weakest_number_behind_them() -> None:
    first, second = two().rows
    assert (first.usd_per_million_tokens.value, first.usd_per_million_tokens.basis) == (0.4, "estimate")
    assert second.usd_per_million_tokens.basis == "assumption"
    assert first.kwh_per_million_tokens.value == pytest.approx(2.5e6 / 3.6e6)


def test_an_unknown_price_is_told_with_its_reason() -> None:
    row = two(apart_usd=None).rows[1]
    assert (row.usd_per_million_tokens.value, row.good_requests_per_usd) == (None, None)
    assert "price.per_hour is unknown" in row.usd_per_million_tokens.basis


def test_it_says_when_splitting_does_not_pay() -> None:
    assert two(apart_usd=4.0).verdicts[0].startswith("splitting does not pay here: together serves")
    assert two(apart_tpot=0.06).verdicts[0].startswith("splitting does not pay here: together serves")


def test_it_says_when_splitting_pays_and_when_that_is_closer_than_the_error() -> None:
    assert two(apart_usd=0.5).verdicts[0].startswith("splitting pays here: together serves")
    assert "within what the model can tell" not in two(apart_usd=0.5).verdicts[0]
    assert "within what the model can tell" in two(apart_usd=0.9).verdicts[0]
    assert two(apart_usd=1.01).verdicts[0].startswith("splitting makes no difference for a dollar here")


def test_streams_that_differ_by_less_than_the_error_are_told_so() -> None:
    assert "the two intervals overlap" in two(apart_tpot=0.018).verdicts[1]
    assert "overlap" not in two(apart_tpot=0.005).verdicts[1]


def test_those_who_miss_their_targets_are_named() -> None:
    assert "targets missed by apart (0%)" in two(apart_tpot=0.06).verdicts
    assert any(verdict.startswith("all keep their targets") and "--saturate" in verdict for verdict in two().verdicts)


def test_a_chip_that_was_shelved_and_a_waiting_transfer_are_drawbacks() -> None:
    row = two().rows[1]
    assert "rubin_cpx: announced 2025-09, reported shelved 2026-03" in row.drawback
    assert "after its first token a stream waits 200 ms for its KV" in row.drawback


def test_the_table_has_a_column_for_each_and_every_assumption() -> None:
    console = Console(width=150, record=True, file=io.StringIO())
    show_comparison(two(), console)
    text = console.export_text()
    assert "simulated" in text
    assert "20.0 ms (16.0 ms to 25.0 ms)" in text
    assert "assumed: rubin_cpx.price.per_hour=2 USD/h" in text


def test_csv_has_a_line_for_each_with_numbers_in_base_units() -> None:
    lines = list(csv.DictReader(io.StringIO(to_csv(two(apart_usd=None)))))
    assert [line["name"] for line in lines] == ["together", "apart"]
    assert float(lines[0]["tpot_p50_seconds"]) == pytest.approx(0.02)
    assert lines[1]["usd_per_million_tokens"] == ""


def test_a_comparison_survives_json() -> None:
    assert msgspec.json.decode(msgspec.json.encode(two()), type=Comparison) == two()
