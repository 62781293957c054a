"""Pools whose feed-forwards another pool computes, in a simulation: their cost, and what the other pool did.

The FFN pool holds no requests and the controller does not know it, so nothing of it is played: what it did follows from
the steps of the attention workers. Owns that arithmetic; `hardware/afd` owns the pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from transload.deploy.spec import Deployment, Link, Pool
from transload.errors import DeploymentError
from transload.hardware.afd.pipeline import StepReport
from transload.hardware.afd.split_cost import SplitCost
from transload.hardware.afd.stages import SplitWorker, Wire
from transload.hardware.catalog import load_chip, load_link
from transload.hardware.chip import Chip
from transload.hardware.cost.energy import energy_joules, usd
from transload.hardware.cost.shape import StepShape
from transload.hardware.model_card import ModelCard
from transload.hardware.precision import Precision
from transload.hardware.quantity import Quantity
from transload.hardware.slots import parse_assumption
from transload.study.link_ports import port_of


class Hop(msgspec.Struct, frozen=True, kw_only=True):
    """The link between an attention pool and its FFN pool."""

    kind: str
    wire: Wire
    bytes_per_second: float
    """Of one attention worker's port."""
    rests_on: tuple[Quantity, ...]


def split_cost(
    deployment: Deployment, pool: Pool, chip: Chip, card: ModelCard, precision: Precision, assume: Sequence[str]
) -> SplitCost:
    """The cost of a worker of `pool`, whose chip is `chip`. Raises `DeploymentError` for an FFN pool that does not hold
    its side of the model, and for a link that is not there or not known."""
    assert pool.ffn is not None
    ffn = ffn_pool_of(deployment, pool)
    try:
        worker = SplitWorker(
            card,
            chip,
            _chip_of(ffn, assume),
            hop_of(deployment, pool, assume).wire,
            attention_parallel=pool.parallel,
            ffn_parallel=ffn.parallel,
            precision=precision,
            split=pool.ffn.split,
            parts=ffn.workers,
        )
        worker.pipeline(1, 1, ffn_workers=ffn.workers)  # refuses what cannot be dealt out to so many workers
    except DeploymentError as error:
        raise DeploymentError(f'pools "{pool.name}" and "{ffn.name}": {error}') from None
    return SplitCost(
        worker,
        attention_workers=sum(each.workers for each in attention_pools(deployment, ffn.name)),
        ffn_workers=ffn.workers,
        micro_batches=pool.ffn.micro_batches,
        shares_price=False,
    )


def ffn_pool_of(deployment: Deployment, pool: Pool) -> Pool:
    """The pool that computes the feed-forwards of `pool`."""
    assert pool.ffn is not None
    return next(each for each in deployment.pools if pool.ffn is not None and each.name == pool.ffn.pool)


def attention_pools(deployment: Deployment, ffn_name: str) -> list[Pool]:
    """Whose feed-forwards a pool computes."""
    return [pool for pool in deployment.pools if pool.ffn is not None and pool.ffn.pool == ffn_name]


def hop_of(deployment: Deployment, pool: Pool, assume: Sequence[str]) -> Hop:
    """The link between a pool and its FFN pool: the file's numbers, and the catalog's for what the file leaves open.

    Raises `DeploymentError` if a number is not known.
    """
    ffn = ffn_pool_of(deployment, pool)
    link = _listed(deployment, pool.name, ffn.name)
    rests_on: list[Quantity] = []
    kind = None if link.kind is None else load_link(link.kind).assuming([parse_assumption(text) for text in assume])
    rates = []
    for end in (pool, ffn):
        own = link.bandwidth_bytes_per_second
        if own is None:
            if kind is None:
                raise _incomplete(pool.name, ffn.name, "bandwidth")
            own, quantity = port_of(kind, end.parallel.num_chips)
            rests_on.append(quantity)
        rates.append(own)
    latency = link.latency_seconds
    if latency is None:
        if kind is None:
            raise _incomplete(pool.name, ffn.name, "latency")
        rests_on.append(kind.need("latency"))
        latency = rests_on[-1].value
    wire = Wire(
        latency_seconds=latency,
        attention_bytes_per_second=rates[0] / pool.parallel.num_chips,
        ffn_bytes_per_second=rates[1] / ffn.parallel.num_chips,
        shared_bytes_per_second=link.shared_bandwidth_bytes_per_second,
    )
    return Hop(
        kind="as given" if kind is None else kind.id,
        wire=wire,
        bytes_per_second=rates[0],
        rests_on=tuple(rests_on),
    )


