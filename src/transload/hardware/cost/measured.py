"""A worker's steps by what was measured of the machine: the same questions as `WorkerCost`, answered from a table.

Pure. Between points it goes in straight lines, beyond the last one along the last line.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from transload.errors import DeploymentError
from transload.hardware.chip import Chip
from transload.hardware.cost.energy import energy_joules, usd
from transload.hardware.cost.shape import StepShape
from transload.hardware.cost.worker import OperationTime
from transload.hardware.measured import MeasuredSteps
from transload.hardware.parallel import Parallel
from transload.hardware.quantity import Quantity

Point = tuple[float, float]


def along(points: Sequence[Point], x: float) -> float:
    """Piecewise linear through `points`, ascending in x; below the first one its own value, for fixed costs do not
    shrink."""
    if len(points) == 1 or x <= points[0][0]:
        return points[0][1]
    index = min(len(points) - 1, max(1, bisect_left(points, x, key=lambda point: point[0])))
    (x0, y0), (x1, y1) = points[index - 1], points[index]
    return max(0.0, y0 + (y1 - y0) * (x - x0) / (x1 - x0))


class MeasuredStepCost:
    """Seconds of steps on the measured machine while nothing else computes on it."""

    def __init__(self, measured: MeasuredSteps) -> None:
        self.measured = measured
        self._prefill = [(float(point.tokens), point.seconds) for point in measured.prefill]
        self._fixed = [(float(point.requests), point.fixed_seconds) for point in measured.decode]
        self._context = [(float(point.requests), point.context_token_seconds) for point in measured.decode]
        self._lines: dict[int, tuple[float, float]] = {}

    def decode_coefficients(self, num_decode: int) -> tuple[float, float]:
        """(fixed, per context token) of a step that decodes so many requests."""
        line = self._lines.get(num_decode)
        if line is None:
            factor, gap = self.measured.serving.decode, self.measured.step_gap_seconds
            fixed, each = along(self._fixed, num_decode), along(self._context, num_decode)
            line = self._lines[num_decode] = (fixed * factor + gap, each * factor)
        return line

    def step_seconds(self, shape: StepShape) -> float:
        """Of one step, until the next one can begin."""
        fixed, each = self.decode_coefficients(shape.num_decode) if shape.num_decode else (0.0, 0.0)
        decode = fixed + each * shape.decode_context_tokens
        if not shape.prefill:
            return decode
        before = sum(start * num_tokens for start, num_tokens in shape.prefill)
        prompts = self._prompts_seconds(shape) + before * self.measured.prefill_context_seconds
        gap = self.measured.step_gap_seconds
        mixed = self.measured.mixed_share * max(0.0, decode - gap)
        return prompts * self.measured.serving.prefill + mixed + gap

    def _prompts_seconds(self, shape: StepShape) -> float:
        """Points are of one prompt each. Several attend each to itself alone: they take no longer together than one
        after another, and no longer than one of all their tokens, which reads the weights once."""
        together = along(self._prefill, shape.num_prefill_tokens)
        if len(shape.prefill) == 1:
            return together
        return min(together, sum([along(self._prefill, num_tokens) for _, num_tokens in shape.prefill]))


class MeasuredCost(MeasuredStepCost):
    """A worker of a measured chip, with all that simulations ask of a `WorkerCost`."""

    def __init__(self, chip: Chip, parallel: Parallel | None = None) -> None:
        """Raises `DeploymentError` for a split: what was measured is one worker on one machine."""
        assert chip.measured is not None
        super().__init__(chip.measured)
        self.chip = chip
        if parallel is not None and parallel.num_chips > 1:
            raise DeploymentError(
                f"{chip.id}: measured as one worker; leave `parallel` out, or calibrate the split deployment"
            )

    @property
    def kv_tokens(self) -> int:
        return self.measured.kv_tokens

    @property
    def interval(self) -> tuple[float, float]:
        """As far off as the form is at its own points, and a tenth for what changes from day to day."""
        spread = 0.1 + self.measured.step_error
        return 1 / (1 + spread), 1 + spread

    @property
    def ttft_interval(self) -> tuple[float, float]:
        """No wider: the front end was measured too."""
        return self.interval

    def request_seconds(self, prompt_tokens: int, in_flight: int = 1) -> float:  # noqa: ARG002
        """What the front end adds to a request's first token: as measured, whatever the prompt."""
        return self.measured.front_end.request_seconds

    @property
    def rests_on(self) -> tuple[Quantity, ...]:
        """Every measured step as a number of class measured."""
        source = f"{self.measured.machine}, {self.measured.date}"
        seconds = [point.seconds for point in self.measured.prefill]
        seconds += [point.fixed_seconds for point in self.measured.decode]
        return tuple(Quantity(value=value, unit="s", source=source, kind="measured") for value in seconds)

    @property
    def assumptions(self) -> tuple[str, ...]:
        measured = self.measured
        return (
            f"{self.chip.id}: steps as measured on {measured.machine} on {measured.date}, of {measured.model} in "
            f"{measured.dtype} with {measured.threads} thread(s)",
        )

    def breakdown(self, shape: StepShape) -> tuple[OperationTime, ...]:  # noqa: ARG002
        """() : whole steps were measured, not operations."""
        return ()

    def energy_joules(self, seconds: float, busy_share: float) -> float:
        """Raises `DeploymentError` if the chip file says no power."""
        return energy_joules(self.chip, 1, seconds, busy_share)

    def usd(self, seconds: float) -> float:
        """Raises `DeploymentError` if the chip file says no price."""
        return usd(self.chip, 1, seconds)
