"""Attention and feed-forwards apart: Step-3 on H800, and LPX beside Rubin against GB200."""

from __future__ import annotations

from functools import cache

import msgspec

from transload.errors import DeploymentError
from transload.hardware.afd.memory import fewest_ffn_chips
from transload.hardware.afd.pipeline import Pipeline, step_seconds
from transload.hardware.afd.published import ascend_results, published
from transload.hardware.afd.stages import SplitWorker, wire_of
from transload.hardware.catalog import load_chip, load_link, load_model
from transload.hardware.cost.worker import WorkerCost
from transload.hardware.parallel import Parallel
from transload.hardware.precision import parse_dtype, with_kv, with_weights
from transload.hardware.slots import parse_assumption
from transload.study.claims.setting import Answer
from transload.study.claims.settings.experts import BATCHES
from transload.study.claims.settings.workers import assumptions_of, decode_seconds, fits, rate, ratio, worker
from transload.study.claims.verdict import Curve, Simulated

INSTANCE = 8
"""GPUs of a Step-3 instance."""
STEP3_BATCH = 6144
STEP3_MICRO_BATCHES = 3


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """How many instances of 8 GPUs compute attention, how many feed-forwards, at which context and KV format."""

    attention: int
    ffn: int
    context: int = 4096
    kv: str = "fp8"

    @property
    def num_gpus(self) -> int:
        return INSTANCE * (self.attention + self.ffn)


@cache
def _step3(kv: str) -> SplitWorker:
    """Single GPUs with attention, instances of 8 with feed-forwards; 50 GB/s a GPU between them."""
    card, chip = load_model("step-3"), load_chip("h800")
    precision = with_kv(with_weights(card.precision, parse_dtype("fp8")), parse_dtype(kv))
    return SplitWorker(
        card,
        chip,
        chip,
        wire_of(load_link("eth400")),
        ffn_parallel=Parallel(data_attention=INSTANCE, expert=INSTANCE),
        precision=precision,
        engine="sglang",
        split="expert",
    )


def _step3_pipeline(ratio: Ratio) -> Pipeline:
    attention = INSTANCE * ratio.attention
    requests = STEP3_BATCH // attention
    return _step3(ratio.kv).pipeline(
        requests,
        requests * ratio.context,
        attention_workers=attention,
        ffn_workers=ratio.ffn,
        micro_batches=STEP3_MICRO_BATCHES,
    )


def _step3_rate(ratio: Ratio) -> Simulated:
    """Tokens a second and GPU."""
    worker_cost = _step3(ratio.kv).attention
    return rate(worker_cost, STEP3_BATCH / step_seconds(_step3_pipeline(ratio)) / ratio.num_gpus)


def step3() -> Answer:
    two = Ratio(attention=2, ffn=2)
    layer = _step3_pipeline(two).layers[0]
    stage = max(
        layer.attention_seconds,
        layer.ffn_seconds,
        layer.out.attention_port_seconds + layer.out.latency_seconds,
        layer.back.attention_port_seconds + layer.back.latency_seconds,
    )
    reference = worker("h800", "deepseek-v3", data=128, expert=128, kv="fp8", engine="sglang")
    deepseek = 128 / decode_seconds(reference, 128 * 128, 4096)
    return Answer(
        values={
            "peak": _step3_rate(two),
            "average": _step3_rate(two),
            "bf16": _step3_rate(Ratio(attention=3, ffn=2, kv="bf16")),
            "n8k": _step3_rate(Ratio(attention=4, ffn=2, context=8192)),
            "scale_out": _step3_rate(Ratio(attention=4, ffn=2)),
            "dsv3_128": rate(reference, deepseek),
            "stage": Simulated(value=stage * 1e6, interval=_step3("fp8").attention.interval),
        },
        basis="closed form of the attention/FFN pipeline: 6,144 requests in 3 micro-batches, each of 8 to 32 attention "
        "GPUs with its share of them, experts dealt out over 2 instances of 8 FFN GPUs, 50 GB/s a GPU and 10 us",
        assumptions=assumptions_of([_step3("fp8").attention, _step3("fp8").ffn]),
    )


def ascend() -> Answer:
    """The gains alone: what an unsplit step takes is an input, as published."""
    at_16k, at_32k = ascend_results(published().ascend)
    return Answer(
        values={
            "n16_gain_48": ratio(1 + at_16k.gains[0]),
            "n16_gain_64": ratio(1 + at_16k.gains[1]),
            "n32_gain_48": ratio(1 + at_32k.gains[0]),
            "n32_gain_64": ratio(1 + at_32k.gains[1]),
        },
        basis="unsplit steps from the two published unsplit rates; batches, and 4 experts that an FFN die reads, as "
        "published; FFN calls, hops and bubbles from the cost model (transload.hardware.afd.published)",
        assumptions=("10 us a hop",),
    )


# ---------------------------------------------------------------------------------------------------------------------
# LPX


