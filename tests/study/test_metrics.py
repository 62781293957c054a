from __future__ import annotations

import math

import pytest

from transload.deploy.spec import Targets
from transload.study.metrics import (
    ErrorKind,
    RequestRecord,
    distribution,
    is_good,
    summarize,
    tpot_seconds,
    ttft_seconds,
)


def record(
    index: int = 0,
    due: float = 0.0,
    tokens: tuple[float, ...] = (1.0,),
    end: float | None = None,
    *,
    start: float | None = None,
    num_output_tokens: int | None = None,
    error: ErrorKind | None = None,
    interrupted: bool = False,
) -> RequestRecord:
    return RequestRecord(
        index=index,
        due_seconds=due,
        start_seconds=due if start is None else start,
        end_seconds=max((*tokens, due)) if end is None else end,
        token_seconds=list(tokens),
        num_input_tokens=100,
        num_output_tokens=len(tokens) if num_output_tokens is None else num_output_tokens,
        num_output_asked=len(tokens),
        error=error,
        interrupted=interrupted,
    )


def test_the_first_token_is_timed_from_when_the_request_was_due_not_from_when_it_was_sent() -> None:
    late = record(due=10.0, start=12.0, tokens=(12.5, 13.0))
    assert ttft_seconds(late) == 2.5
    summary = summarize([late])
    assert summary.start_delay_seconds is not None
    assert summary.start_delay_seconds.max == 2.0
    assert ttft_seconds(record(tokens=())) is None


def test_time_per_output_token_spreads_the_time_after_the_first_over_the_other_tokens() -> None:
    assert tpot_seconds(record(tokens=(1.0, 1.5, 3.0))) == 1.0
    assert tpot_seconds(record(tokens=(1.0,))) is None
    assert tpot_seconds(record(tokens=())) is None


def test_time_per_output_token_divides_by_the_servers_own_count() -> None:
    two_events_of_four_tokens = record(tokens=(1.0, 2.5), num_output_tokens=4)
    assert tpot_seconds(two_events_of_four_tokens) == 0.5


def test_percentiles_interpolate_between_order_statistics() -> None:
    values = distribution([4.0, 1.0, 3.0, 2.0])
    assert values is not None
    assert (values.count, values.mean, values.p50, values.max) == (4, 2.5, 2.5, 4.0)
    assert values.p90 == pytest.approx(3.7)
    assert values.p95 == pytest.approx(3.85)
    assert values.p99 == pytest.approx(3.97)
    assert distribution([]) is None


def test_a_run_is_summed_up_exactly() -> None:
    records = [
        record(0, due=0.0, tokens=(0.5, 1.0, 1.5)),
        record(1, due=1.0, tokens=(3.0, 3.25)),
        record(2, due=2.0, tokens=(2.1,), end=4.0),
        record(3, due=3.0, tokens=(), end=5.0, error="timeout"),
    ]
    summary = summarize(records, Targets(ttft_seconds=1.0, tpot_seconds=0.5, attainment=0.5))
    assert summary.duration_seconds == 5.0
    assert (summary.num_requests, summary.num_successful, summary.num_failed) == (4, 3, 1)
    assert summary.errors == {"timeout": 1}
    assert summary.num_input_tokens == 300
    assert summary.num_output_tokens == 6
    assert summary.requests_per_second == 0.6
    assert summary.output_tokens_per_second == 1.2
    assert summary.total_tokens_per_second == 61.2
    assert summary.offered_requests_per_second == 1.0
    assert summary.ttft_seconds is not None
    assert summary.ttft_seconds.mean == pytest.approx((0.5 + 2.0 + 0.1) / 3)
    assert summary.tpot_seconds is not None
    assert (summary.tpot_seconds.count, summary.tpot_seconds.mean) == (2, 0.375)
    assert summary.itl_seconds is not None
    assert (summary.itl_seconds.count, summary.itl_seconds.p50, summary.itl_seconds.max) == (3, 0.5, 0.5)
    assert summary.end_to_end_seconds is not None
    assert summary.end_to_end_seconds.max == 2.25
    assert summary.num_good == 2
    assert summary.goodput_requests_per_second == 0.4
    assert summary.attainment == 0.5
    assert summary.meets_targets is True
    assert summary.num_short_outputs == 0


