"""How much faster a workload may come before a deployment misses its targets. Searches by simulating."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import msgspec

from transload.study.result import Result
from transload.study.workload import ArrivalSpec, Workload

MOST = 256.0
"""Times the workload's own rate: what keeps its targets at that load is not overloaded by this workload."""
HALVINGS = 5


class Saturation(msgspec.Struct, frozen=True, kw_only=True):
    """The highest load that keeps the targets."""

    factor: float
    """Times the workload's own rate, to 3 %; 0: not even a quarter of it."""
    result: Result | None
    """The run at that load."""


def faster(workload: Workload, factor: float) -> Workload:
    """The same requests, so many times as fast."""

    def arrivals() -> Iterator[ArrivalSpec]:
        for spec in workload:
            yield msgspec.structs.replace(spec, at_seconds=spec.at_seconds / factor)

    duration = workload.duration_seconds
    return replace(
        workload,
        name=f"{workload.name}, {factor:.3g} times as fast",
        arrivals=arrivals,
        duration_seconds=None if duration is None else duration / factor,
    )


def saturate(workload: Workload, run: Callable[[Workload], Result]) -> Saturation:
    """Doubles the load until the targets are missed, then halves the gap. `run` simulates one workload.

    A result without targets counts as keeping them as long as nothing failed.
    """
    low, high, kept = 0.0, None, None
    factor = 1.0
    while high is None and factor <= MOST:
        result = run(faster(workload, factor))
        if keeps(result):
            low, kept, factor = factor, result, factor * 2
        else:
            high = factor
    if high is None:
        return Saturation(factor=low, result=kept)
    if not low:
        low_try = run(faster(workload, 0.25))
        if not keeps(low_try):
            return Saturation(factor=0.0, result=None)
        low, kept = 0.25, low_try
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        result = run(faster(workload, middle))
        if keeps(result):
            low, kept = middle, result
        else:
            high = middle
    return Saturation(factor=low, result=kept)


def keeps(result: Result) -> bool:
    """Whether a run kept its targets."""
    summary = result.summary
    return summary.num_failed == 0 if summary.meets_targets is None else summary.meets_targets
