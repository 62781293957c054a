"""How an end of a ring posts, finds and waits for entries: here in Python, or compiled where somebody hands that in.

Owns the order of accesses to the control page: an entry is in place before the number that announces it, and whoever
says that it dozes looks once more before it does. What the peer may have written is checked before it is used, and
headers are copied out of its reach. Never looks into headers or rows. `model/native/ring.py` has the compiled form.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Protocol

import msgspec

from transload.errors import HandoffError

Entry = tuple[int, bytes, int]
"""Slot, its header, bytes of its rows."""


class RingPlace(msgspec.Struct, frozen=True, kw_only=True):
    """What one end of a ring finds where. Places in the control page are counted in words of 8 bytes."""

    address: int
    """Of the control page."""
    num_slots: int
    posted_at: int
    news_at: int
    dozes_at: int
    peer_dozes_at: int
    out_entries: int
    in_entries: int
    out_headers: int
    """Address of the first slot's header of what we send."""
    out_rows: int
    in_headers: int
    slot_bytes: int
    most_header_bytes: int
    most_sent_bytes: int
    """Of rows that go out."""
    most_row_bytes: int
    """Of what comes in."""


class Ring(Protocol):
    """One end. For one thread."""

    def has_news(self) -> bool:
        """Whether there is something to poll."""
        ...

    def post(self, slot: int, header: bytes, num_bytes: int, rows_address: int, /) -> bool:
        """Announce a slot, whose rows are copied from `rows_address` first unless that is 0. Whether the peer dozes."""
        ...

    def poll(self) -> Sequence[Entry]:
        """What has come. Raises `HandoffError` for what cannot be."""
        ...

    def doze(self) -> bool:
        """Ask to be woken. False: there is news already."""
        ...


class RingKernels(Protocol):
    """Compiled rings."""

    def ring(self, place: RingPlace) -> Ring: ...

    def await_news(self, rings: list[Ring], seconds: float) -> float:
        """Look until one of its rings has news: how long that took; 0: none had by then. Lets other threads run."""
        ...


class PlainRing:
    """A ring in Python, over the control page as words."""

    def __init__(self, place: RingPlace, words: memoryview) -> None:
        self._place = place
        self._words = words
        self._num_posted = 0
        self._num_seen = 0
        self._news_at = place.news_at
        self._fence = threading.Lock()  # taken and released, it orders the accesses around it on every processor

    def has_news(self) -> bool:
        return bool(self._words[self._news_at] != self._num_seen)

    def post(self, slot: int, header: bytes, num_bytes: int, rows_address: int) -> bool:
        place, words = self._place, self._words
        assert 0 <= slot < place.num_slots, "a slot that the ring has not"
        assert 0 < len(header) <= place.most_header_bytes, "a header that no slot has room for"
        assert 0 <= num_bytes <= place.most_sent_bytes, "rows that no slot has room for"
        if rows_address:
            ctypes.memmove(place.out_rows + slot * place.slot_bytes, rows_address, num_bytes)
        ctypes.memmove(place.out_headers + slot * place.slot_bytes, header, len(header))
        entry = place.out_entries + 4 * (self._num_posted % place.num_slots)
        words[entry] = slot
        words[entry + 1] = len(header)
        words[entry + 2] = num_bytes
        self._num_posted += 1
        with self._fence:
            pass
        words[place.posted_at] = self._num_posted
        with self._fence:
            pass
        return bool(words[place.peer_dozes_at])

    def poll(self) -> Sequence[Entry]:
        place, words = self._place, self._words
        num_new = words[place.news_at] - self._num_seen
        if num_new == 0:
            return ()
        if not 0 < num_new <= place.num_slots:
            raise too_many(num_new, place)
        with self._fence:
            pass
        found = []
        for number in range(self._num_seen, self._num_seen + num_new):
            at = place.in_entries + 4 * (number % place.num_slots)
            slot, header_bytes, num_bytes = words[at], words[at + 1], words[at + 2]
            in_range = 0 < header_bytes <= place.most_header_bytes and num_bytes <= place.most_row_bytes
            if slot >= place.num_slots or not in_range:
                raise impossible(slot, header_bytes, num_bytes)
            header = ctypes.string_at(place.in_headers + slot * place.slot_bytes, header_bytes)
            found.append((slot, header, num_bytes))
        self._num_seen += num_new
        return found

    def doze(self) -> bool:
        self._words[self._place.dozes_at] = 1
        with self._fence:
            pass
        return not self.has_news()


class ClosedRing:
    """What takes a ring's place when its memory is gone."""

    def has_news(self) -> bool:
        return False

    def post(self, _slot: int, _header: bytes, _num_bytes: int, _rows_address: int) -> bool:
        return False

    def poll(self) -> Sequence[Entry]:
        return ()

    def doze(self) -> bool:
        return True


def too_many(num_new: int, place: RingPlace) -> HandoffError:
    return HandoffError(f"the peer has posted {num_new} entries into a ring of {place.num_slots}")


def impossible(slot: int, header_bytes: int, num_bytes: int) -> HandoffError:
    return HandoffError(f"the peer has posted slot {slot} with {header_bytes} and {num_bytes} bytes")
