"""A link for feed-forward calls as both of its ends see it: slots that hold a call's rows and then its answer's.

Bytes only: what a call means is said in `control/ffn_messages.py`, whom to call decides `FfnClient`. The caller chooses
a free slot for each call; the answer comes back for that slot. Everything here returns at once and is used by one
thread at each end; how to wait is in `ffn_waiting.py`.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from transload.control.ffn_messages import FfnAnswer, FfnRequest, SessionId
from transload.control.messages import WorkerId
from transload.errors import HandoffError
from transload.transfer.ffn_kernels import Ring

MAX_SLOTS = 64
MAX_SLOT_BYTES = 1 << 32
MAX_LINK_BYTES = 8 << 30
"""Of all slots of one link: a peer that asks for more would take the memory of everybody."""
HEADER_BYTES = 16 << 10
"""Room for a header: a request names each of its experts."""


class CallFrame(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Header of a call. `num_rows` rows travel beside it; what follows them says which row belongs to which piece."""

    request: FfnRequest
    num_rows: int


class SlotSizes(msgspec.Struct, frozen=True, kw_only=True):
    """Calls under way at once, and the longest rows of one call there and back, in bytes."""

    num_slots: int
    call_bytes: int
    answer_bytes: int

    def check(self) -> None:
        """Raises `HandoffError` if nobody sane would ask for that."""
        if not 1 <= self.num_slots <= MAX_SLOTS:
            raise HandoffError(f"{self.num_slots} slots for feed-forward calls; 1..{MAX_SLOTS} are possible")
        for name, num_bytes in (("call", self.call_bytes), ("answer", self.answer_bytes)):
            if not 1 <= num_bytes <= MAX_SLOT_BYTES:
                raise HandoffError(f"a {name} of {num_bytes} bytes; 1..{MAX_SLOT_BYTES} are possible")
        in_all = self.num_slots * (self.call_bytes + self.answer_bytes)
        if in_all > MAX_LINK_BYTES:
            raise HandoffError(f"slots of {in_all} bytes in all for one link; {MAX_LINK_BYTES} are possible")


class ArrivedCall(msgspec.Struct, frozen=True):
    """At the FFN worker. `rows` stays until the slot is answered."""

    slot: int
    frame: CallFrame
    rows: memoryview


class ArrivedAnswer(msgspec.Struct, frozen=True):
    """At the attention worker. `rows` stays until the slot is released."""

    slot: int
    answer: FfnAnswer
    rows: memoryview


class LinkEnd(Protocol):
    """What both ends have in common."""

    transport: str

    @property
    def compiled_ring(self) -> Ring | None:
        """What compiled code can wait for; None: only `has_news` tells."""
        ...

    def has_news(self) -> bool:
        """Whether `poll` would find something, or raise. Cheap enough to be asked again and again."""
        ...

    def fileno(self) -> int:
        """A socket that becomes readable when a sleeper is to wake up, or the peer is gone."""
        ...

    def wants_to_send(self) -> bool:
        """Whether the socket is to be watched for room too."""
        ...

    def doze(self) -> bool:
        """The peer must wake us from now on. False: there is news already, do not sleep."""
        ...

    def wake(self) -> None:
        """We look by ourselves again. That the peer is gone is found out here, and raised by `poll`."""
        ...

    def close(self) -> None: ...


class CallerEnd(LinkEnd, Protocol):
    """The attention side."""

    worker: WorkerId
    sizes: SlotSizes

    def reserve(self) -> int | None:
        """A free slot, not free any more; None if there is none."""
        ...

    def call_buffer(self, slot: int) -> memoryview: ...

    def post(self, slot: int, frame: CallFrame, num_bytes: int, rows_address: int = 0) -> None:
        """Send the call; `num_bytes` of its buffer are filled, or are to be, from memory that lies at an address."""
        ...

    def answer_buffer(self, slot: int) -> memoryview: ...

    def poll(self) -> list[ArrivedAnswer]:
        """Answers that came. Raises `HandoffError` if the peer is gone or talks nonsense."""
        ...

    def release(self, slot: int) -> None:
        """The slot may hold another call."""
        ...


class CalleeEnd(LinkEnd, Protocol):
    """The FFN side."""

    session: SessionId
    sizes: SlotSizes

    def poll(self) -> list[ArrivedCall]:
        """Calls that came. Raises `HandoffError` if the peer is gone or talks nonsense."""
        ...

    def answer_buffer(self, slot: int) -> memoryview: ...

    def answer(self, slot: int, answer: FfnAnswer, num_bytes: int) -> None:
        """Send the answer; `num_bytes` of its buffer are filled."""
        ...


_encoder = msgspec.msgpack.Encoder()
_calls: msgspec.msgpack.Decoder[CallFrame] = msgspec.msgpack.Decoder(CallFrame)
_answers: msgspec.msgpack.Decoder[FfnAnswer] = msgspec.msgpack.Decoder(FfnAnswer)


def encode_header(header: CallFrame | FfnAnswer) -> bytes:
    """Raises `HandoffError` for a header that no slot has room for."""
    raw = _encoder.encode(header)
    if len(raw) > HEADER_BYTES:
        raise HandoffError(f"the header of a feed-forward call is {len(raw)} bytes long, {HEADER_BYTES} are possible")
    return raw


def decode_call(raw: bytes) -> CallFrame:
    """Raises `HandoffError`."""
    try:
        return _calls.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HandoffError(f"a feed-forward call that cannot be read: {error}") from None


def decode_answer(raw: bytes) -> FfnAnswer:
    """Raises `HandoffError`."""
    try:
        return _answers.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HandoffError(f"an answer to a feed-forward call that cannot be read: {error}") from None
