"""Shows a run's summary in the terminal. Owns the wording; computes nothing but units."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from transload.study.metrics import Distribution, RequestRecord, Summary

LATE_SECONDS = 0.010
"""A load generator that starts its requests later than this does not offer the load it was asked to."""
MAX_ERROR_LINES = 8


def show_summary(summary: Summary, records: Iterable[RequestRecord], console: Console, *, title: str) -> None:
    """Print the table, the rates, what failed and what to be wary of. `records` give the words of the errors."""
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(_latencies(summary))
    for name, value in _rates(summary):
        console.print(Text.assemble((f"{name:<12}", "bold"), value), soft_wrap=True)
    for line in _errors(records):
        console.print(Text(line, style="red"), soft_wrap=True)
    for line in _warnings(summary):
        console.print(Text(line, style="yellow"), soft_wrap=True)


def _latencies(summary: Summary) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("milliseconds")
    for name in ("mean", "p50", "p90", "p95", "p99", "max", "target"):
        table.add_column(name, justify="right")
    targets = summary.targets
    rows: list[tuple[str, Distribution | None, float | None]] = [
        ("time to first token", summary.ttft_seconds, targets.ttft_seconds),
        ("time per output token", summary.tpot_seconds, targets.tpot_seconds),
        ("inter-token latency", summary.itl_seconds, None),
        ("end to end", summary.end_to_end_seconds, None),
    ]
    for name, values, target in rows:
        if values is None:
            cells = ["-"] * 6
        else:
            cells = [_ms(v) for v in (values.mean, values.p50, values.p90, values.p95, values.p99, values.max)]
        table.add_row(name, *cells, "" if target is None else _ms(target))
    return table


def _rates(summary: Summary) -> list[tuple[str, str]]:
    requests = f"{summary.num_successful} successful, {summary.num_failed} failed"
    if summary.num_interrupted:
        requests += f", {summary.num_interrupted} cut off by you"
    offered = summary.offered_requests_per_second
    served = f"{summary.requests_per_second:.2f} requests/s"
    if offered is not None:
        served += f" ({offered:.2f} offered)"
    served += f", {summary.output_tokens_per_second:.1f} output tokens/s"
    served += f", {summary.total_tokens_per_second:.1f} tokens/s in all"
    lines = [
        ("requests", f"{requests} in {summary.duration_seconds:.1f} s, at most {summary.peak_in_flight} at once"),
        ("throughput", served),
    ]
    if summary.num_cached_tokens is not None:
        share = summary.num_cached_tokens / max(1, summary.num_input_tokens)
        lines.append(
            ("cache", f"{summary.num_cached_tokens} of {summary.num_input_tokens} prompt tokens ({share:.1%})")
        )
    if summary.meets_targets is not None:
        assert summary.attainment is not None
        verdict = "meets" if summary.meets_targets else "misses"
        lines.append(
            (
                "goodput",
                f"{summary.goodput_requests_per_second:.2f} requests/s within targets; attainment "
                f"{summary.attainment:.1%} {verdict} the wanted {summary.targets.attainment:.1%}",
            )
        )
    return lines


def _errors(records: Iterable[RequestRecord]) -> list[str]:
    """Failures of the same kind and words on one line, most frequent first."""
    seen: dict[tuple[str, str], int] = {}
    for record in records:
        if record.error is not None:
            key = (record.error, record.error_detail)
            seen[key] = seen.get(key, 0) + 1
    ranked = sorted(seen.items(), key=lambda entry: -entry[1])
    lines = [f"{count} x {kind}: {detail}" for (kind, detail), count in ranked[:MAX_ERROR_LINES]]
    if len(ranked) > MAX_ERROR_LINES:
        lines.append(f"... and {sum(count for _, count in ranked[MAX_ERROR_LINES:])} failures in other words")
    return lines


def _warnings(summary: Summary) -> list[str]:
    lines: list[str] = []
    delay = summary.start_delay_seconds
    if delay is not None and delay.p99 > LATE_SECONDS:
        lines.append(
            f"The load generator was late: p99 of its own delay {_ms(delay.p99)} ms (counted in the latencies above). "
            "Run it on another machine or ask for less."
        )
    if summary.num_usage_mismatches:
        lines.append(
            f"{summary.num_usage_mismatches} answers had fewer or more events with text than tokens by the server's "
            "count (events may carry several tokens or withhold half a letter); throughput and time per token use that "
            "count."
        )
    if summary.num_short_outputs:
        lines.append(
            f"{summary.num_short_outputs} answers were shorter than asked for: ended by the model (ignore_eos is off "
            "or unknown to the server) or by a lower limit of the server."
        )
    return lines


def _ms(seconds: float) -> str:
    milliseconds = seconds * 1000
    return (
        f"{milliseconds:.2f}"
        if milliseconds < 10
        else f"{milliseconds:.1f}"
        if milliseconds < 1000
        else f"{milliseconds:.0f}"
    )
