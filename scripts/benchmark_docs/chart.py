"""Lines over an axis as an SVG file: enough for the figures of the documents, and the same bytes each time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 360, 60, 40, 230, 50
COLOURS = ("#1b6ca8", "#c0392b", "#2e8b57", "#8e44ad", "#d68910", "#555555")

Points = Sequence[tuple[float, float]]


def chart(
    title: str,
    x_label: str,
    lines: Mapping[str, Points],
    x_ticks: dict[float, str],
    *,
    y_ticks: Sequence[float] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0, 16.0),
    from_zero: bool = False,
) -> str:
    """Lines over a logarithmic x; y is logarithmic with a line at 1, or linear `from_zero`."""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    low_x, high_x = min(xs), max(xs)
    low_y, high_y = (0.0, 1.1 * max(ys)) if from_zero else (min([*ys, 0.5]) / 1.1, max([*ys, 2.0]) * 1.1)

    def at(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / low_x) / math.log(high_x / low_x)
        up = y / high_y if from_zero else math.log(y / low_y) / math.log(high_y / low_y)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def text(x: float, y: float, words: str, anchor: str = "middle", colour: str = "#222222") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{words}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        text(LEFT, 20, title, "start"),
        text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_label),
    ]
    for tick in y_ticks:
        if low_y <= tick <= high_y:
            (left, y), (right, _) = at(low_x, tick), at(high_x, tick)
            stroke = "#222222" if tick == (0.0 if from_zero else 1.0) else "#dddddd"
            parts.append(f'<line x1="{left:.1f}" y1="{y:.1f}" x2="{right:.1f}" y2="{y:.1f}" stroke="{stroke}"/>')
            parts.append(text(LEFT - 8, y + 4, f"{tick:g}", "end"))
    for value, label in x_ticks.items():
        parts.append(text(at(value, low_y)[0], HEIGHT - BOTTOM + 18, label))
    for number, (name, points) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in (at(*p) for p in points)]
        parts.append(text(WIDTH - RIGHT + 12, TOP + 10 + 18 * number, name, "start", colour))
    return "\n".join([*parts, "</svg>"]) + "\n"
