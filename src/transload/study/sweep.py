"""Many simulations of one deployment, each with something changed, over processes: goodput against rate, and more."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context

import msgspec
from rich.console import Console
from rich.table import Table

from transload.deploy.spec import Deployment
from transload.errors import DeploymentError
from transload.study.metrics import Distribution
from transload.study.result import Result
from transload.study.simulate import simulate
from transload.study.simulated import plan_cluster
from transload.study.workload import Workload

MOST_POINTS = 10_000


class Variation(msgspec.Struct, frozen=True):
    """What is changed, and the values it takes."""

    path: str
    values: tuple[str, ...]


class Point(msgspec.Struct, frozen=True):
    """One simulation of a sweep."""

    values: dict[str, str]
    result: Result


class Sweep(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON file of a sweep."""

    schema: str = "transload-sweep-1"
    points: tuple[Point, ...]


def parse_rates(text: str) -> Variation:
    """`1:20:1`. Raises `DeploymentError`."""
    try:
        low, high, step = (float(part) for part in text.split(":"))
    except ValueError:
        raise DeploymentError(f"--rates {text}: wanted LOW:HIGH:STEP, such as 1:20:1") from None
    if not (0 < low <= high < math.inf and step > 0 and (high - low) / step < MOST_POINTS):
        raise DeploymentError(f"--rates {text}: wanted 0 < LOW <= HIGH and a STEP above 0, such as 1:20:1")
    count = math.floor((high - low) / step + 1e-9) + 1
    return Variation("rate", tuple(f"{low + index * step:.12g}" for index in range(count)))


def parse_variation(text: str) -> Variation:
    """`pools.decode.workers=1,2,4`. Raises `DeploymentError`."""
    path, equals, values = text.partition("=")
    parts = tuple(value.strip() for value in values.split(",") if value.strip())
    if not (equals and path.strip() and parts):
        raise DeploymentError(f"--sweep {text}: wanted PATH=A,B,..., such as pools.decode.workers=1,2,4 or rate=5,10")
    return Variation(path.strip(), parts)


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """A simulation to be made, in a form that another process understands."""

    values: dict[str, str]
    name: str
    deployment: Deployment
    workload: Callable[[], Workload]
    assume: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    with_records: bool = False


def combinations(variations: Sequence[Variation]) -> list[dict[str, str]]:
    """Every combination of the values. Raises `DeploymentError` if there are too many."""
    count = math.prod(len(variation.values) for variation in variations)
    if count > MOST_POINTS:
        raise DeploymentError(f"a sweep of {count} simulations; at most {MOST_POINTS} are possible")
    paths = [variation.path for variation in variations]
    return [
        dict(zip(paths, values, strict=True)) for values in product(*(variation.values for variation in variations))
    ]


def run_sweep(planned: Sequence[Planned], num_processes: int) -> list[Point]:
    """Simulate them all, in order or several at once."""
    for each in planned:
        plan_cluster(each.deployment, each.assume)  # what is wrong with the last is told before the first is begun
    if num_processes == 1 or len(planned) == 1:
        return [_simulate(each) for each in planned]
    with ProcessPoolExecutor(min(num_processes, len(planned)), mp_context=get_context("spawn")) as pool:
        return list(pool.map(_simulate, planned))


def _simulate(planned: Planned) -> Point:
    values = ", ".join(f"{path} {value}" for path, value in planned.values.items())
    result = simulate(
        planned.deployment,
        planned.workload(),
        name=f"{planned.name}, {values}",
        assume=planned.assume,
        faults=planned.faults,
        with_records=planned.with_records,
    )
    return Point(planned.values, result)


def encode_sweep(points: Sequence[Point]) -> bytes:
    """As an indented JSON file."""
    return msgspec.json.format(msgspec.json.encode(Sweep(points=tuple(points))), indent=1) + b"\n"


def show_sweep(points: Sequence[Point], console: Console) -> None:
    """A line for each simulation."""
    table = Table(box=None, pad_edge=False, header_style="dim", title="simulated", title_justify="left")
    for path in points[0].values:
        table.add_column(path, justify="right")
    for name in ("offered/s", "served/s", "good/s", "attained", "TTFT p50", "p95 ms", "TPOT p50", "p95 ms"):
        table.add_column(name, justify="right")
    for name in ("tokens/s", "$/M tokens", "J/token", "failed"):
        table.add_column(name, justify="right")
    for point in points:
        table.add_row(*point.values.values(), *_cells(point.result))
    console.print(table)
    good = [point for point in points if point.result.summary.meets_targets]
    if good:
        best = max(good, key=lambda point: point.result.summary.goodput_requests_per_second)
        values = ", ".join(f"{path} {value}" for path, value in best.values.items())
        rate = best.result.summary.goodput_requests_per_second
        console.print(f"most good requests with the targets met: {values} ({rate:.2f}/s)", highlight=False)
    elif points[0].result.summary.meets_targets is not None:
        console.print("none of them meets the targets", highlight=False)


def _cells(result: Result) -> list[str]:
    summary, cost = result.summary, result.cost
    usd = cost.usd_per_million_output_tokens if cost is not None else None
    joules = cost.joules_per_output_token if cost is not None else None
    return [
        _number(summary.offered_requests_per_second),
        f"{summary.requests_per_second:.2f}",
        f"{summary.goodput_requests_per_second:.2f}",
        "-" if summary.attainment is None else f"{summary.attainment:.1%}",
        *_latency(summary.ttft_seconds),
        *_latency(summary.tpot_seconds),
        f"{summary.output_tokens_per_second:,.0f}",
        _number(usd),
        _number(joules),
        str(summary.num_failed),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _latency(values: Distribution | None) -> tuple[str, str]:
    return ("-", "-") if values is None else (f"{values.p50 * 1000:.1f}", f"{values.p95 * 1000:.1f}")
