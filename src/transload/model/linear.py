"""Linear layers: weights packed once where possible, and a deterministic form whose rows never depend on the batch.

Owns the choice of how a layer is multiplied: by our own kernels, by oneDNN's private packing operators, which nothing
else in the project knows of, or by `functional.linear`. A layer built here always works: packing that is missing or
computes something else falls back to the latter. Deterministic layers do not use our own kernels.

Why tiles: a CPU matrix multiplication picks its kernel, and with it the order of its additions, by the number of rows,
so a row's last bit depends on who shares its batch. Deterministic layers compute rows only in tiles whose sizes were
shown, when the layer was built, to give each row the bits that a tile of four gives it. Short tiles are padded with
zero rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn import functional

from transload.errors import MachineError
from transload.model.grouped import BLOCK_BYTES, GroupedKind, GroupedWeight
from transload.model.native.packed import Arena, PackedLinear, fits

REFERENCE_TILE = 4
_LARGER_TILES = (8, 16, 32, 64, 128, 256)
_PROBE_ROWS = 256
_ROWS_HINT = 1  # the packing is laid out for decode; larger batches lose nothing measurable by it
_PACKED_DTYPES = (torch.float32, torch.bfloat16)

RowsKernel = Callable[[torch.Tensor], torch.Tensor]
"""Rows [T, in] to rows [T, out], T >= 1."""


class TileProof:
    """Tile sizes shown to be bit-equal, by weight shape, so that layers of one shape are tried once."""

    def __init__(self) -> None:
        self._by_shape: dict[tuple[int, int, torch.dtype, bool], tuple[int, ...]] = {}

    def tiles(self, kernel: RowsKernel, weight: torch.Tensor, *, biased: bool) -> tuple[int, ...]:
        """Ascending sizes of tiles that give equal bits through `kernel`, `REFERENCE_TILE` first.

        Raises `MachineError` if not even the reference tile treats its rows alike.
        """
        key = (weight.shape[0], weight.shape[1], weight.dtype, biased)
        if key not in self._by_shape:
            self._by_shape[key] = _prove_tiles(kernel, weight)
        return self._by_shape[key]


class Linear:
    """y = x W^T + b over rows. Immutable once built."""

    __slots__ = ("_kernel", "_out_features", "_tiles", "packed")

    def __init__(
        self,
        weight: torch.Tensor | GroupedWeight,
        bias: torch.Tensor | None,
        proof: TileProof | None,
        *,
        split: int = 0,
        arena: Arena | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """`weight` [out, in], `bias` [out]. With a `proof` the layer is deterministic.

        `split`: the weight stacks two projections of so many outputs that meet element by element. `arena` is where our
        own kernels' weights go. `dtype`: in which a grouped weight is multiplied where our own kernels cannot.
        """
        self.packed = _ours(weight, bias, split, proof, arena)
        if isinstance(weight, GroupedWeight):
            self._out_features = weight.rows.shape[0]
            if self.packed is not None:
                self._kernel: RowsKernel = self.packed
                self._tiles: tuple[int, ...] = ()
                return
            weight = weight.dequantised(dtype)
            self.packed = _ours(weight, bias, split, proof, arena)
        self._out_features = weight.shape[0]
        self._kernel = self.packed or _packed_kernel(weight, bias) or _plain_kernel(weight, bias)
        self._tiles = proof.tiles(self._kernel, weight, biased=bias is not None) if proof is not None else ()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Rows [T, in] to rows [T, out]."""
        if not self._tiles:
            return self._kernel(x)
        return _in_tiles(self._kernel, x, self._tiles, self._out_features)


def _ours(
    weight: torch.Tensor | GroupedWeight,
    bias: torch.Tensor | None,
    split: int,
    proof: TileProof | None,
    arena: Arena | None,
) -> PackedLinear | None:
    """The layer in our own kernels; None where they cannot hold it, may not, or compute something else."""
    rows, kind = (weight.rows, weight.kind) if isinstance(weight, GroupedWeight) else (weight, weight.dtype)
    blocks = kind if isinstance(kind, str) else ""
    if proof is not None or not fits(rows, split, blocks) or not _kernels_agree(kind):
        return None
    return PackedLinear(rows, bias, split=split, arena=arena, blocks=blocks)


