"""More than can be served: some wait, the rest are told when to come back, and nobody is forgotten."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from tests.e2e.live import LiveServer

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize("script", ["overload", "soak"])
def test_the_scripts_that_measure_endurance_run_and_find_nothing_left(script: str, tmp_path: Path) -> None:
    """Their short form; figures that mean something take minutes, on a quiet machine."""
    out = tmp_path / "out.json"
    arguments = ["--minutes", "0.1", "--out", str(out)]
    if script == "overload":
        arguments += ["--capacity-seconds", "4", "--ttft", "5", "--tpot", "1"]
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), *arguments], check=True, timeout=300)
    result = json.loads(out.read_text())
    assert set(result["memory"]) == {"front end", "prefill-0", "decode-0"}
    if script == "overload":
        assert result["callers"] > 0
        assert result["without_retry_after"] == result["num_errors"] == 0
    else:
        assert result["counts"]["answered"] > 0
        assert result["afterwards"]["requests"] == result["afterwards"]["waiting"] == 0
        held = result["afterwards"]["blocks"]
        assert held["referenced"] == held["quarantined"] == held["leaked"] == 0
