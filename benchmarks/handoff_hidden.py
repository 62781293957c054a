"""How much of a handoff over TCP is hidden behind the prefill of a 2,048-token prompt, layer by layer.

    python benchmarks/handoff_hidden.py [--prompts 5] [--out benchmarks/results/handoff_hidden.json]     (root)

`transload serve` in one network namespace, its decode worker in another, a wire of 1 or 10 Gbit/s between them. Exposed
is the time from the first token until the decode worker has verified the KV cache; `alone` is what the same bytes take
over the same wire when nothing hides them, in the same run. Hidden is one minus exposed over alone. Medians.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from handoff import LAYOUTS, Pair, plan_frames, two_cores
from namespaces import Hosts, Unavailable, inside, two_hosts
from surroundings import surroundings

from transload.model.native.library import load as native_library
from transload.transfer.memory import KvMemory

LAYOUT = LAYOUTS["12 KiB (SmolLM2-135M)"]
PROMPT_TOKENS = 2048
WIRES = (("1 Gbit/s", 1e9, 0.0), ("1 Gbit/s", 1e9, 1e-3), ("10 Gbit/s", 1e10, 0.0))
START_SECONDS = 180.0
TOKEN = "a secret of a benchmark"
DEPLOYMENT = """
pools:
  - {name: prefill, role: prefill}
  - {name: decode, role: decode, start: elsewhere}
router: {local_prefill: fallback}
"""


class Figure(msgspec.Struct, kw_only=True):
    """One wire; seconds."""

    wire: str
    delay_seconds: float
    prompts: int
    num_bytes: int
    prefill: float
    exposed: float
    alone: float
    hidden: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers and namespaces are taken down on the way out
    figures = []
    for name, bits, delay_seconds in WIRES:
        try:
            with two_hosts(bits, delay_seconds) as hosts:
                figure = measure(name, delay_seconds, options.prompts, hosts)
        except Unavailable as reason:
            print(f"{name}, delay {delay_seconds * 1000:g} ms: {reason}")
            continue
        figures.append(figure)
        print(msgspec.to_builtins(figure), flush=True)
    given = {"prompts": options.prompts, "prompt_tokens": PROMPT_TOKENS}
    report = {
        "benchmark": "handoff_hidden",
        "options": given,
        **surroundings(("xxhash",)),
        "figures": msgspec.to_builtins(figures),
    }
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


def measure(name: str, delay_seconds: float, num_prompts: int, hosts: Hosts) -> Figure:
    alone = seconds_alone(hosts)
    stages = [stage for stages in serve(hosts, num_prompts) for stage in stages]
    exposed = [stage["seconds"] for stage in stages if stage["name"] == "transfer"]
    prefill = [stage["seconds"] for stage in stages if stage["name"] == "prefill"]
    num_bytes = [stage["detail"]["bytes"] for stage in stages if stage["name"] == "transfer"]
    return Figure(
        wire=name,
        delay_seconds=delay_seconds,
        prompts=len(exposed),
        num_bytes=max(num_bytes),
        prefill=statistics.median(prefill),
        exposed=statistics.median(exposed),
        alone=alone,
        hidden=1 - statistics.median(exposed) / alone,
    )


def seconds_alone(hosts: Hosts) -> float:
    """The prompt's cells over this wire, with nothing else to do."""
    num_blocks = PROMPT_TOKENS // LAYOUT.block_size
    memory = KvMemory(LAYOUT, num_blocks)
    memory.kernels = native_library()
    np.frombuffer(memory.buffer, np.uint8)[:] = 7
    blocks = tuple(range(num_blocks))
    link = Pair(LAYOUT, memory, blocks, "tcp", two_cores()[1], hosts)
    frames = plan_frames(LAYOUT, blocks, blocks, 1 << 20)
    link.transfer(frames)
    seconds = statistics.median(link.transfer(frames)[0] for _ in range(3))
    link.close()
    memory.close()
    return seconds


def serve(hosts: Hosts, num_prompts: int) -> list[list[dict[str, Any]]]:
    """The stages of each prompt's request."""
    folder = Path(tempfile.mkdtemp())
    (folder / "deployment.yaml").write_text(DEPLOYMENT)
    environment = {**os.environ, "TRANSLOAD_JOIN_TOKEN": TOKEN}

    def start(host: int, *arguments: str) -> subprocess.Popen[bytes]:
        command = ["ip", "netns", "exec", hosts.names[host], sys.executable, "-m", "transload", *arguments]
        with (folder / f"{arguments[0]}.log").open("w") as output:
            return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)

    def wait_for(pattern: str) -> str:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            found = re.search(pattern, (folder / "serve.log").read_text())
            if found:
                return found.group(1)
            time.sleep(0.2)
        raise SystemExit(f"the server did not start:\n{(folder / 'serve.log').read_text()}")

    joined = f"server.join_host={hosts.addresses[0]}"
    processes = [start(0, "serve", str(folder / "deployment.yaml"), "--port", "0", "--set", joined)]
    try:
        join = wait_for(r"--join (\S+) --name decode-0")
        processes.append(start(1, "worker", "--join", join, "--name", "decode-0"))
        url = wait_for(r"ready in .* at (http://\S+)")
        with inside(hosts.names[0]):
            return [ask(url, seed) for seed in range(num_prompts + 1)][1:]  # the first one warms up
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()


def ask(url: str, seed: int) -> list[dict[str, Any]]:
    prompt = random.Random(seed).choices(range(1000, 20_000), k=PROMPT_TOKENS)
    body = {"model": "default", "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    asked = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=120) as answer:
        number = json.loads(answer.read())["id"]
    with urllib.request.urlopen(f"{url}/requests/{number}", timeout=60) as answer:
        stages: list[dict[str, Any]] = json.loads(answer.read())["choices"][0]["stages"]
    return stages


if __name__ == "__main__":
    main()
