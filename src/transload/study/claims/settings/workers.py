"""Workers of the catalog for the settings of claims, and the sums that several settings need. Fits nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import msgspec

from transload.errors import DeploymentError
from transload.hardware.catalog import load_chip, load_model
from transload.hardware.cost.shape import StepShape
from transload.hardware.cost.worker import WorkerCost
from transload.hardware.parallel import Parallel
from transload.hardware.precision import Precision, parse_dtype, with_kv, with_weights
from transload.hardware.slots import parse_assumption
from transload.study.claims.verdict import Simulated


@cache
def worker(
    chip: str,
    model: str,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    data: int = 1,
    expert: int = 1,
    weights: str = "",
    experts: str = "",
    kv: str = "",
    engine: str = "generic",
    assume: tuple[str, ...] = (),
) -> WorkerCost:
    """A worker of the catalog. Formats are the model's own where none is given. Raises `DeploymentError`."""
    card = load_model(model)
    precision: Precision = card.precision
    if weights:
        precision = with_weights(precision, parse_dtype(weights))
    if experts:
        precision = msgspec.structs.replace(precision, experts=parse_dtype(experts))
    if kv:
        precision = with_kv(precision, parse_dtype(kv))
    return WorkerCost(
        load_chip(chip).assuming(parse_assumption(text) for text in assume),
        card,
        Parallel(tensor=tensor, pipeline=pipeline, data_attention=data, expert=expert),
        precision,
        engine,
    )


def prefill_seconds(cost: WorkerCost, prompts: Sequence[int]) -> float:
    """One step with whole prompts in it."""
    return cost.step_seconds(StepShape(prefill=tuple((0, length) for length in prompts)))


def chunked_seconds(cost: WorkerCost, prompt: int, chunk: int) -> float:
    """A prompt in chunks, one a step."""
    return sum(
        cost.step_seconds(StepShape(prefill=((start, min(chunk, prompt - start)),)))
        for start in range(0, prompt, chunk)
    )


def decode_seconds(cost: WorkerCost, batch: int, context: float) -> float:
    """One decode step of `batch` requests with this much context each."""
    fixed, each = cost.decode_coefficients(batch)
    return fixed + each * batch * context


def mixed_seconds(cost: WorkerCost, prompt_tokens: int, start: int, batch: int, context: int) -> float:
    """One step with a chunk of a prompt and the next token of `batch` requests."""
    return cost.step_seconds(
        StepShape(prefill=((start, prompt_tokens),), num_decode=batch, decode_context_tokens=batch * context)
    )


def fits(cost: WorkerCost, tokens: float) -> bool:
    """Whether the weights and the KV of so many tokens fit."""
    try:
        return cost.kv_tokens >= tokens
    except DeploymentError:
        return False


def seconds(cost: WorkerCost, value: float, *, times: float = 1.0) -> Simulated:
    """A duration, in a unit of which `times` make a second (1e3: ms), with the worker's interval."""
    return Simulated(value=value * times, interval=cost.interval)


def rate(cost: WorkerCost, value: float) -> Simulated:
    """Something a second: its interval is that of its durations, upside down."""
    low, high = cost.interval
    return Simulated(value=value, interval=(1 / high, 1 / low))


def ratio(value: float) -> Simulated:
    """One simulated number over another. No interval: their errors are not independent."""
    return Simulated(value=value)


def assumptions_of(costs: Iterable[WorkerCost]) -> tuple[str, ...]:
    """What all these workers take for granted, each line once."""
    lines = (line.removeprefix("assumed: ") for cost in costs for line in cost.assumptions)
    return tuple(dict.fromkeys(lines))
