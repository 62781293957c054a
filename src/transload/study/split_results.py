"""What FFN pools and the links to them did in a simulated run: from the steps of attention pools, played nowhere."""

from __future__ import annotations

from collections.abc import Callable

from transload.errors import DeploymentError
from transload.hardware.afd.split_cost import SplitCost
from transload.study.result import LinkResult, PoolResult, SplitResult
from transload.study.simulated import FfnPool, SimulatedCluster
from transload.study.split_pools import SplitUse, ffn_energy_joules, ffn_usd, split_use


def split_uses(cluster: SimulatedCluster, pools: tuple[PoolResult, ...]) -> dict[str, SplitUse]:
    """By attention pool. Its mean step stands for all of its steps."""
    uses: dict[str, SplitUse] = {}
    for pool, result in zip(cluster.pools, pools, strict=True):
        if not isinstance(pool.cost, SplitCost):
            continue
        held = result.kv_share * pool.num_blocks * pool.spec.block_size  # tokens of one worker, over the whole run
        batch = result.mean_batch * result.busy_share
        uses[pool.spec.name] = split_use(
            pool.cost,
            num_steps=result.num_steps,
            num_prefill_tokens=result.num_prefill_tokens,
            num_decode_tokens=result.num_decode_tokens,
            mean_context=held / batch if batch else 1.0,
        )
    return uses


def ffn_result(
    cluster: SimulatedCluster, pool: FfnPool, uses: dict[str, SplitUse], duration: float, unknown: list[str]
) -> PoolResult:
    """An FFN pool as a pool of the result: it has no requests and no cache."""
    mine = [
        use
        for name, use in uses.items()
        if (ffn := cluster.pool(name).spec.ffn) is not None and ffn.pool == pool.spec.name
    ]
    workers, num_chips = pool.spec.workers, pool.spec.workers * pool.spec.parallel.num_chips
    busy = sum(use.ffn_busy_seconds for use in mine)
    busy_share = min(1.0, busy / (workers * duration)) if duration else 0.0

    def known(quantity: Callable[[], float]) -> float | None:
        try:
            return quantity()
        except DeploymentError as error:
            unknown.append(str(error))
            return None

    return PoolResult(
        name=pool.spec.name,
        role="ffn",
        chip=pool.chip.id,
        num_workers=workers,
        num_chips=num_chips,
        busy_share=busy_share,
        mean_batch=0.0,
        num_steps=sum(use.num_steps for use in mine),
        num_prefill_tokens=0,
        num_decode_tokens=0,
        num_preemptions=0,
        kv_tokens=0,
        kv_share=0.0,
        peak_kv_share=0.0,
        energy_joules=known(lambda: ffn_energy_joules(pool.spec, pool.chip, duration, busy_share)),
        usd=known(lambda: ffn_usd(pool.spec, pool.chip, duration)),
    )


def split_result(cluster: SimulatedCluster, name: str, use: SplitUse) -> SplitResult:
    """How the two sides of an attention pool's mean step and the wire between spent it."""
    pool, said = cluster.pool(name), use.report
    assert pool.spec.ffn is not None
    assert isinstance(pool.cost, SplitCost)
    assert said is not None
    return SplitResult(
        attention=name,
        ffn=pool.spec.ffn.pool,
        micro_batches=pool.cost.micro_batches,
        attention_workers=pool.cost.attention_workers,
        ffn_workers=pool.cost.ffn_workers,
        step_seconds=said.step_seconds,
        attention_busy=said.attention_busy,
        ffn_busy=said.ffn_busy,
        exposed_hop_seconds=said.exposed_hop_seconds,
        crossing_bytes=use.crossing_bytes,
        bytes_per_token=cluster.card.num_layers * pool.cost.worker.bytes_per_token_layer,
        waits_for=said.bound,
    )


def hop_result(cluster: SimulatedCluster, name: str, use: SplitUse) -> LinkResult:
    """The link between an attention pool and its FFN pool, both directions together."""
    hop, ffn = cluster.hops[name], cluster.pool(name).spec.ffn
    assert ffn is not None
    return LinkResult(
        source=name,
        target=ffn.pool,
        kind=hop.kind,
        crosses="activations",
        num_transfers=use.num_messages,
        num_bytes=use.num_bytes,
        bytes_per_second_limit=hop.bytes_per_second,
        busy_seconds=use.message_seconds,
        exposed_seconds=use.exposed_seconds,
        wire_seconds=use.message_seconds,
    )
