"""Links for feed-forward calls, both ends in one process: rows there and back, waiting, peers that talk nonsense."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from transload.control.ffn_messages import CallKey, FfnBusy, FfnReply, FfnRequest, Piece, SessionId
from transload.control.messages import WorkerId
from transload.errors import HandoffError
from transload.model.native.ring import compiled_rings
from transload.transfer.ffn_callers import CallerGone, CallerUp, FfnCallers
from transload.transfer.ffn_link import ArrivedAnswer, ArrivedCall, CalleeEnd, CallerEnd, CallFrame, SlotSizes
from transload.transfer.ffn_meeting import PROTOCOL, FfnWeights, Offer, Opening, Party, accept_ffn, dial_ffn
from transload.transfer.ffn_ring import RingCallee, RingCaller, RingMemory, create_memory
from transload.transfer.ffn_waiting import Waiter
from transload.transfer.listener import Listener, PeerAddress, host_id

SIZES = SlotSizes(num_slots=3, call_bytes=9000, answer_bytes=9000)
SESSION = SessionId(5)
SECRET = b"a secret of a test"
WEIGHTS = FfnWeights(weights="w", num_layers=4, hidden_size=8, dtype="float32", deterministic=False)


def frame(sequence: int, layer: int = 0) -> CallFrame:
    return CallFrame(FfnRequest(CallKey(SESSION, 1, layer, 0, sequence), ((Piece(0), 2),)), 2)


def ring(code: str = "Python", sizes: SlotSizes = SIZES) -> tuple[CallerEnd, CalleeEnd]:
    """`code`: Python, compiled, or the caller's compiled alone."""
    if code != "Python" and compiled_rings() is None:
        pytest.skip("no C compiler here")
    ours, theirs = socket.socketpair()
    fd = create_memory(sizes)
    kernels = compiled_rings() if code != "Python" else None
    caller = RingCaller(WorkerId("ffn-0"), RingMemory(os.dup(fd), sizes), ours, kernels)
    return caller, RingCallee(SESSION, RingMemory(fd, sizes), theirs, kernels if code == "compiled" else None)


class FfnWorker:
    """Lets callers in, in threads of its own."""

    def __init__(self, weights: FfnWeights = WEIGHTS) -> None:
        self.ends: list[CalleeEnd] = []
        self.problems: list[str] = []
        self._me = Party(worker=WorkerId("ffn-0"), incarnation=1, secret=SECRET)
        self._offer = Offer(weights=weights, pieces=(Piece(0),))
        self._listener = Listener(me=self._me.worker, bind_host="127.0.0.1", advertise_host=None, shares_memory=True)
        self.address = PeerAddress(
            worker=self._me.worker,
            incarnation=1,
            host_id=host_id(),
            unix_name=self._listener.unix_name,
            host=self._listener.host,
            port=self._listener.port,
            layout_digest=PROTOCOL,
        )
        self._listener.start(lambda *call: threading.Thread(target=self._let_in, args=call, daemon=True).start())

    def _let_in(self, sock: socket.socket, one_sided: bool) -> None:
        try:
            self.ends.append(accept_ffn(self._me, sock, one_sided, self._offer))
        except (OSError, HandoffError) as error:
            self.problems.append(str(error))

    def close(self) -> None:
        self._listener.close()
        for end in self.ends:
            end.close()


def opening(weights: FfnWeights = WEIGHTS) -> Opening:
    return Opening(session=SESSION, weights=weights, sizes=SIZES)


def attention(secret: bytes = SECRET) -> Party:
    return Party(worker=WorkerId("decode-0"), incarnation=1, secret=secret)


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def worker() -> Iterator[FfnWorker]:
    worker = FfnWorker()
    yield worker
    worker.close()


@pytest.fixture(params=["Python", "compiled", "caller compiled", "shm", "tcp"])
def ends(request: pytest.FixtureRequest, worker: FfnWorker) -> Iterator[tuple[CallerEnd, CalleeEnd]]:
    if request.param not in ("shm", "tcp"):
        caller, callee = ring(request.param)
    else:
        caller, pieces = dial_ffn(attention(), worker.address, request.param, opening())
        assert pieces == {Piece(0)}
        assert caller.transport == request.param
        eventually(lambda: worker.ends)
        callee = worker.ends[0]
        assert callee.session == SESSION
    yield caller, callee
    caller.close()
    callee.close()


