"""From what a simulated run has left behind to its `Result`: utilisation, cost, intervals, and what limits it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from transload.deploy.load import to_yaml
from transload.deploy.spec import Targets
from transload.errors import DeploymentError
from transload.hardware.cost.shape import StepShape
from transload.runtime.base import Waterfall
from transload.study.bins import TimeBins, align
from transload.study.curves import NUM_POINTS, curve
from transload.study.metrics import Summary, distribution
from transload.study.provenance import machine_facts, versions
from transload.study.recorder import LinkTally, PoolTally, Recorder
from transload.study.result import (
    Cost,
    Fault,
    FfnLoss,
    Interval,
    LinkResult,
    LinkSample,
    PoolResult,
    PoolSample,
    Result,
)
from transload.study.simulated import SimulatedCluster, SimulatedLink, SimulatedPool
from transload.study.split_results import ffn_result, hop_result, split_result, split_uses
from transload.study.workload import Workload

FELT_SHARE = 0.05
"""Of requests' time: who waits longer for something is limited by it."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What was asked for, and how the run went."""

    name: str
    workload: Workload
    seed: int
    started_at: str
    cpu_seconds: float
    was_interrupted: bool
    faults: tuple[str, ...]


def sum_up(
    cluster: SimulatedCluster, recorder: Recorder, facts: RunFacts, ffn_losses: tuple[FfnLoss, ...] = ()
) -> Result:
    """The result of a run."""
    targets = cluster.deployment.targets
    summary = summarize_recorder(recorder, targets)
    duration = summary.duration_seconds
    end = recorder.last_end
    align([bins for tally in recorder.pools.values() for bins in (tally.busy, tally.batch, tally.waiting, tally.kv)]
          + [tally.bytes for tally in recorder.links.values()], end)  # fmt: skip
    unknown: list[str] = []
    pools = tuple(_pool(pool, recorder.pools[pool.spec.name], duration, end, unknown) for pool in cluster.pools)
    links = tuple(
        _link(link, recorder.links.get((link.source, link.target), LinkTally()), end) for link in cluster.links
    )
    uses = split_uses(cluster, pools)
    ffn_pools = tuple(ffn_result(cluster, pool, uses, duration, unknown) for pool in cluster.ffn_pools)
    links += tuple(hop_result(cluster, name, use) for name, use in uses.items())
    decoding = [pool for pool in cluster.pools if pool.spec.role != "prefill"]
    prefilling = [pool for pool in cluster.pools if pool.spec.role != "decode"]
    return Result(
        name=facts.name,
        simulated=True,
        deployment=to_yaml(cluster.deployment),
        model=cluster.card.name,
        workload=facts.workload.name,
        seed=facts.workload.seed or facts.seed,
        started_at=facts.started_at,
        machine=machine_facts(),
        versions=versions(),
        cpu_seconds=facts.cpu_seconds,
        was_interrupted=facts.was_interrupted,
        summary=summary,
        curves=_curves(recorder),
        num_rejected=recorder.num_rejected,
        num_recovered=recorder.num_recovered,
        pools=(*pools, *ffn_pools),
        links=links,
        splits=tuple(split_result(cluster, name, use) for name, use in uses.items() if use.report is not None),
        ffn_losses=ffn_losses,
        requests=tuple(recorder.records) if recorder.records is not None else None,
        waterfalls=_chosen(recorder),
        steps=tuple(recorder.step_list) if recorder.step_list is not None else None,
        cost=_cost((*pools, *ffn_pools), summary, unknown),
        ttft_interval=_interval(prefilling, of_first_token=True),
        tpot_interval=_interval(decoding),
        assumptions=cluster.assumptions,
        classes={str(kind): count for kind, count in cluster.classes.items()},
        notes=(*cluster.notes, *_errors(recorder)),
        bottleneck=_bottleneck(cluster, recorder, pools),
        faults=tuple(Fault(text=text) for text in facts.faults),
    )


