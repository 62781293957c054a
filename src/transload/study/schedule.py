"""Which arrival of a workload starts next: the part of playing a workload that live and simulated runs share.

A pure machine: it is told the time and what has ended, and never looks at a clock.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import NamedTuple

from transload.study.workload import ArrivalSpec, Workload


class Due(NamedTuple):
    """An arrival whose time has come."""

    due_seconds: float
    """When it was to start: its place in the workload, or when what it waited for had ended. Never later than now."""
    number: int
    """Its place in the workload's order."""
    arrival: ArrivalSpec


class Schedule:
    """Call `take` until it says None, sleep until `next_seconds` or until something ends, call `ended`, repeat.

    In open loop what has been taken never delays what comes next: only turns of one session wait for each other.
    """

    def __init__(self, workload: Workload) -> None:
        self.num_in_flight = 0
        self._concurrency = workload.concurrency
        self._end_seconds = float("inf") if workload.duration_seconds is None else workload.duration_seconds
        self._source = enumerate(workload)
        self._head = next(self._source, None)
        self._head_due: Due | None = None  # made once for each head
        self._released: list[Due] = []  # heap of turns whose turn has come
        self._sessions: dict[int, _Session] = {}

    def take(self, now: float) -> Due | None:
        """The next arrival that is due at `now`, or None. It counts as in flight until `ended`."""
        if self._concurrency is not None and self.num_in_flight >= self._concurrency:
            return None
        if self._concurrency is not None and now >= self._end_seconds:
            self._head = None
            self._released.clear()
        due = self._peek()
        if due is None or due.due_seconds > now:
            return None
        if self._released and due is self._released[0]:
            heapq.heappop(self._released)
        else:
            self._head = next(self._source, None)
        if self._concurrency is not None:
            due = due._replace(due_seconds=now)  # a closed loop's user asks when there is room, not before
        self.num_in_flight += 1
        if due.arrival.session is not None:
            self._sessions.setdefault(due.arrival.session, _Session()).running = True
        return due

    def ended(self, arrival: ArrivalSpec, now: float) -> None:
        """A taken arrival has been answered, or has failed: either way the user goes on."""
        self.num_in_flight -= 1
        if arrival.session is None:
            return
        session = self._sessions[arrival.session]
        session.running = False
        session.ended_seconds = now
        if session.waiting:
            index, following = session.waiting.popleft()
            self._release(index, following, session)

    def next_seconds(self) -> float | None:
        """When `take` has something to give if nothing ends before; None: only if something ends, if at all."""
        if self._concurrency is not None and self.num_in_flight >= self._concurrency:
            return None
        due = self._peek()
        return None if due is None else due.due_seconds

    @property
    def is_over(self) -> bool:
        """Nothing is in flight and nothing will start."""
        return self.num_in_flight == 0 and self._peek() is None

    def _peek(self) -> Due | None:
        """The earliest arrival that waits for nothing but time. Parks turns that wait for another on the way."""
        while self._head is not None:
            index, arrival = self._head
            if arrival.at_seconds >= self._end_seconds:
                self._head = None
            elif arrival.think_seconds is not None and arrival.session is not None:
                # All before it has been taken or parked, so its session has begun if it ever will.
                self._park(index, arrival, arrival.session)
                self._head = next(self._source, None)
            else:
                break
        head = None
        if self._head is not None:
            number, arrival = self._head
            head = self._head_due
            if head is None or head.number != number:
                head = self._head_due = Due(arrival.at_seconds, number, arrival)
        if self._released and (head is None or self._released[0] <= head):
            return self._released[0]
        return head

    def _park(self, index: int, arrival: ArrivalSpec, number: int) -> None:
        session = self._sessions.setdefault(number, _Session())
        if session.running or session.waiting:
            session.waiting.append((index, arrival))
        else:
            self._release(index, arrival, session)

    def _release(self, index: int, arrival: ArrivalSpec, session: _Session) -> None:
        """A session whose beginning was cut off (a window of a trace) starts at the time its turn is written for."""
        assert arrival.think_seconds is not None
        due = arrival.at_seconds
        if session.ended_seconds is not None:
            due = max(due, session.ended_seconds + arrival.think_seconds)
        if due < self._end_seconds:
            session.running = True  # it has its place in line: what follows in the session waits for it
            heapq.heappush(self._released, Due(due, index, arrival))


class _Session:
    __slots__ = ("ended_seconds", "running", "waiting")

    def __init__(self) -> None:
        self.running = False
        self.ended_seconds: float | None = None
        self.waiting: deque[tuple[int, ArrivalSpec]] = deque()
