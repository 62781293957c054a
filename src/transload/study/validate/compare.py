"""Sets a measured run beside two simulated ones: errors of what users feel, and of where requests spend their time.

One simulation is given how long the run's own steps were: its errors are the control plane's and the virtual runtime's.
The other knows what calibration said beforehand: its errors have in them how well the machine's speed was known.
Pure: it is handed summaries and stages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median

import msgspec

from transload.hardware.measured import Slowdown
from transload.study.metrics import Distribution, Summary, distribution
from transload.study.validate.steps import StepSpeed

P50_WITHIN = 0.10
P90_WITHIN = 0.20
FELT_SHARE = 0.05
"""Of a request's time: a stage that takes less is told, and has no bound."""
NEVER = Distribution(count=0, mean=0.0, p50=0.0, p90=0.0, p95=0.0, p99=0.0, max=0.0)
Stages = Mapping[str, Distribution]
"""Seconds that requests spend in each stage, by its name."""


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """One side: what users felt and where requests spent their time."""

    summary: Summary
    stages: Stages


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One figure, real and simulated."""

    name: str
    measured: float
    given_steps: float
    """Simulated with steps as long as those of the measured run."""
    as_calibrated: float
    """Simulated with what was known of steps beforehand."""
    unit: str
    within: float | None = None
    """The wanted bound of the relative errors; None: for information."""

    @property
    def error(self) -> float | None:
        """Of the simulation that is given the steps: over measured, minus one. None where nothing was measured."""
        return self.given_steps / self.measured - 1 if self.measured else None

    @property
    def error_as_calibrated(self) -> float | None:
        return self.as_calibrated / self.measured - 1 if self.measured else None


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """One deployment under one load."""

    deployment: str
    load: str
    """In words: light, near saturation, or a rate."""
    requests_per_second: float
    """Offered."""
    num_requests: int
    figures: tuple[Figure, ...]
    stages: tuple[Figure, ...]
    """Mean seconds a request spends in each stage of its waterfall, and its percentiles where it is felt."""
    drift: Slowdown | None = None
    """Of the machine since it was calibrated, as it was watched through the load; `as_calibrated` follows it."""
    speeds: tuple[StepSpeed, ...] = ()
    """Of its steps, which `given_steps` has."""


class Errors(msgspec.Struct, frozen=True, kw_only=True):
    """Of one figure with a bound, over all repeats of a load."""

    name: str
    within: float
    given_steps: tuple[float, ...]
    as_calibrated: tuple[float, ...]

    @property
    def holds(self) -> bool:
        """Whether the typical repeat is within the bound, given the steps."""
        return abs(median(self.given_steps)) <= self.within

    @property
    def holds_as_calibrated(self) -> bool:
        return abs(median(self.as_calibrated)) <= self.within


def errors_of(comparisons: Iterable[Comparison]) -> dict[tuple[str, str], list[Errors]]:
    """By deployment and load, in their order: repeats of a load are told apart by nothing."""
    found: dict[tuple[str, str], dict[str, list[Figure]]] = {}
    for comparison in comparisons:
        by_name = found.setdefault((comparison.deployment, comparison.load), {})
        for figure in (*comparison.figures, *comparison.stages):
            if figure.within is not None and figure.measured:
                by_name.setdefault(figure.name, []).append(figure)
    return {load: [_errors(name, each) for name, each in by_name.items()] for load, by_name in found.items()}


def _errors(name: str, figures: Sequence[Figure]) -> Errors:
    return Errors(
        name=name,
        within=figures[0].within or 0.0,
        given_steps=tuple(figure.error for figure in figures if figure.error is not None),
        as_calibrated=tuple(figure.error_as_calibrated for figure in figures if figure.error_as_calibrated is not None),
    )


def compare(deployment: str, load: str, measured: Seen, given_steps: Seen, as_calibrated: Seen) -> Comparison:
    """All three beside each other."""
    real, given, foretold = measured.summary, given_steps.summary, as_calibrated.summary
    figures: list[Figure] = []
    for name, distributions in (
        ("TTFT", (real.ttft_seconds, given.ttft_seconds, foretold.ttft_seconds)),
        ("TPOT", (real.tpot_seconds, given.tpot_seconds, foretold.tpot_seconds)),
    ):
        known = [each for each in distributions if each is not None]
        if len(known) == len(distributions):
            figures += _latencies(name, *known)
    for name, field, unit, within in (
        ("output tokens/s", "output_tokens_per_second", "tokens/s", P50_WITHIN),
        ("requests/s", "requests_per_second", "requests/s", None),
    ):
        values = [getattr(each, field) for each in (real, given, foretold)]
        figures.append(
            Figure(
                name=name,
                measured=values[0],
                given_steps=values[1],
                as_calibrated=values[2],
                unit=unit,
                within=within,
            )
        )
    return Comparison(
        deployment=deployment,
        load=load,
        requests_per_second=real.offered_requests_per_second or 0.0,
        num_requests=real.num_requests,
        figures=tuple(figures),
        stages=tuple(_stages(measured.stages, given_steps.stages, as_calibrated.stages)),
    )


def stage_distributions(requests: Sequence[Mapping[str, float]]) -> dict[str, Distribution]:
    """Of requests' seconds by stage; a stage that a request has not gone through took it no time."""
    names = dict.fromkeys(name for request in requests for name in request)
    found = {name: distribution([request.get(name, 0.0) for request in requests]) for name in names}
    return {name: values for name, values in found.items() if values is not None}


def _stages(*sides: Stages) -> list[Figure]:
    """Of the measured side first, then both simulated ones."""
    total = sum(each.mean for each in sides[0].values())
    figures: list[Figure] = []
    for name in dict.fromkeys(name for side in sides for name in side):
        p50, p90, mean = _latencies(name, *(side.get(name, NEVER) for side in sides))
        figures.append(msgspec.structs.replace(mean, name=name))
        if mean.measured >= FELT_SHARE * total:
            figures += (p50, p90)
    return figures


def _latencies(name: str, real: Distribution, given: Distribution, foretold: Distribution) -> tuple[Figure, ...]:
    def figure(what: str, within: float | None) -> Figure:
        measured, given_steps, as_calibrated = (getattr(each, what) for each in (real, given, foretold))
        return Figure(
            name=f"{name} {what}",
            measured=measured,
            given_steps=given_steps,
            as_calibrated=as_calibrated,
            unit="s",
            within=within,
        )

    return figure("p50", P50_WITHIN), figure("p90", P90_WITHIN), figure("mean", None)
