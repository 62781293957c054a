"""What prompts do to running streams: the inter-token latency of decodes while 2,048-token prompts arrive.

    python benchmarks/interference.py [--streams 4] [--prompts 6] [--only 1p1d] > benchmarks/results/interference.json

Each deployment has the same two cores. First the streams run alone; then long prompts arrive one by one; then the
streams run alone again. A stream's steps get longer with its context, whoever else is there: `worst_gap_ratio` is the
worst gap between two tokens of any stream while prompts arrive, over what a gap takes alone at that context, on the
line between the medians of before and after. `worst_gap_ratio_to_start` is over the median of before, as others count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from surroundings import surroundings
from watched_server import WatchedServer

from transload.study.answers import StreamedAnswer
from transload.study.http_client import HttpClient, parse_url

SETUPS: dict[str, tuple[str, ...]] = {
    "aggregated, 2 threads, chunks of 512": ("--topology", "1agg", "--set", "pools.aggregated.threads=2"),
    "aggregated, 2 threads, chunks of 64": (
        *("--topology", "1agg", "--set", "pools.aggregated.threads=2"),
        *("--set", "pools.aggregated.limits.step_tokens=64"),
    ),
    "aggregated, 2 threads, not chunked": (
        *("--topology", "1agg", "--set", "pools.aggregated.threads=2"),
        *("--set", "pools.aggregated.limits.step_tokens=4096"),
    ),
    "2 aggregated workers, chunks of 512": ("--topology", "2agg"),
    "1p1d": ("--topology", "1p1d", "--set", "router.local_prefill=fallback"),
}
PROMPT_TOKENS = 2048
CONTEXT_TOKENS = 128


async def ask(client: HttpClient, num_input: int, num_output: int, seed: int, answer: StreamedAnswer) -> float:
    """One streamed completion of random tokens; returns when it was sent."""
    prompt = random.Random(seed).choices(range(1000, 20_000), k=num_input)
    body = {"model": "default", "prompt": prompt, "max_tokens": num_output, "temperature": 0, "stream": True}
    sent = asyncio.get_running_loop().time()
    await client.exchange("POST", "/v1/completions", json.dumps({**body, "ignore_eos": True}).encode(), answer)
    answer.finish()
    if answer.error:
        raise SystemExit(f"{answer.error}: {answer.error_detail}")
    return sent


async def measure(url: str, num_streams: int, num_prompts: int) -> dict[str, object]:
    """Streams alone for a while, then with prompts arriving."""
    client = HttpClient(parse_url(url))
    loop = asyncio.get_running_loop()
    await ask(client, PROMPT_TOKENS, 4, 1, StreamedAnswer())  # warm
    answers = [StreamedAnswer() for _ in range(num_streams)]
    streams = [
        asyncio.create_task(ask(client, CONTEXT_TOKENS, 4000, 100 + number, answer))
        for number, answer in enumerate(answers)
    ]
    await asyncio.sleep(2.0)
    alone_from = loop.time()
    await asyncio.sleep(5.0)
    prompts_from = loop.time()
    ttft = []
    for number in range(num_prompts):
        prompt = StreamedAnswer()
        sent = await ask(client, PROMPT_TOKENS, 1, 200 + number, prompt)
        ttft.append(prompt.token_seconds[0] - sent)
        await asyncio.sleep(0.2)
    prompts_to = loop.time()
    await asyncio.sleep(5.0)
    alone_to = loop.time()
    if any(stream.done() for stream in streams):
        raise SystemExit("a stream ended before the prompts did; give it more tokens")
    for stream in streams:
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    await client.close()
    phases = (alone_from, prompts_from, prompts_to, alone_to)
    return summary([answer.token_seconds for answer in answers], phases, ttft)


Gaps = list[tuple[int, float]]
"""(number of the token that ends it, seconds)"""


def gaps_between(times: Sequence[Sequence[float]], since: float, until: float) -> Gaps:
    return [
        (number, after - before)
        for stream in times
        for number, (before, after) in enumerate(pairwise(stream), start=1)
        if since <= before and after <= until
    ]


def undisturbed(before: Gaps, after: Gaps) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of tokens, and what a gap takes there when nobody else is on the machine."""
    middles = [np.median(np.asarray(phase), axis=0) for phase in (before, after)]
    return np.array([middle[0] for middle in middles]), np.array([middle[1] for middle in middles])


def summary(
    times: Sequence[Sequence[float]], phases: tuple[float, float, float, float], ttft: Sequence[float]
) -> dict[str, object]:
    """`phases`: when the streams were left alone, prompts began, prompts had ended, and the measurement ended."""
    before, disturbed, after = (gaps_between(times, since, until) for since, until in pairwise(phases))
    numbers, alone = undisturbed(before, after)
    ratios = [gap / float(np.interp(number, numbers, alone)) for number, gap in disturbed]
    seconds = [gap for _, gap in disturbed]
    return {
        "alone_itl_ms": milliseconds([gap for _, gap in before]),
        "alone_after_itl_ms": milliseconds([gap for _, gap in after]),
        "disturbed_itl_ms": milliseconds(seconds),
        "worst_gap_ratio": round(max(ratios), 2),
        "worst_gap_ratio_to_start": round(max(seconds) / float(alone[0]), 2),
        "tpot_ratio": round(float(np.mean(ratios)), 2),
        "prompt_ttft_seconds": {"median": round(float(np.median(ttft)), 3), "max": round(max(ttft), 3)},
    }


def milliseconds(gaps: Sequence[float]) -> dict[str, float]:
    values = np.asarray(gaps) * 1000
    named = {"p50": 50, "p95": 95, "p99": 99, "max": 100}
    found = {name: round(float(np.percentile(values, share)), 2) for name, share in named.items()}
    return {**found, "mean": round(float(values.mean()), 2), "n": len(gaps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--only", help="setups whose name contains this")
    args = parser.parse_args()
    results = {}
    for name, arguments in SETUPS.items():
        if args.only and args.only not in name:
            continue
        with WatchedServer(arguments) as server:
            results[name] = asyncio.run(measure(server.url, args.streams, args.prompts))
        print(f"{name}: {json.dumps(results[name])}", file=sys.stderr)
    print(
        json.dumps(
            {
                "benchmark": "interference",
                "command": " ".join(sys.argv),
                **surroundings(),
                "streams": args.streams,
                "prompts": args.prompts,
                "prompt_tokens": PROMPT_TOKENS,
                "results": results,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
