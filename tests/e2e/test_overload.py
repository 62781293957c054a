"""More than can be served: some wait, the rest are told when to come back, and nobody is forgotten."""

from __future__ import annotations

import asyncio

import openai
import pytest

from tests.e2e.live import LiveServer

pytestmark = pytest.mark.slow


def test_beyond_the_queue_callers_get_429_with_a_time_and_are_served_when_they_return() -> None:
    with LiveServer("--set", "server.max_waiting=2", "--set", "pools.decode.limits.max_batch=1") as server:

        async def ask(client: openai.AsyncOpenAI) -> tuple[str, float]:
            """Which end the request came to, and how long it was told to wait."""
            try:
                answer = await client.completions.create(
                    model="default", prompt="One, two", max_tokens=30, extra_body={"ignore_eos": True}
                )
            except openai.RateLimitError as refusal:
                return refusal.code or "", float(refusal.response.headers["retry-after"])
            return answer.choices[0].finish_reason, 0.0

        async def burst() -> list[tuple[str, float]]:
            client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
            async with client:
                first = await asyncio.gather(*(ask(client) for _ in range(10)))
                await asyncio.sleep(max(seconds for _, seconds in first))
                return [*first, await ask(client)]

        *ends, later = asyncio.run(burst())
        refused = [seconds for end, seconds in ends if end == "over_capacity"]
        assert 5 <= len(refused) <= 8
        assert all(1 <= seconds <= 60 for seconds in refused)
        assert sum(end == "length" for end, _ in ends) == 10 - len(refused)
        assert later[0] == "length"
        assert server.metric("transload_rejected_total", code="over_capacity") == len(refused)
