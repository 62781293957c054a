"""Sets a measured run beside the simulated one: errors of what users feel, and of where requests spend their time.

Pure: it is handed records and stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from transload.hardware.measured import Slowdown
from transload.study.metrics import Distribution, Summary, distribution

P50_WITHIN = 0.10
P90_WITHIN = 0.20
FELT_SHARE = 0.05
"""Of a request's time: a stage that takes less is told, and has no bound."""
NEVER = Distribution(count=0, mean=0.0, p50=0.0, p90=0.0, p95=0.0, p99=0.0, max=0.0)
Stages = Mapping[str, Distribution]
"""Seconds that requests spend in each stage, by its name."""


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One figure, real and simulated."""

    name: str
    measured: float
    simulated: float
    unit: str
    within: float | None = None
    """The wanted bound of the relative error; None: for information."""

    @property
    def error(self) -> float | None:
        """Simulated over measured, minus one. None where nothing was measured."""
        return self.simulated / self.measured - 1 if self.measured else None

    @property
    def holds(self) -> bool | None:
        if self.within is None or self.error is None:
            return None
        return abs(self.error) <= self.within


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
    """Of the machine since it was calibrated, from two steps before and after the load."""

    @property
    def holds(self) -> bool:
        return all(figure.holds is not False for figure in (*self.figures, *self.stages))


def compare(
    deployment: str,
    load: str,
    measured: Summary,
    simulated: Summary,
    measured_stages: Stages,
    simulated_stages: Stages,
) -> Comparison:
    """One beside the other."""
    figures: list[Figure] = []
    for name, real, virtual in (
        ("TTFT", measured.ttft_seconds, simulated.ttft_seconds),
        ("TPOT", measured.tpot_seconds, simulated.tpot_seconds),
    ):
        if real is not None and virtual is not None:
            figures += _latencies(name, real, virtual)
    figures += [
        Figure(
            name="output tokens/s",
            measured=measured.output_tokens_per_second,
            simulated=simulated.output_tokens_per_second,
            unit="tokens/s",
            within=P50_WITHIN,
        ),
        Figure(
            name="requests/s",
            measured=measured.requests_per_second,
            simulated=simulated.requests_per_second,
            unit="requests/s",
        ),
    ]
    return Comparison(
        deployment=deployment,
        load=load,
        requests_per_second=measured.offered_requests_per_second or 0.0,
        num_requests=measured.num_requests,
        figures=tuple(figures),
        stages=tuple(_stages(measured_stages, simulated_stages)),
    )


def stage_distributions(requests: Sequence[Mapping[str, float]]) -> dict[str, Distribution]:
    """Of requests' seconds by stage; a stage that a request has not gone through took it no time."""
    names = dict.fromkeys(name for request in requests for name in request)
    found = {name: distribution([request.get(name, 0.0) for request in requests]) for name in names}
    return {name: values for name, values in found.items() if values is not None}


def _stages(measured: Stages, simulated: Stages) -> list[Figure]:
    total = sum(each.mean for each in measured.values())
    figures: list[Figure] = []
    for name in dict.fromkeys([*measured, *simulated]):
        real, virtual = measured.get(name, NEVER), simulated.get(name, NEVER)
        figures.append(Figure(name=name, measured=real.mean, simulated=virtual.mean, unit="s"))
        if real.mean >= FELT_SHARE * total:
            figures += _latencies(name, real, virtual)[:2]
    return figures


def _latencies(name: str, real: Distribution, virtual: Distribution) -> list[Figure]:
    return [
        Figure(name=f"{name} p50", measured=real.p50, simulated=virtual.p50, unit="s", within=P50_WITHIN),
        Figure(name=f"{name} p90", measured=real.p90, simulated=virtual.p90, unit="s", within=P90_WITHIN),
        Figure(name=f"{name} mean", measured=real.mean, simulated=virtual.mean, unit="s"),
    ]
