"""Who gets a link and who does not, and that both sides hear why."""

from __future__ import annotations

import contextlib
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from tests.transfer.rig import (
    SECRET,
    SMALL,
    WAIT_SECONDS,
    Handoff,
    RawPeer,
    Worker,
    at_port,
    eventually,
    hello_to,
    link_up,
)
from transload.control.messages import PeerLost, PeerUp, WorkerId
from transload.errors import HandoffError
from transload.transfer.hello import Handshake, Hello, LinkRefused
from transload.transfer.link import LinkOptions
from transload.transfer.links import LinkFailed
from transload.transfer.meeting import TransportChoice
from transload.transfer.memory import KvMemory
from transload.transfer.wire import pack

TRANSPORTS: list[TransportChoice] = ["shm", "tcp"]
both = pytest.mark.parametrize("transport", TRANSPORTS)
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs abstract Unix sockets")


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@linux
def test_workers_of_one_host_share_memory_unless_told_otherwise() -> None:
    for transport, one_sided in (("auto", True), ("shm", True), ("tcp", False)):
        with Worker("a") as one, Worker("b") as other:
            one.links.connect(other.name, other.links.address, transport)  # type: ignore[arg-type]
            assert one.next() == PeerUp(other.name, one_sided)
            assert other.next() == PeerUp(one.name, one_sided)


def test_a_link_has_one_name_at_both_ends_and_the_next_one_another() -> None:
    with Worker("a") as one, Worker("b") as other:
        for _ in range(2):
            one.links.connect(other.name, other.links.address, "tcp")
            for worker in (one, other):
                assert isinstance(worker.next(), PeerUp)
            one.links.disconnect(other.name)
            for worker in (one, other):
                assert isinstance(worker.next(), PeerLost)
    assert one.link_names == other.link_names
    assert len({0, *one.link_names}) == 3


def test_workers_of_two_hosts_use_tcp_and_cannot_be_told_to_share_memory() -> None:
    with Worker("a") as one, Worker("b") as other:
        elsewhere = msgspec.structs.replace(other.links.address, host_id="another kernel")
        one.links.connect(other.name, elsewhere, "shm")
        failed = one.next()
        assert isinstance(failed, LinkFailed)
        assert failed.peer == other.name
        assert "shm needs two workers on one Linux host" in failed.reason
        one.links.connect(other.name, elsewhere, "auto")
        assert one.next() == PeerUp(other.name, one_sided=False)


@linux
def test_a_host_whose_unix_sockets_cannot_be_seen_is_reached_over_tcp() -> None:
    with Worker("a") as one, Worker("b") as other:
        contained = msgspec.structs.replace(other.links.address, unix_name="in another network namespace")
        one.links.connect(other.name, contained, "auto")
        assert one.next() == PeerUp(other.name, one_sided=False)


@both
def test_another_layout_is_refused_and_named_on_both_sides(transport: TransportChoice) -> None:
    layout = msgspec.structs.replace(SMALL, block_size=8)
    with Worker("a") as one, Worker("b", layout=layout) as other:
        one.links.connect(other.name, other.links.address, transport)
        for worker, peer in ((one, "b"), (other, "a")):
            failed = worker.next()
            assert isinstance(failed, LinkFailed)
            assert failed.peer == peer
            assert f"layout digest: got {SMALL.digest.hex()}, wanted {layout.digest.hex()}" in failed.reason


@both
def test_another_secret_is_refused_on_both_sides(transport: TransportChoice) -> None:
    with Worker("a", secret=b"x" * 32) as one, Worker("b") as other:
        one.links.connect(other.name, other.links.address, transport)
        for worker, peer in ((one, other.name), (other, one.name)):
            failed = worker.next()
            assert isinstance(failed, LinkFailed)
            assert failed.peer == peer
            assert "secret: got a proof made with another secret" in failed.reason
        assert one.events.empty()


