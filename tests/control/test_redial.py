"""When a peer is dialed again."""

from __future__ import annotations

from tests.control.feeding import D0, D1
from transload.control.redial import LONGEST_PAUSE_SECONDS, Redial


def pauses(redial: Redial, number: int) -> list[float | None]:
    """Of so many dials that fail."""
    found: list[float | None] = []
    for _ in range(number):
        found.append(redial.down(D0))
        assert redial.due(D0)
    return found


def test_pauses_double_up_to_a_limit_and_begin_anew_when_a_link_has_been_up() -> None:
    redial = Redial()
    redial.wanted(D0)
    assert pauses(redial, 4) == [0.1, 0.2, 0.4, 0.8]
    assert pauses(redial, 10)[-1] == LONGEST_PAUSE_SECONDS
    redial.up(D0)
    assert pauses(redial, 2) == [0.1, 0.2]


def test_who_was_not_to_dial_does_not_dial_again() -> None:
    redial = Redial()
    redial.wanted(D0)
    redial.up(D1)
    assert redial.down(D1) is None


def test_a_link_that_fails_and_is_lost_is_dialed_once() -> None:
    redial = Redial()
    redial.wanted(D0)
    assert redial.down(D0) == 0.1
    assert redial.down(D0) is None
    assert redial.due(D0)
    assert not redial.due(D0)


def test_no_dial_is_due_any_more_when_the_link_is_up_or_another_address_was_given() -> None:
    for change in (Redial.up, Redial.wanted):
        redial = Redial()
        redial.wanted(D0)
        redial.down(D0)
        change(redial, D0)
        assert not redial.due(D0)
