"""Arrivals at several times what can be served, and afterwards: memory, targets of those let in, and Retry-After.

    python benchmarks/overload.py [--minutes 3] [--times 5] [--out benchmarks/results/overload.json]

One prefill and one decode worker of the default model with `server.admission: targets`. What they can serve is measured
first, closed loop. Then callers come at several times that, each with a prompt of its own; some of those who get 429
come back when they were told to, to see whether they are let in. Only 127.0.0.1 is called, and all ends by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec
from surroundings import surroundings, write_report
from watched_server import WatchedServer, flatness

INPUT_TOKENS, OUTPUT_TOKENS = 96, 32
SHARE_BACK = 0.4
"""Of refused callers, who come back when told."""
CAPACITY_STREAMS, CAPACITY_DEADLINE_SECONDS = 6, 90.0
SAMPLE_SECONDS = 2.0
RECOVERY_SECONDS = 60.0


class Outcome(msgspec.Struct):
    """One call."""

    status: int
    ttft_seconds: float | None = None
    tpot_seconds: float | None = None
    retry_after: float | None = None
    error: str = ""


class Load:
    """Callers against one server."""

    def __init__(self, client: httpx.AsyncClient, seed: int) -> None:
        self.client, self.random = client, random.Random(seed)
        self.first: list[Outcome] = []
        self.back: list[Outcome] = []
        self.not_awaited = 0

    def body(self) -> bytes:
        prompt = self.random.choices(range(1000, 20_000), k=INPUT_TOKENS)
        body = {"model": "default", "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "stream": True}
        return json.dumps({**body, "ignore_eos": True}).encode()

    async def call(self, body: bytes) -> Outcome:
        """To the end of its stream, or to its refusal."""
        sent, times = time.perf_counter(), []
        headers = {"content-type": "application/json"}
        try:
            async with self.client.stream("POST", "/v1/completions", content=body, headers=headers) as answer:
                if answer.status_code != 200:
                    await answer.aread()
                    after = answer.headers.get("retry-after")
                    return Outcome(answer.status_code, retry_after=None if after is None else float(after))
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        if '"error"' in line:
                            return Outcome(200, error=line[6:300])
                        times.append(time.perf_counter())
        except httpx.HTTPError as error:
            return Outcome(0, error=f"{type(error).__name__}: {error}")
        if not times:
            return Outcome(200, error="an empty stream")
        tpot = (times[-1] - times[0]) / max(1, OUTPUT_TOKENS - 1)
        return Outcome(200, times[0] - sent, tpot)

    async def caller(self, end: float) -> None:
        """Asks, and perhaps comes back once, if that is before the end."""
        body = self.body()
        outcome = await self.call(body)
        self.first.append(outcome)
        if outcome.status == 429 and outcome.retry_after is not None and self.random.random() < SHARE_BACK:
            if time.perf_counter() + outcome.retry_after > end:
                self.not_awaited += 1
                return
            await asyncio.sleep(outcome.retry_after)
            self.back.append(await self.call(body))

    async def arrive(self, rate: float, seconds: float) -> None:
        """Poisson arrivals; returns when all have been answered, or shortly after the end."""
        end = time.perf_counter() + seconds
        tasks = set()
        while (now := time.perf_counter()) < end:
            task = asyncio.create_task(self.caller(end))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            await asyncio.sleep(max(0.0, self.random.expovariate(rate) - (time.perf_counter() - now)))
        if tasks:
            await asyncio.wait(set(tasks), timeout=60)


async def capacity(load: Load, seconds: float) -> float:
    """Requests a second, so many at once, one after the other: over this time, or until a few are done."""
    ended: list[float] = []
    began = time.perf_counter()

    def goes_on() -> bool:
        elapsed = time.perf_counter() - began
        return elapsed < seconds or (len(ended) < CAPACITY_STREAMS and elapsed < CAPACITY_DEADLINE_SECONDS)

    async def loop() -> None:
        body = load.body()
        while goes_on():
            outcome = await load.call(body)
            if outcome.status == 200 and not outcome.error:
                ended.append(time.perf_counter())
                body = load.body()
            else:
                await asyncio.sleep(outcome.retry_after or 1.0)

    await asyncio.gather(*(loop() for _ in range(CAPACITY_STREAMS)))
    if not ended:
        raise SystemExit(
            "nothing was served while its capacity was measured: the targets are too tight for this machine"
        )
    return len(ended) / (max(ended) - began)


async def recovery(load: Load, usual: float) -> float | None:
    """Seconds until a call is let in and has its first token in at most twice the usual time."""
    began = time.perf_counter()
    while time.perf_counter() - began < RECOVERY_SECONDS:
        outcome = await load.call(load.body())
        if outcome.ttft_seconds is not None and outcome.ttft_seconds < max(2 * usual, 0.5):
            return time.perf_counter() - began - outcome.ttft_seconds
        await asyncio.sleep(0.25)
    return None


async def watch(server: WatchedServer) -> None:
    while True:
        await asyncio.to_thread(server.sample)
        await asyncio.sleep(SAMPLE_SECONDS)


async def measure(server: WatchedServer, options: argparse.Namespace) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=2000, max_keepalive_connections=200)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        load = Load(client, options.seed)
        alone = [await load.call(load.body()) for _ in range(4)]
        usual = statistics.median(outcome.ttft_seconds or 0.0 for outcome in alone)
        rate = await capacity(load, options.capacity_seconds)
        watcher = asyncio.create_task(watch(server))
        await load.arrive(options.times * rate, options.minutes * 60)
        recovered = await recovery(load, usual)
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher
    return {
        "capacity_requests_per_second": rate,
        "usual_ttft_seconds": usual,
        "offered_requests_per_second": options.times * rate,
        "recovery_seconds": recovered,
        **summary(load, options),
    }


def summary(load: Load, options: argparse.Namespace) -> dict[str, Any]:
    everybody = load.first + load.back
    served = [outcome for outcome in everybody if outcome.status == 200 and not outcome.error]
    refused = [outcome for outcome in load.first if outcome.status == 429]
    ttft = sorted(outcome.ttft_seconds or 0.0 for outcome in served)
    tpot = sorted(outcome.tpot_seconds or 0.0 for outcome in served)
    came_back = [outcome for outcome in load.back if outcome.status in (200, 429)]
    return {
        "callers": len(load.first),
        "served": len(served),
        "served_per_second": len(served) / (options.minutes * 60),
        "share_429": len(refused) / max(1, len(load.first)),
        "without_retry_after": sum(outcome.retry_after is None for outcome in refused),
        "retry_after_seconds": quantiles(sorted(outcome.retry_after or 0.0 for outcome in refused)),
        "came_back": len(came_back),
        "came_back_and_were_let_in": sum(outcome.status == 200 for outcome in came_back),
        "told_to_come_after_the_end": load.not_awaited,
        "ttft_seconds": quantiles(ttft),
        "tpot_seconds": quantiles(tpot),
        "ttft_attainment": share(ttft, options.ttft),
        "tpot_attainment": share(tpot, options.tpot),
        "errors": sorted({outcome.error for outcome in everybody if outcome.error})[:5],
        "num_errors": sum(bool(outcome.error) for outcome in everybody),
    }


def quantiles(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {name: values[min(len(values) - 1, int(at * len(values)))] for name, at in
            (("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1.0))}  # fmt: skip


def share(values: list[float], target: float) -> float | None:
    return sum(value <= target for value in values) / len(values) if values else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0, help="of overload")
    parser.add_argument("--times", type=float, default=5.0, help="the measured capacity")
    parser.add_argument("--capacity-seconds", type=float, default=20.0, help="for measuring it")
    parser.add_argument("--ttft", type=float, default=2.0, help="target, seconds")
    parser.add_argument("--tpot", type=float, default=0.1, help="target, seconds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    arguments = ["--topology", "1p1d", "--set", "server.admission=targets", "--set", f"targets.ttft={options.ttft}s"]
    arguments += ["--set", f"targets.tpot={options.tpot}s"]
    with WatchedServer(arguments) as server:
        figures = asyncio.run(measure(server, options))
        samples = server.samples
    report = {
        "benchmark": "overload",
        "command": " ".join(sys.argv),
        **surroundings(),
        "minutes": options.minutes,
        "times": options.times,
        "input_tokens": INPUT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "share_back": SHARE_BACK,
        "targets": {"ttft": options.ttft, "tpot": options.tpot},
        **figures,
        "memory": flatness(samples, "memory_bytes"),
        "fds": flatness(samples, "num_fds"),
        "samples": samples[:: max(1, len(samples) // 40)],
    }
    write_report(report, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
