"""How fast `transload simulate` is, on one core: the Azure conversation trace on 64 GPUs, at several speeds.

    python benchmarks/simulation.py [--requests 19366] [--speedups 1,4,16] [--repeats 3] > simulation.json

Beside it, in the same run: the same requests gone through step by step, and a bare loop of the event heap, so that the
figures of two machines can be told apart. CPU seconds are those of the process; loading the catalog does not count.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transload.study.provenance import machine_facts
from transload.study.result import Result
from transload.study.simulate import simulate
from transload.study.traces import Window, find_trace, open_trace

DEPLOYMENT = Path(__file__).with_name("simulation.yaml")
STEPPED_REQUESTS = 500
HEAP_EVENTS = 300_000


def heap_loop() -> float:
    """Events a CPU second of a loop that only pops and pushes."""
    heap = [(float(index), index) for index in range(64)]
    heapq.heapify(heap)
    began = time.process_time()
    for _ in range(HEAP_EVENTS):
        at, index = heapq.heappop(heap)
        heapq.heappush(heap, (at + 1.0, index))
    return HEAP_EVENTS / (time.process_time() - began)


def play(requests: int, speedup: float, *, jumps: bool = True) -> Result:
    trace = open_trace(find_trace("conversation"), window=Window(max_requests=requests, speedup=speedup))
    return simulate(DEPLOYMENT, trace, jumps=jumps)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def measure(requests: int, speedup: float, repeats: int) -> dict[str, Any]:
    results = [play(requests, speedup) for _ in range(repeats)]
    summary, chips = results[0].summary, sum(pool.num_chips for pool in results[0].pools)
    seconds = [result.cpu_seconds or 0.0 for result in results]
    gpu_hours = chips * summary.duration_seconds / 3600
    return {
        "speedup": speedup,
        "requests": summary.num_requests,
        "failed": summary.num_failed,
        "output_tokens": summary.num_output_tokens,
        "mean_decode_batch": results[0].pools[1].mean_batch,
        "cpu_seconds": spread(seconds),
        "requests_per_cpu_second": spread([summary.num_requests / each for each in seconds]),
        "output_tokens_per_cpu_second": spread([summary.num_output_tokens / each for each in seconds]),
        "gpu_hours_per_cpu_second": spread([gpu_hours / each for each in seconds]),
    }


def run_all(arguments: argparse.Namespace) -> dict[str, Any]:
    play(20, 1.0)  # imports and catalog
    heap = [heap_loop()]
    small = measure(max(1, arguments.requests // 4), 1.0, 1)
    memory_small = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures = [measure(arguments.requests, float(speed), arguments.repeats) for speed in arguments.speedups.split(",")]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    heap.append(heap_loop())
    requests = min(STEPPED_REQUESTS, arguments.requests)
    jumped, stepped = play(requests, 1.0), play(requests, 1.0, jumps=False)
    return {
        "figures": figures,
        "heap_events_per_cpu_second": spread(heap),
        "peak_memory_bytes": {"a quarter of the requests": memory_small, "all": memory},
        "a_quarter": small,
        "step_by_step": {
            "requests": requests,
            "times_slower": (stepped.cpu_seconds or 0.0) / (jumped.cpu_seconds or 1.0),
            "same_latencies": stepped.summary.ttft_seconds == jumped.summary.ttft_seconds
            and stepped.summary.end_to_end_seconds == jumped.summary.end_to_end_seconds,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=19_366)
    parser.add_argument("--speedups", default="1,4,16")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    facts = machine_facts()
    result = {
        "what": "one process simulating the Azure conversation trace (2023) on 64 GPUs, prefill and decode split",
        "command": "python " + " ".join(sys.argv),
        "commit": commit.stdout.strip(),
        "machine": {
            "cpu": facts.cpu,
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "load_average": facts.load_average,
        },
        "versions": {"python": platform.python_version(), "msgspec": version("msgspec"), "numpy": version("numpy")},
        **run_all(arguments),
    }
    json.dump(result, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
