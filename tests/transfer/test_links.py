"""Two workers in one process: every byte where it belongs, and nothing anywhere else."""

from __future__ import annotations

import random
import socket
import sys
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.transfer.rig import LARGE, SMALL, WAIT_SECONDS, Handoff, RawPeer, Worker, eventually, link_up
from transload.control.messages import (
    CancelSends,
    ExpectKv,
    ForgetKv,
    KvAbortAck,
    KvCredit,
    KvData,
    KvDone,
    KvRenew,
    PeerFrame,
    PeerLost,
    SendFrame,
    SendsDrained,
    TransferId,
    WorkerId,
)
from transload.errors import HandoffError
from transload.transfer.cells import CellMover, Cells, Rows
from transload.transfer.layout import KvLayout
from transload.transfer.link import LinkOptions
from transload.transfer.links import LinkFailed
from transload.transfer.meeting import TransportChoice
from transload.transfer.wire import FrameReader, encode, prepare

TRANSPORTS: list[TransportChoice] = ["shm", "tcp"]
both = pytest.mark.parametrize("transport", TRANSPORTS)


@both
@pytest.mark.parametrize("layout", [SMALL, LARGE])
@pytest.mark.parametrize("blocks_a_frame", [0, 3])
def test_random_blocks_arrive_byte_for_byte(transport: TransportChoice, layout: KvLayout, blocks_a_frame: int) -> None:
    with Worker("a", layout=layout) as sender, Worker("b", layout=layout, num_blocks=40) as receiver:
        sender.fill(1)
        receiver.fill(2)
        before = receiver.blocks.copy()
        link_up(sender, receiver, transport)
        handoff = Handoff(sender, receiver, num_blocks=11, first_block=5)
        handoff.expect()
        commands = handoff.by_layer(blocks_a_frame) if blocks_a_frame else [handoff.whole()]
        for command in commands:
            sender.links.send(command)
        sender.links.send(handoff.done(len(commands)))
        arrived = receiver.data_frames(len(commands))
        for event, command in zip(arrived, commands, strict=True):
            assert isinstance(event.frame, KvData)
            assert event.arrived_checksum == event.frame.checksum != 0
            assert msgspec.structs.replace(event.frame, checksum=0) == command.frame
        assert receiver.next() == PeerFrame(sender.name, handoff.done(len(commands)).frame)
        handoff.assert_arrived(before)