def calls(end: CalleeEnd) -> list[ArrivedCall]:
    eventually(end.has_news)
    return end.poll()


def answers(end: CallerEnd) -> list[ArrivedAnswer]:
    eventually(end.has_news)
    return end.poll()


def post(caller: CallerEnd, sequence: int, rows: bytes) -> int:
    slot = caller.reserve()
    assert slot is not None
    caller.call_buffer(slot)[: len(rows)] = rows
    caller.post(slot, frame(sequence), len(rows))
    return slot


def test_rows_cross_there_and_back(ends: tuple[CallerEnd, CalleeEnd]) -> None:
    caller, callee = ends
    for number in range(1, 20):
        rows = os.urandom(number * 400)
        slot = post(caller, number, rows)
        (call,) = calls(callee)
        assert (call.slot, call.frame, bytes(call.rows)) == (slot, frame(number), rows)
        callee.answer_buffer(slot)[: len(rows)] = rows[::-1]
        callee.answer(slot, FfnReply(call.frame.request.key), len(rows))
        (answer,) = answers(caller)
        assert (answer.slot, answer.answer) == (slot, FfnReply(call.frame.request.key))
        assert bytes(answer.rows) == rows[::-1]
        caller.release(slot)


def test_answers_come_in_any_order_and_an_answer_may_have_no_rows(ends: tuple[CallerEnd, CalleeEnd]) -> None:
    caller, callee = ends
    slots = [post(caller, number, bytes([number]) * 9000) for number in range(3)]
    assert caller.reserve() is None
    arrived: list[ArrivedCall] = []
    while len(arrived) < 3:
        arrived += calls(callee)
    callee.answer(slots[2], FfnBusy(arrived[2].frame.request.key), 0)
    callee.answer_buffer(slots[0])[:4] = b"done"
    callee.answer(slots[0], FfnReply(arrived[0].frame.request.key), 4)
    found: list[ArrivedAnswer] = []
    while len(found) < 2:
        found += answers(caller)
    assert [(one.slot, type(one.answer), bytes(one.rows)) for one in found] == [
        (slots[2], FfnBusy, b""),
        (slots[0], FfnReply, b"done"),
    ]
    caller.release(slots[0])
    assert caller.reserve() == slots[0]


def test_a_sleeping_end_is_woken_by_a_call_an_answer_and_a_nudge(ends: tuple[CallerEnd, CalleeEnd]) -> None:
    caller, callee = ends
    waiter = Waiter(0.0, compiled_rings())  # never spins
    echo_waiter = Waiter(0.0)

    def echo() -> None:
        for _ in range(5):
            while not (arrived := callee.poll()):
                echo_waiter.wait([callee], None)
            time.sleep(0.005)  # so that the caller sleeps
            callee.answer(arrived[0].slot, FfnReply(arrived[0].frame.request.key), 0)

    thread = threading.Thread(target=echo)
    thread.start()
    for number in range(5):
        slot = post(caller, number, b"x")
        while not (found := caller.poll()):
            waiter.wait([caller], None)
        assert found[0].answer.key.sequence == number
        caller.release(slot)
    thread.join()
    assert waiter.num_sleeps > 0
    threading.Timer(0.02, waiter.nudge).start()
    assert waiter.wait([caller], time.monotonic() + 20)
    waiter.close()
    echo_waiter.close()


def test_rows_may_come_from_memory_of_the_callers_own(ends: tuple[CallerEnd, CalleeEnd]) -> None:
    caller, callee = ends
    rows = bytearray(os.urandom(5000))
    slot = caller.reserve()
    assert slot is not None
    caller.post(slot, frame(1), len(rows), ctypes.addressof(ctypes.c_char.from_buffer(rows)))
    (call,) = calls(callee)
    assert bytes(call.rows) == rows


@pytest.mark.parametrize("code", ["Python", "compiled"])
def test_many_rows_cross_as_few_do(code: str) -> None:
    many = SlotSizes(num_slots=1, call_bytes=1 << 20, answer_bytes=1 << 20)
    caller, callee = ring(code, many)
    rows = bytearray(os.urandom(many.call_bytes))
    slot = caller.reserve()
    assert slot is not None
    caller.post(slot, frame(1), len(rows), ctypes.addressof(ctypes.c_char.from_buffer(rows)))
    (call,) = calls(callee)
    assert call.rows == rows
    del call
    caller.close()
    callee.close()


