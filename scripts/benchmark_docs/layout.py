"""How a table and the line about where a figure was measured are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(columns: list[str], rows: list[list[object]]) -> str:
    lines: list[Sequence[object]] = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def origin(result: dict[str, Any]) -> str:
    machine = result["machine"]
    cores = machine.get("num_cores", machine.get("cores"))
    name = machine.get("cpu", machine.get("processor"))
    load = machine.get("load_average", result.get("load_average"))
    if isinstance(load, list):
        load = round(load[0], 2)
    busy = f", load average {load}" if load is not None else ""
    return f"\n{name}, {cores} cores{busy}; commit {result['commit'][:7]}.\n"
