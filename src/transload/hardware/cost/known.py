"""A chip's numbers by path, looked up once a chip. A chip never changes, so neither does what is remembered of it."""

from __future__ import annotations

from transload.hardware.chip import Chip
from transload.hardware.quantity import Quantity

REMEMBERED = 256
_seen: dict[int, tuple[Chip, dict[str, Quantity]]] = {}
"""By identity; the chip itself is kept, so that its identity is not given to another."""


def known(chip: Chip) -> dict[str, Quantity]:
    """Every known number of the chip by its path."""
    found = _seen.get(id(chip))
    if found is None:
        if len(_seen) >= REMEMBERED:
            _seen.clear()
        found = _seen[id(chip)] = (chip, dict(chip.quantities()))
    return found[1]


def number(chip: Chip, path: str) -> float:
    """The number in base units. Raises `DeploymentError` if it is unknown, saying how to assume one."""
    quantity = known(chip).get(path)
    return chip.need(path).value if quantity is None else quantity.value


def peak(chip: Chip, number_format: str) -> float:
    """Dense peak, FLOP/s; bf16 and fp16 stand for each other. Raises `DeploymentError` if it is unknown."""
    numbers = known(chip)
    twin = {"bf16": "fp16", "fp16": "bf16"}.get(number_format, number_format)
    quantity = numbers.get(f"dense_flops.{number_format}") or numbers.get(f"dense_flops.{twin}")
    return number(chip, f"dense_flops.{number_format}") if quantity is None else quantity.value
