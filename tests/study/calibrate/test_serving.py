"""What event logs say of serving: played in virtual time, where the true answers are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.study.calibrate.test_fit import section
from tests.world import World
from transload.hardware.cost.measured import MeasuredStepCost
from transload.hardware.measured import DecodePoint, PrefillPoint
from transload.runtime.cost import LinearCost
from transload.runtime.event_log import EventLog
from transload.study.calibrate.serving import front_end_cpu, observe_serving
from transload.study.metrics import RequestRecord
from transload.study.timeline import TimelineRecorder

STEP, MESSAGE, FRONT_END = 0.010, 0.002, 0.030


def test_messages_slowdown_and_front_end_are_read_from_the_logs(tmp_path: Path) -> None:
    cost = LinearCost(
        step_floor_seconds=STEP,
        seconds_per_token=0.0,
        seconds_per_context_token=0.0,
        control_latency_seconds=MESSAGE,
    )
    world = World("p0 d0", cost=cost)
    arrivals = [10.0 + 2.0 * number for number in range(5)]
    for number, at in enumerate(arrivals):
        world.ask(at, [number] * 12, 9)
    world.run()
    logs = {who: EventLog(tmp_path, who) for who in {who for _, who, _ in world.events}}
    recorder = TimelineRecorder()
    for now, who, event in world.events:
        logs[who].write(now, event)
        recorder.observe(now, who, event)
    for log in logs.values():
        log.close()
    timeline = recorder.timeline()
    first_token = [
        next(stage.start_seconds for stage in request.stages if stage.name in ("transfer", "decode queue", "decode"))
        - request.start_seconds
        for request in timeline.requests
    ]
    records = [
        RequestRecord(
            index=index,
            due_seconds=0.0,
            start_seconds=0.0,
            end_seconds=9.0,
            token_seconds=[seconds + FRONT_END],
            num_input_tokens=12,
            num_output_tokens=9,
            num_output_asked=9,
        )
        for index, seconds in enumerate(first_token)
    ]
    bare = MeasuredStepCost(
        section(
            prefill=(PrefillPoint(tokens=12, seconds=STEP / 2),),
            decode=(DecodePoint(requests=1, fixed_seconds=STEP / 4, context_token_seconds=0.0),),
        )
    )
    seen = observe_serving(tmp_path, timeline, records, bare)
    assert seen.message_seconds == pytest.approx(MESSAGE, rel=0.01)
    assert seen.serving.prefill == pytest.approx(2.0, rel=0.01)
    assert seen.serving.decode == pytest.approx(4.0, rel=0.01)
    assert seen.request_seconds == pytest.approx(FRONT_END, rel=0.01)
    assert seen.step_gap_seconds == pytest.approx(0.0, abs=1e-5)


def test_cpu_of_requests_and_tokens_is_told_apart_by_two_loads() -> None:
    def spent(requests: int, tokens: int) -> tuple[int, int, float]:
        return requests, tokens, requests * 0.02 + tokens * 0.0005

    found = front_end_cpu(spent(20, 160), spent(20, 960), 0.004)
    assert found.request_cpu_seconds == pytest.approx(0.02)
    assert found.token_cpu_seconds == pytest.approx(0.0005)


def test_cpu_that_makes_no_sense_is_all_put_down_to_tokens() -> None:
    found = front_end_cpu((10, 100, 0.01), (10, 200, 0.5), 0.0)
    assert found.request_cpu_seconds == 0.0
    assert found.token_cpu_seconds == pytest.approx(0.51 / 300)
