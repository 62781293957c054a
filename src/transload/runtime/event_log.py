"""What every machine was told, one JSON line an event: to compare runs, and to see what happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from transload.control.messages import Message


class EventLog:
    """A file `<folder>/<who>.<incarnation>.jsonl`, written line by line: a killed process leaves it."""

    def __init__(self, folder: str | Path, who: str, incarnation: int = 1) -> None:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        self._file = (path / f"{who}.{incarnation}.jsonl").open("ab", buffering=0)
        self._encoder = msgspec.json.Encoder()

    def write(self, now: float, event: Message) -> None:
        """One event, before it is handled."""
        line = {"at": round(now, 6), "event": type(event).__name__, **msgspec.structs.asdict(event)}
        self._file.write(self._encoder.encode(line) + b"\n")

    def close(self) -> None:
        self._file.close()


def read_event_log(path: Path) -> list[dict[str, Any]]:
    """The events of one file, in order."""
    return [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]
