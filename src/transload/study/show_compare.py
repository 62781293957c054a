"""A comparison as a table for a terminal, one column a deployment, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from transload.study.compare import Comparison, Latency, Price, Row
from transload.units import format_bytes, format_seconds

NOTHING = "-"
LINES: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("split", lambda row: row.split),
    ("prefill on", lambda row: row.prefill_on),
    ("decode on", lambda row: row.decode_on),
    ("chips", lambda row: f"{row.num_chips}"),
    ("crosses", lambda row: row.crosses),
    ("how often", lambda row: row.how_often),
    ("KV a request", lambda row: _bytes(row.bytes_per_request)),
    ("activations a token", lambda row: _bytes(row.bytes_per_token)),
    ("exposed a request", lambda row: format_seconds(row.exposed_seconds) if row.bytes_per_request else NOTHING),
    ("exposed a step", lambda row: format_seconds(row.exposed_seconds_per_step) if row.bytes_per_token else NOTHING),
    ("TTFT p50", lambda row: _latency(row.ttft, lambda latency: latency.p50_seconds)),
    ("TTFT p95", lambda row: _latency(row.ttft, lambda latency: latency.p95_seconds)),
    ("TPOT p50", lambda row: _latency(row.tpot, lambda latency: latency.p50_seconds)),
    ("TPOT p95", lambda row: _latency(row.tpot, lambda latency: latency.p95_seconds)),
    ("goodput", lambda row: f"{row.goodput_requests_per_second:,.2f} requests/s{_attained(row)}"),
    ("highest load", lambda row: NOTHING if row.load_factor is None else f"{row.load_factor:.3g} x"),
    ("$/M output tokens", lambda row: _price(row.usd_per_million_tokens)),
    ("kWh/M output tokens", lambda row: _price(row.kwh_per_million_tokens)),
    ("mean power", lambda row: NOTHING if row.mean_watts is None else f"{row.mean_watts / 1e3:,.1f} kW"),
    ("good requests/$", lambda row: _count(row.good_requests_per_usd)),
    ("bottleneck", lambda row: row.bottleneck or NOTHING),
    ("drawback", lambda row: row.drawback),
    ("rests on", lambda row: _classes(row)),
)  # fmt: skip


def show_comparison(comparison: Comparison, console: Console) -> None:
    """The table, who wins, and every assumption."""
    kind = "simulated" if comparison.simulated else "measured"
    console.print(f"{comparison.workload} ({kind})", style="bold", highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("", style="dim", no_wrap=True)
    for row in comparison.rows:
        table.add_column(row.name, overflow="fold")
    for name, words in LINES:
        table.add_row(name, *(words(row) for row in comparison.rows))
    console.print(table)
    console.print()
    for sentence in comparison.verdicts:
        console.print(f"- {sentence}", highlight=False, soft_wrap=True)
    assumed = dict.fromkeys(assumption for row in comparison.rows for assumption in row.assumptions)
    for assumption in assumed:
        console.print(f"assumed: {assumption}", style="dim", highlight=False, soft_wrap=True)
    if comparison.simulated:
        console.print(
            "in brackets: where 80 % of measured values of this kind of chip lay; for prices and power, the class of "
            "the weakest number behind them",
            style="dim",
            highlight=False,
            soft_wrap=True,
        )


def to_csv(comparison: Comparison) -> str:
    """One line a deployment, numbers in base units, unknown ones empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_numbers(comparison.rows[0]), "bottleneck", "drawback", "assumptions"])
    for row in comparison.rows:
        writer.writerow([*_numbers(row).values(), row.bottleneck, row.drawback, "; ".join(row.assumptions)])
    return text.getvalue()


def _numbers(row: Row) -> dict[str, object]:
    ttft, tpot = row.ttft, row.tpot
    return {
        "name": row.name,
        "split": row.split,
        "chips": row.num_chips,
        "prefill_on": row.prefill_on,
        "decode_on": row.decode_on,
        "crosses": row.crosses,
        "how_often": row.how_often,
        "bytes_per_request": row.bytes_per_request,
        "bytes_per_token": row.bytes_per_token,
        "exposed_seconds": row.exposed_seconds,
        "exposed_seconds_per_step": row.exposed_seconds_per_step,
        "ttft_p50_seconds": ttft and ttft.p50_seconds,
        "ttft_p95_seconds": ttft and ttft.p95_seconds,
        "ttft_low": ttft and ttft.low,
        "ttft_high": ttft and ttft.high,
        "tpot_p50_seconds": tpot and tpot.p50_seconds,
        "tpot_p95_seconds": tpot and tpot.p95_seconds,
        "tpot_low": tpot and tpot.low,
        "tpot_high": tpot and tpot.high,
        "requests_per_second": row.requests_per_second,
        "goodput_requests_per_second": row.goodput_requests_per_second,
        "attainment": row.attainment,
        "load_factor": row.load_factor,
        "usd_per_million_tokens": row.usd_per_million_tokens.value,
        "usd_basis": row.usd_per_million_tokens.basis,
        "kwh_per_million_tokens": row.kwh_per_million_tokens.value,
        "kwh_basis": row.kwh_per_million_tokens.basis,
        "mean_watts": row.mean_watts,
        "good_requests_per_usd": row.good_requests_per_usd,
    }


def _count(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}"


def _bytes(num_bytes: float) -> str:
    return format_bytes(num_bytes) if num_bytes else NOTHING


def _latency(latency: Latency | None, which: Callable[[Latency], float]) -> str:
    if latency is None:
        return NOTHING
    value = which(latency)
    words = format_seconds(value)
    if latency.low is None or latency.high is None:
        return words
    return f"{words} ({format_seconds(value * latency.low)} to {format_seconds(value * latency.high)})"


def _price(price: Price) -> str:
    return f"{NOTHING} ({price.basis})" if price.value is None else f"{price.value:,.3g} ({price.basis})"


def _attained(row: Row) -> str:
    return "" if row.attainment is None or row.meets_targets is None else f", {row.attainment:.0%} in time"


def _classes(row: Row) -> str:
    return ", ".join(f"{count} {name}" for name, count in row.classes.items()) or NOTHING
