"""Steps that only a whole server can compute, as when feed-forwards are computed in other processes: read from its
event logs while known requests are served, in the form that bare steps are measured in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import median

import msgspec

from transload.study.calibrate.effort import Effort, Say
from transload.study.calibrate.probes import StepOrder
from transload.study.timeline import Step

PROMPTS = (16, 32, 64, 128, 256, 512)
USERS = (1, 2, 4, 8, 16)
SHORT, LONG = 32, 256
"""Prompts of a crowd of users, for two contexts."""
OUTPUT = 24
PROMPT_REPEATS = 3

Ask = Callable[[int, int, int], Iterable[Step]]
"""(users, prompt tokens, output tokens) -> the steps in which that many requests, all sent at once, were served."""


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """One crowd of requests of equal lengths, and the steps that served it."""

    users: int
    prompt: int
    output: int
    steps: tuple[Step, ...]


def measure_served(ask: Ask, *, max_batch: int, effort: Effort, say: Say) -> dict[StepOrder, float]:
    """Seconds of steps, by what they computed."""
    prompts = PROMPTS[: 2 if effort.quick else None]
    users = [count for count in USERS if count <= max_batch][: 2 if effort.quick else None]
    seen: list[Seen] = []
    crowds = [(1, prompt, 2) for _ in range(1 if effort.quick else PROMPT_REPEATS) for prompt in prompts]
    crowds += [(count, prompt, OUTPUT) for count in users for prompt in (SHORT, LONG)]
    for number, (count, prompt, output) in enumerate(crowds, 1):
        steps = tuple(ask(count, prompt, output))
        seen.append(Seen(users=count, prompt=prompt, output=output, steps=steps))
        say(f"  {number} of {len(crowds)}: {count} x {prompt} prompt tokens, {output} output tokens")
    return times_of(seen)


def times_of(seen: Sequence[Seen]) -> dict[StepOrder, float]:
    """Whole prompts alone, whole crowds decoding, and steps that do both; medians. A decoding request's context is
    known from its lengths: on average its prompt and half its output."""
    times: dict[StepOrder, list[float]] = defaultdict(list)
    for crowd in seen:
        context = crowd.prompt + crowd.output // 2
        for step in crowd.steps:
            seconds = (step.end_seconds - step.start_seconds) / step.num_steps
            if crowd.users == 1 and step.num_prefill_tokens == crowd.prompt:
                times[StepOrder(prefill=((0, crowd.prompt),))].append(seconds)
            elif step.num_decode == crowd.users and not step.num_prefill_tokens and crowd.output == OUTPUT:
                times[StepOrder(decode=(context,) * crowd.users)].append(seconds)
            elif step.num_decode and step.num_prefill_tokens:
                order = StepOrder(prefill=((0, step.num_prefill_tokens),), decode=(context,) * step.num_decode)
                times[order].append(seconds)
    return {order: median(seconds) for order, seconds in times.items()}
