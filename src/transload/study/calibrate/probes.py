"""Probe processes: a worker's executor, alone in a process, asked to compute steps and to say how long they took."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import msgspec

from transload.deploy.plan import WorkerPlan
from transload.errors import TransloadError
from transload.study.calibrate.answering import AnsweringProcess

START_SECONDS = 300.0
ORDER_SECONDS = 300.0
T = TypeVar("T", bound=msgspec.Struct)


class StepOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What to compute over and over: see `transload.model.probe.Order`."""

    prefill: tuple[tuple[int, int], ...] = ()
    """(start, tokens) of each prompt chunk."""
    decode: tuple[int, ...] = ()
    """Context of each decoding request, its new token included."""
    repeats: int = 1
    seconds: float = 0.0
    core: int | None = None

    @property
    def num_cached_tokens(self) -> int:
        """That the cache must hold for it, blocks not counted."""
        return sum(start + tokens for start, tokens in self.prefill) + sum(self.decode)


class StepTimes(msgspec.Struct, frozen=True, kw_only=True):
    """When each step began, on the monotonic clock, how long it took, and how much processor time."""

    started: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()
    cpu_seconds: tuple[float, ...] = ()
    error: str | None = None
    load_seconds: float = 0.0


class Probe:
    """One process with one executor. A context manager: leaving it ends the process."""

    def __init__(self, plan: WorkerPlan) -> None:
        self.plan = plan
        environment = {"OMP_NUM_THREADS": str(plan.threads)}
        self._process = AnsweringProcess(f"the probe of {plan.name}", "transload.model.probe", (), environment)
        self.load_seconds = 0.0

    def start(self) -> None:
        """Until the model is loaded."""
        self.load_seconds = self._ask(self.plan, START_SECONDS).load_seconds

    def measure(self, order: StepOrder) -> StepTimes:
        """Raises `TransloadError` if the process cannot, or does not answer in time."""
        return self._ask(order, ORDER_SECONDS)

    def alone_seconds(self, times: StepTimes) -> tuple[float, ...]:
        """How long the steps would have taken with a core of their own: one thread of a CPU waits for nothing else,
        so it is the processor time. Otherwise nothing better is known than how long they took."""
        has_one_thread = self.plan.threads == 1 and not self.plan.device.startswith("cuda")
        return times.cpu_seconds if has_one_thread else times.seconds

    def _ask(self, order: msgspec.Struct, deadline_seconds: float) -> StepTimes:
        times = self._process.ask(order, StepTimes, deadline_seconds)
        if times.error is not None:
            raise TransloadError(f"the probe of {self.plan.name} could not compute a step: {times.error}")
        return times

    def close(self) -> None:
        self._process.close()


@contextmanager
def probes(plans: Sequence[WorkerPlan]) -> Iterator[list[Probe]]:
    """One for each plan, started one after another so that loading disturbs no other."""
    with ExitStack() as stack:
        started: list[Probe] = []
        for plan in plans:
            probe = Probe(plan)
            stack.callback(probe.close)
            probe.start()
            started.append(probe)
        yield started


def measure_together(pairs: Sequence[tuple[Probe, StepOrder]]) -> list[StepTimes]:
    """All at once. Of each, the steps that began while every other was at work too."""
    answers: list[StepTimes | BaseException | None] = [None] * len(pairs)

    def ask(index: int, probe: Probe, order: StepOrder) -> None:
        try:
            answers[index] = probe.measure(order)
        except BaseException as problem:
            answers[index] = problem

    threads = [threading.Thread(target=ask, args=(index, *pair)) for index, pair in enumerate(pairs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times: list[StepTimes] = []
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
        assert answer is not None
        times.append(answer)
    since = max(each.started[0] for each in times)
    until = min(each.started[-1] + each.seconds[-1] for each in times)
    return [_between(each, since, until) for each in times]


def _between(times: StepTimes, since: float, until: float) -> StepTimes:
    kept = [
        (started, seconds, spent)
        for started, seconds, spent in zip(times.started, times.seconds, times.cpu_seconds, strict=True)
        if started >= since and started + seconds <= until
    ]
    if not kept:
        return times
    started, seconds, spent = zip(*kept, strict=True)
    return StepTimes(started=started, seconds=seconds, cpu_seconds=spent)
