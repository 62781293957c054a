"""The links of one attention worker to its FFN workers: dialed in the background, and again when they break.

Any thread may say whom to reach; the step thread takes links that came up and says which broke. Never uses a link.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import msgspec

from transload.control.ffn_messages import Piece
from transload.control.messages import WorkerId
from transload.errors import TransloadError
from transload.transfer.ffn_kernels import RingKernels
from transload.transfer.ffn_link import CallerEnd
from transload.transfer.ffn_meeting import Opening, Party, dial_ffn
from transload.transfer.listener import PeerAddress

FIRST_RETRY_SECONDS = 0.05
LAST_RETRY_SECONDS = 2.0


class CallerUp(msgspec.Struct, frozen=True):
    """A link came up."""

    end: CallerEnd
    pieces: frozenset[Piece]


class CallerGone(msgspec.Struct, frozen=True):
    """Nobody wants this link any more."""

    worker: WorkerId


HopReport = Callable[[WorkerId, str, "str | None"], None]
"""(worker, transport, what went wrong): None when the link is up."""


class FfnCallers:
    """`report` and `nudge` are called from threads of this class; they must not block."""

    def __init__(
        self,
        me: Party,
        opening: Opening,
        report: HopReport,
        nudge: Callable[[], None],
        kernels: RingKernels | None = None,
    ) -> None:
        self._me = me
        self._opening = opening
        self._report = report
        self._nudge = nudge
        self._kernels = kernels
        self._lock = threading.Lock()
        self._wanted: dict[WorkerId, tuple[PeerAddress, str]] = {}
        self._dialing: dict[WorkerId, threading.Event] = {}  # set: stop
        self._news: deque[CallerUp | CallerGone] = deque()
        self._closed = False

    @property
    def is_dialing(self) -> bool:
        """Whether a link may come up soon."""
        return bool(self._dialing)

    def connect(self, address: PeerAddress, transport: str) -> None:
        """Reach a worker, here from now on. Another incarnation takes the place of the one before."""
        with self._lock:
            before = self._wanted.get(address.worker)
            if self._closed or before == (address, transport):
                return
            if before is not None:
                self._drop(address.worker)
            self._wanted[address.worker] = (address, transport)
            self._dial(address.worker, 0.0)

    def disconnect(self, worker: WorkerId) -> None:
        """Give a worker up."""
        with self._lock:
            if self._wanted.pop(worker, None) is not None:
                self._drop(worker)

    def lost(self, worker: WorkerId, reason: str) -> None:
        """The link that came up is broken, and closed; dial again, if the worker is wanted still."""
        with self._lock:
            if worker not in self._wanted or self._closed:
                return
            transport = self._wanted[worker][1]
            self._dial(worker, FIRST_RETRY_SECONDS)
        self._report(worker, transport, reason)

    def news(self) -> list[CallerUp | CallerGone]:
        """What has happened since the last time, in order. Whoever takes a link closes it."""
        taken = []
        while self._news:
            taken.append(self._news.popleft())
        return taken

    def close(self) -> None:
        """End all dialing."""
        with self._lock:
            self._closed = True
            self._wanted.clear()
            for stop in self._dialing.values():
                stop.set()
        for item in self.news():
            if isinstance(item, CallerUp):
                item.end.close()

    def _drop(self, worker: WorkerId) -> None:
        stop = self._dialing.pop(worker, None)
        if stop is not None:
            stop.set()
        self._news.append(CallerGone(worker))
        self._nudge()

    def _dial(self, worker: WorkerId, after_seconds: float) -> None:
        if worker in self._dialing:
            return
        address, transport = self._wanted[worker]
        stop = self._dialing[worker] = threading.Event()
        thread = threading.Thread(
            target=self._run_dial,
            args=(address, transport, stop, after_seconds),
            name=f"ffn-dial-{worker}",
            daemon=True,
        )
        thread.start()

    def _run_dial(self, address: PeerAddress, transport: str, stop: threading.Event, after_seconds: float) -> None:
        patience = FIRST_RETRY_SECONDS
        said = ""
        while not stop.wait(after_seconds):
            try:
                end, pieces = dial_ffn(self._me, address, transport, self._opening, self._kernels)
            except (OSError, TransloadError) as error:
                if str(error) != said:
                    said = str(error)
                    self._report(address.worker, transport, f"no link to {address.worker}: {error}")
                after_seconds, patience = patience, min(2 * patience, LAST_RETRY_SECONDS)
                continue
            self._came_up(end, pieces, stop)
            return

    def _came_up(self, end: CallerEnd, pieces: frozenset[Piece], stop: threading.Event) -> None:
        with self._lock:
            if stop.is_set() or self._closed:
                end.close()
                return
            del self._dialing[end.worker]
            self._news.append(CallerUp(end, pieces))
        self._nudge()
        self._report(end.worker, end.transport, None)
