"""Steps that work in a peer's blocks: what they reach, and what they do not reach any more."""

from __future__ import annotations

import sys

import numpy as np
import numpy.typing as npt
import pytest

from tests.transfer.rig import LARGE, SMALL, Handoff, Worker, window_of
from transload.control.messages import KvData, PeerFrame, PeerLost, PeerUp, SendFrame
from transload.errors import HandoffError
from transload.transfer.layout import KvLayout

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="maps memory of others at addresses of its own choice")
ODD = KvLayout(model="odd", num_layers=3, num_kv_heads=1, head_dim=20, block_size=4, dtype="float32")
"""Blocks of 1,920 bytes: no window begins where the pool before it ends."""


def linked(one: Worker, other: Worker) -> tuple[PeerUp, PeerUp]:
    """How each is told of the other."""
    one.links.connect(other.name, other.links.address, "direct")
    ups = one.next(), other.next()
    assert all(isinstance(up, PeerUp) and up.one_sided for up in ups)
    return ups  # type: ignore[return-value]


def assert_cells_are_copied(sender: Worker, receiver: Worker, before: npt.NDArray[np.uint8]) -> Handoff:
    """Over a link that is up, with a checksum. `before`: what the receiver's blocks held."""
    handoff = Handoff(sender, receiver)
    handoff.expect()
    sender.links.send(handoff.whole())
    (event,) = receiver.data_frames(1)
    assert isinstance(event.frame, KvData)
    assert event.arrived_checksum == event.frame.checksum != 0
    handoff.assert_arrived(before)
    return handoff


def in_place(handoff: Handoff) -> SendFrame:
    """The word that everything is where it belongs."""
    frame = handoff.whole().frame
    assert isinstance(frame, KvData)
    fields = {name: getattr(frame, name) for name in frame.__struct_fields__}
    return SendFrame(handoff.receiver.name, KvData(**{**fields, "in_place": True}))


@pytest.mark.parametrize("layout", [SMALL, LARGE, ODD], ids=["small", "large", "odd"])
def test_what_is_written_in_a_window_lies_in_the_peers_blocks(layout: KvLayout) -> None:
    with (
        Worker("p", layout=layout, num_blocks=7, with_windows=True) as sender,
        Worker("d", layout=layout, num_blocks=11, with_windows=True) as receiver,
    ):
        sender.fill(1)
        own = sender.blocks.copy()
        up, back = linked(sender, receiver)
        assert (up.window_blocks, back.window_blocks) == (11, 7)
        handoff = Handoff(sender, receiver, num_blocks=5)
        handoff.expect()
        window_of(sender, up)[list(handoff.target)] = own[list(handoff.source)]
        sender.links.send(in_place(handoff))
        (event,) = receiver.data_frames(1)
        assert event.arrived_checksum == 0
        handoff.assert_arrived(np.zeros_like(receiver.blocks))
        assert np.array_equal(window_of(receiver, back), own)
        assert [stats.transport for stats in sender.links.stats()] == ["direct"]


@pytest.mark.parametrize("is_sender", [False, True])
def test_cells_are_copied_when_one_side_has_run_out_of_addresses(is_sender: bool) -> None:
    with Worker("p", with_windows=True) as sender, Worker("d", with_windows=True) as receiver:
        arena = (sender if is_sender else receiver).memory.arena
        assert arena is not None
        arena._next_block = arena.num_blocks
        sender.fill(1)
        before = receiver.blocks.copy()
        up, back = linked(sender, receiver)
        assert [one.window is None for one in (up, back)] == [is_sender, not is_sender]
        assert_cells_are_copied(sender, receiver, before)


def test_a_window_that_is_closed_reaches_nobody() -> None:
    with Worker("p", with_windows=True) as sender, Worker("d", with_windows=True) as receiver:
        up, _ = linked(sender, receiver)
        (window,) = sender.links.windows()
        blocks = window_of(sender, up)
        blocks[:] = 1
        assert window.is_open
        sender.links.disconnect(receiver.name)
        assert sender.wait_for(PeerLost) == receiver.wait_for(PeerLost) or True
        assert not window.is_open
        blocks[:] = 2  # as a step does that is still running
        assert (receiver.blocks == 1).all()
        again, _ = linked(sender, receiver)
        assert again.link == up.link + 1
        blocks[:] = 3  # and it does not reach the next link's peer either
        assert (receiver.blocks == 1).all()
        window_of(sender, again)[:] = 4
        assert (receiver.blocks == 4).all()


def test_frames_for_a_link_that_has_ended_do_not_go_over_the_next() -> None:
    with Worker("p", with_windows=True) as sender, Worker("d", with_windows=True) as receiver:
        up, _ = linked(sender, receiver)
        sender.links.disconnect(receiver.name)
        sender.wait_for(PeerLost)
        receiver.wait_for(PeerLost)
        again, _ = linked(sender, receiver)
        for link in (up.link, again.link):
            done = Handoff(sender, receiver, transfer=50 + link).done()
            sender.links.send(SendFrame(done.peer, done.frame, link=link))
        event = receiver.next()
        assert isinstance(event, PeerFrame)
        assert event.frame.transfer == 50 + again.link
        assert receiver.events.empty()


@pytest.mark.parametrize(
    ("here", "there", "transport"), [(True, False, "direct"), (False, True, "auto"), (True, True, "shm")]
)
def test_cells_are_copied_where_either_side_cannot_or_must_not_work_in_place(
    here: bool, there: bool, transport: str
) -> None:
    with Worker("p", with_windows=here) as sender, Worker("d", with_windows=there) as receiver:
        sender.fill(1)
        before = receiver.blocks.copy()
        sender.links.connect(receiver.name, receiver.links.address, transport)  # type: ignore[arg-type]
        for worker in (sender, receiver):
            up = worker.next()
            assert isinstance(up, PeerUp)
            assert up.window is None
        handoff = assert_cells_are_copied(sender, receiver, before)
        with pytest.raises(HandoffError, match="is in place, but our steps cannot work"):
            sender.links.send(in_place(handoff))
