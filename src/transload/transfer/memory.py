"""A worker's KV pool as bytes that a peer on the same host can map, and a peer's pool mapped here.

Owns the mappings and their file descriptors. Never names anything: a memfd has no path, so the kernel takes it back
with the last process that holds it, SIGKILL included. Knows blocks only by their size.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
import sys

from transload.errors import HandoffError, MachineError
from transload.transfer.layout import KvLayout

if sys.platform == "linux":
    import fcntl

    _SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class KvMemory:
    """The pool of this worker: `num_blocks` blocks of `layout`, zeroed, resident before the first use.

    Raises `MachineError` if the machine has not that much memory.
    """

    def __init__(self, layout: KvLayout, num_blocks: int) -> None:
        if num_blocks < 1:
            raise MachineError(f"a KV pool needs at least one block, got num_blocks={num_blocks}")
        self.layout = layout
        self.num_blocks = num_blocks
        self.size_bytes = num_blocks * layout.block_bytes
        self._fd: int | None = None
        available_bytes = _available_bytes()
        if self.size_bytes > available_bytes:
            # The kernel would rather kill somebody than refuse the pages.
            raise MachineError(
                f"a KV pool of {num_blocks} blocks of {layout.block_bytes} bytes takes "
                f"{self.size_bytes / 2**20:.0f} MiB, {available_bytes / 2**20:.0f} MiB are free; ask for fewer blocks"
            )
        try:
            self._mapping = self._map()
        except (OSError, ValueError, OverflowError) as error:
            self._close_fd()
            raise MachineError(
                f"no memory for a KV pool of {num_blocks} blocks of {layout.block_bytes} bytes "
                f"({self.size_bytes / 2**20:.0f} MiB): {error}; ask for fewer blocks"
            ) from error
        self._buffer = memoryview(self._mapping)

    def _map(self) -> mmap.mmap:
        if sys.platform != "linux":
            return mmap.mmap(-1, self.size_bytes)
        self._fd = os.memfd_create("transload-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        # Allocates every page now: a full machine is an error here and not a SIGBUS in the middle of a step.
        os.posix_fallocate(self._fd, 0, self.size_bytes)
        # A peer that maps this relies on its size, as we rely on the size of the peer's.
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SIZE_SEALS | fcntl.F_SEAL_SEAL)
        return mmap.mmap(self._fd, self.size_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)

    @property
    def fd(self) -> int | None:
        """The memfd to pass to a peer on this host; None where there is no such thing."""
        return self._fd

    @property
    def buffer(self) -> memoryview:
        """All bytes of the pool, writable. A tensor over it keeps the mapping alive."""
        return self._buffer

    def close(self) -> None:
        """Give the memory back; at once, or with the last tensor that still lies in it."""
        self._close_fd()
        with contextlib.suppress(BufferError):
            self._buffer.release()
            self._mapping.close()

    def _close_fd(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class PeerMemory:
    """A peer's pool, mapped into this process once for the life of a link."""

    def __init__(self, fd: int, layout: KvLayout, num_blocks: int) -> None:
        """Takes ownership of `fd`. Raises `HandoffError` if it is not a sealed pool of the size announced."""
        self.num_blocks = num_blocks
        size_bytes = num_blocks * layout.block_bytes
        try:
            _check_pool(fd, size_bytes)
            self._mapping = mmap.mmap(fd, size_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except (OSError, ValueError) as error:
            raise HandoffError(f"cannot map the peer's KV pool of {size_bytes} bytes: {error}") from error
        finally:
            os.close(fd)
        self.buffer = memoryview(self._mapping)

    def close(self) -> None:
        """Unmap. The caller has let go of every view."""
        self.buffer.release()
        self._mapping.close()


def _available_bytes() -> int:
    """What the machine can give without swapping; no limit where it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return sys.maxsize


def _check_pool(fd: int, size_bytes: int) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size != size_bytes:
        raise HandoffError(f"the peer's KV pool is {status.st_size} bytes long, it announced {size_bytes}")
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    if seals & _SIZE_SEALS != _SIZE_SEALS:
        raise HandoffError("the peer's KV pool can still change its size: refused, a write past its end would kill us")
