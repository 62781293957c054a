"""DeepSeek over many GPUs, and the frontier of throughput against speed a user: steady states of single workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from transload.hardware.cost.worker import WorkerCost
from transload.study.claims.setting import Answer
from transload.study.claims.settings.workers import (
    assumptions_of,
    decode_seconds,
    fits,
    prefill_seconds,
    rate,
    ratio,
    worker,
)
from transload.study.claims.verdict import Curve, Simulated

BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
GPUS_PER_NODE = 8


def _prefill_rate(cost: WorkerCost, prompt: int, prompts_per_gpu: int) -> float:
    """Prompt tokens a second and GPU of a worker whose GPUs each prefill so many prompts in one step."""
    num_chips = cost.parallel.num_chips
    num_prompts = prompts_per_gpu * num_chips
    return num_prompts * prompt / num_chips / prefill_seconds(cost, [prompt] * num_prompts)


def _decode_rate(cost: WorkerCost, batch_per_gpu: int, context: int) -> float:
    """Output tokens a second and GPU."""
    num_chips = cost.parallel.num_chips
    batch = batch_per_gpu * num_chips
    return batch / num_chips / decode_seconds(cost, batch, context)


def _wide(chip: str, ranks: int, *, weights: str = "", experts: str = "", engine: str = "sglang") -> WorkerCost:
    return worker(
        chip, "deepseek-v3", data=ranks, expert=ranks, weights=weights, experts=experts, kv="fp8", engine=engine
    )


def deepseek_profile() -> Answer:
    prefill, decode = _wide("h800", 32), _wide("h800", 128)
    prefilled, decoded = _prefill_rate(prefill, 4096, 4), _decode_rate(decode, 128, 4096)
    return Answer(
        values={
            "prefill": rate(prefill, prefilled),
            "prefill_node": rate(prefill, prefilled * GPUS_PER_NODE),
            "decode": rate(decode, decoded),
            "decode_node": rate(decode, decoded * GPUS_PER_NODE),
        },
        basis="one step of the whole worker: 4 prompts of 4,096 on each of 32 GPUs; 128 requests on each of 128",
        assumptions=assumptions_of([prefill, decode]),
    )


def lmsys_h100() -> Answer:
    prefill, decode = _wide("h100_sxm", 32), _h100_decode()
    narrow = worker("h100_sxm", "deepseek-v3", tensor=16, expert=16, kv="fp8", engine="sglang")
    node = {length: _prefill_rate(prefill, length, 16_384 // length) * GPUS_PER_NODE for length in (1024, 2048, 4096)}
    decoded = _decode_rate(decode, 256, 2000)
    narrow_batch = max(batch for batch in BATCHES if fits(narrow, batch * 2000))
    narrow_decoded = narrow_batch / 16 / decode_seconds(narrow, narrow_batch, 2000)
    narrow_prefilled = 8 * 2048 / 16 / prefill_seconds(narrow, [2048] * 8)
    dollars = decode.usd(1.0) / (decoded * decode.parallel.num_chips) * 1e6
    return Answer(
        values={
            "prefill_1k": rate(prefill, node[1024]),
            "prefill_2k": rate(prefill, node[2048]),
            "prefill_4k": rate(prefill, node[4096]),
            "prefill_eplb": rate(prefill, node[4096]),
            "headline_in": rate(prefill, node[2048]),
            "decode": rate(decode, decoded * GPUS_PER_NODE),
            "headline_out": rate(decode, decoded * GPUS_PER_NODE),
            "tp16_prefill": ratio(node[2048] / GPUS_PER_NODE / narrow_prefilled),
            "tp16_decode": ratio(decoded / narrow_decoded),
            "cost": Simulated(value=dollars, interval=decode.interval),
        },
        basis="one step of the whole worker: 16,384 prompt tokens on each of 32 GPUs; 256 requests on each of 64 (256 "
        f"experts cannot be dealt out to 72 evenly). TP16: {narrow_batch} requests, what fits; 8 prompts of 2,048",
        assumptions=assumptions_of([prefill, decode, narrow]),
    )


def _h100_decode() -> WorkerCost:
    return _wide("h100_sxm", 64)


def lmsys_gb200() -> Answer:
    four = {"weights": "fp8", "experts": "nvfp4"}
    prefill, decode = _wide("gb200", 4, **four), _wide("gb200", 32, **four)
    eight, wide_eight = _wide("gb200", 4), _wide("gb200", 32)
    prefilled, decoded = _prefill_rate(prefill, 2000, 8), _decode_rate(decode, 1408, 2000)
    old_prefilled = _prefill_rate(_wide("h100_sxm", 32), 2048, 8)
    old_decoded = _decode_rate(_h100_decode(), 256, 2000)
    return Answer(
        values={
            "prefill": rate(prefill, prefilled),
            "decode": rate(decode, decoded),
            "prefill_gain": ratio(prefilled / old_prefilled),
            "decode_gain": ratio(decoded / old_decoded),
            "prefill_fp8": rate(eight, _prefill_rate(eight, 2000, 8)),
            "decode_fp8": rate(wide_eight, _decode_rate(wide_eight, 768, 2000)),
        },
        basis="one step of the whole worker: 8 prompts of 2,000 on each of 4 GPUs (2 do not hold the model beside its "
        "KV here); 1,408 requests on each of 32 (256 experts cannot be dealt out to 48 evenly)",
        assumptions=assumptions_of([prefill, decode, eight]),
    )


def vllm_wide() -> Answer:
    values: dict[str, Simulated] = {}
    costs = [_wide("h200_sxm", ranks, engine="vllm") for ranks in (32, 64)]
    for key, cost in zip(("throughput", "wider"), costs, strict=True):
        batches = [batch for batch in BATCHES if batch >= 16 and fits(cost, batch * cost.parallel.num_chips * 3072)]
        points = tuple((float(batch), _decode_rate(cost, batch, 3072)) for batch in batches)
        middle = _decode_rate(cost, 256, 3072)
        values[key] = Simulated(value=middle, curve=Curve(along="requests a GPU", points=points))
    return Answer(
        values=values,
        basis="decode steps of EP32 and EP64 (256 experts cannot be dealt out to 96 evenly) with 3,072 tokens of "
        "context; 256 requests a GPU, our choice",
        assumptions=assumptions_of(costs),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Frontiers


def steady_step(cost: WorkerCost, batch: int, inputs: int, outputs: int) -> float:
    """Seconds from one token of a request to its next, on average, of an aggregated worker in its steady state: a
    decode step, and its part of the prompts that come in meanwhile, each prefilled in steps of its own."""
    decode = decode_seconds(cost, batch, inputs + outputs / 2)
    together = min(cost.parallel.data_attention, max(1, batch // 4))
    prompt = prefill_seconds(cost, [inputs] * together) / together
    return decode + batch / outputs * prompt


def aggregated_points(cost: WorkerCost, inputs: int, outputs: int) -> list[tuple[float, float]]:
    """(tokens a second a user, output tokens a second a chip) for every batch that fits."""
    points = []
    for batch in BATCHES:
        if not fits(cost, batch * (inputs + outputs / 2)):
            break
        step = steady_step(cost, batch, inputs, outputs)
        points.append((1 / step, batch / step / cost.parallel.num_chips))
    return points


def split_points(prefill: WorkerCost, decode: WorkerCost, inputs: int, outputs: int) -> list[tuple[float, float]]:
    """The same for two pools in the ratio that keeps both busy, with nothing lost in between."""
    per_prompt = inputs / _prefill_rate(prefill, inputs, 1)
    points = []
    for batch in BATCHES:
        total = batch * decode.parallel.data_attention
        if not fits(decode, total * (inputs + outputs / 2)):
            break
        step = decode_seconds(decode, total, inputs + outputs / 2)
        per_answer = outputs * step * decode.parallel.num_chips / total
        points.append((1 / step, outputs / (per_prompt + per_answer)))
    return points


def best_at(speed: float, fronts: Sequence[Sequence[tuple[float, float]]]) -> float:
    """Most tokens a second and chip at this speed a user, straight lines between batches; 0 where nothing is so
    fast."""
    return max((_at(speed, points) for points in fronts), default=0.0)


def _at(speed: float, points: Sequence[tuple[float, float]]) -> float:
    """One worker's throughput at a speed. Batches grow along `points`, so speeds fall."""
    if not points or speed > points[0][0]:
        return 0.0
    for (fast, few), (slow, many) in pairwise(points):
        if slow <= speed <= fast:
            return few if fast == slow else few + (many - few) * (fast - speed) / (fast - slow)
    return points[-1][1]


