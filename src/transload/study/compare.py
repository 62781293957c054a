"""Results of several deployments under one workload, side by side: the article's table, with computed columns.

Computes columns and says who wins, aggregated ones included. Simulates nothing and prints nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec

from transload.deploy.spec import Deployment, Pool
from transload.study.drawbacks import drawbacks_of
from transload.study.fleet import Fleet, fleet_of
from transload.study.metrics import Distribution
from transload.study.result import Interval, Result

JOULES_PER_KWH = 3.6e6
SAME = 0.02
"""Two values that differ by less are called equal."""


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """A duration of requests, and by what factors the truth may lie from it."""

    p50_seconds: float
    p95_seconds: float
    low: float | None
    high: float | None
    """Factors; None: a measured run."""


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """An amount for a million output tokens. None where a number is unknown, with the reason."""

    value: float | None
    basis: str
    """Class of the weakest number it rests on: `estimate`, `assumption`; or why it is unknown."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One deployment, as the comparison shows it."""

    name: str
    split: str
    """aggregated, prefill/decode, attention/FFN."""
    num_chips: int
    prefill_on: str
    decode_on: str
    crosses: str
    how_often: str
    bytes_per_request: float
    """Of KV, over all requests, those prefilled in place included."""
    bytes_per_token: float
    """Of activations, both ways, all layers; 0 without an FFN pool."""
    exposed_seconds: float
    """Mean over requests: the prompt was computed and decode still waited for its KV."""
    exposed_seconds_per_step: float
    """Mean over steps with feed-forwards elsewhere: what they would be shorter by if nothing had to cross."""
    ttft: Latency | None
    tpot: Latency | None
    requests_per_second: float
    goodput_requests_per_second: float
    attainment: float | None
    meets_targets: bool | None
    load_factor: float | None
    """Times the workload's own rate: the highest at which it keeps its targets. None: it was not looked for."""
    usd_per_million_tokens: Price
    kwh_per_million_tokens: Price
    mean_watts: float | None
    good_requests_per_usd: float | None
    bottleneck: str
    drawback: str
    assumptions: tuple[str, ...]
    classes: dict[str, int]
    """Numbers of the catalog it rests on, by class."""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    workload: str
    simulated: bool
    rows: tuple[Row, ...]
    verdicts: tuple[str, ...]
    """Who wins what, in sentences; the first says whether splitting pays."""


def compare(
    pairs: Iterable[tuple[Deployment, Result]], *, workload: str = "", factors: Sequence[float] | None = None
) -> Comparison:
    """The table. `factors`: the results are of each deployment's highest load, so many times the workload's own.

    Raises `DeploymentError` for a chip that is not in the catalog.
    """
    found = list(pairs)
    loads = factors if factors is not None else [None] * len(found)
    rows = tuple(
        row_of(deployment, result, load_factor=load) for (deployment, result), load in zip(found, loads, strict=True)
    )
    return Comparison(
        workload=workload or found[0][1].workload,
        simulated=any(result.simulated for _, result in found),
        rows=rows,
        verdicts=verdicts_on(rows),
    )


