"""A validation in the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

from rich.console import Console
from rich.table import Table
from rich.text import Text

from transload.study.validate.compare import Comparison, Errors, Figure, errors_of
from transload.units import format_seconds

LEGEND = (
    "given steps: simulated with steps as long as this run's own were; its errors are those of the control plane in "
    "virtual time",
    "calibrated: simulated with what was known beforehand, and the drift that was watched; how well the machine's "
    "speed was known is in its errors too",
)


def show_comparison(comparison: Comparison, console: Console) -> None:
    """What users feel, then where the time goes."""
    head = f"{comparison.deployment}, {comparison.load}: {comparison.num_requests} requests"
    console.print(Text(f"{head}, {comparison.requests_per_second:.2f}/s", style="bold"), soft_wrap=True)
    table = _table("", "measured", "given steps", "error", "calibrated", "error", "within")
    for figure in comparison.figures:
        _add(table, figure, figure.name)
    for index, figure in enumerate(comparison.stages):
        if index == 0:
            table.add_row(Text("mean of stages", style="dim"))
        _add(table, figure, f"  {figure.name}")
    console.print(table)
    told = ", ".join(
        f"{speed.worker} {speed.kind} {speed.times:.2f} ({min(speed.by_window):.2f} to {max(speed.by_window):.2f})"
        for speed in comparison.speeds
    )
    drift = "" if comparison.drift is None else f"; drift {comparison.drift.prefill:.2f}"
    console.print(Text(f"steps took, in times of calibrated ones: {told}{drift}", style="dim"), soft_wrap=True)


def show_errors(comparisons: Iterable[Comparison], console: Console) -> None:
    """What of several repeats is typical, and how far they are apart."""
    for (deployment, load), errors in errors_of(comparisons).items():
        repeats = len(errors[0].given_steps)
        console.print(Text(f"{deployment}, {load}: errors of {repeats} repeats", style="bold"), soft_wrap=True)
        table = _table("", "given steps", "", "calibrated", "", "within")
        for each in errors:
            table.add_row(f"  {each.name}", *_spread(each), f"{each.within:.0%}")
        console.print(table)
        console.print()


def show_legend(console: Console) -> None:
    for line in LEGEND:
        console.print(Text(line, style="dim"), soft_wrap=True)


def _spread(errors: Errors) -> list[Text]:
    cells: list[Text] = []
    for values, holds in ((errors.given_steps, errors.holds), (errors.as_calibrated, errors.holds_as_calibrated)):
        cells.append(Text(f"{median(values):+.1%}", style="green" if holds else "red"))
        cells.append(Text(f"{min(values):+.0%} to {max(values):+.0%}", style="dim"))
    return cells


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for index, name in enumerate(names):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    return table


def _add(table: Table, figure: Figure, name: str) -> None:
    within = "" if figure.within is None else f"{figure.within:.0%}"
    table.add_row(
        name,
        _value(figure.measured, figure.unit),
        _value(figure.given_steps, figure.unit),
        _error(figure.error, figure.within),
        _value(figure.as_calibrated, figure.unit),
        _error(figure.error_as_calibrated, figure.within),
        within,
    )


def _error(error: float | None, within: float | None) -> Text:
    if error is None:
        return Text("-")
    style = "" if within is None else "green" if abs(error) <= within else "red"
    return Text(f"{error:+.1%}", style=style)


def _value(value: float, unit: str) -> str:
    return format_seconds(value) if unit == "s" else f"{value:,.3g}"
