"""What two steps say of a machine's speed, and which of a step's two durations counts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from types import SimpleNamespace
from typing import cast

import pytest

from transload.hardware.measured import Reference, Slowdown
from transload.study.calibrate.probes import Probe, StepOrder, StepTimes
from transload.study.calibrate.reference import PROMPT, ROUNDS, drift, measure_reference, typical
from transload.study.validate.drift import DriftWatch, is_noticed


class Machine:
    """A probe of a machine whose speed changes: each measurement of a prompt begins with the next of its speeds."""

    def __init__(self, *speeds: float, threads: int = 1, device: str = "cpu") -> None:
        self.plan = SimpleNamespace(threads=threads, device=device)
        self._speeds: Iterator[float] = cycle(speeds)
        self._speed = 1.0

    def measure(self, order: StepOrder) -> StepTimes:
        if order == PROMPT:
            self._speed = next(self._speeds)
        seconds = (0.4 if order.prefill else 0.05) / self._speed
        steps = (9.0, *[seconds] * (order.repeats - 1))  # the first one grows scratch memory
        waited = tuple(step * 3 for step in steps)  # others wanted the core
        return StepTimes(started=tuple(0.0 for _ in steps), seconds=waited, cpu_seconds=steps)

    def alone_seconds(self, times: StepTimes) -> tuple[float, ...]:
        return Probe.alone_seconds(cast(Probe, self), times)


def probe(*speeds: float, threads: int = 1, device: str = "cpu") -> Probe:
    return cast(Probe, Machine(*speeds, threads=threads, device=device))


def test_waiting_for_a_core_is_not_computing() -> None:
    found = measure_reference(probe(1.0))
    assert found == Reference(prefill_seconds=0.4, decode_seconds=0.05)


@pytest.mark.parametrize(("threads", "device"), [(2, "cpu"), (1, "cuda:0")])
def test_processor_time_says_nothing_of_several_threads_or_of_a_gpu(threads: int, device: str) -> None:
    found = measure_reference(probe(1.0, threads=threads, device=device))
    assert found.prefill_seconds == pytest.approx(1.2)


def test_a_short_stall_is_not_the_machines_speed() -> None:
    assert measure_reference(probe(1.0, 0.2, 1.0), rounds=3) == measure_reference(probe(1.0))


def test_around_a_load_is_between_before_and_after() -> None:
    watch = DriftWatch(probe(*[1.0] * ROUNDS, *[0.8] * ROUNDS, *[0.8] * ROUNDS))
    since = measure_reference(probe(1.0))
    first, second = drift(since, watch.around()), drift(since, watch.around())
    assert first.prefill == pytest.approx((1 + 1.25) / 2)
    assert second.prefill == pytest.approx(1.25)
    assert is_noticed(first)
    assert not is_noticed(Slowdown(prefill=0.97, decode=1.03))


def test_a_typical_look_is_no_outlier() -> None:
    looks = [Reference(prefill_seconds=seconds, decode_seconds=0.1) for seconds in (0.4, 0.41, 2.0)]
    assert typical(looks).prefill_seconds == 0.41
