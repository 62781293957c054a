"""The FFN side of a model: feed-forwards and nothing else, computed for rows that lie in the slots of links.

Holds no request, no cache and no state between calls: an answer is a function of (weights, layer, rows). Which calls
are computed together is decided by `FfnServer`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from transload.control.ffn_messages import Piece
from transload.model.ffn_pieces import INDEX_DTYPE, PieceFunctions, compute_pieces
from transload.model.native.feed_forward import NativeFeedForwards
from transload.model.native.ring import compiled_rings
from transload.transfer.ffn_link import ArrivedCall
from transload.transfer.ffn_meeting import FfnWeights


class FfnSide:
    """Rows [T, E] in the model's dtype to rows [T, E], by layer. Lives on one thread."""

    def __init__(
        self,
        functions: PieceFunctions,
        weights: FfnWeights,
        pieces: frozenset[Piece],
        dtype: torch.dtype,
        device: torch.device,
        threads: int = 1,
    ) -> None:
        """`threads`: of our own kernels, where they can compute all of the functions."""
        self.weights = weights
        self.pieces = pieces
        self.rings = compiled_rings()
        self._native = NativeFeedForwards.of(functions, threads) if device.type == "cpu" else None
        self._functions: PieceFunctions = self._native.functions() if self._native is not None else functions
        self._dtype = dtype
        self._device = device
        self._row_bytes = weights.hidden_size * dtype.itemsize

    def problem(self, call: ArrivedCall, room_bytes: int) -> str | None:
        """Why a call cannot be computed as it came; `room_bytes` is what its answer may take."""
        request, num_rows = call.frame.request, call.frame.num_rows
        if len(request.pieces) == 1:  # all rows of one piece that is here: most calls
            piece, rows = request.pieces[0]
            fits = len(call.rows) == rows * self._row_bytes <= room_bytes
            if fits and rows == num_rows >= 1 and (request.key.layer, piece) in self._functions:
                return None
        wanted = sum(rows for _, rows in request.pieces)
        if num_rows < 1 or not request.pieces or any(rows < 1 for _, rows in request.pieces):
            return "a request without rows"
        if any((request.key.layer, piece) not in self._functions for piece, _ in request.pieces):
            return f"a piece of layer {request.key.layer} that is not here"
        index_bytes = len(call.rows) - num_rows * self._row_bytes
        whole = index_bytes == 0 and all(rows == num_rows for _, rows in request.pieces)
        if not whole and index_bytes != wanted * INDEX_DTYPE.itemsize:
            return f"{len(call.rows)} bytes for {wanted} of {num_rows} rows of {self._row_bytes} bytes"
        if wanted * self._row_bytes > room_bytes:
            return f"an answer of {wanted * self._row_bytes} bytes, there is room for {room_bytes}"
        if index_bytes:
            _, index_P = self._rows(call)
            if index_P is not None and not bool(((index_P >= 0) & (index_P < num_rows)).all()):
                return f"a row that is not among the {num_rows} sent"
        return None

    def compute(self, layer: int, calls: Sequence[ArrivedCall], targets: Sequence[memoryview]) -> list[int]:
        """Fill each call's target; returns how many bytes of each. The calls have no `problem`."""
        if self._native is not None and (piece := self._only_piece(calls)) is not None:
            return self._compute_at_once(self._native, (layer, piece), calls, targets)
        return self._compute_with_torch(layer, calls, targets)

    @torch.inference_mode()
    def _compute_with_torch(self, layer: int, calls: Sequence[ArrivedCall], targets: Sequence[memoryview]) -> list[int]:
        asked = []
        for call in calls:
            rows_RE, index_P = self._rows(call)
            if index_P is not None:  # the peer can still write it: what was checked may have changed since
                index_P = index_P.clone().clamp_(0, call.frame.num_rows - 1).to(self._device)
            asked.append((call.frame.request.pieces, rows_RE.to(self._device), index_P))
        sizes: list[int] = []
        for answer_PE, target in zip(compute_pieces(self._functions, layer, asked), targets, strict=True):
            out = torch.frombuffer(target, dtype=self._dtype, count=answer_PE.numel()).view(answer_PE.shape)
            out.copy_(answer_PE)
            sizes.append(answer_PE.numel() * self._dtype.itemsize)
        return sizes

    def _only_piece(self, calls: Sequence[ArrivedCall]) -> Piece | None:
        """The one that all of the calls want for all of their rows in order; None if there is no such piece."""
        pieces = calls[0].frame.request.pieces
        only = pieces[0][0]
        for call in calls:
            pieces = call.frame.request.pieces
            if len(pieces) != 1 or pieces[0][0] != only or len(call.rows) != call.frame.num_rows * self._row_bytes:
                return None
        return only

    def _compute_at_once(
        self,
        native: NativeFeedForwards,
        place: tuple[int, Piece],
        calls: Sequence[ArrivedCall],
        targets: Sequence[memoryview],
    ) -> list[int]:
        """From slot to slot."""
        native.compute(
            place,
            [
                (_address(call.rows), call.frame.num_rows, _address(target))
                for call, target in zip(calls, targets, strict=True)
            ],
        )
        return [len(call.rows) for call in calls]

    def _rows(self, call: ArrivedCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows [R, E], and which of them the pieces take, unless that is all in order."""
        num_bytes = call.frame.num_rows * self._row_bytes
        rows = torch.frombuffer(call.rows[:num_bytes], dtype=self._dtype)
        index = call.rows[num_bytes:]
        return (
            rows.view(call.frame.num_rows, self.weights.hidden_size),
            torch.frombuffer(index, dtype=INDEX_DTYPE) if len(index) else None,
        )


def _address(memory: memoryview) -> int:
    """Where it lies, as long as somebody holds it."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