def row_of(deployment: Deployment, result: Result, *, load_factor: float | None = None) -> Row:
    """One deployment's columns."""
    summary = result.summary
    fleet = fleet_of(deployment)
    split = split_of(deployment)
    num_requests = max(1, summary.num_successful)
    kv = [link for link in result.links if link.crosses == "kv"]
    usd_per_hour = _usd_per_hour(result)
    good = summary.goodput_requests_per_second
    return Row(
        name=result.name,
        split=split,
        num_chips=sum(pool.num_chips for pool in result.pools),
        prefill_on=_on(deployment, ("prefill", "aggregated")),
        decode_on=_on(deployment, ("decode", "aggregated")),
        crosses={"aggregated": "nothing", "prefill/decode": "KV cache"}.get(split, "KV cache, activations"),
        how_often=_how_often(deployment, fleet),
        bytes_per_request=sum(link.num_bytes for link in kv) / num_requests,
        bytes_per_token=_activation_bytes(fleet, deployment),
        exposed_seconds=sum(link.exposed_seconds for link in kv) / num_requests,
        exposed_seconds_per_step=_exposed_a_step(result),
        ttft=_latency(summary.ttft_seconds, result.ttft_interval),
        tpot=_latency(summary.tpot_seconds, result.tpot_interval),
        requests_per_second=summary.requests_per_second,
        goodput_requests_per_second=good,
        attainment=summary.attainment,
        meets_targets=summary.meets_targets,
        load_factor=load_factor,
        usd_per_million_tokens=_usd(fleet, result),
        kwh_per_million_tokens=_kwh(fleet, result),
        mean_watts=None if result.cost is None else result.cost.mean_watts,
        good_requests_per_usd=None if not usd_per_hour else good * 3600 / usd_per_hour,
        bottleneck=result.bottleneck,
        drawback="; ".join(drawbacks_of(deployment, result, fleet)),
        assumptions=result.assumptions,
        classes=result.classes,
    )


def split_of(deployment: Deployment) -> str:
    """Which way the work is split."""
    if any(pool.role == "ffn" for pool in deployment.pools):
        return "attention/FFN"
    return "prefill/decode" if any(pool.role == "prefill" for pool in deployment.pools) else "aggregated"


def _on(deployment: Deployment, roles: tuple[str, ...]) -> str:
    """`2 x 4 trainium3`: workers, chips of each, chip; with the chip that computes its feed-forwards."""
    ffn = {pool.name: pool for pool in deployment.pools if pool.role == "ffn"}
    words = []
    for pool in deployment.pools:
        if pool.role in roles:
            there = f", FFN on {_pool_words(ffn[pool.ffn.pool])}" if pool.ffn is not None else ""
            words.append(_pool_words(pool) + there)
    return " + ".join(words)


def _pool_words(pool: Pool) -> str:
    chips = pool.parallel.num_chips
    return f"{pool.workers} x {chips} {pool.chip or pool.device}" if chips > 1 else (
        f"{pool.workers} {pool.chip or pool.device}"
    )  # fmt: skip


def _how_often(deployment: Deployment, fleet: Fleet) -> str:
    match split_of(deployment):
        case "aggregated":
            return "never"
        case "prefill/decode":
            return "once a request"
        case _:
            return f"once a request; {fleet.card.num_layers} layers a token, both ways"


def _activation_bytes(fleet: Fleet, deployment: Deployment) -> float:
    """Out in 8 bits and back in 16, every layer (the counting of hardware/afd)."""
    split = any(pool.ffn is not None for pool in deployment.pools)
    return 3.0 * fleet.card.hidden_size * fleet.card.num_layers if split else 0.0


def _exposed_a_step(result: Result) -> float:
    hops = [link for link in result.links if link.crosses == "activations"]
    sources = {link.source for link in hops}
    num_steps = sum(pool.num_steps for pool in result.pools if pool.name in sources)
    return sum(link.exposed_seconds for link in hops) / num_steps if num_steps else 0.0


def _latency(of: Distribution | None, interval: Interval | None) -> Latency | None:
    if of is None:
        return None
    return Latency(
        p50_seconds=of.p50,
        p95_seconds=of.p95,
        low=None if interval is None else interval.low,
        high=None if interval is None else interval.high,
    )


def _usd_per_hour(result: Result) -> float | None:
    if result.cost is None or result.cost.usd is None or result.summary.duration_seconds <= 0:
        return None
    return result.cost.usd / result.summary.duration_seconds * 3600


def _usd(fleet: Fleet, result: Result) -> Price:
    value = None if result.cost is None else result.cost.usd_per_million_output_tokens
    return Price(value=value, basis=fleet.weakest("price.per_hour") if value is not None else _unknown(result))


def _kwh(fleet: Fleet, result: Result) -> Price:
    joules = None if result.cost is None else result.cost.joules_per_output_token
    if joules is None:
        return Price(value=None, basis=_unknown(result))
    return Price(value=joules * 1e6 / JOULES_PER_KWH, basis=fleet.weakest("power.all_in", "power.tdp"))


