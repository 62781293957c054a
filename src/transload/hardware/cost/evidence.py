"""Which numbers a worker's cost rests on, and what must be said beside a result. Changes no number."""

from __future__ import annotations

from transload.hardware.chip import Chip
from transload.hardware.cost.efficiency import Efficiency, compute_format
from transload.hardware.cost.known import known
from transload.hardware.model_card import ModelCard
from transload.hardware.parallel import Parallel
from transload.hardware.precision import Precision
from transload.hardware.quantity import Quantity


def rests_on(chip: Chip, parallel: Parallel, precision: Precision) -> tuple[Quantity, ...]:
    """Peaks of the formats that are multiplied in, the tiers of weights and KV, and the links that are crossed."""
    stored = (precision.attention, precision.dense_ffn, precision.experts, precision.embeddings)
    formats = {compute_format(chip, dtype) for dtype in (*stored, "bfloat16")}
    twins = {"bf16", "fp16"} if formats & {"bf16", "fp16"} else set()
    paths = [f"dense_flops.{number_format}" for number_format in sorted({*formats, *twins})]
    tiers = dict.fromkeys((chip.tier_for("weights").key, chip.tier_for("kv").key))
    paths += [f"memory.{tier}.{slot}" for tier in tiers for slot in ("capacity", "bandwidth")]
    if parallel.num_chips > 1:
        paths += [f"scale_up.{slot}" for slot in ("bandwidth", "world_size", "latency")]
        world = chip.scale_up.world_size
        if world is not None and parallel.num_chips > world.value:
            paths += ["scale_out.bandwidth", "scale_out.latency"]
    return tuple(found for path in paths if (found := known(chip).get(path)) is not None)


def assumptions_of(
    chip: Chip, card: ModelCard, parallel: Parallel, efficiency: Efficiency, engine: str
) -> tuple[str, ...]:
    """The user's numbers, the basis of efficiencies that were not measured, and what was taken for granted."""
    said = [f"assumed: {assumption}" for assumption in chip.assumptions()]
    if not efficiency.measured:
        said.append(f"{chip.id}: efficiencies of class {efficiency.name}: {efficiency.basis}")
    elif chip.id not in efficiency.chips:
        said.append(
            f"{chip.id}: efficiencies of other chips of class {efficiency.name} ({', '.join(efficiency.chips)})"
        )
    if engine not in efficiency.overhead:
        said.append(f"{chip.id}: overhead of engine {engine} was not measured on class {efficiency.name}: generic")
    if parallel.num_chips > 1 and chip.scale_up.world_size is None:
        said.append(
            f"{chip.id}: scale_up.world_size is unknown; {parallel.num_chips} chips are taken to reach each other"
        )
    said += [f"{card.id}: {remark}" for remark in card.remarks]
    return tuple(said)
