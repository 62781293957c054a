"""Draws where a request's time went: one bar a stage, to scale, as text."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from transload.runtime.base import Waterfall
from transload.units import format_bytes, format_seconds

BAR_CELLS = 40
_EIGHTHS = " ▏▎▍▌▋▊▉"
_COLORS = ("cyan", "magenta", "yellow", "green", "blue", "red")


class _Answer(msgspec.Struct):
    """What `/requests/{id}` answers: one waterfall for each choice of the API call."""

    requests: list[Waterfall] = []
    choices: list[Waterfall] = []


def decode_waterfalls(body: bytes) -> list[Waterfall]:
    """Raises `msgspec.DecodeError` if this is not such an answer."""
    answer = msgspec.json.decode(body, type=_Answer)
    return answer.requests or answer.choices


def draw_waterfall(waterfall: Waterfall, console: Console) -> None:
    """Print it: the decision, then the stages in the order they came, then the total."""
    total = waterfall.total_seconds
    console.print(
        Text(
            f"{waterfall.num_prompt_tokens} prompt tokens ({waterfall.num_cached_tokens} cached), "
            f"{waterfall.num_outputs} output tokens, {format_seconds(total)}, {waterfall.state}",
            style="bold",
        )
    )
    if waterfall.decision:
        console.print(Text(waterfall.decision, style="dim"))
    stages = waterfall.stages
    workers = sorted({stage.worker for stage in stages if stage.worker is not None})
    num_cells = BAR_CELLS if console.width >= 120 else BAR_CELLS // 2
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, min_width=max((len(stage.name) for stage in stages), default=0))
    table.add_column(no_wrap=True, min_width=max(map(len, workers), default=0))
    table.add_column(no_wrap=True, min_width=num_cells)
    table.add_column(no_wrap=True, min_width=len("9.99 ms"), justify="right")
    table.add_column(no_wrap=True, min_width=len("100%"), justify="right")
    table.add_column(overflow="fold")  # only the details give way on a narrow screen
    for stage in stages:
        color = "white" if stage.worker is None else _COLORS[workers.index(stage.worker) % len(_COLORS)]
        share = stage.seconds / total if total > 0 else 0.0
        table.add_row(
            stage.name,
            Text(stage.worker or "", style=color),
            Text(bar(stage.start_seconds, stage.seconds, total, num_cells), style=color),
            format_seconds(stage.seconds),
            f"{share:.0%}",
            Text(", ".join(_detail(stage.detail)), style="dim"),
        )
    console.print(table)


def bar(start_seconds: float, seconds: float, total_seconds: float, num_cells: int = BAR_CELLS) -> str:
    """`num_cells` characters: blank before the stage, filled during it. A stage that took any time shows."""
    if total_seconds <= 0 or seconds <= 0:
        return " " * num_cells
    scale = num_cells * 8 / total_seconds
    first = min(num_cells * 8 - 1, max(0, round(start_seconds * scale)))
    last = min(num_cells * 8, max(first + 1, round((start_seconds + seconds) * scale)))
    # Terminals have cells filled from the left by eighths, not from the right: a stage begins at a whole cell.
    begin = first // 8
    full, rest = divmod(last - begin * 8, 8)
    filled = "█" * full + (_EIGHTHS[rest] if rest else "")
    return (" " * begin + filled).ljust(num_cells)


def _detail(detail: dict[str, float | int | str]) -> Sequence[str]:
    """Sizes and durations in readable units, by what their names say."""
    shown: list[str] = []
    for name, value in detail.items():
        if isinstance(value, str):
            shown.append(f"{name} {value}")
        elif name == "bytes" or name.endswith("_bytes"):
            shown.append(f"{name.removesuffix('bytes').rstrip('_')} {format_bytes(value)}".strip())
        elif name.endswith("_seconds"):
            shown.append(f"{name.removesuffix('_seconds').replace('_', ' ')} {format_seconds(value)}")
        else:
            number = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
            shown.append(f"{number} {name.removeprefix('num_').replace('_', ' ')}")
    return shown
