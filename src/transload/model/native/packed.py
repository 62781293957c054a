"""Weights in the layout of the kernels, and a layer's multiplication by itself.

Owns the memory that packed weights lie in. Never decides whether a layer is packed: `fits` says whether it can be.
"""

from __future__ import annotations

import ctypes
import weakref

import numpy as np
import numpy.typing as npt
import torch

from transload.model.native.library import Library, load
from transload.model.native.structs import LinearStruct

KINDS = {torch.float32: 0, torch.bfloat16: 1}
_GROUPED_KINDS = {"Q4_1": 2, "Q8_0": 3}
_BLOCK_NUMBERS = 32
_ARENA_BYTES = 64 << 20
_ALIGNMENT = 64
_STORED_BITS = {"Q4_1": (True, 20), "Q8_0": (False, 34)}
"""GGUF kinds that the kernels read: whether a number has four bits, and the bytes of a block of 32."""

__all__ = ["KINDS", "Arena", "PackedLinear", "first_largest", "fits", "read_stored"]


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


def fits(weight: torch.Tensor, split: int, blocks: str = "") -> bool:
    """Whether the kernels can hold this weight: numbers [out, in], or stored blocks of the GGUF kind `blocks`."""
    if weight.device.type != "cpu" or (library := load()) is None:
        return False
    if blocks:
        return blocks in _GROUPED_KINDS and (split or len(weight)) % library.lanes == 0
    num_outputs, num_inputs = weight.shape
    return weight.dtype in KINDS and (split or num_outputs) % library.lanes == 0 and num_inputs % library.lanes == 0


def first_largest(rows_RV: torch.Tensor) -> torch.Tensor | None:
    """int64 [R]: the lowest place among each row's largest; NaN counts as largest. None if the kernels cannot."""
    if rows_RV.device.type != "cpu" or rows_RV.dtype != torch.float32 or (library := load()) is None:
        return None
    rows_RV = rows_RV.contiguous()
    found_R = torch.empty(len(rows_RV), dtype=torch.int64)
    library.first_largest(rows_RV.data_ptr(), *rows_RV.shape, found_R.data_ptr())
    return found_R


def read_stored(stored: npt.NDArray[np.uint8], kind: str, into: torch.Tensor) -> bool:
    """Fill a contiguous tensor from the blocks of a GGUF tensor; False if this kind is not one the kernels read."""
    if kind not in _STORED_BITS or into.dtype not in KINDS or (library := load()) is None:
        return False
    four_bits, block_bytes = _STORED_BITS[kind]
    assert stored.flags.c_contiguous, kind
    assert stored.size * 32 == into.numel() * block_bytes, (kind, stored.size, into.numel())
    num_blocks = stored.size // block_bytes
    library.read_stored(four_bits, stored.ctypes.data, num_blocks, KINDS[into.dtype], into.data_ptr())
    return True


class PackedLinear:
    """y = x W^T + b over rows, from packed weights. Immutable once built."""

    __slots__ = ("_arena", "_bias", "_library", "struct")

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        split: int = 0,
        arena: Arena | None = None,
        blocks: str = "",
    ) -> None:
        """`weight` that `fits`, with the same `blocks`; it is copied. `split`: the weight stacks two of so many
        outputs, which a feed-forward needs side by side; results are in the order of the weight all the same."""
        library = load()
        assert library is not None, "fits() was asked"
        self._library = library
        self._arena = arena or Arena(library)
        self._bias = None if bias is None else bias.float().contiguous()
        weight = weight.contiguous()
        address = 0 if self._bias is None else self._bias.data_ptr()
        num_outputs, width = weight.shape
        kind = _GROUPED_KINDS[blocks] if blocks else KINDS[weight.dtype]
        num_inputs = width // _STORED_BITS[blocks][1] * _BLOCK_NUMBERS if blocks else width
        self.struct = LinearStruct(num_outputs, num_inputs, kind, split, None, address or None)
        self.struct.weight = self._arena.take(library.packed_bytes(ctypes.byref(self.struct)))
        library.pack(ctypes.byref(self.struct), weight.data_ptr())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Rows [T, in] to rows [T, out], in the weight's dtype; of stored blocks in bfloat16."""
        assert x.shape[1] == self.struct.num_inputs, x.shape
        x = x.contiguous()
        y = x.new_empty(x.shape[0], self.struct.num_outputs)
        self._library.multiply(ctypes.byref(self.struct), x.data_ptr(), x.shape[0], y.data_ptr(), None)
        return y

    def rows(self, numbers_T: torch.Tensor) -> torch.Tensor:
        """float32 [T, in]: rows of the weight by their numbers, int64 [T]. Raises `IndexError` for one that is not
        there. Not of a weight that splits."""
        assert self.struct.split == 0, "rows of a split weight lie elsewhere"
        if len(numbers_T) and not 0 <= int(numbers_T.min()) <= int(numbers_T.max()) < self.struct.num_outputs:
            raise IndexError(f"a row outside the weight's {self.struct.num_outputs}")
        numbers_T = numbers_T.contiguous()
        found = torch.empty(len(numbers_T), self.struct.num_inputs)
        self._library.unpack_rows(ctypes.byref(self.struct), numbers_T.data_ptr(), len(numbers_T), found.data_ptr())
        return found