def test_goodput_counts_requests_that_meet_every_target_and_did_not_fail() -> None:
    targets = Targets(ttft_seconds=1.0, tpot_seconds=0.125)
    assert is_good(record(tokens=(1.0, 1.125)), targets)
    assert not is_good(record(tokens=(1.01, 1.05)), targets)
    assert not is_good(record(tokens=(0.5, 0.7)), targets)
    assert is_good(record(tokens=(0.5,)), targets)
    assert not is_good(record(tokens=(0.5, 0.6), error="truncated"), targets)
    assert not is_good(record(tokens=(0.5, 0.6), interrupted=True), targets)
    assert is_good(record(tokens=(9.0, 99.0)), Targets())


def test_failed_requests_count_against_attainment_and_not_among_latencies() -> None:
    records = [record(0, tokens=(0.1,)), record(1, tokens=(50.0,), error="error_event")]
    summary = summarize(records, Targets(ttft_seconds=1.0))
    assert summary.attainment == 0.5
    assert summary.meets_targets is False
    assert summary.ttft_seconds is not None
    assert summary.ttft_seconds.max == 0.1


def test_requests_cut_off_by_the_user_count_nowhere_else() -> None:
    records = [record(0, tokens=(0.1, 0.2)), record(1, tokens=(70.0,), end=90.0, interrupted=True)]
    summary = summarize(records, Targets(ttft_seconds=1.0))
    assert (summary.num_requests, summary.num_interrupted, summary.num_failed) == (1, 1, 0)
    assert summary.duration_seconds == 0.2
    assert summary.attainment == 1.0


def test_a_run_of_nothing_has_a_summary_too() -> None:
    summary = summarize([])
    assert summary.num_requests == 0
    assert summary.requests_per_second == 0.0
    assert summary.ttft_seconds is None
    assert summary.attainment is None
    assert summary.meets_targets is None


def test_without_targets_there_is_no_verdict() -> None:
    summary = summarize([record()])
    assert summary.meets_targets is None
    assert summary.num_good == 1


def test_most_requests_at_once_does_not_count_back_to_back_requests_twice() -> None:
    records = [record(0, 0.0, (1.0,)), record(1, 1.0, (2.0,)), record(2, 1.5, (3.0,)), record(3, 1.6, (1.7,))]
    assert summarize(records).peak_in_flight == 3
    assert summarize(records[:2]).peak_in_flight == 1


def test_answers_whose_counts_disagree_or_are_short_are_counted() -> None:
    records = [
        record(0, tokens=(1.0, 2.0), num_output_tokens=3),
        record(1, tokens=(1.0, 2.0), num_output_tokens=1),
        record(2, tokens=(1.0, 2.0)),
    ]
    summary = summarize(records)
    assert summary.num_usage_mismatches == 2
    assert summary.num_short_outputs == 1


def test_cached_tokens_are_summed_only_where_the_server_tells_them() -> None:
    told, silent = record(0), record(1)
    assert summarize([told, silent]).num_cached_tokens is None
    told.num_cached_tokens = 64
    assert summarize([told, silent]).num_cached_tokens == 64


def test_latencies_of_many_gaps_are_pooled_over_requests() -> None:
    records = [record(n, tokens=tuple(n + k * 0.01 for k in range(101))) for n in range(10)]
    summary = summarize(records)
    assert summary.itl_seconds is not None
    assert summary.itl_seconds.count == 1000
    assert math.isclose(summary.itl_seconds.mean, 0.01)
