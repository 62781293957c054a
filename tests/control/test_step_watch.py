"""When a step counts as hung."""

from __future__ import annotations

from tests.control.feeding import a_request
from transload.control.messages import Chunk, RunStep
from transload.control.step_watch import FIRST_LIMIT_SECONDS, LEAST_LIMIT_SECONDS, StepWatch


def a_step(num_tokens: int, start: int = 0) -> RunStep:
    return RunStep(3, (Chunk(a_request(1, 4), start, num_tokens, (), (), samples=False, num_outputs=0),))


def seen(*steps: tuple[RunStep, float]) -> StepWatch:
    """A watch that has seen these steps."""
    watch = StepWatch()
    for step, seconds in steps:
        watch.begin(step)
        watch.end(seconds)
    return watch


def test_the_first_step_has_time() -> None:
    assert StepWatch().limit_seconds(a_step(512)) == FIRST_LIMIT_SECONDS


def test_a_step_may_take_many_times_what_one_of_no_more_work_took() -> None:
    watch = seen((a_step(500), 10.0), (a_step(1), 0.1))
    assert watch.limit_seconds(a_step(500)) == 200
    assert watch.limit_seconds(a_step(1)) == LEAST_LIMIT_SECONDS
    assert watch.limit_seconds(a_step(4000)) == 8 * 200
    assert seen((a_step(500), 10.0)).limit_seconds(a_step(1)) == 200  # nothing smaller was seen


def test_context_is_work_too() -> None:
    watch = seen((a_step(256), 10.0))
    assert watch.limit_seconds(a_step(256, start=16_000)) > watch.limit_seconds(a_step(256))


def test_a_step_that_does_not_return_is_told_once_its_ticks_are_over() -> None:
    watch = seen((a_step(8), 3.0))
    assert watch.tick(1e9) is None, "no step is under way"
    watch.begin(a_step(8))
    assert [watch.tick(1.0) for _ in range(60)] == [None] * 60
    reason = watch.tick(1.0)
    assert reason is not None
    assert "step 3 of 1 requests has not returned for 61 s" in reason
    watch.end(None)
    assert watch.tick(1e9) is None


def test_a_step_that_has_to_load_weights_has_as_long_as_a_first_one_for_that() -> None:
    watch = seen((a_step(8), 1.0))
    watch.begin(a_step(8))
    assert [watch.tick(1.0, is_loading=True) for _ in range(300)] == [None] * 300
    assert [watch.tick(1.0) for _ in range(30)] == [None] * 30, "its own time begins when they are there"
    watch.end(320.0)
    assert watch.limit_seconds(a_step(8)) == LEAST_LIMIT_SECONDS, "others need not be that slow"
    watch.begin(a_step(8))
    reason = watch.tick(301.0, is_loading=True)
    assert reason is not None
    assert "step 3 of 1 requests has been loading weights for 301 s" in reason


def test_a_failed_step_teaches_nothing() -> None:
    watch = StepWatch()
    watch.begin(a_step(8))
    watch.end(None)
    assert watch.limit_seconds(a_step(8)) == FIRST_LIMIT_SECONDS
