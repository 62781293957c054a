"""Attention in one process, feed-forwards in another: the same tokens in deterministic mode, whatever is killed."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import psutil
import pytest

from tests.e2e.live import LiveServer, eventually, leaves_no_files
from tests.e2e.test_exact import EXACT, GOLDEN

pytestmark = pytest.mark.slow
NUM_TOKENS = 24
STREAMED = [prompt for prompt in GOLDEN if len(prompt["fp32"]["ids"]) == 64][:4]


def counts(server: LiveServer, worker: str) -> dict[str, float]:
    """What a worker has counted; told once a second."""
    found: dict[str, float] = server.workers()[worker].get("feed_forwards", {})
    return found


def golden(prompt: dict[str, Any]) -> list[str]:
    return [f"token_id:{token}" for token in prompt["fp32"]["ids"][:NUM_TOKENS]]


async def ask(client: openai.AsyncOpenAI, prompt: dict[str, Any], started: asyncio.Event) -> list[str]:
    stream = await client.completions.create(
        model="default",
        prompt=prompt["prompt_ids"],
        max_tokens=NUM_TOKENS,
        temperature=0,
        logprobs=0,
        stream=True,
        extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
    )
    tokens: list[str] = []
    async for chunk in stream:
        for choice in chunk.choices:
            if choice.logprobs is not None:
                tokens += choice.logprobs.tokens or []
        started.set()
    return tokens


async def ask_all(server: LiveServer, meanwhile: Callable[[], object]) -> list[list[str]]:
    """Streams of some golden prompts; `meanwhile` is called in a thread once each has sent a token."""
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=240)
    async with client:
        started = [asyncio.Event() for _ in STREAMED]
        tasks = [asyncio.create_task(ask(client, *pair)) for pair in zip(STREAMED, started, strict=True)]
        async with asyncio.timeout(240):
            await asyncio.gather(*(event.wait() for event in started))
        await asyncio.to_thread(meanwhile)
        return list(await asyncio.gather(*tasks))


def stream(server: LiveServer, meanwhile: Callable[[], object]) -> list[list[str]]:
    return asyncio.run(ask_all(server, meanwhile))


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    """Prefill, attention, and two FFN workers that each can answer for the other."""
    with leaves_no_files(), LiveServer("--topology", "1p1a2f", *EXACT) as server:
        yield server


def test_every_feed_forward_is_computed_elsewhere_and_the_tokens_are_those_of_transformers(server: LiveServer) -> None:
    assert stream(server, lambda: None) == [golden(prompt) for prompt in STREAMED]
    eventually(lambda: counts(server, "decode-0").get("calls", 0) > 0)
    told = counts(server, "decode-0")
    assert told["computed_here"] == told["holds_weights"] == told["unknown"] == 0
    eventually(lambda: all(counts(server, ffn).get("requests", 0) > 0 for ffn in ("ffn-0", "ffn-1")))
    assert server.workers()["decode-0"]["ffn_links"] == {"ffn-0": "shm", "ffn-1": "shm"}


def test_each_side_has_its_own_weights_in_memory_and_no_others(server: LiveServer) -> None:
    sizes = {name: psutil.Process(server.pid(name)).memory_info().rss for name in ("prefill-0", "ffn-0")}
    feed_forwards = 30 * 3 * 576 * 1536 * 4
    assert sizes["ffn-0"] < sizes["prefill-0"] - 200 * 2**20
    assert sizes["ffn-0"] > feed_forwards


def test_an_ffn_worker_killed_in_the_middle_of_a_step_changes_no_token_and_is_used_again(server: LiveServer) -> None:
    pids: list[int] = []
    assert stream(server, lambda: pids.append(server.kill("ffn-0"))) == [golden(prompt) for prompt in STREAMED]
    server.wait_for_worker("ffn-0", other_than=pids[0])
    eventually(lambda: server.workers()["decode-0"].get("ffn_links") == {"ffn-0": "shm", "ffn-1": "shm"})
    assert counts(server, "decode-0")["computed_here"] == 0
    before = counts(server, "ffn-0").get("requests", 0)
    stream(server, lambda: None)
    eventually(lambda: counts(server, "ffn-0").get("requests", 0) > before)


def test_a_stopped_ffn_worker_is_asked_elsewhere_and_its_late_answers_change_nothing(server: LiveServer) -> None:
    before = counts(server, "decode-0")["retries"]

    def pause() -> None:
        server.kill("ffn-1", signal.SIGSTOP)
        time.sleep(2.0)
        server.kill("ffn-1", signal.SIGCONT)

    assert stream(server, pause) == [golden(prompt) for prompt in STREAMED]
    eventually(lambda: counts(server, "decode-0")["retries"] > before)


def test_when_the_last_ffn_worker_is_killed_the_weights_are_loaded_and_given_up_again(server: LiveServer) -> None:
    pids: dict[str, int] = {}

    def kill_all() -> None:
        pids.update({name: server.kill(name) for name in ("ffn-0", "ffn-1")})

    assert stream(server, kill_all) == [golden(prompt) for prompt in STREAMED]
    eventually(lambda: counts(server, "decode-0")["computed_here"] > 0)
    for name, pid in pids.items():
        server.wait_for_worker(name, other_than=pid)
    eventually(lambda: len(server.workers()["decode-0"].get("ffn_links", {})) == 2)
    assert stream(server, lambda: None) == [golden(prompt) for prompt in STREAMED]
    eventually(lambda: counts(server, "decode-0")["holds_weights"] == 0)


def test_when_an_attention_worker_is_killed_its_requests_go_on(server: LiveServer) -> None:
    pids: list[int] = []
    assert stream(server, lambda: pids.append(server.kill("decode-0"))) == [golden(prompt) for prompt in STREAMED]
    assert server.pid("decode-0") != pids[0]
    eventually(lambda: all(counts(server, ffn).get("sessions") == 1 for ffn in ("ffn-0", "ffn-1")))


def test_over_tcp_and_without_a_fallback_requests_fail_by_name_within_their_deadline() -> None:
    changes = (
        "pools.aggregated.ffn.fallback=error",
        "pools.aggregated.ffn.timeout=50 ms",
        "pools.aggregated.ffn.deadline=100 ms",  # sooner than a worker is back
        "router.max_attempts=1",  # else a worker that is back soon answers the next attempt
        "links=[{between: [aggregated, ffn], transport: tcp}]",
    )
    flags = [flag for change in changes for flag in ("--set", change)]
    with LiveServer("--topology", "1a1f", *flags) as server:
        started = server.client.completions.create(
            model="default", prompt="A long story:", max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(started))
        pid = server.kill("ffn-0")
        with pytest.raises(openai.APIError, match=r"no FFN worker has answered for 0\.1 s"):
            list(started)
        server.wait_for_worker("ffn-0", other_than=pid)
        eventually(lambda: server.workers()["aggregated-0"].get("ffn_links") == {"ffn-0": "tcp"})
        answer = server.client.completions.create(model="default", prompt="One, two,", max_tokens=2)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 2
