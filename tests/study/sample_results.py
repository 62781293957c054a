"""Results with something of everything in them, for whatever renders results. The numbers are made up."""

from __future__ import annotations

import math
from random import Random

from transload.deploy.spec import Targets
from transload.runtime.base import Stage, Waterfall
from transload.study.curves import latency_curves
from transload.study.metrics import RequestRecord, summarize
from transload.study.provenance import MachineFacts
from transload.study.result import Cost, Fault, Interval, LinkResult, LinkSample, PoolResult, PoolSample, Result

NUM_BINS = 200


def sample_records(
    rate: float, num_requests: int, *, seed: int = 0, slowness: float = 1.0
) -> tuple[RequestRecord, ...]:
    random = Random(seed)
    records: list[RequestRecord] = []
    at = 0.0
    for index in range(num_requests):
        at += random.expovariate(rate)
        first = at + slowness * (0.08 + random.lognormvariate(-2.2, 0.7) + 0.02 * rate)
        gap = slowness * random.lognormvariate(-3.9, 0.25)
        times = [first + gap * k * (1 + 0.1 * random.random()) for k in range(random.randint(8, 60))]
        times.sort()
        records.append(
            RequestRecord(
                index=index,
                due_seconds=at,
                start_seconds=at,
                end_seconds=times[-1],
                token_seconds=times,
                num_input_tokens=random.randint(100, 2000),
                num_output_tokens=len(times),
                num_output_asked=len(times),
            )
        )
    return tuple(records)


def sample_pool(name: str, role: str, duration_seconds: float, phase: float) -> PoolResult:
    series = tuple(
        PoolSample(
            seconds=k * duration_seconds / NUM_BINS,
            busy_share=min(1.0, 0.55 + 0.35 * math.sin(k / 17 + phase)),
            batch=12 + 9 * math.sin(k / 17 + phase) + (k % 5) * 0.4,
            waiting=max(0.0, 4 * math.sin(k / 23 + phase)),
            kv_share=min(1.0, k / NUM_BINS * 0.8),
        )
        for k in range(NUM_BINS)
    )
    return PoolResult(
        name=name,
        role=role,  # type: ignore[arg-type]
        chip="b200",
        num_workers=4,
        num_chips=8,
        busy_share=0.61,
        mean_batch=13.2,
        num_steps=48_210,
        num_prefill_tokens=1_204_220 if role == "prefill" else 0,
        num_decode_tokens=0 if role == "prefill" else 221_309,
        num_preemptions=0,
        kv_tokens=2_000_000,
        kv_share=0.4,
        peak_kv_share=0.8,
        series=series,
    )


def sample_waterfall(request: int, total: float) -> Waterfall:
    shares = (
        ("queue", None, 0.01),
        ("reserve", "decode-0", 0.01),
        ("prefill queue", "prefill-1", 0.08),
        ("prefill", "prefill-1", 0.22),
        ("transfer", "decode-0", 0.04),
        ("decode queue", "decode-0", 0.02),
        ("decode", "decode-0", 0.62),
    )
    stages: list[Stage] = []
    start = 0.0
    for name, worker, share in shares:
        detail: dict[str, float | int | str] = {}
        if name == "transfer":
            detail = {"bytes": 412_000_000, "frames": 24, "wire_seconds": 0.061, "hidden_seconds": 0.049}
        stages.append(Stage(name=name, worker=worker, start_seconds=start, seconds=share * total, detail=detail))
        start += share * total
    return Waterfall(
        request=request,  # type: ignore[arg-type]
        state="finished",
        decision="prefill-1: 0.31 s there and 4 ms for the transfer, against 0.9 s at decode-0",
        epoch=0,
        num_prompt_tokens=1893,
        num_cached_tokens=512,
        num_outputs=211,
        total_seconds=total,
        stages=tuple(stages),
    )


def sample_result(
    name: str = "deployments/b200-pd.yaml",
    *,
    rate: float = 4.0,
    num_requests: int = 300,
    simulated: bool = True,
    slowness: float = 1.0,
    with_requests: bool = False,
    seed: int = 0,
) -> Result:
    records = sample_records(rate, num_requests, seed=seed, slowness=slowness)
    summary = summarize(records, Targets(ttft_seconds=0.6, tpot_seconds=0.03))
    duration = summary.duration_seconds
    link = LinkResult(
        source="prefill",
        target="decode",
        kind="nvlink-5",
        crosses="kv",
        num_transfers=num_requests,
        num_bytes=num_requests * 400_000_000,
        bytes_per_second_limit=9e11,
        busy_seconds=duration * 0.2,
        exposed_seconds=num_requests * 0.004,
        wire_seconds=num_requests * 0.06,
        series=tuple(
            LinkSample(seconds=k * duration / NUM_BINS, bytes_per_second=1.7e9 * (1 + math.sin(k / 9)))
            for k in range(NUM_BINS)
        ),
    )
    return Result(
        name=name,
        simulated=simulated,
        deployment=f"# {name}\nmodel: {{path: llama-3.1-70b}}\npools:\n- {{name: prefill, role: prefill}}\n",
        model="llama-3.1-70b",
        workload=f"Poisson {rate:g}/s, lognormal lengths",
        seed=seed,
        command=("transload", "simulate", name, "--rate", f"{rate:g}"),
        started_at="2026-11-26T11:00:00+00:00",
        machine=MachineFacts(
            cpu="Some CPU",
            num_cores=2,
            core_quota=None,
            memory_bytes=16 * 2**30,
            gpus=(),
            os="Linux 6.1",
            load_average=0.3,
        ),
        versions={"transload": "0.2", "python": "3.11"},
        cpu_seconds=1.9,
        summary=summary,
        curves=latency_curves(records),
        pools=(sample_pool("prefill", "prefill", duration, 0.0), sample_pool("decode", "decode", duration, 1.3)),
        links=(link,),
        requests=records if with_requests else None,
        waterfalls=(sample_waterfall(17, 1.9), sample_waterfall(203, 4.4)),
        cost=Cost(
            num_chips=16,
            usd=0.9,
            usd_per_million_output_tokens=1.27,
            energy_joules=None,
            mean_watts=None,
            joules_per_output_token=None,
            unknown=("energy: no power of b200 in the catalog",),
        )
        if simulated
        else None,
        ttft_interval=Interval(low=0.8, high=1.35, basis="leave-one-chip-out, dense") if simulated else None,
        tpot_interval=Interval(low=0.88, high=1.15, basis="measured on 4,100 points") if simulated else None,
        assumptions=("price of b200: 3.5 $/h",) if simulated else (),
        classes={"datasheet": 21, "measured": 6, "vendor claim": 3, "estimate": 2} if simulated else {},
        notes=("Tokenizer and HTTP are not simulated.",),
        bottleneck="decode: memory bandwidth" if simulated else "",
        faults=(Fault(text="kill decode-1 at 30 s"),) if simulated else (),
    )
