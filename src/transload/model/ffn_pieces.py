"""A layer's feed-forward in pieces that other workers compute: cut from a call, computed from rows, put together again.

Owns which rows a piece is given and how what comes back becomes the layer's result, the same for whoever computes a
piece. Never decides who that is, and never sends anything: `RemoteDriver` carries the rows.

A piece is the whole of a layer, a column part of it, or one expert. Experts have numbers of their own in every layer,
`layer * stride + expert`, because each layer's experts may be placed otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias

import torch

from transload.arch import ModelArch
from transload.control.expert_map import build_expert_map, num_experts_by_layer
from transload.control.ffn_messages import Piece, Split, Wanted
from transload.deploy.plan import FfnShare
from transload.model.build import Tensors, WeightSource, build_experts, build_feed_forward
from transload.model.experts import Combine, Groups
from transload.model.linear import TileProof
from transload.model.llama import FfnCall

PieceFunctions: TypeAlias = Mapping[tuple[int, Piece], Callable[[torch.Tensor], torch.Tensor]]
"""By layer and piece: rows [n, E] to rows [n, E]."""
INDEX_DTYPE = torch.int32


class CutCall(Protocol):
    """One call in pieces. E hidden size; a piece has as many rows to compute as `pieces` says."""

    pieces: Wanted

    def rows(self, pieces: Sequence[Piece], /) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What somebody needs to compute these pieces: rows [R, E]; and, unless every piece takes all of them in
        order, which of them each piece takes, one piece after the other: [P] of INDEX_DTYPE."""
        ...

    def put(self, piece: Piece, rows_PE: torch.Tensor) -> None:
        """What a piece gave. The only piece's rows are not copied: they are to stay until the result is taken."""
        ...

    def result(self) -> torch.Tensor:
        """[T, E], once every piece is there."""
        ...


class WholeCall:
    """Every piece takes all rows; there is one, or their outputs are added up in order."""

    def __init__(self, call: FfnCall, pieces: Sequence[Piece]) -> None:
        num_rows = len(call.hidden)
        self.pieces: Wanted = tuple((piece, num_rows) for piece in pieces) if num_rows else ()
        self._hidden_TE = call.hidden
        self._given: dict[Piece, torch.Tensor] = {}

    def rows(self, _pieces: Sequence[Piece]) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self._hidden_TE, None

    def put(self, piece: Piece, rows_PE: torch.Tensor) -> None:
        self._given[piece] = rows_PE if len(self.pieces) == 1 else rows_PE.clone()

    def result(self) -> torch.Tensor:
        given = [self._given[piece] for piece, _ in self.pieces]
        if len(given) == 1:
            return given[0]
        if not given:
            return torch.zeros_like(self._hidden_TE)
        total_TE = given[0].float()
        for part_TE in given[1:]:
            total_TE += part_TE
        return total_TE.to(self._hidden_TE.dtype)


