"""A deployment over chips of the catalog, in numbers: what each worker costs, what it holds, what its links give.

Pure arithmetic on the catalog; plays nothing. What does not fit or is not known is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import msgspec

from transload.control.messages import Chunk, WorkerId
from transload.deploy.spec import Deployment, Link, Pool, PrecisionSpec
from transload.errors import DeploymentError
from transload.hardware.catalog import load_chip, load_link, load_model
from transload.hardware.chip import Chip
from transload.hardware.cost.measured import MeasuredCost
from transload.hardware.cost.shape import StepShape
from transload.hardware.cost.worker import OperationTime, WorkerCost
from transload.hardware.measured import UNKNOWN, MeasuredSteps
from transload.hardware.model_card import ModelCard
from transload.hardware.model_facts import kv_bytes_per_token
from transload.hardware.parallel import share_of_chip
from transload.hardware.precision import Precision, parse_dtype, with_kv, with_weights
from transload.hardware.quantity import Kind as NumberClass
from transload.hardware.quantity import Quantity, kinds_of
from transload.hardware.slots import parse_assumption
from transload.runtime.flows import Port, Wire
from transload.study.link_ports import port_of
from transload.study.split_pools import Hop, hop_of, split_cost
from transload.units import format_bytes

MESSAGE_SECONDS = 100e-6
"""Estimate: a word between the front end and a worker, over a network of the same building."""
LOAD_BYTES_PER_SECOND = 2e9
"""Estimate: at which each chip gets its weights when a lost worker is started again."""
FEWEST_FRAMES, MOST_FRAMES = 2, 6
"""Into how many frames a chunk's KV is cut: more only where the last one would be felt."""
FELT_SHARE = 0.05
"""Of a chunk's computing: a last frame that takes less is not worth more frames."""


class StepCost(Protocol):
    """What the simulation asks of one worker. `WorkerCost` is one."""

    def step_seconds(self, shape: StepShape) -> float: ...
    def decode_coefficients(self, num_decode: int) -> tuple[float, float]: ...
    def breakdown(self, shape: StepShape) -> tuple[OperationTime, ...]: ...
    def request_seconds(self, prompt_tokens: int, in_flight: int = 1) -> float: ...
    @property
    def kv_tokens(self) -> int: ...
    @property
    def interval(self) -> tuple[float, float]: ...
    @property
    def ttft_interval(self) -> tuple[float, float]: ...
    @property
    def rests_on(self) -> tuple[Quantity, ...]: ...
    @property
    def assumptions(self) -> tuple[str, ...]: ...
    def energy_joules(self, seconds: float, busy_share: float) -> float: ...
    def usd(self, seconds: float) -> float: ...


class SimulatedPool(msgspec.Struct, frozen=True, kw_only=True):
    """A pool's workers, all alike."""

    spec: Pool
    chip: Chip
    cost: StepCost
    num_blocks: int
    is_linear: bool = True
    """Whether a decode step is a straight line in its context, so that many can be gone through at once."""

    @property
    def num_chips(self) -> int:
        """Of all its workers."""
        return self.spec.workers * self.spec.parallel.num_chips

    @property
    def worker_names(self) -> list[WorkerId]:
        return [WorkerId(f"{self.spec.name}-{index}") for index in range(self.spec.workers)]


class FfnPool(msgspec.Struct, frozen=True, kw_only=True):
    """A pool that computes feed-forwards for others and holds no requests."""

    spec: Pool
    chip: Chip


class SimulatedLink(msgspec.Struct, frozen=True, kw_only=True):
    """All wires from the workers of a prefill pool to those of a decode pool; back they are the same."""

    source: str
    target: str
    kind: str
    source_bytes_per_second: float
    """Of one worker's port."""
    target_bytes_per_second: float
    latency_seconds: float
    shared_bytes_per_second: float | None
    layers_per_frame: int
    lease_seconds: float
    in_place: bool
    """Prefill works in the blocks of the decode workers: nothing crosses."""

    @property
    def bytes_per_second(self) -> float:
        """Of a transfer that is alone."""
        return min(
            self.source_bytes_per_second,
            self.target_bytes_per_second,
            self.shared_bytes_per_second or math.inf,
        )


