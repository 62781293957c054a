"""What two steps say of a machine's speed, and which of a step's two durations counts."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest

from transload.deploy.plan import WorkerPlan
from transload.errors import TransloadError
from transload.hardware.measured import Slowdown, Speed
from transload.study.calibrate.probes import Probe, StepOrder, StepTimes
from transload.study.calibrate.speed import cores_of, drift, look, mean_of, watching
from transload.study.validate.drift import is_noticed

LONG_SECONDS = 3600.0


class Machine:
    """A probe of a machine whose cores are as fast as they are told."""

    def __init__(self, speed: Callable[[int | None], float], threads: int = 1, device: str = "cpu") -> None:
        self.plan = SimpleNamespace(threads=threads, device=device)
        self._speed = speed
        self.looked_at: list[int | None] = []
        self.has_been_busy = threading.Event()

    def measure(self, order: StepOrder) -> StepTimes:
        if order.prefill:
            self.looked_at.append(order.core)
            if len(self.looked_at) >= 20:
                self.has_been_busy.set()
        steps = ((0.4 if order.prefill else 0.05) / self._speed(order.core),)
        waited = tuple(step * 3 for step in steps)  # others wanted the core
        return StepTimes(started=(0.0,), seconds=waited, cpu_seconds=steps)

    def alone_seconds(self, times: StepTimes) -> tuple[float, ...]:
        return Probe.alone_seconds(cast(Probe, self), times)


def probe(machine: Machine) -> Probe:
    return cast(Probe, machine)


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3, 5}, raising=False)


def test_waiting_for_a_core_is_not_computing() -> None:
    found = look(probe(Machine(lambda _core: 1.0)), None)
    assert found == Speed(prefill_seconds=0.4, decode_seconds=0.05)


@pytest.mark.parametrize(("threads", "device"), [(2, "cpu"), (1, "cuda:0")])
def test_processor_time_says_nothing_of_several_threads_or_of_a_gpu(threads: int, device: str) -> None:
    machine = Machine(lambda _core: 1.0, threads, device)
    assert look(probe(machine), None).prefill_seconds == pytest.approx(1.2)
    assert cores_of(cast(WorkerPlan, machine.plan)) == (None,)


def test_all_cores_are_looked_at_and_their_mean_counts() -> None:
    machine = Machine(lambda core: 1.0 if core == 3 else 0.5)
    with watching(probe(machine), LONG_SECONDS) as watch:
        del machine.looked_at[:]
        assert watch.since() == Speed(prefill_seconds=pytest.approx(0.6), decode_seconds=pytest.approx(0.075))  # type: ignore[arg-type]
    assert set(machine.looked_at) == {3, 5}


def test_a_watch_looks_by_itself_and_tells_each_time_what_is_new() -> None:
    speeds = {"now": 1.0}
    machine = Machine(lambda _core: speeds["now"])
    with watching(probe(machine), 0.001) as watch:
        assert machine.has_been_busy.wait(30)
        first = watch.since()
        speeds["now"] = 0.5
        watch.since()  # a look from before may be in it
        second = watch.since()
    assert drift(first, second).prefill == pytest.approx(2.0)


def test_a_probe_that_cannot_say_is_an_error_and_not_an_old_speed() -> None:
    answers = [1.0, 1.0]  # for the prompt and the decode of one look

    def speed(_core: int | None) -> float:
        if not answers:
            raise TransloadError("the probe has ended")
        return answers.pop()

    with watching(probe(Machine(speed)), LONG_SECONDS) as watch, pytest.raises(TransloadError, match="has ended"):
        watch.since()


def test_drift_is_noticed_from_a_twentieth() -> None:
    assert is_noticed(Slowdown(prefill=1.06, decode=1.0))
    assert not is_noticed(Slowdown(prefill=0.97, decode=1.03))
    looks = [Speed(prefill_seconds=seconds, decode_seconds=0.1) for seconds in (0.4, 0.6)]
    assert mean_of(looks).prefill_seconds == pytest.approx(0.5)
