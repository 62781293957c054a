"""Mixed load for a long time: whether anything grows, and whether all blocks are free afterwards.

    python benchmarks/soak.py [--minutes 30] [--out benchmarks/results/soak.json]

One prefill and one decode worker of the default model. A few callers, one call after the other each: short and long
prompts, streams and not, one choice or two, with a seed and without, some shared prefixes, and callers who leave at a
random moment. Only 127.0.0.1 is called, and all ends by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from surroundings import surroundings, write_report
from watched_server import WatchedServer, flatness

CALLERS = 4
PROMPT_TOKENS = (4, 16, 64, 256, 700)
LEAVES, STREAMS, TWO_CHOICES, SHARES_PREFIX = 0.3, 0.6, 0.2, 0.3
QUIET_SECONDS = 30.0


class Caller:
    """Calls one after the other until it is told to stop."""

    def __init__(self, client: httpx.AsyncClient, seed: int, counts: Counter[str]) -> None:
        self.client, self.random, self.counts = client, random.Random(seed), counts

    def body(self) -> dict[str, Any]:
        size = self.random.choice(PROMPT_TOKENS)
        source = random.Random(size) if self.random.random() < SHARES_PREFIX else self.random
        body: dict[str, Any] = {
            "model": "default",
            "prompt": source.choices(range(1000, 20_000), k=size),
            "max_tokens": self.random.randint(1, 60),
            "stream": self.random.random() < STREAMS,
            "n": 1 + (self.random.random() < TWO_CHOICES),
            "temperature": self.random.choice((0.0, 0.7)),
            "ignore_eos": self.random.random() < 0.5,
        }
        if self.random.random() < 0.5:
            body["seed"] = self.random.randrange(1 << 30)
        return body

    async def run(self, end: float) -> None:
        while time.perf_counter() < end:
            body = self.body()
            leaves_after = self.random.uniform(0.0, 2.0) if self.random.random() < LEAVES else None
            try:
                await asyncio.wait_for(self.call(body), leaves_after)
                self.counts["answered"] += 1
            except TimeoutError:
                self.counts["left"] += 1
            except httpx.HTTPError as error:
                self.counts[f"failed: {type(error).__name__}"] += 1

    async def call(self, body: dict[str, Any]) -> None:
        if not body["stream"]:
            answer = await self.client.post("/v1/completions", json=body)
            self.counts[f"status {answer.status_code}"] += 1
            if answer.status_code == 200:
                self.counts["tokens"] += answer.json()["usage"]["completion_tokens"]
            return
        async with self.client.stream("POST", "/v1/completions", json=body) as answer:
            self.counts[f"status {answer.status_code}"] += 1
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    self.counts["errors in a stream" if '"error"' in line else "tokens"] += 1


async def watch(server: WatchedServer, every: float) -> None:
    while True:
        sample = await asyncio.to_thread(server.sample)
        metrics = await asyncio.to_thread(server.metrics)
        sample["blocks"] = blocks(metrics)
        await asyncio.sleep(every)


def blocks(metrics: dict[str, float]) -> dict[str, float]:
    """By state, all workers together."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if name.startswith("transload_blocks{"):
            state = name.partition('state="')[2].partition('"')[0]
            found[state] = found.get(state, 0.0) + value
    found["leaked"] = sum(value for name, value in metrics.items() if name.startswith("transload_leaked_blocks"))
    return found


async def quiet(server: WatchedServer) -> dict[str, Any]:
    """What is left when nobody calls any more."""
    end = time.perf_counter() + QUIET_SECONDS
    while True:
        health, held = server.health(), blocks(server.metrics())
        is_idle = not health["requests"] and not health["waiting"] and not held.get("referenced")
        if (is_idle and not held.get("quarantined")) or time.perf_counter() > end:
            return {"requests": health["requests"], "waiting": health["waiting"], "blocks": held}
        await asyncio.sleep(0.5)


async def measure(server: WatchedServer, options: argparse.Namespace) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    seconds = options.minutes * 60
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        await Caller(client, 0, Counter()).run(time.perf_counter() + min(10.0, seconds / 4))  # first uses
        watcher = asyncio.create_task(watch(server, max(1.0, seconds / 120)))
        end = time.perf_counter() + seconds
        callers = [Caller(client, options.seed * 100 + number, counts) for number in range(1, CALLERS + 1)]
        await asyncio.gather(*(caller.run(end) for caller in callers))
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher
    return {"counts": dict(counts), "afterwards": await quiet(server)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--topology", default="1p1d")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with WatchedServer(["--topology", options.topology]) as server:
        figures = asyncio.run(measure(server, options))
        samples, after = server.samples, server.sample()
    report = {
        "benchmark": "soak",
        "command": " ".join(sys.argv),
        **surroundings(),
        "minutes": options.minutes,
        "topology": options.topology,
        "callers": CALLERS,
        **figures,
        "memory": flatness(samples[:-1], "memory_bytes"),
        "fds": flatness(samples[:-1], "num_fds"),
        "shared_segments": {"first": samples[0]["shared_segments"], "last": after["shared_segments"]},
        "samples": samples[:: max(1, len(samples) // 40)],
    }
    write_report(report, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
