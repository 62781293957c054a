"""Which incoming transfer may be written where.

Owns the permissions that the engine gives with `ExpectKv` and takes back with `ForgetKv`. Never lets a write of a
receiver thread run on after `revoke` has returned, and never waits for a peer: a thread holds a permit's lock only for
one non-blocking receive.
"""

from __future__ import annotations

import threading

from transload.control.messages import ExpectKv, ForgetKv, KvData, TransferId, WorkerId
from transload.errors import HandoffError


class Permit:
    """Blocks that one transfer of one peer may fill. Hold `lock` while writing, and look at `revoked` under it."""

    def __init__(self, command: ExpectKv) -> None:
        self.source = command.source
        self.first_block = command.first_block
        self.blocks = command.blocks
        self.lock = threading.Lock()
        self.revoked = False

    def blocks_of(self, frame: KvData) -> tuple[int, ...]:
        """Pool ids of the frame's blocks. Raises `HandoffError` if it names a block that was not granted."""
        low, high = frame.block_lo - self.first_block, frame.block_hi - self.first_block
        if not 0 <= low < high <= len(self.blocks):
            last = self.first_block + len(self.blocks)
            raise HandoffError(f"{frame} names blocks outside {self.first_block}..{last}, which were granted")
        return self.blocks[low:high]


class Permits:
    """All permissions of a worker. Used by the engine's thread and every receiver thread."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._lock = threading.Lock()
        self._permits: dict[tuple[TransferId, int], Permit] = {}

    def grant(self, command: ExpectKv) -> None:
        """Let the transfer in. Raises `HandoffError` if a block is not in the pool."""
        if any(not 0 <= block < self._num_blocks for block in command.blocks):
            raise HandoffError(f"transfer {command.transfer:#x} expects blocks outside 0..{self._num_blocks}")
        permit = Permit(command)
        with self._lock:
            replaced = self._permits.get((command.transfer, command.epoch))
            self._permits[command.transfer, command.epoch] = permit
        if replaced is not None:
            _revoke(replaced)

    def revoke(self, command: ForgetKv) -> None:
        """When this returns, no receiver thread writes for the transfer any more. Unknown transfers are none."""
        with self._lock:
            permit = self._permits.pop((command.transfer, command.epoch), None)
        if permit is not None:
            _revoke(permit)

    def find(self, frame: KvData, peer: WorkerId) -> Permit | None:
        """The permission for a frame of this peer, if there is one."""
        with self._lock:
            permit = self._permits.get((frame.transfer, frame.epoch))
        return permit if permit is not None and permit.source == peer else None

    def __len__(self) -> int:
        with self._lock:
            return len(self._permits)


def _revoke(permit: Permit) -> None:
    permit.revoked = True  # before the lock, so that a receiver that keeps taking it lets go at once
    with permit.lock:
        pass
