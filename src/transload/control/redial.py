"""When to dial a peer again whose link has ended although nobody has said that the peer is gone.

Owns the pauses, which double from dial to dial. Never dials, and keeps no time: its driver waits.
"""

from __future__ import annotations

from transload.control.messages import WorkerId

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0


class Redial:
    """The peers that this worker was told to dial."""

    def __init__(self) -> None:
        self._pauses: dict[WorkerId, float] = {}
        self._pending: set[WorkerId] = set()

    def wanted(self, peer: WorkerId) -> None:
        """We were told to dial it, at an address that holds from now on."""
        self._pauses[peer] = FIRST_PAUSE_SECONDS
        self._pending.discard(peer)

    def up(self, peer: WorkerId) -> None:
        """The link is open, whoever dialed."""
        if peer in self._pauses:
            self.wanted(peer)

    def down(self, peer: WorkerId) -> float | None:
        """The link has ended, or a dial has failed. Seconds until the next dial; None if there is none to wait for:
        the peer dials us, or a dial is due already."""
        pause = self._pauses.get(peer)
        if pause is None or peer in self._pending:
            return None
        self._pending.add(peer)
        self._pauses[peer] = min(2 * pause, LONGEST_PAUSE_SECONDS)
        return pause

    def due(self, peer: WorkerId) -> bool:
        """A pause is over. Whether to dial now: not if the link has come up meanwhile."""
        if peer not in self._pending:
            return False
        self._pending.remove(peer)
        return True
