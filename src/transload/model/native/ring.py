"""Rings of feed-forward calls through the kernels: a call posts, one finds, one waits.

Owns the struct that describes an end of a ring to them. What a ring is for, and what is done without kernels, is
in `transfer/ffn_kernels.py`. Imports no torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure, c_int64, c_uint64, c_void_p

from transload.model.native.library import Library, load
from transload.transfer.ffn_kernels import Entry, Ring, RingPlace, impossible, too_many
from transload.transfer.ffn_link import MAX_SLOTS

_NUM_FOUND = 3 * MAX_SLOTS


class RingStruct(Structure):
    """`struct ring` of ring.h."""

    _fields_ = (
        ("words", c_void_p),
        ("num_slots", c_int64),
        ("posted_at", c_int64),
        ("news_at", c_int64),
        ("dozes_at", c_int64),
        ("peer_dozes_at", c_int64),
        ("out_entries", c_int64),
        ("in_entries", c_int64),
        ("out_headers", c_void_p),
        ("out_rows", c_void_p),
        ("slot_bytes", c_int64),
        ("most_header_bytes", c_int64),
        ("most_row_bytes", c_int64),
        ("num_posted", c_uint64),
        ("num_seen", c_uint64),
        ("found", c_uint64 * (3 * MAX_SLOTS + 1)),  # and how many a wait has found already
    )


class CompiledRing:
    """One end. The memory that it lies in must outlive its last use."""

    def __init__(self, library: Library, place: RingPlace) -> None:
        self._place = place
        self._post, self._poll, self._doze = library.ring_post, library.ring_poll, library.ring_doze
        self._struct = RingStruct(
            place.address,
            place.num_slots,
            place.posted_at,
            place.news_at,
            place.dozes_at,
            place.peer_dozes_at,
            place.out_entries,
            place.in_entries,
            place.out_headers,
            place.out_rows,
            place.slot_bytes,
            place.most_header_bytes,
            place.most_row_bytes,
        )
        self._found = memoryview(self._struct.found).cast("B").cast("Q")
        self.address = ctypes.addressof(self._struct)
        self.num_seen = 0

    def post(self, slot: int, header: bytes, num_bytes: int, rows_address: int) -> bool:
        return bool(self._post(self.address, slot, header, len(header), rows_address, num_bytes))

    def poll(self) -> Sequence[Entry]:
        found = self._found
        if num_new := found[_NUM_FOUND]:
            found[_NUM_FOUND] = 0
        else:
            num_new = self._poll(self.address)
            if num_new == 0:
                return ()
        if num_new == -1:
            raise too_many(found[0], self._place)
        if num_new < 0:
            raise impossible((found[0], found[1], found[2]))
        self.num_seen += num_new
        if num_new == 1:
            return ((found[0], found[1], found[2]),)
        return [(found[at], found[at + 1], found[at + 2]) for at in range(0, 3 * num_new, 3)]

    def doze(self) -> bool:
        return bool(self._doze(self.address))


class CompiledRings:
    """See `RingKernels`."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._await = library.ring_await
        self._awaited: tuple[int, ...] = ()
        self._addresses = (c_void_p * 0)()

    def ring(self, place: RingPlace) -> Ring:
        return CompiledRing(self._library, place)

    def await_news(self, rings: Sequence[Ring], seconds: float) -> float:
        awaited = tuple([ring.address for ring in rings if isinstance(ring, CompiledRing)])
        assert len(awaited) == len(rings), "only its own rings"
        if awaited != self._awaited:
            self._awaited = awaited
            self._addresses = (c_void_p * len(awaited))(*awaited)
        nanoseconds: int = self._await(self._addresses, len(awaited), int(seconds * 1e9))
        return 1e-9 * nanoseconds


def compiled_rings() -> CompiledRings | None:
    """None where there are no kernels. For one thread."""
    library = load()
    return CompiledRings(library) if library is not None else None
