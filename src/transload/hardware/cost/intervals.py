"""How far a simulated duration may be off, by what it rests on. The factors are the spread of measured over simulated,
written by a script (`scripts/make_accuracy_docs.py`), never a guess at run time."""

from __future__ import annotations

from functools import cache
from typing import Literal

import msgspec

from transload.hardware.chip import Chip
from transload.hardware.cost.efficiency import FOLDER, ClassName, Efficiency
from transload.hardware.cost.known import known
from transload.hardware.model_card import ModelCard
from transload.hardware.quantity import Kind

Basis = Literal["fitted", "unseen", "claimed"]
"""fitted: points of this chip are in the fit. unseen: of its class, with published peaks; the spread of the chips left
out of the fit one by one. claimed: of its class, but its own numbers are claims or estimates; twice that spread."""
Duration = Literal["tpot", "ttft"]


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """Factors on a duration: 80 % of the measured ones lay within."""

    low: float
    high: float


class _Intervals(msgspec.Struct, frozen=True, kw_only=True):
    dense: dict[Duration, dict[Basis, Interval]]
    experts: dict[Duration, dict[Basis, Interval]]
    classes: dict[ClassName, Interval]
    """Of the classes that nobody measured here."""


@cache
def _intervals() -> _Intervals:
    return msgspec.json.decode((FOLDER / "intervals.json").read_bytes(), type=_Intervals)


def basis_of(chip: Chip, efficiency: Efficiency) -> Basis:
    """What the durations of a chip of a measured class rest on."""
    weak: tuple[Kind, ...] = ("vendor claim", "estimate", "assumption")
    numbers = [quantity for path, quantity in known(chip).items() if path.startswith(("dense_flops", "memory."))]
    if chip.id in efficiency.chips and not any(quantity.kind == "assumption" for quantity in numbers):
        return "fitted"
    return "claimed" if any(quantity.kind in weak for quantity in numbers) else "unseen"


def interval_of(
    chip: Chip, card: ModelCard, efficiency: Efficiency, duration: Duration = "tpot"
) -> tuple[float, float]:
    """(low, high) factors for a worker's durations: of its steps (TPOT), or of what a request waits for its first
    token (TTFT), where clients and front ends come in."""
    table = _intervals()
    if efficiency.measured:
        found = (table.dense if card.experts is None else table.experts)[duration][basis_of(chip, efficiency)]
    else:
        found = table.classes[efficiency.name]
    return found.low, found.high
