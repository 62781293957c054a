"""A stderr that cannot stop the work: where its disk is full, or nobody reads it any more, words are lost and no more.

Owns the way out of the words of servers and workers for as long as they live. Decides nothing about what is said.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


class _Lenient:
    """Another stream, but for the errors of writing."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lenient_stderr() -> Iterator[None]:
    """Until the end of the block no write to `sys.stderr` raises `OSError`."""
    before = sys.stderr
    sys.stderr = cast(TextIO, _Lenient(before))
    try:
        yield
    finally:
        sys.stderr = before
