"""Weights in the layout of the kernels, and a layer's multiplication by itself.

Owns the memory that packed weights lie in. Never decides whether a layer is packed: `fits` says whether it can be.
"""

from __future__ import annotations

import ctypes
import weakref

import torch

from transload.model.native.library import LayerStruct, Library, LinearStruct, load

KINDS = {torch.float32: 0, torch.bfloat16: 1}
_ARENA_BYTES = 64 << 20
_ALIGNMENT = 64

__all__ = ["KINDS", "Arena", "LayerStruct", "PackedLinear", "first_largest", "fits"]


class Arena:
    """Memory for the packed weights of one model: large pieces, so that the kernel can give it large pages."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._free_from = 0
        self._free_until = 0

    def take(self, num_bytes: int) -> int:
        """An address that is valid as long as the arena lives. Raises `MemoryError`."""
        if self._free_from + num_bytes > self._free_until:
            size = max(_ARENA_BYTES, num_bytes)
            address = self._library.allocate(size)
            if not address:
                raise MemoryError(f"no memory for {size} bytes of weights")
            weakref.finalize(self, self._library.free, address, size)
            self._free_from, self._free_until = address, address + size
        taken = self._free_from
        self._free_from += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return taken


def fits(weight: torch.Tensor, split: int) -> bool:
    """Whether the kernels can hold this weight [out, in]."""
    if weight.device.type != "cpu" or weight.dtype not in KINDS or (library := load()) is None:
        return False
    num_outputs, num_inputs = weight.shape
    return (split or num_outputs) % library.lanes == 0 and num_inputs % library.lanes == 0


def first_largest(rows_RV: torch.Tensor) -> torch.Tensor | None:
    """int64 [R]: the lowest place among each row's largest; NaN counts as largest. None if the kernels cannot."""
    if rows_RV.device.type != "cpu" or rows_RV.dtype != torch.float32 or (library := load()) is None:
        return None
    rows_RV = rows_RV.contiguous()
    found_R = torch.empty(len(rows_RV), dtype=torch.int64)
    library.first_largest(rows_RV.data_ptr(), *rows_RV.shape, found_R.data_ptr())
    return found_R


class PackedLinear:
    """y = x W^T + b over rows, from packed weights. Immutable once built."""

    __slots__ = ("_arena", "_bias", "_library", "struct")

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, *, split: int = 0, arena: Arena | None = None
    ) -> None:
        """`weight` [out, in] that `fits`; it is copied. `split`: the weight stacks two of so many outputs, which a
        feed-forward needs side by side; results are in the order of the weight all the same."""
        library = load()
        assert library is not None, "fits() was asked"
        self._library = library
        self._arena = arena or Arena(library)
        self._bias = None if bias is None else bias.float().contiguous()
        weight = weight.contiguous()
        address = 0 if self._bias is None else self._bias.data_ptr()
        self.struct = LinearStruct(*weight.shape, KINDS[weight.dtype], split, None, address or None)
        self.struct.weight = self._arena.take(library.packed_bytes(ctypes.byref(self.struct)))
        library.pack(ctypes.byref(self.struct), weight.data_ptr())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Rows [T, in] to rows [T, out], in the weight's dtype."""
        x = x.contiguous()
        y = x.new_empty(x.shape[0], self.struct.num_outputs)
        self._library.multiply(ctypes.byref(self.struct), x.data_ptr(), x.shape[0], y.data_ptr(), None)
        return y
