"""A number and where it comes from. No number of the catalog exists without its source and its class.

Owns units and provenance. Never derates a number: a peak is a peak, and efficiency is the cost model's business.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from decimal import Decimal
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Kind = Literal["datasheet", "measured", "vendor claim", "estimate", "assumption"]
"""How a number is known. `assumption` is the user's own and never stands in a file of the catalog."""
Confidence = Literal["high", "medium", "low"]
Text = Annotated[str, Meta(min_length=1, max_length=2000)]
Slug = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]

_PREFIXES = {"": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40}


def _units() -> dict[str, tuple[str, Decimal]]:
    """Every unit a file may use, with the base unit it is turned into and the factor."""
    units: dict[str, tuple[str, Decimal]] = {
        **{unit: (unit, Decimal(1)) for unit in ("s", "USD", "USD/h", "count", "parameters")},
        "ms": ("s", Decimal("1e-3")),
        "us": ("s", Decimal("1e-6")),
        "ns": ("s", Decimal("1e-9")),
    }
    for prefix, power in _PREFIXES.items():
        factor = Decimal(10) ** power
        units[f"{prefix}B"] = ("B", factor)
        units[f"{prefix}B/s"] = ("B/s", factor)
        units[f"{prefix}b/s"] = ("B/s", factor / 8)
        units[f"{prefix}FLOP/s"] = ("FLOP/s", factor)
        units[f"{prefix}W"] = ("W", factor)
    for prefix, power in _BINARY.items():
        units[f"{prefix}B"] = ("B", Decimal(2) ** power)
        units[f"{prefix}B/s"] = ("B/s", Decimal(2) ** power)
    return units


UNITS = _units()
BASE_UNITS = tuple(dict.fromkeys(base for base, _ in UNITS.values()))
_AMOUNT = re.compile(r"\s*([-+]?[0-9_]*\.?[0-9_]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z/]*)\s*")


def in_base_unit(value: float, unit: str) -> tuple[float, str]:
    """`(3.35, "TB/s")` to `(3.35e12, "B/s")`. Raises ValueError for a unit that does not exist."""
    found = UNITS.get(unit)
    if found is None:
        close = difflib.get_close_matches(unit, UNITS, n=1, cutoff=0.5)
        guess = f'; did you mean "{close[0]}"?' if close else ""
        raise ValueError(
            f'no such unit "{unit}"{guess or ";"} base units: {", ".join(BASE_UNITS)}, with k, M, G, T, P before'
        )
    base, factor = found
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a number to calculate with")
    # Through decimals, so that 2.039 TB/s is 2039000000000 and not ...000.0002.
    return float(Decimal(repr(value)) * factor), base


def parse_amount(text: str) -> tuple[float, str | None]:
    """`"20 PFLOP/s"` to `(2e16, "FLOP/s")`; no unit: None. Raises ValueError."""
    match = _AMOUNT.fullmatch(text)
    if match is None:
        raise ValueError(f'"{text}" is not a number with a unit, such as "20 PFLOP/s"')
    value, base = in_base_unit(float(match[1]), match[2] or "count")
    return value, base if match[2] else None


def format_amount(value: float, unit: str) -> str:
    """A number to read: `3.35 TB/s`, `80 GB`, `10 us`, `$1.69/h`."""
    if unit in ("USD", "USD/h"):
        return f"${value:,.2f}{unit[3:]}" if value < 10_000 else f"${value:,.0f}{unit[3:]}"
    if unit == "count":
        return f"{value:,.0f}" if value == int(value) else f"{value:g}"
    if unit == "parameters":
        return f"{value / 1e9:,.2f} B" if value >= 1e9 else f"{value / 1e6:,.1f} M"
    if unit == "s":
        scaled, prefix = next(
            ((value * 10**power, name) for name, power in (("", 0), ("m", 3), ("u", 6)) if value * 10**power >= 1),
            (value * 1e9, "n"),
        )
    else:
        scaled, prefix = next(
            ((value / 10**power, name) for name, power in reversed(_PREFIXES.items()) if value >= 10**power),
            (value, ""),
        )
        if prefix == "P" and unit != "FLOP/s" and unit != "B/s":
            scaled, prefix = scaled * 1000, "T"
    return f"{scaled:,.4g} {prefix}{unit}" if scaled < 1000 else f"{scaled:,.0f} {prefix}{unit}"


class Conflict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What another source says of the same number. Kept beside the number that is used, never averaged in."""

    value: float
    unit: Text
    source: Text
    note: str = ""

    def __post_init__(self) -> None:
        value, unit = in_base_unit(self.value, self.unit)
        msgspec.structs.force_setattr(self, "value", value)
        msgspec.structs.force_setattr(self, "unit", unit)


class Quantity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One number. Files may write `3.35 TB/s`; `value` and `unit` here are always in base units (B, B/s, FLOP/s,
    s, W, USD, USD/h, count, parameters). For int8, FLOP/s counts integer operations."""

    value: Annotated[float, Meta(ge=0)]
    unit: Text
    source: Text | Annotated[tuple[Text, ...], Meta(min_length=1)]
    """Keys of `sources.yaml`, or in a user's own file any words that say where the number is from."""
    kind: Kind = msgspec.field(name="class")
    confidence: Confidence = "medium"
    note: str = ""
    conflicts: tuple[Conflict, ...] = ()

    def __post_init__(self) -> None:
        value, unit = in_base_unit(self.value, self.unit)
        msgspec.structs.force_setattr(self, "value", value)
        msgspec.structs.force_setattr(self, "unit", unit)
        for conflict in self.conflicts:
            if conflict.unit != unit:
                raise ValueError(f'a conflict is in {conflict.unit}, the number itself in "{unit}"')

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,) if isinstance(self.source, str) else self.source

    def __str__(self) -> str:
        return format_amount(self.value, self.unit)


class Figure(Quantity, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A number with a name of its own: a price by one of several sources, a point of a measured curve."""

    name: Text
    at: dict[str, str | float] = {}
    """Under which conditions, such as `{ranks: 64, operation: dispatch}`."""


class Unknown(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why a number is missing. The number itself may be left out without one; this is for telling the user."""

    quantity: Text
    """Path of the number, such as `dense_flops.fp4`; `dense_flops` stands for all of them."""
    why: Text


class Assumption(msgspec.Struct, frozen=True, kw_only=True):
    """A number that the user supplies, in base units. It is listed with every result that uses it."""

    subject: str
    """Id of the chip or link."""
    quantity: str
    value: float
    unit: str | None
    """None: written without a unit, so it is in the quantity's base unit."""

    def __str__(self) -> str:
        amount = f"{self.value:g}" if self.unit is None else format_amount(self.value, self.unit)
        return f"{self.subject}.{self.quantity} = {amount}"


def kinds_of(quantities: Iterable[Quantity]) -> dict[Kind, int]:
    """How many numbers of each class a result rests on, most solid first."""
    order: tuple[Kind, ...] = ("datasheet", "measured", "vendor claim", "estimate", "assumption")
    used = [quantity.kind for quantity in quantities]
    return {kind: used.count(kind) for kind in order if kind in used}
