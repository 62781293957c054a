"""From a schedule that fails to a short story: leaves out what the failure does not need, and tells the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import msgspec

from tests.schedules import Schedule, judge, run

MOST_TRIES = 2000
PLAIN = {"workers": "p0 d0", "staged": False, "policy": "estimate", "num_blocks": 200, "most_windows": None}
Item = TypeVar("Item")
change = msgspec.structs.replace


def failure_of(schedule: Schedule) -> str | None:
    """What goes wrong when it is played, in one line; None if nothing does."""
    try:
        judge(run(schedule))
    except (AssertionError, LookupError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def shrink(
    schedule: Schedule, fails: Callable[[Schedule], bool] = lambda schedule: failure_of(schedule) is not None
) -> Schedule:
    """The smallest schedule found that still fails: no single step of `_smaller` can be taken from it any more."""
    num_tries = 0
    while True:
        for candidate in _smaller(schedule):
            num_tries += 1
            if num_tries > MOST_TRIES:
                return schedule
            if fails(candidate):
                schedule = candidate
                break
        else:
            return schedule


def _smaller(schedule: Schedule) -> Iterator[Schedule]:
    """Simpler schedules, the largest steps first."""
    for asks in _shorter(schedule.asks):
        if asks:
            yield change(schedule, asks=asks)
    for disturbances in _shorter(schedule.disturbances):
        yield change(schedule, disturbances=disturbances)
    for name, rate in schedule.frame_rates.items():
        if rate:
            yield change(schedule, frame_rates={**schedule.frame_rates, name: 0.0})
    if schedule.step_failure_rate:
        yield change(schedule, step_failure_rate=0.0)
    for field, plain in PLAIN.items():
        named = {disturbance.worker for disturbance in schedule.disturbances}
        if getattr(schedule, field) != plain and (field != "workers" or named <= {"p0", "d0"}):
            yield change(schedule, **{field: plain})
    for place, ask in enumerate(schedule.asks):
        simpler = [
            change(ask, cancel_after_seconds=None),
            change(ask, stops_at=None, min_tokens=0),
            change(ask, prompt=ask.prompt[: max(1, len(ask.prompt) // 2)]),
            change(ask, prompt=ask.prompt[: max(1, len(ask.prompt) - 1)]),
            change(ask, max_tokens=max(1, ask.max_tokens // 2), stops_at=None),
            change(ask, at_seconds=1.0),
        ]
        for candidate in simpler:
            if candidate != ask:
                yield change(schedule, asks=(*schedule.asks[:place], candidate, *schedule.asks[place + 1 :]))


def _shorter(items: Sequence[Item]) -> Iterator[tuple[Item, ...]]:
    """Without its first half, without its second, and without each one."""
    if len(items) > 2:
        yield tuple(items[: len(items) // 2])
        yield tuple(items[len(items) // 2 :])
    for place in range(len(items)):
        yield (*items[:place], *items[place + 1 :])


def story(schedule: Schedule) -> str:
    """The schedule in words, a line for each thing that happens."""
    rates = [f"{name} {rate:.0%}" for name, rate in schedule.frame_rates.items() if rate]
    rates += [f"steps fail {schedule.step_failure_rate:.0%}"] if schedule.step_failure_rate else []
    links = "written straight into memory" if schedule.one_sided else "sent"
    if schedule.in_place:
        links = f"in place over {schedule.most_windows if schedule.most_windows is not None else 'all'} links a worker"
    lines = [
        f"seed {schedule.seed}: workers {schedule.workers}; {schedule.num_blocks} blocks each, steps of "
        f"{schedule.step_tokens} tokens, batches of {schedule.max_batch}; KV {links}"
        f"{', staged' if schedule.staged else ''}; {schedule.policy}, local prefill {schedule.local_prefill}",
        f"  faults: {', '.join(rates) or 'none'}",
    ]
    happenings = [
        (
            ask.at_seconds,
            f"request {number}: {len(ask.prompt)} tokens in ({ask.prompt[0]}, 0, 1, ...), {ask.max_tokens} out, within "
            f"{ask.deadline_seconds:g} s{'' if ask.stops_at is None else f', stops at {ask.stops_at}'}"
            f"{'' if ask.cancel_after_seconds is None else f', gone after {ask.cancel_after_seconds:.3f} s'}",
        )
        for number, ask in enumerate(schedule.asks, 1)
    ]
    for d in schedule.disturbances:
        whom = f"{d.worker} from {d.other}" if d.other else d.worker
        happenings.append((d.at_seconds, f"{d.event} {whom}{f' for {d.seconds:g} s' if d.seconds else ''}"))
    lines += [f"  {at_seconds:.3f} s  {what}" for at_seconds, what in sorted(happenings)]
    return "\n".join(lines)
