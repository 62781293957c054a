"""Sizes and durations as people write them: "4 GiB", "200 ms". Plain numbers inside, words only at the border.

Never guesses: "4G" could mean two sizes, so it is refused with both spelled out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal

BYTE_UNITS = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
SECOND_UNITS = {
    "us": Decimal("0.000001"),
    "µs": Decimal("0.000001"),
    "ms": Decimal("0.001"),
    "s": Decimal(1),
    "min": Decimal(60),
    "h": Decimal(3600),
}
RATE_UNITS = {
    **{f"{name}/s": Decimal(size) for name, size in BYTE_UNITS.items()},
    **{f"{prefix}bit/s": Decimal(size) / 8 for prefix, size in (("M", 10**6), ("G", 10**9), ("T", 10**12))},
}
_QUANTITY = re.compile(r"\s*([0-9]{1,24}(?:\.[0-9]{1,24})?)\s*([A-Za-zµ]*(?:/s)?)\s*")


def parse_bytes(text: str) -> int:
    """Bytes in "4 GiB", "512 MB" or "1024". Raises ValueError saying what is wrong with the text."""
    number, unit = _split(text, 'a size such as "4 GiB"')
    if not unit:
        factor = 1
    else:
        by_small_letters = {name.lower(): value for name, value in BYTE_UNITS.items()}
        found = by_small_letters.get(unit.lower())
        if found is None:
            raise ValueError(
                _no_unit(unit, BYTE_UNITS, f"{number} {unit[:1].upper()}iB or {number} {unit[:1].upper()}B")
            )
        factor = found
    size = number * factor
    if size != size.to_integral_value():
        raise ValueError("is not a whole number of bytes")
    return int(size)


def parse_seconds(text: str) -> float:
    """Seconds in "200 ms", "2 s" or "0.5". Raises ValueError saying what is wrong with the text."""
    number, unit = _split(text, 'a duration such as "200 ms"')
    if not unit:
        return float(number)
    if unit not in SECOND_UNITS:
        raise ValueError(_no_unit(unit, SECOND_UNITS, None))
    return float(number * SECOND_UNITS[unit])


def parse_rate(text: str) -> float:
    """Bytes per second in "50 GB/s" or "400 Gbit/s". Raises ValueError saying what is wrong with the text."""
    number, unit = _split(text, 'a rate such as "50 GB/s"')
    if not unit:
        return float(number)
    factor = RATE_UNITS.get(unit)
    if factor is None:
        raise ValueError(_no_unit(unit, RATE_UNITS, None))
    return float(number * factor)


def _split(text: str, wanted: str) -> tuple[Decimal, str]:
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"is not {wanted}")
    return Decimal(match[1]), match[2]


def _no_unit(unit: str, units: Mapping[str, int] | Mapping[str, Decimal], meant: str | None) -> str:
    ambiguous = meant is not None and unit.upper() in ("K", "M", "G", "T")
    hint = f"; say whether you mean {meant}" if ambiguous else ""
    return f'has no unit known here ("{unit}"){hint}; units: {", ".join(units)}'


def format_bytes(num_bytes: float) -> str:
    """A size to read, three digits: "755 MiB", "1.50 GiB"."""
    return _scaled(num_bytes, (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)), "B")


def format_rate(bytes_per_second: float) -> str:
    """A rate to read, three digits: "50.0 GB/s"."""
    scales = (("TB/s", 1e12), ("GB/s", 1e9), ("MB/s", 1e6), ("kB/s", 1e3))
    return _scaled(bytes_per_second, scales, "B/s")


def format_seconds(seconds: float) -> str:
    """A duration to read, three digits: "7.67 ms", "2.00 s"."""
    if seconds >= 120:
        return f"{seconds / 60:.1f} min"
    return _scaled(seconds, (("s", 1), ("ms", 1e-3), ("us", 1e-6)), "s")


def _scaled(value: float, scales: tuple[tuple[str, float], ...], smallest: str) -> str:
    for unit, factor in scales:
        scaled = value / factor
        if scaled >= 0.9995:  # what rounds to 1.00 takes this unit
            digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{digits}f} {unit}"
    return f"{value:.0f} {smallest}"


def exact_bytes(num_bytes: int) -> str | int:
    """The size in its largest unit if that is exact, for writing into a file; `parse_bytes` reads it back."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if num_bytes and num_bytes % BYTE_UNITS[unit] == 0:
            return f"{num_bytes // BYTE_UNITS[unit]} {unit}"
    return num_bytes


def exact_seconds(seconds: float) -> str | float:
    """The duration in ms or s if that is exact, for writing into a file; `parse_seconds` reads it back."""
    unit, scaled = ("ms", seconds * 1000) if seconds < 1 else ("s", seconds)
    text = f"{scaled:.12g} {unit}"
    try:
        return text if parse_seconds(text) == seconds else seconds
    except ValueError:
        return seconds


def exact_rate(bytes_per_second: float) -> str | float:
    """The rate in GB/s or B/s if that is exact, for writing into a file; `parse_rate` reads it back."""
    for unit in ("GB/s", "B/s"):
        text = f"{bytes_per_second / float(RATE_UNITS[unit]):.15g} {unit}"
        try:
            if parse_rate(text) == bytes_per_second:
                return text
        except ValueError:
            continue
    return bytes_per_second
