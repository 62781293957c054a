"""Whether the machine is still the one that was measured: looked at all through every load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transload.hardware.measured import MeasuredSteps, Slowdown, Speed
from transload.study.calibrate.speed import SpeedWatch, drift, slowdown, watching

NOTICED = 0.05
"""More than this is told."""


@contextmanager
def watch_drift(measured: MeasuredSteps) -> Iterator[SpeedWatch | None]:
    """None where there is nothing to compare with: nobody looked at the speed of what was measured."""
    if measured.speed is None:
        yield None
        return
    with watching() as watch:
        yield watch


def drift_of(measured: MeasuredSteps, now: Speed | None) -> Slowdown | None:
    """Since the machine was calibrated. None where it is not known."""
    return None if now is None or measured.speed is None else slowdown(drift(measured.speed, now))


def is_noticed(found: Slowdown) -> bool:
    """Whether it is worth a word."""
    return abs(found.prefill - 1) > NOTICED
