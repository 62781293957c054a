"""Where a worker can be reached: an abstract Unix socket for its host, a TCP port for the rest.

Owns the listening sockets and the thread that accepts. Never reads a byte: each caller's socket goes to `greet`.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
from collections.abc import Callable

import msgspec

from transload.control.messages import WorkerId
from transload.errors import HandoffError


class PeerAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where and as whom a worker listens; goes through the controller to the other workers."""

    worker: WorkerId
    incarnation: int
    host_id: str
    """Equal on one running kernel, different elsewhere; "" where unknown."""
    unix_name: str
    """Of an abstract Unix socket; "" if memory cannot be shared."""
    host: str
    """IP address."""
    port: int
    layout_digest: bytes


Greet = Callable[[socket.socket, bool], None]


class Listener:
    """Both listening sockets, open from the start; nobody is let in before `start`."""

    def __init__(
        self,
        *,
        me: WorkerId,
        bind_host: str,
        advertise_host: str | None,
        shares_memory: bool,
    ) -> None:
        host = resolve(bind_host)
        self.host = resolve(advertise_host or bind_host)
        if self.host in ("0.0.0.0", "::"):
            raise HandoffError(f"KV links listen on {bind_host}: say under which address others reach this host")
        self._tcp = socket.create_server((host, 0), family=family_of(host), backlog=128)
        self.port: int = self._tcp.getsockname()[1]
        self.unix_name = ""
        self._unix: socket.socket | None = None
        if shares_memory and sys.platform == "linux":
            self.unix_name = f"transload-{me[:40]}-{os.getpid()}-{os.urandom(8).hex()}"
            self._unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._unix.bind("\0" + self.unix_name)
            self._unix.listen(128)
        self._wake, self._woken = socket.socketpair()
        self._thread: threading.Thread | None = None

    def start(self, greet: Greet) -> None:
        """Accept callers. `greet(sock, one_sided)` takes the socket over; it must not block."""
        self._thread = threading.Thread(target=self._run, args=(greet,), name="kv-accept", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop accepting. Returns when the thread has ended, which waits for nobody."""
        self._wake.close()
        if self._thread is not None:
            self._thread.join()
        self._woken.close()
        self._tcp.close()
        if self._unix is not None:
            self._unix.close()

    def _run(self, greet: Greet) -> None:
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        listeners = {sock.fileno(): sock for sock in (self._tcp, self._unix) if sock is not None}
        for sock in listeners.values():
            sock.setblocking(False)
            poll.register(sock, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == self._woken.fileno():
                    return
                try:
                    accepted, _ = listeners[fd].accept()
                except OSError:
                    continue  # it hung up again, or this process is out of descriptors
                greet(accepted, listeners[fd] is self._unix)


def resolve(host: str) -> str:
    """The IP address of a host name. Raises `HandoffError` if there is none."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise HandoffError(f"KV links cannot listen on {host!r}: {error}") from error


def family_of(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def host_id() -> str:
    """The kernel's boot id."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""
