"""How long a load's steps took, and the speed of the machine that follows from it.

Pure. It is handed steps alone: which worker's, when each began and ended, how many prompt tokens and decodes it had.
Latencies, throughput and stages of requests, which `compare.py` sets side by side, never come in here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

import msgspec

from transload.hardware.cost.measured import MeasuredStepCost
from transload.hardware.cost.shape import StepShape
from transload.hardware.measured import WorkKind
from transload.study.workload import ArrivalSpec

WINDOW_SECONDS = 10.0
"""The machine's speed is taken anew so often: it changes for seconds to minutes."""
ENOUGH_SECONDS = 1.0
"""Of steps of one kind; with less of them in a window, the whole load's speed is taken for it."""
ROUNDS = 5
STAYS = 0.01
"""When no speed changes by more from one round to the next, they are found."""
Key = tuple[str, WorkKind]


class AnyStep(Protocol):
    """A step of a timeline, or of a simulation."""

    @property
    def worker(self) -> str: ...
    @property
    def start_seconds(self) -> float: ...
    @property
    def end_seconds(self) -> float: ...
    @property
    def num_prefill_tokens(self) -> int: ...
    @property
    def num_decode(self) -> int: ...
    @property
    def num_steps(self) -> int: ...


class StepSum(msgspec.Struct, frozen=True, array_like=True):
    """All steps of one shape that a worker began in one window of a load."""

    worker: str
    window: int
    num_prefill_tokens: int
    num_decode: int
    """Requests that decode in each."""
    num_steps: int
    seconds: float
    """Of all of them, each until the next one could begin."""

    @property
    def key(self) -> Key:
        return self.worker, "prefill" if self.num_prefill_tokens else "decode"


class StepSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """How many times as long steps of one kind took on one worker as a machine of the calibrated speed takes."""

    worker: str
    kind: WorkKind
    """A step with prompt tokens is a prefill, whatever decodes in it."""
    times: float
    """All through the load."""
    by_window: tuple[float, ...]

    def at(self, seconds: float) -> float:
        """Of a step that begins then, counted from the beginning of the load."""
        window = int(seconds / WINDOW_SECONDS)
        return self.by_window[window] if window < len(self.by_window) else self.times


Speeds = Mapping[Key, StepSpeed]
S = TypeVar("S")


def sum_steps(steps: Iterable[AnyStep], *, began_seconds: float = 0.0, gap_seconds: float = 0.0) -> tuple[StepSum, ...]:
    """`began_seconds`: when the load began, on the clock of the steps; earlier ones are none of its. `gap_seconds`:
    between a worker's step and its next."""
    found: dict[tuple[str, int, int, int], list[float]] = defaultdict(lambda: [0, 0.0])
    for step in steps:
        if step.start_seconds < began_seconds:
            continue
        window = int((step.start_seconds - began_seconds) / WINDOW_SECONDS)
        tally = found[step.worker, window, step.num_prefill_tokens, step.num_decode]
        tally[0] += step.num_steps
        tally[1] += step.end_seconds - step.start_seconds + gap_seconds * step.num_steps
    return tuple(StepSum(*shape, int(count), seconds) for shape, (count, seconds) in sorted(found.items()))


Alone = Callable[[StepSum], float]
"""Seconds of the same steps on the calibrated machine, with nothing else on it."""


def alone_on(cost: MeasuredStepCost, arrivals: Sequence[ArrivalSpec]) -> Alone:
    """Steps do not say how long their contexts are: each decode is taken at the mean of the load, which both sides
    have. What is compared are ratios to this, so that steps of unlike shapes are not: it decides no length itself."""
    outputs = sum(arrival.num_output_tokens for arrival in arrivals)
    spent = sum(
        arrival.num_output_tokens * (arrival.num_input_tokens + arrival.num_output_tokens / 2) for arrival in arrivals
    )
    context = spent / outputs if outputs else 0.0

    def seconds(steps: StepSum) -> float:
        prompt = ((0, steps.num_prefill_tokens),) if steps.num_prefill_tokens else ()
        shape = StepShape(prompt, steps.num_decode, round(steps.num_decode * context))
        return steps.num_steps * cost.step_seconds(shape)

    return seconds


def find_speeds(
    real: Sequence[StepSum], alone: Alone, play: Callable[[Speeds], tuple[S, Sequence[StepSum]]]
) -> tuple[Speeds, S]:
    """The speeds with which `play`, which simulates, has steps as long as the real ones, and what it made of them.

    Found by trying: workers slow each other, and how much hangs on how long their steps are. Every round sets both
    sides' seconds over the same steps `alone`, worker by worker, kind by kind, window by window.
    """
    num_windows = 1 + max((steps.window for steps in real), default=0)
    speeds: Speeds = {
        key: StepSpeed(worker=key[0], kind=key[1], times=1.0, by_window=(1.0,) * num_windows)
        for key in sorted({steps.key for steps in real})
    }
    wanted = _over_alone(real, alone)
    for _ in range(ROUNDS):
        played, steps = play(speeds)
        found = _over_alone(steps, alone)
        better = {key: _better(speed, wanted[key], found.get(key, {})) for key, speed in speeds.items()}
        if all(map(_stays, speeds.values(), better.values())):
            return speeds, played
        speeds = better
    return speeds, play(speeds)[0]


class _Total(msgspec.Struct):
    seconds: float = 0.0
    alone_seconds: float = 0.0


Windows = Mapping[int, _Total]


def _over_alone(steps: Iterable[StepSum], alone: Alone) -> dict[Key, dict[int, _Total]]:
    found: dict[Key, dict[int, _Total]] = defaultdict(lambda: defaultdict(_Total))
    for each in steps:
        total = found[each.key][each.window]
        total.seconds += each.seconds
        total.alone_seconds += alone(each)
    return found


def _better(speed: StepSpeed, wanted: Windows, found: Windows) -> StepSpeed:
    """What simulated steps took is first brought back to the calibrated speed: what is left beside steps alone is what
    the simulation itself adds to them."""
    unscaled = {
        window: _Total(total.seconds / speed.at(window * WINDOW_SECONDS), total.alone_seconds)
        for window, total in found.items()
    }
    times = _ratio(wanted.values()) / _ratio(unscaled.values())

    def now(window: int) -> float:
        real, simulated = wanted.get(window, _Total()), unscaled.get(window, _Total())
        is_enough = min(real.seconds, simulated.seconds) >= ENOUGH_SECONDS
        return _ratio([real]) / _ratio([simulated]) if is_enough else times

    return msgspec.structs.replace(speed, times=times, by_window=tuple(map(now, range(len(speed.by_window)))))


def _ratio(totals: Iterable[_Total]) -> float:
    """Seconds of steps over those of the same steps alone; 1 where there are none."""
    listed = list(totals)
    alone_seconds = math.fsum(total.alone_seconds for total in listed)
    return math.fsum(total.seconds for total in listed) / alone_seconds if alone_seconds else 1.0


def _stays(before: StepSpeed, after: StepSpeed) -> bool:
    pairs = zip((before.times, *before.by_window), (after.times, *after.by_window), strict=True)
    return all(abs(new / old - 1) < STAYS for old, new in pairs)
