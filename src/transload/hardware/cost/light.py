"""The speed of light of a worker: every peak reached, every latency and overhead zero. A bound, never a prediction."""

from __future__ import annotations

import msgspec

from transload.hardware.cost.efficiency import Collective, Curve, Efficiency, Overhead, Routing
from transload.hardware.cost.worker import WorkerCost

PERFECT = Curve(compute=1.0, memory=1.0)
FREE = Collective(base_seconds=0.0, share=1.0)
LIGHT = Efficiency(
    name="gpu",
    basis="the speed of light: peaks and bandwidths as published, no latency, no overhead",
    measured=False,
    gemm={"bf16": PERFECT, "fp8": PERFECT, "fp4": PERFECT},
    grouped_gemm={"bf16": PERFECT, "fp8": PERFECT, "fp4": PERFECT},
    attention_prefill=PERFECT,
    attention_decode=PERFECT,
    mla_prefill=PERFECT,
    mla_decode=PERFECT,
    elementwise=PERFECT,
    all_reduce=FREE,
    all_to_all=FREE,
    p2p=FREE,
    overhead={"generic": Overhead(step_seconds=0.0, layer_seconds=0.0, sequence_seconds=0.0)},
    routing=Routing(overlap=1.0),
)


def speed_of_light(cost: WorkerCost) -> WorkerCost:
    """The same worker without losses: no step of the real one is faster, whatever the engine."""
    light = msgspec.structs.replace(LIGHT, name=cost.efficiency.name, memory_share=cost.efficiency.memory_share)
    return WorkerCost(cost.chip, cost.card, cost.parallel, cost.precision, scope=cost.scope, efficiency=light)
