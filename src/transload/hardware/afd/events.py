"""The pipeline of `pipeline.py` played event by event: the authority that the closed form is held against.

Workers compute one thing at a time, first come first served. A port sends one message at a time, in order; a message
is there when its sender's port, the receiver's port and, where there is one, the shared spine have carried it, which
they do at the same time. An FFN worker starts on a call when its whole cohort has sent it, or when the first of them
has waited `max_wait_seconds`.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Sequence
from typing import TypeAlias

import msgspec

from transload.hardware.afd.pipeline import Hop, LayerTimes, Pipeline

Key: TypeAlias = tuple[int, int]
"""What is merged at an FFN worker: layer and micro-batch."""


class Piece(msgspec.Struct, frozen=True, order=True):
    """One micro-batch of one attention worker in one layer."""

    worker: int
    micro_batch: int
    layer: int


class Call(msgspec.Struct, frozen=True, order=True):
    """Pieces of one layer and micro-batch that one FFN worker computes at once."""

    server: int
    pieces: tuple[Piece, ...]


class _AttentionDone(msgspec.Struct, frozen=True):
    piece: Piece


class _FfnDone(msgspec.Struct, frozen=True):
    call: Call


class _PortFree(msgspec.Struct, frozen=True):
    server: int | None
    worker: int | None


class _AtFfn(msgspec.Struct, frozen=True):
    server: int
    piece: Piece


class _Home(msgspec.Struct, frozen=True):
    piece: Piece


class _Deadline(msgspec.Struct, frozen=True):
    server: int
    key: Key
    first: float


Event: TypeAlias = _AttentionDone | _FfnDone | _PortFree | _AtFfn | _Home | _Deadline


class Play(msgspec.Struct, frozen=True, kw_only=True):
    """What one played step gave. Seconds."""

    step_seconds: float
    """Of the slowest attention worker, tail included."""
    worker_seconds: tuple[float, ...]
    """Of each attention worker, tail included."""
    attention_busy: float
    ffn_busy: float
    """Mean over the workers of the side, as shares of the step."""
    num_calls: int
    """Merged calls that FFN workers ran."""
    longest_wait_seconds: float
    """Longest that a call waited at an idle FFN worker for the rest of its cohort."""


def play(
    pipeline: Pipeline,
    *,
    attention_factors: Sequence[float] = (),
    max_wait_seconds: float = math.inf,
    fixed_share: float = 1.0,
) -> Play:
    """Play one step. `attention_factors`: how much slower each attention worker is than the pipeline says (1 if not
    given). `fixed_share`: the part of a call's seconds that does not shrink when fewer of a cohort are in it (weights
    are read whoever asks)."""
    factors = tuple(attention_factors) or (1.0,) * pipeline.attention_workers
    assert len(factors) == pipeline.attention_workers, "one factor an attention worker"
    return _Player(pipeline, factors, max_wait_seconds, fixed_share).run()


class _Player:
    def __init__(self, pipeline: Pipeline, factors: tuple[float, ...], max_wait: float, fixed_share: float) -> None:
        self.pipeline, self.factors, self.max_wait, self.fixed_share = pipeline, factors, max_wait, fixed_share
        self.layers: list[LayerTimes] = [layer for layer in pipeline.layers for _ in range(layer.count)]
        num_attention, num_ffn = pipeline.attention_workers, pipeline.ffn_workers
        self.heap: list[tuple[float, int, Event]] = []
        self.order = itertools.count()
        self.attention_queue: list[deque[Piece]] = [deque() for _ in range(num_attention)]
        self.attention_runs = [False] * num_attention
        self.ffn_queue: list[deque[Call]] = [deque() for _ in range(num_ffn)]
        self.ffn_runs = [False] * num_ffn
        self.gathering: dict[tuple[int, Key], tuple[float, list[Piece]]] = {}
        self.outbox: list[deque[tuple[int, Piece]]] = [deque() for _ in range(num_attention)]
        self.inbox: list[deque[Piece]] = [deque() for _ in range(num_ffn)]  # results on their way home
        self.sending_out, self.sending_back = [False] * num_attention, [False] * num_ffn
        self.attention_in, self.ffn_in = [0.0] * num_attention, [0.0] * num_ffn
        self.spine_out = self.spine_back = 0.0
        self.parts_home: dict[Piece, int] = {}
        self.done_at = [0.0] * num_attention
        self.attention_seconds = self.ffn_seconds = 0.0
        self.num_calls, self.longest_wait = 0, 0.0

    def run(self) -> Play:
        for worker in range(self.pipeline.attention_workers):
            for micro_batch in range(self.pipeline.micro_batches):
                self.attention_queue[worker].append(Piece(worker, micro_batch, 0))
            self._start_attention(worker, 0.0)
        while self.heap:
            now, _, event = heapq.heappop(self.heap)
            self._handle(event, now)
        tail = self.pipeline.tail_seconds
        elapsed = max(self.done_at) + tail
        num_attention, num_ffn = self.pipeline.attention_workers, self.pipeline.ffn_workers
        return Play(
            step_seconds=elapsed,
            worker_seconds=tuple(seconds + tail for seconds in self.done_at),
            attention_busy=(self.attention_seconds / num_attention + tail) / elapsed if elapsed else 0.0,
            ffn_busy=self.ffn_seconds / num_ffn / elapsed if elapsed else 0.0,
            num_calls=self.num_calls,
            longest_wait_seconds=self.longest_wait,
        )

    def _push(self, at: float, event: Event) -> None:
        heapq.heappush(self.heap, (at, next(self.order), event))

    def _handle(self, event: Event, now: float) -> None:
        match event:
            case _AttentionDone(piece):
                self.attention_runs[piece.worker] = False
                self.outbox[piece.worker].extend((server, piece) for server in self._servers_of(piece))
                self._send_out(piece.worker, now)
                self._start_attention(piece.worker, now)
            case _AtFfn(server, piece):
                self._gather(server, piece, now)
            case _Deadline(server, key, first):
                gathered = self.gathering.get((server, key))
                if gathered is not None and gathered[0] == first:
                    self._close(server, key, now)
            case _FfnDone(call):
                self.ffn_runs[call.server] = False
                self.inbox[call.server].extend(call.pieces)
                self._send_back(call.server, now)
                self._start_ffn(call.server, now)
            case _PortFree(server, worker):
                if worker is not None:
                    self.sending_out[worker] = False
                    self._send_out(worker, now)
                if server is not None:
                    self.sending_back[server] = False
                    self._send_back(server, now)
            case _Home(piece):
                self._arrive_home(piece, now)

    def _servers_of(self, piece: Piece) -> tuple[int, ...]:
        """The FFN workers that a micro-batch goes to. Replicas: its attention worker's own, in turns."""
        pipeline = self.pipeline
        if pipeline.split != "replica":
            return tuple(range(pipeline.ffn_workers))
        turn = piece.micro_batch % pipeline.replicas
        if pipeline.ffn_workers >= pipeline.attention_workers:
            return (piece.worker * pipeline.replicas + turn,)
        return (piece.worker // pipeline.cohort_size,)

    def _cohort(self, server: int) -> int:
        """How many attention workers an FFN worker has."""
        pipeline = self.pipeline
        if pipeline.split != "replica" or pipeline.ffn_workers >= pipeline.attention_workers:
            return pipeline.cohort_size
        return min(pipeline.cohort_size, pipeline.attention_workers - server * pipeline.cohort_size)

    def _start_attention(self, worker: int, now: float) -> None:
        if self.attention_runs[worker] or not self.attention_queue[worker]:
            return
        piece = self.attention_queue[worker].popleft()
        self.attention_runs[worker] = True
        seconds = self.layers[piece.layer].attention_seconds * self.factors[worker]
        self.attention_seconds += seconds
        self._push(now + seconds, _AttentionDone(piece))

    def _send_out(self, worker: int, now: float) -> None:
        if self.sending_out[worker] or not self.outbox[worker]:
            return
        server, piece = self.outbox[worker].popleft()
        hop, parts = self.layers[piece.layer].out, self.pipeline.parts
        self.sending_out[worker] = True
        sent = now + hop.attention_port_seconds / parts
        self._push(sent, _PortFree(None, worker))
        self.ffn_in[server] = max(self.ffn_in[server], now) + hop.ffn_port_seconds
        there = max(sent, self.ffn_in[server])
        if hop.shared_seconds:
            self.spine_out = max(self.spine_out, now) + hop.shared_seconds / parts
            there = max(there, self.spine_out)
        self._push(there + hop.latency_seconds, _AtFfn(server, piece))

    def _send_back(self, server: int, now: float) -> None:
        if self.sending_back[server] or not self.inbox[server]:
            return
        piece = self.inbox[server].popleft()
        hop: Hop = self.layers[piece.layer].back
        parts = self.pipeline.parts
        self.sending_back[server] = True
        sent = now + hop.ffn_port_seconds
        self._push(sent, _PortFree(server, None))
        self.attention_in[piece.worker] = max(self.attention_in[piece.worker], now) + hop.attention_port_seconds / parts
        there = max(sent, self.attention_in[piece.worker])
        if hop.shared_seconds:
            self.spine_back = max(self.spine_back, now) + hop.shared_seconds / parts
            there = max(there, self.spine_back)
        self._push(there + hop.latency_seconds, _Home(piece))

    def _gather(self, server: int, piece: Piece, now: float) -> None:
        key = (piece.layer, piece.micro_batch)
        first, pieces = self.gathering.setdefault((server, key), (now, []))
        pieces.append(piece)
        if len(pieces) == self._cohort(server):
            self._close(server, key, now)
        elif len(pieces) == 1 and self.max_wait < math.inf:
            self._push(now + self.max_wait, _Deadline(server, key, first))

    def _close(self, server: int, key: Key, now: float) -> None:
        first, pieces = self.gathering.pop((server, key))
        self.longest_wait = max(self.longest_wait, now - first)
        self.ffn_queue[server].append(Call(server, tuple(sorted(pieces))))
        self._start_ffn(server, now)

    def _start_ffn(self, server: int, now: float) -> None:
        if self.ffn_runs[server] or not self.ffn_queue[server]:
            return
        call = self.ffn_queue[server].popleft()
        self.ffn_runs[server] = True
        self.num_calls += 1
        share = self.fixed_share + (1.0 - self.fixed_share) * len(call.pieces) / self.pipeline.cohort_size
        seconds = self.layers[call.pieces[0].layer].ffn_seconds * share
        self.ffn_seconds += seconds
        self._push(now + seconds, _FfnDone(call))

    def _arrive_home(self, piece: Piece, now: float) -> None:
        came = self.parts_home.pop(piece, 0) + 1
        if came < self.pipeline.parts:
            self.parts_home[piece] = came
            return
        if piece.layer + 1 == len(self.layers):
            self.done_at[piece.worker] = max(self.done_at[piece.worker], now)
            return
        self.attention_queue[piece.worker].append(Piece(piece.worker, piece.micro_batch, piece.layer + 1))
        self._start_attention(piece.worker, now)
