"""Verdicts, case by case: what is claimed, what is simulated, what is said of it."""

from __future__ import annotations

import msgspec
import pytest

from transload.study.claims.record import Figure, Record, Relation
from transload.study.claims.show import error_words, simulated_words, verdict_words
from transload.study.claims.verdict import Curve, Simulated, judge, judge_record


def figure(
    value: float = 10.0,
    relation: Relation = "equal",
    high: float | None = None,
    *,
    key: str = "speed",
    doubt: str = "",
    missing: str = "",
) -> Figure:
    return Figure(
        key=key, metric=key, value=value, high=high, relation=relation, unit="x", doubt=doubt, missing=missing
    )


def simulated(value: float, low: float | None = None) -> Simulated:
    return Simulated(value=value, low=low)


@pytest.mark.parametrize(
    ("relation", "high", "model", "error", "verdict"),
    [
        ("equal", None, simulated(11.0), 0.1, "reproduced"),
        ("equal", None, simulated(12.0), 0.2, "reproduced"),
        ("equal", None, simulated(12.1), 0.21, "does not follow"),
        ("equal", None, simulated(7.9), -0.21, "does not follow"),
        ("within", 20.0, simulated(15.0), 0.0, "reproduced"),
        ("within", 20.0, simulated(9.0), -0.1, "reproduced"),
        ("within", 20.0, simulated(30.0), 0.5, "does not follow"),
        ("range", 20.0, simulated(99.0, low=1.0), 0.0, "reproduced"),
        ("range", 20.0, simulated(19.0, low=11.0), 0.1, "reproduced"),
        ("range", 20.0, simulated(20.0, low=15.0), 0.5, "does not follow"),
        ("range", 20.0, simulated(5.0, low=5.0), -0.75, "does not follow"),
        ("at most", None, simulated(0.5), 0.0, "reproduced"),
        ("at most", None, simulated(15.0), 0.5, "does not follow"),
        ("at least", None, simulated(500.0), 0.0, "reproduced"),
        ("at least", None, simulated(5.0), -0.5, "does not follow"),
        ("up to", None, simulated(99.0, low=1.0), 0.0, "reproduced"),
        ("up to", None, simulated(4.0, low=1.0), -0.6, "does not follow"),
    ],
)
def test_a_figure_is_judged_by_what_was_said_of_it(
    relation: Relation, high: float | None, model: Simulated, error: float, verdict: str
) -> None:
    judged = judge(figure(10.0, relation, high), model)
    assert judged.verdict == verdict
    assert judged.error == pytest.approx(error)


def test_what_is_not_simulated_is_not_checkable_and_says_what_is_missing() -> None:
    judged = judge(figure(missing="the prompt's length"), None)
    assert (judged.verdict, judged.error, judged.reason) == ("not checkable", None, "the prompt's length")


def test_what_is_missing_is_not_made_up_for_by_a_simulation_but_that_may_tell_where_it_would_hold() -> None:
    curve = Curve(along="kW a rack", points=((50.0, 40.0), (100.0, 20.0)))
    judged = judge(figure(30.0, missing="the power of a rack"), Simulated(value=30.0, curve=curve))
    assert (judged.verdict, judged.error, judged.reason) == ("not checkable", None, "the power of a rack")
    assert judged.holds_at == "holds at 75 kW a rack"


def test_what_does_not_follow_names_the_assumption_it_hangs_on() -> None:
    assert judge(figure(doubt="the batch"), simulated(100.0)).reason == "the batch"
    assert judge(figure(doubt="the batch"), simulated(100.0), "the engine").reason == "the batch"
    assert judge(figure(), simulated(100.0), "the engine").reason == "the engine"
    assert "above" in judge(figure(), simulated(100.0)).reason
    assert judge(figure(doubt="the batch"), simulated(10.0)).reason == ""


def test_a_curve_says_where_a_claim_would_hold() -> None:
    curve = Curve(along="kW a rack", points=((50.0, 40.0), (100.0, 20.0), (200.0, 10.0)))
    assert judge(figure(30.0), Simulated(value=20.0, curve=curve)).holds_at == "holds at 75 kW a rack"
    assert judge(figure(50.0), Simulated(value=20.0, curve=curve)).holds_at == "holds nowhere from 50 to 200 kW a rack"


def test_a_claim_outside_the_tolerance_but_inside_the_interval_is_told() -> None:
    model = Simulated(value=14.0, interval=(0.6, 1.4))
    judged = judge(figure(), model)
    assert (judged.verdict, judged.inside_interval) == ("does not follow", True)
    assert simulated_words(judged, with_interval=True) == "14 (8.4 to 19.6)"


def _record(*figures: Figure) -> Record:
    return Record(
        id="someone.something", title="t", kind="measured", source="s", confidence="high", setup={}, figures=figures
    )


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ({"a": 10.0, "b": 10.5}, "reproduced"),
        ({"a": 10.0, "b": 99.0}, "in part"),
        ({"a": 99.0, "b": 99.0}, "does not follow"),
        ({"a": 10.0}, "reproduced"),
        ({}, "not checkable"),
    ],
)
def test_a_claim_is_judged_by_the_figures_that_were_checked(values: dict[str, float], verdict: str) -> None:
    record = _record(figure(key="a"), figure(key="b"))
    finding = judge_record(record, {key: simulated(value) for key, value in values.items()})
    assert finding.verdict == verdict
    assert len(finding.figures) == 2


def test_the_verdict_in_words_tells_the_largest_error_of_what_was_reproduced() -> None:
    finding = judge_record(_record(figure(key="a"), figure(key="b")), {"a": simulated(10.0), "b": simulated(8.8)})
    assert verdict_words(finding) == "reproduced within 12%"
    assert error_words(finding.figures[1]) == "-12%"


def test_a_bound_that_holds_is_not_called_an_error_of_nothing() -> None:
    assert error_words(judge(figure(10.0, "at most"), simulated(3.0))) == "holds"


def test_simulating_what_nobody_claimed_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="nobody claimed"):
        judge_record(_record(figure(key="a")), {"z": simulated(1.0)})


def test_findings_survive_json() -> None:
    finding = judge_record(_record(figure(key="a")), {"a": simulated(10.0)})
    assert msgspec.json.decode(msgspec.json.encode(finding), type=type(finding)) == finding
