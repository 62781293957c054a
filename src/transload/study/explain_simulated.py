"""What a deployment on chips of the catalog would be: what fits where, what crosses, what one user could get at most.

The counterpart of `deploy/explain.py` for chips that are not here. Runs no requests: single steps of the cost model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from transload.deploy.spec import Deployment, Pool
from transload.errors import DeploymentError
from transload.hardware.afd.memory import SideMemory, attention_memory, ffn_memory
from transload.hardware.afd.pipeline import step_seconds
from transload.hardware.afd.stages import SplitWorker, Wire, shared_parallel, wire_of
from transload.hardware.cost.capacity import Capacity
from transload.hardware.cost.shape import StepShape
from transload.hardware.cost.worker import WorkerCost
from transload.hardware.link import LinkKind
from transload.hardware.model_facts import count_parameters, kv_bytes, kv_bytes_per_token, weight_bytes
from transload.study.fleet import Fleet, fleet_of

PROMPT_TOKENS = 1024
"""Of the request that is taken as an example."""


class PoolLine(msgspec.Struct, frozen=True, kw_only=True):
    """A pool, a worker of it at a time."""

    name: str
    role: str
    chip: str
    num_workers: int
    chips_each: int
    weights_tier: str
    weight_bytes: int
    """On the fullest chip."""
    capacity_bytes: float
    """Of that chip's memory, what may be filled."""
    kv_tokens: int | None
    """That fit in one worker. None: it holds none."""
    prefill_seconds: float | None
    """Of one prompt of 1,024 tokens, alone."""
    decode_seconds: float | None
    """Of one token of one user, its feed-forwards elsewhere included. None where the pool does not decode."""
    interval: tuple[float, float]
    watts: float | None
    """Of all its chips, computing."""
    usd_per_hour: float | None


class LinkLine(msgspec.Struct, frozen=True, kw_only=True):
    between: tuple[str, str]
    kind: str
    crosses: str
    bytes_per_second: float | None
    """Of one port; of one chip where the link is a chip's."""
    latency_seconds: float | None
    example_bytes: float
    """KV of a prompt of 1,024 tokens, or the activations of one token through all layers, both ways."""


class SimulatedExplanation(msgspec.Struct, frozen=True, kw_only=True):
    source: str
    model: str
    num_parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    pools: tuple[PoolLine, ...]
    links: tuple[LinkLine, ...]
    assumptions: tuple[str, ...]
    """Values of the user's own."""
    rests_on: tuple[str, ...]
    """What the cost model takes for granted."""
    problems: tuple[str, ...]
    """Why it cannot run as described: what does not fit, which number is unknown."""

    @property
    def fits(self) -> bool:
        return not self.problems


def is_simulated(deployment: Deployment) -> bool:
    """Whether it names chips that are not this machine's own."""
    return any(pool.chip is not None for pool in deployment.pools)


def explain_simulated(deployment: Deployment, source: str) -> SimulatedExplanation:
    """Raises `DeploymentError` for a name that the catalog does not have; what does not fit is among the problems."""
    fleet = fleet_of(deployment)
    pools: list[PoolLine] = []
    rests_on: list[str] = []
    problems: list[str] = []
    for pool in deployment.pools:
        if pool.chip is None:
            problems.append(f"pool {pool.name}: it names no chip; give it `chip`, as the others have")
            continue
        try:
            cost = fleet.worker(pool)
            pools.append(_pool_line(deployment, fleet, pool, cost))
        except DeploymentError as refusal:
            problems.append(f"pool {pool.name}: {refusal}")
            continue
        rests_on += cost.assumptions
    return SimulatedExplanation(
        source=source,
        model=fleet.card.name,
        num_parameters=count_parameters(fleet.card).total,
        weight_bytes=weight_bytes(fleet.card, fleet.precision),
        kv_bytes_per_token=kv_bytes_per_token(fleet.card, fleet.precision.kv),
        pools=tuple(pools),
        links=tuple(_link_lines(deployment, fleet)),
        assumptions=deployment.assume,
        rests_on=tuple(dict.fromkeys(line for line in rests_on if not line.startswith("assumed: "))),
        problems=(*problems, *_unknown_links(deployment, fleet)),
    )


def _pool_line(deployment: Deployment, fleet: Fleet, pool: Pool, cost: WorkerCost) -> PoolLine:
    memory = _memory(deployment, fleet, pool, cost)
    prefills = cost.scope == "all" and pool.role in ("prefill", "aggregated")
    return PoolLine(
        name=pool.name,
        role=pool.role,
        chip=cost.chip.id,
        num_workers=pool.workers,
        chips_each=pool.parallel.num_chips,
        weights_tier=cost.chip.tier_for("weights").key,
        weight_bytes=memory.weight_bytes,
        capacity_bytes=memory.usable_bytes,
        kv_tokens=None if pool.role == "ffn" else memory.kv_tokens,
        prefill_seconds=cost.step_seconds(StepShape(prefill=((0, PROMPT_TOKENS),))) if prefills else None,
        decode_seconds=_token_seconds(deployment, fleet, pool, cost),
        interval=cost.interval,
        watts=_known(lambda: pool.workers * cost.energy_joules(1.0, 1.0)),
        usd_per_hour=_known(lambda: pool.workers * cost.usd(3600.0)),
    )


