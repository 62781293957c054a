"""Rates that keep latency targets, by the virtual runtime: DistServe's examples, and HACK's pair over 10 Gb/s.

The highest rate is found by halving: a few hundred requests a run, the same arrivals scaled in time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import msgspec

from transload.control.messages import Chunk, WorkerId
from transload.deploy.spec import Deployment, Limits, Link, ModelSpec, Pool, Router, Targets
from transload.hardware.catalog import load_model
from transload.hardware.model_facts import kv_bytes
from transload.hardware.parallel import Parallel
from transload.study.claims.setting import Answer
from transload.study.claims.settings.lengths import SHAREGPT, Spread
from transload.study.claims.settings.workers import ratio
from transload.study.claims.verdict import Curve, Simulated
from transload.study.simulate import simulate
from transload.study.simulated import ClusterCost, SimulatedCluster, plan_cluster
from transload.study.workload import Fixed, Lengths, LogNormal, Poisson, Synthetic, Workload, synthetic

REQUESTS = 300
HALVINGS = 6
CHIP = "a100_80g_sxm"
LATENCY_SECONDS = 50e-6
"""Of a link, assumed: next to nothing beside a transfer."""
WHOLE = Limits(max_batch=256, step_tokens=4096)
"""Prompts are not cut: engines of 2023 did not."""


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """A deployment with the workload it is asked for."""

    deployment: Deployment
    input: Lengths
    output: Lengths


def together(model: str, targets: Targets, parallel: Parallel) -> Deployment:
    """One worker that does both."""
    pool = Pool(name="both", role="aggregated", chip=CHIP, parallel=parallel, limits=WHOLE)
    return Deployment(model=ModelSpec(path=model), pools=(pool,), targets=targets)


def apart(
    model: str, targets: Targets, prefill: Parallel, decode: Parallel, *, num_prefill: int = 1, chip: str = CHIP,
    link: str = "nvlink3",
) -> Deployment:  # fmt: skip
    """Workers that prefill, one that decodes, and nobody who does the other's work."""
    return Deployment(
        model=ModelSpec(path=model),
        pools=(
            Pool(name="prefill", role="prefill", chip=chip, workers=num_prefill, parallel=prefill, limits=WHOLE),
            Pool(name="decode", role="decode", chip=chip, parallel=decode, limits=WHOLE),
        ),
        links=(Link(between=("prefill", "decode"), kind=link, latency_seconds=LATENCY_SECONDS),),
        targets=targets,
        router=Router(local_prefill="fallback"),
    )


def highest_rate(setup: Setup, most: float, slower: float = 1.0) -> float:
    """Requests a second at which the targets are still kept, to 6 %, between `most` and a 32nd of it; 0 below.
    `slower`: every step takes so many times as long."""
    low, high = most / 32, most
    if not _keeps(setup, low, slower):
        return 0.0
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        if _keeps(setup, middle, slower):
            low = middle
        else:
            high = middle
    return low


def _keeps(setup: Setup, rate: float, slower: float) -> bool:
    asked = _workload(setup.input, setup.output, rate, REQUESTS)
    cost = None if slower == 1.0 else SlowerCost(plan_cluster(setup.deployment), slower)
    return bool(simulate(setup.deployment, asked, cost=cost).summary.meets_targets)


class SlowerCost(ClusterCost):
    """Every step so many times as long; links as they are."""

    def __init__(self, cluster: SimulatedCluster, factor: float) -> None:
        super().__init__(cluster)
        self._factor = factor

    def step_seconds(self, worker: WorkerId, chunks: Sequence[Chunk]) -> float:
        return self._factor * super().step_seconds(worker, chunks)

    def decode_line(self, worker: WorkerId, num_decode: int) -> tuple[float, float] | None:
        line = super().decode_line(worker, num_decode)
        return None if line is None else (self._factor * line[0], self._factor * line[1])


def _workload(inputs: Lengths, outputs: Lengths, rate: float, num_requests: int) -> Workload:
    return synthetic(
        Synthetic(
            arrivals=Poisson(rate),
            input=inputs,
            output=outputs,
            sessions=None,
            num_requests=num_requests,
            duration_seconds=None,
            seed=0,
        )
    )