class ExpertCall:
    """A mixture: a piece is an expert, and takes the rows that are routed to it."""

    def __init__(self, call: FfnCall, first_piece: int) -> None:
        assert call.routing is not None, "a mixture is called with its routing"
        self._hidden_TE = call.hidden
        self._first = first_piece
        self._groups = Groups(call.routing.ids)
        self._slices = self._groups.slices()
        self._combine = Combine(call.routing, call.hidden)
        self.pieces: Wanted = tuple((Piece(first_piece + expert), count) for expert, count in self._groups.pieces)

    def rows(self, pieces: Sequence[Piece]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Each row once, however many of the pieces take it."""
        wanted_P = torch.cat([self._groups.rows[self._slices[piece - self._first]] for piece in pieces])
        rows_R, index_P = torch.unique(wanted_P, return_inverse=True)
        return self._hidden_TE[rows_R], index_P.to(INDEX_DTYPE)

    def put(self, piece: Piece, rows_PE: torch.Tensor) -> None:
        self._combine.put(self._groups.places[self._slices[piece - self._first]], rows_PE)

    def result(self) -> torch.Tensor:
        return self._combine.result()


class Cutter:
    """Cuts calls the way a deployment splits feed-forwards. A mixture is always cut into its experts."""

    def __init__(self, arch: ModelArch, split: Split, num_workers: int) -> None:
        self._arch = arch
        self._by_expert = arch.experts is not None
        self._whole = tuple(Piece(part) for part in range(num_workers if split == "column" else 1))
        self._stride = piece_stride(arch)

    def all_pieces(self) -> frozenset[Piece]:
        """Of every layer."""
        if not self._by_expert:
            return frozenset(self._whole)
        return frozenset(
            Piece(layer * self._stride + expert)
            for layer, count in enumerate(num_experts_by_layer(self._arch))
            for expert in range(count)
        )

    def cut(self, call: FfnCall) -> CutCall:
        if not self._by_expert:
            return WholeCall(call, self._whole)
        first = call.layer * self._stride
        return WholeCall(call, (Piece(first),)) if call.routing is None else ExpertCall(call, first)


def piece_stride(arch: ModelArch) -> int:
    """From one layer's pieces to the next one's, where a piece is an expert."""
    return arch.experts.num_experts if arch.experts is not None else 1


def pieces_of(share: FfnShare, arch: ModelArch) -> frozenset[Piece]:
    """What an FFN worker owns."""
    if arch.experts is None:
        return frozenset({Piece(share.part if share.split == "column" else 0)})
    experts = build_expert_map(
        num_experts_by_layer(arch), share.num_parts, loads=share.loads, num_replicas=share.num_replicas
    )
    stride = piece_stride(arch)
    worker = share.part
    return frozenset(
        Piece(layer * stride + expert)
        for layer in range(arch.num_layers)
        for expert in experts.experts_of(worker, layer)
    )


def build_pieces(
    arch: ModelArch,
    tensors: Tensors,
    dtype: torch.dtype,
    deterministic: bool,
    device: torch.device,
    pieces: frozenset[Piece],
) -> PieceFunctions:
    """The experts, and plain feed-forwards between them, that pieces of a mixture stand for. Only their tensors need to
    be there."""
    stride = piece_stride(arch)
    functions: dict[tuple[int, Piece], Callable[[torch.Tensor], torch.Tensor]] = {}
    with torch.inference_mode():
        weights = WeightSource(arch, tensors, dtype, device, TileProof() if deterministic else None)
        for piece in sorted(pieces):
            layer, expert = divmod(piece, stride)
            if arch.is_sparse(layer):
                functions[layer, piece] = build_experts(weights, layer, (expert,)).expert(expert)
            else:
                functions[layer, piece] = build_feed_forward(weights, layer)
    return functions


def compute_pieces(
    functions: PieceFunctions,
    layer: int,
    calls: Sequence[tuple[Wanted, torch.Tensor, torch.Tensor | None]],
) -> list[torch.Tensor]:
    """Answer calls of one layer together: for each its pieces' rows [P, E], one piece after the other.

    Of each call: its pieces, rows and index as `CutCall.rows` gives them. Rows of one piece are computed at once,
    whoever sent them.
    """
    inputs: dict[Piece, list[torch.Tensor]] = {}
    for wanted, rows_RE, index_P in calls:
        taken_PE = rows_RE if index_P is None else rows_RE[index_P]
        start = 0
        for piece, count in wanted:
            # Without an index every piece takes all rows.
            inputs.setdefault(piece, []).append(taken_PE if index_P is None else taken_PE[start : start + count])
            start += count
    outputs = {}
    for piece, parts in inputs.items():
        computed = functions[layer, piece](parts[0] if len(parts) == 1 else torch.cat(parts))
        outputs[piece] = iter(torch.split(computed, [len(part) for part in parts]))
    return [torch.cat([next(outputs[piece]) for piece, _ in wanted]) for wanted, _, _ in calls]
