"""The pool's memory: whole, sealed, nameless, and gone when it is closed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.transfer.rig import SMALL
from transload.errors import HandoffError, MachineError
from transload.transfer.memory import KvMemory, PeerMemory

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is shared through memfd, which is Linux's")


@pytest.mark.parametrize("shared", [True, False])
def test_a_pool_is_zeroed_and_writable(*, shared: bool) -> None:
    memory = KvMemory(SMALL, 10, shared=shared)
    assert (memory.fd is not None) == (shared and sys.platform == "linux")
    assert len(memory.buffer) == 10 * SMALL.block_bytes
    assert not any(memory.buffer)
    memory.buffer[-1] = 7
    assert memory.buffer[-1] == 7
    memory.close()


def test_a_pool_larger_than_the_machine_is_refused_before_a_page_is_taken() -> None:
    with pytest.raises(MachineError, match="ask for fewer blocks"):
        KvMemory(SMALL, 2**50 // SMALL.block_bytes)
    with pytest.raises(MachineError, match="at least one block"):
        KvMemory(SMALL, 0)


@linux
def test_a_pool_that_nobody_maps_takes_memory_as_it_is_used() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident_bytes()
    memory = KvMemory(SMALL, 2**28 // SMALL.block_bytes, shared=False)
    assert resident_bytes() - before < 2**26
    memory.close()


@linux
def test_a_pool_that_no_peer_writes_to_takes_memory_as_it_is_used_mapped_by_a_peer_or_not() -> None:
    memory = KvMemory(SMALL, 2**28 // SMALL.block_bytes, with_windows=True, resident=False)
    assert memory.fd is not None
    peer = PeerMemory(os.dup(memory.fd), SMALL, memory.num_blocks)
    assert os.fstat(memory.fd).st_blocks == 0
    peer.buffer[-1] = 7
    assert memory.buffer[-1] == 7
    assert 0 < os.fstat(memory.fd).st_blocks * 512 < 2**24
    peer.close()
    memory.close()


@linux
def test_a_pool_cannot_change_its_size_under_a_peer() -> None:
    memory = KvMemory(SMALL, 10)
    assert memory.fd is not None
    for size_bytes in (0, memory.size_bytes + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, size_bytes)
    memory.close()


@linux
def test_a_peer_sees_the_same_bytes() -> None:
    memory = KvMemory(SMALL, 10)
    assert memory.fd is not None
    peer = PeerMemory(os.dup(memory.fd), SMALL, 10)
    peer.buffer[5] = 99
    assert memory.buffer[5] == 99
    peer.close()
    memory.close()


@linux
def test_memory_that_is_no_sealed_pool_of_the_announced_size_is_refused() -> None:
    memory = KvMemory(SMALL, 10)
    assert memory.fd is not None
    with pytest.raises(HandoffError, match="announced"):
        PeerMemory(os.dup(memory.fd), SMALL, 11)
    memory.close()
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 10 * SMALL.block_bytes)
    with pytest.raises(HandoffError, match="change its size"):
        PeerMemory(unsealed, SMALL, 10)
    reader, writer = os.pipe()
    os.close(writer)
    with pytest.raises(HandoffError):
        PeerMemory(reader, SMALL, 10)


@linux
def test_memory_with_a_tensor_in_it_goes_with_the_tensor() -> None:
    memory = KvMemory(SMALL, 10)
    tensor = np.frombuffer(memory.buffer, np.uint8)
    memory.close()
    assert not tensor.any()
    del tensor, memory
    assert "transload-kv" not in Path("/proc/self/maps").read_text()
