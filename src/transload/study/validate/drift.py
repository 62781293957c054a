"""Whether the machine is still the one that was measured: two steps again, before and after every load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transload.deploy.machine import read_machine
from transload.deploy.placement import place
from transload.deploy.spec import Deployment
from transload.hardware.measured import MeasuredSteps, Reference, Slowdown
from transload.model.native.library import load
from transload.model.source import locate
from transload.study.calibrate.probes import Probe, probes
from transload.study.calibrate.reference import drift, measure_reference, typical

NOTICED = 0.05
"""More than this is told."""


class DriftWatch:
    """A probe process beside the server, which computes nothing while a load is played."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._last = measure_reference(probe)

    def around(self) -> Reference:
        """Of the time since this was asked for last, or since it was made: between what was seen then and what is."""
        before, self._last = self._last, measure_reference(self._probe)
        return typical([before, self._last])


@contextmanager
def watch_drift(deployment: Deployment, measured: MeasuredSteps) -> Iterator[DriftWatch | None]:
    """None where there is nothing to compare with: steps that are split between processes were measured whole."""
    if measured.reference is None:
        yield None
        return
    placement = place(deployment, read_machine(has_kernels=load() is not None), locate(deployment.model).arch)
    plan = next(plan for plan in placement.workers if plan.role != "ffn" and plan.starts_here)
    with probes([plan]) as (probe,):
        yield DriftWatch(probe)


def drift_of(measured: MeasuredSteps, now: Reference | None) -> Slowdown | None:
    """Since the machine was calibrated. None where it is not known."""
    return None if now is None or measured.reference is None else drift(measured.reference, now)


def is_noticed(found: Slowdown) -> bool:
    """Whether it is worth a word."""
    return max(abs(found.prefill - 1), abs(found.decode - 1)) > NOTICED
