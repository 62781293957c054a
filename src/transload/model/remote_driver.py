"""Feed-forwards answered by other workers: micro-batches in ping-pong over links.

    micro-batch 0:  attention l | ........ away ........ | attention l+1 | ...
    micro-batch 1:              | attention l            | .... away .... | attention l+1

Carries rows and waits; whom to ask and what to do when nobody answers is decided by `FfnClient`. Owns the links' slots
and, while no FFN worker is left and the deployment says so, feed-forwards of its own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import msgspec
import torch

from transload.control.ffn_client import FfnClient, FfnClientConfig
from transload.control.ffn_messages import (
    CallDone,
    CallFailed,
    CallMade,
    CallName,
    ComputeHere,
    DropReply,
    FfnAnswered,
    FfnClientCommand,
    FfnDown,
    FfnReply,
    FfnRequest,
    FfnUp,
    Piece,
    SendRequest,
    SessionId,
    Split,
    StepOver,
    TakeReply,
    TimeCame,
)
from transload.control.messages import WorkerId
from transload.errors import HandoffError, WorkerLost
from transload.model.batch import Batch
from transload.model.llama import AttentionSide, FeedForwardLayer, FfnCall, LayerCalls
from transload.transfer.ffn_callers import CallerUp, FfnCallers, HopReport
from transload.transfer.ffn_link import ArrivedAnswer, CallerEnd, CallFrame, SlotSizes
from transload.transfer.ffn_meeting import FfnWeights, Opening, Party
from transload.transfer.ffn_waiting import Waiter

LoadPart = Callable[[Piece], Sequence[FeedForwardLayer]]
"""The feed-forwards of all layers, whole or a column part of them."""


class HopCounts(msgspec.Struct):
    """Where the time of steps went, in seconds, since the start."""

    steps: int = 0
    step_seconds: float = 0.0
    exposed_seconds: float = 0.0
    """Waited for answers with nothing else to compute."""
    computed_here_seconds: float = 0.0


class _Peer:
    """A link's slots as tensors."""

    def __init__(self, end: CallerEnd, dtype: torch.dtype) -> None:
        slots = range(end.sizes.num_slots)
        self.end = end
        self.calls = [torch.frombuffer(_whole(end.call_buffer(slot), dtype), dtype=dtype) for slot in slots]
        self.answers = [torch.frombuffer(_whole(end.answer_buffer(slot), dtype), dtype=dtype) for slot in slots]


class _Lane:
    """A micro-batch on its way through the layers."""

    __slots__ = ("call", "calls", "name", "parts", "place", "residual")

    def __init__(self, place: int, calls: LayerCalls) -> None:
        self.place = place
        self.calls = calls
        self.call: FfnCall | None = None
        self.name: CallName | None = None
        self.parts: dict[Piece, torch.Tensor] = {}
        self.residual: torch.Tensor | None = None


