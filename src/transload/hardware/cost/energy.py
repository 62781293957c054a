"""Power and price of a worker, and the classes of the numbers they rest on. Refuses what is not published, by name."""

from __future__ import annotations

import msgspec

from transload.hardware.chip import Chip
from transload.hardware.quantity import Quantity

SECONDS_PER_HOUR = 3600.0


class Watts(msgspec.Struct, frozen=True, kw_only=True):
    """Power of one chip."""

    busy: float
    idle: float
    rests_on: tuple[Quantity, ...]
    notes: tuple[str, ...] = ()


def watts_of(chip: Chip) -> Watts:
    """All-in power where it is known (host, network, cooling and losses), else the chip's own.

    Idle power unknown: an idle chip is charged as a busy one, which is an upper bound. Raises `DeploymentError` if
    no power is known.
    """
    notes: list[str] = []
    busy = chip.power.all_in
    if busy is None:
        busy = chip.need("power.tdp")
        notes.append(f"{chip.id}: power is the chip's own ({busy}), without its share of host, network and cooling")
    idle = chip.power.idle
    if idle is None:
        notes.append(f"{chip.id}: power.idle is unknown; idle chips are charged as busy ones")
    return Watts(
        busy=busy.value,
        idle=busy.value if idle is None else min(idle.value, busy.value),
        rests_on=(busy,) if idle is None else (busy, idle),
        notes=tuple(notes),
    )


def energy_joules(chip: Chip, num_chips: int, seconds: float, busy_share: float) -> float:
    """Energy of `num_chips` over a time in which they work `busy_share` of it. Raises `DeploymentError`."""
    watts = watts_of(chip)
    return num_chips * seconds * (watts.idle + (watts.busy - watts.idle) * busy_share)


def usd(chip: Chip, num_chips: int, seconds: float) -> float:
    """What the chips cost for this time, by the hour, busy or not. Raises `DeploymentError` if no price is known."""
    return chip.need("price.per_hour").value / SECONDS_PER_HOUR * num_chips * seconds