def _drawn(spread: Spread) -> LogNormal:
    return LogNormal(spread.mean, spread.cv, 4, spread.most)


# ---------------------------------------------------------------------------------------------------------------------
# DistServe


TOY = Targets(ttft_seconds=0.4, tpot_seconds=0.04, attainment=0.9)
ALONE = Parallel()


SLOWER = (1.0, 1.25, 1.5, 1.7)


def _toy(deployment: Deployment, outputs: int) -> Setup:
    return Setup(deployment=deployment, input=Fixed(512), output=Fixed(outputs))


def blog_toy() -> Answer:
    first = Targets(ttft_seconds=TOY.ttft_seconds, attainment=TOY.attainment)
    later = Targets(tpot_seconds=TOY.tpot_seconds, attainment=TOY.attainment)
    asked = {
        "colocated": (_toy(together("opt-13b", TOY, ALONE), 64), 12.0, 1),
        "prefill_only": (_toy(together("opt-13b", first, ALONE), 1), 24.0, 1),
        "decode_only": (_toy(apart("opt-13b", later, ALONE, ALONE, num_prefill=8), 64), 40.0, 1),
        "split": (_toy(apart("opt-13b", TOY, ALONE, ALONE, num_prefill=2), 64), 36.0, 3),
    }
    found = {
        key: [(slower, highest_rate(setup, most, slower) / gpus) for slower in SLOWER]
        for key, (setup, most, gpus) in asked.items()
    }
    values = {key: _over_engines(points) for key, points in found.items()}
    gains = [
        (slower, split / whole if whole else 0.0)
        for (slower, split), (_, whole) in zip(found["split"], found["colocated"], strict=True)
    ]
    return Answer(
        values={**values, "gain": _over_engines(gains)},
        basis=f"OPT-13B; {REQUESTS} Poisson arrivals, 512 in and 64 out, the highest rate that keeps both targets for "
        "90 %, prompts computed whole; prefill alone: one token out; decode alone: 8 prefill workers in front; and the "
        "same with slower steps",
        assumptions=_assumptions(together("opt-13b", TOY, ALONE)),
    )


def _over_engines(points: list[tuple[float, float]]) -> Simulated:
    return Simulated(value=points[0][1], curve=Curve(along="times the model's step times", points=tuple(points)))


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """A model as DistServe placed it, and as vLLM had it."""

    model: str
    targets: Targets
    prefill: Parallel
    decode: Parallel
    vllm: Parallel
    most: float
    """A rate a GPU beyond reach."""


PAIRS = {
    "opt-13b": Pair(
        model="opt-13b",
        targets=Targets(ttft_seconds=0.25, tpot_seconds=0.1, attainment=0.9),
        prefill=Parallel(tensor=2),
        decode=ALONE,
        vllm=ALONE,
        most=6.0,
    ),
    "opt-66b": Pair(
        model="opt-66b",
        targets=Targets(ttft_seconds=2.5, tpot_seconds=0.15, attainment=0.9),
        prefill=Parallel(tensor=4),
        decode=Parallel(tensor=2, pipeline=2),
        vllm=Parallel(tensor=4),
        most=1.5,
    ),
    "opt-175b": Pair(
        model="opt-175b",
        targets=Targets(ttft_seconds=4.0, tpot_seconds=0.2, attainment=0.9),
        prefill=Parallel(tensor=3, pipeline=3),
        decode=Parallel(tensor=4, pipeline=3),
        vllm=Parallel(tensor=8),
        most=0.6,
    ),
}


def _apart_rate(pair: Pair) -> float:
    """Requests a second and GPU."""
    gpus = pair.prefill.num_chips + pair.decode.num_chips
    deployment = apart(pair.model, pair.targets, pair.prefill, pair.decode)
    return highest_rate(_chat(deployment), pair.most * gpus) / gpus


@cache
def _together_rate(model: str, targets: Targets, parallel: Parallel, most: float) -> float:
    gpus = parallel.num_chips
    return highest_rate(_chat(together(model, targets, parallel)), most * gpus) / gpus