def test_a_short_secret_is_refused_at_the_start() -> None:
    memory = KvMemory(SMALL, 1)
    memory.close()
    with pytest.raises(HandoffError, match="needs at least 16"):
        Worker("a", secret=b"short")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 1}, "protocol version: got 1, wanted 2"),
        ({"magic": "GET / HTTP/1.1"}, "protocol: got 'GET / HTTP/1.1', wanted 'transload-link'"),
        ({"peer": WorkerId("c")}, "addressed worker: got c, wanted a"),
        ({"peer_incarnation": 7}, "addressed incarnation: got 7, wanted 1"),
        ({"one_sided": True}, "transport: got shm, wanted tcp"),
        ({"num_blocks": 0}, "hello: got a worker with my name, no blocks or no nonce"),
        ({"nonce": b"short"}, "hello: got a worker with my name, no blocks or no nonce"),
        ({"worker": WorkerId("a")}, "hello: got a worker with my name, no blocks or no nonce"),
    ],
)
def test_a_wrong_hello_is_refused_with_the_field_that_is_wrong(change: dict[str, Any], reason: str) -> None:
    with Worker("a") as worker:
        address = worker.links.address
        hello = msgspec.structs.replace(hello_to(address, "raw"), **change)
        with socket.create_connection((address.host, address.port)) as sock:
            handshake = Handshake(sock, hello, SECRET, time.monotonic() + WAIT_SECONDS)
            # The one who refuses tells the dialer, in the same words as it tells its own worker.
            handshake._me = msgspec.structs.replace(hello, one_sided=False)
            sock.sendall(pack(msgspec.msgpack.encode(hello)))
            with pytest.raises(LinkRefused) as refused:
                handshake._receive_hello()
        failed = worker.next()
        assert isinstance(failed, LinkFailed)
        assert reason in failed.reason
        assert reason in str(refused.value)


def test_a_hello_of_a_later_version_with_other_fields_is_still_named() -> None:
    with Worker("a") as worker:
        address = worker.links.address
        with socket.create_connection((address.host, address.port)) as sock:
            sock.sendall(
                pack(msgspec.msgpack.encode({"type": "Hello", "magic": "transload-link", "version": 9, "new": 1}))
            )
            failed = worker.next()
        assert isinstance(failed, LinkFailed)
        assert "protocol version: got 9, wanted 2" in failed.reason


def test_a_worker_that_answers_under_another_name_is_refused() -> None:
    with Worker("a") as one, Worker("b") as other:
        address = msgspec.structs.replace(other.links.address, worker=WorkerId("c"))
        one.links.connect(WorkerId("c"), address, "tcp")
        for worker in (one, other):
            failed = worker.next()
            assert isinstance(failed, LinkFailed)
            assert "addressed worker: got c, wanted b" in failed.reason


def test_a_worker_that_is_not_there_is_reported(listening: socket.socket) -> None:
    port = listening.getsockname()[1]
    listening.close()
    with Worker("a") as one, Worker("b") as other:
        one.links.connect(other.name, at_port(other.links.address, port), "tcp")
        failed = one.next()
        assert isinstance(failed, LinkFailed)
        assert failed.peer == "b"
        assert "no link from a to b over tcp" in failed.reason
        assert "refused" in failed.reason


def test_one_that_accepts_and_says_nothing_is_given_up(listening: socket.socket) -> None:
    with Worker("a", options=LinkOptions(handshake_seconds=0.2)) as one, Worker("b") as other:
        one.links.connect(other.name, at_port(other.links.address, listening.getsockname()[1]), "tcp")
        failed = one.next()
        assert isinstance(failed, LinkFailed)
        assert "not over within 0.2 s" in failed.reason


@pytest.mark.parametrize("said", [b"", b"\x10\x00\x00\x00"])
def test_a_caller_that_says_nothing_or_stops_halfway_is_dropped(said: bytes) -> None:
    with Worker("a", options=LinkOptions(handshake_seconds=0.2)) as worker:
        address = worker.links.address
        with socket.create_connection((address.host, address.port), timeout=WAIT_SECONDS) as sock:
            sock.sendall(said)
            assert sock.recv(1) == b""
        failed = worker.next()
        assert isinstance(failed, LinkFailed)
        assert failed.peer is None
        assert "not over within 0.2 s" in failed.reason


def test_a_caller_that_dribbles_gets_no_more_time(listening: socket.socket) -> None:
    with Worker("a", options=LinkOptions(handshake_seconds=0.3)) as worker:
        address = worker.links.address
        with socket.create_connection((address.host, address.port), timeout=WAIT_SECONDS) as sock:
            hello = pack(msgspec.msgpack.encode(hello_to(address, "raw")))
            started = time.monotonic()
            with contextlib.suppress(OSError):  # the worker has hung up
                for byte in hello:
                    sock.sendall(bytes((byte,)))
                    time.sleep(0.02)
            assert time.monotonic() - started < 0.02 * len(hello)
        assert isinstance(worker.next(), LinkFailed)


