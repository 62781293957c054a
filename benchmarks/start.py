"""From the command to the first token: seconds, with everything fetched and built before; and what it takes up.

    python benchmarks/start.py [--repeat 5] [--topologies 1agg 1p1d] [--cores 2] [--out start.json]

`transload serve` is started on as many cores, its port is asked until it answers, and one short request is streamed.
Processor time and memory are those of every process when the token has come; memory is the proportional set size:
pages that processes share count once.
The size of the installation is that of the distributions that Transload needs, with what they need; a build of the
kernels is timed into an empty folder.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import msgspec
import psutil
from programs import free_port, memory_bytes

from transload.model.native import library
from transload.study.provenance import machine_facts, versions

START_SECONDS = 180.0
POLL_SECONDS = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--topologies", nargs="+", default=["1agg", "1p1d"])
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[: options.cores]
    os.sched_setaffinity(0, cores)
    library.load()
    rows = []
    for topology in options.topologies:
        once(topology)  # fetches, builds, warms the page cache
        runs = [once(topology) for _ in range(options.repeat)]
        seconds = [run["seconds"] for run in runs]
        row = {
            "topology": topology,
            "seconds": {"min": min(seconds), "median": statistics.median(seconds), "max": max(seconds)},
            "cpu_seconds": min(run["cpu_seconds"] for run in runs),
            "cpu_seconds_by_process": {
                name: min(run["cpu_seconds_by_process"][name] for run in runs)
                for name in runs[0]["cpu_seconds_by_process"]
            },
            "memory_bytes": runs[-1]["memory_bytes"],
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    report: dict[str, Any] = {
        "benchmark": "start",
        "cores": len(cores),
        "rows": rows,
        "install_bytes": install_bytes(),
        "kernel_build_seconds": kernel_build_seconds(),
        "commit": commit(),
        "machine": msgspec.to_builtins(machine_facts()),
        "versions": versions(),
    }
    print({key: report[key] for key in ("install_bytes", "kernel_build_seconds")})
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


def once(topology: str) -> dict[str, Any]:
    """One start to the first token, and the processes' memory then."""
    port = free_port()
    command = [sys.executable, "-m", "transload", "serve", "--topology", topology, "--port", str(port)]
    before = os.times()
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            first_token(port, process)
            seconds = time.perf_counter() - started
            cpu_by_process, memory = usage_below(process.pid)
        finally:
            process.terminate()
            process.wait(60)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu, 3),
        "cpu_seconds_by_process": cpu_by_process,
        "memory_bytes": memory,
    }


def first_token(port: int, process: subprocess.Popen[bytes]) -> None:
    """Ask until the server answers with a streamed token."""
    body = json.dumps({"model": "default", "prompt": "Hello", "max_tokens": 2, "stream": True}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"content-type": "application/json"}
    )
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(request, timeout=START_SECONDS) as answer:
                while not answer.readline().startswith(b"data: {"):
                    pass
                return
        except (urllib.error.URLError, ConnectionError) as problem:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server does not start: {problem}") from problem
            time.sleep(POLL_SECONDS)


def usage_below(root: int) -> tuple[dict[str, float], dict[str, int]]:
    """Processor seconds up to now and proportional set size of a process and all below it, by name."""
    seconds, memory = {}, {}
    server = psutil.Process(root)
    for process in (server, *server.children(recursive=True)):
        name, times = name_of_process(process, server), process.cpu_times()
        seconds[name] = round(times.user + times.system, 2)
        memory[name] = memory_bytes(process)
    return dict(sorted(seconds.items())), dict(sorted(memory.items()))


def name_of_process(process: psutil.Process, server: psutil.Process) -> str:
    """Of a worker its name, which is its process's too."""
    if process == server:
        return "server"
    return "fork server" if process.parent() == server else process.name()


def install_bytes() -> dict[str, int]:
    """Files of Transload's dependencies, and how much of it torch is."""
    sizes: dict[str, int] = {}
    pending = [name_of(line) for line in distribution("transload").requires or [] if "extra ==" not in line]
    while pending:
        name = pending.pop()
        if name in sizes:
            continue
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue  # needed on other machines only
        sizes[name] = sum(size_of(found, file) for file in found.files or [])
        pending += [name_of(line) for line in found.requires or [] if "extra ==" not in line]
    return {"all": sum(sizes.values()), "torch": sizes.get("torch", 0)}


def name_of(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None
    return match[0].lower().replace("_", "-")


def size_of(found: Distribution, file: Any) -> int:
    path = Path(str(found.locate_file(file)))
    return path.stat().st_size if path.is_file() else 0


def kernel_build_seconds() -> float | None:
    compiler = next((path for name in library.COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        library.build(compiler, library.FLAGS, Path(folder) / "kernels.so")
        return round(time.perf_counter() - started, 2)


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


if __name__ == "__main__":
    main()
