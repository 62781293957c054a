"""How long the queue is, how fast it moves, and when a caller who was refused should come back."""

from __future__ import annotations


class Admission:
    """Learns how long outputs are and how fast the queue moves."""

    KEEP = 0.95
    """Weight of the past in the moving averages."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self.expected_outputs = 128.0
        """Tokens a request makes, on average so far."""
        self._seconds_between = 0.1
        self._last_dispatch: float | None = None
        self._promised_until = 0.0

    def dispatched(self, now: float) -> None:
        """A request has left the queue for a worker."""
        if self._last_dispatch is not None:
            gap = now - self._last_dispatch
            self._seconds_between = self.KEEP * self._seconds_between + (1 - self.KEEP) * gap
        self._last_dispatch = now

    def finished(self, num_outputs: int) -> None:
        """A request has ended."""
        self.expected_outputs = self.KEEP * self.expected_outputs + (1 - self.KEEP) * num_outputs

    def retry_after(self, now: float) -> float:
        """Seconds until a place in the queue should be free for a caller refused now. Each refused caller is given
        the next place, so that they do not all come back at once."""
        self._promised_until = max(self._promised_until, now) + self._seconds_between
        return max(1.0, self._promised_until - now)
