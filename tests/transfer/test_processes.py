"""Two processes, one of which may die at any moment."""

from __future__ import annotations

import random
import sys
import time
from multiprocessing import resource_tracker

import pytest

from tests.transfer.peer_process import PeerProcess, digest
from tests.transfer.rig import LARGE, Handoff, Worker, eventually
from transload.control.messages import (
    CancelSends,
    ExpectKv,
    KvData,
    PeerFrame,
    PeerLost,
    PeerUp,
    SendFrame,
    SendsDrained,
    TransferId,
    WorkerId,
)
from transload.transfer.meeting import TransportChoice

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="checks /proc, and shares memory through memfd"),
]
TRANSPORTS: list[TransportChoice] = ["shm", "tcp"]
both = pytest.mark.parametrize("transport", TRANSPORTS)


@pytest.fixture(scope="module", autouse=True)
def _resource_tracker() -> None:
    """Start the one that multiprocessing keeps for all processes, so that no test seems to leave it behind."""
    resource_tracker.ensure_running()


SOURCE = tuple(random.Random(1).sample(range(64), 24))
TARGET = tuple(random.Random(2).sample(range(64), 24))


def commands(peer: str, source: tuple[int, ...] = SOURCE, target: tuple[int, ...] = TARGET) -> list[SendFrame]:
    """The transfer, layer by layer of six blocks at a time."""
    parts = [(low, layer) for low in range(0, 24, 6) for layer in range(LARGE.num_layers)]
    return [
        SendFrame(
            WorkerId(peer),
            KvData(TransferId(7), 1, sequence, layer, layer + 1, low, low + 6, 6 * LARGE.cell_bytes),
            source[low : low + 6],
            target[low : low + 6],
        )
        for sequence, (low, layer) in enumerate(parts)
    ]


@both
def test_blocks_cross_between_processes_byte_for_byte(transport: TransportChoice) -> None:
    with Worker("a", layout=LARGE, num_blocks=64) as worker, PeerProcess("b") as process:
        worker.fill(5)
        process.connect(worker, transport)
        process.expect(ExpectKv(TransferId(7), 1, worker.name, 0, TARGET))
        there = commands("b")
        for command in there:
            worker.links.send(command)
        for event in process.frames(len(there)):
            assert isinstance(event.frame, KvData)
            assert event.arrived_checksum == event.frame.checksum
        assert process.digest(TARGET) == digest(worker, SOURCE)
        # And back, into other blocks.
        worker.links.expect(ExpectKv(TransferId(7), 1, process.name, 0, SOURCE))
        worker.blocks[:] = 0
        process.send(commands("a", source=TARGET, target=SOURCE))
        for event in worker.data_frames(len(there)):
            assert isinstance(event.frame, KvData)
            assert event.arrived_checksum == event.frame.checksum
        assert digest(worker, SOURCE) == process.digest(TARGET)


@both
def test_a_sender_killed_in_the_middle_is_lost_once_and_writes_no_more(transport: TransportChoice) -> None:
    with Worker("a", layout=LARGE, num_blocks=64) as worker:
        with PeerProcess("b") as process:
            process.fill(1)
            process.connect(worker, transport)
            worker.links.expect(ExpectKv(TransferId(7), 1, process.name, 0, TARGET))
            process.send(commands("a"), times=400)
            worker.data_frames(20)
            process.kill()
            events = [worker.next()]
            while isinstance(events[-1], PeerFrame):
                events.append(worker.next())
            assert events[-1] == PeerLost(process.name)
            worker.blocks[:] = 0xAB
        with PeerProcess("b", incarnation=2) as restarted:
            restarted.fill(3)
            restarted.connect(worker, transport)
            assert (worker.blocks == 0xAB).all()
            restarted.send(commands("a")[:1])
            (event,) = worker.data_frames(1)
            assert isinstance(event.frame, KvData)
            assert event.arrived_checksum == event.frame.checksum
        assert worker.next() == PeerLost(restarted.name)
        assert worker.events.empty()


@both
def test_a_receiver_killed_in_the_middle_is_lost_and_cancels_are_still_answered(transport: TransportChoice) -> None:
    with Worker("a", layout=LARGE, num_blocks=64) as worker, PeerProcess("b") as process:
        process.connect(worker, transport)
        process.expect(ExpectKv(TransferId(7), 1, worker.name, 0, TARGET))
        for _ in range(400):
            for command in commands("b"):
                worker.links.send(command)
        eventually(lambda: worker.links.stats()[0].sent.num_frames > 20)
        process.kill()
        worker.links.cancel_sends(CancelSends(process.name, TransferId(7), 1))
        assert {worker.next(), worker.next()} == {PeerLost(process.name), SendsDrained(TransferId(7), 1)}
        worker.links.send(commands("b")[0])
        assert worker.links.stats() == []
        assert worker.events.empty()


