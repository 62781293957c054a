"""Giving memory back to the machine after weights were loaded, packed or let go.

The C library keeps what is freed between pieces that are not; half a model stays with a process that does not ask.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc


def give_back_memory() -> None:
    """Collect what nobody refers to, and return freed pages. Takes some ten milliseconds."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # another C library: it has its own ways
        ctypes.CDLL(None).malloc_trim(0)