class SimulatedCluster(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a simulation of a deployment rests on."""

    deployment: Deployment
    card: ModelCard
    precision: Precision
    kv_bytes_per_token: int
    pools: tuple[SimulatedPool, ...]
    ffn_pools: tuple[FfnPool, ...] = ()
    links: tuple[SimulatedLink, ...]
    hops: dict[str, Hop] = {}
    """To the FFN pool of each pool that has one, by its name."""
    max_context: int
    assumptions: tuple[str, ...]
    classes: dict[NumberClass, int]
    notes: tuple[str, ...]

    def pool(self, name: str) -> SimulatedPool:
        return next(pool for pool in self.pools if pool.spec.name == name)


def is_simulated(deployment: Deployment) -> bool:
    """Whether it names chips to simulate."""
    return any(pool.chip is not None for pool in deployment.pools)


def plan_cluster(deployment: Deployment, assume: Iterable[str] = ()) -> SimulatedCluster:
    """Put a deployment into numbers. `assume` adds to the file's own and wins over them.

    Raises `DeploymentError` for what is not known, does not fit or cannot be split so.
    """
    assumed = {
        (a.subject, a.quantity): text for text in (*deployment.assume, *assume) for a in [parse_assumption(text)]
    }
    texts = tuple(assumed.values())
    card = load_model(deployment.model.path)
    precision = resolve_precision(card, deployment.model.precision)
    used: set[str] = set()
    pools = tuple(
        _pool(deployment, pool, card, precision, texts, used) for pool in deployment.pools if pool.role != "ffn"
    )
    ffn_pools = tuple(_ffn_pool(pool, texts, used) for pool in deployment.pools if pool.role == "ffn")
    measured = next((pool.chip.measured for pool in pools if pool.chip.measured is not None), None)
    kv = kv_bytes_per_token(card, precision.kv) if measured is None else measured.kv_bytes_per_token
    links, quantities, notes = _links(deployment, pools, card, kv, texts, used)
    hops = {pool.spec.name: hop_of(deployment, pool.spec, texts) for pool in pools if pool.spec.ffn is not None}
    quantities += [quantity for hop in hops.values() for quantity in hop.rests_on]
    idle = [text for text in texts if parse_assumption(text).subject not in used]
    if idle:
        known = ", ".join(sorted(used))
        raise DeploymentError(f"--assume {idle[0]}: nothing in this deployment is called so; there are: {known}")
    rests_on = [quantity for pool in pools for quantity in pool.cost.rests_on] + quantities
    said = [text for pool in pools for text in pool.cost.assumptions if not text.startswith("assumed: ")]
    return SimulatedCluster(
        deployment=deployment,
        card=card,
        precision=precision,
        kv_bytes_per_token=kv,
        pools=pools,
        ffn_pools=ffn_pools,
        links=links,
        hops=hops,
        max_context=deployment.model.max_context or card.max_context or 2**31,
        assumptions=texts,
        classes=kinds_of({id(quantity): quantity for quantity in rests_on}.values()),
        notes=tuple(dict.fromkeys([*said, *notes])),
    )


def resolve_precision(card: ModelCard, spec: PrecisionSpec | None) -> Precision:
    """The model's number formats with what the file says in their place. Raises `DeploymentError`."""
    precision = card.precision
    if spec is None:
        return precision
    if spec.activations is not None and spec.activations != spec.weights:
        raise DeploymentError(
            f"model.precision.activations = {spec.activations}: the chip multiplies in the format of the weights where "
            "it can, and in the next wider one where it cannot; leave it out"
        )
    if spec.weights is not None:
        precision = with_weights(precision, parse_dtype(spec.weights))
    if spec.kv is not None:
        precision = with_kv(precision, parse_dtype(spec.kv))
    return precision


def _pool(
    deployment: Deployment, pool: Pool, card: ModelCard, precision: Precision, assume: Sequence[str], used: set[str]
) -> SimulatedPool:
    if pool.chip is None:
        raise DeploymentError(
            f'pool "{pool.name}" has no chip to simulate; name one of `transload chips` '
            f"(--set pools.{pool.name}.chip=h100_sxm), or the file that `transload calibrate` has written"
        )
    chip = load_chip(pool.chip)
    used |= {chip.id, *chip.aliases}
    chip = chip.assuming([parse_assumption(text) for text in assume])
    if chip.measured is not None:
        _check_measured(deployment, pool, card, chip.measured)
    cost: StepCost
    per_token = kv_bytes_per_token(card, precision.kv)
    if pool.ffn is not None:
        cost = split_cost(deployment, pool, chip, card, precision, assume)
    elif chip.measured is not None:
        cost, per_token = MeasuredCost(chip, pool.parallel), chip.measured.kv_bytes_per_token
    else:
        cost = WorkerCost(chip, card, pool.parallel, precision)
    num_blocks = cost.kv_tokens // pool.block_size
    if pool.memory_bytes is not None:
        wanted = pool.memory_bytes // (pool.block_size * per_token)
        if wanted > num_blocks and chip.measured is None:
            most = format_bytes(num_blocks * pool.block_size * per_token)
            raise DeploymentError(
                f'pool "{pool.name}": memory = {format_bytes(pool.memory_bytes)}, but beside the weights '
                f"{pool.parallel.num_chips} x {chip.id} hold {most} of KV cache; lower it or leave it out"
            )
        num_blocks = wanted
    if num_blocks < 1:
        raise DeploymentError(
            f'pool "{pool.name}": {pool.parallel.num_chips} x {chip.id} hold no KV block beside the weights of '
            f"{card.id}; split it over more chips (pools.{pool.name}.parallel)"
        )
    return SimulatedPool(spec=pool, chip=chip, cost=cost, num_blocks=num_blocks, is_linear=pool.ffn is None)


def _check_measured(deployment: Deployment, pool: Pool, card: ModelCard, measured: MeasuredSteps) -> None:
    """What was measured are the steps of one model, whole."""
    if pool.ffn is not None:
        raise DeploymentError(
            f'pool "{pool.name}": {pool.chip} was measured as whole workers, so it is not one side of a split; leave '
            "out `ffn` and the FFN pool (a file that was measured with --topology 1a1f has both sides in its steps)"
        )
    path = deployment.model.path
    names = {name.lower() for name in (card.id, card.name, *card.aliases, path, path.rstrip("/").rpartition("/")[2])}
    if measured.dtype != UNKNOWN and measured.model.lower() not in names:
        raise DeploymentError(
            f'pool "{pool.name}": {pool.chip} was measured with {measured.model}, but this deployment serves {path}; '
            f"calibrate with it (transload calibrate --model {path} -o FILE), or set model.path"
        )


def _ffn_pool(pool: Pool, assume: Sequence[str], used: set[str]) -> FfnPool:
    chip = load_chip(pool.chip or "")
    used |= {chip.id, *chip.aliases}
    return FfnPool(spec=pool, chip=chip.assuming([parse_assumption(text) for text in assume]))


# ---------------------------------------------------------------------------------------------------------------------
# Links


def _links(
    deployment: Deployment,
    pools: Sequence[SimulatedPool],
    card: ModelCard,
    kv: int,
    assume: Sequence[str],
    used: set[str],
) -> tuple[tuple[SimulatedLink, ...], list[Quantity], list[str]]:
    listed = {frozenset(link.between): link for link in deployment.links}
    links: list[SimulatedLink] = []
    quantities: list[Quantity] = []
    notes: list[str] = []
    for link in listed.values():
        if link.kind is not None:
            kind = load_link(link.kind)
            used |= {kind.id, *kind.aliases}
    for source in pools:
        for target in pools:
            if (source.spec.role, target.spec.role) == ("prefill", "decode"):
                between = (source.spec.name, target.spec.name)
                link = listed.get(frozenset(between)) or Link(between=between)
                made, found, said = _link(link, source, target, card, kv, assume)
                links.append(made)
                quantities += found
                notes += said
    return tuple(links), quantities, notes


def _link(
    link: Link, source: SimulatedPool, target: SimulatedPool, card: ModelCard, kv: int, assume: Sequence[str]
) -> tuple[SimulatedLink, list[Quantity], list[str]]:
    where = f'link between "{source.spec.name}" and "{target.spec.name}"'
    quantities: list[Quantity] = []
    notes: list[str] = []
    rates = [link.bandwidth_bytes_per_second] * 2
    latency, name = link.latency_seconds, "as given"
    if link.kind is not None:
        kind = load_link(link.kind).assuming([parse_assumption(text) for text in assume])
        name = kind.id
        for end, pool in enumerate((source, target)):
            if rates[end] is None:
                rates[end], quantity = port_of(kind, pool.spec.parallel.num_chips)
                quantities.append(quantity)
        if latency is None:
            quantities.append(kind.need("latency"))
            latency = quantities[-1].value
    elif None in rates:
        name = "scale-out of the chips"
        notes.append(f"{where}: no kind given, so each chip's own way out of the box is taken")
        for end, pool in enumerate((source, target)):
            quantity = pool.chip.need("scale_out.bandwidth")
            rates[end] = quantity.value * pool.spec.parallel.num_chips
            quantities.append(quantity)
    if latency is None:
        known = [pool.chip.scale_out.latency for pool in (source, target) if pool.chip.scale_out.latency is not None]
        latency = max((quantity.value for quantity in known), default=10e-6)
        quantities += known
        if not known:
            notes.append(f"{where}: latency is not known; 10 us are taken")
    out, into = rates
    assert out is not None
    assert into is not None
    rate = min(out, into, link.shared_bandwidth_bytes_per_second or math.inf)
    made = SimulatedLink(
        source=source.spec.name,
        target=target.spec.name,
        kind=name,
        source_bytes_per_second=out,
        target_bytes_per_second=into,
        latency_seconds=latency,
        shared_bytes_per_second=link.shared_bandwidth_bytes_per_second,
        layers_per_frame=min(card.num_layers, link.layers_per_frame or _layers_per_frame(source, card, kv, rate)),
        lease_seconds=link.lease_seconds,
        in_place=link.transport == "direct",
    )
    return made, quantities, notes


def _layers_per_frame(source: SimulatedPool, card: ModelCard, kv: int, rate: float) -> int:
    tokens = source.spec.limits.step_tokens
    computing = source.cost.step_seconds(StepShape(prefill=((0, tokens),)))
    frames = math.ceil(tokens * kv / rate / (FELT_SHARE * computing))
    return math.ceil(card.num_layers / min(MOST_FRAMES, max(FEWEST_FRAMES, frames)))


# ---------------------------------------------------------------------------------------------------------------------
# Durations


class ClusterCost:
    """The `CostModel` of a simulated cluster."""

    def __init__(self, cluster: SimulatedCluster) -> None:
        self._cluster = cluster
        self._pools = {name: pool for pool in cluster.pools for name in pool.worker_names}
        self._links: dict[tuple[str, str], SimulatedLink] = {}
        for link in cluster.links:
            self._links[link.source, link.target] = link
        self._ports: dict[tuple[str, str, str], Port] = {}
        measured = [pool.chip.measured for pool in cluster.pools if pool.chip.measured is not None]
        self._message_seconds = max((each.message_seconds for each in measured), default=MESSAGE_SECONDS)

    def step_seconds(self, worker: WorkerId, chunks: Sequence[Chunk]) -> float:
        pool = self._pools[worker]
        seconds = pool.cost.step_seconds(step_shape(chunks))
        measured = pool.chip.measured
        if measured is not None and any(chunk.streams for chunk in chunks):
            seconds *= measured.serving.streaming
        return seconds

    def decode_line(self, worker: WorkerId, num_decode: int) -> tuple[float, float] | None:
        pool = self._pools[worker]
        return pool.cost.decode_coefficients(num_decode) if pool.is_linear else None

    def wire(self, source: WorkerId, target: WorkerId) -> Wire:
        """Workers of several links of one kind have one port for all of them."""
        here, there = self._pools[source].spec.name, self._pools[target].spec.name
        link = self._links.get((here, there))
        out, into = (link.source_bytes_per_second, link.target_bytes_per_second) if link is not None else (0.0, 0.0)
        if link is None:
            link = self._links[there, here]
            out, into = link.target_bytes_per_second, link.source_bytes_per_second
        ports = [self._port(("out", source, link.kind), out), self._port(("in", target, link.kind), into)]
        if link.shared_bytes_per_second is not None:
            ports.append(self._port(("trunk", here, there), link.shared_bytes_per_second))
        return Wire(ports, link.latency_seconds)

    def _port(self, key: tuple[str, str, str], rate: float) -> Port:
        return self._ports.setdefault(key, Port(rate))

    def message_seconds(self) -> float:
        """As it was measured, where it was."""
        return self._message_seconds

    def start_seconds(self, worker: WorkerId) -> float:
        pool = self._pools[worker]
        if pool.chip.measured is not None:
            return pool.chip.measured.load_seconds
        share = share_of_chip(self._cluster.card, pool.spec.parallel, self._cluster.precision)
        return share.weight_bytes / LOAD_BYTES_PER_SECOND


def step_shape(chunks: Sequence[Chunk]) -> StepShape:
    """What a step works on."""
    prefill: list[tuple[int, int]] = []
    num_decode = context = 0
    for chunk in chunks:
        if chunk.num_tokens == 1 and chunk.num_outputs:
            num_decode += 1
            context += chunk.start + 1
        else:
            prefill.append((chunk.start, chunk.num_tokens))
    return StepShape(tuple(prefill), num_decode, context)


def pool_of_worker(cluster: SimulatedCluster) -> Mapping[WorkerId, str]:
    """The pool of each worker."""
    return {name: pool.spec.name for pool in cluster.pools for name in pool.worker_names}
