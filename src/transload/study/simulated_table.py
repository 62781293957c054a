"""Shows a simulated result in the terminal, and how far a simulation is. Owns the wording; computes only units."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from transload.study.result import FfnLoss, Interval, Result
from transload.study.summary_table import show_summary
from transload.units import format_bytes, format_rate, format_seconds

if TYPE_CHECKING:
    from transload.study.simulate import Progress as Simulated
    from transload.study.workload import Workload


def show_simulated(result: Result, console: Console) -> None:
    """Print all of it."""
    title = f"{result.workload} -> {result.name}, simulated"
    show_summary(result.summary, (), console, title=title)
    console.print()
    console.print(_pools(result))
    if result.links:
        console.print(_links(result))
    if result.splits:
        console.print(_splits(result))
    for name, text in _facts(result):
        console.print(f"[bold]{name:<12}[/]{escape(text)}", soft_wrap=True)
    for text in result.assumptions:
        console.print(f"[yellow]assumed     [/]{escape(text)}", soft_wrap=True)
    for text in result.notes:
        console.print(f"[yellow]note        [/]{escape(text)}", soft_wrap=True)
    for fault in result.faults:
        console.print(f"[red]fault       [/]{escape(fault.text)}", soft_wrap=True)
    for loss in result.ffn_losses:
        console.print(f"[red]felt        [/]{escape(_felt(loss))}", soft_wrap=True)


def _pools(result: Result) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("pool")
    table.add_column("chips")
    for name in ("busy", "mean batch", "steps", "KV in use", "at most", "KV tokens", "preempted"):
        table.add_column(name, justify="right")
    for pool in result.pools:
        each = pool.num_chips // max(1, pool.num_workers)
        table.add_row(
            escape(pool.name),
            f"{pool.num_workers} x {each} {escape(pool.chip)}",
            f"{pool.busy_share:.1%}",
            f"{pool.mean_batch:.1f}",
            f"{pool.num_steps:,}",
            f"{pool.kv_share:.1%}",
            f"{pool.peak_kv_share:.1%}",
            f"{pool.kv_tokens:,}",
            f"{pool.num_preemptions:,}",
        )
    return table


def _links(result: Result) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("link")
    table.add_column("kind")
    for name in ("transfers", "bytes each", "of a port", "on the wire", "waited for"):
        table.add_column(name, justify="right")
    for link in result.links:
        count = max(1, link.num_transfers)
        table.add_row(
            f"{escape(link.source)} to {escape(link.target)}",
            escape(link.kind),
            f"{link.num_transfers:,}",
            format_bytes(link.num_bytes / count),
            "-" if link.bytes_per_second_limit is None else format_rate(link.bytes_per_second_limit),
            format_seconds(link.wire_seconds / count),
            format_seconds(link.exposed_seconds / count),
        )
    return table


def _splits(result: Result) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("attention and FFN")
    for name in ("A:F", "micro-batches", "mean step", "A busy", "F busy", "crosses a step", "a token", "hops exposed",
                 "waits for"):  # fmt: skip
        table.add_column(name, justify="right")
    for split in result.splits:
        table.add_row(
            f"{escape(split.attention)} with {escape(split.ffn)}",
            f"{split.attention_workers}:{split.ffn_workers}",
            str(split.micro_batches),
            format_seconds(split.step_seconds),
            f"{split.attention_busy:.1%}",
            f"{split.ffn_busy:.1%}",
            format_bytes(split.crossing_bytes),
            format_bytes(split.bytes_per_token),
            f"{format_seconds(split.exposed_hop_seconds)} ({split.exposed_share:.0%})",
            split.waits_for,
        )
    return table


def _felt(loss: FfnLoss) -> str:
    parts = [f"{loss.num_steps} steps, the longest by {format_seconds(loss.longest_delay_seconds)}"]
    if loss.num_retries:
        parts.append(f"{loss.num_retries} calls asked of others")
    if loss.num_computed_here:
        parts.append(f"{loss.num_computed_here} calls computed by attention workers")
    if loss.num_failed_steps:
        parts.append(f"{loss.num_failed_steps} steps failed")
    return f"{loss.worker}, back at {loss.back_seconds:.2f} s: {', '.join(parts)}"


def _facts(result: Result) -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = [("bottleneck", result.bottleneck)]
    if result.num_recovered:
        facts.append(("recovered", f"{result.num_recovered} requests were started anew and went on"))
    cost = result.cost
    if cost is not None:
        parts = [f"{cost.num_chips} chips"]
        if cost.usd_per_million_output_tokens is not None:
            parts.append(f"${cost.usd_per_million_output_tokens:.3g} per million output tokens")
        if cost.joules_per_output_token is not None and cost.mean_watts is not None:
            parts.append(f"{cost.joules_per_output_token:.3g} J per output token ({cost.mean_watts / 1000:,.1f} kW)")
        facts.append(("cost", ", ".join(parts)))
        facts += [("not known", text) for text in cost.unknown]
    for name, interval in (("TTFT", result.ttft_interval), ("TPOT", result.tpot_interval)):
        if interval is not None:
            facts.append((f"{name} error", _interval(interval)))
    if result.classes:
        counts = ", ".join(f"{count} {kind}" for kind, count in result.classes.items())
        facts.append(("rests on", f"numbers of the catalog by class: {counts}"))
    if result.cpu_seconds:
        rate = result.summary.num_requests / result.cpu_seconds
        tokens = result.summary.num_output_tokens / result.cpu_seconds
        facts.append(
            ("simulated", f"in {result.cpu_seconds:.1f} CPU seconds: {rate:,.0f} requests/s, {tokens:,.0f} tokens/s")
        )
    return facts


def _interval(interval: Interval) -> str:
    return f"{interval.low - 1:+.0%} to {interval.high - 1:+.0%} ({interval.basis})"


@contextlib.contextmanager
def progress_bar(workload: Workload) -> Iterator[Callable[[Simulated], bool]]:
    """A bar on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    bar = Progress(
        SpinnerColumn(),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[counts]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task("", total=workload.num_requests or workload.duration_seconds, counts="")

    def show(progress: Simulated) -> bool:
        of = "" if progress.num_requests is None else f"/{progress.num_requests}"
        counts = f"{progress.num_ended}{of} requests, {progress.simulated_seconds:,.1f} s simulated"
        completed = progress.num_ended if workload.num_requests else progress.simulated_seconds
        bar.update(task, completed=completed, counts=counts)
        return True

    with bar:
        yield show