class RemoteDriver:
    """`connect`, `disconnect` and `close` from any thread; `run` on the step thread."""

    def __init__(
        self,
        *,
        weights: FfnWeights,
        dtype: torch.dtype,
        device: torch.device,
        split: Split,
        num_parts: int,
        num_micro_batches: int,
        sizes: SlotSizes,
        client: FfnClientConfig,
        me: Party,
        load_part: LoadPart,
        report: HopReport,
        spin_seconds: float,
    ) -> None:
        """`num_parts`: column parts of each layer, 1 unless that is the split."""
        self.num_micro_batches = num_micro_batches
        self.counts = HopCounts()
        self._hidden_size = weights.hidden_size
        self._dtype = dtype
        self._device = device
        self._pieces = tuple(Piece(number) for number in range(num_parts if split == "column" else 1))
        self._load_part = load_part
        self._own: dict[Piece, Sequence[FeedForwardLayer]] = {}
        self._client = FfnClient(client)
        self._waiter = Waiter(spin_seconds)
        opening = Opening(session=client.session, weights=weights, sizes=sizes)
        self._callers = FfnCallers(me, opening, report, self._waiter.nudge)
        self._peers: dict[WorkerId, _Peer] = {}
        self._lanes: dict[CallName, _Lane] = {}
        self._ready: deque[_Lane] = deque()
        self._sent: dict[int, FfnRequest] = {}  # by sequence: what is not answered, whoever still wants it
        self._failure: str | None = None
        self._timeout_seconds = client.timeout_seconds
        self.connect = self._callers.connect
        self.disconnect = self._callers.disconnect

    @property
    def session(self) -> SessionId:
        return self._client.config.session

    @property
    def client(self) -> FfnClient:
        """For its counts."""
        return self._client

    @property
    def holds_weights(self) -> bool:
        """Whether feed-forwards are loaded here, because nobody else was left."""
        return bool(self._own)

    def close(self) -> None:
        """End every link. Not while a step runs."""
        self._callers.close()
        for peer in self._peers.values():
            peer.end.close()
        self._peers.clear()
        self._waiter.close()

    # -- a step -------------------------------------------------------------------------------------------------------

    def run(
        self, attention: AttentionSide, batches: Sequence[Batch], written: Callable[[int, int], None]
    ) -> list[torch.Tensor]:
        """See `LayerDriver`. Raises `WorkerLost` if a call is not answered and may not be computed here."""
        started = time.monotonic()
        self._look_after_links(started)
        lanes = [_Lane(place, attention.run(batch)) for place, batch in enumerate(batches)]
        step = batches[0].step
        try:
            for lane in lanes:
                self._advance(lane, None, written)
            while self._lanes or self._ready:
                while self._ready:
                    lane = self._ready.popleft()
                    self._advance(lane, self._result(lane), written)
                if self._failure is not None:
                    raise WorkerLost(f"{self._failure}, and the deployment has no fallback")
                if self._lanes:
                    self._take_answers(written)
        finally:
            if self._lanes or self._ready:
                self._abandon(step)
            self.counts.steps += 1
            self.counts.step_seconds += time.monotonic() - started
        residuals = [lane.residual for lane in lanes if lane.residual is not None]
        assert len(residuals) == len(lanes)
        return residuals

    def _advance(self, lane: _Lane, ffn_TE: torch.Tensor | None, written: Callable[[int, int], None]) -> None:
        """Attention up to the lane's next call, which is made, or its end."""
        try:
            call = lane.calls.send(ffn_TE) if ffn_TE is not None else next(lane.calls)
        except StopIteration as finished:
            lane.residual = finished.value
            return
        written(lane.place, call.layer)
        lane.call = call
        name = lane.name = CallName(call.step, call.layer, call.micro_batch)
        lane.parts = {}
        self._lanes[name] = lane
        num_rows = len(call.hidden)
        pieces = tuple((piece, num_rows) for piece in self._pieces) if num_rows else ()
        self._obey(self._client.handle(CallMade(name, pieces), time.monotonic()), None)

    def _result(self, lane: _Lane) -> torch.Tensor:
        """What the layer's feed-forward gave, put together from its pieces in their order."""
        assert lane.call is not None
        parts = [lane.parts[piece] for piece in sorted(lane.parts)]
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return torch.zeros_like(lane.call.hidden)
        whole = parts[0].float()
        for part in parts[1:]:
            whole += part
        return whole.to(self._dtype)

    def _abandon(self, step: int) -> None:
        """The step has failed: its calls are nobody's any more."""
        self._client.handle(StepOver(step), time.monotonic())
        self._lanes.clear()
        self._ready.clear()
        self._failure = None

    # -- answers ------------------------------------------------------------------------------------------------------

    def _take_answers(self, written: Callable[[int, int], None]) -> None:
        """Wait until something has come, and take it in. Lanes whose call is done go on at once: their rows lie in a
        slot that is given back right after."""
        ends = [peer.end for peer in self._peers.values()]
        if not any(end.has_news() for end in ends):
            self._wait(ends)
        for peer in list(self._peers.values()):
            try:
                for arrived in peer.end.poll():
                    self._check(peer, arrived)
                    answered = FfnAnswered(peer.end.worker, arrived.answer)
                    self._obey(self._client.handle(answered, time.monotonic()), (peer, arrived))
                    while self._ready:
                        lane = self._ready.popleft()
                        self._advance(lane, self._result(lane), written)
                    peer.end.release(arrived.slot)
            except HandoffError as error:
                self._lose(peer.end.worker, str(error))

    def _check(self, peer: _Peer, arrived: ArrivedAnswer) -> None:
        """Raises `HandoffError` if a reply has not the rows that it must have."""
        request = self._sent.pop(arrived.answer.key.sequence, None)
        if request is None or not isinstance(arrived.answer, FfnReply):
            return
        num_rows = sum(rows for _, rows in request.pieces)
        if len(arrived.rows) != num_rows * self._hidden_size * self._dtype.itemsize:
            raise HandoffError(f"{peer.end.worker} has answered {len(arrived.rows)} bytes for {num_rows} rows")

    def _wait(self, ends: list[CallerEnd]) -> None:
        started = time.monotonic()
        due_at = self._client.due_at
        self._waiter.wait(ends, due_at)
        now = time.monotonic()
        self.counts.exposed_seconds += now - started
        self._admit(now)
        if due_at is not None and now >= due_at:
            self._obey(self._client.handle(TimeCame(), now), None)

    def _obey(self, commands: list[FfnClientCommand], arrived: tuple[_Peer, ArrivedAnswer] | None) -> None:
        for command in commands:
            match command:
                case SendRequest(worker, request):
                    self._send(self._peers[worker], request)
                case TakeReply(request, pieces):
                    assert arrived is not None
                    self._take(request, pieces, *arrived)
                case CallDone(call):
                    self._ready.append(self._lanes.pop(call))
                case DropReply():
                    pass
                case ComputeHere():
                    self._compute_here(command)
                case CallFailed(_, reason):
                    self._failure = reason

    def _send(self, peer: _Peer, request: FfnRequest) -> None:
        call = self._call_of(request)
        slot = peer.end.reserve()
        assert slot is not None, "the client keeps to the credit, which is the number of slots"
        num_rows = len(call.hidden)
        num_elements = num_rows * self._hidden_size
        self._sent[request.key.sequence] = request
        peer.calls[slot][:num_elements].view(num_rows, self._hidden_size).copy_(call.hidden)
        peer.end.post(slot, CallFrame(request, num_rows), num_elements * self._dtype.itemsize)

    def _take(self, request: FfnRequest, pieces: tuple[Piece, ...], peer: _Peer, arrived: ArrivedAnswer) -> None:
        """The rows stay in the slot until the lane has gone on, unless others have to come first."""
        key = request.key
        lane = self._lanes[CallName(key.step, key.layer, key.micro_batch)]
        num_rows = len(self._call_of(request).hidden)
        num_elements = num_rows * self._hidden_size
        rows = peer.answers[arrived.slot][:num_elements].view(num_rows, self._hidden_size)
        for piece in pieces:
            lane.parts[piece] = rows.to(self._device) if len(self._pieces) == 1 else rows.to(self._device, copy=True)

    def _call_of(self, request: FfnRequest) -> FfnCall:
        key = request.key
        call = self._lanes[CallName(key.step, key.layer, key.micro_batch)].call
        assert call is not None
        return call

    def _compute_here(self, command: ComputeHere) -> None:
        started = time.monotonic()
        lane = self._lanes[command.call]
        assert lane.call is not None
        for piece, _ in command.pieces:
            if piece not in self._own:
                self._own[piece] = self._load_part(piece)
            lane.parts[piece] = self._own[piece][command.call.layer](lane.call.hidden)
        self.counts.computed_here_seconds += time.monotonic() - started

    # -- links --------------------------------------------------------------------------------------------------------

    def _look_after_links(self, now: float) -> None:
        """Before a step: who has come and gone since the last one. Waits for a first link that is being dialed."""
        for peer in list(self._peers.values()):
            peer.end.wake()
        self._admit(now)
        deadline = now + self._timeout_seconds
        while not self._peers and self._callers.is_dialing and time.monotonic() < deadline:
            self._waiter.wait((), deadline)
            self._admit(time.monotonic())
        if self._own and all(any(piece in peers for peers in self._owned()) for piece in self._pieces):
            self._own.clear()  # others have the weights again

    def _owned(self) -> list[frozenset[Piece]]:
        return self._client.owned

    def _admit(self, now: float) -> None:
        for news in self._callers.news():
            if isinstance(news, CallerUp):
                end = news.end
                self._peers[end.worker] = _Peer(end, self._dtype)
                up = FfnUp(end.worker, news.pieces, end.sizes.num_slots)
                self._obey(self._client.handle(up, now), None)
            elif news.worker in self._peers:
                self._forget(news.worker)

    def _lose(self, worker: WorkerId, reason: str) -> None:
        """The link is broken: what it owes is asked of others."""
        self._forget(worker)
        self._callers.lost(worker, reason)

    def _forget(self, worker: WorkerId) -> None:
        peer = self._peers.pop(worker)
        peer.calls.clear()
        peer.answers.clear()
        peer.end.close()
        self._obey(self._client.handle(FfnDown(worker), time.monotonic()), None)


def _whole(buffer: memoryview, dtype: torch.dtype) -> memoryview:
    return buffer[: len(buffer) // dtype.itemsize * dtype.itemsize]
