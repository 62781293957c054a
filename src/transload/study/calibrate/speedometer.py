"""Times a small piece of arithmetic on one core after another: `python -m transload.study.calibrate.speedometer`.

A process of its own, so that its library computes on one thread and nobody else's lock is in the way. Reads one JSON
line an order and answers each with one; looks by itself in between. What the figures are for, `speed.py` says.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from itertools import cycle
from statistics import fmean
from typing import TextIO

import msgspec
import numpy as np

SIZE = 128
"""Rows of the matrices: three of them fit into a core's own cache, so that memory and who else uses it play no part."""
PRODUCTS = 6
WARM_UP = 16
"""So often it is done before anything counts: on a core that has had a rest the first ones take up to twice as long."""
TRIES = 6
"""The fastest counts."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    core: int | None = None
    """Look at this one now; None: tell of all that was seen since the last such order."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    seconds: float
    """Of processor time; mean of the cores' means."""
    num_looks: int


class Speedometer:
    """Looks at each of `cores` in turn, one every `period_seconds`."""

    def __init__(self, cores: tuple[int, ...], period_seconds: float) -> None:
        self._cores = cores
        self._period_seconds = period_seconds
        self._seen: dict[int, list[float]] = {core: [] for core in cores}
        self._lock = threading.Lock()
        generator = np.random.default_rng(0)
        self._left, self._right = (generator.random((SIZE, SIZE), dtype=np.float32) for _ in range(2))
        self._product = np.empty((SIZE, SIZE), dtype=np.float32)

    def run(self) -> None:
        """For ever."""
        for core in cycle(self._cores):
            time.sleep(self._period_seconds)
            with self._lock:
                self._seen[core].append(self.look(core))

    def look(self, core: int) -> float:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {core})
        times: list[float] = []
        for _ in range(WARM_UP + TRIES):
            began = time.thread_time()
            for _ in range(PRODUCTS):
                np.dot(self._left, self._right, out=self._product)
            times.append(time.thread_time() - began)
        return min(times[WARM_UP:])

    def answer(self, order: Order) -> Answer:
        with self._lock:
            if order.core is not None:
                return Answer(seconds=self.look(order.core), num_looks=1)
            for core, seen in self._seen.items():
                if not seen:
                    seen.append(self.look(core))
            told, self._seen = self._seen, {core: [] for core in self._cores}
        return Answer(
            seconds=fmean(fmean(seen) for seen in told.values()), num_looks=sum(len(seen) for seen in told.values())
        )


def main(orders: TextIO, answers: TextIO) -> None:
    """Until the orders end. Arguments: the period in seconds, then the cores."""
    meter = Speedometer(tuple(int(core) for core in sys.argv[2:]), float(sys.argv[1]))
    threading.Thread(target=meter.run, daemon=True).start()
    for line in orders:
        answer = meter.answer(msgspec.json.decode(line, type=Order))
        answers.write(msgspec.json.encode(answer).decode() + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.stdin, sys.stdout)
