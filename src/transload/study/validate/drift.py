"""Whether the machine is still the one that was measured: two steps again, just before a comparison."""

from __future__ import annotations

from statistics import median

import msgspec

from transload.deploy.machine import read_machine
from transload.deploy.placement import place
from transload.deploy.spec import Deployment
from transload.hardware.cost.measured import MeasuredStepCost
from transload.hardware.measured import MeasuredSteps, Slowdown
from transload.model.source import locate
from transload.study.calibrate.fit import shape_of
from transload.study.calibrate.probes import StepOrder, probes

PROMPT = StepOrder(prefill=((0, 128),), repeats=9)
DECODE = StepOrder(decode=(256,) * 4, repeats=25)
NOTICED = 0.05
"""More than this is told."""


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """How many times as long steps take now as when they were measured."""

    prefill: float
    decode: float

    @property
    def is_noticed(self) -> bool:
        return max(abs(self.prefill - 1), abs(self.decode - 1)) > NOTICED


def measure_drift(deployment: Deployment, measured: MeasuredSteps) -> Drift | None:
    """None for deployments whose steps are split between processes: they were measured whole."""
    placement = place(deployment, read_machine(), locate(deployment.model).arch)
    if any(plan.hop is not None for plan in placement.workers):
        return None
    plan = next(plan for plan in placement.workers if plan.role != "ffn" and plan.starts_here)
    bare = MeasuredStepCost(msgspec.structs.replace(measured, serving=Slowdown(), step_gap_seconds=0.0))
    with probes([plan]) as (probe,):
        now = {order: median(probe.alone_seconds(probe.measure(order))[1:]) for order in (PROMPT, DECODE)}
    return Drift(
        prefill=now[PROMPT] / bare.step_seconds(shape_of(PROMPT)),
        decode=now[DECODE] / bare.step_seconds(shape_of(DECODE)),
    )
