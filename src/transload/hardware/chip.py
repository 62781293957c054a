"""A chip as data: peaks by number format, memory tiers, links, power, price. Every number knows its source.

Holds peaks as published. What share of a peak a kernel reaches is the cost model's business.
"""

from __future__ import annotations

from typing import Literal

from transload.errors import DeploymentError
from transload.hardware.measured import MeasuredSteps
from transload.hardware.quantity import Figure, Quantity, Text
from transload.hardware.slots import Described, Slots

Format = Literal["fp32", "tf32", "bf16", "fp16", "int8", "fp8", "fp4"]
FORMATS: tuple[Format, ...] = ("fp32", "tf32", "bf16", "fp16", "int8", "fp8", "fp4")
ChipKind = Literal["gpu", "asic", "wafer", "wafer-system", "rdu", "lpu", "cpu"]
TierName = Literal["SRAM", "HBM", "GDDR", "LPDDR", "DDR", "remote"]
Content = Literal["weights", "kv", "activations", "prefixes"]
"""What may live in a tier. prefixes: KV of prompts that may come again, kept out of the way."""


class Peaks(Slots, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Peak arithmetic by number format, FLOP/s."""

    fp32: Quantity | None = None
    tf32: Quantity | None = None
    bf16: Quantity | None = None
    fp16: Quantity | None = None
    int8: Quantity | None = None
    fp8: Quantity | None = None
    fp4: Quantity | None = None

    @classmethod
    def slot_units(cls) -> dict[str, str]:
        return dict.fromkeys(FORMATS, "FLOP/s")


class MemoryTier(Slots, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of memory, per chip unless `scope` says otherwise."""

    tier: TierName
    technology: Text
    scope: Text = "chip"
    capacity: Quantity | None = None
    bandwidth: Quantity | None = None
    holds: tuple[Content, ...] = ("weights", "kv", "activations")
    note: str = ""

    @classmethod
    def slot_units(cls) -> dict[str, str]:
        return {"capacity": "B", "bandwidth": "B/s"}

    @property
    def key(self) -> str:
        return self.tier.lower()


class ChipLink(Slots, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A chip's way to others, one direction."""

    name: str = ""
    link: str = ""
    """Id of the catalog's link of this kind, if there is one."""
    bandwidth: Quantity | None = None
    world_size: Quantity | None = None
    """Chips that reach each other over it."""
    latency: Quantity | None = None
    note: str = ""

    @classmethod
    def slot_units(cls) -> dict[str, str]:
        return {"bandwidth": "B/s", "world_size": "count", "latency": "s"}


class Power(Slots, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """W per chip. all_in: with its share of host, network, cooling and losses."""

    tdp: Quantity | None = None
    all_in: Quantity | None = None
    idle: Quantity | None = None

    @classmethod
    def slot_units(cls) -> dict[str, str]:
        return {"tdp": "W", "all_in": "W", "idle": "W"}


class Price(Slots, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one chip costs, by the hour or to buy. Sources differ by far: what else they say is in `conflicts`."""

    per_hour: Quantity | None = None
    purchase: Quantity | None = None

    @classmethod
    def slot_units(cls) -> dict[str, str]:
        return {"per_hour": "USD/h", "purchase": "USD"}


class System(Slots, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The box or rack the chip comes in."""

    name: Text
    figures: tuple[Figure, ...] = ()
    note: str = ""


class Chip(Described, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One chip, by the numbers. A tier, peak or link that is not there is unknown, not zero."""

    vendor: Text
    kind: ChipKind
    dense_flops: Peaks = Peaks()
    sparse_flops: Peaks = Peaks()
    """Peaks that only structured sparsity reaches. Never used as dense ones."""
    headline_flops: Peaks = Peaks()
    """Peaks published without saying whether dense or sparse. Never used as dense ones."""
    memory: tuple[MemoryTier, ...] = ()
    scale_up: ChipLink = ChipLink()
    scale_out: ChipLink = ChipLink()
    host_link: ChipLink = ChipLink()
    power: Power = Power()
    price: Price = Price()
    system: System | None = None
    measured: MeasuredSteps | None = None
    """Of a machine that `transload calibrate` measured: seconds of steps, in place of peaks."""

    def __post_init__(self) -> None:
        names = [tier.tier for tier in self.memory]
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
        if twice:
            raise ValueError(f"memory has the tier {twice[0]} twice; each may stand once")

    def peak(self, number_format: Format) -> Quantity:
        """Dense peak, FLOP/s. bf16 and fp16 stand for each other where only one is known: the same multipliers.

        Raises `DeploymentError` if it is unknown.
        """
        twin: dict[str, Format] = {"bf16": "fp16", "fp16": "bf16"}
        found = self.get(f"dense_flops.{number_format}")
        if found is None and number_format in twin:
            found = self.get(f"dense_flops.{twin[number_format]}")
        return found if found is not None else self.need(f"dense_flops.{number_format}")

    def tier_for(self, content: Content) -> MemoryTier:
        """The first tier that may hold it. Raises `DeploymentError` if there is none."""
        for tier in self.memory:
            if content in tier.holds:
                return tier
        tiers = ", ".join(tier.tier for tier in self.memory) or "none"
        raise DeploymentError(
            f"{self.id}: no memory tier may hold {content} (tiers: {tiers}); "
            f"add {content} to `holds` of one in a chip file of your own"
        )

    def ridge_point(self, number_format: Format) -> float:
        """FLOPs per byte above which arithmetic, and not memory, limits: dense peak / bandwidth of the weights' tier.

        Source of the formula: Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009. Raises `DeploymentError`.
        """
        bandwidth = self.need(f"memory.{self.tier_for('weights').key}.bandwidth")
        return self.peak(number_format).value / bandwidth.value


def ridge_points(chip: Chip) -> dict[Format, float]:
    """Ridge point of every number format whose peak is known; empty where the bandwidth is not."""
    weights = [tier for tier in chip.memory if "weights" in tier.holds]
    if not weights or weights[0].bandwidth is None:
        return {}
    known = [number_format for number_format in FORMATS if chip.get(f"dense_flops.{number_format}") is not None]
    return {number_format: chip.ridge_point(number_format) for number_format in known}
