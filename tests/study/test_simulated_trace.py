"""Traces of simulations: the same code as for real runs, complete whether steps were gone through at once or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.study.test_trace_events import check_format
from transload.study.simulate import simulate
from transload.study.timeline import Timeline, TimelineRecorder
from transload.study.trace_events import trace_events
from transload.study.workload import Fixed, Poisson, Synthetic, synthetic

DEPLOYMENT = Path(__file__).parents[2] / "deployments" / "b200-pd.yaml"
NUM_REQUESTS, NUM_OUTPUT = 30, 40


def simulated(*, jumps: bool) -> tuple[Timeline, int]:
    workload = synthetic(
        Synthetic(arrivals=Poisson(20.0), input=Fixed(700), output=Fixed(NUM_OUTPUT), num_requests=NUM_REQUESTS, seed=3)
    )
    recorder = TimelineRecorder()
    result = simulate(DEPLOYMENT, workload, timeline=recorder, jumps=jumps)
    return recorder.timeline(), sum(pool.num_decode_tokens for pool in result.pools)


@pytest.mark.parametrize("jumps", [True, False])
def test_a_simulation_has_all_its_steps_requests_and_handoffs_in_the_trace(jumps: bool) -> None:
    timeline, num_decode_tokens = simulated(jumps=jumps)
    assert sum(step.num_prefill_tokens for step in timeline.steps) == NUM_REQUESTS * 700
    assert sum(step.num_decode * step.num_steps for step in timeline.steps) == num_decode_tokens
    assert [request.end for request in timeline.requests] == ["length"] * NUM_REQUESTS
    assert {request.num_outputs for request in timeline.requests} == {NUM_OUTPUT}
    assert len(timeline.transfers) == NUM_REQUESTS
    trace = trace_events(timeline, simulated=True)
    check_format(trace)
    assert {event["ph"] for event in trace["traceEvents"]} >= {"X", "b", "e", "s", "f", "C", "M"}