def test_more_rows_than_a_slot_has_room_for_are_not_sent(ends: tuple[CallerEnd, CalleeEnd]) -> None:
    caller, callee = ends
    slot = caller.reserve()
    assert slot is not None
    with pytest.raises(AssertionError, match="no slot has room for"):
        caller.post(slot, frame(1), SIZES.call_bytes + 1)
    with pytest.raises(AssertionError, match="no slot has room for"):
        callee.answer(slot, FfnReply(frame(1).request.key), SIZES.answer_bytes + 1)
    assert not callee.has_news()
    assert not caller.has_news()


def test_what_a_wait_has_found_is_not_lost_to_what_comes_after() -> None:
    caller, callee = ring("compiled")
    kernels = compiled_rings()
    assert kernels is not None
    assert callee.compiled_ring is not None
    assert kernels.await_news([callee.compiled_ring], 1e-4) == 0.0
    for number in (1, 2):
        post(caller, number, b"x")
        assert kernels.await_news([callee.compiled_ring], 20.0) > 0.0
        assert callee.has_news()
        assert not callee.doze()
    found = [call.frame.request.key.sequence for call in callee.poll()]
    assert callee.has_news()  # the second has come after the look that found the first
    found += [call.frame.request.key.sequence for call in callee.poll()]
    assert found == [1, 2]
    assert not callee.has_news()
    caller.close()
    callee.close()


def test_a_spinning_end_finds_what_comes_and_stops_when_nothing_does(ends: tuple[CallerEnd, CalleeEnd]) -> None:
    caller, callee = ends
    rings = [end.compiled_ring for end in ends]
    waiter = Waiter(30.0, compiled_rings() if None not in rings else None)
    timer = threading.Timer(0.02, post, [caller, 1, b"x"])
    timer.start()
    assert waiter.wait([callee], time.monotonic() + 20)  # an end belongs to one thread
    assert (waiter.num_spins, waiter.num_sleeps) == (1, 0)
    assert len(callee.poll()) == 1
    timer.join()
    assert not waiter.wait([callee], time.monotonic() + 0.003)
    waiter.close()


def test_a_wait_ends_when_it_is_due(ends: tuple[CallerEnd, CalleeEnd]) -> None:
    waiter = Waiter(1e-4)
    due_at = time.monotonic() + 0.003
    while time.monotonic() < due_at:
        assert not waiter.wait([ends[0]], due_at)
    waiter.close()


@pytest.mark.parametrize("gone", ["caller", "callee"])
def test_the_end_of_a_peer_is_found_out_by_waiting(ends: tuple[CallerEnd, CalleeEnd], gone: str) -> None:
    left, other = (ends[1], ends[0]) if gone == "caller" else ends
    other.close()
    waiter = Waiter(0.0)
    eventually(lambda: waiter.wait([left], None) and left.has_news())
    with pytest.raises(HandoffError):
        left.poll()
    waiter.close()


# -- strangers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [("weights", "v"), ("num_layers", 5), ("hidden_size", 16), ("dtype", "bfloat16"), ("deterministic", True)],
)
@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_workers_that_compute_something_else_refuse_each_other_by_name(
    worker: FfnWorker, transport: str, field: str, value: object
) -> None:
    other = FfnWeights(**{**{name: getattr(WEIGHTS, name) for name in WEIGHTS.__struct_fields__}, field: value})
    with pytest.raises(HandoffError, match=f"{field}: got {value}, wanted {getattr(WEIGHTS, field)}"):
        dial_ffn(attention(), worker.address, transport, opening(other))
    assert worker.ends == []


def test_a_caller_without_the_secret_is_refused(worker: FfnWorker) -> None:
    with pytest.raises(HandoffError, match="secret"):
        dial_ffn(attention(b"another secret......"), worker.address, "shm", opening())
    assert worker.ends == []


