"""All transfers of one worker, in both directions: opens them, feeds them frames, keeps their leases, ends them.

The Engine owns requests and steps; this owns what crosses to other workers. It writes commands into the Engine's list
and answers with outcomes, which the Engine acts on.

A block that another worker may write into must not change hands before that is ruled out. It is ruled out when the
sender has said so (KvAbortAck, which it sends after its writes have drained and its steps have returned), when the link
is lost (the driver reports that only once no write can be under way), or at once where the receiver does the copying
itself. Where the sender's steps work in our blocks, those of the prefix that they read are kept as long.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from random import Random

from transload.control.blocks import BlockPool
from transload.control.handoff import KvReceiver, KvSender, Lease
from transload.control.messages import (
    CancelSends,
    EngineCommand,
    ExpectKv,
    ForgetKv,
    Frame,
    Grant,
    KvAbort,
    KvAbortAck,
    KvData,
    KvDone,
    KvReady,
    KvRenew,
    PeerUp,
    SendFrame,
    SetTimer,
    TransferId,
    WorkerId,
)
from transload.control.outcome import Failed, Outcome, Released, Verified
from transload.control.work import Work

LEASE_TIMER = "leases"
MAX_TOMBSTONES = 4096
SHORTEST_TICK_SECONDS = 0.001


def to_ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def silence(peer: WorkerId, lease: Lease) -> str:
    """Why a transfer was given up."""
    return f"no sign of life from {peer} for {lease.seconds:g} s"


class Exchange:
    """The transfers of one worker. `out` is the Engine's list of commands under construction."""

    def __init__(
        self,
        *,
        pool: BlockPool,
        num_layers: int,
        cell_bytes: int,
        lease_seconds: float,
        random: Random,
        out: list[EngineCommand],
    ) -> None:
        self._pool = pool
        self._num_layers = num_layers
        self._cell_bytes = cell_bytes
        self._lease_seconds = lease_seconds
        self._random = random
        self._out = out
        self._peers: dict[WorkerId, PeerUp] = {}
        self._sending: dict[TransferId, Work] = {}
        self._receiving: dict[TransferId, Work] = {}
        self._quarantined: dict[TransferId, tuple[WorkerId, int]] = {}  # who may still write, and the epoch
        self._kept: dict[TransferId, list[int]] = {}  # blocks that a step of theirs may still read
        self._tombstones: OrderedDict[TransferId, None] = OrderedDict()
        self._tick_seconds: float | None = None  # of the timer that is set
        self.num_late_frames = 0

    # -- opening ------------------------------------------------------------------------------------------------------

    def is_linked(self, peer: WorkerId) -> bool:
        return peer in self._peers

    def works_in_place(self, peer: WorkerId | None) -> bool:
        """Whether this peer's steps may work in our blocks, as far as it hangs on us."""
        link = self._peers.get(peer) if peer is not None else None
        return link is not None and link.window is not None

    def open_receive(self, work: Work, source: WorkerId, first_block: int) -> Grant:
        """Name a transfer that may fill the work's blocks from `first_block` on."""
        transfer = TransferId(self._random.getrandbits(63))
        in_place = self.works_in_place(source)
        prefix = tuple(work.blocks[:first_block]) if in_place else ()
        lease_ms, name = to_ms(self._lease_seconds), self._peers[source].name
        grant = Grant(transfer, tuple(work.blocks[first_block:]), first_block, lease_ms, prefix, name, in_place)
        work.receiver = KvReceiver(source, work.epoch, grant, self._num_layers, Lease(self._lease_seconds))
        self._receiving[transfer] = work
        self._out.append(ExpectKv(transfer, work.epoch, source, first_block, grant.blocks))
        self._keep_leases()
        return grant

    def open_send(self, work: Work, target: WorkerId, grant: Grant) -> str | None:
        """Take on the sender's half, so that the receiver hears of us while the prompt waits. Returns why not, or
        None."""
        if grant.transfer in self._tombstones:
            return "the receiver has withdrawn the transfer"
        link = self._peers.get(target)
        if link is None:
            return f"no link to {target}"
        if grant.link_name != link.name:  # what it grants may be somebody else's by now
            return f"the link to {target} for which it was granted is gone"
        table = (*grant.prefix, *grant.blocks)
        in_place = grant.in_place and link.window is not None  # one side may have run out of addresses for windows
        if in_place and not all(0 <= block < link.window_blocks for block in table):
            return f"{target} grants blocks that it does not have"
        lease = Lease(grant.lease_ms / 1000)
        work.sender = KvSender(target, work.epoch, grant, lease, in_place=in_place)
        if link.window is not None and in_place:
            work.window_blocks = [link.window + block for block in table]
        self._sending[grant.transfer] = work
        self._send(target, KvRenew(grant.transfer, work.epoch, grant.lease_ms))
        self._keep_leases()
        return None

    # -- sending ------------------------------------------------------------------------------------------------------

    def layers_ready(self, work: Work, layer_lo: int, layer_hi: int, block_hi: int) -> None:
        """Layers of the running chunk are in the cache: send those of every block the chunk completes."""
        sender = work.sender
        assert sender is not None
        if sender.in_place:
            return  # one word for all of it, when it is complete
        frame = sender.frame(layer_lo, layer_hi, block_hi, self._cell_bytes)
        if frame is not None:
            source_blocks = tuple(work.blocks[frame.block_lo : frame.block_hi])
            self._send(sender.target, frame, source_blocks, sender.target_blocks(frame))

    def send_done(self, work: Work) -> None:
        """The prompt is computed and its first token drawn: say that this is all, and wait for KvReady."""
        sender = work.sender
        assert sender is not None
        work.phase = "sent"
        if sender.in_place:
            sender.next_block = sender.grant.first_block
            frame = sender.frame(0, self._num_layers, len(work.blocks), self._cell_bytes)
            assert frame is not None, "the receiver keeps back at least the block of the last token"
            self._send(sender.target, frame)
        self._send(sender.target, KvDone(sender.transfer, sender.epoch, sender.num_frames, work.outputs))

    # -- giving up ----------------------------------------------------------------------------------------------------

    def abort_send(self, work: Work) -> None:
        """Stop sending. The blocks stay with the work until `SendsDrained`. The receiver learns it from the
        controller, and asks with KvAbort when it may reuse its own blocks."""
        sender = work.sender
        assert sender is not None
        if work.phase == "draining":
            return
        work.phase = "draining"
        link = self._peers.get(sender.target)
        number = link.link if link is not None else 0
        self._out.append(CancelSends(sender.target, sender.transfer, sender.epoch, number))

    def abort_receive(self, work: Work, reason: str) -> None:
        """Stop receiving, and free the blocks as soon as nothing can write into them."""
        receiver = work.receiver
        assert receiver is not None
        link = self._peers.get(receiver.source)
        self._send(receiver.source, KvAbort(receiver.transfer, receiver.epoch, reason))
        self._close_receive(work, may_be_written=link is not None and link.one_sided)

    def _close_receive(self, work: Work, *, may_be_written: bool) -> None:
        receiver = work.receiver
        assert receiver is not None
        del self._receiving[receiver.transfer]
        self._out.append(ForgetKv(receiver.transfer, receiver.epoch))
        first = receiver.grant.first_block
        if may_be_written and receiver.grant.prefix:
            self._kept[receiver.transfer] = work.blocks[:first]
        else:
            self._pool.release(work.blocks[:first])
        if may_be_written:
            self._pool.quarantine(work.blocks[first:], receiver.transfer)
            self._quarantined[receiver.transfer] = receiver.source, receiver.epoch
            self._keep_leases()
        else:
            self._pool.release(work.blocks[first:])
        work.blocks = []
        work.receiver = None

    def sends_drained(self, transfer: TransferId) -> None:
        """Nothing of this transfer is under way any more: release the blocks, and tell a receiver that asked."""
        work = self._sending.pop(transfer, None)
        if work is None:
            return
        sender = work.sender
        assert sender is not None
        self.release_sent(work)
        if sender.ack_wanted:
            self._send(sender.target, KvAbortAck(transfer, sender.epoch))

    def release_sent(self, work: Work) -> None:
        """Let go of the blocks of a send; those that it worked on in place are the receiver's."""
        if work.window_blocks is None:
            self._pool.release(work.blocks)
        work.blocks = []

    # -- frames -------------------------------------------------------------------------------------------------------

    def take_frame(self, peer: WorkerId, frame: Frame, arrived_checksum: int, now: float) -> list[Outcome]:
        """Feed one frame from a peer. Frames of unknown or older transfers are counted and dropped."""
        sending = self._sending.get(frame.transfer)
        if sending is not None and sending.sender is not None and sending.sender.target == peer:
            return self._take_as_sender(sending, sending.sender, frame)
        receiving = self._receiving.get(frame.transfer)
        if receiving is not None and receiving.receiver is not None and receiving.receiver.source == peer:
            return self._take_as_receiver(receiving, receiving.receiver, frame, arrived_checksum, now)
        self._take_stray(peer, frame)
        return []

    def _take_as_sender(self, work: Work, sender: KvSender, frame: Frame) -> list[Outcome]:
        if frame.epoch != sender.epoch:
            self.num_late_frames += 1
            return []
        sender.lease.renew(frame.lease_ms / 1000 if isinstance(frame, KvRenew) else None)
        match frame:
            case KvReady() if work.phase == "sent":
                del self._sending[sender.transfer]
                return [Released(work)]
            case KvAbort(_, _, reason):
                sender.ack_wanted = True
                self._bury(sender.transfer)
                if work.phase != "draining":
                    return [Failed(work, f"{sender.target} gave up: {reason}")]
            case _:
                pass
        return []

    def _take_as_receiver(
        self, work: Work, receiver: KvReceiver, frame: Frame, arrived_checksum: int, now: float
    ) -> list[Outcome]:
        if frame.epoch != receiver.epoch:
            self.num_late_frames += 1
            return []
        receiver.lease.renew()
        problem: str | None = None
        match frame:
            case KvData():
                problem = receiver.take_frame(frame, arrived_checksum, now)
            case KvDone() if frame.outputs[:-1] != work.outputs or not frame.outputs:
                problem = f"{receiver.source} has not gone on from the tokens made so far"
            case KvDone():
                receiver.take_done(frame, now)
            case _:
                pass
        if problem is not None:
            self.abort_receive(work, problem)
            return [Failed(work, problem)]
        if receiver.verified:
            del self._receiving[receiver.transfer]
            self._out.append(ForgetKv(receiver.transfer, receiver.epoch))
            self._send(receiver.source, KvReady(receiver.transfer, receiver.epoch))
            return [Verified(work)]
        return []

    def _take_stray(self, peer: WorkerId, frame: Frame) -> None:
        match frame:
            case KvAbortAck(transfer, epoch) if self._quarantined.get(transfer) == (peer, epoch):
                self._end_quarantine(transfer)
            case KvAbort(transfer, epoch):
                self._bury(transfer)
                self._send(peer, KvAbortAck(transfer, epoch))
            case KvRenew() | KvAbortAck():
                pass
            case _:
                self.num_late_frames += 1

    def _end_quarantine(self, transfer: TransferId) -> None:
        del self._quarantined[transfer]
        self._pool.end_quarantine(transfer)
        self._pool.release(self._kept.pop(transfer, ()))

    def _bury(self, transfer: TransferId) -> None:
        """Never start this transfer again, even if its assignment is still on the way here."""
        self._tombstones[transfer] = None
        if len(self._tombstones) > MAX_TOMBSTONES:
            self._tombstones.popitem(last=False)

    # -- links and leases ---------------------------------------------------------------------------------------------

    def peer_up(self, link: PeerUp) -> None:
        self._peers[link.peer] = link

    def peer_lost(self, peer: WorkerId) -> list[Outcome]:
        """The link is gone and nothing of it writes any more: end its transfers and its quarantines."""
        self._peers.pop(peer, None)
        for transfer in [transfer for transfer, (source, _) in self._quarantined.items() if source == peer]:
            self._end_quarantine(transfer)
        outcomes: list[Outcome] = []
        for work in list(self._receiving.values()):
            if work.receiver is not None and work.receiver.source == peer:
                self._close_receive(work, may_be_written=False)
                outcomes.append(Failed(work, f"lost the link to {peer}"))
        for work in list(self._sending.values()):
            if work.sender is not None and work.sender.target == peer and work.phase != "draining":
                outcomes.append(Failed(work, f"lost the link to {peer}"))
        return outcomes

    def tick(self) -> list[Outcome]:
        """A third of the shortest lease has passed: renew what goes on, give up on what has gone silent, ask again for
        acknowledgements that have not come."""
        passed, self._tick_seconds = self._tick_seconds or 0.0, None
        outcomes = [*self._tick_receivers(passed), *self._tick_senders(passed)]
        for transfer, (source, epoch) in self._quarantined.items():
            self._send(source, KvAbort(transfer, epoch, "still waiting for the acknowledgement"))
        self._keep_leases()
        return outcomes

    def _tick_receivers(self, passed: float) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for work in list(self._receiving.values()):
            receiver = work.receiver
            assert receiver is not None
            receiver.lease.pass_seconds(passed)
            if receiver.lease.is_expired:
                self.abort_receive(work, "lease expired")
                outcomes.append(Failed(work, silence(receiver.source, receiver.lease)))
            else:
                self._send(receiver.source, KvRenew(receiver.transfer, receiver.epoch, receiver.grant.lease_ms))
        return outcomes

    def _tick_senders(self, passed: float) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for work in list(self._sending.values()):
            sender = work.sender
            assert sender is not None
            if work.phase == "draining":
                continue
            sender.lease.pass_seconds(passed)
            if sender.lease.is_expired:
                outcomes.append(Failed(work, silence(sender.target, sender.lease)))
            elif work.phase != "sent":  # then it is for the receiver to say that it still wants it
                self._send(sender.target, KvRenew(sender.transfer, sender.epoch, sender.grant.lease_ms))
        return outcomes

    def _keep_leases(self) -> None:
        """Have a tick come at a third of the shortest lease, if there is any."""
        shortest = self._lease_seconds if self._receiving or self._quarantined else math.inf
        for work in self._sending.values():
            if work.sender is not None and work.sender.lease.seconds < shortest:
                shortest = work.sender.lease.seconds
        if shortest == math.inf:
            return
        tick_seconds = max(shortest / 3, SHORTEST_TICK_SECONDS)
        if self._tick_seconds is None or tick_seconds < self._tick_seconds:
            self._tick_seconds = tick_seconds
            self._out.append(SetTimer(LEASE_TIMER, tick_seconds))

    def _send(
        self,
        peer: WorkerId,
        frame: Frame,
        source_blocks: tuple[int, ...] = (),
        target_blocks: tuple[int, ...] = (),
    ) -> None:
        """Over the link that we know, and no later one. Without one the frame is dropped: its transfer is over."""
        link = self._peers.get(peer)
        if link is not None:
            self._out.append(SendFrame(peer, frame, source_blocks, target_blocks, link.link))

    # -- for tests and metrics ----------------------------------------------------------------------------------------

    @property
    def num_open(self) -> int:
        """Transfers this worker takes part in, draining ones included."""
        return len(self._sending) + len(self._receiving)

    def tables(self) -> list[list[int]]:
        """Block tables of nobody's request any more: of sends that are draining, and what their steps may read."""
        draining = [work for work in self._sending.values() if work.phase == "draining"]
        return [*(work.blocks for work in draining if work.window_blocks is None), *self._kept.values()]
