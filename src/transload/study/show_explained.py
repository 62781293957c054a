"""Prints a `SimulatedExplanation` for people. Decides nothing and computes nothing beyond rounding."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from transload.study.explain_simulated import LinkLine, PoolLine, SimulatedExplanation
from transload.units import format_bytes, format_rate, format_seconds

UNKNOWN = "unknown"


def show_explained(explanation: SimulatedExplanation, console: Console) -> None:
    """Print all of it."""
    console.print(f"[bold]{escape(explanation.source)}[/]  (to simulate)")
    console.print(
        f"model    {escape(explanation.model)}: {explanation.num_parameters / 1e9:,.1f} B weights, "
        f"{format_bytes(explanation.weight_bytes)}; {format_bytes(explanation.kv_bytes_per_token)} of KV a token\n",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_pool_table(explanation.pools))
    console.print(
        "[dim]speed of light of the cost model: one request alone, a prompt and a context of 1,024 tokens[/]\n"
    )
    for link in explanation.links:
        console.print(_link_words(link), highlight=False, soft_wrap=True)
    for assumption in explanation.assumptions:
        console.print(f"assumed  {escape(assumption)}", highlight=False, soft_wrap=True)
    for line in explanation.rests_on:
        console.print(f"[dim]rests on  {escape(line)}[/]", highlight=False, soft_wrap=True)
    for problem in explanation.problems:
        console.print(f"[red]cannot run[/]  {escape(problem)}", highlight=False, soft_wrap=True)
    if explanation.fits:
        console.print("[green]can be simulated[/]: transload simulate")


def _pool_table(pools: tuple[PoolLine, ...]) -> Table:
    table = Table("pool", "role", "chips", title="what runs where", title_justify="left", title_style="bold")
    for column in ("weights a chip", "of", "KV a worker", "prompt", "token", "power", "price"):
        table.add_column(column, justify="right")
    for pool in pools:
        table.add_row(
            pool.name,
            pool.role,
            f"{pool.num_workers} x {pool.chips_each} {pool.chip}",
            format_bytes(pool.weight_bytes),
            f"{format_bytes(pool.capacity_bytes)} {pool.weights_tier.upper()}",
            "-" if pool.kv_tokens is None else f"{pool.kv_tokens:,} tokens",
            _timed(pool.prefill_seconds, pool.interval),
            _timed(pool.decode_seconds, pool.interval),
            UNKNOWN if pool.watts is None else f"{pool.watts / 1e3:,.1f} kW",
            UNKNOWN if pool.usd_per_hour is None else f"${pool.usd_per_hour:,.2f}/h",
        )
    return table


def _timed(seconds: float | None, interval: tuple[float, float]) -> str:
    if seconds is None:
        return "-"
    low, high = interval
    return f"{format_seconds(seconds)}\n({format_seconds(seconds * low)} to {format_seconds(seconds * high)})"


def _link_words(link: LinkLine) -> str:
    rate = UNKNOWN if link.bytes_per_second is None else format_rate(link.bytes_per_second)
    latency = UNKNOWN if link.latency_seconds is None else format_seconds(link.latency_seconds)
    return (
        f"link  {link.between[0]} - {link.between[1]}: {link.kind}, {rate} a port, latency {latency}; "
        f"{format_bytes(link.example_bytes)} {link.crosses}"
    )
