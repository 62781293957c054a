"""What a prompt does to the streams beside it, and what single requests take: Splitwise, Sarathi-Serve, DistServe."""

from __future__ import annotations

from transload.hardware.cost.worker import WorkerCost
from transload.study.claims.setting import Answer
from transload.study.claims.settings.workers import (
    assumptions_of,
    chunked_seconds,
    decode_seconds,
    mixed_seconds,
    prefill_seconds,
    ratio,
    seconds,
    worker,
)
from transload.study.claims.verdict import Simulated

YI_CONTEXT = 1024
"""Tokens of context of Sarathi's decoding requests, which are not stated."""


def _llama(tensor: int = 8) -> WorkerCost:
    return worker("a100_80g_sxm", "llama-2-70b", tensor=tensor, engine="vllm")


def _yi() -> WorkerCost:
    nvlink = ("a100_80g_pcie.scale_up.bandwidth=300 GB/s",)
    return worker("a100_80g_pcie", "yi-34b", tensor=2, engine="vllm", assume=nvlink)


def _inflation(cost: WorkerCost, prompt: int, batch: int, context: int) -> float:
    """(whole prompt + decode step) / decode step, as the records derive it."""
    step = decode_seconds(cost, batch, context)
    return (prefill_seconds(cost, [prompt]) + step) / step


def splitwise_inflation() -> Answer:
    cost = _llama()
    lengths = (512, 1024, 2048, 4096, 8192)
    return Answer(
        values={f"n{length}": ratio(_inflation(cost, length, 1, length)) for length in lengths},
        basis="one step with the whole prompt, one decode step of one request with as much context",
        assumptions=assumptions_of([cost]),
    )


def any_inflation() -> Answer:
    """One prompt beside streams, over models, prompts and batches."""
    costs = [worker("a100_80g_sxm", "opt-13b", engine="vllm"), _yi(), _llama()]
    found = [
        _inflation(cost, prompt, batch, 1024)
        for cost in costs
        for prompt in (128, 256, 512, 1024, 2048, 4096, 8192)
        for batch in (1, 8, 64)
    ]
    return Answer(
        values={"inflation": Simulated(value=max(found), low=min(found))},
        basis="OPT-13B on 1 A100, Yi-34B on 2, Llama-2-70B on 8; a prompt of 128 to 8,192 tokens beside 1 to 64 "
        "streams with 1,024 tokens of context",
        assumptions=assumptions_of(costs),
    )


def splitwise_points() -> Answer:
    wide, narrow = _llama(), _llama(tensor=2)

    def ms(cost: WorkerCost, value: float) -> Simulated:
        return seconds(cost, value, times=1e3)

    return Answer(
        values={
            "p512": ms(wide, prefill_seconds(wide, [512])),
            "p2048": ms(wide, prefill_seconds(wide, [2048])),
            "p8192": ms(wide, prefill_seconds(wide, [8192])),
            "tbt": ms(wide, decode_seconds(wide, 1, 1024)),
            "tp2_p512": ms(narrow, prefill_seconds(narrow, [512])),
            "tp2_tbt": ms(narrow, decode_seconds(narrow, 1, 576)),
            "b8_p512": ms(wide, prefill_seconds(wide, [512] * 8)),
            "b8_tbt": ms(wide, decode_seconds(wide, 8, 576)),
            "b32_p512": ms(wide, prefill_seconds(wide, [512] * 32)),
            "b32_tbt": ms(wide, decode_seconds(wide, 32, 576)),
        },
        basis="single steps; all prompts of a batch in one step",
        assumptions=assumptions_of([wide, narrow]),
    )


def sarathi_hybrid() -> Answer:
    cost = _yi()
    alone = decode_seconds(cost, 4, YI_CONTEXT)
    hybrid = mixed_seconds(cost, 1021, 0, 3, YI_CONTEXT)
    chunk = chunked_seconds(cost, 2047, 512) / 4
    values = {
        "decode4": seconds(cost, alone, times=1e3),
        "hybrid": seconds(cost, hybrid, times=1e3),
        "prefill1024": seconds(cost, prefill_seconds(cost, [1024]), times=1e3),
        "n1021": ratio(hybrid / alone),
        "chunk512": ratio(chunk / alone),
    }
    for length in (2047, 4095, 8191, 16383):
        values[f"n{length}"] = ratio(prefill_seconds(cost, [length]) / alone)
    return Answer(
        values=values,
        basis=f"single steps; decoding requests have {YI_CONTEXT:,} tokens of context, which the source does not state",
        assumptions=assumptions_of([cost]),
    )


def sarathi_chunks() -> Answer:
    cost = _yi()
    values: dict[str, Simulated] = {}
    for length in (2047, 4095, 8191, 16383):
        whole = prefill_seconds(cost, [length])
        values[f"whole{length}"] = seconds(cost, whole, times=1e3)
        for chunk in (512, 2048):
            values[f"c{chunk}_{length}"] = ratio(chunked_seconds(cost, length, chunk) / whole)
    return Answer(values=values, basis="one step a chunk, nothing else in it", assumptions=assumptions_of([cost]))


def distserve_inflation() -> Answer:
    cost = worker("a100_80g_sxm", "opt-13b", engine="vllm")
    return Answer(
        values={f"n{length}": ratio(_inflation(cost, length, 8, length)) for length in (128, 512, 2048)},
        basis="one step with the whole prompt, one decode step of 8 requests with as much context each",
        assumptions=assumptions_of([cost]),
    )
