"""How fast the machine's cores are is asked of a process that looks at them, and what it says is a mean over them."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import cast

import pytest

from transload.deploy.plan import WorkerPlan
from transload.errors import TransloadError
from transload.hardware.measured import Slowdown, Speed
from transload.study.calibrate.serving import typical_mean
from transload.study.calibrate.speed import core_of, drift, own_cores, slowdown, watching
from transload.study.calibrate.speedometer import Order, Speedometer
from transload.study.validate.drift import is_noticed


class Told(Speedometer):
    """Whose cores are as fast as they are told."""

    def __init__(self, *cores: int) -> None:
        super().__init__(cores, 0.0)
        self.seconds = dict.fromkeys(cores, 1.0)

    def look(self, core: int) -> float:
        return self.seconds[core]


def test_each_core_counts_the_same_and_each_answer_is_of_what_is_new() -> None:
    meter = Told(3, 5)
    meter.seconds[5] = 2.0
    first = meter.answer(Order())
    assert (first.seconds, first.num_looks) == (1.5, 2)
    meter.seconds[3] = 2.0
    assert meter.answer(Order()).seconds == 2.0
    assert meter.answer(Order(core=3)).seconds == 2.0


@pytest.mark.slow
def test_a_process_looks_at_all_cores_by_itself() -> None:
    with watching(0.001) as watch:
        seen = [watch.since(), watch.look(own_cores()[0]), watch.look(None)]
        assert all(0 < speed.product_seconds < 1 for speed in seen)
        os.kill(watch._process.pid, signal.SIGKILL)
        with pytest.raises(TransloadError, match="ended or took more"):
            watch.since()


def test_steps_of_one_thread_are_measured_on_one_core() -> None:
    def plan(threads: int, device: str) -> WorkerPlan:
        return cast(WorkerPlan, SimpleNamespace(threads=threads, device=device))

    assert core_of(plan(1, "cpu")) in own_cores()
    assert core_of(plan(2, "cpu")) is None
    assert core_of(plan(1, "cuda:0")) is None


def test_drift_is_noticed_from_a_twentieth() -> None:
    since, now = Speed(product_seconds=0.0002), Speed(product_seconds=0.0004)
    assert slowdown(drift(since, now)) == Slowdown(prefill=2.0, decode=2.0)
    assert is_noticed(slowdown(1.06))
    assert not is_noticed(slowdown(0.97))


def test_the_mean_of_two_speeds_is_between_them_and_stalls_do_not_count() -> None:
    assert typical_mean([1.0] * 5 + [1.3] * 5) == pytest.approx(1.15)
    assert typical_mean([1.0] * 19 + [50.0]) == 1.0
    assert typical_mean([2.0]) == 2.0
