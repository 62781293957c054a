"""Mixtures of experts: which experts a row goes through, their rows grouped by expert, and the sum of what they give.

Owns the arithmetic of a mixture and its form when several workers compute one layer. Never decides which worker has an
expert: `control/expert_map.py` does.

One rule makes a split exact: an expert answers with one unweighted row for each *slot* (a row's n-th choice), and the
slots of a row are weighted and added in their own order, in float32, on the side that routed them. So the bits of the
sum do not depend on who computed which slot, nor on when it arrived.

Shapes: T rows, E hidden size, k slots a row, P slots, grouped by expert.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch

from transload.arch import Experts
from transload.model.linear import Linear

Pieces = tuple[tuple[int, int], ...]
"""Experts and how many rows each is given."""
RowsFunction = Callable[[torch.Tensor], torch.Tensor]
"""Rows [n, E] to rows [n, E], n >= 1."""


class Routing:
    """Which experts each row goes through, `ids` int64 [T, k], and with what weight, float32 [T, k]; heaviest first."""

    __slots__ = ("ids", "weights")

    def __init__(self, ids: torch.Tensor, weights: torch.Tensor) -> None:
        self.ids = ids
        self.weights = weights


class Router:
    """Chooses the experts of each row, and counts how often it has chosen which."""

    __slots__ = ("_experts", "_gate", "num_chosen")

    def __init__(self, gate: Linear, experts: Experts) -> None:
        """`gate` [num_experts, E]."""
        self._gate = gate
        self._experts = experts
        self.num_chosen: torch.Tensor | None = None  # int64 [num_experts]

    def __call__(self, hidden_TE: torch.Tensor) -> Routing:
        routing = self._choose(hidden_TE)
        ids_S = routing.ids.reshape(-1)
        if self.num_chosen is None:
            self.num_chosen = ids_S.new_zeros(self._experts.num_experts)
        self.num_chosen.scatter_add_(0, ids_S, torch.ones_like(ids_S))
        return routing

    def _choose(self, hidden_TE: torch.Tensor) -> Routing:
        scores_TX = self._gate(hidden_TE).float()
        if self._experts.scores == "chosen":
            logits_Tk, ids_Tk = scores_TX.topk(self._experts.per_token, -1)
            return Routing(ids_Tk, logits_Tk.softmax(-1))
        weights_Tk, ids_Tk = scores_TX.softmax(-1).topk(self._experts.per_token, -1)
        if self._experts.normalised:
            weights_Tk = weights_Tk / weights_Tk.sum(-1, keepdim=True)
        return Routing(ids_Tk, weights_Tk)


class Groups:
    """The slots of a call, those of one expert together.

    `pieces` says how many rows each expert gets, in ascending order of experts; `places` int64 [P] which slot of T * k
    each of them is, and `rows` int64 [P] the row that it belongs to.
    """

    __slots__ = ("pieces", "places", "rows")

    def __init__(self, ids_Tk: torch.Tensor) -> None:
        sorted_P, self.places = ids_Tk.reshape(-1).sort(stable=True)
        self.rows = self.places.div(ids_Tk.shape[1], rounding_mode="floor")
        experts, counts = torch.unique_consecutive(sorted_P, return_counts=True)
        self.pieces: Pieces = tuple(zip(experts.tolist(), counts.tolist(), strict=True))

    def slices(self) -> dict[int, slice]:
        """Where each expert's slots lie in `places` and `rows`."""
        ends = itertools.accumulate(count for _, count in self.pieces)
        return {expert: slice(end - count, end) for (expert, count), end in zip(self.pieces, ends, strict=True)}


class ExpertLayer:
    """One layer's experts, all of them or those that a worker was given."""

    __slots__ = ("_experts",)

    def __init__(self, experts: Mapping[int, RowsFunction]) -> None:
        self._experts = dict(experts)

    @property
    def experts(self) -> tuple[int, ...]:
        """Which experts are here."""
        return tuple(self._experts)

    def expert(self, number: int) -> RowsFunction:
        """One of them by itself."""
        return self._experts[number]

    def __call__(self, hidden_TE: torch.Tensor, routing: Routing | None = None) -> torch.Tensor:
        """The whole mixture [T, E], float32; every expert that the rows need is here."""
        assert routing is not None, "a mixture is called with its routing"
        groups = Groups(routing.ids)
        combine = Combine(routing, hidden_TE)
        combine.put(groups.places, self.compute(groups.pieces, hidden_TE[groups.rows]))
        return combine.result()

    def compute(self, pieces: Pieces, hidden_PE: torch.Tensor) -> torch.Tensor:
        """Unweighted rows [P, E] of the experts that `pieces` names, in its order, from as many rows for each.

        A pure function of weights and rows. In deterministic mode a row's bits depend on that row alone. The experts
        named must be here.
        """
        if not pieces:
            return hidden_PE
        parts = torch.split(hidden_PE, [count for _, count in pieces])
        computed = [self._experts[expert](part) for (expert, _), part in zip(pieces, parts, strict=True)]
        return computed[0] if len(computed) == 1 else torch.cat(computed)


class Combine:
    """Gathers what the experts give for one call, in any order, and adds it up in one."""

    __slots__ = ("_missing", "_slots_SE", "_weights_Tk")

    def __init__(self, routing: Routing, hidden_TE: torch.Tensor) -> None:
        """`hidden_TE` is the call's; the experts' rows are of its width and dtype."""
        self._weights_Tk = routing.weights
        self._missing = routing.ids.numel()
        self._slots_SE = hidden_TE.new_empty(self._missing, hidden_TE.shape[1])

    def put(self, places_P: torch.Tensor, rows_PE: torch.Tensor) -> None:
        """Each slot once: who may answer twice has to be told apart before."""
        self._slots_SE[places_P] = rows_PE
        self._missing -= len(places_P)

    @property
    def is_complete(self) -> bool:
        return self._missing == 0

    def result(self) -> torch.Tensor:
        """[T, E] in float32."""
        assert self.is_complete, f"{self._missing} slots have not been computed"
        return weighted_sum(self._slots_SE, self._weights_Tk)


def weighted_sum(slots_SE: torch.Tensor, weights_Tk: torch.Tensor) -> torch.Tensor:
    """Add up each row's slots, S = T * k row by row, heaviest first: float32 [T, E].

    Multiplied and added one by one: a fused step or a library's sum may round otherwise at another place.
    """
    num_rows, num_slots = weights_Tk.shape
    products_TkE = slots_SE.view(num_rows, num_slots, -1) * weights_Tk.unsqueeze(-1)
    total_TE = products_TkE[:, 0].contiguous()
    for slot in range(1, num_slots):
        total_TE += products_TkE[:, slot]
    return total_TE
