"""Worker processes out of a fork server, seen from the front end.

Owns the fork server's process and what is known of its children. One that dies is replaced when the next worker is
wanted; its workers live on. What it does itself is in `fork_server.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys

import msgspec

from transload.runtime.fork_server import MAX_WORD_BYTES, Ended, Fork, Forked, NotForked
from transload.runtime.processes import Process, Processes, SeparateProcesses, how_it_ended

ANSWER_SECONDS = 60.0
"""How long the fork server may take to fork, its imports included."""
DEATH_SECONDS = 5.0
"""How long the kernel may take to end a process that was killed."""


def worker_processes() -> Processes:
    """The best way to have worker processes here."""
    return ForkedProcesses() if _has_pidfds() else SeparateProcesses()


def _has_pidfds() -> bool:
    if sys.platform != "linux":
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


class ForkedProcesses:
    """Each one forked when it is wanted."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._starting: dict[int, asyncio.Future[_ForkedProcess]] = {}
        self._running: dict[int, _ForkedProcess] = {}
        self._orphans: set[_ForkedProcess] = set()
        self._server: subprocess.Popen[bytes] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # that hears what the fork server says

    def begin(self) -> None:
        """Start the fork server, so that it imports what workers need from now on."""
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._line.setblocking(False)
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "transload.runtime.fork_server", str(theirs.fileno())],
                # Threads of the libraries that come with torch would not live through a fork; workers set their own.
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    async def start(self, join: str, name: str, token: str) -> Process:
        """See `Processes`."""
        loop = asyncio.get_running_loop()
        if self._server is None:
            self.begin()
        if self._loop is None:
            loop.add_reader(self._line, self._take)
            self._loop = loop
        number, server = next(self._numbers), self._server
        forked: asyncio.Future[_ForkedProcess] = loop.create_future()
        self._starting[number] = forked
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                self._line.send(msgspec.msgpack.encode(Fork(number, join, name, token)))
                return await forked
        except TimeoutError:
            if self._server is server:
                self._lose()
            raise OSError(f"the fork server has not answered for {ANSWER_SECONDS:g} s") from None
        except ConnectionError:
            del self._starting[number]  # nobody waits for it
            raise OSError(self._lose()) from None
        except asyncio.CancelledError:
            if forked.done() and not forked.cancelled() and forked.exception() is None:
                forked.result().kill()  # it came at the same moment
            raise
        finally:
            self._starting.pop(number, None)

    def close(self) -> None:
        """See `Processes`."""
        if self._server is not None:
            self._lose()
        for orphan in list(self._orphans):
            self._orphan_ended(orphan)

    def _take(self) -> None:
        """A word of the fork server."""
        try:
            word, pidfds, _, _ = socket.recv_fds(self._line, MAX_WORD_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except ConnectionError:
            word = b""
        if not word:
            self._lose()
            return
        match msgspec.msgpack.decode(word, type=Forked | NotForked | Ended):
            case Forked(number, pid):
                process = self._running[number] = _ForkedProcess(pid, pidfds[0])
                if (forked := self._starting.pop(number, None)) is not None and not forked.done():
                    forked.set_result(process)
                else:
                    process.kill()  # nobody waits for it any more
            case NotForked(number, reason):
                if (forked := self._starting.pop(number, None)) is not None and not forked.done():
                    forked.set_exception(OSError(reason))
            case Ended(number, code):
                self._running.pop(number).end(how_it_ended(code))

    def _lose(self) -> str:
        """The fork server is gone, or shall be. Its children live on, and their pidfds tell when they end. Returns what
        became of it, in words."""
        assert self._server is not None
        loop = self._loop
        if loop is not None:
            loop.remove_reader(self._line)
        self._line.close()
        self._server.kill()
        what = f"the fork server {how_it_ended(self._server.wait(DEATH_SECONDS))}"
        self._server = self._loop = None
        for forked in self._starting.values():
            if not forked.done():
                forked.set_exception(OSError(what))
        self._starting.clear()
        if loop is not None and not loop.is_closed():
            for process in self._running.values():
                self._orphans.add(process)
                loop.add_reader(process.pidfd, self._orphan_ended, process)
        self._running.clear()
        return what

    def _orphan_ended(self, process: _ForkedProcess) -> None:
        self._orphans.discard(process)
        asyncio.get_running_loop().remove_reader(process.pidfd)
        process.end("has ended")


class _ForkedProcess:
    """A child of the fork server. Killed by its pidfd, which can mean no other process, as a pid could."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def kill(self) -> None:
        if not self._ended.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    async def ended(self) -> str:
        return await asyncio.shield(self._ended)

    def end(self, how: str) -> None:
        """It is known to have ended."""
        self._ended.set_result(how)
        os.close(self.pidfd)
