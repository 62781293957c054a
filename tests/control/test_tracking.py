"""A tracked request: tokens in order and once, whatever their way; stages without gaps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.control.feeding import D0, P0, a_request, a_token
from transload.control.tracking import Tracked
from transload.runtime.records import waterfall

REQUEST = a_request(1, 6, max_tokens=8)


@given(st.permutations(range(6)), st.lists(st.integers(0, 5), max_size=6))
def test_tokens_in_any_order_and_number_come_out_in_order_and_once(order: list[int], again: list[int]) -> None:
    tracked, out = Tracked(REQUEST, 0.0), list[int]()
    for index in [*order, *again]:
        out += [token.index for token in tracked.take_token(a_token(REQUEST, index))]
    assert out == list(range(6))
    assert tracked.outputs == [1000 + index for index in range(6)]
    assert not tracked.pending


def test_a_token_that_comes_early_waits() -> None:
    tracked = Tracked(REQUEST, 0.0)
    assert tracked.take_token(a_token(REQUEST, 1)) == []
    assert tracked.outputs == []
    assert [token.index for token in tracked.take_token(a_token(REQUEST, 0))] == [0, 1]


def test_tokens_of_another_attempt_do_not_count() -> None:
    tracked = Tracked(REQUEST, 0.0)
    tracked.take_token(a_token(REQUEST, 0))
    tracked.take_token(a_token(REQUEST, 2))  # waits for the one before it
    tracked.enter("prefilling")
    tracked.start_over()
    assert tracked.take_token(a_token(REQUEST, 1)) == []
    assert [token.index for token in tracked.take_token(a_token(REQUEST, 1, epoch=1))] == [1]
    assert tracked.num_known == 8


def test_an_attempt_starts_with_what_was_made_and_nothing_else() -> None:
    tracked = Tracked(REQUEST, 0.0)
    tracked.decode, tracked.prefill, tracked.handed_over = D0, P0, True
    tracked.take_token(a_token(REQUEST, 0))
    assert list(tracked.workers()) == [D0, P0]
    tracked.enter("prefilling")
    tracked.start_over()
    assert list(tracked.workers()) == []
    assert (tracked.phase, tracked.epoch, tracked.handed_over, tracked.outputs) == ("queued", 1, False, [1000])


def test_a_phase_may_be_entered_again_but_not_jumped_to() -> None:
    tracked = Tracked(REQUEST, 0.0)
    tracked.enter("queued")
    with pytest.raises(AssertionError, match="cannot go from queued to decoding"):
        tracked.enter("decoding")


def test_the_waterfall_has_no_gaps_and_sums_to_the_whole() -> None:
    tracked = Tracked(REQUEST, 10.0)
    tracked.begin_stage("prefill", P0, 10.5)
    tracked.begin_stage("transfer", D0, 11.0).detail["bytes"] = 3
    running = waterfall(tracked, now=11.25)
    assert [(stage.name, stage.start_seconds, stage.seconds) for stage in running.stages] == [
        ("queue", 0.0, 0.5),
        ("prefill", 0.5, 0.5),
        ("transfer", 1.0, 0.25),
    ]
    assert running.total_seconds == 1.25
    tracked.ended_at = 12.0
    ended = waterfall(tracked, now=99.0)
    assert sum(stage.seconds for stage in ended.stages) == ended.total_seconds == 2.0
    assert ended.stages[2].detail == {"bytes": 3}
