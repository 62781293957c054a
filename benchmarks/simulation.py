"""How fast `transload simulate` is, on one core: the Azure conversation trace on 64 GPUs, at several speeds, and longer
outputs.

    python benchmarks/simulation.py [--requests 19366] [--speedups 1,4,16] [--repeats 3] > simulation.json

Beside it, in the same run: the same in the copy that `scripts/compile.py` makes (anew, unless `--plain`), the same
requests gone through step by step, and a bare loop of the event heap, so that the figures of two machines can be
told apart. CPU seconds are those of the process; loading the catalog does not count.
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
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transload.study.provenance import machine_facts
from transload.study.result import Result
from transload.study.simulate import simulate
from transload.study.traces import Window, find_trace, open_trace
from transload.study.workload import LogNormal, Poisson, Synthetic, Workload, synthetic

DEPLOYMENT = Path(__file__).with_name("simulation.yaml")
ROOT = Path(__file__).resolve().parents[1]
STEPPED_REQUESTS = 500
HEAP_EVENTS = 300_000
LONG_REQUESTS = 4_000
PEERS = {
    "splitwise-sim": (1_070, "64 GPUs of 8 DGX H100, the same trace, 5,000 requests; of each further request"),
    "AISimulate": (228, "published by its authors: a replay of 4,265 requests with longer contexts"),
    "simdistserve": (217, "lengths of the same trace, 3,000 requests, 2 workers; of each further request"),
    "Frontier": (3.5, "100 requests of 64 tokens, with its start"),
}
"""Requests a CPU second that were measured of other simulators, or published, on other machines."""


def heap_loop() -> float:
    """Events a CPU second of a loop that only pops and pushes."""
    heap = [(float(index), index) for index in range(64)]
    heapq.heapify(heap)
    began = time.process_time()
    for _ in range(HEAP_EVENTS):
        at, index = heapq.heappop(heap)
        heapq.heappush(heap, (at + 1.0, index))
    return HEAP_EVENTS / (time.process_time() - began)


def recorded(requests: int, speedup: float) -> Workload:
    return open_trace(find_trace("conversation"), window=Window(max_requests=requests, speedup=speedup))


def longer_outputs(requests: int) -> Workload:
    """As many requests a second as the trace has, and prompts as long on average, with five times the output."""
    prompts, outputs = LogNormal(1_155.0, 1.0, 16, 8_192), LogNormal(1_055.0, 1.0, 16, 8_192)
    return synthetic(Synthetic(arrivals=Poisson(5.5), input=prompts, output=outputs, num_requests=requests))


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def latencies(result: Result) -> str:
    """Equal if and only if, as good as certainly, those of all requests are. Gaps between tokens are left out: where
    steps are added up one by one, their sum is rounded otherwise."""
    summary = result.summary
    every = summary.ttft_seconds, summary.tpot_seconds, summary.end_to_end_seconds
    return sha256(repr(every).encode()).hexdigest()[:16]


def measure(name: str, workload: Workload, repeats: int) -> dict[str, Any]:
    results = [simulate(DEPLOYMENT, workload) for _ in range(repeats)]
    summary, chips = results[0].summary, sum(pool.num_chips for pool in results[0].pools)
    seconds = [result.cpu_seconds or 0.0 for result in results]
    gpu_hours = chips * summary.duration_seconds / 3600
    return {
        "workload": name,
        "requests": summary.num_requests,
        "failed": summary.num_failed,
        "output_tokens": summary.num_output_tokens,
        "mean_decode_batch": results[0].pools[1].mean_batch,
        "latencies": latencies(results[0]),
        "cpu_seconds": spread(seconds),
        "requests_per_cpu_second": spread([summary.num_requests / each for each in seconds]),
        "output_tokens_per_cpu_second": spread([summary.num_output_tokens / each for each in seconds]),
        "gpu_hours_per_cpu_second": spread([gpu_hours / each for each in seconds]),
    }


def figures_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    figures = [
        measure(f"conversation, {speed}x", recorded(arguments.requests, float(speed)), arguments.repeats)
        for speed in arguments.speedups.split(",")
    ]
    longer = longer_outputs(min(LONG_REQUESTS, arguments.requests))
    return [*figures, measure("five times the output", longer, arguments.repeats)]


def compiled_figures(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The same, in a process of its own that finds the compiled copy first."""
    target = arguments.compiled or ROOT / "build" / "compiled"
    if arguments.compiled is None:
        subprocess.run([sys.executable, str(ROOT / "scripts" / "compile.py")], check=True, stdout=sys.stderr)
    command = [sys.executable, str(Path(__file__).resolve()), "--figures-only", "--requests", str(arguments.requests)]
    command += ["--speedups", arguments.speedups, "--repeats", str(arguments.repeats)]
    environment = {**os.environ, "PYTHONPATH": str(target.resolve())}
    output = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE).stdout
    figures: list[dict[str, Any]] = json.loads(output)
    return figures


def memory_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def step_by_step(requests: int) -> dict[str, Any]:
    jumped = simulate(DEPLOYMENT, recorded(requests, 1.0))
    stepped = simulate(DEPLOYMENT, recorded(requests, 1.0), jumps=False)
    return {
        "requests": requests,
        "times_slower": (stepped.cpu_seconds or 0.0) / (jumped.cpu_seconds or 1.0),
        "same_latencies": latencies(stepped) == latencies(jumped),
    }


def run_all(arguments: argparse.Namespace) -> dict[str, Any]:
    heap = [heap_loop()]
    small = measure("a quarter", recorded(max(1, arguments.requests // 4), 1.0), 1)
    memory = {"a quarter of the requests": memory_bytes()}
    measure("all", recorded(arguments.requests, 1.0), 1)
    memory["all"] = memory_bytes()
    figures = figures_of(arguments)
    compiled = [] if arguments.plain else compiled_figures(arguments)
    pairs = zip(figures, compiled, strict=not arguments.plain)
    heap.append(heap_loop())
    return {
        "figures": figures,
        "compiled": compiled,
        "same_when_compiled": all(one["latencies"] == other["latencies"] for one, other in pairs),
        "peers": [
            {"name": name, "requests_per_cpu_second": rate, "what": what} for name, (rate, what) in PEERS.items()
        ],
        "heap_events_per_cpu_second": spread(heap),
        "peak_memory_bytes": memory,
        "a_quarter": small,
        "step_by_step": step_by_step(min(STEPPED_REQUESTS, arguments.requests)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=19_366)
    parser.add_argument("--speedups", default="1,4,16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="leave the compiled copy out")
    parser.add_argument("--compiled", type=Path, help="a compiled copy that is there already; default: made anew")
    parser.add_argument("--figures-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    simulate(DEPLOYMENT, recorded(20, 1.0))  # imports and catalog
    if arguments.figures_only:
        json.dump(figures_of(arguments), sys.stdout)
        return
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