def _memory(deployment: Deployment, fleet: Fleet, pool: Pool, cost: WorkerCost) -> Capacity | SideMemory:
    match cost.scope:
        case "all":
            return cost.capacity
        case "attention":
            return attention_memory(cost.chip, fleet.card, pool.parallel, fleet.precision)
        case "ffn":
            split = next(user.ffn.split for user in deployment.pools if user.ffn and user.ffn.pool == pool.name)
            held = shared_parallel(pool.parallel, split, pool.workers)
            return ffn_memory(cost.chip, fleet.card, held, fleet.precision)


def _token_seconds(deployment: Deployment, fleet: Fleet, pool: Pool, cost: WorkerCost) -> float | None:
    """A decode step of one request; through the pool that has its feed-forwards, if there is one."""
    if pool.role not in ("decode", "aggregated"):
        return None
    if pool.ffn is None:
        return cost.step_seconds(StepShape(num_decode=1, decode_context_tokens=PROMPT_TOKENS))
    other = next(each for each in deployment.pools if each.name == pool.ffn.pool)
    wire = _wire(deployment, fleet, pool, other)
    split = SplitWorker(
        fleet.card,
        cost.chip,
        fleet.chips[other.name],
        wire,
        attention_parallel=pool.parallel,
        ffn_parallel=other.parallel,
        precision=fleet.precision,
        split=pool.ffn.split,
        parts=other.workers,
    )
    pipeline = split.pipeline(1, PROMPT_TOKENS, ffn_workers=other.workers, micro_batches=1)
    return step_seconds(pipeline)


def _wire(deployment: Deployment, fleet: Fleet, pool: Pool, other: Pool) -> Wire:
    """Between attention and feed-forwards. A rate in the file is of a worker's port, the kind's of a chip's."""
    between = frozenset((pool.name, other.name))
    link = next((link for link in deployment.links if frozenset(link.between) == between), None)
    kind = fleet.links.get(between)
    if link is None or kind is None:
        raise DeploymentError(f"nothing says how {pool.name} and {other.name} are linked; add a link with a kind")
    own = link.bandwidth_bytes_per_second
    wire = wire_of(kind, bandwidth=own, latency=link.latency_seconds, shared=link.shared_bandwidth_bytes_per_second)
    if own is None:
        return wire
    return msgspec.structs.replace(
        wire,
        attention_bytes_per_second=own / pool.parallel.num_chips,
        ffn_bytes_per_second=own / other.parallel.chips_per_stage,
    )


def _known(amount: Callable[[], float]) -> float | None:
    """None where the catalog does not say."""
    try:
        return amount()
    except DeploymentError:
        return None


def _link_lines(deployment: Deployment, fleet: Fleet) -> Iterator[LinkLine]:
    ffn = {pool.name for pool in deployment.pools if pool.role == "ffn"}
    for link in deployment.links:
        hop = bool(ffn & set(link.between))
        kind = fleet.links.get(frozenset(link.between))
        activations = 3.0 * fleet.card.hidden_size * fleet.card.num_layers
        yield LinkLine(
            between=link.between,
            kind=link.kind or "this machine's",
            crosses="activations of a token, all layers, both ways" if hop else "KV of 1,024 tokens, once a request",
            bytes_per_second=_setting(link.bandwidth_bytes_per_second, kind, "bandwidth"),
            latency_seconds=_setting(link.latency_seconds, kind, "latency"),
            example_bytes=activations if hop else kv_bytes(fleet.card, PROMPT_TOKENS, fleet.precision.kv),
        )


def _setting(own: float | None, kind: LinkKind | None, path: str) -> float | None:
    """What the file says, else what the catalog knows of the kind."""
    if own is not None or kind is None:
        return own
    found = kind.get(path)
    return None if found is None else found.value


def _unknown_links(deployment: Deployment, fleet: Fleet) -> Iterator[str]:
    """Links whose kind the catalog knows without a number that a simulation needs."""
    for link in deployment.links:
        kind = fleet.links.get(frozenset(link.between))
        own = {"bandwidth": link.bandwidth_bytes_per_second, "latency": link.latency_seconds}
        for path, value in own.items():
            if kind is not None and value is None and kind.get(path) is None:
                yield f"link {link.between[0]} - {link.between[1]}: {_refusal(kind, path)}"


def _refusal(kind: LinkKind, path: str) -> str:
    try:
        kind.need(path)
    except DeploymentError as refusal:
        return str(refusal)
    raise AssertionError(f"{kind.id}.{path} is known after all")
