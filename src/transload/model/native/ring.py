"""Rings of feed-forward calls through the kernels: a call posts, one takes, one waits.

Owns the memory in which an end of a ring is described to them. What a ring is for, and what is done without kernels, is
in `transfer/ffn_kernels.py`. Imports no torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_void_p
from typing import Literal

from transload.errors import HandoffError
from transload.model.native.library import Library, load
from transload.model.native.structs import MOST_SLOTS, RingStruct
from transload.transfer.ffn_kernels import Entry, Ring, RingPlace, impossible, too_many
from transload.transfer.ffn_link import MAX_SLOTS

assert MOST_SLOTS == MAX_SLOTS
_TOO_MANY = -1


class CompiledRing:
    """One end. The memory that it lies in must outlive its last use, and it that of its functions."""

    def __init__(self, library: Library, place: RingPlace) -> None:
        self._place = place
        self._struct = RingStruct(
            words=place.address,
            num_slots=place.num_slots,
            posted_at=place.posted_at,
            news_at=place.news_at,
            dozes_at=place.dozes_at,
            peer_dozes_at=place.peer_dozes_at,
            out_entries=place.out_entries,
            in_entries=place.in_entries,
            out_headers=place.out_headers,
            out_rows=place.out_rows,
            in_headers=place.in_headers,
            slot_bytes=place.slot_bytes,
            most_header_bytes=place.most_header_bytes,
            most_sent_bytes=place.most_sent_bytes,
            most_row_bytes=place.most_row_bytes,
        )
        self.address = address = ctypes.addressof(self._struct)
        self.has_news: Callable[[], bool] = library.ring_function("has_news", address)
        self.post: Callable[[int, bytes, int, int], bool] = library.ring_function("post", address)
        self.doze: Callable[[], bool] = library.ring_function("doze", address)
        self._take: Callable[[], tuple[Entry, ...] | Literal[False]] = library.ring_function("take", address)

    def poll(self) -> Sequence[Entry]:
        found = self._take()
        if found is False:
            raise self._refused()
        return found

    def _refused(self) -> HandoffError:
        said = self._struct.found
        if self._struct.problem == _TOO_MANY:
            return too_many(said[0], self._place)
        return impossible(said[0], said[1], said[2])


class CompiledRings:
    """See `RingKernels`."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._await: Callable[[int, int, float], float] = library.ring_function("await_news", 0)
        self._awaited: list[Ring] = []
        self._array = (c_void_p * 0)()
        self._address = 0  # of the array

    def ring(self, place: RingPlace) -> Ring:
        return CompiledRing(self._library, place)

    def await_news(self, rings: list[Ring], seconds: float) -> float:
        if rings != self._awaited:
            self._prepare(rings)
        return self._await(self._address, len(rings), seconds)

    def _prepare(self, rings: list[Ring]) -> None:
        addresses = [ring.address for ring in rings if isinstance(ring, CompiledRing)]
        assert len(addresses) == len(rings), "only its own rings"
        self._awaited = list(rings)
        self._array = (c_void_p * len(addresses))(*addresses)
        self._address = ctypes.addressof(self._array)


def compiled_rings() -> CompiledRings | None:
    """None where there are no kernels. For one thread."""
    library = load()
    return CompiledRings(library) if library is not None else None
