"""The table of phases: what it allows, what it refuses, and that every way ends."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transload.control.lifecycle import TRANSITIONS, Phase, check_transition

PHASES: tuple[Phase, ...] = get_args(Phase)


def test_every_phase_has_its_line_and_leads_to_phases() -> None:
    assert set(TRANSITIONS) == set(PHASES)
    assert all(following <= set(PHASES) for following in TRANSITIONS.values())


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_can_end_at_once_and_the_end_is_final(phase: Phase) -> None:
    assert ("finished" in TRANSITIONS[phase]) == (phase != "finished")


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_can_be_reached(phase: Phase) -> None:
    reached: set[Phase] = {"queued"}
    for _ in PHASES:
        reached |= {following for here in reached for following in TRANSITIONS[here]}
    assert phase in reached


def test_a_lost_worker_takes_a_request_back_from_any_phase_but_the_end() -> None:
    for phase in PHASES:
        assert ("queued" in TRANSITIONS[phase]) == (phase not in ("queued", "finished"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("queued", "decoding"),  # nothing is decoded that was not prefilled
        ("reserving", "decoding"),
        ("reserving", "transferring"),
        ("transferring", "prefilling"),
        ("decoding", "prefilling"),
        ("decoding", "transferring"),
        ("finished", "queued"),
    ],
)
def test_ways_that_do_not_exist_are_refused(old: Phase, new: Phase) -> None:
    with pytest.raises(AssertionError, match=f"cannot go from {old} to {new}"):
        check_transition(old, new)


@given(st.data())
def test_any_walk_through_the_table_ends_if_nothing_is_started_over(data: st.DataObject) -> None:
    phase: Phase = "queued"
    for _ in PHASES:
        forward = sorted(TRANSITIONS[phase] - {"queued"})
        if not forward:
            break
        following = data.draw(st.sampled_from(forward))
        check_transition(phase, following)
        phase = following
    assert phase == "finished"
