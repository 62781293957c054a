"""Deterministic mode: the same tokens and the same log-probabilities, bit for bit, however the work is split; and the
tokens are those of `transformers`."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.live import LiveServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # five servers are asked before the first test
EXACT = ("--dtype", "float32", "--deterministic", "--set", "router.local_prefill=fallback")
GOLDEN: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "golden/smollm2_greedy.json").read_text())[
    "prompts"
]
SAMPLED: dict[str, list[list[str]]] = {}
TOPOLOGIES = {
    "aggregated": ("--topology", "1agg"),
    "split over shared memory": ("--topology", "1p1d"),
    "split over TCP, small chunks, one layer a frame": (str(Path(__file__).parent / "tcp_small_chunks.yaml"),),
    "attention and feed-forwards apart": ("--topology", "1a1f"),
    "prefill, attention and feed-forwards apart": ("--topology", "1p1a1f", "--set", "pools.decode.ffn.micro_batches=3"),
}


def complete(server: LiveServer) -> list[tuple[list[str], list[float]]]:
    """All golden prompts at once, greedy, 64 tokens whatever they are: tokens and log-probabilities."""

    async def ask_all() -> list[tuple[list[str], list[float]]]:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=240)

        async def ask(prompt: dict[str, Any]) -> tuple[list[str], list[float]]:
            answer = await client.completions.create(
                model="default",
                prompt=prompt["prompt_ids"],
                max_tokens=64,
                temperature=0,
                logprobs=0,
                extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
            )
            logprobs = answer.choices[0].logprobs
            assert logprobs is not None
            assert logprobs.tokens is not None
            return logprobs.tokens, [value for value in logprobs.token_logprobs or [] if value is not None]

        async with client:
            return await asyncio.gather(*(ask(prompt) for prompt in GOLDEN))

    return asyncio.run(ask_all())


def sample(server: LiveServer) -> list[list[str]]:
    """Seeded texts at temperature 0.9: four at once, then the first of them once more, alone."""

    async def ask_all() -> list[list[str]]:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=240)

        async def ask(seed: int) -> list[str]:
            answer = await client.completions.create(
                model="default",
                prompt="Once upon a time there was",
                max_tokens=16,
                temperature=0.9,
                top_p=0.95,
                seed=seed,
                frequency_penalty=0.3,
                logprobs=0,
                extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
            )
            assert answer.choices[0].logprobs is not None
            return answer.choices[0].logprobs.tokens or []

        async with client:
            crowd = await asyncio.gather(*(ask(seed) for seed in (1, 2, 3, 4)))
            return [*crowd, await ask(1)]

    return asyncio.run(ask_all())


@pytest.fixture(scope="module")
def answers() -> dict[str, list[tuple[list[str], list[float]]]]:
    found = {}
    for name, arguments in TOPOLOGIES.items():
        with LiveServer(*arguments, *EXACT) as server:
            found[name] = complete(server)
            SAMPLED[name] = sample(server)
            if name.startswith(("split", "prefill")):
                assert server.metric("transload_transfers_total", outcome="verified") == len(GOLDEN) + 5
    return found


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_greedy_tokens_are_those_of_transformers(name: str, answers: dict[str, Any]) -> None:
    for prompt, (tokens, _) in zip(GOLDEN, answers[name], strict=True):
        assert tokens == [f"token_id:{token}" for token in prompt["fp32"]["ids"]], prompt["id"]


@pytest.mark.parametrize("name", list(TOPOLOGIES)[1:])
def test_log_probabilities_are_bit_equal_to_the_aggregated_ones(name: str, answers: dict[str, Any]) -> None:
    for prompt, split, whole in zip(GOLDEN, answers[name], answers["aggregated"], strict=True):
        assert split[1] == whole[1], prompt["id"]


@pytest.mark.usefixtures("answers")
def test_a_seed_gives_the_same_text_alone_in_a_crowd_and_however_it_is_split() -> None:
    whole = SAMPLED["aggregated"]
    assert whole[4] == whole[0]
    assert len({tuple(text) for text in whole[:4]}) == 4
    assert all(SAMPLED[name] == whole for name in TOPOLOGIES)


def test_log_probabilities_are_those_of_transformers(answers: dict[str, Any]) -> None:
    for prompt, (_, logprobs) in zip(GOLDEN, answers["aggregated"], strict=True):
        assert logprobs == pytest.approx(prompt["fp32"]["logprobs"], abs=2e-3), prompt["id"]
