"""What each side of an attention/FFN split holds: weights without the other side's, KV on the attention side only.

Refuses what does not fit, by name and with the number of chips that would do.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from transload.errors import DeploymentError
from transload.hardware.chip import Chip
from transload.hardware.cost.efficiency import efficiency_of
from transload.hardware.model_card import ModelCard
from transload.hardware.model_facts import count_parameters
from transload.hardware.parallel import Parallel, share_of_chip
from transload.hardware.precision import DTYPE_BYTES, Precision
from transload.units import format_bytes

Side = Literal["attention", "ffn"]
LARGEST_STAGE = 64
"""Chips over which the experts of one layer are spread at most, where one scale-up domain has not more."""


class SideMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Of the fullest chip of one worker of a side, but for `kv_tokens`."""

    usable_bytes: float
    weight_bytes: int
    kv_bytes_per_token: int
    """0 on the FFN side, which holds no requests."""
    kv_tokens: int
    """In the whole worker."""


def side_weight_bytes(card: ModelCard, side: Side, precision: Precision) -> int:
    """Weights of one side, all layers, held once. The router goes with attention: it says where rows go."""
    count = count_parameters(card)
    ffn = count.dense_ffn * DTYPE_BYTES[precision.dense_ffn]
    ffn += (count.routed_experts + count.shared_experts) * DTYPE_BYTES[precision.experts]
    if side == "ffn":
        return math.ceil(ffn)
    other = count.input_embedding + count.output_head + count.router + count.norms
    return math.ceil(count.attention * DTYPE_BYTES[precision.attention] + other * DTYPE_BYTES[precision.embeddings])


def ffn_chip_bytes(card: ModelCard, parallel: Parallel, precision: Precision) -> int:
    """FFN weights on one chip of an FFN worker: the layers of its pipeline stage, split over the stage's chips."""
    count = count_parameters(card)
    experts = DTYPE_BYTES[precision.experts]
    chips = parallel.chips_per_stage
    bytes_per_chip = count.dense_ffn * DTYPE_BYTES[precision.dense_ffn] / parallel.tensor
    bytes_per_chip += count.routed_experts * experts / chips + count.shared_experts * experts / parallel.tensor
    stage = math.ceil(card.num_layers / parallel.pipeline) / card.num_layers
    return math.ceil(bytes_per_chip * stage)


def attention_memory(chip: Chip, card: ModelCard, parallel: Parallel, precision: Precision) -> SideMemory:
    """Room of an attention worker. Raises `DeploymentError` if its weights leave no room for KV."""
    whole = share_of_chip(card, parallel, precision)
    weights = whole.weight_bytes - ffn_chip_bytes(card, parallel, precision)
    usable = _usable_bytes(chip)
    room = usable - weights
    if room < whole.kv_bytes_per_token:
        raise DeploymentError(
            f"{card.id}: its attention side does not fit {parallel.num_chips} x {chip.id}: {format_bytes(weights)} of "
            f"weights a chip, and {format_bytes(int(usable))} of {chip.tier_for('weights').tier} are usable; split it "
            "over more chips (tensor)"
        )
    return SideMemory(
        usable_bytes=usable,
        weight_bytes=weights,
        kv_bytes_per_token=whole.kv_bytes_per_token,
        kv_tokens=int(room // whole.kv_bytes_per_token) * parallel.data_attention,
    )


def ffn_memory(chip: Chip, card: ModelCard, parallel: Parallel, precision: Precision) -> SideMemory:
    """Room of an FFN worker. Raises `DeploymentError` if its weights do not fit, saying how many chips would do."""
    weights, usable = ffn_chip_bytes(card, parallel, precision), _usable_bytes(chip)
    if weights > usable:
        fitting = fewest_ffn_chips(chip, card, precision)
        total = side_weight_bytes(card, "ffn", precision)
        raise DeploymentError(
            f"{card.id}: its FFN side ({format_bytes(total)}) does not fit {parallel.num_chips} x {chip.id}: "
            f"{format_bytes(weights)} of weights a chip, and {format_bytes(int(usable))} of "
            f"{chip.tier_for('weights').tier} are usable; "
            + (
                "no split of it fits"
                if fitting is None
                else f"it needs {fitting.num_chips} chips, for example {describe_split(fitting)}"
            )
        )
    return SideMemory(usable_bytes=usable, weight_bytes=weights, kv_bytes_per_token=0, kv_tokens=0)


def fewest_ffn_chips(chip: Chip, card: ModelCard, precision: Precision) -> Parallel | None:
    """The split of the FFN side over the fewest chips that holds it; None if none does."""
    usable = _usable_bytes(chip)
    fitting = [
        msgspec.structs.replace(stage, pipeline=pipeline)
        for stage in ffn_stages(chip, card)
        if (pipeline := _stages_needed(card, stage, precision, usable)) is not None
    ]
    return min(fitting, key=lambda parallel: (parallel.num_chips, parallel.pipeline), default=None)


def ffn_stages(chip: Chip, card: ModelCard) -> list[Parallel]:
    """Ways to spread the FFN of one layer over chips. Dense: pieces of each matrix, within one scale-up domain.
    Experts: whole ones and pieces of them beyond that; what every token passes (shared experts, dense layers) copied
    to each chip, or in pieces too."""
    world = chip.scale_up.world_size
    domain = LARGEST_STAGE if world is None else int(world.value)
    heads, experts = card.attention.num_heads, card.experts
    if experts is None:
        return [Parallel(tensor=ways) for ways in range(1, min(heads, domain) + 1) if heads % ways == 0]
    stages: list[Parallel] = []
    for chips in _sizes(experts.num_experts, max(domain, LARGEST_STAGE)):
        expert = math.gcd(chips, experts.num_experts)
        pieces = math.gcd(chips, heads)
        for tensor in dict.fromkeys((1, pieces)):
            stages.append(Parallel(tensor=tensor, data_attention=chips // tensor, expert=expert))
    return stages


def _sizes(num_experts: int, most: int) -> list[int]:
    """Numbers of chips that the experts can be dealt out to evenly, and multiples of them."""
    whole = [size for size in range(1, min(num_experts, most) + 1) if num_experts % size == 0]
    return whole + [num_experts * pieces for pieces in (2, 4, 8) if num_experts * pieces <= most]


def _stages_needed(card: ModelCard, stage: Parallel, precision: Precision, usable: float) -> int | None:
    for pipeline in range(1, card.num_layers + 1):
        if ffn_chip_bytes(card, msgspec.structs.replace(stage, pipeline=pipeline), precision) <= usable:
            return pipeline
    return None


def describe_split(parallel: Parallel) -> str:
    """`expert = 64, pipeline = 8`."""
    named = (("tensor", parallel.tensor), ("data_attention", parallel.data_attention), ("expert", parallel.expert))
    said = [f"{name} = {value}" for name, value in (*named, ("pipeline", parallel.pipeline)) if value > 1]
    return ", ".join(said) or "one chip"


def _usable_bytes(chip: Chip) -> float:
    capacity = chip.need(f"memory.{chip.tier_for('weights').key}.capacity").value
    return capacity * efficiency_of(chip).memory_share
