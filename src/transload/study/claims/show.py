"""Findings as tables for a terminal and for a page. Decides nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from transload.study.claims.verdict import TOLERANCE, Finding, Judged, number

STYLES = {"reproduced": "green", "in part": "yellow", "does not follow": "red", "not checkable": "dim"}
LEGEND = (
    f"reproduced: within {TOLERANCE:.0%} of the claimed value · does not follow: further off, with the assumption it "
    "hangs on · not checkable: with what is missing. All values of the model are simulated."
)


def findings_table(findings: Iterable[Finding]) -> Table:
    """One line a claim."""
    table = Table(box=None, pad_edge=False, show_edge=False)
    for name in ("claim", "what", "claimed", "simulated", "error", "figures", "verdict"):
        table.add_column(name, overflow="fold", justify="right" if name in ("simulated", "error") else "left")
    for finding in findings:
        shown = leading_figure(finding)
        table.add_row(
            finding.record.id,
            f"{finding.record.title}: {shown.metric}",
            f"{shown.claimed} {shown.unit}".strip(),
            simulated_words(shown),
            error_words(shown),
            counts_words(finding),
            Text(verdict_words(finding), STYLES[finding.verdict]),
        )
    return table


def show_finding(finding: Finding, console: Console) -> None:
    """One claim: setting, every figure, what it rests on."""
    record = finding.record
    console.print(Text(record.title, "bold"), Text(f"({record.id})", "dim"))
    console.print(f"{record.kind}; {record.source}", style="dim", highlight=False, soft_wrap=True)
    for name, value in record.setup.items():
        console.print(f"  {name:<14} {setup_words(value)}", highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, show_edge=False)
    for name in ("figure", "claimed", "simulated", "error", "verdict", "why"):
        numeric = name in ("claimed", "simulated", "error")
        table.add_column(name, overflow="fold", justify="right" if numeric else "left")
    for figure in finding.figures:
        table.add_row(
            figure.metric,
            f"{figure.claimed} {figure.unit}".strip(),
            simulated_words(figure, with_interval=True),
            error_words(figure),
            Text(figure.verdict, STYLES[figure.verdict]),
            why_words(figure),
        )
    console.print()
    console.print(table)
    console.print()
    for name, words in (("note", record.note), ("simulated", finding.basis)):
        if words:
            console.print(f"{name}: {words}", highlight=False, soft_wrap=True)
    for assumption in finding.assumptions:
        console.print(f"rests on: {assumption}", highlight=False, soft_wrap=True)
    console.print(Text(f"verdict: {verdict_words(finding)}", STYLES[finding.verdict]))


def setup_words(value: str | float) -> str:
    """A value of a setting; whole numbers without a point."""
    return value if isinstance(value, str) else f"{value:g}"


def leading_figure(finding: Finding) -> Judged:
    """The figure that stands for the claim in a list: the first that was checked, else the first."""
    checked = [figure for figure in finding.figures if figure.verdict != "not checkable"]
    return (checked or list(finding.figures))[0]


def simulated_words(figure: Judged, *, with_interval: bool = False) -> str:
    """`3.21 (2.6 to 3.9)`, `2.1 to 35`, or `-`."""
    simulated = figure.simulated
    if simulated is None:
        return "-"
    words = number(simulated.value)
    if simulated.low is not None:
        words = f"{number(simulated.low)} to {words}"
    if with_interval and simulated.interval is not None:
        low, high = simulated.interval
        bottom = simulated.value if simulated.low is None else simulated.low
        words += f" ({number(bottom * low)} to {number(simulated.value * high)})"
    return words


def error_words(figure: Judged) -> str:
    """`+12 %`, `holds` for a bound or range that does, `-` where nothing was compared."""
    if figure.error is None:
        return "-"
    if figure.error == 0 and not figure.claimed[0].isdigit():
        return "holds"
    return f"{figure.error:+.0%}"


def why_words(figure: Judged) -> str:
    """Why it does not follow or cannot be checked, where it would hold, and whether it was fitted."""
    parts = [figure.reason, figure.holds_at]
    if figure.verdict == "does not follow" and figure.inside_interval:
        parts.append("the claim is inside the model's own interval")
    if figure.fitted and figure.verdict != "not checkable":
        parts.append("the model was fitted on it")
    return "; ".join(part for part in parts if part)


def counts_words(finding: Finding) -> str:
    """`3 of 5`: figures reproduced, of those that were checked; and how many were not."""
    good, bad, unchecked = finding.counts()
    words = f"{good} of {good + bad}" if good + bad else "none"
    return f"{words}, {unchecked} not" if unchecked and good + bad else words


def verdict_words(finding: Finding) -> str:
    """`reproduced within 12 %`, or the verdict with the first reason for it."""
    if finding.verdict == "reproduced":
        return f"reproduced within {max(0.01, finding.worst_error):.0%}" if finding.worst_error else "reproduced"
    reasons = list(_reasons(finding))
    return f"{finding.verdict}: {reasons[0]}" if reasons else finding.verdict


def _reasons(finding: Finding) -> Iterator[str]:
    """Why not, first those of checked figures; where a claim would hold comes with it."""
    for verdict in ("does not follow", "not checkable"):
        for figure in finding.figures:
            if figure.verdict == verdict and figure.reason:
                yield f"{figure.reason}; {figure.holds_at}" if figure.holds_at else figure.reason
