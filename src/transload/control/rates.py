"""What the controller has learned about the speed of workers and links, from their own reports."""

from __future__ import annotations


class LinearRate:
    """seconds = fixed + per_unit * units, fitted to the last few dozen observations.

    Least squares with exponential forgetting and a weak pull towards the prior, so that one observation already counts
    and a run of equal loads cannot make the slope run away. Never predicts less than the prior's hundredth.
    """

    FORGETTING = 0.97
    PRIOR_WEIGHT = 0.05

    def __init__(self, fixed_seconds: float, seconds_per_unit: float, typical_units: float) -> None:
        self._prior = (fixed_seconds, seconds_per_unit)
        self._scale = typical_units
        self._weight = 0.0
        self._sum_x = 0.0
        self._sum_xx = 0.0
        self._sum_y = 0.0
        self._sum_xy = 0.0
        self.fixed_seconds = fixed_seconds
        self.seconds_per_unit = seconds_per_unit

    def observe(self, units: float, seconds: float) -> None:
        """Take in one measurement."""
        x, keep = units / self._scale, self.FORGETTING
        self._weight = self._weight * keep + 1
        self._sum_x = self._sum_x * keep + x
        self._sum_xx = self._sum_xx * keep + x * x
        self._sum_y = self._sum_y * keep + seconds
        self._sum_xy = self._sum_xy * keep + x * seconds
        self._solve()

    def _solve(self) -> None:
        pull = self.PRIOR_WEIGHT
        fixed_prior, slope_prior = self._prior[0], self._prior[1] * self._scale
        a11, a12, a22 = self._weight + pull, self._sum_x, self._sum_xx + pull
        b1, b2 = self._sum_y + pull * fixed_prior, self._sum_xy + pull * slope_prior
        determinant = a11 * a22 - a12 * a12
        fixed = (b1 * a22 - b2 * a12) / determinant
        slope = (a11 * b2 - a12 * b1) / determinant
        self.fixed_seconds = max(fixed, 0.0)
        self.seconds_per_unit = max(slope / self._scale, self._prior[1] / 100)

    def seconds(self, units: float) -> float:
        """Prediction for so many units."""
        return self.fixed_seconds + self.seconds_per_unit * units


class LinkRate:
    """What a KV link gives: bytes per second and seconds of latency, as last measured."""

    __slots__ = ("bytes_per_second", "latency_seconds", "transport")

    def __init__(self, bytes_per_second: float = 1e9, latency_seconds: float = 1e-3, transport: str = "") -> None:
        self.bytes_per_second = bytes_per_second
        self.latency_seconds = latency_seconds
        self.transport = transport

    @property
    def is_in_place(self) -> bool:
        """Prefill works in the blocks of the decode worker, and reads what that has cached."""
        return self.transport == "direct"

    def seconds(self, num_bytes: float) -> float:
        """Time for so many bytes on an otherwise idle link."""
        return self.latency_seconds + num_bytes / self.bytes_per_second
