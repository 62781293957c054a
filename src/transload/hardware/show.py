"""Chips, links and models in the terminal: a table of all, or one with every number, its class and its source."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from transload.hardware.catalog import describe_source, sources
from transload.hardware.chip import Chip, MemoryTier, ridge_points
from transload.hardware.link import LinkKind
from transload.hardware.quantity import Kind, Quantity, format_amount, kinds_of
from transload.hardware.slots import Described

MARKS: dict[Kind, str] = {"datasheet": "", "measured": "m", "vendor claim": "v", "estimate": "e", "assumption": "a"}
STYLES: dict[Kind, str] = {
    "datasheet": "",
    "measured": "green",
    "vendor claim": "yellow",
    "estimate": "magenta",
    "assumption": "bold red",
}
LEGEND = "after a number: m measured, v vendor claim, e estimate, a your assumption, nothing: datasheet; - unknown"


def chips_table(chips: Iterable[Chip]) -> Table:
    """One line a chip."""
    table = _table("chip", "bf16 TF", "fp8 TF", "fp4 TF", "memory", "TDP", "scale-up", "$/h")
    for chip in chips:
        peaks = chip.dense_flops
        table.add_row(
            escape(chip.id),
            *(_tera(peak) for peak in (peaks.bf16 or peaks.fp16, peaks.fp8, peaks.fp4)),
            Text("; ").join(_tier(tier) for tier in chip.memory),
            _cell(chip.power.tdp),
            _world(chip),
            _cell(chip.price.per_hour),
        )
    return table


def links_table(links: Iterable[LinkKind]) -> Table:
    """One line a link."""
    table = _table("link", "bandwidth", "latency", "measured", "counts")
    for link in links:
        counts = link.scope if link.kind == "link" else f"{link.kind}: {link.scope}"
        cells = [_cell(quantity) for quantity in (link.bandwidth, link.latency, link.measured_bandwidth)]
        table.add_row(escape(link.id), *cells, escape(counts))
    return table


def show_described(described: Chip | LinkKind, console: Console) -> None:
    """Everything known of one chip or link, what is not known and why, and where it is from."""
    console.print(Text(f"{described.id}: {described.name}", style="bold"), soft_wrap=True)
    for label, words in _headings(described):
        console.print(Text.assemble((f"{label:<10}", "bold"), words), soft_wrap=True)
    console.print(quantities_table(described.quantities()))
    if isinstance(described, Chip):
        _show_ridge_points(described, console)
    for entry in described.unknown:
        console.print(Text(f"unknown: {entry.quantity}: {entry.why}", style="yellow"), soft_wrap=True)
    for assumption in described.assumptions():
        console.print(Text(f"assumed by you: {assumption}", style="bold red"), soft_wrap=True)
    for note in described.notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)
    show_sources((quantity for _, quantity in described.quantities()), console)


def quantities_table(quantities: Iterable[tuple[str, Quantity]]) -> Table:
    """Path, value, class, confidence, source and note; what other sources say on lines of their own."""
    table = _table("quantity", "value", "class", "confidence", "source", "note")
    for path, quantity in quantities:
        style = STYLES[quantity.kind]
        table.add_row(
            escape(path),
            Text(str(quantity), style=style),
            Text(quantity.kind, style=style),
            quantity.confidence,
            escape(", ".join(quantity.sources)),
            escape(_note(quantity)),
        )
        for conflict in quantity.conflicts:
            table.add_row(
                Text("  but also", style="dim"),
                Text(format_amount(conflict.value, conflict.unit), style="dim"),
                "",
                "",
                escape(conflict.source),
                Text(conflict.note, style="dim"),
            )
    return table


def show_sources(quantities: Iterable[Quantity], console: Console) -> None:
    """How many numbers of each class there are, and what the source keys stand for."""
    used = list(quantities)
    if used:
        counts = ", ".join(f"{number} {kind}" for kind, number in kinds_of(used).items())
        console.print(Text(f"numbers: {counts}", style="bold"), soft_wrap=True)
    keys = [key for quantity in used for key in (*quantity.sources, *(c.source for c in quantity.conflicts))]
    for key in dict.fromkeys(keys):
        if key in sources():
            console.print(Text(f"  {key}: {describe_source(key)}", style="dim"), soft_wrap=True)


def _headings(described: Described) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    if isinstance(described, Chip):
        lines.append(("vendor", f"{described.vendor} ({described.kind})"))
        if described.system is not None:
            lines.append(("system", " ".join(filter(None, (described.system.name, described.system.note)))))
        lines += [("tier", f"{tier.tier}: {tier.technology}, {_holds(tier)}") for tier in described.memory]
    if isinstance(described, LinkKind):
        lines.append(("kind", f"{described.kind}; {described.scope}"))
        if described.setup:
            lines.append(("setup", described.setup))
    if described.aliases:
        lines.append(("also", ", ".join(described.aliases)))
    if described.status:
        lines.append(("status", described.status))
    return lines


def _holds(tier: MemoryTier) -> str:
    contents = f"holds {', '.join(tier.holds)}" if tier.holds else "holds nothing of a model"
    return f"per {tier.scope}; {contents}{'; ' + tier.note if tier.note else ''}"


def _show_ridge_points(chip: Chip, console: Console) -> None:
    points = ridge_points(chip)
    if points:
        tier = chip.tier_for("weights")
        words = ", ".join(f"{name} {value:,.3g}" for name, value in points.items())
        line = f"ridge point, FLOP per byte of {tier.tier} (dense peak / bandwidth): {words}"
        console.print(Text(line, style="bold"), soft_wrap=True)


def _note(quantity: Quantity) -> str:
    conditions = ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                           for name, value in getattr(quantity, "at", {}).items())  # fmt: skip
    return "; ".join(filter(None, (conditions, quantity.note)))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    right = {"bf16 TF", "fp8 TF", "fp4 TF", "TDP", "$/h", "value", "bandwidth", "latency", "measured"}
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table


def _marked(text: str, quantity: Quantity) -> Text:
    mark = MARKS[quantity.kind]
    return Text(f"{text} {mark}" if mark else text, style=STYLES[quantity.kind])


def _cell(quantity: Quantity | None) -> Text:
    return Text("-", style="dim") if quantity is None else _marked(str(quantity), quantity)


def _tera(quantity: Quantity | None) -> Text:
    if quantity is None:
        return Text("-", style="dim")
    return _marked(
        f"{quantity.value / 1e12:,.4g}" if quantity.value < 1e15 else f"{quantity.value / 1e12:,.0f}", quantity
    )


def _tier(tier: MemoryTier) -> Text:
    parts: Sequence[Text] = (Text(f"{tier.tier} "), _cell(tier.capacity), Text(" @ "), _cell(tier.bandwidth))
    return Text.assemble(*parts)


def _world(chip: Chip) -> Text:
    link = chip.scale_up
    if link.bandwidth is None and link.world_size is None:
        return Text("-", style="dim")
    world = Text("") if link.world_size is None else Text(f" x {link.world_size}")
    return Text.assemble(_cell(link.bandwidth), world)