def summarize_recorder(recorder: Recorder, targets: Targets) -> Summary:
    """The same numbers as of a live run."""
    num_failed = sum(recorder.errors.values())
    num_ended = recorder.num_successful + num_failed
    duration = max(0.0, recorder.last_end - recorder.first_due) if num_ended else 0.0
    span = recorder.last_due - recorder.first_due
    has_targets = targets.ttft_seconds is not None or targets.tpot_seconds is not None
    attainment = recorder.num_good / num_ended if num_ended else None

    def rate(count: float) -> float:
        return count / duration if duration > 0 else 0.0

    return Summary(
        duration_seconds=duration,
        num_requests=num_ended,
        num_successful=recorder.num_successful,
        num_failed=num_failed,
        num_interrupted=len(recorder.live),
        errors={str(kind): count for kind, count in recorder.errors.most_common()},
        num_input_tokens=recorder.num_input_tokens,
        num_output_tokens=recorder.num_output_tokens,
        num_cached_tokens=recorder.num_cached_tokens or None,
        offered_requests_per_second=(recorder.num_due - 1) / span if span > 0 else None,
        requests_per_second=rate(recorder.num_successful),
        output_tokens_per_second=rate(recorder.num_output_tokens),
        total_tokens_per_second=rate(recorder.num_input_tokens + recorder.num_output_tokens),
        ttft_seconds=distribution(np.asarray(recorder.ttft)),
        tpot_seconds=distribution(np.asarray(recorder.tpot)),
        itl_seconds=recorder.itl.distribution(),
        end_to_end_seconds=distribution(np.asarray(recorder.end_to_end)),
        start_delay_seconds=None,
        peak_in_flight=recorder.peak_in_flight,
        num_usage_mismatches=0,
        num_short_outputs=0,
        targets=targets,
        num_good=recorder.num_good,
        goodput_requests_per_second=rate(recorder.num_good),
        attainment=attainment,
        meets_targets=attainment >= targets.attainment if has_targets and attainment is not None else None,
    )


def _curves(recorder: Recorder) -> dict[str, tuple[float, ...]]:
    curves = {
        "ttft": curve(np.asarray(recorder.ttft)),
        "tpot": curve(np.asarray(recorder.tpot)),
        "end_to_end": curve(np.asarray(recorder.end_to_end)),
    }
    if recorder.itl.num_values:
        shares = [index / (NUM_POINTS - 1) for index in range(NUM_POINTS)]
        curves["itl"] = tuple(recorder.itl.quantiles(shares))
    return {name: values for name, values in curves.items() if values}


def _pool(pool: SimulatedPool, tally: PoolTally, duration: float, end: float, unknown: list[str]) -> PoolResult:
    workers = pool.spec.workers
    worker_seconds = workers * duration
    busy_share = min(1.0, tally.busy_seconds / worker_seconds) if worker_seconds else 0.0

    def known(quantity: Callable[[], float]) -> float | None:
        try:
            return workers * quantity()
        except DeploymentError as error:
            unknown.append(str(error))
            return None

    return PoolResult(
        name=pool.spec.name,
        role=pool.spec.role,
        chip=pool.chip.id,
        num_workers=workers,
        num_chips=pool.num_chips,
        busy_share=busy_share,
        mean_batch=tally.batch_seconds / tally.busy_seconds if tally.busy_seconds else 0.0,
        num_steps=tally.num_steps,
        num_prefill_tokens=tally.num_prefill_tokens,
        num_decode_tokens=tally.num_decode_tokens,
        num_preemptions=tally.num_preemptions,
        kv_tokens=workers * pool.num_blocks * pool.spec.block_size,
        kv_share=tally.kv_seconds / worker_seconds if worker_seconds else 0.0,
        peak_kv_share=tally.peak_kv_share,
        energy_joules=known(lambda: pool.cost.energy_joules(duration, busy_share)),
        usd=known(lambda: pool.cost.usd(duration)),
        series=_pool_series(tally, workers, end),
    )


def _pool_series(tally: PoolTally, workers: int, end: float) -> tuple[PoolSample, ...]:
    width = tally.busy.width
    samples: list[PoolSample] = []
    for index in range(_num_bins(tally.busy, end)):
        seconds = min(width, end - index * width) * workers
        busy = tally.busy.amounts[index]
        samples.append(
            PoolSample(
                seconds=index * width,
                busy_share=min(1.0, busy / seconds),
                batch=tally.batch.amounts[index] / seconds,
                waiting=tally.waiting.amounts[index] / seconds,
                kv_share=tally.kv.amounts[index] / seconds,
            )
        )
    return tuple(samples)


def _num_bins(bins: TimeBins, end: float) -> int:
    """Bins that have begun before the end."""
    count = int(end / bins.width)
    return min(len(bins.amounts), count + (end - count * bins.width > 1e-9))


def _link(link: SimulatedLink, tally: LinkTally, end: float) -> LinkResult:
    width = tally.bytes.width
    return LinkResult(
        source=link.source,
        target=link.target,
        kind=link.kind,
        crosses="kv",
        num_transfers=tally.num_transfers,
        num_bytes=tally.num_bytes,
        bytes_per_second_limit=link.bytes_per_second,
        busy_seconds=tally.busy_seconds,
        exposed_seconds=tally.exposed_seconds,
        wire_seconds=tally.wire_seconds,
        series=tuple(
            LinkSample(
                seconds=index * width,
                bytes_per_second=tally.bytes.amounts[index] / min(width, end - index * width),
            )
            for index in range(_num_bins(tally.bytes, end))
        ),
    )


