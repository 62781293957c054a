"""`transload serve` whose workers meet through a proxy that changes a bit now and then: `python -m tests.e2e.proxied
serve ...` with links over TCP. Prints how many bits it has changed when it ends.

The proxy lies before the port on which a decode worker is called, as a broken router would; it knows nothing of frames.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from random import Random
from typing import ClassVar

import msgspec

from transload.cli import main
from transload.runtime.real import RealRuntime
from transload.runtime.remote import RemoteWorker
from transload.runtime.wire import Ready
from transload.server import launch

FLIP_EVERY_BYTES = int(os.environ.get("FLIP_EVERY_BYTES", 1 << 20))
"""On average."""
SEED = int(os.environ.get("FLIP_SEED", 0))
_changed = 0


class Proxy:
    """Passes everything on in both directions; of what callers send it changes bits, at random places."""

    def __init__(self, host: str, port: int, random: Random) -> None:
        self._target = host, port
        self._random = random
        self._listener = socket.create_server((host, 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no callers any more. What has been connected stays so."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:  # closed
                return
            try:
                called = socket.create_connection(self._target)
            except OSError:
                caller.close()
                continue
            for source, target, changes in ((caller, called, True), (called, caller, False)):
                threading.Thread(target=self._pass_on, args=(source, target, changes), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, changes: bool) -> None:
        global _changed
        try:
            while part := bytearray(source.recv(1 << 16)):
                if changes and self._random.random() < len(part) / FLIP_EVERY_BYTES:
                    part[self._random.randrange(len(part))] ^= 1 << self._random.randrange(8)
                    _changed += 1
                    sys.stderr.write(f"changed bits: {_changed}\n")
                    sys.stderr.flush()
                target.sendall(part)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            for sock in (source, target):
                sock.close()


class ThroughProxies(RealRuntime):
    """Tells workers of the proxy's port instead of a decode worker's own."""

    _proxies: ClassVar[dict[str, Proxy]] = {}

    def _joined(self, remote: RemoteWorker, ready: Ready) -> None:
        if remote.plan.role == "decode":
            address = ready.address
            proxy = Proxy(address.host, address.port, Random(f"{SEED}/{remote.name}/{remote.incarnation}"))
            if (old := self._proxies.pop(remote.name, None)) is not None:
                old.close()
            self._proxies[remote.name] = proxy
            address = msgspec.structs.replace(address, port=proxy.port, unix_name="")
            remote.ready = ready = msgspec.structs.replace(ready, address=address)
        super()._joined(remote, ready)


if __name__ == "__main__":
    vars(launch)["RealRuntime"] = ThroughProxies
    sys.exit(main(sys.argv[1:]))
