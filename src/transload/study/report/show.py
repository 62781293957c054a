"""Results side by side in the terminal. Owns the choice of rows; computes nothing but units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from transload.study.metrics import Distribution
from transload.study.result import Result
from transload.units import format_seconds

Value = Callable[[Result], str | None]


def wrote(path: str | Path) -> None:
    """Say on stderr what was written."""
    Console(stderr=True, highlight=False).print(Text(f"wrote {path}"), soft_wrap=True)


def show_results(results: Sequence[Result], labels: Sequence[str]) -> None:
    """A column each. Rows that no result has anything for are left out."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for label, result in zip(labels, results, strict=True):
        kind = Text("simulated", style="yellow") if result.simulated else Text("measured", style="green")
        table.add_column(Text.assemble(label, "\n", kind), justify="right")
    for name, value in _ROWS:
        cells = [value(result) for result in results]
        if any(cell is not None for cell in cells):
            table.add_row(name, *(cell or "-" for cell in cells))
    Console(highlight=False).print(table)


def _latency(field: str, percentile: str) -> Value:
    def value(result: Result) -> str | None:
        values: Distribution | None = getattr(result.summary, f"{field}_seconds")
        return None if values is None else format_seconds(getattr(values, percentile))

    return value


def _number(value: float | None, digits: str = ",.4g") -> str | None:
    return None if value is None else format(value, digits)


def _bytes_between(result: Result) -> str | None:
    total = sum(link.num_bytes for link in result.links)
    return f"{total / 1e9:,.2f} GB" if result.links else None


def _goodput(result: Result) -> str | None:
    summary = result.summary
    return None if summary.meets_targets is None else _number(summary.goodput_requests_per_second)


_ROWS: tuple[tuple[str, Value], ...] = (
    ("TTFT p50", _latency("ttft", "p50")),
    ("TTFT p90", _latency("ttft", "p90")),
    ("TTFT p99", _latency("ttft", "p99")),
    ("TPOT p50", _latency("tpot", "p50")),
    ("TPOT p90", _latency("tpot", "p90")),
    ("TPOT p99", _latency("tpot", "p99")),
    ("requests/s offered", lambda result: _number(result.summary.offered_requests_per_second)),
    ("requests/s", lambda result: _number(result.summary.requests_per_second)),
    ("output tokens/s", lambda result: _number(result.summary.output_tokens_per_second)),
    ("requests/s within targets", _goodput),
    ("failed", lambda result: str(result.summary.num_failed) if result.summary.num_failed else None),
    ("chips", lambda result: None if result.cost is None else str(result.cost.num_chips)),
    (
        "$ per M output tokens",
        lambda result: None if result.cost is None else _number(result.cost.usd_per_million_output_tokens, ",.3f"),
    ),
    (
        "J per output token",
        lambda result: None if result.cost is None else _number(result.cost.joules_per_output_token),
    ),
    ("between pools", _bytes_between),
    ("bottleneck", lambda result: result.bottleneck or None),
)
