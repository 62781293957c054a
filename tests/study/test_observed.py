"""Pools and links as a timeline shows them: shares of the time, means over bins, bytes that went."""

from __future__ import annotations

import pytest

from tests.study.test_timeline import played
from transload.study.observed import Window, link_results, pool_results, request_window
from transload.study.result import NUM_BINS, LinkResult, PoolResult
from transload.study.timeline import Timeline


def observed(workers: str = "p0 p1 d0") -> tuple[Timeline, Window, dict[str, PoolResult], tuple[LinkResult, ...]]:
    _, timeline = played(workers, 30)
    window = request_window(timeline)
    pools = {pool.name: pool for pool in pool_results(timeline, window, "cpu")}
    return timeline, window, pools, link_results(timeline, window)


def test_a_pool_is_busy_for_the_share_of_time_that_its_workers_compute() -> None:
    timeline, window, pools, _ = observed()
    for pool in pools.values():
        names = {worker for worker, (name, _) in timeline.pools.items() if name == pool.name}
        seconds = sum(step.end_seconds - step.start_seconds for step in timeline.steps if step.worker in names)
        assert pool.num_workers == len(names)
        assert pool.busy_share == pytest.approx(seconds / (window.seconds * len(names)), rel=1e-6)
        assert sum(sample.busy_share for sample in pool.series) / NUM_BINS == pytest.approx(pool.busy_share, rel=1e-6)


def test_tokens_and_steps_of_a_pool_are_counted() -> None:
    timeline, _, pools, _ = observed()
    assert sum(pool.num_steps for pool in pools.values()) == len(timeline.steps)
    assert sum(pool.num_prefill_tokens for pool in pools.values()) == sum(8 + number for number in range(30))
    assert sum(pool.num_decode_tokens for pool in pools.values()) == 30 * 5


def test_the_kv_share_lies_between_nothing_and_its_peak() -> None:
    _, _, pools, _ = observed()
    for pool in pools.values():
        assert 0 < pool.kv_share < pool.peak_kv_share <= 1
        assert all(0 <= sample.kv_share <= pool.peak_kv_share + 1e-9 for sample in pool.series)


def test_the_bytes_of_all_bins_are_the_bytes_that_went() -> None:
    timeline, window, _, (link,) = observed()
    assert link.num_bytes == sum(transfer.num_bytes for transfer in timeline.transfers) > 0
    binned = sum(sample.bytes_per_second for sample in link.series) * window.bin_seconds
    assert binned == pytest.approx(link.num_bytes, rel=1e-6)
    assert 0 < link.busy_seconds <= link.wire_seconds


def test_what_is_outside_the_window_is_left_out() -> None:
    timeline, window, _, _ = observed()
    half = Window(window.start_seconds, window.start_seconds + window.seconds / 2)
    before = sum(pool.num_steps for pool in pool_results(timeline, window, "cpu"))
    assert 0 < sum(pool.num_steps for pool in pool_results(timeline, half, "cpu")) < before


def test_a_pool_without_a_handoff_has_no_link() -> None:
    assert observed("a0 a1")[3] == ()
