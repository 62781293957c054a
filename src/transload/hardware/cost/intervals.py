"""How far a simulated duration may be off, by what it rests on. The factors are fitted residuals, never a guess at run
time."""

from __future__ import annotations

from functools import cache
from typing import Literal

import msgspec

from transload.hardware.chip import Chip
from transload.hardware.cost.efficiency import FOLDER, Efficiency
from transload.hardware.model_card import ModelCard
from transload.hardware.quantity import Kind

Basis = Literal["fitted", "unseen", "class"]
"""fitted: points of this chip are in the fit. unseen: the chip's class is fitted, from other chips (leave-one-chip-out
residuals). class: nobody measured a chip of this class here."""


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """Factors on a duration: 80 % of the measured ones lay within."""

    low: float
    high: float


class _Intervals(msgspec.Struct, frozen=True, kw_only=True):
    dense: dict[Basis, Interval]
    experts: dict[Basis, Interval]


@cache
def _intervals() -> _Intervals:
    return msgspec.json.decode((FOLDER / "intervals.json").read_bytes(), type=_Intervals)


def basis_of(chip: Chip, efficiency: Efficiency) -> Basis:
    """What a chip's durations rest on."""
    if not efficiency.measured:
        return "class"
    weak: tuple[Kind, ...] = ("vendor claim", "estimate", "assumption")
    numbers = [quantity for path, quantity in chip.quantities() if path.startswith(("dense_flops", "memory."))]
    if chip.id in efficiency.chips and not any(quantity.kind == "assumption" for quantity in numbers):
        return "fitted"
    if any(quantity.kind in weak for quantity in numbers):
        return "class"
    return "unseen"


def interval_of(chip: Chip, card: ModelCard, efficiency: Efficiency) -> tuple[float, float]:
    """(low, high) factors for a worker's durations."""
    table = _intervals().experts if card.experts is not None else _intervals().dense
    found = table[basis_of(chip, efficiency)]
    return found.low, found.high
