"""Steps in virtual time: how long each takes, and when its worker is told.

Steps of an unchanged batch are gone through in one go, up to where the engine wants to plan anew. An engine that is
about to decide something is first told of the steps that have ended by then, each at its own time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from transload.control.messages import (
    Chunk,
    EndRun,
    LayersReady,
    ReportTokens,
    Request,
    RunStep,
    Sampled,
    StepDone,
    StepFailed,
    WorkerId,
)
from transload.runtime.cluster import KvContents, LiveWorker, StepFault, Watcher
from transload.runtime.cost import CostModel, FfnSide
from transload.runtime.decode_run import DecodeRun, on_tick
from transload.runtime.flight import Segment
from transload.runtime.shared_machine import Job, MachineModel, Milestone, SharedMachine

if TYPE_CHECKING:
    from transload.runtime.virtual import VirtualRuntime

DrawToken = Callable[[Request, int], int]


class VirtualSteps:
    """The steps of all workers of a runtime. `jumps`: whether it goes through several at once."""

    def __init__(
        self,
        runtime: VirtualRuntime,
        cost: CostModel,
        draw_token: DrawToken | None,
        step_fault: StepFault | None,
        contents: KvContents | None,
        watcher: Watcher | None,
        ffn: FfnSide | None,
        machine: MachineModel | None,
        *,
        jumps: bool,
    ) -> None:
        self._runtime = runtime
        self._cost = cost
        self._draw_token = draw_token
        self._step_fault = step_fault
        self._contents = contents
        self._watcher = watcher
        self._ffn = ffn
        self.jumps = jumps and step_fault is None and contents is None and machine is None
        self._machine: SharedMachine | None = None
        if machine is not None:
            self._machine = SharedMachine(machine, lambda: runtime.now, self._foretell_milestone)

    # -- begin --------------------------------------------------------------------------------------------------------

    def start(self, worker: LiveWorker, step: RunStep) -> None:
        """The engine asks for a step, or for a run of them."""
        now, name = self._runtime.now, worker.name
        worker.step = step
        worker.step_began = on_tick(now)
        if self._machine is not None:
            self._share_machine(self._machine, worker, step)
            return
        run = worker.run = self._run_of(worker, step, now)
        problem = None
        if run is not None:
            run.num_planned = run.num_done + (step.repeats if self.jumps else 1)
            end = run.end(run.num_planned)
        elif self._ffn is not None and self._ffn.serves(name):
            seconds, problem = self._ffn.step(name, step.chunks, now)
            end = on_tick(now + seconds)
        else:
            end = on_tick(now + self._cost.step_seconds(name, step.chunks))
        if self._step_fault is not None:
            problem = problem or self._step_fault(name, step)
        if self._contents is not None:
            self._contents.step_started(name, step, fails=problem is not None)
        if run is None and any(chunk.streams for chunk in step.chunks):
            self._foretell_layers(worker, step, end)
        self._foretell_end(worker, end, problem)

    def _run_of(self, worker: LiveWorker, step: RunStep, now: float) -> DecodeRun | None:
        run = worker.run
        if step.continues and run is not None and run.end(run.num_done) == now:
            return run
        context = 0
        for chunk in step.chunks:
            if chunk.num_tokens != 1 or not chunk.num_outputs or chunk.streams:
                return None
            context += chunk.start + 1
        line = self._cost.decode_line(worker.name, len(step.chunks))
        return None if line is None else DecodeRun(now, *line, context, len(step.chunks))

    def _share_machine(self, machine: SharedMachine, worker: LiveWorker, step: RunStep) -> None:
        """As long as it takes beside whatever else computes on the machine meanwhile."""
        problem = self._step_fault(worker.name, step) if self._step_fault is not None else None
        if self._contents is not None:
            self._contents.step_started(worker.name, step, fails=problem is not None)
        work_seconds = self._cost.step_seconds(worker.name, step.chunks)
        milestones: list[Milestone] = []
        if any(chunk.streams for chunk in step.chunks):
            for share, ready in self._layers(worker, step):
                milestones.append((work_seconds * share, partial(self._layers_written, worker, step, ready)))
        worker.step_version += 1
        version = worker.step_version

        def end() -> None:
            machine.tell(step.chunks)
            self._end(worker, version, problem)

        machine.begin(worker.name, step.chunks, [*milestones, (work_seconds, end)])

    def _foretell_milestone(
        self, at: float, worker: WorkerId | None, action: Callable[..., None], job: Job, version: int
    ) -> None:
        if worker is None:
            self._runtime.call(at, partial(action, job, version))
        else:
            self._runtime.at_step_end(on_tick(at), self._runtime.workers[worker], action, job, version)

    def drop(self, worker: LiveWorker) -> None:
        """It has died: its step occupies the machine no more."""
        if self._machine is not None:
            self._machine.drop(worker.name)

    @staticmethod
    def _layers(worker: LiveWorker, step: RunStep) -> Iterator[tuple[float, LayersReady]]:
        """The share of the step after which each frame's layers are written."""
        num_layers, stride = worker.spec.engine.num_layers, worker.spec.layers_per_frame
        for low in range(0, num_layers, stride):
            high = min(low + stride, num_layers)
            yield high / num_layers, LayersReady(step.step, low, high)

    def _foretell_layers(self, worker: LiveWorker, step: RunStep, end: float) -> None:
        began = self._runtime.now
        for share, ready in self._layers(worker, step):
            at = end if share == 1.0 else began + (end - began) * share
            self._runtime.at_step_end(at, worker, self._layers_written, worker, step, ready)

    def _foretell_end(self, worker: LiveWorker, at: float, problem: str | None = None) -> None:
        worker.step_version += 1
        worker.step_ends = at
        self._runtime.at_step_end(at, worker, self._end, worker, worker.step_version, problem)

    def look_again(self, worker: LiveWorker) -> None:
        """An FFN worker has died: the step under way ends at another time, or fails."""
        if worker.step is None or worker.step_ends <= self._runtime.now or self._ffn is None:
            return
        seconds, problem = self._ffn.step(worker.name, worker.step.chunks, worker.step_began)
        self._foretell_end(worker, on_tick(worker.step_began + seconds), problem)

    # -- end ----------------------------------------------------------------------------------------------------------

    def _layers_written(self, worker: LiveWorker, step: RunStep, ready: LayersReady) -> None:
        if self._contents is not None and worker.is_alive:
            self._contents.layers_written(worker.name, step, ready.layer_lo, ready.layer_hi)
        self._runtime.tell_worker(worker, ready)

    def _end(self, worker: LiveWorker, version: int, problem: str | None) -> None:
        if not worker.is_alive or version != worker.step_version:
            return
        step, run = worker.step, worker.run
        assert step is not None
        if self._contents is not None:
            if problem is None:
                self._contents.layers_written(worker.name, step, 0, worker.spec.engine.num_layers)
            self._contents.step_ended(worker.name, step, fails=problem is not None)
        if problem is not None:
            worker.run = None
            self._runtime.tell_worker(worker, StepFailed(step.step, problem))
        elif run is not None:
            self._tell_run(worker, run, step, run.num_planned)
        else:
            self._tell_step(worker, step)

    def _tell_step(self, worker: LiveWorker, step: RunStep) -> None:
        now, began = self._runtime.now, worker.step_began
        if self._watcher is not None:
            num_decode = sum([chunk.num_tokens == 1 and chunk.num_outputs > 0 for chunk in step.chunks])
            num_prefill = sum([chunk.num_tokens for chunk in step.chunks]) - num_decode
            self._watcher.steps(worker.name, began, now, 1, num_prefill, num_decode)
        self._tell(
            worker, Segment(None, 1, 1, began, now), StepDone(step.step, self._draw(step.chunks, 1), now - began)
        )

    def _tell_run(
        self, worker: LiveWorker, run: DecodeRun, step: RunStep, number: int, *, goes_on: bool = False
    ) -> None:
        """All steps of the run up to this one are done."""
        done = run.num_done
        count = number - done
        began, ended = run.end(done), run.end(number)
        run.num_done = number
        if self._watcher is not None:
            self._watcher.steps(worker.name, began, ended, count, 0, len(step.chunks))
        sampled = self._draw(step.chunks, count)
        segment = Segment(run, done + 1, number, began, ended)
        self._tell(worker, segment, StepDone(step.step, sampled, ended - began, count, goes_on))

    def _tell(self, worker: LiveWorker, segment: Segment, done: StepDone) -> None:
        if worker.backlog is not None:
            worker.backlog.append((self._tell_late, (worker, segment.step_seconds, done)))
            return
        worker.log.add(segment)
        worker.is_emitting = True
        self._runtime.tell_worker(worker, done)
        worker.is_emitting = False

    def _draw(self, chunks: tuple[Chunk, ...], count: int) -> tuple[Sampled, ...]:
        draw = self._draw_token
        if draw is None:
            more = (0,) * (count - 1)
            return tuple([Sampled(chunk.request.id, 0, None, more) for chunk in chunks if chunk.samples])
        return tuple(
            [
                Sampled(
                    chunk.request.id,
                    draw(chunk.request, chunk.num_outputs),
                    None,
                    tuple([draw(chunk.request, chunk.num_outputs + index) for index in range(1, count)]),
                )
                for chunk in chunks
                if chunk.samples
            ]
        )

    def _tell_late(self, worker: LiveWorker, seconds: float, done: StepDone) -> None:
        """A worker that has stood still hears of its step when it goes on."""
        now = self._runtime.now
        self._tell(worker, Segment(None, 1, 1, now - seconds, now), done)

    # -- in between ---------------------------------------------------------------------------------------------------

    @staticmethod
    def is_behind(worker: LiveWorker) -> bool:
        """Whether the engine may not have been told of all steps that have ended."""
        return worker.run is not None and worker.run.num_planned - worker.run.num_done > 1

    def catch_up(self, worker: LiveWorker) -> None:
        """Tell the engine of the steps that have ended by now, as of then."""
        run, step = worker.run, worker.step
        if run is None or step is None or worker.backlog is not None or not self.is_behind(worker):
            return
        number = run.num_ended(self._runtime.now)
        if number == run.num_done:
            return
        worker.step_version += 1
        now, self._runtime.now = self._runtime.now, run.end(number)
        self._tell_run(worker, run, step, number, goes_on=True)
        self._runtime.now = now

    def report_tokens(self, worker: LiveWorker) -> None:
        """Have the engine tell of every token of the steps that have ended by now."""
        self.catch_up(worker)
        if worker.spec.engine.hold_tokens and worker.engine.holds_tokens:
            worker.is_emitting = True
            self._runtime.tell_worker(worker, ReportTokens())
            worker.is_emitting = False

    def end_run(self, worker: LiveWorker, _command: EndRun | None = None) -> None:
        """The step under way is the last before the engine is asked."""
        run = worker.run
        if run is None:
            return
        number = min(run.num_planned, run.num_ended(self._runtime.now) + 1)
        if number < run.num_planned:
            run.num_planned = number
            self._foretell_end(worker, run.end(number))
