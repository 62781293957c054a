"""How fast the machine is at the moment: two short steps, measured again and again while something else goes on.

A core of a machine that others share, of a virtual one above all, takes a quarter longer for some seconds or minutes,
and each core at other times. So a look is at one core at a time, and a load is put right by the looks taken all through
it. A look costs a core some hundredths of what is going on: that is all a load notices of it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from statistics import fmean

import msgspec

from transload.deploy.machine import read_machine
from transload.deploy.placement import place
from transload.deploy.plan import WorkerPlan
from transload.deploy.spec import Deployment
from transload.errors import TransloadError
from transload.hardware.measured import Slowdown, Speed
from transload.model.native.library import load
from transload.model.source import locate
from transload.study.calibrate.probes import Probe, StepOrder, probes

PROMPT = StepOrder(prefill=((0, 16),))
DECODE = StepOrder(decode=(256,) * 4)
PERIOD_SECONDS = 3.0


def cores_of(plan: WorkerPlan) -> tuple[int | None, ...]:
    """Where steps of a worker can be measured one by one: on each core that one thread can have. (None,): they are on
    several cores at once, or on a GPU."""
    if plan.threads > 1 or plan.device != "cpu" or not hasattr(os, "sched_getaffinity"):
        return (None,)
    return tuple(sorted(os.sched_getaffinity(0)))


def look(probe: Probe, core: int | None) -> Speed:
    """Less than a tenth of a second with the default model."""
    prefill, decode = (
        probe.alone_seconds(probe.measure(msgspec.structs.replace(order, core=core)))[-1] for order in (PROMPT, DECODE)
    )
    return Speed(prefill_seconds=prefill, decode_seconds=decode)


def mean_of(looks: Sequence[Speed]) -> Speed:
    return Speed(
        prefill_seconds=fmean(each.prefill_seconds for each in looks),
        decode_seconds=fmean(each.decode_seconds for each in looks),
    )


def drift(since: Speed, now: Speed) -> Slowdown:
    """How many times as long steps take now."""
    return Slowdown(
        prefill=now.prefill_seconds / since.prefill_seconds, decode=now.decode_seconds / since.decode_seconds
    )


class SpeedWatch:
    """Looks at one core after another. Only its own thread and `since` use the probe meanwhile."""

    def __init__(self, probe: Probe, period_seconds: float = PERIOD_SECONDS) -> None:
        self._probe = probe
        self._period_seconds = period_seconds
        self._num_cores = len(cores_of(probe.plan))
        self._cores = cycle(cores_of(probe.plan))
        self._looks: list[Speed] = []
        self._problem: TransloadError | None = None
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        look(probe, next(self._cores))  # the first one grows scratch memory
        self._thread = threading.Thread(target=self._run, name="speed-watch", daemon=True)
        self._thread.start()

    def since(self) -> Speed:
        """Mean of what has been seen since this was asked for last, or since it was made: of each core at least once.

        Raises `TransloadError` if the probe could not say.
        """
        with self._lock:
            if self._problem is not None:
                raise self._problem
            while len(self._looks) < self._num_cores:
                self._looks.append(look(self._probe, next(self._cores)))
            looks, self._looks = self._looks, []
        return mean_of(looks)

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(self._period_seconds):
            with self._lock:
                try:
                    self._looks.append(look(self._probe, next(self._cores)))
                except TransloadError as problem:
                    self._problem = problem
                    return


@contextmanager
def watching(probe: Probe, period_seconds: float = PERIOD_SECONDS) -> Iterator[SpeedWatch]:
    watch = SpeedWatch(probe, period_seconds)
    try:
        yield watch
    finally:
        watch.close()


@contextmanager
def watching_machine_of(deployment: Deployment, period_seconds: float = PERIOD_SECONDS) -> Iterator[SpeedWatch]:
    """With a process of its own, which has the whole model even where feed-forwards are computed elsewhere."""
    pools = tuple(msgspec.structs.replace(pool, ffn=None) for pool in deployment.pools if pool.role != "ffn")
    names = {pool.name for pool in pools}
    links = tuple(link for link in deployment.links if names.issuperset(link.between))
    whole = msgspec.structs.replace(deployment, pools=pools, links=links)
    placement = place(whole, read_machine(has_kernels=load() is not None), locate(whole.model).arch)
    plan = next(plan for plan in placement.workers if plan.starts_here)
    with probes([plan]) as (probe,), watching(probe, period_seconds) as watch:
        yield watch
