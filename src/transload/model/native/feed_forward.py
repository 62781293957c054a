"""Feed-forwards by themselves through the kernels: gate, up, SiLU and down in one call, for several callers' rows.

Owns what describes them to the kernels and their scratch memory. Never decides which rows are computed together.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping, Sequence

import torch

from transload.control.ffn_messages import Piece
from transload.model.llama import FeedForward
from transload.model.native.library import Library, load
from transload.model.native.packed import KINDS
from transload.model.native.step import linear_struct, open_threads
from transload.model.native.structs import CallerStruct, LayerStruct, ModelStruct

Place = tuple[int, Piece]
"""Layer and piece."""
RowsOf = tuple[int, int, int]
"""Of one caller: address of its rows, how many, address that as many results go to."""


class NativeFeedForwards:
    """Those of one worker, for one thread."""

    @classmethod
    def of(
        cls, functions: Mapping[Place, Callable[[torch.Tensor], torch.Tensor]], threads: int
    ) -> NativeFeedForwards | None:
        """None unless the kernels can compute all of them as they are built."""
        library = load()
        native = {place: one for place, one in functions.items() if isinstance(one, FeedForward) and one.is_native}
        if library is None or not native or len(native) < len(functions):
            return None
        return cls(library, native, threads)

    def __init__(self, library: Library, feed_forwards: Mapping[Place, FeedForward], threads: int) -> None:
        self._library = library
        self._feed_forwards = dict(feed_forwards)  # their weights are used below
        self._structs: dict[Place, LayerStruct] = {}
        for place, one in feed_forwards.items():
            struct = self._structs[place] = LayerStruct()
            struct.gate_up, struct.down = (linear_struct(linear) for linear in one.linears)
        first = next(iter(self._structs.values()))
        self._model = ModelStruct()
        self._model.hidden_size = first.down.num_outputs
        self._model.intermediate_size = max(struct.down.num_inputs for struct in self._structs.values())
        self._model.kind = first.down.kind
        self._runner = open_threads(library, self._model, threads)
        weakref.finalize(self, library.close, self._runner)

    def functions(self) -> dict[Place, Callable[[torch.Tensor], torch.Tensor]]:
        """Each of them as a function of rows."""

        def function(place: Place) -> Callable[[torch.Tensor], torch.Tensor]:
            return lambda rows_TE: self._one(place, rows_TE)

        return {place: function(place) for place in self._structs}

    def compute(self, place: Place, callers: Sequence[RowsOf]) -> None:
        """All callers' rows together. Raises `MemoryError`."""
        table = (CallerStruct * len(callers))(*(CallerStruct(*caller) for caller in callers))
        if self._library.feed_forward(self._runner, ctypes.byref(self._structs[place]), table, len(callers)):
            raise MemoryError(f"no memory for {sum(rows for _, rows, _ in callers)} rows of a feed-forward")

    def _one(self, place: Place, rows_TE: torch.Tensor) -> torch.Tensor:
        assert KINDS[rows_TE.dtype] == self._model.kind, rows_TE.dtype
        rows_TE = rows_TE.contiguous()
        out_TE = torch.empty_like(rows_TE)
        self.compute(place, [(rows_TE.data_ptr(), len(rows_TE), out_TE.data_ptr())])
        return out_TE
