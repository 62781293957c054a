"""Both halves of a handoff as bookkeeping: every way a frame can be wrong, and that only the whole is enough."""

from __future__ import annotations

from itertools import permutations
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transload.control.handoff import KvReceiver, KvSender, Lease
from transload.control.messages import Grant, KvData, KvDone, TransferId, WorkerId

TRANSFER = TransferId(7)
NUM_LAYERS = 4
GRANT = Grant(TRANSFER, blocks=(11, 12, 13), first_block=2, lease_ms=1000)  # the request's blocks 2, 3 and 4


def make_receiver(grant: Grant = GRANT) -> KvReceiver:
    return KvReceiver(WorkerId("p0"), 0, grant, NUM_LAYERS, Lease(1.0))


def frame(sequence: int, layers: tuple[int, int], blocks: tuple[int, int], checksum: int = 5) -> KvData:
    num_bytes = (layers[1] - layers[0]) * (blocks[1] - blocks[0]) * 10
    return KvData(TRANSFER, 0, sequence, *layers, *blocks, num_bytes, checksum)


FRAMES = [frame(0, (0, 2), (2, 4)), frame(1, (2, 4), (2, 4)), frame(2, (0, 4), (4, 5))]
DONE = KvDone(TRANSFER, 0, num_frames=3, outputs=(42,))


def take_all(receiver: KvReceiver, frames: list[KvData]) -> None:
    for item in frames:
        assert receiver.take_frame(item, item.checksum, 1.0) is None


# -- the receiver -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_all_frames_in_any_order_are_enough_and_nothing_less_is(order: tuple[int, ...]) -> None:
    receiver = make_receiver()
    for index in order:
        assert not receiver.verified
        if index == 3:
            receiver.take_done(DONE, 1.0)
        else:
            assert receiver.take_frame(FRAMES[index], 5, 1.0) is None
    assert receiver.verified
    assert receiver.outputs == (42,)
    assert receiver.num_bytes == 40 + 40 + 40
    assert receiver.num_frames == 3


@pytest.mark.parametrize("missing", range(3))
def test_a_missing_frame_leaves_the_transfer_unverified(missing: int) -> None:
    receiver = make_receiver()
    take_all(receiver, [item for item in FRAMES if item.sequence != missing])
    receiver.take_done(DONE, 1.0)
    assert not receiver.verified


def test_all_cells_without_the_last_word_are_not_enough() -> None:
    receiver = make_receiver()
    take_all(receiver, FRAMES)
    assert not receiver.verified


def test_a_sender_that_leaves_cells_out_is_found_though_it_counts_right() -> None:
    receiver = make_receiver()
    take_all(receiver, FRAMES[:2])
    receiver.take_done(msgspec.structs.replace(DONE, num_frames=2), 1.0)
    assert not receiver.verified


def test_a_wrong_count_of_frames_leaves_the_transfer_unverified() -> None:
    receiver = make_receiver()
    take_all(receiver, FRAMES)
    receiver.take_done(msgspec.structs.replace(DONE, num_frames=4), 1.0)
    assert not receiver.verified


def test_a_changed_byte_is_found() -> None:
    problem = make_receiver().take_frame(FRAMES[0], 6, 1.0)
    assert problem == "checksum of frame 0 is 0x6, sent as 0x5"


def test_a_repeated_frame_changes_nothing() -> None:
    receiver = make_receiver()
    take_all(receiver, [*FRAMES, *FRAMES])
    receiver.take_done(DONE, 1.0)
    assert receiver.verified
    assert receiver.num_frames == 3
    assert receiver.num_bytes == 120


def test_a_repeated_frame_that_was_changed_is_found() -> None:
    receiver = make_receiver()
    take_all(receiver, FRAMES)
    assert receiver.take_frame(FRAMES[1], 6, 1.0) == "checksum of frame 1 is 0x6, sent as 0x5"


def test_a_sequence_number_used_for_other_cells_is_found() -> None:
    receiver = make_receiver()
    take_all(receiver, FRAMES[:1])
    problem = receiver.take_frame(frame(0, (2, 4), (2, 4)), 5, 1.0)
    assert problem == "frame 0 came again with other cells"


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [((0, 2), (2, 3)), ((1, 3), (3, 5)), ((0, 4), (2, 5)), ((1, 2), (3, 4))],
)
def test_cells_that_are_here_already_are_refused(layers: tuple[int, int], blocks: tuple[int, int]) -> None:
    receiver = make_receiver()
    take_all(receiver, FRAMES[:1])
    assert receiver.take_frame(frame(9, layers, blocks), 5, 1.0) == "frame 9 brings cells that are here already"


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [
        ((0, 4), (1, 3)),  # before the reservation: the shared prefix
        ((0, 4), (4, 6)),  # behind it
        ((0, 4), (3, 3)),  # nothing
        ((0, 4), (4, 3)),  # backwards
        ((0, 5), (2, 3)),  # layers that are not there
        ((-1, 2), (2, 3)),
        ((2, 2), (2, 3)),
        ((3, 1), (2, 3)),
    ],
)
def test_cells_outside_the_reservation_are_refused(layers: tuple[int, int], blocks: tuple[int, int]) -> None:
    receiver = make_receiver()
    assert receiver.take_frame(frame(0, layers, blocks), 5, 1.0) == "frame 0 names cells outside the reservation"
    take_all(receiver, [msgspec.structs.replace(item, sequence=item.sequence + 1) for item in FRAMES])


