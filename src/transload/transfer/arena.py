"""Addresses under which a worker's own KV pool and those of its peers lie as one: what a step can work in.

    | own pool | window of a peer | window of another | addresses for windows to come ... |
      block 0    block `first_block`

The own pool and every window are whole blocks of one table, so that a block of a peer is a block like any other. Owns
the reserved addresses and what is mapped there. Addresses are given out once: whoever still holds block numbers of a
window that is closed touches nobody's memory, and never that of the next peer. Linux only.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import threading

from transload.errors import HandoffError

RESERVED_BYTES = 1 << 40
"""Addresses, not memory: nothing is set aside for them."""
_PRIVATE_NOWHERE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
_FIXED = 0x10  # MAP_FIXED: takes the place of what is mapped there, in one move
_NO_ACCESS = 0
_FAILED = ctypes.c_void_p(-1).value
_STAT_BLOCK_BYTES = 512


class Window:
    """A peer's pool among our blocks, until `close`."""

    def __init__(self, address: int, first_block: int, num_blocks: int, size_bytes: int) -> None:
        self.first_block = first_block
        self.num_blocks = num_blocks
        self.is_open = True
        """False before the peer's memory goes: who finds it true has touched nothing else up to now."""
        self._address = address
        self._size_bytes = size_bytes
        self._lock = threading.Lock()  # while the memory goes

    @property
    def buffer(self) -> memoryview:
        """The peer's pool. Let go of it before `close`."""
        return memory_at(self._address, self._size_bytes)

    def close(self) -> None:
        """Take the peer's memory away from under whoever works in it. When this returns, no thread of this process can
        reach it; a step that still runs goes on in memory that is nobody's."""
        try:
            with self._lock:
                self.is_open = False
                self._take_away()
        except OSError:
            os.abort()  # the peer would be told that nobody writes any more: better no worker than a wrong word

    def forget(self) -> None:
        """Give back what was written here after `close`. The steps that worked here have returned."""
        with self._lock:
            if self._size_bytes:
                _libc.madvise(self._address, self._size_bytes, mmap.MADV_DONTNEED)

    def _take_away(self) -> None:
        _map(self._address, self._size_bytes, mmap.PROT_READ | mmap.PROT_WRITE, _PRIVATE_NOWHERE | _FIXED, -1)


class Arena:
    """Raises `OSError` where so many addresses are not to be had."""

    def __init__(self, fd: int, block_bytes: int, num_blocks: int) -> None:
        """Maps the own pool, `fd`, at the front."""
        self._lock = threading.Lock()
        self._block_bytes = block_bytes
        self._blocks_apart = mmap.PAGESIZE // math.gcd(block_bytes, mmap.PAGESIZE)  # a window begins with a page
        size_bytes = num_blocks * block_bytes
        if size_bytes > RESERVED_BYTES // 2:
            raise OSError("the pool is larger than the addresses for it and its peers")
        self._address = _map(0, RESERVED_BYTES, _NO_ACCESS, _PRIVATE_NOWHERE, -1)
        self.num_blocks = RESERVED_BYTES // block_bytes
        """Of the whole table, most of it nothing yet."""
        try:
            self._map_pool(self._address, size_bytes, fd)
        except OSError:
            self.close()
            raise
        self._next_block = self._aligned(num_blocks)

    @property
    def buffer(self) -> memoryview:
        """The whole table. Only what is mapped may be touched."""
        return memory_at(self._address, self.num_blocks * self._block_bytes)

    def open_window(self, fd: int, num_blocks: int) -> Window | None:
        """Map a peer's pool; None if there are no addresses left. Raises `OSError`."""
        with self._lock:
            first_block = self._next_block
            if first_block + num_blocks > self.num_blocks:
                return None
            self._next_block = self._aligned(first_block + num_blocks)
        address, size_bytes = self._address + first_block * self._block_bytes, num_blocks * self._block_bytes
        self._map_pool(address, size_bytes, fd)
        return Window(address, first_block, num_blocks, size_bytes)

    def close(self) -> None:
        """Give all addresses back. Nobody may touch the table any more."""
        if self._address:
            _libc.munmap(self._address, RESERVED_BYTES)
            self._address = 0

    def _aligned(self, block: int) -> int:
        return -(-block // self._blocks_apart) * self._blocks_apart

    @staticmethod
    def _map_pool(address: int, size_bytes: int, fd: int) -> None:
        _map(address, size_bytes, mmap.PROT_READ | mmap.PROT_WRITE, kind_of_mapping(fd) | _FIXED, fd)


def kind_of_mapping(fd: int) -> int:
    """How to map a pool: with all of its pages at once if they are there; those that are not come as they are used."""
    status = os.fstat(fd)
    is_resident = status.st_blocks * _STAT_BLOCK_BYTES >= status.st_size
    return mmap.MAP_SHARED | (mmap.MAP_POPULATE if is_resident else 0)


def memory_at(address: int, size_bytes: int) -> memoryview:
    """Writable bytes at an address, which must stay mapped as long as somebody looks at them."""
    return memoryview((ctypes.c_uint8 * size_bytes).from_address(address)).cast("B")


def _map(address: int, size_bytes: int, protection: int, kind: int, fd: int) -> int:
    mapped: int | None = _libc.mmap(address, size_bytes, protection, kind, fd, 0)
    if mapped is None or mapped == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    if address and mapped != address:
        raise HandoffError(f"asked to map at {address:#x}, the system mapped at {mapped:#x}")
    return mapped


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
