"""Virtual time on a measured machine: workers that compute at once slow each other, and a front end wants its share.

Wraps a simulation's own durations, those of a worker that is alone, and says what being together does to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transload.control.messages import Chunk, WorkerId
from transload.hardware.cost.contention import Work, paces
from transload.hardware.measured import MeasuredSteps, WorkKind
from transload.runtime.cost import CostModel
from transload.runtime.flows import Wire

Times = Callable[[WorkerId, WorkKind], float]
"""How many times as long a step of this kind, which begins now, takes on that worker as it was measured."""


class SharedMachineCost:
    """A `CostModel` and a `MachineModel` of workers that all run on one measured machine."""

    def __init__(self, base: CostModel, measured: MeasuredSteps, times: Times = lambda _worker, _kind: 1.0) -> None:
        self._base = base
        self._measured = measured
        self._times = times

    # -- alone --------------------------------------------------------------------------------------------------------

    def step_seconds(self, worker: WorkerId, chunks: Sequence[Chunk]) -> float:
        return self._base.step_seconds(worker, chunks) * self._times(worker, self.work(chunks).kind)

    def decode_line(self, _worker: WorkerId, _num_decode: int) -> None:
        """A step's length depends on what else runs."""
        return

    def wire(self, source: WorkerId, target: WorkerId) -> Wire:
        return self._base.wire(source, target)

    def message_seconds(self) -> float:
        return self._measured.message_seconds

    def start_seconds(self, _worker: WorkerId) -> float:
        return self._measured.load_seconds

    # -- together -----------------------------------------------------------------------------------------------------

    def work(self, chunks: Sequence[Chunk]) -> Work:
        """A step with prompts in it weighs on the machine as a prompt does."""
        has_prompt = any(chunk.num_tokens > 1 or not chunk.num_outputs for chunk in chunks)
        return Work("prefill" if has_prompt else "decode", self._measured.threads)

    def paces(self, works: Sequence[Work]) -> list[float]:
        return paces(works, self._measured)

    def front_end_seconds(self, chunks: Sequence[Chunk]) -> float:
        """For the tokens of a step, and for the requests whose first ones they are; load generator included."""
        front_end = self._measured.front_end
        tokens = sum([chunk.samples for chunk in chunks])
        firsts = sum([chunk.samples and chunk.num_outputs == 0 for chunk in chunks])
        return tokens * front_end.token_cpu_seconds + firsts * front_end.request_cpu_seconds
