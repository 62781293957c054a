"""A validation in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from transload.study.validate.compare import Comparison, Figure
from transload.units import format_seconds


def show_comparison(comparison: Comparison, console: Console) -> None:
    """What users feel, then where the time goes."""
    head = f"{comparison.deployment}, {comparison.load}: {comparison.num_requests} requests"
    console.print(Text(f"{head}, {comparison.requests_per_second:.2f}/s", style="bold"), soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("", "measured", "simulated", "error", "within"):
        table.add_column(name, justify="left" if not name else "right")
    for figure in comparison.figures:
        _add(table, figure, figure.name)
    for index, figure in enumerate(comparison.stages):
        if index == 0:
            table.add_row(Text("a request's mean stage", style="dim"))
        _add(table, figure, f"  {figure.name}")
    console.print(table)


def _add(table: Table, figure: Figure, name: str) -> None:
    error = "-" if figure.error is None else f"{figure.error:+.1%}"
    style = {True: "green", False: "red", None: ""}[figure.holds]
    within = "" if figure.within is None else f"{figure.within:.0%}"
    table.add_row(
        name,
        _value(figure.measured, figure.unit),
        _value(figure.simulated, figure.unit),
        Text(error, style=style),
        within,
    )


def _value(value: float, unit: str) -> str:
    return format_seconds(value) if unit == "s" else f"{value:,.3g}"