def test_sizes_that_nobody_needs_are_refused(worker: FfnWorker) -> None:
    for sizes in (
        SlotSizes(num_slots=65, call_bytes=1, answer_bytes=1),
        SlotSizes(num_slots=1, call_bytes=1 << 40, answer_bytes=1),
        SlotSizes(num_slots=1, call_bytes=1, answer_bytes=0),
        SlotSizes(num_slots=64, call_bytes=1 << 30, answer_bytes=1 << 30),
    ):
        with pytest.raises(HandoffError, match="possible"):
            dial_ffn(attention(), worker.address, "shm", Opening(session=SESSION, weights=WEIGHTS, sizes=sizes))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ({0: 1, 64: 3, 65: 10, 66: 0}, "slot 3"),
        ({0: 1, 64: 0, 65: 1 << 40, 66: 0}, "slot 0 with 1099511627776"),
        ({0: 1, 64: 0, 65: 0, 66: 0}, "slot 0 with 0"),
        ({0: 1, 64: 0, 65: 10, 66: 9001}, "9001 bytes"),
        ({0: 4}, "posted 4 entries into a ring of 3"),
        ({0: 1 << 63}, "entries into a ring of 3"),
        ({0: 1, 64: 0, 65: 10, 66: 0}, "cannot be read"),
    ],
)
@pytest.mark.parametrize("code", ["Python", "compiled"])
def test_what_a_peer_writes_into_the_ring_is_checked_before_it_is_used(
    code: str, words: dict[int, int], complaint: str
) -> None:
    caller, callee = ring(code)
    assert isinstance(caller, RingCaller)
    for place, value in words.items():
        caller._memory.words[place] = value
    with pytest.raises(HandoffError, match=complaint):
        callee.poll()
    caller.close()
    callee.close()


@pytest.mark.parametrize("code", ["Python", "compiled"])
def test_a_slot_is_not_used_twice_at_once(code: str) -> None:
    caller, callee = ring(code)
    slot = post(caller, 1, b"x")
    caller.post(slot, frame(2), 1)
    with pytest.raises(HandoffError, match="holds a call already"):
        callee.poll()
    callee.answer(slot, FfnReply(frame(1).request.key), 0)
    callee.answer(slot, FfnReply(frame(1).request.key), 0)
    with pytest.raises(HandoffError, match="holds no call"):
        caller.poll()
    caller.close()
    callee.close()


@pytest.mark.parametrize("prefix", [(1, 9001, 0), (0, 0, 0), (1 << 30, 0, 0), (10, 0, 3)])
def test_a_stream_is_checked_before_anything_is_stored(worker: FfnWorker, prefix: tuple[int, int, int]) -> None:
    caller, _ = dial_ffn(attention(), worker.address, "tcp", opening())
    eventually(lambda: worker.ends)
    os.write(caller.fileno(), struct.pack("<IIIQ", *prefix, 0))
    with pytest.raises(HandoffError, match="the peer has sent slot"):
        calls(worker.ends[0])
    caller.close()


def test_memory_that_could_shrink_is_not_mapped() -> None:
    fd = os.memfd_create("test")
    os.ftruncate(fd, 1 << 20)
    with pytest.raises(HandoffError, match="bytes long"):
        RingMemory(fd, SIZES)


# -- dialing ----------------------------------------------------------------------------------------------------------


def test_a_broken_link_is_dialed_again_until_nobody_wants_it(worker: FfnWorker) -> None:
    reports: list[tuple[str, str | None]] = []
    nudged = threading.Event()
    callers = FfnCallers(
        attention(), opening(), lambda name, _transport, problem: reports.append((name, problem)), nudged.set
    )

    def came() -> CallerUp:
        news: list[CallerUp | CallerGone] = []

        def look() -> bool:
            news.extend(callers.news())
            return bool(news)

        eventually(look)
        (one,) = news
        assert isinstance(one, CallerUp)
        return one

    callers.connect(worker.address, "shm")
    first = came()
    eventually(lambda: reports == [("ffn-0", None)])
    assert not callers.is_dialing
    first.end.close()
    callers.lost(WorkerId("ffn-0"), "broken")
    second = came()
    eventually(lambda: reports[1:] == [("ffn-0", "broken"), ("ffn-0", None)])
    callers.disconnect(WorkerId("ffn-0"))
    assert callers.news() == [CallerGone(WorkerId("ffn-0"))]
    callers.lost(WorkerId("ffn-0"), "closed")
    assert not callers.is_dialing
    second.end.close()
    callers.close()
