"""Commands whose processes are all gone afterwards, and what memory they had. Knows nothing of what they serve."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

START_SECONDS, STOP_SECONDS = 300.0, 10.0
POLL_SECONDS, TEND_SECONDS = 0.1, 2.0


class Left(Exception):
    """Why a system has no figures."""


PARENT, SESSION, BEGAN = 1, 3, 19
"""Places in what /proc/PID/stat says after the name."""


class Program:
    """A command; leaving the block ends it, and all that came from it."""

    def __init__(self, command: Sequence[str], log: Path, **environment: str) -> None:
        self._command, self._log = command, log
        self._environment = {**os.environ, **environment}

    def __enter__(self) -> Program:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        return self

    def __exit__(self, *_exception: object) -> None:
        found = self._family()
        try:
            self._process.terminate()
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            found |= self._family()
            for pid, fields in processes().items():
                if found.get(pid) == fields[BEGAN]:
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        continue
            self._process.wait()

    def pids(self) -> list[int]:
        """Of the command and of all processes that came from it."""
        return list(self._family())

    def _family(self) -> dict[int, str]:
        """Whoever is in its session or below it, and when each began: a pid alone may be given to another later."""
        everybody = processes()
        found: dict[int, str] = {}
        for pid, fields in everybody.items():
            above = pid
            while above in everybody and above != self._process.pid:
                above = int(everybody[above][PARENT])
            if above == self._process.pid or int(fields[SESSION]) == self._process.pid:
                found[pid] = fields[BEGAN]
        return found

    def memory_bytes(self) -> int:
        found = 0
        for pid in self.pids():
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            except OSError:
                continue
            found += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        return found

    def bind(self, core: int) -> None:
        """Threads that are bound to one core: to this one."""
        for pid in self.pids():
            for thread in os.listdir(f"/proc/{pid}/task"):
                try:
                    if len(bound := os.sched_getaffinity(int(thread))) == 1 and bound != {core}:
                        os.sched_setaffinity(int(thread), {core})
                except OSError:
                    continue

    def check(self) -> None:
        """Raises `Left` if it has ended."""
        if self._process.poll() is not None:
            lines = self._log.read_text(errors="replace").strip().splitlines()
            raise Left(f"{Path(self._command[0]).name} ended: {(lines or ['without a word'])[-1][:200]}")


def processes() -> dict[int, list[str]]:
    """All that are alive, by pid: what /proc/PID/stat says after the name."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                found[int(folder.name)] = fields
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(is_so: Callable[[], bool], programs: Sequence[Program], tend: Callable[[], None]) -> None:
    """Asks often, and tends every few seconds; raises `Left` at the deadline, or if a program ends."""
    deadline = time.monotonic() + START_SECONDS
    tended = 0.0
    while not is_so():
        for program in programs:
            program.check()
        if time.monotonic() > deadline:
            raise Left(f"does not answer within {START_SECONDS:g} s")
        if time.monotonic() > tended + TEND_SECONDS:
            tended = time.monotonic()
            tend()
        time.sleep(POLL_SECONDS)
