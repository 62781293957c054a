"""Messages between the front end and its workers: 4-byte length, then msgpack, over one stream socket each.

The closed socket is the failure detector: the kernel closes it when a process dies, and nothing here reconnects or
queues behind anybody's back.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import struct
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

from transload.control.messages import Assignment, EngineReport, Message, WorkerId
from transload.deploy.plan import HopPlan, WireTransport, WorkerPlan
from transload.transfer.listener import PeerAddress

T = TypeVar("T")
JOIN_SECONDS = 20.0
"""How long joining may take, on either side."""
MAX_FRAME_BYTES = 64 * 2**20
MAX_UNSENT_BYTES = 64 * 2**20
_LENGTH = struct.Struct("<I")


# -- front end -> worker ----------------------------------------------------------------------------------------------


class Challenge(Message, frozen=True):
    """Prove that you know the join token."""

    nonce: bytes


class Welcome(Message, frozen=True):
    """You are this worker; this is all you need to know."""

    plan: WorkerPlan
    incarnation: int
    link_secret: bytes
    event_log: str | None = None


class ConnectPeer(Message, frozen=True):
    """Open a KV link to a peer."""

    peer: WorkerId
    address: PeerAddress
    transport: WireTransport


class ConnectFfn(Message, frozen=True):
    """This FFN worker can be called."""

    peer: WorkerId
    address: PeerAddress
    transport: WireTransport


class DisconnectFfn(Message, frozen=True):
    """This FFN worker cannot be called any more."""

    peer: WorkerId


class OpenHop(Message, frozen=True):
    """Make ready to have feed-forwards computed elsewhere; `ConnectFfn` and `SwitchFfn` follow."""

    hop: HopPlan


class SwitchFfn(Message, frozen=True):
    """Have feed-forwards computed by FFN workers, or here, from the next step on; answered by `FfnSwitched`."""

    remote: bool


class Assign(Message, frozen=True):
    """Assignments for the engine, in order."""

    events: tuple[Assignment, ...]


class Shutdown(Message, frozen=True):
    """Leave: free everything and exit."""


class Refused(Message, frozen=True):
    """The front end does not want this worker, and why."""

    reason: str


ToWorkerFrame = (
    Challenge | Welcome | ConnectPeer | ConnectFfn | DisconnectFfn | OpenHop | SwitchFfn | Assign | Shutdown | Refused
)


# -- worker -> front end ----------------------------------------------------------------------------------------------


class Join(Message, frozen=True):
    """I am here. `proof` answers the challenge."""

    name: WorkerId
    proof: bytes
    pid: int


class Ready(Message, frozen=True):
    """The model is loaded and the links listen."""

    num_blocks: int
    block_size: int
    kv_bytes_per_token: int
    layout_digest: bytes
    dtype: str
    address: PeerAddress
    load_seconds: float
    memory_bytes: int


class Report(Message, frozen=True):
    """What the engine has to say, in order."""

    events: tuple[EngineReport, ...]


class LinkState(Message, frozen=True):
    """A KV link came up, was measured anew, or could not be opened (`problem`)."""

    peer: WorkerId
    transport: str
    bytes_per_second: float
    latency_seconds: float
    problem: str | None = None


class HopState(Message, frozen=True):
    """A link to an FFN worker came up, or why it is not there."""

    peer: WorkerId
    transport: str
    problem: str | None = None


class FfnSwitched(Message, frozen=True):
    """Feed-forwards are computed where `SwitchFfn` said; `problem`: it could not be done, all is as before."""

    remote: bool
    memory_bytes: int
    problem: str | None = None


class FfnCounted(Message, frozen=True):
    """What calling, or being called for feed-forwards has come to since the start, by name."""

    counts: dict[str, float]
    hops: tuple[int, ...] = ()
    """How many hops took how long, see `transfer/ffn_times.py`."""
    loads: tuple[tuple[int, ...], ...] = ()
    """How often each layer's experts were chosen, wherever they are computed."""


class Alive(Message, frozen=True):
    """Sent every second, so that a stopped process is noticed."""


class Failed(Message, frozen=True):
    """This worker cannot work, and why."""

    reason: str


ToFrontEndFrame = Join | Ready | Report | LinkState | HopState | FfnSwitched | FfnCounted | Alive | Failed


def prove(token: str, nonce: bytes, name: str) -> bytes:
    """Answer to a challenge: shows that the join token is known, without sending it."""
    return hmac.new(token.encode(), nonce + name.encode(), hashlib.sha256).digest()


class Wire(asyncio.Protocol, Generic[T]):
    """One framed connection. Calls `on_message` for each message and `on_lost(reason)` once at the end."""

    def __init__(self, decode: Any, on_message: Callable[[T], None], on_lost: Callable[[str], None]) -> None:
        self._decoder = msgspec.msgpack.Decoder(decode)
        self._encoder = msgspec.msgpack.Encoder()
        self.on_message = on_message
        self.on_lost = on_lost
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._problem: str | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        position = 0
        while len(self._buffer) - position >= 4:
            (length,) = _LENGTH.unpack_from(self._buffer, position)
            if length > MAX_FRAME_BYTES:
                self.close(f"a frame of {length} bytes, at most {MAX_FRAME_BYTES} are allowed")
                return
            if len(self._buffer) - position - 4 < length:
                break
            start = position + 4
            position = start + length
            try:
                message = self._decoder.decode(self._buffer[start:position])
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                self.close(f"a frame that is not understood: {error}")
                return
            self.on_message(message)
        del self._buffer[:position]

    def connection_lost(self, exc: Exception | None) -> None:
        self.on_lost(self._problem or (str(exc) if exc else "the connection was closed"))

    @property
    def local_host(self) -> str | None:
        """The address of this end, as the other end can reach it."""
        name = self._transport.get_extra_info("sockname") if self._transport is not None else None
        return name[0] if name else None

    def send(self, message: Message) -> None:
        """Queue a message. A peer that does not read is cut off once too much is unsent."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        payload = self._encoder.encode(message)
        transport.write(_LENGTH.pack(len(payload)) + payload)
        if transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self.close("the other side has stopped reading")

    def close(self, problem: str | None = None) -> None:
        """End the connection. What was sent before is still delivered, unless there was a problem."""
        self._problem = self._problem or problem
        if self._transport is not None:
            if problem is None:
                self._transport.close()
            else:
                self._transport.abort()