CONTEXT = 8192
SPEED = 400.0
"""Tokens a second a user at which it is claimed."""
DRAFTS_TAKEN = 3.1
"""Tokens a step on both sides, as SambaNova states for DeepSeek-R1: without drafts the model's GB200 reaches no such
speed at all."""
RACK_LPUS = 256
RACK_KILOWATTS = 150.0
"""Of an LPX rack. Not published: the curve goes over it."""
BRIDGE = ("lpx_nvl_bridge.bandwidth=400 GB/s", "lpx_nvl_bridge.latency=2 us")
POWERS = (1, 2, 5, 10, 20, 30, 40, 50, 60, 80, 100, 120, 150, 180, 200, 250, 300, 400)
GPUS = (8, 16, 36, 72, 144, 216, 288, 432, 576, 720, 864, 1152)
"""Rubin GPUs beside one set of LPX racks."""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """Throughput of a system at the wanted speed, and what draws power in it."""

    tokens_per_second: float
    gpus: int
    lpx_racks: float = 0.0

    def per_megawatt(self, gpu_watts: float, rack_kilowatts: float = 0.0) -> float:
        return self.tokens_per_second / (self.gpus * gpu_watts + self.lpx_racks * rack_kilowatts * 1e3) * 1e6


def _gb200() -> tuple[Point, list[WorkerCost]]:
    """The best of its splits: most tokens a second and GPU at the wanted speed."""
    formats = {"weights": "nvfp4", "experts": "nvfp4", "kv": "fp8", "engine": "trtllm"}
    costs = [worker("gb200", "kimi-k2", tensor=ways, expert=ways, **formats) for ways in (8, 16, 32, 64)]
    found = [
        Point(tokens_per_second=batch * DRAFTS_TAKEN / step, gpus=cost.parallel.num_chips)
        for cost in costs
        for batch in BATCHES
        if fits(cost, batch * CONTEXT) and DRAFTS_TAKEN / (step := decode_seconds(cost, batch, CONTEXT)) >= SPEED
    ]
    if not found:
        raise DeploymentError(f"gb200: no split of kimi-k2 reaches {SPEED:.0f} tokens/s a user")
    return max(found, key=lambda point: point.tokens_per_second / point.gpus), costs


def _lpx() -> tuple[list[Point], SplitWorker]:
    """Rubin GPUs with attention beside the fewest LPUs that hold the feed-forwards: the most tokens a second at the
    wanted speed for each number of GPUs."""
    card, lpu = load_model("kimi-k2"), load_chip("groq3_lp30")
    precision = with_kv(with_weights(card.precision, parse_dtype("fp8")), parse_dtype("fp8"))
    held = fewest_ffn_chips(lpu, card, precision)
    if held is None:
        raise DeploymentError("groq3_lp30: no split of kimi-k2's feed-forwards fits it")
    wire = wire_of(load_link("lpx_nvl_bridge").assuming(parse_assumption(text) for text in BRIDGE))
    split = SplitWorker(card, load_chip("rubin_r200"), lpu, wire, ffn_parallel=held, precision=precision)
    points = [point for gpus in GPUS if (point := _most(split, gpus)) is not None]
    if not points:
        raise DeploymentError(f"rubin with LPX: no ratio reaches {SPEED:.0f} tokens/s a user with kimi-k2")
    return points, split


def _most(split: SplitWorker, gpus: int) -> Point | None:
    """The largest batch a GPU that keeps the speed; None if not even one user does."""
    found: Point | None = None
    for batch in BATCHES:
        if batch > split.most_requests(CONTEXT):
            break
        step = step_seconds(split.pipeline(batch, batch * CONTEXT, attention_workers=gpus))
        if DRAFTS_TAKEN / step >= SPEED:
            tokens = gpus * batch * DRAFTS_TAKEN / step
            racks = split.ffn_parallel.num_chips / RACK_LPUS
            found = Point(tokens_per_second=tokens, gpus=gpus, lpx_racks=racks)
    return found


def lpx() -> Answer:
    base, costs = _gb200()
    points, split = _lpx()
    below = base.per_megawatt(load_chip("gb200").need("power.all_in").value)
    rubin = load_chip("rubin_r200")
    watts = rubin.need("system.figures.power").value / rubin.need("system.figures.chips").value

    def best_at(kilowatts: float) -> Point:
        return max(points, key=lambda point: point.per_megawatt(watts, kilowatts))

    best = best_at(RACK_KILOWATTS)
    curve = tuple((float(power), best_at(power).per_megawatt(watts, power) / below) for power in POWERS)
    return Answer(
        values={
            "per_megawatt": Simulated(
                value=best.per_megawatt(watts, RACK_KILOWATTS) / below,
                curve=Curve(along=f"kW an LPX rack of {RACK_LPUS}", points=curve),
            )
        },
        basis=f"Kimi-K2 with {CONTEXT:,} tokens of context at {SPEED:.0f} tokens/s a user, {DRAFTS_TAKEN} tokens a "
        "step on both sides (without drafts the GB200 here never reaches that speed). GB200 in NVFP4: "
        f"{base.tokens_per_second:,.0f} tokens/s of {base.gpus} GPUs. Rubin with LPX in FP8, which LPUs multiply in: "
        f"{best.tokens_per_second:,.0f} tokens/s of {best.gpus} GPUs and {best.lpx_racks:.1f} racks, at "
        f"{RACK_KILOWATTS:.0f} kW a rack, our guess; at every power the best number of GPUs",
        assumptions=(
            *BRIDGE,
            f"groq3_lp30: {RACK_KILOWATTS:.0f} kW a rack of {RACK_LPUS}",
            *assumptions_of([*costs, split.attention, split.ffn]),
        ),
    )