@functools.cache
def _kernels_agree(kind: torch.dtype | GroupedKind) -> bool:
    """Whether our own kernels, as compiled here, compute what torch does: tried once on a layer of uneven panels."""
    generator = torch.Generator().manual_seed(20_260_102)
    if isinstance(kind, torch.dtype):
        weight = torch.randn(112, 64, generator=generator).to(kind)
        return _agrees_with_plain(PackedLinear(weight, None), weight, None)
    blocks = torch.randint(0, 256, (112, 2, BLOCK_BYTES[kind]), generator=generator, dtype=torch.uint8)
    blocks[:, :, 1] = 0x2C  # scales between a sixteenth and an eighth
    blocks[:, :, 3] = 0xB8 if kind == "Q4_1" else blocks[:, :, 3]  # minima between a half and one, negative
    grouped = GroupedWeight(kind, blocks.view(112, -1))
    packed = PackedLinear(grouped.rows, None, blocks=kind)
    return _agrees_with_plain(packed, grouped.dequantised(torch.bfloat16), None)


def _plain_kernel(weight: torch.Tensor, bias: torch.Tensor | None) -> RowsKernel:
    def plain(x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, weight, bias)

    return plain


def _packed_kernel(weight: torch.Tensor, bias: torch.Tensor | None) -> RowsKernel | None:
    """A kernel over weights in oneDNN's own blocked layout; None where torch has none or it computes something else.

    It halves a decode step: the plain operator reads the weights at half of the memory's speed when rows are few.
    """
    if weight.device.type != "cpu" or weight.dtype not in _PACKED_DTYPES or not _has_onednn():
        return None
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
        multiply = torch.ops.mkldnn._linear_pointwise.default
    except (AttributeError, RuntimeError, NotImplementedError):
        return None

    def kernel(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = multiply(x, packed, bias, "none", [], "")
        return y

    return kernel if _agrees_with_plain(kernel, weight, bias) else None


def _has_onednn() -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available


def _agrees_with_plain(kernel: RowsKernel, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether both give the same sums up to the rounding of their dtype, for one row and for several."""
    tolerance = 1e-4 if weight.dtype == torch.float32 else 2e-2
    for num_rows in (1, 5):
        x = _probe_rows(num_rows, weight)
        try:
            got = kernel(x).float()
        except (RuntimeError, NotImplementedError):
            return False
        want = functional.linear(x, weight, bias).float()
        scale = want.abs().amax().clamp(min=1e-6)
        if not bool((got - want).abs().amax() <= tolerance * scale):
            return False
    return True


def _probe_rows(num_rows: int, weight: torch.Tensor) -> torch.Tensor:
    """Normally distributed rows, the same each time."""
    generator = torch.Generator().manual_seed(20_260_101)
    rows = torch.randn(num_rows, weight.shape[1], generator=generator)
    return rows.to(device=weight.device, dtype=weight.dtype)


def _prove_tiles(kernel: RowsKernel, weight: torch.Tensor) -> tuple[int, ...]:
    """Try each tile size on the same random rows and keep those that agree in every bit.

    The reference runs on one thread: a worker with another number of threads then proves against the same bits.
    """
    x = _probe_rows(_PROBE_ROWS, weight)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        want = _fixed_tiles(kernel, x, REFERENCE_TILE)
    finally:
        torch.set_num_threads(num_threads)
    # Rolled by one, each row sits at another place in its tile, beside other rows.
    if not torch.equal(_fixed_tiles(kernel, x.roll(1, 0), REFERENCE_TILE), want.roll(1, 0)):
        raise MachineError(
            f"deterministic mode: a {tuple(weight.shape)} {weight.dtype} layer on {weight.device} gives a row other "
            f"bits at another place in a tile of {REFERENCE_TILE} rows, so equal text cannot be promised here; "
            "use another dtype or device, or turn deterministic mode off"
        )
    larger = (tile for tile in _LARGER_TILES if torch.equal(_fixed_tiles(kernel, x, tile), want))
    return (REFERENCE_TILE, *larger)


def _fixed_tiles(kernel: RowsKernel, x: torch.Tensor, tile: int) -> torch.Tensor:
    return torch.cat([kernel(rows.contiguous()) for rows in torch.split(x, tile)])


def _in_tiles(kernel: RowsKernel, x: torch.Tensor, tiles: tuple[int, ...], out_features: int) -> torch.Tensor:
    """Cover the rows with proven tiles: the largest while it fits, then the smallest that holds the rest."""
    num_rows, in_features = x.shape
    if num_rows in tiles:
        return kernel(x.contiguous())
    y = x.new_empty(num_rows, out_features)
    start = 0
    while start < num_rows:
        left = num_rows - start
        tile = next((size for size in tiles if size >= left), tiles[-1])
        taken = min(tile, left)
        rows = x.new_zeros(tile, in_features)
        rows[:taken] = x[start : start + taken]
        y[start : start + taken] = kernel(rows)[:taken]
        start += taken
    return y
