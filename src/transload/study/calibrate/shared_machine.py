"""Virtual time on a measured machine: workers that compute at once slow each other, and a front end wants its share.

Wraps a simulation's own durations. A step's length is settled when it begins, by what is under way then; a worker that
begins while another's step runs is slowed for as long as both run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transload.control.messages import Chunk, WorkerId
from transload.hardware.measured import MeasuredSteps
from transload.runtime.cost import CostModel
from transload.runtime.flows import Wire


class SharedMachineCost:
    """A `CostModel` of workers that all run on one measured machine. Set `clock` before the run."""

    def __init__(self, base: CostModel, measured: MeasuredSteps, workers: Sequence[WorkerId]) -> None:
        self.clock: Callable[[], float] | None = None
        """Tells the virtual time."""
        self._base = base
        self._measured = measured
        self._busy_until = dict.fromkeys(workers, 0.0)

    def step_seconds(self, worker: WorkerId, chunks: Sequence[Chunk]) -> float:
        assert self.clock is not None, "a run has a clock"
        now = self.clock()
        alone = self._base.step_seconds(worker, chunks)
        others = [until - now for name, until in self._busy_until.items() if name != worker and until > now]
        seconds = alone
        if others:
            seconds = slowed(alone, max(others), self._factor(chunks))
        if 1 + len(others) >= self._measured.num_cores:
            seconds += self._front_end_seconds(chunks)
        self._busy_until[worker] = now + seconds
        return seconds

    def decode_line(self, worker: WorkerId, num_decode: int) -> tuple[float, float] | None:
        """None where a step's length depends on what else runs."""
        return self._base.decode_line(worker, num_decode) if len(self._busy_until) == 1 else None

    def wire(self, source: WorkerId, target: WorkerId) -> Wire:
        return self._base.wire(source, target)

    def message_seconds(self) -> float:
        return self._measured.message_seconds

    def start_seconds(self, worker: WorkerId) -> float:  # noqa: ARG002
        return self._measured.load_seconds

    def _factor(self, chunks: Sequence[Chunk]) -> float:
        beside = self._measured.beside
        return beside.prefill if any(chunk.num_tokens > 1 for chunk in chunks) else beside.decode

    def _front_end_seconds(self, chunks: Sequence[Chunk]) -> float:
        """No core is free: what the front end needs for these tokens is taken from all cores alike."""
        front_end = self._measured.front_end
        tokens = sum(chunk.samples for chunk in chunks)
        firsts = sum(chunk.samples and chunk.num_outputs == 0 for chunk in chunks)
        wanted = tokens * front_end.token_cpu_seconds + firsts * front_end.request_cpu_seconds
        return wanted / self._measured.num_cores


def slowed(alone: float, both_seconds: float, factor: float) -> float:
    """How long a step takes that would take `alone`, if for the first `both_seconds` another runs beside it."""
    done = both_seconds / factor
    return alone * factor if done >= alone else both_seconds + alone - done
