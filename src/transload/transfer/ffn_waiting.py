"""Waiting for news on several links: looking again and again for a while, then asleep until a socket wakes us.

A sleep costs some 50 us of waking up, which is as long as a feed-forward; a spin costs a core that somebody else may
need. So the spin is as long as news have lately taken to come, if that is short, and hardly any otherwise.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Sequence

from transload.transfer.ffn_kernels import Ring, RingKernels
from transload.transfer.ffn_link import LinkEnd

SHORT_SPIN_SECONDS = 20e-6
"""Where spinning does not pay."""
TICK_SECONDS = 1e-3
"""The shortest sleep with an end."""
MOST_SLEEP_SECONDS = 0.05
"""Asleep without looking, at most, though nobody wakes us."""


class Waiter:
    """For one thread. `nudge` wakes it from any other."""

    def __init__(self, spin_seconds: float, kernels: RingKernels | None = None) -> None:
        """`spin_seconds`: the longest spin; 0: none. `kernels`: those that the ends' rings were made with."""
        self._kernels = kernels
        self._most_spin = spin_seconds
        self._typical = spin_seconds / 2  # how long news have lately taken to come
        self._nudge, self._nudged = socket.socketpair()
        self._nudge.setblocking(False)
        self._nudged.setblocking(False)
        self.num_sleeps = 0
        self.num_spins = 0

    def nudge(self) -> None:
        """From any thread: end the wait."""
        try:
            self._nudge.send(b"!")
        except (BlockingIOError, OSError):
            return  # it is full of nudges, or closed

    def wait(self, ends: Sequence[LinkEnd], due_at: float | None) -> bool:
        """Until an end has news or is broken, a nudge comes, or it is `due_at` (`time.monotonic`). False: only the time
        has come, or nothing has for a while."""
        for end in ends:
            if end.has_news():
                return True
        started = time.monotonic()
        seconds = self._spin_seconds()
        if due_at is not None and due_at < started + seconds + TICK_SECONDS:
            seconds = due_at - started  # no sleep is that short
        if ends and seconds > 0.0 and (took := self._spin(ends, started, seconds)):
            self.num_spins += 1
            self._learn(took)
            return True
        if due_at is not None and time.monotonic() >= due_at:
            return False
        found = self._sleep(ends, due_at)
        self._learn(time.monotonic() - started)
        return found

    def _spin(self, ends: Sequence[LinkEnd], started: float, seconds: float) -> float:
        """How long it took until something came; 0 if nothing has."""
        if self._kernels is not None:
            rings: list[Ring] = []
            for end in ends:
                if (ring := end.compiled_ring) is None:
                    break
                rings.append(ring)
            else:
                return self._kernels.await_news(rings, seconds)
        now, until = started, started + seconds
        while now < until:
            for _ in range(8):
                for end in ends:
                    if end.has_news():
                        return max(time.monotonic() - started, 1e-9)
            now = time.monotonic()
        return 0.0

    def _spin_seconds(self) -> float:
        most = self._most_spin
        wanted = 2.0 * self._typical if self._typical < most else SHORT_SPIN_SECONDS
        return wanted if wanted < most else most

    def _learn(self, seconds: float) -> None:
        most = 4.0 * self._most_spin
        self._typical += ((seconds if seconds < most else most) - self._typical) / 8

    def _sleep(self, ends: Sequence[LinkEnd], due_at: float | None) -> bool:
        self.num_sleeps += 1
        dozing = [end.doze() for end in ends]
        try:
            if not all(dozing):
                return True
            poller = select.poll()
            poller.register(self._nudged, select.POLLIN)
            for end in ends:
                poller.register(end.fileno(), select.POLLIN | (select.POLLOUT if end.wants_to_send() else 0))
            seconds = MOST_SLEEP_SECONDS if due_at is None else min(MOST_SLEEP_SECONDS, due_at - time.monotonic())
            found = bool(poller.poll(max(0.0, seconds) * 1000))
            if found:
                self._drain()
            return found or any(end.has_news() for end in ends)
        finally:
            for end in ends:
                end.wake()

    def _drain(self) -> None:
        try:
            while self._nudged.recv(64):
                pass
        except BlockingIOError:
            return

    def close(self) -> None:
        self._nudge.close()
        self._nudged.close()
