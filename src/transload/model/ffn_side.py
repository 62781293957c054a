"""The FFN side of a model: feed-forwards and nothing else, computed for rows that lie in the slots of links.

Holds no request, no cache and no state between calls: an answer is a function of (weights, layer, rows). Which calls
are computed together is decided by `FfnServer`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from transload.control.ffn_messages import Piece
from transload.model.llama import FeedForwardLayer
from transload.transfer.ffn_link import ArrivedCall
from transload.transfer.ffn_meeting import FfnWeights


class FfnSide:
    """Rows [T, E] in the model's dtype to rows [T, E], by layer. Lives on one thread."""

    def __init__(
        self,
        feed_forwards: Sequence[FeedForwardLayer],
        weights: FfnWeights,
        pieces: frozenset[Piece],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.weights = weights
        self.pieces = pieces
        self._feed_forwards = feed_forwards
        self._dtype = dtype
        self._device = device
        self._row_bytes = weights.hidden_size * dtype.itemsize

    def problem(self, call: ArrivedCall, room_bytes: int) -> str | None:
        """Why a call cannot be computed as it came; `room_bytes` is what its answer may take."""
        wanted = sum(rows for _, rows in call.frame.request.pieces)
        num_bytes = wanted * self._row_bytes
        if call.frame.num_rows != wanted or len(call.rows) != num_bytes:
            return f"{len(call.rows)} bytes of rows, wanted {wanted} rows of {self._row_bytes} bytes"
        if num_bytes > room_bytes:
            return f"an answer of {num_bytes} bytes, there is room for {room_bytes}"
        return None

    @torch.inference_mode()
    def compute(self, layer: int, calls: Sequence[ArrivedCall], targets: Sequence[memoryview]) -> list[int]:
        """Fill each call's target; returns how many bytes of each. The calls have no `problem`."""
        rows = [self._rows(call) for call in calls]
        hidden_TE = rows[0] if len(rows) == 1 else torch.cat(rows)
        ffn_TE = self._feed_forwards[layer](hidden_TE.to(self._device))
        sizes: list[int] = []
        start = 0
        for own, target in zip(rows, targets, strict=True):
            num_rows = len(own)
            out = torch.frombuffer(target, dtype=self._dtype, count=own.numel()).view(own.shape)
            out.copy_(ffn_TE[start : start + num_rows])
            sizes.append(own.numel() * self._dtype.itemsize)
            start += num_rows
        return sizes

    def _rows(self, call: ArrivedCall) -> torch.Tensor:
        flat = torch.frombuffer(call.rows, dtype=self._dtype)
        return flat.view(call.frame.num_rows, self.weights.hidden_size)