def inferencex() -> Answer:
    inputs, outputs = 8192, 1024
    both = (inputs + outputs) / outputs
    values: dict[str, Simulated] = {}
    costs: list[WorkerCost] = []
    for chip, name, speeds in (("b200_sxm", "b200", (23, 32, 42, 75, 120, 164)), ("mi300x", "mi300x", (23, 32, 42))):
        splits = [
            worker(chip, "deepseek-v3", tensor=8, kv="fp8", engine="sglang"),
            worker(chip, "deepseek-v3", tensor=8, expert=8, kv="fp8", engine="sglang"),
            worker(chip, "deepseek-v3", data=8, expert=8, kv="fp8", engine="sglang"),
        ]
        costs += splits
        fronts = [aggregated_points(cost, inputs, outputs) for cost in splits]
        for speed in speeds:
            values[f"{name}_{speed}"] = rate(splits[0], best_at(speed, fronts) * both)
    hourly = costs[0].usd(3600.0) / costs[0].parallel.num_chips
    values["b200_cost"] = Simulated(value=hourly / 3600 / values["b200_23"].value * 1e6)
    return Answer(
        values=values,
        basis="steady state of one node of 8: decode steps, and between them the prompts that come in; the best of "
        "TP8, TP8 with EP8, and attention by data with EP8, no drafts",
        assumptions=assumptions_of(costs),
    )


