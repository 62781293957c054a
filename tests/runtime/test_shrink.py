"""A schedule that fails replays exactly and shrinks to a short story that fails in the same way."""

from __future__ import annotations

import pytest

from tests.runtime.test_harness import MISTAKES
from tests.schedules import draw, play
from tests.shrink import failure_of, shrink, story


def first_failing(most: int = 250) -> int:
    return next(seed for seed in range(most) if failure_of(draw(seed)) is not None)


@pytest.mark.parametrize("name", ["a_preempted_request_forgets_a_token", "a_cancelled_request_keeps_its_blocks"])
def test_a_failing_schedule_shrinks_to_what_its_failure_needs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MISTAKES[name](monkeypatch)
    schedule = draw(first_failing())
    small = shrink(schedule)
    assert failure_of(small) is not None
    assert len(small.asks) <= min(3, len(schedule.asks))
    assert len(story(small).splitlines()) <= 8
    monkeypatch.undo()
    assert failure_of(small) is None, "it is the mistake that fails"


def test_a_schedule_replays_exactly() -> None:
    for seed in (3, 17, 40):
        assert play(seed).events == play(seed).events


def test_a_story_names_everything_that_happens() -> None:
    schedule = draw(next(seed for seed in range(100) if draw(seed).disturbances))
    told = story(schedule)
    assert told.startswith(f"seed {schedule.seed}: workers {schedule.workers};")
    assert len(told.splitlines()) == 2 + len(schedule.asks) + len(schedule.disturbances)
