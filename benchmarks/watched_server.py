"""A `transload serve` whose processes are watched: memory, file descriptors, shared memory. Judges nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

START_SECONDS = 180.0


class WatchedServer:
    """Use as a context manager; leaving it stops the server."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._output = Path(tempfile.mkdtemp()) / "serve.log"
        command = [sys.executable, "-m", "transload", "serve", "--port", "0", *arguments]
        with self._output.open("w") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        self.url = ""
        self.began = time.monotonic()
        self.samples: list[dict[str, Any]] = []

    def __enter__(self) -> WatchedServer:
        deadline = time.monotonic() + START_SECONDS
        while not self.url:
            found = re.search(r"ready in .* at (http://\S+)", self._output.read_text())
            if found:
                self.url = found.group(1)
            elif self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                raise SystemExit(f"the server did not start:\n{self._output.read_text()}")
            time.sleep(0.1)
        self.began = time.monotonic()
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        self._process.wait(60)

    def names(self) -> dict[int, str]:
        """Processes by their part: the front end, and workers by name."""
        workers = httpx.get(f"{self.url}/health", timeout=30).json()["workers"]
        found = {self._process.pid: "front end"}
        found.update({int(worker["pid"]): name for name, worker in workers.items() if worker.get("pid")})
        return found

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics by name and labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}

    def health(self) -> dict[str, Any]:
        return dict(httpx.get(f"{self.url}/health", timeout=30).json())

    def sample(self) -> dict[str, Any]:
        """Take one, and keep it."""
        sample: dict[str, Any] = {
            "seconds": round(time.monotonic() - self.began, 1),
            "memory_bytes": {},
            "num_fds": {},
            "shared_segments": num_shared(),
        }
        for pid, name in self.names().items():
            try:
                process = psutil.Process(pid)
                sample["memory_bytes"][name] = process.memory_info().rss
                sample["num_fds"][name] = process.num_fds()
            except psutil.NoSuchProcess:
                continue
        self.samples.append(sample)
        return sample


def num_shared() -> int:
    """Named segments of shared memory on this machine."""
    return len(os.listdir("/dev/shm"))


def flatness(samples: Sequence[dict[str, Any]], key: str) -> dict[str, dict[str, float]]:
    """Of each process: the mean of the first and of the last third of the samples, and the growth from one to the
    other. What a process takes once, when it is first used, lies in the first third."""
    third = max(1, len(samples) // 3)
    found: dict[str, dict[str, float]] = {}
    for name in samples[-1][key]:
        first = [sample[key][name] for sample in samples[:third] if name in sample[key]]
        last = [sample[key][name] for sample in samples[-third:] if name in sample[key]]
        if first and last:
            before, after = sum(first) / len(first), sum(last) / len(last)
            found[name] = {"first": before, "last": after, "growth": after / before - 1}
    return found