def dynamo() -> Answer:
    inputs, outputs = 32_768, 8192
    formats = {"weights": "nvfp4", "experts": "nvfp4", "kv": "fp8", "engine": "trtllm"}
    baseline = worker("gb200", "deepseek-v3", tensor=16, expert=16, pipeline=4, **formats)
    prefill = worker("gb200", "deepseek-v3", data=4, expert=4, **formats)
    decode = worker("gb200", "deepseek-v3", data=64, expert=64, **formats)
    together = [aggregated_points(baseline, inputs, outputs)]
    apart = [split_points(prefill, decode, inputs, outputs)]
    fastest = max(speed for speed, _ in together[0])
    points = _ratios(lambda at: best_at(at, apart), lambda at: best_at(at, together), fastest)
    best = max((gain for _, gain in points), default=0.0)
    return Answer(
        values={
            "gain": Simulated(
                value=best,
                low=min((gain for _, gain in points), default=0.0),
                curve=Curve(along="tokens/s a user", points=points),
            )
        },
        basis="steady states: TEP16 PP4 with prompts between its decode steps, against EP4 context and EP64 generation "
        f"workers in the best ratio, at every speed a user that the baseline reaches (up to {fastest:.0f} tokens/s)",
        assumptions=assumptions_of([baseline, prefill, decode]),
    )


def _ratios(
    above: Callable[[float], float], below: Callable[[float], float], fastest: float
) -> tuple[tuple[float, float], ...]:
    points = []
    for step in range(1, 41):
        at = fastest * step / 40
        if below(at) > 0:
            points.append((at, above(at) / below(at)))
    return tuple(points)