def test_a_frozen_peer_that_shares_memory_is_not_lost_before_it_is_dead() -> None:
    with Worker("a", layout=LARGE, num_blocks=64) as worker, PeerProcess("b") as process:
        process.connect(worker, "shm")
        process.stop()
        worker.links.disconnect(process.name)
        time.sleep(0.5)
        assert worker.events.empty()
        assert [stats.open for stats in worker.links.stats()] == [False]
        process.kill()
        assert worker.next() == PeerLost(process.name)


def test_a_frozen_peer_over_tcp_is_lost_at_once() -> None:
    with Worker("a", layout=LARGE, num_blocks=64) as worker, PeerProcess("b") as process:
        process.connect(worker, "tcp")
        process.stop()
        worker.links.disconnect(process.name)
        assert worker.next() == PeerLost(process.name)


def test_closing_does_not_wait_for_a_frozen_peer_and_claims_nothing_about_it() -> None:
    with PeerProcess("b") as process:
        with Worker("a", layout=LARGE, num_blocks=64) as worker:
            process.connect(worker, "shm")
            process.stop()
            worker.links.close(0.3)
            assert worker.events.empty()
        process.kill()


@both
def test_a_process_that_dies_during_the_handshake_leaves_nothing(transport: TransportChoice) -> None:
    for _ in range(3):
        with Worker("a", layout=LARGE, num_blocks=64) as worker, PeerProcess("b") as process:
            worker.links.connect(process.name, process.address, transport)
            process.kill()
            first = worker.next()
            if isinstance(first, PeerUp):
                assert worker.next() == PeerLost(process.name)


@both
def test_many_transfers_at_once_from_both_sides_all_arrive(transport: TransportChoice) -> None:
    with Worker("a", layout=LARGE, num_blocks=64) as worker, PeerProcess("b") as process:
        worker.fill(1)
        process.fill(2)
        process.connect(worker, transport)
        lower, upper = tuple(range(24)), tuple(range(40, 64))
        worker.links.expect(ExpectKv(TransferId(7), 1, process.name, 0, upper))
        process.expect(ExpectKv(TransferId(7), 1, worker.name, 0, upper))
        there = commands("b", source=lower, target=upper)
        process.send(commands("a", source=lower, target=upper), times=5)
        for _ in range(5):
            for command in there:
                worker.links.send(command)
        for event in (*worker.data_frames(5 * len(there)), *process.frames(5 * len(there))):
            assert isinstance(event.frame, KvData)
            assert event.arrived_checksum == event.frame.checksum
        assert process.digest(upper) == digest(worker, lower)
        assert digest(worker, upper) == process.digest(lower)


def test_a_handoff_in_one_process_needs_no_other() -> None:
    """Two workers in one process reach each other as any two of a host do."""
    with Worker("a") as one, Worker("b") as other:
        one.links.connect(other.name, other.links.address)
        assert one.next() == PeerUp(other.name, one_sided=True)
        handoff = Handoff(one, other)
        handoff.expect()
        one.links.send(handoff.whole())
        assert other.data_frames(1)


def test_a_process_killed_while_it_works_in_our_blocks_writes_no_more_once_it_is_lost() -> None:
    with Worker("d", layout=LARGE, num_blocks=64, with_windows=True) as worker:
        with PeerProcess("p") as process:
            process.connect(worker, "direct")
            assert process.up is not None
            process.scribble(process.up)
            eventually(lambda: bool(worker.blocks.any()))
            process.kill()
            assert worker.wait_for(PeerLost) == PeerLost(process.name)
        worker.blocks[:] = 0xAB
        time.sleep(0.2)
        assert (worker.blocks == 0xAB).all()


def test_a_peer_that_stands_still_while_it_works_in_our_blocks_is_not_lost_before_it_is_dead() -> None:
    with Worker("d", layout=LARGE, num_blocks=64, with_windows=True) as worker, PeerProcess("p") as process:
        process.connect(worker, "direct")
        assert process.up is not None
        process.scribble(process.up)
        process.stop()
        worker.links.disconnect(process.name)
        time.sleep(0.3)
        assert worker.events.empty()
        process.kill()
        assert worker.next() == PeerLost(process.name)