@pytest.mark.parametrize("seed", range(6))
def test_noise_on_the_listening_sockets_harms_nothing(seed: int) -> None:
    shuffled = random.Random(seed)
    with Worker("a") as one, Worker("b") as other:
        address = one.links.address
        for _ in range(10):
            family: tuple[int, Any] = (socket.AF_INET, (address.host, address.port))
            if address.unix_name and shuffled.random() < 0.5:
                family = (socket.AF_UNIX, "\0" + address.unix_name)
            with socket.socket(family[0]) as sock:
                sock.connect(family[1])
                noise = shuffled.randbytes(shuffled.randrange(2000))
                if shuffled.random() < 0.5:  # a frame as it should be, with noise in it
                    noise = pack(noise[:500] or b"\0")
                try:
                    sock.sendall(noise)
                    sock.shutdown(socket.SHUT_WR)
                except OSError:
                    pass  # it had heard enough
        for _ in range(10):
            assert isinstance(one.next(), LinkFailed)
        link_up(other, one, "auto")


def test_too_many_callers_at_once_are_turned_away_and_the_rest_of_the_time_it_works() -> None:
    with Worker("a", options=LinkOptions(handshake_seconds=2.0)) as one, Worker("b") as other:
        address = one.links.address
        idle = [socket.create_connection((address.host, address.port)) for _ in range(80)]
        failed = one.next()
        assert isinstance(failed, LinkFailed)
        assert "turned a caller away: 64 handshakes are under way" in failed.reason
        for sock in idle:
            sock.close()

        def is_quiet() -> bool:
            """No caller is left, nor one that has not been taken in yet: nothing is said for a while."""
            while not one.events.empty():
                one.events.get()
            time.sleep(0.3)
            return one.events.empty() and not any(thread.name == "kv-greet" for thread in threading.enumerate())

        eventually(is_quiet)
        link_up(other, one, "auto")


@both
def test_a_second_connect_changes_nothing(transport: TransportChoice) -> None:
    with Worker("a") as one, Worker("b") as other:
        for _ in range(5):
            one.links.connect(other.name, other.links.address, transport)
        assert isinstance(one.next(), PeerUp)
        assert isinstance(other.next(), PeerUp)
        one.links.connect(other.name, other.links.address, transport)
        assert one.links.measure(other.name) is not None
        assert one.events.empty()
        assert other.events.empty()


