"""The two simulations that stand beside a measured run: given its steps, and with what was known beforehand."""

from __future__ import annotations

import msgspec

from transload.deploy.spec import Deployment
from transload.hardware.measured import Slowdown
from transload.study.validate.compare import Comparison, Seen, compare
from transload.study.validate.steps import StepSum
from transload.study.validate.virtual import VirtualRun, play_virtual, play_with_steps
from transload.study.workload import Workload


class MeasuredRun(msgspec.Struct, frozen=True, kw_only=True):
    """A load that was played for real on a deployment."""

    name: str
    """Of the deployment."""
    load: str
    """In words."""
    deployment: Deployment
    workload: Workload
    seen: Seen
    steps: tuple[StepSum, ...]
    drift: Slowdown | None
    """As it was watched."""


class Beside(msgspec.Struct, frozen=True, kw_only=True):
    comparison: Comparison
    given_steps: VirtualRun
    as_calibrated: VirtualRun


def simulate_beside(run: MeasuredRun, chip_path: str, *, follows_drift: bool) -> Beside:
    """Nothing of what the run's users felt goes into either."""
    foretold = play_virtual(
        run.deployment,
        chip_path,
        run.workload,
        drift=run.drift if follows_drift else None,
        name=f"{run.name} as calibrated",
    )
    given, speeds = play_with_steps(
        run.deployment, chip_path, run.workload, run.steps, name=f"{run.name} given its steps"
    )
    compared = compare(run.name, run.load, run.seen, _seen(given), _seen(foretold))
    return Beside(
        comparison=msgspec.structs.replace(compared, drift=run.drift, speeds=tuple(speeds.values())),
        given_steps=given,
        as_calibrated=foretold,
    )


def _seen(run: VirtualRun) -> Seen:
    return Seen(summary=run.summary, stages=run.stages)
