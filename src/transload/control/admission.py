"""Who is let in, and when a caller who is refused should come back.

A refused caller is told a time and gets a place for then, kept under who it is and what it asks: others are let in only
as far as the places that are about to be taken leave room, so that who comes back in time finds one. Not everybody
does; places are given out as densely as the share that has come so far allows, and a part of what can be served is not
promised to anybody: a queue that gets as much as it can serve never becomes shorter again. Where service has become
slower than it was when places were promised, and a target would be missed, who comes back is put off once more, for as
long as it takes, and places are given out less densely from then on. Learns how fast requests are served, how
long outputs are, and how far its estimates of a first token are off. Knows no workers and no clock.
"""

from __future__ import annotations

from bisect import bisect
from collections import deque

GRACE_SECONDS = 3.0
"""How long after its time a place is kept."""
EARLY_SECONDS = 1.5
"""Who comes so much before its time has come back in time: times are told in whole seconds, and clocks differ."""
ONE_CALL_SECONDS = 0.1
"""The choices of one call ask one after the other; they have one place together."""
LONGEST_RETRY_SECONDS = 300.0
"""Nobody is told to stay away longer, nor has a place after that."""
PROMISED_SHARE = 0.85
"""Of what can be served, at most so much is promised to those who come back."""
LEAST_SHARE_BACK = 0.25
"""That so few come back is believed; fewer may be others than those who are refused now."""
SPARSEST = 0.2
"""Of their density, at which places are given out at least, however many were put off."""
MOST_PLACES_EACH = 16
"""Of one caller with one question: more are not kept."""


