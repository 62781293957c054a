"""How two workers meet: from an address, or from an accepted socket, to a link that is registered and runs.

Owns the socket and the memory that changes hands until the link has them. Every step has a deadline; whatever goes
wrong is raised on this side and, where the peer still listens, told to it.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Literal

from transload.control.messages import WorkerId
from transload.errors import HandoffError
from transload.transfer.hello import Handshake, Hello, LinkRefused, Refusal
from transload.transfer.link import Link, LinkOptions
from transload.transfer.listener import PeerAddress, family_of
from transload.transfer.memory import KvMemory, PeerMemory
from transload.transfer.registry import Registry
from transload.transfer.wire import tune_tcp

TransportChoice = Literal["auto", "direct", "shm", "tcp"]
"""direct: steps work in the peer's blocks; shm: cells are copied there; auto: the first of all that is possible."""
_RETRY_SECONDS = 0.05


class Attempt:
    """A thread that tries to bring one link up. `cancel` ends it at its next step, a blocking one included."""

    def __init__(self, name: str, run: Callable[[Attempt], None]) -> None:
        self.cancelled = threading.Event()
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self._thread = threading.Thread(target=run, args=(self,), name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def hold(self, sock: socket.socket) -> None:
        """From now on this is the socket that `cancel` shuts."""
        with self._lock:
            self._sock = sock
            if self.cancelled.is_set():
                _shut(sock)

    def let_go(self) -> None:
        """The socket belongs to a link, or is closed."""
        with self._lock:
            self._sock = None

    def cancel(self) -> None:
        self.cancelled.set()
        with self._lock:
            if self._sock is not None:
                _shut(self._sock)


class Meeting:
    """Dials and answers for one worker."""

    def __init__(
        self,
        *,
        address: PeerAddress,
        memory: KvMemory,
        secret: bytes,
        registry: Registry,
        make_link: Callable[[Hello, socket.socket, PeerMemory | None], Link],
        options: LinkOptions,
    ) -> None:
        self._address = address
        self._memory = memory
        self._secret = secret
        self._registry = registry
        self._make_link = make_link
        self._options = options

    def dial(self, attempt: Attempt, address: PeerAddress, transport: TransportChoice) -> None:
        """Returns when there is a link to that worker, or nobody wants one any more. Raises `HandoffError` or
        `OSError`."""
        deadline = time.monotonic() + self._options.handshake_seconds
        while not attempt.cancelled.is_set():
            try:
                return self._dial_once(attempt, address, transport, deadline)
            except LinkRefused as refused:
                # The peer knows of a link that we do not have: one of its dials, or one whose end it has not seen yet.
                if not refused.is_quiet or time.monotonic() + _RETRY_SECONDS > deadline:
                    raise
            current = self._registry.find(address.worker)
            if current is not None and current.is_open() and current.incarnation == address.incarnation:
                return None
            attempt.cancelled.wait(_RETRY_SECONDS)
        return None

    def answer(self, attempt: Attempt, sock: socket.socket, one_sided: bool) -> None:
        """Shake hands with a caller and start the link. Raises `HandoffError`, `OSError`."""
        deadline = time.monotonic() + self._options.handshake_seconds
        handshake = Handshake(sock, self._hello(one_sided), self._secret, deadline)
        with self._cleanup(attempt, sock, handshake):
            tune_tcp(sock, self._options.silence_seconds)
            peer = handshake.accept()
            link = self._make_link(peer, sock, self._map(handshake, peer, in_place=True))
            link.name = handshake.link_name
            # Half the time, so that the dialer, who began earlier, still hears why not.
            patience = deadline - self._options.handshake_seconds / 2
            refusal = self._registry.register(link, dialed=False, deadline=patience)
            if refusal is None:
                self._open(attempt, link, lambda: handshake.welcome(self._memory.fd if one_sided else None))
            else:
                refused = handshake.refuse(refusal)
                link.discard()
                raise refused

    def _dial_once(self, attempt: Attempt, address: PeerAddress, transport: TransportChoice, deadline: float) -> None:
        sock, one_sided = self._reach(attempt, address, transport, deadline)
        hello = self._hello(one_sided, address.worker, address.incarnation, in_place=transport in ("auto", "direct"))
        handshake = Handshake(sock, hello, self._secret, deadline)
        with self._cleanup(attempt, sock, handshake):
            peer = handshake.dial(self._memory.fd if one_sided else None)
            link = self._make_link(peer, sock, self._map(handshake, peer, in_place=hello.in_place))
            link.name = handshake.link_name
            refusal = self._registry.register(link, dialed=True, deadline=deadline)
            if refusal is None:
                self._open(attempt, link, lambda: None)
            else:
                link.discard()
                raise LinkRefused(f"{self._address.worker} drops its dial to {address.worker}: {refusal}", refusal)

    def _open(self, attempt: Attempt, link: Link, last_word: Callable[[], None]) -> None:
        """The link is registered: once started, its own threads end it."""
        try:
            last_word()
            attempt.let_go()
            link.start()
        except BaseException:
            link.discard()
            raise

    @contextlib.contextmanager
    def _cleanup(self, attempt: Attempt, sock: socket.socket, handshake: Handshake) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            attempt.let_go()
            sock.close()
            if isinstance(error, TimeoutError):
                seconds = self._options.handshake_seconds
                raise HandoffError(f"the handshake was not over within {seconds:g} s") from None
            raise
        finally:
            handshake.close()

    def _map(self, handshake: Handshake, peer: Hello, *, in_place: bool) -> PeerMemory | None:
        if not peer.one_sided:
            return None
        arena = self._memory.arena if in_place and peer.in_place else None
        try:
            return PeerMemory(handshake.take_fd(), self._memory.layout, peer.num_blocks, arena)
        except LinkRefused:
            raise
        except HandoffError as error:
            raise handshake.refuse(Refusal("memory", str(error), "a KV pool")) from error

    def _hello(
        self, one_sided: bool, peer: WorkerId | None = None, peer_incarnation: int = 0, *, in_place: bool = True
    ) -> Hello:
        return Hello(
            worker=self._address.worker,
            incarnation=self._address.incarnation,
            peer=peer,
            peer_incarnation=peer_incarnation,
            layout_digest=self._address.layout_digest,
            num_blocks=self._memory.num_blocks,
            one_sided=one_sided,
            in_place=in_place and one_sided and self._memory.arena is not None,
        )

    def _reach(
        self, attempt: Attempt, address: PeerAddress, transport: TransportChoice, deadline: float
    ) -> tuple[socket.socket, bool]:
        """A connected socket, and whether the link over it is one-sided."""
        me = self._address
        shares_memory = bool(me.unix_name and address.unix_name) and me.host_id == address.host_id != ""
        if transport in ("direct", "shm") and not shares_memory:
            raise HandoffError(
                f"{transport} needs two workers on one Linux host: {me.worker} is on {me.host_id or 'an unknown one'}, "
                f"{address.worker} on {address.host_id or 'an unknown one'}; use tcp or auto"
            )
        if transport != "tcp" and shares_memory:
            try:
                return self._connect(attempt, socket.AF_UNIX, "\0" + address.unix_name, deadline), True
            except ConnectionRefusedError:
                # One kernel, but not one network namespace: the name is not known here. Or nobody lives there any more.
                if transport != "auto":
                    raise
        target = address.host, address.port
        return self._connect(attempt, family_of(address.host), target, deadline), False

    def _connect(
        self, attempt: Attempt, family: socket.AddressFamily, target: str | tuple[str, int], deadline: float
    ) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM)
        attempt.hold(sock)
        try:
            tune_tcp(sock, self._options.silence_seconds)
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            sock.connect(target)
        except BaseException:
            attempt.let_go()
            sock.close()
            raise
        return sock


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # not connected yet, or not any more
        sock.shutdown(socket.SHUT_RDWR)
