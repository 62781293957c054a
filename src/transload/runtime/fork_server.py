"""The process that workers are forked from, so that what all of them import is imported once.

    front end --Fork--> [ fork server ] --fork--> a worker process
              <--Forked, NotForked, Ended--

Importing torch takes longer than loading a small model. Here it happens once a server and not once a worker, beside the
front end's own imports; a worker that is started again is there at once; what was imported lies in memory once. The
front end's side is `forks.py`.

Owns the exit codes of the workers, being their parent. Computes nothing, starts no thread and touches no device: a fork
would get half of it. Ends when its front end does.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import msgspec

from transload.control.messages import Message

MAX_WORD_BYTES = 1 << 16
Work = Callable[[str, str, str], int]
"""(join, name, token) -> exit code: what a worker process does."""


class Fork(Message, frozen=True):
    """Become this worker in a process of its own; answered by `Forked` or `NotForked`."""

    number: int
    """Of this order; what comes of it carries it."""
    join: str
    name: str
    token: str


class Forked(Message, frozen=True):
    """It runs. With this word comes a pidfd of it."""

    number: int
    pid: int


class NotForked(Message, frozen=True):
    """There can be no process now."""

    number: int
    reason: str


class Ended(Message, frozen=True):
    """It runs no more."""

    number: int
    code: int
    """Exit code, or minus the signal that killed it."""


class _ForkServer:
    def __init__(self, line: socket.socket, work: Work) -> None:
        self._line = line
        self._work = work
        self._children: dict[int, tuple[int, int]] = {}  # by pidfd: number of the order, pid
        self._poll = select.poll()
        self._poll.register(line, select.POLLIN)

    def run(self) -> None:
        """Until the front end is gone. Raises `ConnectionError` if that shows when something is said to it."""
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor != self._line.fileno():
                    self._reap(descriptor)
                elif word := self._line.recv(MAX_WORD_BYTES):
                    self._fork(msgspec.msgpack.decode(word, type=Fork))
                else:
                    return

    def _fork(self, order: Fork) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            self._say(NotForked(order.number, error.strerror or str(error)))
            return
        if pid == 0:
            self._become(order)
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = order.number, pid
        self._poll.register(pidfd, select.POLLIN)
        self._say(Forked(order.number, pid), pidfd)

    def _become(self, order: Fork) -> None:
        """Be that worker, and never return."""
        code = 1
        try:
            self._line.close()
            for pidfd in self._children:
                os.close(pidfd)
            os.setsid()
            with contextlib.suppress(OSError):
                Path("/proc/self/comm").write_text(order.name)  # what `ps` and `top` call it
            code = self._work(order.join, order.name, order.token)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _reap(self, pidfd: int) -> None:
        number, pid = self._children.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        self._say(Ended(number, os.waitstatus_to_exitcode(status)))

    def _say(self, word: Message, *descriptors: int) -> None:
        socket.send_fds(self._line, [msgspec.msgpack.encode(word)], descriptors)


def main(descriptor: int) -> None:
    """Serve the front end at the other end of a socket."""
    gc.disable()  # a third of the time would go into looking for garbage among modules
    import transload.model.load  # noqa: F401 (brings torch: what this process is for)
    from transload.runtime.worker import main as work

    gc.freeze()  # or each worker's first collection would touch all of it, and so copy it
    gc.enable()
    with contextlib.suppress(ConnectionError), socket.socket(fileno=descriptor) as line:
        _ForkServer(line, work).run()
    os._exit(0)  # nothing was begun that would have to end


if __name__ == "__main__":
    main(int(sys.argv[1]))
