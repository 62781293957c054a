"""The outbox: order, windows, cancels and bounds, without a socket."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transload.control.messages import (
    CancelSends,
    KvAbort,
    KvAbortAck,
    KvCredit,
    KvData,
    KvDone,
    KvRenew,
    SendFrame,
    TransferId,
    WorkerId,
)
from transload.errors import HandoffError
from transload.transfer.outbox import Outbox, key_of
from transload.transfer.wire import Ping, Pong

PEER = WorkerId("peer")


def data(transfer: int, sequence: int) -> SendFrame:
    return SendFrame(PEER, KvData(TransferId(transfer), 1, sequence, 0, 1, 0, 1, 1), (0,), (0,))


def done(transfer: int) -> SendFrame:
    return SendFrame(PEER, KvDone(TransferId(transfer), 1, 1, ()))


def renew(transfer: int) -> SendFrame:
    return SendFrame(PEER, KvRenew(TransferId(transfer), 1, 1))


def credit(transfer: int, num_frames: int) -> KvCredit:
    return KvCredit(TransferId(transfer), 1, num_frames)


def cancel(transfer: int) -> CancelSends:
    return CancelSends(PEER, TransferId(transfer), 1)


def taken(outbox: Outbox, count: int) -> list[object]:
    """What comes next, frames without their envelope."""
    items = [outbox.take() for _ in range(count)]
    return [item.frame if isinstance(item, SendFrame) else item for item in items]


def frames(*commands: SendFrame) -> list[object]:
    return [command.frame for command in commands]


def is_blocked(outbox: Outbox) -> bool:
    """Whether `take` would wait: a probe, which is never held back, then comes first."""
    outbox.put_probe(Ping(0))
    return outbox.take() == Ping(0) and not outbox_has_more(outbox)


def outbox_has_more(outbox: Outbox) -> bool:
    result: list[object] = []
    thread = threading.Thread(target=lambda: result.append(outbox.take()), daemon=True)
    thread.start()
    thread.join(0.05)
    if result:
        return True
    outbox.put_probe(Pong(0))  # so that the thread ends
    thread.join()
    return False


def test_frames_of_a_transfer_leave_in_the_order_they_came() -> None:
    outbox = Outbox(PEER, window_frames=10, max_frames=10)
    commands = [data(1, 0), data(1, 1), renew(1), done(1)]
    for command in commands:
        outbox.put(command)
    assert taken(outbox, 4) == frames(*commands)


def test_a_transfer_without_credit_waits_and_others_pass() -> None:
    outbox = Outbox(PEER, window_frames=2, max_frames=20)
    for command in (data(1, 0), data(1, 1), data(1, 2), done(1), data(2, 0), renew(3)):
        outbox.put(command)
    assert taken(outbox, 4) == frames(data(1, 0), data(1, 1), data(2, 0), renew(3))
    assert is_blocked(outbox)
    outbox.credit(credit(1, 1))
    assert taken(outbox, 2) == frames(data(1, 2), done(1))
    assert len(outbox) == 0


def test_an_abort_does_not_overtake_the_data_of_its_own_transfer() -> None:
    outbox = Outbox(PEER, window_frames=1, max_frames=20)
    acknowledgement = SendFrame(PEER, KvAbortAck(TransferId(1), 1))
    for command in (data(1, 0), data(1, 1), acknowledgement):
        outbox.put(command)
    assert taken(outbox, 1) == frames(data(1, 0))
    assert is_blocked(outbox)
    outbox.credit(credit(1, 1))
    assert taken(outbox, 2) == frames(data(1, 1), acknowledgement)


def test_a_cancel_comes_first_and_takes_data_away_but_no_abort() -> None:
    outbox = Outbox(PEER, window_frames=1, max_frames=20)
    abort = SendFrame(PEER, KvAbort(TransferId(1), 1, "why"))
    for command in (data(1, 0), data(1, 1), data(1, 2), done(1), abort, data(2, 0)):
        outbox.put(command)
    assert taken(outbox, 1) == frames(data(1, 0))
    assert taken(outbox, 1) == frames(data(2, 0))
    assert outbox.cancel(cancel(1))
    assert taken(outbox, 2) == [cancel(1), abort.frame]
    assert len(outbox) == 0


def test_a_cancelled_transfer_gives_its_window_back() -> None:
    outbox = Outbox(PEER, window_frames=1, max_frames=20)
    outbox.put(data(1, 0))
    taken(outbox, 1)
    outbox.cancel(cancel(1))
    taken(outbox, 1)
    outbox.put(data(1, 5))
    assert taken(outbox, 1) == frames(data(1, 5))


def test_a_transfer_with_endless_credit_does_not_starve_the_others() -> None:
    outbox = Outbox(PEER, window_frames=1, max_frames=1000)
    for sequence in range(100):
        outbox.put(data(1, sequence))
    taken(outbox, 1)
    assert is_blocked(outbox)  # so all of it has been set aside
    order: list[object] = []
    for step in range(50):
        outbox.credit(credit(1, 1000))
        outbox.put(renew(2 + step))
        order.extend(taken(outbox, 1))
    assert Counter(type(frame).__name__ for frame in order)["KvRenew"] >= 20


def test_a_peer_that_takes_nothing_is_noticed_by_the_bound() -> None:
    outbox = Outbox(PEER, window_frames=1, max_frames=3)
    for sequence in range(3):
        outbox.put(data(1, sequence))
    with pytest.raises(HandoffError, match="does not take its frames: 3 wait, 3 may"):
        outbox.put(renew(1))
    with pytest.raises(HandoffError, match="does not take its frames"):
        outbox.put_credit((TransferId(9), 1), 1)


def test_a_credit_takes_the_place_of_an_older_one_of_its_transfer() -> None:
    outbox = Outbox(PEER, window_frames=1, max_frames=1)
    for num_frames in range(1, 6):
        outbox.put_credit((TransferId(9), 1), num_frames)
    assert taken(outbox, 1) == [credit(9, 5)]


def test_a_closed_outbox_ends_the_sender_but_first_answers_cancels() -> None:
    outbox = Outbox(PEER, window_frames=1, max_frames=10)
    outbox.put(data(1, 0))
    assert outbox.cancel(cancel(2))
    outbox.close()
    outbox.put(data(1, 1))
    outbox.put_credit((TransferId(1), 1), 1)
    assert taken(outbox, 2) == [cancel(2), None]
    assert len(outbox) == 0


def test_a_cancel_that_the_sender_never_saw_is_answered_once() -> None:
    outbox = Outbox(PEER, window_frames=1, max_frames=10)
    assert outbox.cancel(cancel(1))
    assert outbox.stop() == [cancel(1)]
    assert outbox.stop() == []
    assert not outbox.cancel(cancel(1))


def test_credit_for_an_unknown_transfer_changes_nothing() -> None:
    outbox = Outbox(PEER, window_frames=1, max_frames=10)
    outbox.credit(credit(8, 3))
    outbox.put(data(8, 0))
    outbox.put(data(8, 1))
    assert taken(outbox, 1) == frames(data(8, 0))
    assert is_blocked(outbox)


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["data", "renew", "take", "credit"])), max_size=120))
def test_whatever_happens_each_transfer_keeps_its_order_and_its_window(steps: list[tuple[int, str]]) -> None:
    window_frames = 3
    outbox = Outbox(PEER, window_frames=window_frames, max_frames=10_000)
    put: dict[int, list[object]] = defaultdict(list)
    got: dict[int, list[object]] = defaultdict(list)
    sequences, sent, credited = Counter[int](), Counter[int](), Counter[int]()

    def note(item: object) -> None:
        assert isinstance(item, SendFrame)
        transfer = int(item.frame.transfer)
        got[transfer].append(item.frame)
        if isinstance(item.frame, KvData):
            sent[transfer] += 1
            assert sent[transfer] - credited[transfer] <= window_frames

    def may_take() -> bool:
        """The outbox has something that need not wait for credit."""
        for transfer, all_put in put.items():
            waiting = all_put[len(got[transfer]) :]
            if waiting and (not isinstance(waiting[0], KvData) or sent[transfer] - credited[transfer] < window_frames):
                return True
        return False

    for transfer, step in steps:
        if step == "data":
            command = data(transfer, sequences[transfer])
            sequences[transfer] += 1
            put[transfer].append(command.frame)
            outbox.put(command)
        elif step == "renew":
            put[transfer].append(renew(transfer).frame)
            outbox.put(renew(transfer))
        elif step == "credit":
            credited[transfer] = sent[transfer]
            outbox.credit(credit(transfer, sent[transfer]))
        elif may_take():
            note(outbox.take())
    while may_take():
        note(outbox.take())
        for transfer in put:
            credited[transfer] = sent[transfer]
            outbox.credit(credit(transfer, sent[transfer]))
    assert got == {transfer: all_put for transfer, all_put in put.items() if all_put} or dict(got) == dict(put)
    assert len(outbox) == 0


class Parked:
    """An outbox whose sender waits, in a thread; what it takes after that is in `taken`."""

    def __init__(self) -> None:
        self.outbox = Outbox(PEER, window_frames=4, max_frames=100)
        self.taken: list[object] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        while not self.outbox._is_parked:
            time.sleep(0.001)

    def _run(self) -> None:
        while (item := self.outbox.take()) is not None:
            self.taken.append(item)

    def end(self) -> list[object]:
        """Everything that the sender has taken."""
        while not (self.outbox._is_parked and not len(self.outbox)):
            time.sleep(0.001)
        self.outbox.close()
        self._thread.join()
        return self.taken


def test_a_message_is_written_at_once_where_the_sender_waits_and_nothing_else() -> None:
    parked = Parked()
    written = bytearray()

    def write(message: bytes) -> int:
        written.extend(message)
        return len(message)

    assert parked.outbox.send_now(b"message", write)
    assert written == b"message"
    assert parked.end() == []


def test_what_the_socket_did_not_take_at_once_is_written_by_the_sender_before_anything_else() -> None:
    parked = Parked()
    assert parked.outbox.send_now(b"message", lambda _: 3)
    parked.outbox.put(done(1))
    assert parked.end() == [b"sage", done(1)]


def test_a_transfer_whose_end_is_written_at_once_is_forgotten() -> None:
    parked = Parked()
    for transfer in range(3):
        parked.outbox.put(data(transfer, 0))
        while len(parked.outbox) or not parked.outbox._is_parked:
            time.sleep(0.001)
        assert parked.outbox.send_now(b"done", len, ends=key_of(done(transfer).frame))
    assert not parked.outbox._unacknowledged
    parked.end()


def test_nothing_is_written_at_once_where_the_socket_is_full() -> None:
    parked = Parked()
    assert not parked.outbox.send_now(b"message", lambda _: 0)
    assert parked.end() == []


def test_nothing_overtakes_what_waits_or_is_being_sent() -> None:
    outbox = Outbox(PEER, window_frames=4, max_frames=100)
    assert not outbox.send_now(b"message", len), "the sender is at work"
    outbox.put(done(1))
    assert not outbox.send_now(b"message", len)
