"""Deterministic mode: a row's logits have the same bits whatever else is in the step, however the prompt was cut, and
wherever its blocks lie. And on the real model, the greedy tokens of transformers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.model.stepping import Running, Stepper, stepper_of
from tests.model.test_llama import oracle_of, prompt_of
from transload.deploy.spec import DEFAULT_MODEL, ModelSpec
from transload.model.checkpoint import load_tensors
from transload.model.source import locate

DTYPES = [torch.float32, torch.bfloat16]
FAMILIES = ["smollm2", "llama-dynamic", "mistral", "qwen2-sliding", "qwen3", "qwen3_moe", "gpt_oss"]
NUM_TOKENS = 6
GOLDEN = Path(__file__).parents[1] / "golden"


def stepper(family: str, dtype: torch.dtype, **options: Any) -> Stepper:
    return stepper_of(oracle_of(family, dtype), dtype=dtype, deterministic=True, num_blocks=400, **options)


def one_at_a_time(family: str, dtype: torch.dtype, lengths: list[int]) -> dict[int, list[torch.Tensor]]:
    """Logits of every output token, by prompt length: whole prompts, then alone in every step."""
    made = stepper(family, dtype)
    logits: dict[int, list[torch.Tensor]] = {}
    for length in lengths:
        running = made.add(prompt_of(length))
        made.prefill(running)
        logits[length] = [made.logits[0]]
        while running.num_outputs < NUM_TOKENS:
            made.step((running, 1))
            logits[length].append(made.logits[0])
        made.drop(running)
    return logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_have_the_same_bits_at_every_batch_size(family: str, dtype: torch.dtype) -> None:
    lengths = [3 + 7 * place for place in range(20)]
    want = one_at_a_time(family, dtype, lengths)
    made = stepper(family, dtype)
    rng = random.Random(0)
    for batch_size in range(1, 21) if family == "smollm2" else (2, 3, 5, 11, 20):
        rng.shuffle(made.free)
        batch = [made.add(prompt_of(length)) for length in rng.sample(lengths, k=batch_size)]
        for running in batch:
            made.prefill(running)
        for token in range(1, 4):
            made.step(*((running, 1) for running in batch))
            for row, running in enumerate(batch):
                assert torch.equal(made.logits[row], want[running.request.num_prompt_tokens][token])
        for running in batch:
            made.drop(running)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_have_the_same_bits_whatever_the_chunks(family: str, dtype: torch.dtype) -> None:
    want = one_at_a_time(family, dtype, [150])[150]
    made = stepper(family, dtype, seed=1)
    for chunk_tokens in (1, 2, 7, 16, 31, 64, 100, 149):
        running = made.add(prompt_of(150))
        made.prefill(running, chunk_tokens)
        assert torch.equal(made.logits[0], want[0])
        for token in range(1, 4):
            made.step((running, 1))
            assert torch.equal(made.logits[0], want[token])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_have_the_same_bits_in_any_mix_of_steps(family: str, dtype: torch.dtype) -> None:
    """Random schedules: requests come and go, are cut anywhere, are preempted and computed again elsewhere."""
    lengths = [5, 33, 60, 61, 118, 140]
    want = one_at_a_time(family, dtype, lengths)
    made = stepper(family, dtype)
    for seed in range(4):
        rng = random.Random(seed)
        rng.shuffle(made.free)
        waiting = [made.add(prompt_of(length)) for length in rng.sample(lengths, k=len(lengths))]
        active: list[Running] = []
        while waiting or active:
            if waiting and rng.random() < 0.4:
                active.append(waiting.pop())
            if not active:
                continue
            if rng.random() < 0.1:
                rng.choice(active).num_computed = 0
            work = [
                (running, rng.choice((1, 5, 30, None))) for running in rng.sample(active, rng.randint(1, len(active)))
            ]
            before = {running.request.id: running.num_outputs for running, _ in work}
            done = made.step(*work)
            by_id = {running.request.id: running for running, _ in work}
            for row, sampled in enumerate(done.sampled):
                length = by_id[sampled.request].request.num_prompt_tokens
                assert torch.equal(made.logits[row], want[length][before[sampled.request]])
            for running in [running for running in active if running.num_outputs >= NUM_TOKENS]:
                active.remove(running)
                made.drop(running)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_have_the_same_bits_with_two_threads(dtype: torch.dtype) -> None:
    want = one_at_a_time("smollm2", dtype, [70])[70]
    before = torch.get_num_threads()
    try:
        made = stepper("smollm2", dtype, threads=2)
        running = made.add(prompt_of(70))
        made.prefill(running, 33)
        assert torch.equal(made.logits[0], want[0])
        made.step((running, 1))
        assert torch.equal(made.logits[0], want[1])
    finally:
        torch.set_num_threads(before)


def test_without_deterministic_mode_bits_do_depend_on_the_batch() -> None:
    """Else the tests above would show nothing."""
    oracle = oracle_of("smollm2")
    made = stepper_of(oracle, num_blocks=400)
    batch = [made.add(prompt_of(30 + 9 * place)) for place in range(6)]
    for running in batch:
        made.prefill(running)
    together = made.run(tuple(made.chunk(running, 1) for running in batch))
    assert len(together.sampled) == 6
    logits = made.logits
    alone = []
    for running in batch:
        made.run((made.chunk(running, 1),))
        alone.append(made.logits[0])
    assert not torch.equal(logits, torch.stack(alone))


# ---------------------------------------------------------------------------------------------------------------------
# The real model


class Greedy(msgspec.Struct, frozen=True):
    """A greedy continuation by transformers."""

    ids: list[int]


class GoldenPrompt(msgspec.Struct, frozen=True):
    id: str
    prompt_ids: list[int]
    fp32: Greedy


class Golden(msgspec.Struct, frozen=True):
    gguf_sha256: str
    prompts: list[GoldenPrompt]


@pytest.mark.slow
@pytest.mark.parametrize("chunk_tokens", [None, 100])
def test_float32_greedy_tokens_of_the_default_model_are_those_of_transformers(chunk_tokens: int | None) -> None:
    """All prompts at once, in a batch that transformers never saw."""
    golden = msgspec.json.decode((GOLDEN / "smollm2_greedy.json").read_bytes(), type=Golden)
    files = locate(ModelSpec(path=DEFAULT_MODEL))
    tensors = load_tensors(files, torch.float32)
    made = Stepper(files.arch, tensors, deterministic=True, num_blocks=150)
    batch = [made.add(prompt.prompt_ids, max_tokens=len(prompt.fp32.ids)) for prompt in golden.prompts]
    for running in batch:
        made.prefill(running, chunk_tokens)
    while any(len(running.outputs) < running.request.max_tokens for running in batch):
        made.step(*((running, 1) for running in batch))
    for running, prompt in zip(batch, golden.prompts, strict=True):
        assert running.outputs == prompt.fp32.ids, prompt.id