def test_a_prompt_that_is_cached_as_a_whole_needs_the_last_word_alone() -> None:
    receiver = make_receiver(Grant(TRANSFER, (), 5, 1000))
    assert not receiver.verified
    receiver.take_done(KvDone(TRANSFER, 0, 0, (42,)), 3.0)
    assert receiver.verified
    assert receiver.first_at == receiver.last_at == 3.0


def test_the_time_on_the_wire_is_from_the_first_frame_to_the_last() -> None:
    receiver = make_receiver()
    for at, item in zip((2.0, 3.0, 5.5), FRAMES, strict=True):
        receiver.take_frame(item, 5, at)
    receiver.take_done(DONE, 6.0)
    assert (receiver.first_at, receiver.last_at) == (2.0, 6.0)


# -- the sender -------------------------------------------------------------------------------------------------------


def make_sender(grant: Grant = GRANT) -> KvSender:
    return KvSender(WorkerId("d0"), 0, grant, Lease(1.0))


def test_a_frame_names_the_finished_blocks_that_were_not_sent() -> None:
    sender = make_sender()
    assert sender.frame(0, 2, 2, 10) is None  # the receiver has blocks 0 and 1
    assert sender.frame(0, 2, 4, 10) == KvData(TRANSFER, 0, 0, 0, 2, 2, 4, 40)
    assert sender.frame(2, 4, 4, 10) == KvData(TRANSFER, 0, 1, 2, 4, 2, 4, 40)
    sender.chunk_done(4)
    assert sender.frame(0, 2, 4, 10) is None
    last = sender.frame(0, 2, 5, 10)
    assert last == KvData(TRANSFER, 0, 2, 0, 2, 4, 5, 20)
    assert sender.target_blocks(last) == (13,)
    assert sender.num_frames == 3


@given(
    first_block=st.integers(0, 6),
    num_blocks=st.integers(0, 8),
    layers_per_frame=st.integers(1, NUM_LAYERS),
    cuts=st.lists(st.integers(0, 14)),
    order=st.randoms(use_true_random=False),
)
def test_whatever_the_chunks_and_the_layers_the_receiver_gets_each_cell_once(
    first_block: int, num_blocks: int, layers_per_frame: int, cuts: list[int], order: Random
) -> None:
    end = first_block + num_blocks
    grant = Grant(TRANSFER, tuple(range(50, 50 + num_blocks)), first_block, 1000)
    sender, receiver = make_sender(grant), make_receiver(grant)
    sent: list[KvData] = []
    for border in [*sorted(min(cut, end) for cut in cuts), end]:
        for low in range(0, NUM_LAYERS, layers_per_frame):
            item = sender.frame(low, min(low + layers_per_frame, NUM_LAYERS), border, 10)
            if item is not None:
                sent.append(item)
        sender.chunk_done(border)
    order.shuffle(sent)
    take_all(receiver, sent)
    receiver.take_done(KvDone(TRANSFER, 0, sender.num_frames, (1,)), 1.0)
    assert receiver.verified
    assert receiver.num_bytes == num_blocks * NUM_LAYERS * 10


# -- leases -----------------------------------------------------------------------------------------------------------


def test_a_lease_ends_after_its_time_of_silence_and_at_most_a_tick_later() -> None:
    lease = Lease(1.0)
    for _ in range(3):
        lease.pass_seconds(1 / 3)
        assert not lease.is_expired  # a sign of life may have come just before the first of them
    lease.pass_seconds(1 / 3)
    assert lease.is_expired


def test_a_sign_of_life_starts_the_lease_anew() -> None:
    lease = Lease(1.0)
    for _ in range(10):
        lease.pass_seconds(0.9)
        lease.renew()
    assert not lease.is_expired


def test_a_sign_of_life_may_bring_another_length() -> None:
    lease = Lease(1.0)
    lease.renew(5.0)
    lease.pass_seconds(4.9)
    assert not lease.is_expired
