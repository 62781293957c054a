"""What is learned of speeds: the prior before the first measurement, the truth after some, and nothing absurd."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transload.control.rates import LinearRate, LinkRate


def test_without_measurements_the_prior_holds() -> None:
    rate = LinearRate(0.01, 0.001, 256)
    assert rate.seconds(100) == pytest.approx(0.11)


def test_two_kinds_of_load_show_both_the_fixed_cost_and_the_slope() -> None:
    rate = LinearRate(0.01, 0.001, 256)
    for _ in range(30):
        for units in (64, 512):
            rate.observe(units, 0.05 + 0.0004 * units)
    assert rate.fixed_seconds == pytest.approx(0.05, rel=0.05)
    assert rate.seconds_per_unit == pytest.approx(0.0004, rel=0.05)


def test_one_measurement_counts_at_once() -> None:
    rate = LinearRate(0.01, 0.001, 256)
    rate.observe(256, 2.0)
    assert rate.seconds(256) == pytest.approx(2.0, rel=0.1)


def test_equal_loads_do_not_make_the_slope_run_away() -> None:
    rate = LinearRate(0.01, 0.0005, 8)
    for number in range(1000):
        rate.observe(8, 0.02 + 0.001 * (number % 3))
    assert rate.seconds(8) == pytest.approx(0.021, rel=0.05)
    assert 0 < rate.seconds(16) < 0.05


def test_old_measurements_fade() -> None:
    rate = LinearRate(0.01, 0.001, 256)
    for seconds_per_unit in (0.001, 0.01):
        for number in range(200):
            units = 100 + number % 300
            rate.observe(units, seconds_per_unit * units)
    assert rate.seconds_per_unit == pytest.approx(0.01, rel=0.1)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e3)), max_size=50), st.floats(0, 1e6))
def test_whatever_is_measured_more_work_never_takes_less_time(seen: list[tuple[float, float]], units: float) -> None:
    rate = LinearRate(0.01, 0.001, 256)
    for item in seen:
        rate.observe(*item)
    assert rate.fixed_seconds >= 0
    assert rate.seconds_per_unit >= 0.001 / 100
    assert rate.seconds(units) <= rate.seconds(units + 1)


def test_a_link_takes_its_delay_and_its_bytes() -> None:
    assert LinkRate(1e9, 0.001).seconds(5e8) == pytest.approx(0.501)
