"""What a link has carried and how fast. Owns counters of one thread each; never makes that thread wait."""

from __future__ import annotations

import msgspec

from transload.control.messages import WorkerId

_WEIGHT = 0.2  # of the newest frame in the moving average


class FlowStats(msgspec.Struct, frozen=True, kw_only=True):
    """One direction of a link, since it was opened."""

    num_frames: int
    num_bytes: int
    """Cells only; headers are not counted."""
    busy_seconds: float
    """Spent on frames with cells, waiting for the peer in the middle of one included."""
    checksum_seconds: float
    """The part of it that went into checksums."""
    bytes_per_second: float
    """Moving average over frames; 0.0 before the first."""


class LinkStats(msgspec.Struct, frozen=True, kw_only=True):
    """One link, seen from this worker."""

    peer: WorkerId
    incarnation: int
    transport: str
    open: bool
    """False while the link waits for the peer to let go of our memory."""
    sent: FlowStats
    received: FlowStats
    num_waiting_frames: int
    num_unexpected_frames: int
    """Data frames for which there was no permission; nothing of them was stored."""
    latency_seconds: float
    """One way, half of the fastest round trip seen; 0.0 before `Links.measure`."""


class Flow:
    """Counts one direction. Written by one thread, read by any."""

    def __init__(self) -> None:
        self._num_frames = 0
        self._num_bytes = 0
        self._busy_seconds = 0.0
        self._bytes_per_second = 0.0

    def count_frame(self) -> None:
        self._num_frames += 1

    def count_cells(self, num_bytes: int, seconds: float) -> None:
        self._num_bytes += num_bytes
        self._busy_seconds += seconds
        rate = num_bytes / max(seconds, 1e-9)
        self._bytes_per_second += (rate - self._bytes_per_second) * (_WEIGHT if self._bytes_per_second else 1.0)

    def stats(self, checksum_seconds: float) -> FlowStats:
        return FlowStats(
            num_frames=self._num_frames,
            num_bytes=self._num_bytes,
            busy_seconds=self._busy_seconds,
            checksum_seconds=checksum_seconds,
            bytes_per_second=self._bytes_per_second,
        )
