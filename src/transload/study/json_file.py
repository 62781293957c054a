"""Where `--json FILE` and the like write to: a file, or stdout. It never decides what is written."""

from __future__ import annotations

import sys
from pathlib import Path

from transload.errors import DeploymentError


def write_out(flag: str, path: str, content: bytes) -> None:
    """To the file, or to stdout for "-". Raises `DeploymentError`, which names the flag, if it cannot be written."""
    if path == "-":
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        return
    try:
        Path(path).write_bytes(content)
    except OSError as problem:
        raise DeploymentError(f"{flag} {path}: cannot write: {problem.strerror}") from None
