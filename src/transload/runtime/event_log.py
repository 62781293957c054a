"""What every machine was told, one JSON line an event: to compare runs, and to see what happened."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from transload.control.messages import Message


class EventLog:
    """A file `<folder>/<who>.<incarnation>.jsonl`, written line by line: a killed process leaves it.

    What cannot be written (a full disk) ends the log, which is said once on stderr, and never the work that is logged.
    """

    def __init__(self, folder: str | Path, who: str, incarnation: int = 1) -> None:
        self._path = Path(folder) / f"{who}.{incarnation}.jsonl"
        self._encoder = msgspec.json.Encoder()
        self._file: int | None = None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            self._give_up(error)

    def write(self, now: float, event: Message) -> None:
        """One event, before it is handled."""
        if self._file is None:
            return
        named = {"at": round(now, 6), "event": type(event).__name__, **msgspec.structs.asdict(event)}
        line = self._encoder.encode(named) + b"\n"
        try:
            written = os.write(self._file, line)
            if written < len(line):  # no half line is left: whoever reads the log could not tell it from damage
                os.ftruncate(self._file, os.fstat(self._file).st_size - written)
                raise OSError("no room for the whole line")
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        sys.stderr.write(f"{self._path}: cannot be written any more ({error}); events are not logged from here on\n")
        self.close()

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def read_event_log(path: Path) -> list[dict[str, Any]]:
    """The events of one file, in order."""
    return [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]
