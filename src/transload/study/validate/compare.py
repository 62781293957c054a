"""Sets a measured run beside the simulated one: errors of what users feel, and of where requests spend their time.

Pure: it is handed records and stages.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from transload.hardware.measured import Slowdown
from transload.study.metrics import Distribution, Summary

P50_WITHIN = 0.10
P90_WITHIN = 0.20


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
    """Mean seconds a request spends in each stage of its waterfall."""
    drift: Slowdown | None = None
    """Of the machine since it was calibrated, from two steps before and after the load."""

    @property
    def holds(self) -> bool:
        return all(figure.holds is not False for figure in self.figures)


def compare(
    deployment: str,
    load: str,
    measured: Summary,
    simulated: Summary,
    measured_stages: Mapping[str, float],
    simulated_stages: Mapping[str, float],
) -> Comparison:
    """`..._stages`: mean seconds by name of stage."""
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
    names = list(dict.fromkeys([*measured_stages, *simulated_stages]))
    return Comparison(
        deployment=deployment,
        load=load,
        requests_per_second=measured.offered_requests_per_second or 0.0,
        num_requests=measured.num_requests,
        figures=tuple(figures),
        stages=tuple(
            Figure(
                name=name,
                measured=measured_stages.get(name, 0.0),
                simulated=simulated_stages.get(name, 0.0),
                unit="s",
            )
            for name in names
        ),
    )


def _latencies(name: str, real: Distribution, virtual: Distribution) -> list[Figure]:
    return [
        Figure(name=f"{name} p50", measured=real.p50, simulated=virtual.p50, unit="s", within=P50_WITHIN),
        Figure(name=f"{name} p90", measured=real.p90, simulated=virtual.p90, unit="s", within=P90_WITHIN),
        Figure(name=f"{name} mean", measured=real.mean, simulated=virtual.mean, unit="s"),
    ]
