"""Prompt caches in a slower tier: how much fits there, and whether reading a prefix beats computing it again."""

from __future__ import annotations

import msgspec

from transload.hardware.chip import Chip
from transload.hardware.cost.shape import StepShape
from transload.hardware.cost.worker import WorkerCost
from transload.hardware.parallel import share_of_chip


class PrefixTier(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's tier for prefixes (DDR of an SN50, host memory)."""

    tier: str
    num_tokens: int
    """Of KV that it holds, in the whole worker."""
    seconds_per_token: float
    """To bring a token's KV back; every chip reads its own share at once."""


def prefix_tier(cost: WorkerCost) -> PrefixTier:
    """Raises `DeploymentError` if no tier of the chip holds prefixes, or if its capacity or bandwidth is unknown."""
    chip: Chip = cost.chip
    tier = chip.tier_for("prefixes")
    per_token = share_of_chip(cost.card, cost.parallel, cost.precision).kv_bytes_per_token
    capacity = chip.need(f"memory.{tier.key}.capacity").value
    bandwidth = chip.need(f"memory.{tier.key}.bandwidth").value
    return PrefixTier(
        tier=tier.key,
        num_tokens=int(capacity // per_token) * cost.parallel.data_attention,
        seconds_per_token=per_token / bandwidth,
    )


def reuse_seconds(cost: WorkerCost, num_tokens: int) -> tuple[float, float]:
    """(seconds to read a prefix of this length from the slow tier, seconds to compute it again)."""
    read = num_tokens * prefix_tier(cost).seconds_per_token
    return read, cost.step_seconds(StepShape(prefill=((0, num_tokens),)))
