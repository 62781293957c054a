"""What cores of this machine do to each other: steps alone, and the same steps while another core is at work.

Alone and together take turns in short rounds, each worker on a core of its own, so that a machine that is now faster
and now slower is so for both. A
step that had to wait for a core did not compute more slowly: that is counted where cores are shared out.
"""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from statistics import median

import msgspec

from transload.hardware.measured import BesideEach, Interference
from transload.study.calibrate.effort import Effort, Say
from transload.study.calibrate.probes import Probe, StepOrder, StepTimes, measure_together
from transload.study.calibrate.speed import core_of, own_cores

BATCHES = (2, 4, 8)
"""Decoding requests in each round."""
CONTEXT, PROMPT = 256, 128
Times = dict[tuple[str, str], list[float]]
"""By (kind of step, kind of work beside it): each over the same step alone in the same round."""


def measure_interference(running: Sequence[Probe], effort: Effort, say: Say) -> Interference:
    """Of two workers and the front end; of one worker beside the front end alone, where there is no other."""
    ratios: Times = defaultdict(list)
    for batch in BATCHES[: effort.rounds] * effort.rounds:
        _measure_round(running, batch, effort.together_seconds, ratios)
    found = Interference(prefill=_row(ratios, "prefill"), decode=_row(ratios, "decode"))
    for kind, row in (("prefill", found.prefill), ("decode", found.decode)):
        say(
            f"  a {kind} step takes {row.prefill:.2f} x as long beside prefill, {row.decode:.2f} x beside decode, "
            f"{row.front_end:.2f} x beside the front end"
        )
    return found


def _measure_round(running: Sequence[Probe], batch: int, seconds: float, ratios: Times) -> None:
    core = core_of(running[0].plan)
    steps = {
        "prefill": StepOrder(prefill=((0, PROMPT),), repeats=2, seconds=seconds, core=core),
        "decode": StepOrder(decode=(CONTEXT,) * batch, repeats=2, seconds=seconds, core=core),
    }
    alone = {kind: _typical(running[0].measure(order), running[0]) for kind, order in steps.items()}
    for kind, order in steps.items():
        with _front_end_at_work():
            ratios[kind, "front_end"].append(_typical(running[0].measure(order), running[0]) / alone[kind])
    if len(running) < 2:
        return
    for kind, other in product(steps, steps):
        elsewhere = msgspec.structs.replace(steps[other], core=None if core is None else own_cores()[-1])
        first, _ = measure_together([(running[0], steps[kind]), (running[1], elsewhere)])
        ratios[kind, other].append(_typical(first, running[0]) / alone[kind])


def _typical(times: StepTimes, probe: Probe) -> float:
    return median(probe.alone_seconds(times))


def _row(ratios: Times, kind: str) -> BesideEach:
    """Nobody gets faster by company: what is below 1 is chance."""

    def factor(other: str) -> float:
        return max(1.0, median(ratios[kind, other])) if ratios[kind, other] else 1.0

    return BesideEach(prefill=factor("prefill"), decode=factor("decode"), front_end=factor("front_end"))


@contextmanager
def _front_end_at_work() -> Iterator[None]:
    """Work of the front end's kind on this process's core: an interpreter that reads and writes small messages."""
    is_over = threading.Event()
    message = json.dumps({"choices": [{"delta": {"content": " word"}, "index": number} for number in range(8)]})

    def work() -> None:
        while not is_over.is_set():
            json.dumps(json.loads(message))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