@both
def test_transfers_in_both_directions_at_once_do_not_mix(transport: TransportChoice) -> None:
    with Worker("a", num_blocks=64) as one, Worker("b", num_blocks=64) as other:
        one.fill(1)
        other.fill(2)
        link_up(one, other, transport)
        # Each sends from its lower half into the other's upper half.
        handoffs = [
            Handoff(sender, receiver, num_blocks=16, transfer=number, seed=number)
            for number, (sender, receiver) in enumerate([(one, other), (other, one)], 1)
        ]
        for handoff in handoffs:
            handoff.source = tuple(block // 2 for block in handoff.source)
            handoff.target = tuple(dict.fromkeys(32 + block // 2 for block in handoff.target))
            handoff.source = handoff.source[: len(handoff.target)]
        commands = [command for handoff in handoffs for command in handoff.by_layer(2)]
        random.Random(0).shuffle(commands)
        for handoff in handoffs:
            handoff.expect()
        for command in commands:
            assert isinstance(command.frame, KvData)
            handoffs[command.frame.transfer - 1].sender.links.send(command)
        for handoff in handoffs:
            for event in handoff.receiver.data_frames(len(handoff.by_layer(2))):
                assert isinstance(event.frame, KvData)
                assert event.arrived_checksum == event.frame.checksum
            assert np.array_equal(
                handoff.receiver.blocks[list(handoff.target)], handoff.sender.blocks[list(handoff.source)]
            )


@both
def test_without_permission_nothing_is_stored_and_the_engine_hears_of_it(transport: TransportChoice) -> None:
    with Worker("a") as sender, Worker("b") as receiver:
        sender.fill(1)
        receiver.fill(2)
        link_up(sender, receiver, transport)
        allowed, unknown = Handoff(sender, receiver, transfer=1), Handoff(sender, receiver, transfer=2, seed=2)
        stale = Handoff(sender, receiver, transfer=1, epoch=0, seed=3)
        receiver.links.expect(ExpectKv(TransferId(3), 1, WorkerId("somebody-else"), 0, allowed.target))
        foreign = Handoff(sender, receiver, transfer=3, seed=4)
        allowed.expect()
        before = receiver.blocks.copy()
        for handoff in (unknown, stale, foreign, allowed):
            sender.links.send(handoff.whole())
        *dropped, taken = receiver.data_frames(4)
        assert [event.arrived_checksum for event in dropped] == [0, 0, 0]
        assert isinstance(taken.frame, KvData)
        assert taken.arrived_checksum == taken.frame.checksum
        assert receiver.links.stats()[0].num_unexpected_frames == 3
        if transport == "tcp":  # a one-sided sender writes by itself: there the quarantine of the engine protects
            allowed.assert_arrived(before)


@pytest.mark.parametrize("round_number", range(8))
def test_no_byte_is_written_after_a_transfer_is_forgotten(round_number: int) -> None:
    with Worker("a", layout=LARGE, num_blocks=64) as sender, Worker("b", layout=LARGE, num_blocks=64) as receiver:
        sender.fill(1)
        link_up(sender, receiver, "tcp")
        handoff = Handoff(sender, receiver, num_blocks=60)
        handoff.expect()
        for sequence in range(8):
            sender.links.send(handoff.whole(sequence))
        eventually(lambda: receiver.blocks[handoff.target[round_number * 7]].any())
        receiver.links.forget(ForgetKv(handoff.transfer, handoff.epoch))
        receiver.blocks[:] = 0xAB  # the blocks are somebody else's now
        events = receiver.data_frames(8)
        assert (receiver.blocks == 0xAB).all()
        assert events[-1].arrived_checksum == 0
        # The stream is still in step: the next transfer goes through.
        following = Handoff(sender, receiver, num_blocks=5, transfer=99)
        following.expect()
        before = receiver.blocks.copy()
        sender.links.send(following.whole())
        (event,) = receiver.data_frames(1)
        assert isinstance(event.frame, KvData)
        assert event.arrived_checksum == event.frame.checksum
        following.assert_arrived(before)


@both
def test_a_cancelled_transfer_touches_no_memory_once_it_is_drained(transport: TransportChoice) -> None:
    with Worker("a", layout=LARGE, num_blocks=64) as sender, Worker("b", layout=LARGE, num_blocks=64) as receiver:
        sender.fill(1)
        link_up(sender, receiver, transport)
        handoff, other = Handoff(sender, receiver, num_blocks=32), Handoff(sender, receiver, transfer=5, num_blocks=2)
        other.target = tuple(set(range(64)) - set(handoff.target))[:2]
        handoff.expect()
        other.expect()
        for sequence in range(40):
            sender.links.send(handoff.whole(sequence))
        sender.links.send(handoff.done(40))
        sender.links.send(other.whole())
        receiver.data_frames(1)
        sender.links.cancel_sends(CancelSends(receiver.name, handoff.transfer, handoff.epoch))
        assert sender.wait_for(SendsDrained) == SendsDrained(handoff.transfer, handoff.epoch)
        sender.fill(3)  # the blocks are somebody else's on this side
        acknowledgement = KvAbortAck(handoff.transfer, handoff.epoch)
        sender.links.send(SendFrame(receiver.name, acknowledgement))
        num_data_frames = 1
        while (event := receiver.wait_for(PeerFrame)).frame != acknowledgement:
            assert not isinstance(event.frame, KvDone)
            if isinstance(event.frame, KvData):
                assert event.arrived_checksum == event.frame.checksum  # none was read after it was drained
                num_data_frames += event.frame.transfer == handoff.transfer
        assert num_data_frames < 40
        # The acknowledgement came after every write on this side too.
        receiver.blocks[:] = 0xAB
        assert receiver.links.measure(sender.name) is not None
        assert (receiver.blocks == 0xAB).all()


@both
def test_cancels_are_answered_with_a_link_without_one_and_after_its_end(transport: TransportChoice) -> None:
    with Worker("a") as sender, Worker("b") as receiver:
        cancel = CancelSends(receiver.name, TransferId(4), 2)
        sender.links.cancel_sends(cancel)
        assert sender.next() == SendsDrained(TransferId(4), 2)
        link_up(sender, receiver, transport)
        sender.links.cancel_sends(cancel)
        assert sender.next() == SendsDrained(TransferId(4), 2)
        receiver.links.disconnect(sender.name)
        for _ in range(50):
            sender.links.cancel_sends(cancel)
        events = [sender.next() for _ in range(51)]
        assert events.count(SendsDrained(TransferId(4), 2)) == 50
        assert events.count(PeerLost(receiver.name)) == 1


@both
def test_a_transfer_out_of_credit_does_not_hold_up_the_others(transport: TransportChoice) -> None:
    options = LinkOptions(window_frames=4)
    with Worker("a", options=options) as sender, RawPeer(sender, one_sided=transport == "shm") as silent:
        prepare(silent.sock)
        reader = FrameReader(silent.sock, 20.0, lambda: False)

        def send(transfer: int, sequence: int) -> None:
            frame = KvData(TransferId(transfer), 1, sequence, 0, 1, 0, 1, SMALL.cell_bytes)
            sender.links.send(SendFrame(WorkerId("raw"), frame, (0,), (0,)))

        def receive() -> object:
            header, payload_bytes = reader.read_header()
            reader.discard(payload_bytes)
            return (header.transfer, header.sequence) if isinstance(header, KvData) else header

        for sequence in range(10):
            send(1, sequence)
        renewal = KvRenew(TransferId(2), 1, 500)
        sender.links.send(SendFrame(WorkerId("raw"), renewal))
        send(3, 0)
        assert [receive() for _ in range(6)] == [*((1, sequence) for sequence in range(4)), renewal, (3, 0)]
        assert sender.links.stats()[0].num_waiting_frames == 6
        silent.sock.sendall(encode(KvCredit(TransferId(1), 1, 2)))
        assert [receive() for _ in range(2)] == [(1, 4), (1, 5)]
        assert sender.links.stats()[0].num_waiting_frames == 4


@both
def test_a_long_transfer_gets_all_the_credit_it_needs(transport: TransportChoice) -> None:
    options = LinkOptions(window_frames=2)
    with Worker("a", options=options) as sender, Worker("b", options=options) as receiver:
        sender.fill(1)
        link_up(sender, receiver, transport)
        handoff = Handoff(sender, receiver)
        handoff.expect()
        for sequence in range(300):
            sender.links.send(handoff.whole(sequence))
        events = receiver.data_frames(300)
        assert [event.frame.sequence for event in events if isinstance(event.frame, KvData)] == list(range(300))


@pytest.mark.parametrize("one_sided", [False, True])
def test_a_peer_that_stops_reading_is_given_up_and_costs_bounded_memory(one_sided: bool) -> None:
    options = LinkOptions(window_frames=1_000_000, max_waiting_frames=500)
    with Worker("a", layout=LARGE, options=options) as sender, RawPeer(sender, one_sided=one_sided) as silent:
        frame = KvData(TransferId(1), 1, 0, 0, 1, 0, 4, 4 * LARGE.cell_bytes)
        command = SendFrame(WorkerId("raw"), frame, (0, 1, 2, 3), (0, 1, 2, 3))
        for _ in range(200_000):
            sender.links.send(command)
            if not sender.links.stats() or not sender.links.stats()[0].open:
                break
            assert sender.links.stats()[0].num_waiting_frames <= 500
        failed = sender.wait_for(LinkFailed)
        assert failed.peer == "raw"
        assert "does not take its frames: 500 wait" in failed.reason
        if one_sided:
            # It may still write into our memory, so it is not lost before it says so.
            time.sleep(0.3)
            assert sender.events.empty()
            silent.sock.shutdown(socket.SHUT_WR)
        assert sender.next() == PeerLost(WorkerId("raw"))


def test_an_idle_peer_is_no_stalled_peer() -> None:
    options = LinkOptions(stall_seconds=0.05)
    with Worker("a", options=options) as sender, Worker("b", options=options) as receiver:
        link_up(sender, receiver, "tcp")
        time.sleep(0.4)
        assert receiver.links.measure(sender.name) is not None
        assert sender.events.empty()


@both
def test_frames_that_name_no_cells_are_refused_before_they_are_queued(transport: TransportChoice) -> None:
    with Worker("a") as sender, Worker("b", num_blocks=8) as receiver:
        link_up(sender, receiver, transport)
        good = KvData(TransferId(1), 1, 0, 0, 1, 0, 2, 2 * SMALL.cell_bytes)
        change = msgspec.structs.replace
        bad: list[tuple[KvData, tuple[int, ...], tuple[int, ...]]] = [
            (change(good, layer_hi=4, num_bytes=8 * SMALL.cell_bytes), (0, 1), (0, 1)),
            (change(good, layer_lo=1), (0, 1), (0, 1)),
            (change(good, block_hi=0), (), ()),
            (change(good, num_bytes=1), (0, 1), (0, 1)),
            (good, (0,), (0, 1)),
            (good, (0, 32), (0, 1)),
            (good, (-1, 1), (0, 1)),
        ]
        if transport == "shm":
            bad += [(good, (0, 1), (0, 8)), (good, (0, 1), (-1, 0)), (good, (0, 1), (0,))]
        for frame, source, target in bad:
            with pytest.raises(HandoffError):
                sender.links.send(SendFrame(receiver.name, frame, source, target))
        with pytest.raises(HandoffError, match="outside"):
            receiver.links.expect(ExpectKv(TransferId(1), 1, sender.name, 0, (8,)))
        assert sender.links.stats()[0].open


@both
def test_the_figures_of_a_link_add_up(transport: TransportChoice) -> None:
    with Worker("a") as sender, Worker("b") as receiver:
        assert sender.links.measure(receiver.name) is None
        link_up(sender, receiver, transport)
        handoff = Handoff(sender, receiver)
        handoff.expect()
        for command in handoff.by_layer(4):
            sender.links.send(command)
        receiver.data_frames(6)
        measured = sender.links.measure(receiver.name)
        assert measured is not None
        assert (measured.source, measured.target, measured.transport) == (sender.name, receiver.name, transport)
        assert measured.bytes_per_second > 0
        assert 0 < measured.latency_seconds < 1
        sent, received = sender.links.stats()[0].sent, receiver.links.stats()[0].received
        assert sent.num_bytes == received.num_bytes == 8 * SMALL.block_bytes
        assert sent.num_frames >= 6
        assert 0 < sent.checksum_seconds < sent.busy_seconds
        assert 0 < received.checksum_seconds < received.busy_seconds
        assert sender.links.stats()[0].latency_seconds == measured.latency_seconds


@both
def test_the_end_of_a_link_is_told_once_on_both_sides(transport: TransportChoice) -> None:
    with Worker("a") as one, Worker("b") as other:
        link_up(one, other, transport)
        one.links.disconnect(other.name)
        one.links.disconnect(other.name)
        assert one.next() == PeerLost(other.name)
        assert other.next() == PeerLost(one.name)
        one.links.send(SendFrame(other.name, KvRenew(TransferId(1), 1, 1)))
        assert one.links.stats() == other.links.stats() == []
        assert one.events.empty()
        assert other.events.empty()


@both
def test_closing_in_the_middle_of_transfers_ends_everything(transport: TransportChoice) -> None:
    with Worker("a", layout=LARGE) as sender, Worker("b", layout=LARGE) as receiver:
        link_up(sender, receiver, transport)
        handoff = Handoff(sender, receiver, num_blocks=32)
        handoff.expect()
        for sequence in range(50):
            sender.links.send(handoff.whole(sequence))
        receiver.data_frames(1)
        sender.links.close(5.0)
        assert sender.wait_for(PeerLost) == PeerLost(receiver.name)
        assert receiver.wait_for(PeerLost) == PeerLost(sender.name)
        with pytest.raises(HandoffError, match="closed"):
            sender.links.connect(receiver.name, receiver.links.address)


@pytest.fixture
def slow_copy(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Copies that say when they have begun and wait until they may go on."""
    copying, go_on = threading.Event(), threading.Event()
    copy = CellMover.copy

    def slowly(self: CellMover, source: Cells, rows: Rows, target: Cells, target_rows: Rows) -> int:
        copying.set()
        assert go_on.wait(WAIT_SECONDS)
        return copy(self, source, rows, target, target_rows)

    monkeypatch.setattr(CellMover, "copy", slowly)
    return copying, go_on


def test_a_peer_is_not_lost_while_a_copy_for_it_is_under_way(
    slow_copy: tuple[threading.Event, threading.Event],
) -> None:
    copying, go_on = slow_copy
    with Worker("a") as sender, Worker("b") as receiver:
        link_up(sender, receiver, "shm")
        handoff = Handoff(sender, receiver)
        sender.links.send(handoff.whole())
        assert copying.wait(WAIT_SECONDS)
        sender.links.cancel_sends(CancelSends(receiver.name, handoff.transfer, handoff.epoch))
        receiver.links.disconnect(sender.name)
        time.sleep(0.2)
        assert sender.events.empty()
        assert receiver.events.empty()
        go_on.set()
        assert sender.next() == SendsDrained(handoff.transfer, handoff.epoch)
        assert sender.next() == PeerLost(receiver.name)
        assert receiver.next() == PeerLost(sender.name)


def test_closing_lets_the_copy_under_way_come_to_its_end_before_the_peer_hears_of_it(
    slow_copy: tuple[threading.Event, threading.Event],
) -> None:
    copying, go_on = slow_copy
    with Worker("a") as sender, Worker("b") as receiver:
        link_up(sender, receiver, "shm")
        sender.links.send(Handoff(sender, receiver).whole())
        assert copying.wait(WAIT_SECONDS)
        closing = threading.Thread(target=sender.links.close, args=(0.05,))
        closing.start()
        time.sleep(0.3)
        assert receiver.events.empty()
        go_on.set()
        closing.join()
        assert receiver.wait_for(PeerLost) == PeerLost(sender.name)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_a_peer_is_unmapped_with_its_link() -> None:
    def num_mappings() -> int:
        return Path("/proc/self/maps").read_text().count("transload-kv")

    with Worker("a") as one, Worker("b") as other:
        assert num_mappings() == 2
        for _ in range(3):
            link_up(one, other, "shm")
            assert num_mappings() == 4
            other.links.disconnect(one.name)
            assert one.next() == PeerLost(other.name)
            assert other.next() == PeerLost(one.name)
            assert num_mappings() == 2
