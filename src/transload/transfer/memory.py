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
from transload.transfer.arena import Arena, Window, kind_of_mapping
from transload.transfer.cells import CellKernels
from transload.transfer.layout import KvLayout

if sys.platform == "linux":
    import fcntl

    _SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class KvMemory:
    """The pool of this worker: `num_blocks` blocks of `layout`, zeroed.

    `with_windows`: make room for the pools of peers beside it, if the system has addresses for that; then steps work in
    `table`. One that is not `shared` has no peers: it takes memory as it is used, in large pages where the kernel has
    some. One that is not `resident` takes memory as it is used too: no peer writes there. Raises `MachineError` if the
    machine has not that much memory.
    """

    def __init__(
        self,
        layout: KvLayout,
        num_blocks: int,
        *,
        with_windows: bool = False,
        shared: bool = True,
        resident: bool = True,
    ) -> None:
        if num_blocks < 1:
            raise MachineError(f"a KV pool needs at least one block, got num_blocks={num_blocks}")
        self.layout = layout
        self.num_blocks = num_blocks
        self.size_bytes = num_blocks * layout.block_bytes
        self.kernels: CellKernels | None = None
        """What copies and sums its cells faster than numpy, set by who has it before links are made."""
        self._fd: int | None = None
        available_bytes = _available_bytes()
        if self.size_bytes > available_bytes:
            # The kernel would rather kill somebody than refuse the pages.
            raise MachineError(
                f"a KV pool of {num_blocks} blocks of {layout.block_bytes} bytes takes "
                f"{self.size_bytes / 2**20:.0f} MiB, {available_bytes / 2**20:.0f} MiB are free; ask for fewer blocks"
            )
        self.arena: Arena | None = None
        """Where the pools of peers are to be found beside this one; None: nowhere."""
        self._mapping: mmap.mmap | None = None
        try:
            self._buffer = self._map(with_windows, resident) if shared else self._map_alone()
        except (OSError, ValueError, OverflowError) as error:
            self._close_fd()
            raise MachineError(
                f"no memory for a KV pool of {num_blocks} blocks of {layout.block_bytes} bytes "
                f"({self.size_bytes / 2**20:.0f} MiB): {error}; ask for fewer blocks"
            ) from error

    def _map(self, with_windows: bool, resident: bool) -> memoryview:
        if sys.platform != "linux":
            self._mapping = mmap.mmap(-1, self.size_bytes)
            return memoryview(self._mapping)
        self._fd = os.memfd_create("transload-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        if resident:
            # Allocates every page now: a full machine is an error here and not a SIGBUS in the middle of a step.
            os.posix_fallocate(self._fd, 0, self.size_bytes)
        else:
            os.ftruncate(self._fd, self.size_bytes)
        # A peer that maps this relies on its size, as we rely on the size of the peer's.
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SIZE_SEALS | fcntl.F_SEAL_SEAL)
        if with_windows:
            try:
                self.arena = Arena(self._fd, self.layout.block_bytes, self.num_blocks)
            except OSError:
                pass  # a limit on addresses: cells are copied then
            else:
                return self.arena.buffer[: self.size_bytes]
        self._mapping = mmap.mmap(self._fd, self.size_bytes, kind_of_mapping(self._fd))
        return memoryview(self._mapping)

    def _map_alone(self) -> memoryview:
        if sys.platform != "linux":
            return self._map(False, resident=True)
        self._mapping = mmap.mmap(-1, self.size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without large pages
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        return memoryview(self._mapping)

    @property
    def fd(self) -> int | None:
        """The memfd to pass to a peer on this host; None where there is no such thing, or nobody to pass it to."""
        return self._fd

    @property
    def buffer(self) -> memoryview:
        """All bytes of the pool, writable. A tensor over it keeps the mapping alive, but not one with windows."""
        return self._buffer

    @property
    def table(self) -> memoryview:
        """All blocks that steps can work in: the pool, and windows as they are opened."""
        return self._buffer if self.arena is None else self.arena.buffer

    def close(self) -> None:
        """Give the memory back; at once, or with the last tensor that still lies in it. With windows always at once:
        nobody may touch it any more."""
        self._close_fd()
        with contextlib.suppress(BufferError):
            self._buffer.release()
            if self._mapping is not None:
                self._mapping.close()
        if self.arena is not None:
            self.arena.close()

    def _close_fd(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class PeerMemory:
    """A peer's pool, mapped into this process once for the life of a link."""

    def __init__(self, fd: int, layout: KvLayout, num_blocks: int, arena: Arena | None = None) -> None:
        """Takes ownership of `fd`. `arena`: open a window for it there. Raises `HandoffError` if it is not a sealed
        pool of the size announced."""
        self.num_blocks = num_blocks
        self.window: Window | None = None
        """Where our steps can work in it; None: they cannot."""
        self._mapping: mmap.mmap | None = None
        size_bytes = num_blocks * layout.block_bytes
        try:
            _check_pool(fd, size_bytes)
            if arena is not None:
                self.window = arena.open_window(fd, num_blocks)
            if self.window is None:
                self._mapping = mmap.mmap(fd, size_bytes, kind_of_mapping(fd))
        except (OSError, ValueError) as error:
            raise HandoffError(f"cannot map the peer's KV pool of {size_bytes} bytes: {error}") from error
        finally:
            os.close(fd)
        self.buffer = self.window.buffer if self.window is not None else memoryview(self._mapping or b"")

    def close(self) -> None:
        """Unmap. The caller has let go of every view; steps that work in the window go on in nobody's memory."""
        if self.window is not None:
            self.window.close()  # first: nobody may write there any more, whoever still looks
        with contextlib.suppress(BufferError):
            self.buffer.release()
            if self._mapping is not None:
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
