"""A real `transload serve` in a process of its own, as a user starts it; and what must be true when it has gone."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import openai
import psutil

Value = TypeVar("Value")
START_SECONDS = 120.0
DEADLINE_SECONDS = 60.0


class LiveServer:
    """Use as a context manager. Leaving it checks that nothing was leaked."""

    def __init__(
        self,
        *arguments: str,
        event_log: Path | None = None,
        wait: bool = True,
        module: str = "transload",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        command = [sys.executable, "-m", module, "serve", "--port", "0", *arguments]
        if event_log is not None:
            command += ["--event-log", str(event_log)]
        folder = tempfile.mkdtemp(prefix="transload-test-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        self._output = Path(folder) / "output.log"
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )
        self.url = ""
        self._seen: dict[int, psutil.Process] = {}
        self._wait = wait

    def __enter__(self) -> LiveServer:
        if self._wait:
            try:
                self.wait_until_ready()
            except BaseException:
                self.process.kill()
                raise
        return self

    def __exit__(self, *exception: object) -> None:
        healthy = exception[0] is None
        if healthy and self.url:
            self.check_idle()
        self.stop()

    def wait_until_ready(self) -> None:
        match = self.wait_for_output(r"ready in .* at (http://\S+)")
        self.url = match.group(1)

    def wait_for_output(self, pattern: str) -> re.Match[str]:
        """The first match in what the server has printed."""

        def find() -> re.Match[str] | None:
            found = re.search(pattern, self.output())
            assert found or self.process.poll() is None, f"the server has ended:\n{self.output()}"
            return found

        return eventually(find, START_SECONDS)

    def output(self) -> str:
        return self._output.read_text()

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=DEADLINE_SECONDS)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=DEADLINE_SECONDS) as answer:
            text = answer.read().decode()
        return json.loads(text) if answer.headers["content-type"].startswith("application/json") else text

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples that carry these labels."""
        total = 0.0
        for line in str(self.get("/metrics")).splitlines():
            match = re.fullmatch(rf"{name}(\{{(.*)\}})? (\S+)", line)
            if match and all(f'{key}="{value}"' in (match.group(2) or "") for key, value in labels.items()):
                total += float(match.group(3))
        return total

    def workers(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = self.get("/health")["workers"]
        for worker in found.values():
            if worker["pid"] is not None and worker["pid"] not in self._seen:
                with contextlib.suppress(psutil.NoSuchProcess):
                    self._seen[worker["pid"]] = psutil.Process(worker["pid"])
        return found

    def pid(self, worker: str) -> int:
        return int(self.workers()[worker]["pid"])

    def kill(self, worker: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to a worker's process; returns its pid."""
        pid = self.pid(worker)
        os.kill(pid, number)
        return pid

    def wait_for_worker(self, worker: str, *, other_than: int) -> None:
        """Until the worker is ready again, in a new process."""

        def is_back() -> bool:
            state = self.workers()[worker]
            return bool(state["state"] == "ready" and state["pid"] != other_than)

        eventually(is_back)

    def check_idle(self) -> None:
        """No request, no block, no transfer is left anywhere."""
        left: dict[str, float] = {}

        def is_idle() -> bool:
            self.workers()
            health = self.get("/health")
            left.update(
                requests=health["requests"],
                waiting=health["waiting"],
                referenced=self.metric("transload_blocks", state="referenced"),
                quarantined=self.metric("transload_blocks", state="quarantined"),
            )
            return not any(left.values())

        try:
            eventually(is_idle)
        except AssertionError:
            raise AssertionError(f"left: {left}; {self.get('/health')}\n{self.output()[-4000:]}") from None
        assert self.metric("transload_leaked_blocks") == 0

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Stop as Ctrl-C does; assert that every process has gone. Returns the exit code. May be called twice."""
        self.url = ""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self._seen[child.pid] = child
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(30)
        _, alive = psutil.wait_procs(list(self._seen.values()), 10)
        assert not alive, f"still there after the server has ended: {alive}"
        return code


def eventually(condition: Callable[[], Value | None], seconds: float = DEADLINE_SECONDS) -> Value:
    """The condition's first true value; fails if there is none by the deadline."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {condition}")


def shared_memory_files() -> set[str]:
    """Named shared memory on this machine; not the semaphores that process pools name for the moment they make them."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.")}


@contextlib.contextmanager
def leaves_no_files() -> Iterator[None]:
    """Nothing appears in shared memory or in the temporary folder but what the tests put there."""
    before = shared_memory_files()
    yield
    assert shared_memory_files() <= before
