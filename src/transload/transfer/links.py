"""All KV links of one worker, as the worker process sees them.

Takes the engine's commands, gives its events back through `deliver`, and owns every thread, socket and mapping behind
that. Decides nothing about a transfer: the engine does, here only bytes move, permissions hold and checksums are made.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

import msgspec

from transload.control.messages import CancelSends, ExpectKv, ForgetKv, LinkMeasured, SendFrame, SendsDrained, WorkerId
from transload.errors import HandoffError
from transload.transfer.arena import Window
from transload.transfer.cells import Cells
from transload.transfer.gauge import LinkStats
from transload.transfer.hello import Hello, LinkRefused
from transload.transfer.layout import KvLayout
from transload.transfer.link import Deliver, Link, LinkOptions
from transload.transfer.listener import Listener, PeerAddress, host_id
from transload.transfer.meeting import Attempt, Meeting, TransportChoice
from transload.transfer.memory import KvMemory, PeerMemory
from transload.transfer.permits import Permits
from transload.transfer.registry import Registry

_MAX_CALLERS = 64  # that have not proved themselves yet: each costs a thread
_MIN_SECRET_BYTES = 16


class LinkFailed(msgspec.Struct, frozen=True):
    """A link that did not come up, or that ended because of an error. `peer` is None for a caller without a name."""

    peer: WorkerId | None
    reason: str


class _Dial:
    """Where a peer is being dialed."""

    def __init__(self, address: PeerAddress, transport: TransportChoice, attempt: Attempt) -> None:
        self.address = address
        self.transport = transport
        self.attempt = attempt


class Links:
    """See the module. Everything but `measure` and `close` returns at once.

    `deliver` and `report` are called from threads of the transport, one event after the other for each peer; they must
    not block and not raise.
    """

    def __init__(
        self,
        *,
        me: WorkerId,
        incarnation: int,
        layout: KvLayout,
        memory: KvMemory,
        secret: bytes,
        deliver: Deliver,
        report: Callable[[LinkFailed], None],
        bind_host: str = "127.0.0.1",
        advertise_host: str | None = None,
        options: LinkOptions | None = None,
    ) -> None:
        """`secret` is shared by the cluster's workers, 16 bytes or more. `advertise_host` is needed if `bind_host` is a
        wildcard. Raises `HandoffError` if that does not hold or the host cannot be listened on."""
        if len(secret) < _MIN_SECRET_BYTES:
            raise HandoffError(f"the cluster's secret has {len(secret)} bytes, it needs at least {_MIN_SECRET_BYTES}")
        self._me = me
        self._deliver = deliver
        self._report = report
        self._options = options or LinkOptions()
        self._cells = Cells(memory.buffer, layout, memory.num_blocks, memory.kernels)
        self._permits = Permits(memory.num_blocks)
        self._registry = Registry(me)
        self._lock = threading.Lock()
        self._closed = False
        self._dials: dict[WorkerId, _Dial] = {}
        self._attempts: set[Attempt] = set()
        self._num_callers = 0
        self._listener = Listener(
            me=me, bind_host=bind_host, advertise_host=advertise_host, shares_memory=memory.fd is not None
        )
        self.address = PeerAddress(
            worker=me,
            incarnation=incarnation,
            host_id=host_id(),
            unix_name=self._listener.unix_name,
            host=self._listener.host,
            port=self._listener.port,
            layout_digest=layout.digest,
        )
        self._meeting = Meeting(
            address=self.address,
            memory=memory,
            secret=secret,
            registry=self._registry,
            make_link=self._make_link,
            options=self._options,
        )
        self._listener.start(self._greet)

    # ----- the engine's commands

    def send(self, command: SendFrame) -> None:
        """Queue a frame on the link that it is for. If that has ended it is dropped: `PeerLost` has said so, or will.
        Raises `HandoffError` for a frame whose cells do not exist."""
        link = self._find(command)
        if link is not None:
            link.send(command)

    def cancel_sends(self, command: CancelSends) -> None:
        """Drop the transfer's waiting data. `SendsDrained` follows once, in every case."""
        link = self._find(command)
        if link is not None:
            link.cancel(command)
        else:
            self._deliver(SendsDrained(command.transfer, command.epoch))

    def _find(self, command: SendFrame | CancelSends) -> Link | None:
        link = self._registry.find(command.peer)
        return link if link is not None and link.number == command.link else None

    def expect(self, command: ExpectKv) -> None:
        """Let a transfer in. Raises `HandoffError` for blocks that are not in the pool."""
        self._permits.grant(command)

    def forget(self, command: ForgetKv) -> None:
        """When this returns, no receiver thread writes for the transfer any more."""
        self._permits.revoke(command)

    # ----- links

    def connect(self, peer: WorkerId, address: PeerAddress, transport: TransportChoice = "auto") -> None:
        """Dial in the background: `PeerUp` follows, or `report`. A link or dial to this address stays as it is."""
        with self._lock:
            if self._closed:
                raise HandoffError(f"{self._me} dials {peer} after its links were closed")
            link, dial = self._registry.find(peer), self._dials.get(peer)
            if link is not None and link.is_open() and link.incarnation >= address.incarnation:
                return
            if dial is not None:
                if (dial.address, dial.transport) == (address, transport):
                    return
                dial.attempt.cancel()
            attempt = Attempt(f"kv-dial-{peer}", lambda attempt: self._run_dial(peer, address, transport, attempt))
            self._dials[peer] = _Dial(address, transport, attempt)
            self._registry.begin_dial(peer)
            self._attempts.add(attempt)
            attempt.start()

    def disconnect(self, peer: WorkerId) -> None:
        """End the link to a peer, or the dial. `PeerLost` follows if it was up."""
        with self._lock:
            dial = self._dials.pop(peer, None)
        if dial is not None:
            dial.attempt.cancel()
        link = self._registry.find(peer)
        if link is not None:
            link.fail(None)

    def windows(self) -> list[Window]:
        """Those of the links that have not ended: where steps can work in a peer's blocks."""
        return [link.window for link in self._registry.all() if link.window is not None]

    def stats(self) -> list[LinkStats]:
        """One entry per link that has not ended."""
        return [link.stats() for link in self._registry.all()]

    def measure(self, peer: WorkerId, timeout_seconds: float = 1.0) -> LinkMeasured | None:
        """Ask the peer for a sign of life: its delay now, and the speed of the transfers so far (0.0 before the first).
        None without a link, or without an answer in time. Blocks; one caller at a time."""
        link = self._registry.find(peer)
        latency_seconds = link.ping(timeout_seconds) if link is not None else None
        if link is None or latency_seconds is None:
            return None
        stats = link.stats()
        return LinkMeasured(self._me, peer, stats.transport, stats.sent.bytes_per_second, latency_seconds)

    def close(self, timeout_seconds: float = 5.0) -> None:
        """End everything and join every thread. A peer that shares our memory has `timeout_seconds` to let go of it;
        for one that does not, no `PeerLost` is delivered."""
        deadline = time.monotonic() + timeout_seconds
        with self._lock:
            self._closed = True
            attempts = list(self._attempts)
        self._registry.close()
        self._listener.close()
        for attempt in attempts:
            attempt.cancel()
        for attempt in attempts:
            attempt.join()
        links = self._registry.all()
        for link in links:
            link.fail(None)
        for link in links:
            if not link.ended.wait(max(0.0, deadline - time.monotonic())):
                link.abandon()
            link.join()
        self._cells.release()

    # ----- threads that bring links up

    def _run_dial(self, peer: WorkerId, address: PeerAddress, transport: TransportChoice, attempt: Attempt) -> None:
        failed: LinkFailed | None = None
        try:
            self._meeting.dial(attempt, address, transport)
        except (OSError, HandoffError) as error:
            if not attempt.cancelled.is_set():
                failed = LinkFailed(peer, f"no link from {self._me} to {peer} over {transport}: {error}")
        finally:
            self._registry.end_dial(peer)
            with self._lock:
                self._attempts.discard(attempt)
                dial = self._dials.get(peer)
                if dial is not None and dial.attempt is attempt:
                    del self._dials[peer]
        if failed is not None:
            self._report(failed)

    def _greet(self, sock: socket.socket, one_sided: bool) -> None:
        with self._lock:
            turned_away = self._num_callers >= _MAX_CALLERS
            if not turned_away and not self._closed:
                attempt = Attempt("kv-greet", lambda attempt: self._run_answer(sock, one_sided, attempt))
                attempt.hold(sock)
                self._num_callers += 1
                self._attempts.add(attempt)
                attempt.start()
                return
        sock.close()
        if turned_away:
            self._report(LinkFailed(None, f"{self._me} turned a caller away: {_MAX_CALLERS} handshakes are under way"))

    def _run_answer(self, sock: socket.socket, one_sided: bool, attempt: Attempt) -> None:
        failed: LinkFailed | None = None
        try:
            self._meeting.answer(attempt, sock, one_sided)
        except LinkRefused as error:
            if not error.is_quiet:
                failed = LinkFailed(error.peer, str(error))
        except (OSError, HandoffError) as error:
            if not attempt.cancelled.is_set():
                failed = LinkFailed(None, f"{self._me} gave up on a caller: {error}")
        finally:
            with self._lock:
                self._num_callers -= 1
                self._attempts.discard(attempt)
        if failed is not None:
            self._report(failed)

    def _make_link(self, peer: Hello, sock: socket.socket, peer_memory: PeerMemory | None) -> Link:
        return Link(
            peer=peer.worker,
            incarnation=peer.incarnation,
            sock=sock,
            cells=self._cells,
            peer_memory=peer_memory,
            permits=self._permits,
            deliver=self._deliver,
            report=lambda name, reason: self._report(LinkFailed(name, reason)),
            options=self._options,
        )
