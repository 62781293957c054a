"""Chips that hold the model in SRAM: Cerebras wafers, Groq LPUs; and SambaNova's three tiers. One user, one stream."""

from __future__ import annotations

from bisect import bisect_left

import msgspec

from transload.errors import DeploymentError
from transload.hardware.catalog import load_chip, load_model
from transload.hardware.cost.worker import WorkerCost
from transload.study.claims.setting import Answer
from transload.study.claims.settings.workers import assumptions_of, decode_seconds, fits, rate, worker
from transload.study.claims.verdict import Curve, Simulated

WSE_DENSE = ("cerebras_wse3.dense_flops.fp16=15.6 PFLOP/s",)
"""An eighth of the headline, which one source calls sparse; decode of one user does not come near it."""
CONTEXT = 1024
MORE_MICROSECONDS = (0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 60, 80, 100)


def wafers(model: str) -> WorkerCost:
    """The fewest CS-3 that hold a model in 16 bits and one user's context, a pipeline of whole wafers."""
    for pipeline in range(1, load_model(model).num_layers + 1):
        cost = worker("cerebras_wse3", model, pipeline=pipeline, weights="bf16", kv="bf16", assume=WSE_DENSE)
        if fits(cost, 8192):
            return cost
    raise DeploymentError(f"{model}: no pipeline of wafers holds it")


def one_user(cost: WorkerCost, context: int = CONTEXT) -> Simulated:
    """Tokens a second of a single stream, and what they would be if each layer took so much longer: what a chip adds to
    a layer between its operations is published by nobody."""
    step = decode_seconds(cost, 1, context)
    slower = [(float(extra), 1 / (step + cost.card.num_layers * extra * 1e-6)) for extra in MORE_MICROSECONDS]
    curve = Curve(along="us more a layer", points=tuple(slower))
    return msgspec.structs.replace(rate(cost, 1 / step), curve=curve)


def cerebras() -> Answer:
    costs = {
        "llama_8b": wafers("llama-3.1-8b"),
        "llama_70b": wafers("llama-3.1-70b"),
        "llama_405b": wafers("llama-3.1-405b"),
        "gpt_oss": wafers("gpt-oss-120b"),
    }
    values = {key: one_user(cost) for key, cost in costs.items()}
    values["wafers"] = Simulated(value=float(costs["llama_405b"].parallel.num_chips))
    sizes = ", ".join(f"{cost.card.id} on {cost.parallel.num_chips}" for cost in costs.values())
    return Answer(
        values=values,
        basis=f"16-bit weights on the fewest wafers that hold them ({sizes}), {CONTEXT:,} tokens of context, no drafts",
        assumptions=assumptions_of(costs.values()),
    )


def aws_cerebras() -> Answer:
    cost = wafers("gpt-oss-120b")
    return Answer(
        values={"speed": one_user(cost)},
        basis=f"gpt-oss-120b in 16 bits on {cost.parallel.num_chips} CS-3, {CONTEXT:,} tokens of context, no drafts; "
        "where it was prefilled does not matter to it",
        assumptions=assumptions_of([cost]),
    )


def lpus(model: str) -> WorkerCost:
    """The fewest LPUs that hold a model in 8 bits and one user's context, in stages of 8, 16 or 32."""

    def stages(tensor: int, pipeline: int) -> WorkerCost:
        return worker("groq_v1", model, tensor=tensor, pipeline=pipeline, weights=_eight_bits(model), kv="int8")

    most = load_model(model).num_layers
    found: list[WorkerCost] = []
    for tensor in (8, 16, 32):
        fewest = 1 + bisect_left(range(1, most + 1), True, key=lambda pipeline: fits(stages(tensor, pipeline), 4096))
        if fewest <= most:
            found.append(stages(tensor, fewest))
    if not found:
        raise DeploymentError(f"{model}: no stages of 8, 16 or 32 LPUs hold it")
    return min(found, key=lambda cost: cost.parallel.num_chips)


def _eight_bits(model: str) -> str:
    """int8, but for gpt-oss, whose experts are published in 4 bits."""
    return "" if model == "gpt-oss-120b" else "int8"


def groq() -> Answer:
    costs = {
        "llama2_70b": lpus("llama-2-70b"),
        "llama2_7b": lpus("mistral-7b"),
        "mixtral": lpus("mixtral-8x7b"),
        "llama33_70b": lpus("llama-3.1-70b"),
        "gpt_oss": lpus("gpt-oss-120b"),
    }
    sizes = ", ".join(f"{cost.card.id} on {cost.parallel.num_chips}" for cost in costs.values())
    return Answer(
        values={key: one_user(cost, 4096) for key, cost in costs.items()},
        basis=f"8-bit weights (gpt-oss as published), pipelines of the fewest LPUs that hold them ({sizes}), 4,096 "
        "tokens of context, no drafts",
        assumptions=assumptions_of(costs.values()),
    )


DRAFTS_TAKEN = 3.1
"""Tokens a step, as the slide states."""


USERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def _shared_by(cost: WorkerCost) -> Simulated:
    """Tokens a second a user for one user, and over how many share the worker."""
    context = 8192 + 512
    speeds = [
        (float(users), DRAFTS_TAKEN / decode_seconds(cost, users, context))
        for users in USERS
        if fits(cost, users * context)
    ]
    alone = rate(cost, speeds[0][1])
    return msgspec.structs.replace(alone, curve=Curve(along="users at once", points=tuple(speeds)))


def sambanova() -> Answer:
    splits = {64: {"tensor": 64, "expert": 64}, 128: {"tensor": 128, "expert": 128}}
    costs = {
        number: worker("sn50", "deepseek-v3", tensor=split["tensor"], expert=split["expert"], kv="fp8")
        for number, split in splits.items()
    }
    costs[256] = worker("sn50", "deepseek-v3", tensor=128, data=2, expert=256, kv="fp8")
    values = {f"n{number}": _shared_by(cost) for number, cost in costs.items()}
    rack = load_chip("sn50").need("system.figures.power").value / load_chip("sn50").need("system.figures.chips").value
    for number in (128, 256, 512):
        values[f"power{number}"] = Simulated(value=number * rack / 1e3)
    return Answer(
        values=values,
        basis=f"one user, {DRAFTS_TAKEN} tokens a step at the price of one, weights split over all chips; power: the "
        "rack's, by the number of chips",
        assumptions=assumptions_of(costs.values()),
    )
