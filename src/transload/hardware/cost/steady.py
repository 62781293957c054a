"""Closed-form answers for a worker or a pair of pools under a steady load: TTFT, TPOT, throughput. For search.

The same operations as the event simulation, without events: queues in the mean, every request alike. Pure.
"""

from __future__ import annotations

import math

import msgspec

from transload.hardware.cost.shape import StepShape
from transload.hardware.cost.worker import WorkerCost

ITERATIONS = 40
TOLERANCE = 1e-4


class Saturated(Exception):
    """A load past what the workers can take: queues would grow for ever."""


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """How an engine fills its steps."""

    mixed: bool = True
    """Prefill chunks ride with decoding requests in one step; otherwise a step is one or the other, prefill first."""
    max_step_tokens: int = 8192
    max_batch: int = 100_000


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Requests, all alike."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    """Of the prompt, found in a prefix cache."""


class Steady(msgspec.Struct, frozen=True, kw_only=True):
    """What a steady load gives. Throughputs are of the whole worker or deployment."""

    ttft_seconds: float
    """With what a front end adds."""
    tpot_seconds: float
    requests_per_second: float
    output_tokens_per_second: float
    num_decoding: float
    """Requests that decode at a time, on one worker."""
    busy_share: float
    """Of the time, that the (decoding) worker works."""


def prompt_steps(load: Load, policy: Policy) -> list[tuple[int, int]]:
    """The chunks of a prompt: as large as a step may be."""
    start, chunks = load.cached_tokens, []
    while start < load.prompt_tokens:
        size = min(policy.max_step_tokens, load.prompt_tokens - start)
        chunks.append((start, size))
        start += size
    return chunks


def prompt_seconds(cost: WorkerCost, load: Load, policy: Policy, num_decode: int = 0, together: int = 1) -> float:
    """What one prompt adds to a worker that decodes `num_decode` requests; alone, its whole prefill.

    `together` prompts come at once and share the steps, one on each attention rank: a prompt's part of that.
    """
    context = num_decode * (load.prompt_tokens + load.output_tokens // 2)
    riding = num_decode if policy.mixed else 0
    base = cost.step_seconds(StepShape((), riding, context)) if riding else 0.0
    seconds = 0.0
    for chunk in prompt_steps(load, policy):
        shape = StepShape((chunk,) * together, riding, context if riding else 0)
        seconds += cost.step_seconds(shape) - base
    return seconds / together


def ranks_filled(cost: WorkerCost, concurrency: float) -> int:
    """Attention ranks that prefill at a time: all of them, if there are requests for them."""
    return max(1, min(cost.parallel.data_attention, int(concurrency)))


def decode_seconds(cost: WorkerCost, load: Load, num_decode: float) -> float:
    """A decode step at the mean context, for a number of requests that need not be whole."""
    low = max(1, math.floor(num_decode))
    share = max(0.0, num_decode - low)
    each_context = load.prompt_tokens + load.output_tokens / 2
    fixed, per_token = cost.decode_coefficients(low)
    seconds = fixed + per_token * low * each_context
    if share:
        fixed, per_token = cost.decode_coefficients(low + 1)
        seconds += share * (fixed + per_token * (low + 1) * each_context - seconds)
    return seconds


def most_decoding(cost: WorkerCost, load: Load, policy: Policy) -> int:
    """Requests whose KV fits at once, at full length. Raises `DeploymentError` if not one does."""
    return max(1, min(policy.max_batch, cost.kv_tokens // (load.prompt_tokens + load.output_tokens)))


def aggregated(cost: WorkerCost, load: Load, concurrency: int, policy: Policy | None = None) -> Steady:
    """A worker that prefills and decodes, with so many requests in flight, a new one for each that ends.

    Per decode step B / output requests end, and as many prompts come in, so TPOT = step + B / output * prompt. The
    prompt's own way is a queue of deterministic service in a closed loop (mean value analysis with halved waiting).
    """
    policy = policy or Policy()
    room = most_decoding(cost, load, policy)
    admitted = min(concurrency, room)
    decoding = float(admitted)
    together = ranks_filled(cost, concurrency)
    step = tpot = ttft = prompt = rate = 0.0
    for _ in range(ITERATIONS):
        step = decode_seconds(cost, load, decoding)
        prompt = prompt_seconds(cost, load, policy, round(decoding), together)
        alone = prompt_seconds(cost, load, policy, round(decoding))
        tpot = step + decoding / load.output_tokens * prompt
        waits = len(prompt_steps(load, policy)) * step if policy.mixed else 0.0
        rate = decoding / (load.output_tokens * tpot)
        share = min(1.0, rate * prompt)
        residual = (1 - share) * step / 2
        queued = share * prompt / (2 * max(1 - share, 1 / concurrency)) * (concurrency - 1) / concurrency
        ttft = residual + queued + alone + waits
        better = admitted * load.output_tokens * tpot / (load.output_tokens * tpot + ttft)
        if abs(better - decoding) < TOLERANCE * decoding:
            break
        decoding = max(1.0, (decoding + better) / 2) if admitted > 1 else 1.0
    ttft += cost.request_seconds(load.prompt_tokens, concurrency)
    in_flight = load.output_tokens * tpot + ttft
    waiting = (concurrency - admitted) / admitted * in_flight
    rate = concurrency / (in_flight + waiting)
    return Steady(
        ttft_seconds=ttft + waiting,
        tpot_seconds=tpot,
        requests_per_second=rate,
        output_tokens_per_second=rate * load.output_tokens,
        num_decoding=decoding,
        busy_share=1.0,
    )


def aggregated_at_rate(
    cost: WorkerCost, load: Load, requests_per_second: float, policy: Policy | None = None
) -> Steady:
    """A worker that prefills and decodes what arrives by chance (Poisson). Raises `Saturated` past its capacity.

    Prompts take `rate * prompt` of the time, so TPOT = step / (1 - rate * prompt); requests that decode, by Little's
    law, are rate * output * TPOT. A request sees itself beside that many. A prompt waits as in M/D/1 with vacations:
    for the prompts before it, each with the decodes that ride along, and for half of the step that is under way.
    """
    policy = policy or Policy()
    room = most_decoding(cost, load, policy)
    decoding, share = 1.0, 0.0
    step = tpot = prompt = 0.0
    for _ in range(ITERATIONS):
        step = decode_seconds(cost, load, decoding + 1)
        prompt = prompt_seconds(cost, load, policy, round(decoding + 1))
        share = requests_per_second * prompt
        if share >= 1:
            raise Saturated(f"prompts alone take {share:.0%} of the worker's time")
        tpot = step / (1 - share)
        better = requests_per_second * load.output_tokens * tpot
        if abs(better - decoding) < TOLERANCE * decoding:
            break
        decoding = (decoding + max(better, 1e-9)) / 2
        if decoding > room:
            raise Saturated(f"{decoding:,.0f} requests would decode at once, and the KV of {room:,} fits")
    present = -math.expm1(-decoding)  # the chance that anybody decodes
    riding = len(prompt_steps(load, policy)) * step * present if policy.mixed else 0.0
    service = prompt + riding
    full = min(requests_per_second * service, 1 - 1 / ITERATIONS)
    wait = requests_per_second * service**2 / (2 * (1 - full)) + present * step / 2
    front_end = cost.request_seconds(load.prompt_tokens, math.ceil(decoding))
    return Steady(
        ttft_seconds=front_end + wait + service,
        tpot_seconds=tpot,
        requests_per_second=requests_per_second,
        output_tokens_per_second=requests_per_second * load.output_tokens,
        num_decoding=decoding,
        busy_share=min(1.0, present + share),
    )


class Split(msgspec.Struct, frozen=True, kw_only=True):
    """A prefill pool and a decode pool, each of workers that are alike."""

    prefill: WorkerCost
    decode: WorkerCost
    prefill_workers: int = 1
    decode_workers: int = 1
    exposed_seconds: float = 0.0
    """Of a request's KV transfer, what is left over after it has overlapped with its prefill."""


