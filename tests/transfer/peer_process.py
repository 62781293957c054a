"""A worker's transport in a process of its own, which tests may kill: a `Worker` behind a pipe."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Literal

import xxhash

from tests.transfer.rig import LARGE, WAIT_SECONDS, Event, Worker, window_of
from transload.control.messages import ExpectKv, PeerFrame, PeerUp, SendFrame, WorkerId
from transload.transfer.listener import PeerAddress
from transload.transfer.meeting import TransportChoice

Question = tuple[Literal["connect", "expect", "send", "fill", "digest", "frames", "next", "scribble", "end"], Any]


class PeerProcess:
    """The parent's handle."""

    def __init__(self, name: str, *, incarnation: int = 1, num_blocks: int = 64) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, incarnation, num_blocks), daemon=True)
        self._process.start()
        theirs.close()
        self.name = WorkerId(name)
        self.up: PeerUp | None = None
        """How its link was reported there."""
        self.address: PeerAddress = self._answer()

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
        self._pipe.close()
        self._process.close()

    def connect(self, peer: Worker, transport: TransportChoice) -> None:
        """Returns when the link is up on both sides."""
        self._ask("connect", (peer.name, peer.links.address, transport))
        one_sided = transport != "tcp"
        for event, name in ((self.next(), peer.name), (peer.next(), self.name)):
            assert isinstance(event, PeerUp)
            assert (event.peer, event.one_sided, event.window is not None) == (name, one_sided, transport == "direct")
            self.up = event if name == peer.name else self.up

    def expect(self, command: ExpectKv) -> None:
        self._ask("expect", command)

    def send(self, commands: list[SendFrame], times: int = 1) -> None:
        """Queue these frames so often over; the sequence numbers repeat, which the transport does not mind."""
        self._ask("send", (commands, times))

    def fill(self, seed: int) -> None:
        self._ask("fill", seed)

    def scribble(self, up: PeerUp) -> None:
        """Write into all blocks of the peer, on and on, as a step would that works there."""
        self._ask("scribble", up)

    def digest(self, blocks: tuple[int, ...]) -> int:
        """Checksum of the blocks, one after the other."""
        self._pipe.send(("digest", blocks))
        digest: int = self._answer()
        return digest

    def next(self) -> Event:
        self._pipe.send(("next", None))
        event: Event = self._answer()
        return event

    def frames(self, num_frames: int) -> list[PeerFrame]:
        self._pipe.send(("frames", num_frames))
        frames: list[PeerFrame] = self._answer()
        return frames

    def stop(self) -> None:
        """Freeze it; returns when its last thread stands still."""
        self._signal(signal.SIGSTOP)
        assert self._process.pid is not None
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def kill(self) -> None:
        """As if the machine's memory had run out."""
        self._signal(signal.SIGKILL)
        self._process.join()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.exitcode is None and self._process.pid is not None:
            os.kill(self._process.pid, number)

    def _ask(self, kind: str, argument: object) -> None:
        self._pipe.send((kind, argument))
        self._answer()

    def _answer(self) -> Any:
        assert self._pipe.poll(3 * WAIT_SECONDS), "the process does not answer"
        return self._pipe.recv()


def digest(worker: Worker, blocks: tuple[int, ...]) -> int:
    """What `PeerProcess.digest` returns for the same bytes."""
    return xxhash.xxh3_64_intdigest(worker.blocks[list(blocks)].data)


def _serve(pipe: Connection, name: str, incarnation: int, num_blocks: int) -> None:
    with Worker(name, layout=LARGE, num_blocks=num_blocks, incarnation=incarnation, with_windows=True) as worker:
        pipe.send(worker.links.address)
        while True:
            kind, argument = pipe.recv()
            pipe.send(_do(worker, kind, argument))


def _scribble(worker: Worker, up: PeerUp) -> None:
    blocks = window_of(worker, up)
    while True:
        for value in range(1, 100):
            blocks[:] = value


def _do(worker: Worker, kind: str, argument: Any) -> object:
    match kind:
        case "connect":
            worker.links.connect(*argument)
        case "expect":
            worker.links.expect(argument)
        case "send":
            commands, times = argument
            for _ in range(times):
                for command in commands:
                    worker.links.send(command)
        case "fill":
            worker.fill(argument)
        case "scribble":
            threading.Thread(target=_scribble, args=(worker, argument), daemon=True).start()
        case "digest":
            return digest(worker, argument)
        case "frames":
            return worker.data_frames(argument)
        case "next":
            return worker.next()
    return None
