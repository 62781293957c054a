"""What fits: weights, KV and cold prefixes in the tiers of a worker's chips, and how many chips it takes.

Refuses what does not fit, by name and with the number of chips that would do. Owns no durations.
"""

from __future__ import annotations

import math

import msgspec

from transload.errors import DeploymentError
from transload.hardware.chip import Chip
from transload.hardware.cost.efficiency import Efficiency
from transload.hardware.cost.plan import SHORT_WINDOW
from transload.hardware.model_card import ModelCard
from transload.hardware.parallel import Parallel, Share, share_of_chip
from transload.hardware.precision import Precision
from transload.units import format_bytes


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of the fullest chip of a worker, and what the whole worker holds."""

    weights_tier: str
    kv_tier: str
    usable_bytes: float
    """Of the tier that holds the KV, after the share that is workspace."""
    weight_bytes: int
    """On this chip."""
    kv_bytes_per_token: int
    """On this chip, for a token of a request of its attention rank; layers with a short window do not grow."""
    kv_tokens: int
    """In the whole worker."""

    def num_blocks(self, block_tokens: int) -> int:
        """Whole blocks of KV that fit in the worker."""
        return self.kv_tokens // block_tokens


def growing_share(card: ModelCard) -> float:
    """Share of the layers whose cache grows with the context."""
    short = card.sliding_window is not None and card.sliding_window <= SHORT_WINDOW
    return 1 - card.num_sliding_layers / card.num_layers if short else 1.0


def capacity_of(
    chip: Chip, card: ModelCard, parallel: Parallel, precision: Precision, efficiency: Efficiency
) -> Capacity:
    """Raises `DeploymentError` if a capacity is unknown or the weights and one request's first token do not fit."""
    share = share_of_chip(card, parallel, precision)
    weights, kv = chip.tier_for("weights"), chip.tier_for("kv")
    usable = chip.need(f"memory.{weights.key}.capacity").value * efficiency.memory_share
    per_token = max(1, math.ceil(share.kv_bytes_per_token * growing_share(card)))
    room = usable - share.weight_bytes
    if room < per_token:
        raise _too_small(chip, card, parallel, precision, share, usable, efficiency)
    if kv is not weights:
        room = chip.need(f"memory.{kv.key}.capacity").value * efficiency.memory_share
    return Capacity(
        weights_tier=weights.key,
        kv_tier=kv.key,
        usable_bytes=usable,
        weight_bytes=share.weight_bytes,
        kv_bytes_per_token=per_token,
        kv_tokens=int(room // per_token) * parallel.data_attention,
    )


def fewest_chips(
    chip: Chip, card: ModelCard, precision: Precision, efficiency: Efficiency, kv_tokens: int = 1
) -> Parallel | None:
    """The split over the fewest chips that holds the weights and this much KV; None if none does.

    Tries every tensor split that divides the heads, each with as few pipeline stages as fit; of equal ones the one
    with the most tensor parallelism, the faster for a single request.
    """
    usable = chip.need(f"memory.{chip.tier_for('weights').key}.capacity").value * efficiency.memory_share
    growing = growing_share(card)
    best: Parallel | None = None
    heads = card.attention.num_heads
    for tensor in (ways for ways in range(1, heads + 1) if heads % ways == 0):
        for pipeline in range(1, card.num_layers + 1):
            parallel = Parallel(tensor=tensor, pipeline=pipeline)
            if best is not None and parallel.num_chips > best.num_chips:
                break
            share = share_of_chip(card, parallel, precision)
            if share.weight_bytes + kv_tokens * share.kv_bytes_per_token * growing <= usable:
                best = parallel
                break
    return best


def _too_small(
    chip: Chip, card: ModelCard, parallel: Parallel, precision: Precision, share: Share, usable: float,
    efficiency: Efficiency,
) -> DeploymentError:  # fmt: skip
    tier = chip.tier_for("weights").tier
    fitting = fewest_chips(chip, card, precision, efficiency)
    advice = "no split of this model fits it"
    if fitting is not None:
        advice = (
            f"it needs {fitting.num_chips} chips or more, for example tensor = {fitting.tensor}, "
            f"pipeline = {fitting.pipeline}"
        )
    return DeploymentError(
        f"{card.id} does not fit {parallel.num_chips} x {chip.id}: {format_bytes(share.weight_bytes)} of weights a "
        f"chip, and {format_bytes(usable)} of {tier} are usable; {advice}"
    )
