"""Sizes and durations as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transload.units import exact_bytes, exact_seconds, format_bytes, format_seconds, parse_bytes, parse_seconds


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("4 GiB", 4 * 2**30),
        ("4gib", 4 * 2**30),
        ("512 MB", 512_000_000),
        ("1.5 KiB", 1536),
        ("0.1 GB", 100_000_000),
        (" 7 B ", 7),
        ("1024", 1024),
        ("2 TB", 2 * 10**12),
    ],
)
def test_sizes_are_read_in_bytes(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("200 ms", 0.2), ("2 s", 2.0), ("0.5", 0.5), ("3 min", 180.0), ("1h", 3600.0), ("50us", 50e-6), ("50 µs", 50e-6)],
)
def test_durations_are_read_in_seconds(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("4G", "say whether you mean 4 GiB or 4 GB"),
        ("4 parsecs", 'no unit known here ("parsecs")'),
        ("four GiB", "is not a size"),
        ("-4 GiB", "is not a size"),
        ("4 GiB or so", "is not a size"),
        ("0.5 B", "not a whole number of bytes"),
        ("", "is not a size"),
        ("1e3", "is not a size"),
    ],
)
def test_a_size_that_could_mean_anything_is_refused_saying_why(text: str, reason: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_bytes(text)
    assert reason in str(error.value)


@pytest.mark.parametrize("text", ["2 weeks", "-1 s", "soon", "1 M", "5 MS"])
def test_a_duration_that_could_mean_anything_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_seconds(text)


@given(st.integers(0, 2**60))
def test_a_size_written_to_a_file_is_read_back_exactly(num_bytes: int) -> None:
    assert parse_bytes(str(exact_bytes(num_bytes))) == num_bytes


@given(st.floats(0, 1e6))
def test_a_duration_written_to_a_file_is_read_back_exactly(seconds: float) -> None:
    written = exact_seconds(seconds)
    assert (parse_seconds(written) if isinstance(written, str) else written) == seconds


def test_round_quantities_are_written_with_their_unit() -> None:
    assert [exact_bytes(4 * 2**30), exact_bytes(1000), exact_seconds(0.2), exact_seconds(2.0)] == [
        "4 GiB",
        1000,
        "200 ms",
        "2 s",
    ]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1024, "1.00 KiB"),
        (754_974_720, "720 MiB"),
        (2**30 - 1, "1.00 GiB"),
        (2**41, "2.00 TiB"),
    ],
)
def test_sizes_are_shown_with_three_digits(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.00232, "2.32 ms"), (0.2, "200 ms"), (2.0, "2.00 s"), (600.0, "10.0 min"), (2e-6, "2.00 us")],
)
def test_durations_are_shown_with_three_digits(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
