"""A kind of link as data: bandwidth one way, latency, what has been measured over it."""

from __future__ import annotations

from typing import Literal

from transload.hardware.quantity import Figure, Quantity, Text
from transload.hardware.slots import Described


class LinkKind(Described, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A way for bytes. An empty slot is unknown, not zero."""

    kind: Literal["link", "storage", "library", "requirement"]
    """library: software over a link, known by measurement. requirement: what a design needs of a link."""
    scope: Text = "one direction, per chip or port"
    bandwidth: Quantity | None = None
    """B/s, one direction, as specified."""
    latency: Quantity | None = None
    """s, before the first byte."""
    measured_bandwidth: Quantity | None = None
    """B/s, one direction, that software got out of it."""
    figures: tuple[Figure, ...] = ()
    setup: str = ""

    @classmethod
    def slot_units(cls) -> dict[str, str]:
        return {"bandwidth": "B/s", "latency": "s", "measured_bandwidth": "B/s"}