class Admission:
    """One cluster's. `ttft_seconds`: let in only who should have its first token within that; None: by number alone."""

    KEEP = 0.95
    """Weight of the past in the moving averages."""
    MISSES = 0.05
    """Share of those let in whose first token may come later than was foretold."""

    def __init__(self, max_waiting: int = 256, ttft_seconds: float | None = None) -> None:
        self.max_waiting, self.ttft_seconds = max_waiting, ttft_seconds
        self.expected_outputs = 128.0
        """Tokens a request makes, on average so far."""
        self._seconds_between = 0.1
        self._num_served = 0  # while others waited
        self._last_served: float | None = None
        self._margin = 0.0
        self._share_back = 1.0  # of places, those whose callers have come
        self._promised_until = 0.0
        self._density = 1.0  # of places, less where those who came in time had to be put off
        self._came_back = (0, 0.0)  # who has taken a place last, and when
        self._places: dict[int, deque[tuple[float, float]]] = {}  # caller -> times, and from when on they count
        self._in_order: deque[tuple[float, int]] = deque()  # all of them, and some that have been taken since

    # -- what it learns -----------------------------------------------------------------------------------------------

    def served(self, waiting_since: float, now: float, foretold: float | None = None) -> None:
        """A request has its first token. It tells how fast requests are served if it was there when the one before had
        its own; otherwise only how seldom they come. `foretold`: the seconds that were expected when it was let in."""
        last, self._last_served = self._last_served, now
        if last is not None and waiting_since < last:
            self._num_served += 1
            keep = min(self.KEEP, 1.0 - 1.0 / self._num_served)
            self._seconds_between = keep * self._seconds_between + (1.0 - keep) * (now - last)
        if foretold is not None and self.ttft_seconds is not None:
            # Small steps, up for a miss and down for none, come to rest where as many are missed as may be.
            missed = now - waiting_since > foretold + self._margin
            step = 0.05 * self.ttft_seconds * (1.0 - self.MISSES if missed else -self.MISSES)
            self._margin = min(max(self._margin + step, -0.5 * self.ttft_seconds), 0.9 * self.ttft_seconds)

    def finished(self, num_outputs: int) -> None:
        """A text is complete."""
        self.expected_outputs = self.KEEP * self.expected_outputs + (1 - self.KEEP) * num_outputs

    @property
    def seconds_between(self) -> float:
        """From one request's being served to the next one's, while requests wait."""
        return self._seconds_between

    @property
    def num_places(self) -> int:
        """Kept for callers who were refused."""
        return sum(len(times) for times in self._places.values())

    # -- who is let in ------------------------------------------------------------------------------------------------

    def ask(self, caller: int, num_waiting: int, first_token_seconds: float, now: float) -> float | None:
        """Let a request in (None), or say in how many seconds its caller should come back.

        `caller` names who asks for what, 0 nobody in particular; `num_waiting` requests wait for a worker already;
        `first_token_seconds`: until this one would have its first token, as far as is known.
        """
        self._give_up_places(now)
        has_seat = num_waiting < 2 * self.max_waiting
        if has_seat and caller and caller == self._came_back[0] and now - self._came_back[1] < ONE_CALL_SECONDS:
            return None
        if self._comes_back(caller, now) and has_seat:
            late = 0.0 if self.ttft_seconds is None else first_token_seconds - self.ttft_seconds
            if late > 0.0:
                return self._put_off(caller, late, now)
            self._density = min(1.0, self._density + 0.01)
            self._came_back = (caller, now)
            return None
        expected = self._share_back * self._due_before(now + first_token_seconds)
        if self._has_room(num_waiting + expected, first_token_seconds + expected * self._seconds_between):
            return None
        return self._promise(caller, first_token_seconds, now)

    def _has_room(self, num_waiting: float, first_token_seconds: float) -> bool:
        if num_waiting >= self.max_waiting:
            return False
        if self.ttft_seconds is None or num_waiting + first_token_seconds == 0.0:
            return True
        return first_token_seconds + self._margin <= self.ttft_seconds

    def _promise(self, caller: int, first_token_seconds: float, now: float) -> float:
        share_back = max(LEAST_SHARE_BACK, self._share_back)
        spacing = self._seconds_between * share_back / (PROMISED_SHARE * self._density)
        until_room = 0.0
        if self.ttft_seconds is not None:
            until_room = max(0.0, first_token_seconds + self._margin - self.ttft_seconds)
        promised = max(self._promised_until, now + until_room) + spacing
        promised = max(promised, now + 1.0)
        if promised - now > LONGEST_RETRY_SECONDS:
            return LONGEST_RETRY_SECONDS
        self._promised_until = promised
        if caller:
            self._keep(caller, promised, now)
        return promised - now

    def _put_off(self, caller: int, seconds: float, now: float) -> float:
        """A place at the end of what waits now, whatever else was promised for then."""
        self._density = max(SPARSEST, 0.95 * self._density)
        promised = now + max(1.0, seconds)
        self._keep(caller, promised, now)
        return promised - now

    # -- places -------------------------------------------------------------------------------------------------------

    def _keep(self, caller: int, promised: float, now: float) -> None:
        times = self._places.setdefault(caller, deque())
        if len(times) >= MOST_PLACES_EACH:
            return
        place = (promised, promised - min(EARLY_SECONDS, (promised - now) / 4))
        times.insert(bisect(times, place), place)
        self._in_order.insert(bisect(self._in_order, (promised, caller)), (promised, caller))

    def _comes_back(self, caller: int, now: float) -> bool:
        times = self._places.get(caller)
        if not times or times[0][1] > now:
            return False
        self._drop_first(caller)
        self._share_back = self.KEEP * self._share_back + (1 - self.KEEP)
        return True

    def _give_up_places(self, now: float) -> None:
        """Whoever has not come is not waited for any more."""
        while self._in_order and self._in_order[0][0] + GRACE_SECONDS < now:
            at, caller = self._in_order.popleft()
            times = self._places.get(caller)
            if times and times[0][0] == at:
                self._drop_first(caller)
                self._share_back *= self.KEEP

    def _drop_first(self, caller: int) -> None:
        times = self._places[caller]
        times.popleft()
        if not times:
            del self._places[caller]

    def _due_before(self, time: float) -> int:
        """Kept places whose time comes before then."""
        count = 0
        for at, caller in self._in_order:
            if at > time:
                break
            times = self._places.get(caller)
            count += times is not None and times[0][0] <= at
        return count