def _cost(pools: tuple[PoolResult, ...], summary: Summary, unknown: list[str]) -> Cost:
    def total(values: list[float | None]) -> float | None:
        return None if None in values else sum(value for value in values if value is not None)

    usd, joules = total([pool.usd for pool in pools]), total([pool.energy_joules for pool in pools])
    tokens, seconds = summary.num_output_tokens, summary.duration_seconds
    return Cost(
        num_chips=sum(pool.num_chips for pool in pools),
        usd=usd,
        usd_per_million_output_tokens=usd / tokens * 1e6 if usd is not None and tokens else None,
        energy_joules=joules,
        mean_watts=joules / seconds if joules is not None and seconds else None,
        joules_per_output_token=joules / tokens if joules is not None and tokens else None,
        unknown=tuple(dict.fromkeys(unknown)),
    )


def _interval(pools: list[SimulatedPool], *, of_first_token: bool = False) -> Interval | None:
    """The widest of those pools."""
    if not pools:
        return None
    factors = [pool.cost.ttft_interval if of_first_token else pool.cost.interval for pool in pools]
    low, high = min(low for low, _ in factors), max(high for _, high in factors)
    chips = ", ".join(dict.fromkeys(pool.chip.id for pool in pools))
    what = "times to the first token" if of_first_token else "steps"
    return Interval(low=low, high=high, basis=f"80 % of measured {what} of chips known as well as {chips}")


def _chosen(recorder: Recorder) -> tuple[Waterfall, ...]:
    """A request of about median length of all sampled ones, and the worst by TTFT and by total time."""
    chosen: list[Waterfall] = []
    sampled = sorted(recorder.samples.values(), key=lambda sample: sample.total_seconds)
    if sampled:
        chosen.append(sampled[len(sampled) // 2])
    chosen += [sample for _, sample in recorder.worst.values()]
    return tuple({waterfall.request: waterfall for waterfall in chosen}.values())


def _errors(recorder: Recorder) -> list[str]:
    ranked = sorted(recorder.error_details.items(), key=lambda entry: -entry[1])
    return [f"{count} requests failed: {detail}" for detail, count in ranked[:5]]


def _bottleneck(cluster: SimulatedCluster, recorder: Recorder, pools: tuple[PoolResult, ...]) -> str:
    """What requests wait for, or, if they wait for nothing, what most of their time goes to."""
    seconds = recorder.stage_seconds
    total = sum(seconds.values())
    if not total:
        return "nothing was done"

    def share(*names: str) -> float:
        return sum(seconds.get(name, 0.0) for name in names) / total

    decoding = max((pool for pool in pools if pool.role != "prefill"), key=lambda pool: pool.peak_kv_share)
    prefilling = max((pool for pool in pools if pool.role != "decode"), key=lambda pool: pool.busy_share)
    waits = {
        f'room at pool "{decoding.name}" (KV memory up to {decoding.peak_kv_share:.0%} in use)': share(
            "queue", "reserve", "preempted", "recovery queue"
        ),
        f'pool "{prefilling.name}" to prefill ({prefilling.busy_share:.0%} busy)': share("prefill queue"),
        "the KV cache to cross": share("transfer"),
    }
    worst = max(waits, key=lambda name: waits[name])
    if waits[worst] > FELT_SHARE:
        return f"requests spend {waits[worst]:.0%} of their time waiting for {worst}"
    stage = max(seconds, key=lambda name: seconds[name])
    pool = decoding if stage.startswith("decode") else prefilling
    bound = _bound(cluster.pool(pool.name), recorder.pools[pool.name], pool)
    return f"none; {share(stage):.0%} of a request's time is {stage}, in steps bound by {bound}"


def _bound(pool: SimulatedPool, tally: PoolTally, result: PoolResult) -> str:
    """What most of the time of its mean step goes to."""
    if not tally.num_steps:
        return "nothing"
    num_decode = round(tally.num_decode_tokens / tally.num_steps)
    num_prefill = round(tally.num_prefill_tokens / tally.num_steps)
    kv_tokens = result.kv_share * pool.num_blocks * pool.spec.block_size
    shape = StepShape(
        prefill=((0, num_prefill),) if num_prefill else (),
        num_decode=num_decode,
        decode_context_tokens=max(num_decode, int(kv_tokens)) if num_decode else 0,
    )
    seconds: dict[str, float] = {}
    for operation in pool.cost.breakdown(shape):
        seconds[operation.bound] = seconds.get(operation.bound, 0.0) + operation.seconds
    if not seconds:
        return "nothing"
    worst = max(seconds, key=lambda bound: seconds[bound])
    return f"{worst} ({seconds[worst] / sum(seconds.values()):.0%} of a mean step)"
