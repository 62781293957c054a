"""Which link to a peer is the current one.

Between two workers there is at most one link; a new one takes its place only when the one before has delivered its
`PeerLost`. If two workers dial each other at once, the dial of the one whose name sorts first wins. Owns this rule and
nothing else: it opens and closes no socket.
"""

from __future__ import annotations

import threading
import time

from transload.control.messages import WorkerId
from transload.transfer.hello import CROSSED, LINKED, Refusal
from transload.transfer.link import Link


class Registry:
    """The links of one worker, by peer. Thread-safe."""

    def __init__(self, me: WorkerId) -> None:
        self._me = me
        self._lock = threading.Lock()
        self._closed = False
        self._links: dict[WorkerId, Link] = {}
        self._num_links: dict[WorkerId, int] = {}  # so far, by peer
        self._dialed: dict[WorkerId, int] = {}  # dials under way, by peer

    def find(self, peer: WorkerId) -> Link | None:
        """The link to a peer, until its last event has been delivered."""
        with self._lock:
            return self._live(peer)

    def all(self) -> list[Link]:
        """Every link that has not ended."""
        with self._lock:
            return [link for link in self._links.values() if not link.ended.is_set()]

    def begin_dial(self, peer: WorkerId) -> None:
        with self._lock:
            self._dialed[peer] = self._dialed.get(peer, 0) + 1

    def end_dial(self, peer: WorkerId) -> None:
        with self._lock:
            self._dialed[peer] -= 1
            if not self._dialed[peer]:
                del self._dialed[peer]

    def register(self, link: Link, *, dialed: bool, deadline: float) -> Refusal | None:
        """Make this the current link to its peer, once the one before it has ended; or say why not."""
        while True:
            with self._lock:
                current = self._live(link.peer)
                refusal = self._objection(link, current, dialed=dialed)
                if refusal is not None:
                    return refusal
                if current is None:
                    link.number = self._num_links.get(link.peer, 0)
                    self._num_links[link.peer] = link.number + 1
                    self._links[link.peer] = link
                    return None
            current.fail(None)
            if not current.ended.wait(max(0.0, deadline - time.monotonic())):
                return Refusal("link", f"incarnation {link.incarnation}", f"{current.incarnation} to let go of memory")

    def close(self) -> None:
        """Register nothing any more."""
        with self._lock:
            self._closed = True

    def _live(self, peer: WorkerId) -> Link | None:
        link = self._links.get(peer)
        return link if link is not None and not link.ended.is_set() else None

    def _objection(self, link: Link, current: Link | None, *, dialed: bool) -> Refusal | None:
        if self._closed:
            return Refusal("link", "a new one", "none: this worker shuts down")
        if not dialed and link.peer in self._dialed and self._me < link.peer:
            return Refusal(CROSSED, f"a dial by {link.peer}", f"the dial by {self._me}")
        if current is None:
            return None
        if current.incarnation > link.incarnation:
            return Refusal("incarnation", str(link.incarnation), f"{current.incarnation} or later")
        if current.incarnation == link.incarnation and current.is_open():
            return Refusal(LINKED, "another link", "one a pair")
        return None
