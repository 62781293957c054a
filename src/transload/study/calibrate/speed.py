"""How fast the machine's cores are at the moment: looked at again and again while something else goes on.

A core of a machine that others share, of a virtual one above all, takes a good deal longer for some seconds or
minutes, and each core at other times. What is measured at one time and used at another is put right by what the same
arithmetic took at both. It stays in a core's own cache, so that what our own workers do to each other through memory is
not in it; on one core it slows down by what prompts and decodes slow down.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from transload.deploy.plan import WorkerPlan
from transload.hardware.measured import Slowdown, Speed
from transload.study.calibrate.answering import AnsweringProcess
from transload.study.calibrate.speedometer import Answer, Order

PERIOD_SECONDS = 0.4
ANSWER_SECONDS = 30.0


def own_cores() -> tuple[int, ...]:
    """That this process may use."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else (0,)


def core_of(plan: WorkerPlan) -> int | None:
    """To measure a worker's steps on. None: they are on several cores at once, or on a GPU."""
    is_single = plan.threads == 1 and not plan.device.startswith("cuda")
    return own_cores()[0] if is_single and hasattr(os, "sched_setaffinity") else None


def drift(since: Speed, now: Speed) -> float:
    """How many times as long everything that computes takes now."""
    return now.product_seconds / since.product_seconds


def slowdown(times: float) -> Slowdown:
    return Slowdown(prefill=times, decode=times)


class SpeedWatch:
    """A process that looks again and again; a fiftieth of a core. For one thread."""

    def __init__(self, cores: tuple[int, ...], period_seconds: float = PERIOD_SECONDS) -> None:
        one_thread = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = AnsweringProcess(
            "the process that looks at the machine's speed",
            "transload.study.calibrate.speedometer",
            (str(period_seconds), *map(str, cores)),
            one_thread,
        )
        self.since()  # it is there

    def since(self) -> Speed:
        """Mean of what has been seen since this was asked for last, or since it was made: of each core at least once.

        Raises `TransloadError` if the process does not answer.
        """
        return self._ask(Order())

    def look(self, core: int | None) -> Speed:
        """Now, at a core; at all of them, if it is not known which."""
        if core is not None:
            return self._ask(Order(core=core))
        self.since()
        return self.since()

    def _ask(self, order: Order) -> Speed:
        return Speed(product_seconds=self._process.ask(order, Answer, ANSWER_SECONDS).seconds)

    def close(self) -> None:
        self._process.close()


@contextmanager
def watching(period_seconds: float = PERIOD_SECONDS) -> Iterator[SpeedWatch]:
    """All cores of this process."""
    watch = SpeedWatch(own_cores(), period_seconds)
    try:
        yield watch
    finally:
        watch.close()
