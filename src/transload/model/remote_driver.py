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
    DropLink,
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
    StepOver,
    TakeReply,
    TimeCame,
)
from transload.control.messages import WorkerId
from transload.errors import HandoffError, WorkerLost
from transload.model.ffn_pieces import CutCall, Cutter, PieceFunctions, compute_pieces
from transload.model.freeing import give_back_memory
from transload.model.llama import LayerCalls
from transload.transfer.ffn_callers import CallerUp, FfnCallers, HopReport
from transload.transfer.ffn_kernels import RingKernels
from transload.transfer.ffn_link import ArrivedAnswer, CallerEnd, CallFrame, SlotSizes
from transload.transfer.ffn_meeting import FfnWeights, Opening, Party
from transload.transfer.ffn_times import HopTimes
from transload.transfer.ffn_waiting import Waiter

FEW_ROWS = 64
"""Answers with up to so many rows are kept as views."""
LoadPieces = Callable[[frozenset[Piece]], PieceFunctions]
"""Loads the weights of these pieces, in all layers that have them."""


class HopCounts(msgspec.Struct):
    """Where the time of steps went, in seconds, since the start."""

    steps: int = 0
    rows: int = 0
    """That were sent."""
    step_seconds: float = 0.0
    exposed_seconds: float = 0.0
    """Waited for answers with nothing else to compute."""
    computed_here_seconds: float = 0.0


class _Peer:
    """A link's slots as tensors."""

    def __init__(self, end: CallerEnd, hidden_size: int, dtype: torch.dtype) -> None:
        slots = range(end.sizes.num_slots)
        self.end = end
        self._hidden_size = hidden_size
        self._calls = [torch.frombuffer(_whole(end.call_buffer(slot), dtype), dtype=dtype) for slot in slots]
        self._answers = [torch.frombuffer(_whole(end.answer_buffer(slot), dtype), dtype=dtype) for slot in slots]
        self._few_rows: dict[tuple[int, int], torch.Tensor] = {}  # a view costs as much as the rest of a short answer

    def send(self, request: FfnRequest, rows_RE: torch.Tensor, index_P: torch.Tensor | None) -> None:
        """In a free slot; the index, which rows the pieces take, after the rows."""
        slot = self.end.reserve()
        assert slot is not None, "the client keeps to the credit, which is the number of slots"
        num_bytes = rows_RE.numel() * rows_RE.itemsize
        frame = CallFrame(request, len(rows_RE))
        if index_P is None and rows_RE.is_cpu and rows_RE.is_contiguous():
            self.end.post(slot, frame, num_bytes, rows_RE.data_ptr())
            return
        self._calls[slot][: rows_RE.numel()].view(rows_RE.shape).copy_(rows_RE)
        if index_P is not None:
            index_bytes = index_P.numel() * index_P.itemsize
            raw = self.end.call_buffer(slot)[num_bytes : num_bytes + index_bytes]
            torch.frombuffer(raw, dtype=index_P.dtype).copy_(index_P)
            num_bytes += index_bytes
        self.end.post(slot, frame, num_bytes)

    def answer(self, slot: int, num_rows: int) -> torch.Tensor:
        """The first rows [num_rows, E] of what a slot was answered."""
        rows_RE = self._few_rows.get((slot, num_rows))
        if rows_RE is None:
            rows_RE = self._answers[slot][: num_rows * self._hidden_size].view(num_rows, self._hidden_size)
            if num_rows <= FEW_ROWS:
                self._few_rows[slot, num_rows] = rows_RE
        return rows_RE

    def close(self) -> None:
        for tensors in (self._calls, self._answers, self._few_rows):
            tensors.clear()
        self.end.close()


class _Lane:
    """A micro-batch on its way through the layers."""

    __slots__ = ("calls", "cut", "name", "place", "residual")

    def __init__(self, place: int, calls: LayerCalls) -> None:
        self.place = place
        self.calls = calls
        self.cut: CutCall | None = None
        self.name: CallName | None = None
        self.residual: torch.Tensor | None = None


