"""The folder where fetched model files are kept, and the lock that lets one process at a time fill it.

Must never hold anything that cannot be fetched or made again.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transload.errors import MachineError

POLL_SECONDS = 0.1


def cache_folder() -> Path:
    """TRANSLOAD_CACHE, else transload under XDG_CACHE_HOME, else ~/.cache/transload. Made if it is not there."""
    chosen = os.environ.get("TRANSLOAD_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    folder = Path(chosen) if chosen else (Path(base) if base else Path.home() / ".cache") / "transload"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(
            f"cache folder {folder}: cannot be made ({error.strerror}); set TRANSLOAD_CACHE to a folder you may write"
        ) from error
    return folder


@contextmanager
def locked(path: Path, *, wait_seconds: float) -> Iterator[None]:
    """Hold the lock file `path`. The kernel frees it when the holder dies, so a stale file does not matter.

    Raises `MachineError` if another process holds it for longer than `wait_seconds`.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise MachineError(
            f"{path}: cannot be written ({error.strerror}); set TRANSLOAD_CACHE to a folder you may write"
        ) from error
    try:
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise MachineError(
                        f"{path}: another process has held it for {wait_seconds:.0f} s; stop that process and try again"
                    ) from None
                time.sleep(POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)
