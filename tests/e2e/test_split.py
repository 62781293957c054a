"""One prompt, two processes, the right text: the split as a user meets it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import openai
import psutil
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

from tests.e2e.live import LiveServer, eventually, leaves_no_files

pytestmark = pytest.mark.slow
QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with leaves_no_files(), LiveServer("--set", "router.local_prefill=fallback") as server:
        yield server


def chat(server: LiveServer, max_tokens: int) -> ChatCompletion:
    return server.client.chat.completions.create(
        model="default", messages=QUESTION, temperature=0, max_tokens=max_tokens
    )


def test_a_chat_request_is_prefilled_in_one_process_and_decoded_in_another(server: LiveServer) -> None:
    answer = chat(server, max_tokens=40)
    assert answer.choices[0].message.content
    waterfall = server.get(f"/requests/{answer.id}")["choices"][0]
    workers = {stage["name"]: stage["worker"] for stage in waterfall["stages"]}
    assert workers["prefill"] == "prefill-0"
    assert workers["decode"] == "decode-0"
    assert server.pid("prefill-0") != server.pid("decode-0")
    transfer = next(stage for stage in waterfall["stages"] if stage["name"] == "transfer")
    assert transfer["detail"]["bytes"] > 0
    assert waterfall["decision"].startswith("remote prefill")


def test_the_stages_of_a_request_sum_to_its_whole(server: LiveServer) -> None:
    answer = chat(server, max_tokens=10)
    waterfall = server.get(f"/requests/{answer.id}")["choices"][0]
    assert waterfall["state"] == "finished"
    total = sum(stage["seconds"] for stage in waterfall["stages"])
    assert total == pytest.approx(waterfall["total_seconds"], abs=1e-6)
    assert all(stage["seconds"] >= 0 for stage in waterfall["stages"])


def test_the_metrics_show_the_handoff(server: LiveServer) -> None:
    """On one host the prefill worker has written the decode worker's blocks itself."""
    before = server.metric("transload_transfer_bytes_total", transport="direct")
    chat(server, max_tokens=4)
    eventually(lambda: server.metric("transload_transfer_bytes_total", transport="direct") > before)
    assert server.metric("transload_workers_up", pool="prefill") == 1
    assert server.metric("transload_leaked_blocks") == 0


def test_streamed_and_whole_answers_are_the_same(server: LiveServer) -> None:
    whole = chat(server, max_tokens=30)
    pieces = []
    usage = None
    stream = server.client.chat.completions.create(
        model="default",
        messages=QUESTION,
        temperature=0,
        max_tokens=30,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        usage = chunk.usage or usage
        pieces += [choice.delta.content or "" for choice in chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_many_callers_at_once_each_get_their_own_answer(server: LiveServer) -> None:
    async def ask() -> list[str]:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
        async with client:
            answers = await asyncio.gather(
                *(
                    client.completions.create(
                        model="default", prompt=f"{n}, {n + 1}, {n + 2},", max_tokens=8, temperature=0
                    )
                    for n in range(1, 17)
                )
            )
        return [answer.choices[0].text for answer in answers]

    texts = asyncio.run(ask())
    right = sum(str(n + 3) in text for n, text in enumerate(texts, start=1))
    assert right >= 12, texts  # a 135M model counts well, not perfectly


def test_a_seed_repeats_its_text_and_another_gives_another(server: LiveServer) -> None:
    def sample(seed: int) -> str:
        answer = server.client.completions.create(
            model="default", prompt="Once upon a time", max_tokens=24, temperature=0.9, seed=seed
        )
        return answer.choices[0].text

    alone = sample(7)
    assert sample(7) == alone
    assert sample(8) != alone


def test_a_caller_that_goes_away_frees_both_workers(server: LiveServer) -> None:
    stream = server.client.completions.create(
        model="default", prompt="A long story:", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert server.get("/health")["requests"] == 1
    stream.close()
    server.check_idle()


def test_a_prompt_of_many_chunks_is_handed_over_whole(server: LiveServer) -> None:
    fact = "The secret word is marmalade. "
    filler = "The quick brown fox jumps over the lazy dog. " * 120
    answer = server.client.completions.create(
        model="default", prompt=filler + fact + "Repeat after me: The secret word is", max_tokens=4, temperature=0
    )
    assert "marm" in answer.choices[0].text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 1200


def test_a_repeated_prompt_is_found_in_the_cache(server: LiveServer) -> None:
    prompt = "In the year 1876 a machine was shown in Philadelphia that could carry a voice along a wire. " * 4
    first = server.client.completions.create(model="default", prompt=prompt, max_tokens=8, temperature=0)
    second = server.client.completions.create(model="default", prompt=prompt, max_tokens=8, temperature=0)
    assert second.choices[0].text == first.choices[0].text
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) >= 64


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers share the only core")
def test_each_worker_runs_on_cores_of_its_own(server: LiveServer) -> None:
    prefill, decode = (set(psutil.Process(server.pid(name)).cpu_affinity()) for name in ("prefill-0", "decode-0"))
    assert len(prefill) == len(decode) == 1
    assert prefill != decode
