"""From measured steps to the section of a chip file: which steps are worth measuring, and what their times say.

Pure: it is handed times. The form it fits is `hardware/measured.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

import msgspec

from transload.hardware.cost.measured import MeasuredStepCost, along
from transload.hardware.cost.shape import StepShape
from transload.hardware.measured import DecodePoint, MeasuredSteps, PrefillPoint
from transload.study.calibrate.probes import StepOrder

SHORT, LONG = 32, 512
"""Context of a decoding request in the two measurements of each batch size."""
BATCHES = (1, 2, 4, 8, 16, 32, 64)
PROMPTS = (16, 32, 64, 128, 256, 512, 1024, 2048)
LATER_CHUNKS = ((128, 64), (256, 128), (512, 128), (512, 256), (1024, 256))
MIXED = ((64, 2), (64, 8), (128, 4), (256, 8), (256, 16))


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    prefill: tuple[PrefillPoint, ...]
    prefill_context_seconds: float
    decode: tuple[DecodePoint, ...]
    mixed_share: float


def orders(
    *, max_batch: int, step_tokens: int, cache_tokens: int, block_size: int, repeats: int, quick: bool
) -> list[StepOrder]:
    """The steps to measure on a worker with these limits, decodes `repeats` times and prompts half as often."""
    batches = [size for size in BATCHES if size <= max_batch][: 2 if quick else None]
    prompts = [tokens for tokens in PROMPTS if tokens <= step_tokens][: 2 if quick else None]
    found = [StepOrder(decode=(context,) * size, repeats=repeats) for size in batches for context in (SHORT, LONG)]
    repeats = max(2, repeats // 2)
    for tokens in prompts:
        found.append(StepOrder(prefill=((0, tokens),), repeats=repeats))
        found += [  # right behind the prompt they are compared with
            StepOrder(prefill=((0, tokens),), decode=(LONG // 2,) * size, repeats=repeats)
            for mixed, size in MIXED[: 2 if quick else None]
            if mixed == tokens and size <= batches[-1]
        ]
    found += [
        StepOrder(prefill=((start, tokens),), repeats=repeats)
        for start, tokens in LATER_CHUNKS[: 1 if quick else None]
        if tokens <= max(prompts[-1], 64)
    ]
    spare = block_size * 96  # a block of each request may be begun only
    return [order for order in found if order.num_cached_tokens + spare <= cache_tokens]


def fit(times: Mapping[StepOrder, float]) -> Fit:
    """`times`: seconds of each order. There is at least one prompt from its beginning and one decode."""
    prefill = tuple(
        PrefillPoint(tokens=order.prefill[0][1], seconds=seconds)
        for order, seconds in sorted(times.items(), key=lambda item: item[0].num_cached_tokens)
        if len(order.prefill) == 1 and order.prefill[0][0] == 0 and not order.decode
    )
    decode = tuple(
        _decode_point(requests, _by_context(times, requests))
        for requests in sorted({len(order.decode) for order in times if order.decode and not order.prefill})
    )
    beginning = [(float(point.tokens), point.seconds) for point in prefill]
    later = [
        (seconds - along(beginning, order.prefill[0][1])) / (order.prefill[0][0] * order.prefill[0][1])
        for order, seconds in times.items()
        if len(order.prefill) == 1 and order.prefill[0][0] > 0 and not order.decode
    ]
    alone = MeasuredStepCost(_section(prefill, 0.0, decode, 1.0))
    shares = [
        (seconds - along(beginning, order.prefill[0][1])) / alone.step_seconds(shape_of(StepOrder(decode=order.decode)))
        for order, seconds in times.items()
        if order.prefill and order.decode
    ]
    return Fit(
        prefill=prefill,
        prefill_context_seconds=max(0.0, median(later)) if later else 0.0,
        decode=decode,
        mixed_share=min(2.0, max(0.05, median(shares))) if shares else 1.0,
    )


def _by_context(times: Mapping[StepOrder, float], requests: int) -> dict[int, float]:
    """Seconds by the context of all together, of the pure decodes of so many requests."""
    return {
        sum(order.decode): seconds
        for order, seconds in times.items()
        if not order.prefill and len(order.decode) == requests
    }


def _decode_point(requests: int, by_context: Mapping[int, float]) -> DecodePoint:
    """The line through the shortest and the longest context."""
    low, high = min(by_context), max(by_context)
    each = max(0.0, (by_context[high] - by_context[low]) / (high - low)) if high > low else 0.0
    return DecodePoint(
        requests=requests, fixed_seconds=max(0.0, by_context[low] - each * low), context_token_seconds=each
    )


def step_error(found: Fit, times: Mapping[StepOrder, float]) -> float:
    """Median relative error at the points that the form does not go through by its making: later chunks and mixtures.
    0 if there are none."""
    cost = MeasuredStepCost(_section(found.prefill, found.prefill_context_seconds, found.decode, found.mixed_share))
    errors = [
        abs(cost.step_seconds(shape_of(order)) / seconds - 1)
        for order, seconds in times.items()
        if order.prefill and (order.decode or order.prefill[0][0])
    ]
    return median(errors) if errors else 0.0


def shape_of(order: StepOrder) -> StepShape:
    return StepShape(prefill=order.prefill, num_decode=len(order.decode), decode_context_tokens=sum(order.decode))


def _section(
    prefill: Sequence[PrefillPoint], context_seconds: float, decode: Sequence[DecodePoint], mixed_share: float
) -> MeasuredSteps:
    """As if measured where nothing but steps takes time."""
    return MeasuredSteps(
        model="-",
        dtype="-",
        machine="-",
        date="-",
        by="-",
        num_cores=1,
        kv_tokens=1,
        kv_bytes_per_token=1,
        prefill=tuple(prefill),
        prefill_context_seconds=context_seconds,
        decode=tuple(decode),
        mixed_share=mixed_share,
    )
