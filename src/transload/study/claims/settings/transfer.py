"""What crosses and how long that takes: KV over links, its share of a request, and a store's line rates."""

from __future__ import annotations

from transload.hardware.catalog import load_link, load_model
from transload.hardware.cost.worker import WorkerCost
from transload.hardware.model_facts import kv_bytes
from transload.study.claims.setting import Answer
from transload.study.claims.settings.lengths import SHAREGPT
from transload.study.claims.settings.workers import (
    assumptions_of,
    chunked_seconds,
    decode_seconds,
    prefill_seconds,
    worker,
)
from transload.study.claims.verdict import Simulated

MIB = 2**20
TRANSFER_LIMIT_SECONDS = 0.030


def _link_seconds(link: str, num_bytes: float, ports: int = 1) -> float:
    """Latency, where it is known, and bytes over the line rate of so many ports."""
    kind = load_link(link)
    latency = 0.0 if kind.latency is None else kind.latency.value
    return latency + num_bytes / (ports * kind.need("bandwidth").value)


def distserve_share() -> Answer:
    """Prefill TP3 PP3, decode TP4 PP3: stages of the pipeline are paired, 3 ports at the narrower side of each."""
    card = load_model("opt-175b")
    ports = 9
    prefill = worker("a100_80g_sxm", "opt-175b", tensor=3, pipeline=3, engine="vllm")
    decode = worker("a100_80g_sxm", "opt-175b", tensor=4, pipeline=3, engine="vllm")
    inputs, outputs = round(SHAREGPT.input.mean), round(SHAREGPT.output.mean)
    transfer = _link_seconds("nvlink3", kv_bytes(card, inputs), ports)
    total = prefill_seconds(prefill, [inputs]) + outputs * decode_seconds(decode, 8, inputs) + transfer
    longest = _longest_under(TRANSFER_LIMIT_SECONDS, ports)
    return Answer(
        values={
            "share": Simulated(value=transfer / total),
            "under_30ms": Simulated(value=SHAREGPT.input.share_up_to(longest)),
        },
        basis=f"{inputs} tokens in and {outputs} out (means of the dataset as the artifact ran it), decode batch 8, "
        f"KV over {ports} NVLink ports, none of it hidden; prompts of up to {longest:,} tokens take less than 30 ms",
        assumptions=assumptions_of([prefill, decode]),
    )


def _longest_under(limit_seconds: float, ports: int) -> int:
    latency = _link_seconds("nvlink3", 0.0)
    per_token = _link_seconds("nvlink3", kv_bytes(load_model("opt-175b"), 1), ports) - latency
    return int((limit_seconds - latency) / per_token)


def hack_share() -> Answer:
    """The transfer's share of a request's time over chips, prompts, outputs and networks."""
    costs = [worker(chip, "qwen3-8b", engine="vllm") for chip in ("rtx_a6000", "l40s", "a100_80g_pcie")]
    found = [
        _share(cost, link, inputs, outputs)
        for cost in costs
        for link in ("eth10", "eth25", "eth50")
        for inputs in (1000, 4000, 8000, 16_000)
        for outputs in (16, 64, 256)
    ]
    return Answer(
        values={"share": Simulated(value=max(found), low=min(found))},
        basis="Qwen3-8B prefilled and decoded on an RTX A6000, an L40S or an A100 each; prompts of 1,000 to 16,000 "
        "tokens, 16 to 256 out, 10 to 50 Gb/s, the transfer after the prefill as their baseline has it, no queues",
        assumptions=assumptions_of(costs),
    )


def _share(cost: WorkerCost, link: str, inputs: int, outputs: int) -> float:
    transfer = _link_seconds(link, kv_bytes(cost.card, inputs))
    rest = chunked_seconds(cost, inputs, 2048) + outputs * decode_seconds(cost, 4, inputs + outputs / 2)
    return transfer / (transfer + rest)


def three_fs() -> Answer:
    """Line rates: 180 nodes of 2 x 200 Gb/s, a client of 400 Gb/s."""
    node = load_link("eth200").need("bandwidth").value
    client = load_link("eth400").need("bandwidth").value
    return Answer(
        values={
            "aggregate": Simulated(value=180 * 2 * node / 2**40),
            "client": Simulated(value=client / 2**30),
        },
        basis="line rates of the network cards, nothing lost",
    )
