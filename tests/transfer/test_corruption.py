"""A network that changes bytes: whatever is changed, the checksum shows it or the link ends."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.transfer.rig import Handoff, Worker, at_port
from transload.control.messages import KvData, PeerFrame, PeerLost, PeerUp, TransferId
from transload.transfer.links import LinkFailed
from transload.transfer.wire import PREFIX, TRAILER, encode

TRANSFER = 77
HANDSHAKE_WORDS = 2  # of the dialer: Hello and Proof


@contextmanager
def flipping_proxy(target: tuple[str, int], position: int) -> Iterator[int]:
    """Passes everything on, but for one bit of what the dialer sends, `position` bytes after its handshake."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            dialer, _ = server.accept()
            with dialer, socket.create_connection(target) as acceptor:
                back = threading.Thread(target=forward, args=(acceptor, dialer, None))
                back.start()
                forward(dialer, acceptor, position)
                back.join()

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        thread.join()


def forward(source: socket.socket, target: socket.socket, position: int | None) -> None:
    if position is not None:
        for _ in range(HANDSHAKE_WORDS):
            prefix = source.recv(PREFIX.size, socket.MSG_WAITALL)
            target.sendall(prefix + source.recv(PREFIX.unpack(prefix)[0], socket.MSG_WAITALL))
    try:
        while part := bytearray(source.recv(1 << 16)):
            if position is not None:
                if position < len(part):
                    part[position] ^= 1 << random.Random(position).randrange(8)
                    position = None
                else:
                    position -= len(part)
            target.sendall(part)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # one side has hung up; the other sees it


def positions() -> list[tuple[str, int]]:
    """A few places in every part of the frame that the test sends."""
    frame = KvData(TransferId(TRANSFER), 1, 0, 0, 3, 0, 8, 24 * 256)
    header = len(encode(frame, 24 * 256 + TRAILER.size))
    shuffled = random.Random(0)
    cells = [("cells", header + shuffled.randrange(24 * 256)) for _ in range(6)]
    trailer = [("trailer", header + 24 * 256 + byte) for byte in (0, 3, 7)]
    return [*(("header", byte) for byte in range(0, header, 5)), *cells, *trailer]


@pytest.mark.parametrize(("part", "position"), positions())
def test_one_changed_bit_is_never_taken_for_the_sender_s_bytes(part: str, position: int) -> None:
    with Worker("a") as sender, Worker("b") as receiver:
        sender.fill(1)
        address = receiver.links.address
        with flipping_proxy((address.host, address.port), position) as port:
            sender.links.connect(receiver.name, at_port(address, port), "tcp")
            assert isinstance(sender.next(), PeerUp)
            assert isinstance(receiver.next(), PeerUp)
            handoff = Handoff(sender, receiver, transfer=TRANSFER)
            handoff.expect()
            before = receiver.blocks.copy()
            sender.links.send(handoff.whole())
            if part == "header":
                sender.links.disconnect(receiver.name)  # for a length that asks for more than there is
                event = receiver.next()
                if isinstance(event, LinkFailed):
                    event = receiver.next()
                assert event == PeerLost(sender.name)
                assert (receiver.blocks == before).all()
            else:
                event = receiver.next()
                assert isinstance(event, PeerFrame)
                assert isinstance(event.frame, KvData)
                assert event.arrived_checksum != event.frame.checksum
                sender.links.disconnect(receiver.name)