class RemoteDriver:
    """`connect`, `disconnect` and `close` from any thread; `run` on the step thread."""

    def __init__(
        self,
        *,
        weights: FfnWeights,
        dtype: torch.dtype,
        device: torch.device,
        cutter: Cutter,
        num_micro_batches: int,
        sizes: SlotSizes,
        client: FfnClientConfig,
        me: Party,
        load_pieces: LoadPieces,
        report: HopReport,
        spin_seconds: float,
        rings: RingKernels | None = None,
    ) -> None:
        self.num_micro_batches = num_micro_batches
        self.counts = HopCounts()
        self.hops = HopTimes()
        self._hidden_size = weights.hidden_size
        self._row_bytes = weights.hidden_size * dtype.itemsize
        self._dtype = dtype
        self._device = device
        self._cutter = cutter
        self._pieces = cutter.all_pieces()
        self._load_pieces = load_pieces
        self._own: dict[tuple[int, Piece], Callable[[torch.Tensor], torch.Tensor]] = {}
        self._client = FfnClient(client)
        self._waiter = Waiter(spin_seconds, rings)
        opening = Opening(session=client.session, weights=weights, sizes=sizes)
        self._callers = FfnCallers(me, opening, report, self._waiter.nudge, rings)
        self._peers: dict[WorkerId, _Peer] = {}
        self._lanes: dict[CallName, _Lane] = {}
        self._ready: deque[_Lane] = deque()
        self._sent: dict[int, tuple[FfnRequest, float]] = {}  # by sequence: not answered, and when it was sent
        self._waited = False  # for the answers that are taken now
        self.is_loading = False
        """Weights are being loaded in the middle of a step, because nobody else is left that has them."""
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
            peer.close()
        self._peers.clear()
        self._waiter.close()

    # -- a step -------------------------------------------------------------------------------------------------------

    def run(self, step: int, batches: Sequence[LayerCalls], written: Callable[[int, int], None]) -> list[torch.Tensor]:
        """See `LayerDriver`. Raises `WorkerLost` if a call is not answered and may not be computed here."""
        started = time.monotonic()
        self._look_after_links(started)
        lanes = [_Lane(place, calls) for place, calls in enumerate(batches)]
        try:
            for lane in lanes:
                self._advance(lane, None, written)
            while self._lanes or self._ready:
                while self._ready:
                    lane = self._ready.popleft()
                    self._advance(lane, _cut_of(lane).result(), written)
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
        cut = lane.cut = self._cutter.cut(call)
        name = lane.name = CallName(call.step, call.layer, call.micro_batch)
        self._lanes[name] = lane
        self._obey(self._client.handle(CallMade(name, cut.pieces), time.monotonic()), None)

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
        self._waited = not any(end.has_news() for end in ends)
        if self._waited:
            self._wait(ends)
        for peer in list(self._peers.values()):
            try:
                for arrived in peer.end.poll():
                    self._check(peer, arrived)
                    answered = FfnAnswered(peer.end.worker, arrived.answer)
                    self._obey(self._client.handle(answered, time.monotonic()), (peer, arrived))
                    while self._ready:
                        lane = self._ready.popleft()
                        self._advance(lane, _cut_of(lane).result(), written)
                    peer.end.release(arrived.slot)
            except HandoffError as error:
                self._lose(peer.end.worker, str(error))

    def _check(self, peer: _Peer, arrived: ArrivedAnswer) -> None:
        """Raises `HandoffError` if a reply has not the rows that it must have."""
        answer = arrived.answer
        sent = self._sent.pop(answer.key.sequence, None)
        if sent is None or not isinstance(answer, FfnReply):
            return
        request, sent_at = sent
        if self._waited:
            self.hops.add(max(0.0, time.monotonic() - sent_at - answer.seconds))
        num_rows = num_rows_of(request)
        if len(arrived.rows) != num_rows * self._row_bytes:
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
                case DropLink(worker, reason):
                    self._peers.pop(worker).close()
                    self._callers.lost(worker, reason)

    def _send(self, peer: _Peer, request: FfnRequest) -> None:
        cut = self._cut_for(request)
        rows_RE, index_P = cut.rows([piece for piece, _ in request.pieces])
        self.counts.rows += len(rows_RE)
        self._sent[request.key.sequence] = (request, time.monotonic())
        peer.send(request, rows_RE, index_P)

    def _take(self, request: FfnRequest, pieces: tuple[Piece, ...], peer: _Peer, arrived: ArrivedAnswer) -> None:
        """The rows stay in the slot until the lane has gone on."""
        cut = self._cut_for(request)
        rows_PE = peer.answer(arrived.slot, num_rows_of(request))
        if self._device.type != "cpu":
            rows_PE = rows_PE.to(self._device)
        if len(request.pieces) == 1:
            cut.put(pieces[0], rows_PE)
            return
        parts = torch.split(rows_PE, [rows for _, rows in request.pieces])
        for (piece, _), part in zip(request.pieces, parts, strict=True):
            if piece in pieces:
                cut.put(piece, part)

    def _cut_for(self, request: FfnRequest) -> CutCall:
        key = request.key
        return _cut_of(self._lanes[CallName(key.step, key.layer, key.micro_batch)])

    def _compute_here(self, command: ComputeHere) -> None:
        started = time.monotonic()
        cut, layer = _cut_of(self._lanes[command.call]), command.call.layer
        asked = frozenset(piece for piece, _ in command.pieces)
        if any((layer, piece) not in self._own for piece in asked):
            nobodys = self._pieces.difference(*self._client.owned)
            self.is_loading = True
            try:
                self._own.update(self._load_pieces(nobodys | asked))
            finally:
                self.is_loading = False
        for piece, wanted in command.pieces:
            rows_RE, index_P = cut.rows((piece,))
            (answer_PE,) = compute_pieces(self._own, layer, [(((piece, wanted),), rows_RE, index_P)])
            cut.put(piece, answer_PE)
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
        if self._own and not self._pieces.difference(*self._client.owned):
            self._own.clear()  # others have the weights again
            give_back_memory()

    def _admit(self, now: float) -> None:
        for news in self._callers.news():
            if isinstance(news, CallerUp):
                end = news.end
                self._peers[end.worker] = _Peer(end, self._hidden_size, self._dtype)
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
        peer.close()
        self._obey(self._client.handle(FfnDown(worker), time.monotonic()), None)


def num_rows_of(request: FfnRequest) -> int:
    """That its answer has."""
    return sum([rows for _, rows in request.pieces])


def _cut_of(lane: _Lane) -> CutCall:
    assert lane.cut is not None, "a lane that waits has made a call"
    return lane.cut


def _whole(buffer: memoryview, dtype: torch.dtype) -> memoryview:
    return buffer[: len(buffer) // dtype.itemsize * dtype.itemsize]
