"""A child process that reads a JSON line an order and answers each with one: asked here, with a deadline."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec

from transload.errors import TransloadError

Answer = TypeVar("Answer", bound=msgspec.Struct)
END_SECONDS = 10.0


class AnsweringProcess:
    """A module of ours, run by its name. For one thread."""

    def __init__(self, name: str, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        """`name`: in errors. `environment`: on top of our own."""
        self._name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, order: msgspec.Struct, answer: type[Answer], deadline_seconds: float) -> Answer:
        """Raises `TransloadError` if the process has ended, or does not answer in time and is ended for it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        overdue = threading.Timer(deadline_seconds, self._process.kill)
        overdue.start()
        try:
            self._process.stdin.write(msgspec.json.encode(order).decode() + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            overdue.cancel()
        if not line:
            raise TransloadError(f"{self._name} ended or took more than {deadline_seconds:g} s")
        return msgspec.json.decode(line, type=answer)

    def close(self) -> None:
        """It ends with its orders; by force if that takes too long."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
