"""Commands whose processes are all gone afterwards, and what memory they had. Knows nothing of what they serve."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

START_SECONDS, STOP_SECONDS = 300.0, 10.0
POLL_SECONDS, TEND_SECONDS = 0.1, 2.0


class Left(Exception):
    """Why a system has no figures."""


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
        found = self.family()
        try:
            self._process.terminate()
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in found | self.family():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.wait()
            psutil.wait_procs(found, STOP_SECONDS)

    def family(self) -> set[psutil.Process]:
        """Whoever is in its session or below it."""
        found = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                above = [process.pid, *(parent.pid for parent in process.parents())]
                if process.status() != psutil.STATUS_ZOMBIE and (
                    self._process.pid in above or os.getsid(process.pid) == self._process.pid
                ):
                    found.add(process)
        return found

    def memory_bytes(self) -> int:
        return sum(memory_bytes(process) for process in self.family())

    def bind(self, core: int) -> None:
        """Threads that are bound to one core: to this one."""
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                for thread in process.threads():
                    with contextlib.suppress(OSError):
                        if len(bound := os.sched_getaffinity(thread.id)) == 1 and bound != {core}:
                            os.sched_setaffinity(thread.id, {core})

    def check(self) -> None:
        """Raises `Left` if it has ended."""
        if self._process.poll() is not None:
            lines = self._log.read_text(errors="replace").strip().splitlines()
            raise Left(f"{Path(self._command[0]).name} ended: {(lines or ['without a word'])[-1][:200]}")


def memory_bytes(process: psutil.Process) -> int:
    """Proportional set size: what is shared counts once in all. 0 of one that has just ended."""
    try:
        return int(process.memory_full_info().pss)
    except psutil.NoSuchProcess:
        return 0


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