@both
@pytest.mark.parametrize("round_number", range(10))
def test_two_workers_that_dial_each_other_get_one_link(transport: TransportChoice, round_number: int) -> None:
    with Worker("a") as one, Worker("b") as other:
        start = threading.Barrier(2)

        def dial(me: Worker, peer: Worker) -> None:
            start.wait()
            me.links.connect(peer.name, peer.links.address, transport)

        threads = [threading.Thread(target=dial, args=pair) for pair in ((one, other), (other, one))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert one.next() == PeerUp(other.name, transport == "shm")
        assert other.next() == PeerUp(one.name, transport == "shm")
        eventually(lambda: not any("kv-dial" in thread.name for thread in threading.enumerate()))
        assert one.links.measure(other.name) is not None
        assert other.links.measure(one.name) is not None
        assert one.events.empty()
        assert other.events.empty()


@both
def test_a_restarted_peer_takes_the_place_of_the_one_before(transport: TransportChoice) -> None:
    with Worker("a") as one, Worker("b") as before, Worker("b", incarnation=2) as after:
        link_up(before, one, transport)
        after.links.connect(one.name, one.links.address, transport)
        assert one.next() == PeerLost(before.name)
        assert one.next() == PeerUp(after.name, transport == "shm", link=1)
        assert before.next() == PeerLost(one.name)
        assert after.next() == PeerUp(one.name, transport == "shm")
        assert [stats.incarnation for stats in one.links.stats()] == [2]
        # The one before comes late: it is refused and changes nothing.
        before.links.connect(one.name, one.links.address, transport)
        for worker in (before, one):
            failed = worker.next()
            assert isinstance(failed, LinkFailed)
            assert "incarnation: got 1, wanted 2 or later" in failed.reason
        handoff = Handoff(after, one)
        handoff.expect()
        after.links.send(handoff.whole())
        assert one.data_frames(1)


@linux
def test_a_new_link_waits_until_the_old_one_can_write_no_more() -> None:
    options = LinkOptions(handshake_seconds=0.5)
    with (
        Worker("a", options=options) as one,
        RawPeer(one, "b", one_sided=True) as stuck,
        Worker("b", incarnation=2, options=options) as after,
    ):
        after.links.connect(one.name, one.links.address, "shm")
        failed = after.next()
        assert isinstance(failed, LinkFailed)
        assert "wanted 1 to let go of memory" in failed.reason
        assert isinstance(one.next(), LinkFailed)
        assert one.events.empty()
        stuck.sock.close()
        assert one.next() == PeerLost(after.name)
        link_up(after, one, "shm")


def test_a_dial_that_nobody_wants_any_more_ends_without_a_word(listening: socket.socket) -> None:
    with Worker("a") as one, Worker("b") as other:
        one.links.connect(other.name, at_port(other.links.address, listening.getsockname()[1]), "tcp")
        accepted, _ = listening.accept()
        one.links.disconnect(other.name)
        with accepted:
            accepted.settimeout(WAIT_SECONDS)
            while accepted.recv(4096):
                pass
        eventually(lambda: not any("kv-dial" in thread.name for thread in threading.enumerate()))
        assert one.events.empty()


def test_closing_does_not_wait_for_a_handshake(listening: socket.socket) -> None:
    with Worker("a") as one, Worker("b") as other:
        one.links.connect(other.name, at_port(other.links.address, listening.getsockname()[1]), "tcp")
        accepted, _ = listening.accept()
        address = one.links.address
        with accepted, socket.create_connection((address.host, address.port)):
            eventually(lambda: any(thread.name == "kv-greet" for thread in threading.enumerate()))
            started = time.monotonic()
            one.links.close(5.0)
            assert time.monotonic() - started < 4.0  # the handshakes had five seconds
        assert one.events.empty()


@linux
def test_memory_that_is_not_what_was_announced_is_refused_on_both_sides() -> None:
    with Worker("a") as worker:
        address = worker.links.address
        memory = KvMemory(SMALL, 3)  # the hello says four
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect("\0" + address.unix_name)
            handshake = Handshake(
                sock, hello_to(address, "raw", one_sided=True), SECRET, time.monotonic() + WAIT_SECONDS
            )
            with pytest.raises(LinkRefused, match="memory: got the peer's KV pool is"):
                handshake.dial(memory.fd)
        failed = worker.next()
        assert isinstance(failed, LinkFailed)
        assert failed.peer == "raw"
        assert "it announced" in failed.reason
        memory.close()


@linux
def test_a_hello_with_no_memory_behind_it_is_refused() -> None:
    with Worker("a") as worker:
        address = worker.links.address
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect("\0" + address.unix_name)
            hello = hello_to(address, "raw", one_sided=True)
            with pytest.raises(LinkRefused, match="memory: got no file descriptor"):
                Handshake(sock, hello, SECRET, time.monotonic() + WAIT_SECONDS).dial(None)
        assert isinstance(worker.next(), LinkFailed)


def test_a_proof_fits_only_its_own_two_hellos() -> None:
    """A recorded handshake, played again, proves nothing: the acceptor's nonce is another."""
    recorded: list[bytes] = []
    with Worker("a") as worker:
        address = worker.links.address

        class Recorder(socket.socket):
            def sendall(self, content: Any, flags: int = 0) -> None:
                recorded.append(bytes(content))
                super().sendall(content, flags)

        hello: Hello = hello_to(address, "raw")
        with Recorder(socket.AF_INET) as recorder:
            recorder.connect((address.host, address.port))
            Handshake(recorder, hello, SECRET, time.monotonic() + WAIT_SECONDS).dial(None)
        assert worker.next() == PeerUp(WorkerId("raw"), one_sided=False)
        assert worker.next() == PeerLost(WorkerId("raw"))
        with socket.create_connection((address.host, address.port)) as sock:
            sock.sendall(b"".join(recorded))
            failed = worker.next()
        assert isinstance(failed, LinkFailed)
        assert "secret: got a proof made with another secret" in failed.reason
