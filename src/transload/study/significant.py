"""Numbers with as many digits as anybody reads."""

from __future__ import annotations

from typing import Any


def significant(value: Any, digits: int) -> Any:
    """The same dicts, lists and values, every float in it to so many significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: significant(inner, digits) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [significant(inner, digits) for inner in value]
    return value
