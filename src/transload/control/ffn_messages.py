"""The vocabulary of feed-forwards that are computed elsewhere: what an attention worker and an FFN worker say.

A call is a pure function of (weights, layer, rows), so nothing here ever needs undoing: any worker with the weights may
answer it, twice or late does no harm. Rows travel beside these messages and never inside. Two machines speak it:
`FfnClient` on the attention side, `FfnServer` on the other. The Controller knows nothing of either.
"""

from __future__ import annotations

from typing import Literal, NewType

from transload.control.messages import Message, WorkerId

SessionId = NewType("SessionId", int)
"""One attention worker's life as a caller: random, 63 bits, new in each process."""
Piece = NewType("Piece", int)
"""A part of every layer's feed-forward that is computed as one: 0 where the layer is whole, the number of a column
part, or the number of an expert. A worker owns pieces; a piece may have several owners."""
Wanted = tuple[tuple[Piece, int], ...]
"""Pieces with the number of rows that each is to be given."""
Split = Literal["replica", "column", "expert"]
Fallback = Literal["local", "error"]


class CallName(Message, frozen=True):
    """A layer's feed-forward of one micro-batch of one step: what the executor waits for."""

    step: int
    layer: int
    micro_batch: int


class CallKey(Message, frozen=True):
    """One attempt at some pieces of a call. `sequence` is never used twice in a session."""

    session: SessionId
    step: int
    layer: int
    micro_batch: int
    sequence: int


# -- between the two workers ------------------------------------------------------------------------------------------


class FfnRequest(Message, frozen=True):
    """Attention -> FFN: compute these pieces. Every request that reaches a live server is answered exactly once."""

    key: CallKey
    pieces: Wanted


class FfnReply(Message, frozen=True):
    """FFN -> attention: all pieces of the request; the rows travel beside it."""

    key: CallKey
    seconds: float = 0.0
    """How long the request was with the FFN worker, waiting and being computed."""


class FfnBusy(Message, frozen=True):
    """FFN -> attention: not computed: too much is waiting here, or a later request has taken this one's place."""

    key: CallKey


class FfnError(Message, frozen=True):
    """FFN -> attention: computing it failed, and would fail here again."""

    key: CallKey
    reason: str


FfnAnswer = FfnReply | FfnBusy | FfnError


# -- events of the client ---------------------------------------------------------------------------------------------


class FfnUp(Message, frozen=True):
    """A worker can be called: what it owns, and how many requests of ours it takes at once."""

    worker: WorkerId
    pieces: frozenset[Piece]
    credit: int


class FfnDown(Message, frozen=True):
    """A worker cannot be called any more, and nothing that it was sent will be answered."""

    worker: WorkerId


class CallMade(Message, frozen=True):
    """The executor wants a feed-forward."""

    call: CallName
    pieces: Wanted


class FfnAnswered(Message, frozen=True):
    """A worker has answered; its rows, if any, are there until the command about them has been obeyed."""

    worker: WorkerId
    answer: FfnAnswer


class StepOver(Message, frozen=True):
    """The executor wants nothing more of the step: it has ended, or failed."""

    step: int


class TimeCame(Message, frozen=True):
    """What the machine's `due_at` asked for."""


FfnClientEvent = FfnUp | FfnDown | CallMade | FfnAnswered | StepOver | TimeCame


# -- commands of the client -------------------------------------------------------------------------------------------


class SendRequest(Message, frozen=True):
    """Send it with the rows of its pieces."""

    worker: WorkerId
    request: FfnRequest


class TakeReply(Message, frozen=True):
    """Keep the rows of these pieces of the request that was just answered; the others are there already."""

    request: FfnRequest
    pieces: tuple[Piece, ...]


class DropReply(Message, frozen=True):
    """The rows that just came are of no use."""

    key: CallKey


class ComputeHere(Message, frozen=True):
    """Nobody else computes these pieces of the call: do it now, with weights of our own."""

    call: CallName
    pieces: Wanted
    reason: str


class CallDone(Message, frozen=True):
    """All pieces of the call are there."""

    call: CallName


class CallFailed(Message, frozen=True):
    """The call will not be answered, and may not be computed here."""

    call: CallName
    reason: str


class DropLink(Message, frozen=True):
    """The link is up and has lost a message: end it, and make a new one. The worker counts as down until it is up."""

    worker: WorkerId
    reason: str


FfnClientCommand = SendRequest | TakeReply | DropReply | ComputeHere | CallDone | CallFailed | DropLink


# -- events and commands of the server --------------------------------------------------------------------------------


class SessionUp(Message, frozen=True):
    """An attention worker may call from now on."""

    session: SessionId


class SessionDown(Message, frozen=True):
    """It is gone: nothing can be sent to it, and nobody wants its calls."""

    session: SessionId


class RequestCame(Message, frozen=True):
    request: FfnRequest


class BatchDone(Message, frozen=True):
    """The rows of the batch are computed; they lie where the driver put them."""

    number: int


class BatchFailed(Message, frozen=True):
    number: int
    reason: str


FfnServerEvent = SessionUp | SessionDown | RequestCame | BatchDone | BatchFailed | TimeCame


class RunBatch(Message, frozen=True):
    """Compute these requests of one layer together. One batch at a time; answered by `BatchDone` or `BatchFailed`."""

    number: int
    layer: int
    requests: tuple[FfnRequest, ...]


class SendAnswer(Message, frozen=True):
    """To the session that the key names; with the computed rows if it is a `FfnReply`."""

    answer: FfnAnswer


class ForgetRequest(Message, frozen=True):
    """Nobody can be answered: let go of the request's rows."""

    key: CallKey


FfnServerCommand = RunBatch | SendAnswer | ForgetRequest
