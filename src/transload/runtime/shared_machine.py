"""Workers that share a machine, in virtual time: each step gets on at the pace that the others leave it, anew whenever
something begins or ends.

Owns how far everything under way is, and when it reaches its next milestone; what the paces are, a `MachineModel` says.
Like `flows.py`, with cores in place of wires.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from transload.control.messages import Chunk, WorkerId
from transload.hardware.cost.contention import Work

Milestone = tuple[float, Callable[[], None]]
"""Seconds of work done, counted from the beginning, and what happens then."""


class MachineModel(Protocol):
    """What computing at once does to the speed of each."""

    def work(self, chunks: Sequence[Chunk], /) -> Work:
        """A step as something that occupies the machine."""
        ...

    def paces(self, works: Sequence[Work], /) -> Sequence[float]:
        """Seconds of work that each gets done in a second."""
        ...

    def front_end_seconds(self, chunks: Sequence[Chunk], /) -> float:
        """Of one core, that the front end wants once a step with these chunks is done."""
        ...


class Job:
    """Something under way: a worker's step, or the front end's arrears."""

    __slots__ = ("done", "milestones", "pace", "since", "version", "work")

    def __init__(self, work: Work, milestones: Sequence[Milestone], now: float) -> None:
        self.work = work
        self.milestones = list(reversed(milestones))
        """The next one is last."""
        self.done = 0.0
        self.pace = 0.0
        self.since = now
        self.version = 0
        """Goes up whenever the next milestone is known anew: one that was foretold before does not count."""


Foretell = Callable[[float, WorkerId | None, Callable[..., None], Job, int], None]
"""(at, worker, action, job, version): call `action(job, version)` then. The worker is None for the front end."""


class SharedMachine:
    """Everything that computes on one machine."""

    def __init__(self, model: MachineModel, now: Callable[[], float], foretell: Foretell) -> None:
        self._model = model
        self._now = now
        self._foretell = foretell
        self._jobs: dict[WorkerId | None, Job] = {}

    def begin(self, worker: WorkerId, chunks: Sequence[Chunk], milestones: Sequence[Milestone]) -> None:
        """A step begins that passes these milestones, the last of which is its end. A worker has one step at a time:
        of an earlier one that has not ended nothing more will be heard."""
        self._leave(worker)
        self._enter(worker, Job(self._model.work(chunks), milestones, self._now()))

    def drop(self, worker: WorkerId) -> None:
        """The worker has died: its step reaches no further milestone."""
        if self._leave(worker):
            self._share()

    def tell(self, chunks: Sequence[Chunk]) -> None:
        """The tokens of a step are out: the front end has something to do, after what it still has."""
        seconds = self._model.front_end_seconds(chunks)
        if seconds <= 0:
            return
        now, job = self._now(), self._jobs.get(None)
        if job is not None:
            self._settle(job, now)
            (until, action) = job.milestones[0]
            job.milestones[0] = (until + seconds, action)
            self._foretell_next(None, job, now)
        else:
            self._enter(None, Job(Work("front_end"), [(seconds, lambda: None)], now))

    def _enter(self, worker: WorkerId | None, job: Job) -> None:
        self._jobs[worker] = job
        self._share()

    def _leave(self, worker: WorkerId | None) -> bool:
        job = self._jobs.pop(worker, None)
        if job is not None:
            job.version += 1
        return job is not None

    def _share(self) -> None:
        """Give everyone the pace that is due with what is under way now."""
        now = self._now()
        paces = self._model.paces([job.work for job in self._jobs.values()])
        for (worker, job), pace in zip(self._jobs.items(), paces, strict=True):
            if pace != job.pace:
                self._settle(job, now)
                job.pace = pace
                self._foretell_next(worker, job, now)

    @staticmethod
    def _settle(job: Job, now: float) -> None:
        """Never beyond the next milestone, which has an event of its own."""
        job.done = min(job.milestones[-1][0], job.done + job.pace * (now - job.since))
        job.since = now

    def _foretell_next(self, worker: WorkerId | None, job: Job, now: float) -> None:
        job.version += 1
        at = now + (job.milestones[-1][0] - job.done) / job.pace
        self._foretell(at, worker, self._reached, job, job.version)

    def _reached(self, job: Job, version: int) -> None:
        if version != job.version:
            return
        worker = next(name for name, known in self._jobs.items() if known is job)
        now = self._now()
        job.done, action = job.milestones.pop()
        job.since = now
        if job.milestones:
            self._foretell_next(worker, job, now)
        else:
            self._leave(worker)
            self._share()
        action()
