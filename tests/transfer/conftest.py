"""What every test of the transport leaves behind: nothing."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.live import shared_memory_files
from tests.transfer.rig import eventually


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    """No thread, descriptor, mapping or named segment of a test outlives it."""
    if sys.platform != "linux":
        yield
        return
    before, segments = set(os.listdir("/proc/self/fd")), shared_memory_files()
    yield
    gc.collect()
    eventually(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("kv-")])
    descriptors = {fd: _target(fd) for fd in set(os.listdir("/proc/self/fd")) - before}
    assert not {fd: target for fd, target in descriptors.items() if target}, descriptors
    assert "transload-kv" not in Path("/proc/self/maps").read_text()
    assert shared_memory_files() <= segments


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""  # the descriptor that listed the folder