def _listed(deployment: Deployment, one: str, other: str) -> Link:
    for link in deployment.links:
        if set(link.between) == {one, other}:
            return link
    raise DeploymentError(
        f'pools "{one}" and "{other}": activations cross between them in every layer, and no link says how; add\n'
        f"links:\n  - between: [{one}, {other}]\n    kind: ... (one of `transload links`)"
    )


def _incomplete(one: str, other: str, what: str) -> DeploymentError:
    return DeploymentError(f'link between "{one}" and "{other}": it has no {what}; give it, or a kind of link')


def _chip_of(pool: Pool, assume: Sequence[str]) -> Chip:
    if pool.chip is None:
        raise DeploymentError(f'pool "{pool.name}" has no chip to simulate; name one of `transload chips`')
    return load_chip(pool.chip).assuming([parse_assumption(text) for text in assume])


class SplitUse(msgspec.Struct, frozen=True, kw_only=True):
    """What the steps of one attention pool asked of the other side. Of its mean step, times its steps."""

    num_steps: int
    num_bytes: int
    """Out and home together."""
    num_messages: int
    ffn_busy_seconds: float
    """Over all FFN workers, for this pool's rows: an equal share of the calls that they are merged into."""
    exposed_seconds: float
    """By which its steps are longer than if bytes crossed in no time; sum over its workers."""
    message_seconds: float
    """Sum over messages: ports and latency."""
    report: StepReport | None = None
    """Of its mean step; None: it had none."""
    crossing_bytes: float = 0.0
    """Of its mean step."""


def split_use(
    cost: SplitCost, *, num_steps: int, num_prefill_tokens: int, num_decode_tokens: int, mean_context: float
) -> SplitUse:
    """From what was counted of a pool's steps. `mean_context`: of a decoding request."""
    num_tokens = num_prefill_tokens + num_decode_tokens
    if not num_steps or not num_tokens:
        return SplitUse(
            num_steps=0,
            num_bytes=0,
            num_messages=0,
            ffn_busy_seconds=0.0,
            exposed_seconds=0.0,
            message_seconds=0.0,
        )
    num_decode = round(num_decode_tokens / num_steps)
    num_prefill = round(num_prefill_tokens / num_steps)
    shape = StepShape(
        prefill=((0, num_prefill),) if num_prefill or not num_decode else (),
        num_decode=num_decode,
        decode_context_tokens=round(num_decode * max(1.0, mean_context)),
    )
    said: StepReport = cost.report(shape)
    layers = cost.worker.card.num_layers
    messages = 2 * num_steps * layers * min(cost.micro_batches, max(1, num_decode + bool(num_prefill)))
    num_bytes = num_tokens * layers * cost.worker.bytes_per_token_layer
    rate = cost.worker.wire.attention_bytes_per_second * cost.worker.attention_parallel.num_chips
    share = cost.ffn_workers / cost.attention_workers
    return SplitUse(
        num_steps=num_steps,
        num_bytes=round(num_bytes),
        num_messages=messages,
        ffn_busy_seconds=said.ffn_busy * said.step_seconds * num_steps * share,
        exposed_seconds=said.exposed_hop_seconds * num_steps,
        message_seconds=messages * cost.worker.wire.latency_seconds + num_bytes / rate,
        report=said,
        crossing_bytes=num_bytes / num_steps,
    )


def ffn_energy_joules(pool: Pool, chip: Chip, seconds: float, busy_share: float) -> float:
    """Of all chips of an FFN pool. Raises `DeploymentError` for power that is unknown."""
    return energy_joules(chip, pool.workers * pool.parallel.num_chips, seconds, busy_share)


def ffn_usd(pool: Pool, chip: Chip, seconds: float) -> float:
    """Of all chips of an FFN pool. Raises `DeploymentError` for a price that is unknown."""
    return usd(chip, pool.workers * pool.parallel.num_chips, seconds)
