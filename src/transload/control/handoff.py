"""Both halves of a KV handoff, as bookkeeping without IO: what was sent, what has arrived, who still holds what.

    sender                                      receiver
    ------                                      --------
                                                reserves blocks, expects the transfer
    prefills a chunk, layer by layer
    KvData (sequence 0, 1, ...)      ------->   ticks off each (layer, block) cell, compares checksums
    ...
    KvDone (outputs so far)          ------->   all cells once, all frames seen: verified
    releases its blocks              <-------   KvReady
                                                runs the request

                                     <-------   KvAbort: it gives up, and puts its blocks aside
    has no write under way: KvAbortAck ----->   the blocks are free again

Where a worker's steps can work in a peer's blocks themselves (a *window*), the sender prefills right there: its block
table is the receiver's, cached prefix included, and one `KvData` that brings no bytes says so at the end. Nothing else
differs, least of all who may give a block away when.

KvRenew goes both ways every third of a lease, from the sender until its KvDone. Who hears nothing for a lease gives up.
The lease is the receiver's, named in its grant: the two sides may have been configured otherwise.
A sender that gives up tells the controller, which cancels the receiver.

A receiver runs nothing before `verified`: a frame lost, repeated, reordered or changed can only lead to the same text
or to a failed transfer.
"""

from __future__ import annotations

from transload.control.messages import Grant, KvData, KvDone, TransferId, WorkerId


class Lease:
    """The other side's sign of life. Counts the ticks of the side that holds it, not what a clock says: a worker that
    has stood still, or whose clock has jumped, does not hold that against the others."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._silent_seconds = 0.0

    def renew(self, seconds: float | None = None) -> None:
        """A sign of life, good for as long as before or for so many seconds."""
        self._silent_seconds = 0.0
        if seconds is not None:
            self.seconds = seconds

    def pass_seconds(self, seconds: float) -> None:
        """A tick, so many seconds after the one before."""
        self._silent_seconds += seconds

    @property
    def is_expired(self) -> bool:
        return self._silent_seconds > self.seconds * 1.000001  # sums of thirds


class KvSender:
    """The prefill worker's half: which frames are due next."""

    def __init__(self, target: WorkerId, epoch: int, grant: Grant, lease: Lease, *, in_place: bool = False) -> None:
        self.target = target
        self.transfer: TransferId = grant.transfer
        self.epoch = epoch
        self.grant = grant
        self.lease = lease
        self.next_block = grant.first_block
        self.num_frames = 0
        self.ack_wanted = False
        self.in_place = in_place
        """Our steps write into the receiver's blocks themselves."""

    def frame(self, layer_lo: int, layer_hi: int, block_hi: int, cell_bytes: int) -> KvData | None:
        """The frame for these layers of all blocks finished by the running chunk and not sent before; None if no
        block is finished."""
        if block_hi <= self.next_block:
            return None
        frame = KvData(
            transfer=self.transfer,
            epoch=self.epoch,
            sequence=self.num_frames,
            layer_lo=layer_lo,
            layer_hi=layer_hi,
            block_lo=self.next_block,
            block_hi=block_hi,
            num_bytes=(layer_hi - layer_lo) * (block_hi - self.next_block) * cell_bytes,
            in_place=self.in_place,
        )
        self.num_frames += 1
        return frame

    def chunk_done(self, block_hi: int) -> None:
        """All layers of the blocks before `block_hi` have been framed."""
        self.next_block = max(self.next_block, block_hi)

    def target_blocks(self, frame: KvData) -> tuple[int, ...]:
        """Where the frame's blocks go in the receiver's pool."""
        first = self.grant.first_block
        return self.grant.blocks[frame.block_lo - first : frame.block_hi - first]


class KvReceiver:
    """The decode worker's half: what has arrived, and whether it may be used."""

    def __init__(self, source: WorkerId, epoch: int, grant: Grant, num_layers: int, lease: Lease) -> None:
        self.source = source
        self.transfer: TransferId = grant.transfer
        self.epoch = epoch
        self.grant = grant
        self.lease = lease
        self.outputs: tuple[int, ...] | None = None
        self.num_bytes = 0
        self.num_frames = 0
        self.first_at: float | None = None
        self.last_at = 0.0
        self._num_layers = num_layers
        self._missing = (1 << len(grant.blocks) * num_layers) - 1  # a bit per cell not here yet, layer by layer
        self._seen: dict[int, KvData] = {}  # by sequence
        self._num_frames_sent: int | None = None

    def take_frame(self, frame: KvData, arrived_checksum: int, now: float) -> str | None:
        """Tick off the frame's cells. Returns what is wrong with it, or None. A frame that comes again has been written
        again: it must be the same one, and intact."""
        if arrived_checksum != frame.checksum:
            return f"checksum of frame {frame.sequence} is {arrived_checksum:#x}, sent as {frame.checksum:#x}"
        first = self._seen.get(frame.sequence)
        if first is not None:
            return None if frame == first else f"frame {frame.sequence} came again with other cells"
        low, high = frame.block_lo - self.grant.first_block, frame.block_hi - self.grant.first_block
        width = len(self.grant.blocks)
        if not (0 <= low < high <= width and 0 <= frame.layer_lo < frame.layer_hi <= self._num_layers):
            return f"frame {frame.sequence} names cells outside the reservation"
        once_a_layer = ((1 << width * (frame.layer_hi - frame.layer_lo)) - 1) // ((1 << width) - 1)
        cells = ((1 << high) - (1 << low)) * once_a_layer << width * frame.layer_lo
        if self._missing & cells != cells:
            return f"frame {frame.sequence} brings cells that are here already"
        self._missing ^= cells
        self._seen[frame.sequence] = frame
        self.num_frames += 1
        self.num_bytes += frame.num_bytes
        self.first_at = now if self.first_at is None else self.first_at
        self.last_at = now
        return None

    def take_done(self, frame: KvDone, now: float) -> None:
        """The sender's last word, which may overtake its data."""
        self.outputs = frame.outputs
        self._num_frames_sent = frame.num_frames
        self.first_at = now if self.first_at is None else self.first_at
        self.last_at = now

    @property
    def verified(self) -> bool:
        """Every cell is here once, intact, and the sender has said that this is all."""
        return self.outputs is not None and self._num_frames_sent == len(self._seen) and not self._missing
