"""How fast the queue moves, how much its requests will make, and when a caller who was refused should come back."""

from __future__ import annotations

LONGEST_RETRY_SECONDS = 60.0
"""A caller is never told to stay away longer: most who were refused do not come back, but the promises add up."""


class Admission:
    """Learns how long outputs are and how fast the queue moves."""

    KEEP = 0.95
    """Weight of the past in the moving averages."""

    def __init__(self) -> None:
        self.expected_outputs = 128.0
        """Tokens a request makes, on average so far."""
        self._seconds_between = 0.1
        self._last_dispatch: float | None = None
        self._promised_until = 0.0

    def dispatched(self, waiting_since: float, now: float) -> None:
        """A request has left the queue for a worker. It tells how fast the queue moves if it stood in it when the one
        before left; otherwise only how seldom requests come."""
        last, self._last_dispatch = self._last_dispatch, now
        if last is not None and waiting_since < last:
            self._seconds_between = self.KEEP * self._seconds_between + (1 - self.KEEP) * (now - last)

    def finished(self, num_outputs: int) -> None:
        """A text is complete."""
        self.expected_outputs = self.KEEP * self.expected_outputs + (1 - self.KEEP) * num_outputs

    def retry_after(self, now: float) -> float:
        """Seconds until a place in the queue should be free for a caller refused now. Each refused caller is given
        the next place, so that they do not all come back at once."""
        promised = max(self._promised_until, now) + self._seconds_between
        self._promised_until = min(promised, now + LONGEST_RETRY_SECONDS)
        return max(1.0, self._promised_until - now)
