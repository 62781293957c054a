"""What the cost model says of a measured point: TTFT and TPOT under the client that measured it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from points import WAVES, Point, chip_of
from replay import Pools, closed_loop, closed_loop_apart, requests

from transload.errors import DeploymentError
from transload.hardware.cost.efficiency import Efficiency
from transload.hardware.cost.shape import StepShape
from transload.hardware.cost.steady import Load, Policy, decode_seconds, prompt_seconds, ranks_filled
from transload.hardware.cost.worker import WorkerCost

POLICIES = {
    "trtllm": Policy(mixed=True, max_step_tokens=8192),
    "vllm": Policy(mixed=True, max_step_tokens=8192),
    "sglang": Policy(mixed=False, max_step_tokens=16384),
}
"""vLLM and TensorRT-LLM put prefill chunks and decoding requests into one step of 8,192 tokens by default; SGLang runs
prefills of up to 16,384 tokens between decode steps."""
SPREAD = 1 / 9
"""Lengths between 80 % and 100 % of the nominal ones are 90 % of them, give or take a ninth."""


_workers: dict[tuple[object, ...], WorkerCost] = {}
_under: list[Efficiency | None] = []


def worker_of(point: Point, efficiency: Efficiency | None = None, *, prefill: bool = False) -> WorkerCost:
    """The (decoding, unless `prefill`) worker of a point. Points of a run share it, as long as the parameters stay."""
    if not _under or _under[0] is not efficiency:
        _workers.clear()
        _under[:] = [efficiency]
    parallel = point.prefill_parallel if prefill and point.prefill_parallel is not None else point.parallel
    key = (point.chip, point.card.id, parallel, point.precision, point.backend)
    found = _workers.get(key)
    if found is None:
        found = _workers[key] = WorkerCost(
            chip_of(point), point.card, parallel, point.precision, point.backend, efficiency=efficiency
        )
    return found


def in_flight_of(point: Point) -> int:
    """On one worker."""
    return max(1, round(point.concurrency / point.decode_workers))


def load_of(point: Point) -> Load:
    return Load(prompt_tokens=point.prompt_tokens, output_tokens=point.output_tokens)


@dataclass(frozen=True)
class Served:
    """Seconds, in the mean over the client's requests."""

    ttft: float
    tpot: float


@dataclass(frozen=True)
class Queueing:
    """What the load makes of a point's bare costs, at some parameters: kept while the parameters move a little."""

    decoding: float
    tpot_factor: float
    """TPOT / (decode step + share of prompts)."""
    ttft_factor: float
    """(TTFT - request) / prompt."""


def serve(point: Point, efficiency: Efficiency | None = None) -> Served:
    """Under the client that measured, replayed."""
    cost = worker_of(point, efficiency)
    if point.mode == "agg":
        inside = point.campaign == "inferencex"
        ttft, tpot = closed_loop(
            cost, POLICIES[point.backend], in_flight=in_flight_of(point),
            prompt=point.prompt_tokens, output=point.output_tokens, waves=WAVES,
            spread=SPREAD if inside else 0.0,
        )  # fmt: skip
        return Served(ttft + cost.request_seconds(point.prompt_tokens, in_flight_of(point)), tpot)
    return _disaggregated(point, cost, efficiency)


def _disaggregated(point: Point, decode: WorkerCost, efficiency: Efficiency | None) -> Served:
    """Replayed too: prompts of the nominal length wait for a prefill worker, steps are those of the mean context."""
    prefill = worker_of(point, efficiency, prefill=True)
    inside = point.campaign == "inferencex"
    todo = requests(
        WAVES * point.concurrency, point.prompt_tokens, point.output_tokens, SPREAD if inside else 0.0, seed=0
    )
    load, most = load_of(point), most_prompts(point, prefill)

    @cache
    def prefill_seconds(count: int) -> float:
        return prefill.step_seconds(StepShape(((0, point.prompt_tokens),) * count))

    @cache
    def step_seconds(count: int) -> float:
        return decode_seconds(decode, load, max(1.0, count / point.decode_workers))

    pools = Pools(prefill_seconds, most, point.prefill_workers, step_seconds)
    ttft, tpot = closed_loop_apart(pools, todo, point.concurrency)
    return Served(ttft + tpot + prefill.request_seconds(point.prompt_tokens, in_flight_of(point)), tpot)


def most_prompts(point: Point, prefill: WorkerCost) -> int:
    """Prompts in a step that is full: on each attention rank as many as its tokens allow."""
    each = max(1, POLICIES[point.backend].max_step_tokens // point.prompt_tokens)
    return each * prefill.parallel.data_attention


def bare(point: Point, cost: WorkerCost, decoding: float) -> tuple[float, float]:
    """(TPOT without the effects of queueing, seconds of one prompt; of a prefill pool, alone and in a full step)."""
    step = decode_seconds(cost, load_of(point), decoding)
    if point.prefill_parallel is not None:
        prefill = worker_of(point, cost.efficiency, prefill=True)
        most, whole = most_prompts(point, prefill), (0, point.prompt_tokens)
        alone, full = (prefill.step_seconds(StepShape((whole,) * count)) for count in (1, most))
        return step, alone + full / most
    together = ranks_filled(cost, point.concurrency / point.decode_workers)
    prompt = prompt_seconds(cost, load_of(point), POLICIES[point.backend], round(decoding), together)
    return step + decoding / point.output_tokens * prompt, prompt


def queueing_of(point: Point, efficiency: Efficiency) -> Queueing:
    """Served once in full, to be scaled while fitting."""
    served = serve(point, efficiency)
    cost = worker_of(point, efficiency)
    in_flight = point.concurrency / point.decode_workers
    life = served.ttft + point.output_tokens * served.tpot
    decoding = max(1.0, in_flight * point.output_tokens * served.tpot / life)
    tpot, prompt = bare(point, cost, decoding)
    request = cost.request_seconds(point.prompt_tokens, in_flight_of(point))
    return Queueing(decoding, served.tpot / tpot, (served.ttft - request) / prompt)


def scaled(point: Point, efficiency: Efficiency, queueing: Queueing) -> Served:
    """The point at other parameters, queues as they were."""
    cost = worker_of(point, efficiency)
    tpot, prompt = bare(point, cost, queueing.decoding)
    request = cost.request_seconds(point.prompt_tokens, in_flight_of(point))
    return Served(prompt * queueing.ttft_factor + request, tpot * queueing.tpot_factor)


def fits(point: Point) -> bool:
    """Whether the model takes the point at all: memory and split."""
    try:
        _ = worker_of(point).capacity
    except DeploymentError:
        return False
    return True
