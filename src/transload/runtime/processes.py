"""Worker processes as the front end starts and ends them.

Owns what a process is to it, and one way to have one: another `transload worker`. `forks.py` has the faster way, which
this machine's kernel must allow. Knows nothing of what a worker is told once it has joined.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from typing import Protocol

JOIN_TOKEN = "TRANSLOAD_JOIN_TOKEN"
"""Environment variable with the secret that lets a worker join."""


class Process(Protocol):
    """One worker's process."""

    @property
    def pid(self) -> int: ...

    def kill(self) -> None:
        """End it at once; nothing if it has ended."""
        ...

    async def ended(self) -> str:
        """Wait until it has ended. Returns how, for people, such as "was killed by signal 9"."""
        ...


class Processes(Protocol):
    """Where worker processes come from."""

    def begin(self) -> None:
        """Do what can be done before the first process is wanted, somewhere else. Returns at once; needs no event
        loop."""
        ...

    async def start(self, join: str, name: str, token: str) -> Process:
        """A process that joins the front end at `join` (HOST:PORT) as worker `name`. Raises `OSError` if there can be
        none."""
        ...

    def close(self) -> None:
        """Start no more. Those that run must have been ended. Safe to call twice."""
        ...


def how_it_ended(code: int) -> str:
    """An exit code, or minus the number of a signal, in words."""
    return f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"


class SeparateProcesses:
    """Each one a command of its own, which imports everything anew."""

    def begin(self) -> None:
        """See `Processes`."""

    async def start(self, join: str, name: str, token: str) -> Process:
        """See `Processes`."""
        arguments = ["-m", "transload", "worker", "--join", join, "--name", name]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            env={**os.environ, JOIN_TOKEN: token},
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        return _SeparateProcess(process)

    def close(self) -> None:
        """See `Processes`."""


class _SeparateProcess:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def ended(self) -> str:
        return how_it_ended(await self._process.wait())