def disaggregated_at_rate(split: Split, load: Load, requests_per_second: float, policy: Policy | None = None) -> Steady:
    """Prefill and decode apart, arrivals by chance (Poisson). Raises `Saturated` if either pool is past its capacity.

    Prefill is a queue of several servers and deterministic service (half the wait of Sakasegawa's approximation of
    M/M/c, Queueing Systems 1977); decode workers share the requests evenly. The transfer stands between the first token
    and the second.
    """
    policy = policy or Policy()
    service = prompt_seconds(split.prefill, load, policy)
    share = requests_per_second * service / split.prefill_workers
    if share >= 1:
        raise Saturated(f"the prefill pool would be busy {share:.0%} of the time")
    servers = split.prefill_workers
    wait = share ** (math.sqrt(2 * (servers + 1)) - 1) / (servers * (1 - share)) * service / 2
    room = most_decoding(split.decode, load, policy)
    decoding = 1.0
    tpot = 0.0
    for _ in range(ITERATIONS):
        tpot = decode_seconds(split.decode, load, decoding + 1)
        better = requests_per_second * load.output_tokens * tpot / split.decode_workers
        if abs(better - decoding) < TOLERANCE * max(decoding, TOLERANCE):
            break
        decoding = (decoding + better) / 2
        if decoding > room:
            raise Saturated(f"{decoding:,.0f} requests would decode on one worker, and the KV of {room:,} fits")
    front_end = split.prefill.request_seconds(load.prompt_tokens, math.ceil(decoding * split.decode_workers))
    return Steady(
        ttft_seconds=front_end + wait + service,
        tpot_seconds=tpot + split.exposed_seconds / load.output_tokens,
        requests_per_second=requests_per_second,
        output_tokens_per_second=requests_per_second * load.output_tokens,
        num_decoding=decoding,
        busy_share=min(1.0, decoding),
    )


def matched_rate(split: Split, load: Load, tpot_seconds: float, policy: Policy | None = None) -> float:
    """Requests per second at which both pools are full: the decode pool at the batch that just holds this TPOT, or at
    its memory, and the prefill pool at all of its time; the smaller of the two. 0 if no batch holds the TPOT."""
    policy = policy or Policy()
    prefill = split.prefill_workers / prompt_seconds(split.prefill, load, policy)
    low, high = 0, most_decoding(split.decode, load, policy)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if decode_seconds(split.decode, load, middle) <= tpot_seconds else (low, middle - 1)
    if not low:
        return 0.0
    decode = split.decode_workers * low / (load.output_tokens * decode_seconds(split.decode, load, low))
    return min(prefill, decode)