def _chat(deployment: Deployment) -> Setup:
    return Setup(deployment=deployment, input=_drawn(SHAREGPT.input), output=_drawn(SHAREGPT.output))


CHAT_BASIS = (
    f"{REQUESTS} Poisson arrivals, the highest rate that keeps both targets for 90 %, prompts computed whole; lengths "
    f"lognormal: {SHAREGPT.source}"
)


def _gain(model: str) -> Answer:
    pair = PAIRS[model]
    split = _apart_rate(pair)
    whole = _together_rate(pair.model, pair.targets, pair.vllm, pair.most)
    return Answer(
        values={"gain_vllm": ratio(split / whole if whole else 0.0)},
        basis=f"{split:.2f} requests/s and GPU apart, {whole:.2f} together; {CHAT_BASIS}",
        assumptions=_assumptions(together(pair.model, pair.targets, pair.vllm)),
    )


def opt_13b() -> Answer:
    return _gain("opt-13b")


def opt_66b() -> Answer:
    return _gain("opt-66b")


def opt_175b() -> Answer:
    return _gain("opt-175b")


def ablation() -> Answer:
    pair = PAIRS["opt-66b"]
    tried = (pair.vllm, Parallel(tensor=8), Parallel(tensor=2, pipeline=2), Parallel(tensor=4, pipeline=2))
    rates = [_together_rate(pair.model, pair.targets, parallel, pair.most) for parallel in tried]
    return Answer(
        values={"searched_colocated": ratio(max(rates) / rates[0] if rates[0] else 0.0)},
        basis=f"aggregated TP4, TP8, TP2 PP2 and TP4 PP2, the best over TP4; {CHAT_BASIS}",
        assumptions=_assumptions(together(pair.model, pair.targets, pair.vllm)),
    )


def simulator_example() -> Answer:
    pair = msgspec.structs.replace(
        PAIRS["opt-13b"], targets=Targets(ttft_seconds=0.2, tpot_seconds=0.1, attainment=0.9)
    )
    return Answer(
        values={"rate": Simulated(value=_apart_rate(pair))},
        basis=f"prefill TP2, decode TP1; {CHAT_BASIS}",
        assumptions=_assumptions(together(pair.model, pair.targets, pair.vllm)),
    )


def _assumptions(deployment: Deployment) -> tuple[str, ...]:
    """What a run of this deployment takes for granted, from a run of a few requests."""
    result = simulate(deployment, _workload(Fixed(64), Fixed(4), 1.0, 2))
    return (*result.assumptions, *result.notes)


# ---------------------------------------------------------------------------------------------------------------------
# HACK


def hack_artifact() -> Answer:
    targets = Targets()
    deployment = apart("qwen3-8b", targets, ALONE, ALONE, chip="rtx_a6000", link="eth10")
    inputs, outputs = LogNormal(14_000.0, 0.083, 12_000, 16_000), LogNormal(384.0, 0.19, 256, 512)
    result = simulate(deployment, _workload(inputs, outputs, 0.15, 100))
    summary = result.summary
    [link] = [link for link in result.links if link.crosses == "kv"]
    ttft, tpot, jct = summary.ttft_seconds, summary.tpot_seconds, summary.end_to_end_seconds
    assert ttft is not None
    assert tpot is not None
    assert jct is not None
    line = kv_bytes(load_model("qwen3-8b"), 14_000)
    return Answer(
        values={
            "kv": Simulated(value=line / 2**20),
            "transfer": Simulated(value=line / 1.25e9),
            "ttft": Simulated(value=ttft.mean + link.exposed_seconds / link.num_transfers),
            "tpot": Simulated(value=tpot.mean),
            "jct": Simulated(value=jct.mean),
            "jct_p99": Simulated(value=jct.p99),
        },
        basis="100 Poisson arrivals at 0.15 requests/s, 12,000 to 16,000 in, 256 to 512 out; transfers layer by layer "
        "while prefill goes on, so less of one shows than of theirs; time to first token with what is left of it",
        assumptions=(*result.assumptions, *result.notes),
    )
