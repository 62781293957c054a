"""Judges a simulated value against a claimed one. Arithmetic and words only; simulates nothing.

A figure is *reproduced* where the simulated value is within 20 % of the claimed one, the error the cost model aims at
for a chip nobody measured. Otherwise it *does not follow*, and the record says from which assumption. What cannot be
simulated is *not checkable*, and the record says what is missing.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import msgspec

from transload.study.claims.record import Figure, Record

TOLERANCE = 0.20
Verdict = Literal["reproduced", "does not follow", "not checkable"]
Overall = Literal["reproduced", "in part", "does not follow", "not checkable"]


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """The simulated value over a quantity that nobody has published, to read off where a claim would hold."""

    along: str
    """Name of the quantity, with its unit, such as `kW a rack`."""
    points: tuple[tuple[float, float], ...]
    """(quantity, simulated value), the quantity ascending."""

    def where(self, value: float) -> float | None:
        """The first quantity at which the curve takes the value, straight lines between points; None if nowhere."""
        for (x, y), (next_x, next_y) in pairwise(self.points):
            if min(y, next_y) <= value <= max(y, next_y):
                return x if y == next_y else x + (next_x - x) * (value - y) / (next_y - y)
        return None


class Simulated(msgspec.Struct, frozen=True, kw_only=True):
    """What the model says of one figure, in the figure's unit."""

    value: float
    low: float | None = None
    """The lowest value where the setting was swept; `value` is the highest then."""
    interval: tuple[float, float] | None = None
    """Times these: the error interval of the class the value rests on."""
    basis: str = ""
    """How it was computed, in a few words."""
    curve: Curve | None = None


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """One figure with its verdict."""

    key: str
    metric: str
    unit: str
    claimed: str
    """In words: `3.3`, `2 to 30`, `up to 0.42`."""
    simulated: Simulated | None
    error: float | None
    """Simulated over claimed, less one; None where nothing is compared. For bounds that hold: 0."""
    verdict: Verdict
    reason: str = ""
    """From which assumption it does not follow, or what is missing."""
    holds_at: str = ""
    """Where on the curve the claim would hold."""
    inside_interval: bool | None = None
    """Whether the claimed value lies in the simulated interval."""
    fitted: bool = False


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """A claim with its figures judged."""

    record: Record
    figures: tuple[Judged, ...]
    verdict: Overall
    worst_error: float | None
    """Largest absolute error of the figures that were reproduced."""
    assumptions: tuple[str, ...] = ()
    """Numbers that the simulations took for granted."""
    basis: str = ""
    """How the setting was simulated."""

    def counts(self) -> tuple[int, int, int]:
        """Figures reproduced, not following, not checkable."""
        verdicts = [figure.verdict for figure in self.figures]
        return verdicts.count("reproduced"), verdicts.count("does not follow"), verdicts.count("not checkable")


def judge_record(
    record: Record, simulated: dict[str, Simulated], assumptions: tuple[str, ...] = (), basis: str = ""
) -> Finding:
    """All figures of a record. Every one gets a verdict, whether simulated or not."""
    stray = set(simulated) - {figure.key for figure in record.figures}
    assert not stray, f"{record.id}: simulated what nobody claimed: {stray}"
    figures = tuple(judge(figure, simulated.get(figure.key), record.doubt) for figure in record.figures)
    verdicts = {figure.verdict for figure in figures}
    checked = verdicts - {"not checkable"}
    overall: Overall
    match sorted(checked):
        case []:
            overall = "not checkable"
        case ["reproduced"]:
            overall = "reproduced"
        case ["does not follow"]:
            overall = "does not follow"
        case _:
            overall = "in part"
    errors = [abs(f.error) for f in figures if f.verdict == "reproduced" and f.error is not None]
    return Finding(
        record=record,
        figures=figures,
        verdict=overall,
        worst_error=max(errors, default=None),
        assumptions=assumptions,
        basis=basis,
    )


def judge(figure: Figure, simulated: Simulated | None, doubt: str = "") -> Judged:
    """One figure. Nothing simulated, no number claimed, or something missing: not checkable, for the reason the record
    gives, though what was simulated may tell where the claim would hold. `doubt`: the record's, for a figure without
    its own."""
    blank = Judged(
        key=figure.key,
        metric=figure.metric,
        unit=figure.unit,
        claimed=claimed_words(figure),
        simulated=simulated,
        error=None,
        verdict="not checkable",
        reason=figure.missing or "nobody has simulated it yet",
        fitted=figure.fitted,
    )
    if simulated is None or figure.value is None:
        return blank
    if figure.missing:
        return msgspec.structs.replace(blank, holds_at=_holds_at(figure.value, simulated))
    error = _error(figure, figure.value, simulated)
    reproduced = abs(error) <= TOLERANCE
    return msgspec.structs.replace(
        blank,
        error=error,
        verdict="reproduced" if reproduced else "does not follow",
        reason="" if reproduced else figure.doubt or doubt or _unexplained(error),
        holds_at=_holds_at(figure.value, simulated),
        inside_interval=_inside(figure, simulated),
    )


def claimed_words(figure: Figure) -> str:
    """The claim as it is printed, without its unit."""
    if figure.value is None:
        return figure.words
    match figure.relation:
        case "within" | "range":
            return f"{number(figure.value)} to {number(figure.high or 0.0)}"
        case "at most" | "at least" | "up to":
            return f"{figure.relation} {number(figure.value)}"
        case _:
            return number(figure.value)


def number(value: float) -> str:
    """Three significant digits, thousands apart."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _error(figure: Figure, claimed: float, simulated: Simulated) -> float:
    """How far the simulated value is off, as a share of the claimed one; 0 where a bound or a range holds."""
    value = simulated.value
    match figure.relation:
        case "equal":
            return _off(value, claimed)
        case "within":
            assert figure.high is not None
            if claimed <= value <= figure.high:
                return 0.0
            return _off(value, claimed if value < claimed else figure.high)
        case "range":
            assert figure.high is not None
            assert simulated.low is not None, f"{figure.key}: a range needs the lowest value too"
            # What is simulated must reach from one end to the other; it may go beyond.
            return max(max(0.0, _off(simulated.low, claimed)), min(0.0, _off(value, figure.high)), key=abs)
        case "at most":
            return max(0.0, _off(value, claimed))
        case "at least" | "up to":
            return min(0.0, _off(value, claimed))


def _off(value: float, claimed: float) -> float:
    """Share of the claimed value; of 1 where that is 0."""
    return (value - claimed) / (abs(claimed) or 1.0)


def _unexplained(error: float) -> str:
    return f"the model is {'above' if error > 0 else 'below'} it, and nothing in the setting explains that"


def _holds_at(claimed: float, simulated: Simulated) -> str:
    curve = simulated.curve
    if curve is None or not curve.points:
        return ""
    found = curve.where(claimed)
    if found is not None:
        return f"holds at {number(found)} {curve.along}"
    low, high = curve.points[0][0], curve.points[-1][0]
    return f"holds nowhere from {number(low)} to {number(high)} {curve.along}"


def _inside(figure: Figure, simulated: Simulated) -> bool | None:
    if simulated.interval is None or figure.value is None:
        return None
    low, high = simulated.interval
    bottom = simulated.value * low if simulated.low is None else simulated.low * low
    return bottom <= figure.value <= simulated.value * high
