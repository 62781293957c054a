"""What speaks against a deployment, read off its result and its chips: the last column of a comparison."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from transload.deploy.spec import Deployment
from transload.hardware.chip import Chip
from transload.study.fleet import Fleet
from transload.study.result import Result
from transload.units import format_seconds

MOST = 2
IDLE_SHARE = 0.25
EXPOSED_SHARE = 0.1
SPREAD = 2.0


def drawbacks_of(deployment: Deployment, result: Result, fleet: Fleet) -> list[str]:
    """The gravest, at most two; `none that the model sees` if there is none."""
    found = list(islice(_all(deployment, result, fleet), MOST))
    return found or ["none that the model sees"]


def _all(deployment: Deployment, result: Result, fleet: Fleet) -> Iterator[str]:
    """Gravest first."""
    summary = result.summary
    for chip in fleet.chips.values():
        if "shelved" in chip.status:
            yield f"{chip.id}: {chip.status}"
    if summary.num_failed:
        yield f"{summary.num_failed} of {summary.num_requests} requests failed"
    for pool in deployment.pools:
        if pool.role == "ffn":
            yield f"a hop out and back at each of {fleet.card.num_layers} layers, for every token"
    for used in result.pools:
        chip_used = fleet.chips.get(used.name)
        small = None if chip_used is None else _small_memory(chip_used)
        if chip_used is not None and small is not None and used.num_chips > used.num_workers:
            yield f"{small} a chip: {used.num_chips // used.num_workers} {chip_used.id} to hold the model once"
    exposed = sum(link.exposed_seconds for link in result.links if link.crosses == "kv")
    if summary.ttft_seconds is not None and summary.ttft_seconds.mean > 0:
        each = exposed / summary.num_successful
        if each / summary.ttft_seconds.mean > EXPOSED_SHARE:
            yield f"after its first token a stream waits {format_seconds(each)} for its KV"
    yield from _idle(result)
    gaps = summary.itl_seconds
    if gaps is not None and gaps.p50 > 0 and gaps.p99 / gaps.p50 > SPREAD:
        yield f"prompts hold up streams: P99 of the gap between tokens is {gaps.p99 / gaps.p50:.1f} times the median"


def _small_memory(chip: Chip) -> str | None:
    """Capacity of a chip that keeps weights in SRAM."""
    tier = chip.tier_for("weights")
    if tier.tier != "SRAM" or tier.capacity is None:
        return None
    return str(tier.capacity)


def _idle(result: Result) -> Iterator[str]:
    """Pools that are paid for and mostly wait, while there is another to take their place."""
    if len(result.pools) < 2:
        return
    for pool in sorted(result.pools, key=lambda pool: pool.busy_share):
        if pool.busy_share < IDLE_SHARE:
            yield f"pool {pool.name} computes {pool.busy_share:.0%} of the time"