def _unknown(result: Result) -> str:
    reasons = () if result.cost is None else result.cost.unknown
    return reasons[0] if reasons else "unknown"


# ---------------------------------------------------------------------------------------------------------------------
# Who wins


def verdicts_on(rows: Sequence[Row]) -> tuple[str, ...]:
    """Sentences. Empty for fewer than two rows: nothing is compared."""
    if len(rows) < 2:
        return ()
    sentences = [*_pays(rows), *_fastest(rows), *_attained(rows)]
    guessed = [row.name for row in rows if row.assumptions]
    if guessed:
        sentences.append(f"rests on assumptions, not on published numbers alone: {', '.join(guessed)}")
    return tuple(sentences)


def _pays(rows: Sequence[Row]) -> list[str]:
    """Whether splitting pays, by good requests for a dollar, and if no price is known by the chip."""
    priced = [row for row in rows if row.good_requests_per_usd is not None]
    together = [row for row in priced if row.split == "aggregated"]
    apart = [row for row in priced if row.split != "aggregated"]
    if not together or not apart:
        if not priced:
            return []
        best = max(priced, key=_value)
        return [f"most good requests for a dollar: {best.name}, {_value(best):,.0f}"]
    best, other = max(together, key=_value), max(apart, key=_value)
    ratio = _value(other) / _value(best) if _value(best) else math.inf
    numbers = (
        f"{best.name} serves {_value(best):,.0f} good requests for a dollar, the best split, {other.name}, "
        f"{_value(other):,.0f} ({_gain(best, other)})"
    )
    if abs(ratio - 1) < SAME:
        return [f"splitting makes no difference for a dollar here: {numbers}"]
    if ratio < 1:
        return [f"splitting does not pay here: {numbers}"]
    close = ", but that is within what the model can tell" if ratio < _reach(best, other) else ""
    return [f"splitting pays here: {numbers}{close}"]


def _gain(best: Row, other: Row) -> str:
    return f"{_value(other) / _value(best) - 1:+.0%}" if _value(best) else "it serves none in time"


def _value(row: Row) -> float:
    return row.good_requests_per_usd or 0.0


def _reach(*rows: Row) -> float:
    """By what factor two rows must differ for the model to tell them apart."""
    return max((row.tpot.high for row in rows if row.tpot is not None and row.tpot.high is not None), default=1.0)


def _fastest(rows: Sequence[Row]) -> list[str]:
    timed = sorted(
        (row for row in rows if row.tpot is not None), key=lambda row: row.tpot.p50_seconds if row.tpot else 0
    )
    if len(timed) < 2:
        return []
    first, second = timed[0], timed[1]
    assert first.tpot is not None
    assert second.tpot is not None
    ratio = second.tpot.p50_seconds / first.tpot.p50_seconds
    apart = _high(first) < _low(second)
    words = "" if apart else " (the two intervals overlap)"
    return [
        f"fastest stream: {first.name}, {1 / first.tpot.p50_seconds:,.0f} tokens/s a user, {ratio:.1f} times the next, "
        f"{second.name}{words}"
    ]


def _high(row: Row) -> float:
    assert row.tpot is not None
    return row.tpot.p50_seconds * (row.tpot.high or 1.0)


def _low(row: Row) -> float:
    assert row.tpot is not None
    return row.tpot.p50_seconds * (row.tpot.low or 1.0)


def _attained(rows: Sequence[Row]) -> list[str]:
    judged = [row for row in rows if row.meets_targets is not None]
    failed = [
        f"{row.name} ({row.attainment:.0%})" for row in judged if not row.meets_targets and row.attainment is not None
    ]
    if not judged:
        return []
    if not failed:
        if all(row.load_factor is not None for row in rows):
            return ["each at the highest load at which it keeps its targets"]
        return ["all keep their targets, so this load does not tell them apart: --saturate takes each to its limit"]
    return [f"targets missed by {', '.join(failed)}"]
