"""When a refused caller should come back."""

from __future__ import annotations

import pytest

from transload.control.admission import LONGEST_RETRY_SECONDS, Admission


def busy(admission: Admission, seconds_between: float, times: int = 200, start: float = 0.0) -> float:
    """Requests that stood in the queue leave it at this pace; returns when the last one did."""
    now = start
    for _ in range(times):
        now += seconds_between
        admission.dispatched(start - 1, now)
    return now


def test_each_refused_caller_is_given_the_next_place() -> None:
    admission = Admission()
    now = busy(admission, 2.0)
    assert [admission.retry_after(now) for _ in range(4)] == pytest.approx([2.0, 4.0, 6.0, 8.0], rel=0.01)


def test_places_that_have_passed_are_not_promised_again() -> None:
    admission = Admission()
    now = busy(admission, 2.0)
    for _ in range(3):
        admission.retry_after(now)
    assert admission.retry_after(now + 4) == pytest.approx(4.0, rel=0.01)
    assert admission.retry_after(now + 100) == pytest.approx(2.0, rel=0.01)


def test_nobody_is_told_to_come_back_sooner_than_in_a_second() -> None:
    admission = Admission()
    assert admission.retry_after(busy(admission, 0.001)) == 1.0


def test_hours_without_requests_do_not_count_as_a_slow_queue() -> None:
    admission = Admission()
    now = busy(admission, 2.0)
    for _ in range(50):
        now += 3600
        admission.dispatched(now, now)  # came and went at once
    assert admission.retry_after(now) == pytest.approx(2.0, rel=0.01)


def test_a_burst_into_idle_workers_does_not_count_as_a_fast_queue() -> None:
    admission = Admission()
    now = busy(admission, 5.0)
    for _ in range(50):
        admission.dispatched(now, now)
    assert admission.retry_after(now) == pytest.approx(5.0, rel=0.01)


def test_a_flood_of_refusals_keeps_nobody_away_for_long() -> None:
    admission = Admission()
    now = busy(admission, 1.0)
    assert max(admission.retry_after(now) for _ in range(100_000)) == LONGEST_RETRY_SECONDS


def test_the_expected_length_follows_the_texts() -> None:
    admission = Admission()
    assert admission.expected_outputs == 128.0
    for _ in range(200):
        admission.finished(20)
    assert admission.expected_outputs == pytest.approx(20, rel=0.01)
