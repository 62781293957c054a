"""Probe processes measure real steps, alone and beside each other, and say what they cannot do."""

from __future__ import annotations

import pytest

from transload.deploy.machine import read_machine
from transload.deploy.placement import place
from transload.deploy.resolve import resolve
from transload.errors import TransloadError
from transload.model.source import locate
from transload.study.calibrate.probes import StepOrder, measure_together, probes


@pytest.mark.slow
def test_steps_are_measured_in_processes_of_their_own() -> None:
    deployment = resolve(None, "1p1d", [])
    plans = place(deployment, read_machine(), locate(deployment.model).arch).workers
    with probes(plans) as (first, second):
        assert first.load_seconds > 0
        short = first.measure(StepOrder(prefill=((0, 16),), repeats=3))
        long = first.measure(StepOrder(prefill=((0, 256),), repeats=3))
        assert len(short.seconds) == 3
        assert min(long.seconds) > min(short.seconds)
        decoding, prefilling = measure_together(
            [
                (first, StepOrder(decode=(64, 64), repeats=2, seconds=0.5)),
                (second, StepOrder(prefill=((0, 32),), repeats=2, seconds=0.5)),
            ]
        )
        assert decoding.seconds
        assert prefilling.seconds
        with pytest.raises(TransloadError, match="needs more than the 2048 blocks"):
            first.measure(StepOrder(decode=(4000,) * 64))
        assert first.measure(StepOrder(decode=(64,))).seconds  # it goes on after a refusal
