"""H200 against H100: static batches of equal requests on one worker."""

from __future__ import annotations

from transload.hardware.cost.worker import WorkerCost
from transload.study.claims.setting import Answer
from transload.study.claims.settings.workers import (
    assumptions_of,
    decode_seconds,
    prefill_seconds,
    rate,
    ratio,
    worker,
)

STEP_TOKENS = 8192
"""Prompt tokens that one step may hold."""


def batch_rate(cost: WorkerCost, batch: int, inputs: int, outputs: int) -> float:
    """Output tokens a second of a batch that is prefilled, decoded to the end and replaced."""
    per_step = max(1, STEP_TOKENS // inputs)
    whole, rest = divmod(batch, per_step)
    seconds = whole * prefill_seconds(cost, [inputs] * per_step)
    if rest:
        seconds += prefill_seconds(cost, [inputs] * rest)
    seconds += sum(decode_seconds(cost, batch, inputs + done) for done in range(1, outputs))
    return batch * outputs / seconds


def h200() -> Answer:
    old = worker("h100_sxm", "llama-2-70b", weights="fp8", kv="fp8", engine="trtllm")
    new = worker("h200_sxm", "llama-2-70b", weights="fp8", kv="fp8", engine="trtllm")
    pair = worker("h200_sxm", "llama-2-70b", tensor=2, weights="fp8", kv="fp8", engine="trtllm")
    gpt_old = worker("h100_sxm", "opt-175b", tensor=8, weights="fp8", kv="fp8", engine="trtllm")
    gpt_new = worker("h200_sxm", "opt-175b", tensor=8, weights="fp8", kv="fp8", engine="trtllm")
    small, large = batch_rate(old, 8, 2048, 128), batch_rate(new, 32, 2048, 128)
    return Answer(
        values={
            "speed_up": ratio(large / small),
            "bs32": rate(new, large),
            "bs64": rate(new, batch_rate(new, 64, 2048, 128)),
            "bs512": rate(new, batch_rate(new, 512, 128, 128)),
            "tp2": rate(pair, batch_rate(pair, 512, 128, 2048) / 2),
            "gpt3": ratio(batch_rate(gpt_new, 128, 80, 200) / batch_rate(gpt_old, 64, 80, 200)),
        },
        basis="static batches: prefilled in steps of 8,192 tokens, decoded to the end, replaced as a whole",
        assumptions=assumptions_of([old, new, pair]),
    )
