"""What waits to be sent to one peer, and in which order it goes.

Order: frames of one transfer leave in the order they came. A transfer whose receiver has not acknowledged
`window_frames` data frames is set aside with everything behind it, and frames of other transfers pass. Owns queues and
counters; never touches a socket or memory, so it can be tested without either.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from transload.control.messages import CancelSends, Frame, KvCredit, KvData, KvDone, SendFrame, TransferId, WorkerId
from transload.errors import HandoffError
from transload.transfer.wire import Ping, Pong

Key = tuple[TransferId, int]


def key_of(message: Frame | CancelSends) -> Key:
    """A transfer's identity: its epoch belongs to it."""
    return (message.transfer, message.epoch)


class Outbox:
    """Thread-safe. One thread takes; any thread puts, cancels and credits."""

    def __init__(self, peer: WorkerId, *, window_frames: int, max_frames: int) -> None:
        self._peer = peer
        self._window_frames = window_frames
        self._max_frames = max_frames
        self._changed = threading.Condition()
        self._closed = False
        self._stopped = False
        self._is_parked = False  # the sender waits, and has written everything it took
        self._rest: bytes | None = None
        self._drains: deque[CancelSends] = deque()
        self._probes: deque[Ping | Pong] = deque(maxlen=16)
        self._credits: dict[Key, int] = {}
        self._ready: deque[SendFrame] = deque()
        self._aside: dict[Key, deque[SendFrame]] = {}
        self._resumable: deque[Key] = deque()  # keys of _aside whose first frame may go
        self._resume_next = False
        self._unacknowledged: dict[Key, deque[int]] = {}  # sequences of data frames, oldest first
        self._num_frames = 0

    def __len__(self) -> int:
        """Frames waiting."""
        return self._num_frames + len(self._credits)

    def put(self, command: SendFrame) -> None:
        """Queue a frame; nothing happens once closed. Raises `HandoffError` if the peer has left too many waiting."""
        with self._changed:
            if self._closed:
                return
            self._check_room()
            self._num_frames += 1
            self._ready.append(command)
            self._changed.notify()

    def send_now(self, message: bytes, write: Callable[[bytes], int], ends: Key | None = None) -> bool:
        """Write a message on the caller's thread, if the sender waits and nothing else does: waking the sender takes
        longer than writing. `write` returns how much was taken, at once; the sender writes the rest first of all.
        `ends`: the transfer whose last frame this is. False: nothing was written."""
        with self._changed:
            if not self._is_parked or self._closed or len(self) or self._drains or self._probes or self._rest:
                return False
            written = write(message)
            if 0 < written < len(message):
                self._rest = message[written:]
                self._changed.notify()
            if written > 0 and ends is not None:
                self._unacknowledged.pop(ends, None)  # no data follows, so nobody waits for room
            return written > 0

    def put_credit(self, key: Key, num_frames: int) -> None:
        """Tell the sender how far we are. A later credit of a transfer takes the place of one that still waits."""
        with self._changed:
            if self._closed:
                return
            if key not in self._credits:
                self._check_room()
            self._credits[key] = num_frames
            self._changed.notify()

    def put_probe(self, probe: Ping | Pong) -> None:
        """Ahead of everything else, so that it measures the link and not the queue. The oldest of too many is lost."""
        with self._changed:
            if not self._closed:
                self._probes.append(probe)
                self._changed.notify()

    def _check_room(self) -> None:
        if len(self) >= self._max_frames:
            raise HandoffError(f"{self._peer} does not take its frames: {len(self)} wait, {self._max_frames} may")

    def credit(self, frame: KvCredit) -> None:
        """The receiver has taken in every data frame of the transfer below this sequence."""
        key = key_of(frame)
        with self._changed:
            sequences = self._unacknowledged.get(key)
            if sequences is None:
                return
            while sequences and sequences[0] < frame.num_frames:
                sequences.popleft()
            if not sequences:
                del self._unacknowledged[key]
            self._resume(key)

    def cancel(self, command: CancelSends) -> bool:
        """Drop the transfer's waiting data and its end. True: `take` will hand the command to the sender, who knows
        when nothing of it is under way. False: the sender has stopped, so nothing is."""
        key = key_of(command)
        with self._changed:
            self._unacknowledged.pop(key, None)
            self._ready = deque(item for item in self._ready if not _is_cancelled(item, key))
            aside = self._aside.get(key)
            if aside is not None:
                kept = deque(item for item in aside if not _is_cancelled(item, key))
                self._aside[key] = kept
                if kept:
                    self._resume(key)
                else:
                    self._drop_aside(key)
            self._num_frames = len(self._ready) + sum(len(waiting) for waiting in self._aside.values())
            if self._stopped:
                return False
            self._drains.append(command)
            self._changed.notify()
            return True

    def take(self, *, wait: bool = True) -> SendFrame | CancelSends | Ping | Pong | bytes | None:
        """The next thing to do, if need be waiting for it; None once closed, or if there is nothing and `wait` is
        False. A cancel comes first: nothing is under way now."""
        with self._changed:
            self._is_parked = False
            while True:
                if self._rest is not None and not self._closed:
                    rest, self._rest = self._rest, None
                    return rest
                if self._drains:
                    return self._drains.popleft()
                if self._closed:
                    return None
                if self._probes:
                    return self._probes.popleft()
                if self._credits:
                    (transfer, epoch), num_frames = self._credits.popitem()
                    return SendFrame(self._peer, KvCredit(transfer, epoch, num_frames))
                item = self._next()
                if item is not None:
                    self._num_frames -= 1
                    return item
                if not wait:
                    return None
                self._is_parked = True
                self._changed.wait()
                self._is_parked = False

    def close(self) -> None:
        """Wake the sender; everything that waits is dropped but cancels, which must be answered."""
        with self._changed:
            self._closed = True
            self._probes.clear()
            self._credits.clear()
            self._ready.clear()
            self._aside.clear()
            self._resumable.clear()
            self._num_frames = 0
            self._changed.notify_all()

    def stop(self) -> list[CancelSends]:
        """The sender does nothing any more; returns the cancels that it has not answered."""
        self.close()
        with self._changed:
            self._stopped = True
            drains = list(self._drains)
            self._drains.clear()
            return drains

    def _next(self) -> SendFrame | None:
        """One frame of those set aside, then one of the others, so that neither starves the other."""
        self._resume_next = not self._resume_next
        if self._resume_next and self._resumable:
            return self._next_aside()
        while self._ready:
            item = self._ready.popleft()
            key = key_of(item.frame)
            if key in self._aside:
                self._aside[key].append(item)
            elif not self._may_go(item):
                self._aside[key] = deque((item,))
            else:
                return self._account(item)
        return self._next_aside() if self._resumable else None

    def _next_aside(self) -> SendFrame:
        key = self._resumable.popleft()
        item = self._aside[key].popleft()
        self._account(item)
        if not self._aside[key]:
            del self._aside[key]
        elif self._may_go(self._aside[key][0]):
            self._resumable.append(key)
        return item

    def _may_go(self, item: SendFrame) -> bool:
        if not isinstance(item.frame, KvData):
            return True
        return len(self._unacknowledged.get(key_of(item.frame), ())) < self._window_frames

    def _account(self, item: SendFrame) -> SendFrame:
        if isinstance(item.frame, KvData):
            self._unacknowledged.setdefault(key_of(item.frame), deque()).append(item.frame.sequence)
        elif isinstance(item.frame, KvDone):
            self._unacknowledged.pop(key_of(item.frame), None)  # no data follows, so no window either
        return item

    def _resume(self, key: Key) -> None:
        aside = self._aside.get(key)
        if aside and key not in self._resumable and self._may_go(aside[0]):
            self._resumable.append(key)
            self._changed.notify()

    def _drop_aside(self, key: Key) -> None:
        del self._aside[key]
        if key in self._resumable:
            self._resumable.remove(key)


def _is_cancelled(item: SendFrame, key: Key) -> bool:
    """Only what the cancel takes back: an abort or its answer still has to get there."""
    return key_of(item.frame) == key and isinstance(item.frame, KvData | KvDone)
