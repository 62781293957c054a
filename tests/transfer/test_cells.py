"""Cells: which bytes they are, what their checksum is, and that a copy moves these and no others."""

from __future__ import annotations

import random

import numpy as np
import pytest
import xxhash

from tests.transfer.rig import LARGE, SMALL
from transload.errors import HandoffError
from transload.model.native.library import load
from transload.transfer.cells import CellKernels, CellMover, Cells
from transload.transfer.layout import KvLayout

MANY = KvLayout(model="many", num_layers=30, num_kv_heads=3, head_dim=64, block_size=16, dtype="bfloat16")


KERNELS: list[CellKernels | None] = [None, *([library] if (library := load()) is not None else [])]
with_kernels = pytest.mark.parametrize("kernels", KERNELS, ids=["numpy", "compiled"][: len(KERNELS)])


def pool(layout: KvLayout, num_blocks: int, seed: int) -> Cells:
    size = num_blocks * layout.block_bytes
    content = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    return Cells(memoryview(bytearray(content.tobytes())), layout, num_blocks)


def test_a_cell_is_one_layer_of_one_block() -> None:
    cells = pool(SMALL, 5, 0)
    rows = cells.rows(1, 3, (4, 0))
    start = 4 * SMALL.block_bytes + 1 * SMALL.cell_bytes
    assert rows.tolist() == [13, 1, 14, 2]
    assert cells.views(rows)[0] == cells.buffer[start : start + SMALL.cell_bytes]


@with_kernels
@pytest.mark.parametrize("layout", [SMALL, LARGE, MANY])
def test_the_checksum_goes_layer_by_layer_and_block_by_block(layout: KvLayout, kernels: CellKernels | None) -> None:
    cells = pool(layout, 6, 1)
    blocks = (3, 0, 5, 1)
    expected = xxhash.xxh3_64()
    for layer in range(layout.num_layers):
        for block in blocks:
            start = block * layout.block_bytes + layer * layout.cell_bytes
            expected.update(cells.buffer[start : start + layout.cell_bytes])
    rows = cells.rows(0, layout.num_layers, blocks)
    assert CellMover(layout.cell_bytes, kernels).checksum(cells, rows) == expected.intdigest()


@with_kernels
@pytest.mark.parametrize("layout", [SMALL, LARGE, MANY])
@pytest.mark.parametrize("seed", range(3))
def test_a_copy_moves_the_named_cells_and_no_others(layout: KvLayout, seed: int, kernels: CellKernels | None) -> None:
    shuffled = random.Random(seed)
    source, target = pool(layout, 12, seed), pool(layout, 15, seed + 100)
    layer_lo = shuffled.randrange(layout.num_layers)
    layer_hi = shuffled.randrange(layer_lo, layout.num_layers) + 1
    blocks, target_blocks = shuffled.sample(range(12), 7), shuffled.sample(range(15), 7)
    expected = target.matrix.reshape(15, layout.num_layers, -1).copy()
    expected[target_blocks, layer_lo:layer_hi] = source.matrix.reshape(12, layout.num_layers, -1)[
        blocks, layer_lo:layer_hi
    ]
    mover = CellMover(layout.cell_bytes, kernels)
    rows, target_rows = source.rows(layer_lo, layer_hi, blocks), target.rows(layer_lo, layer_hi, target_blocks)
    checksum = mover.copy(source, rows, target, target_rows)
    assert np.array_equal(target.matrix.reshape(15, layout.num_layers, -1), expected)
    assert checksum == mover.checksum(source, rows) == mover.checksum(target, target_rows)
    assert mover.checksum_seconds > 0


@with_kernels
@pytest.mark.parametrize("num_cells", [1, 4, 5, 16, 17, 63, 64])
def test_a_digest_made_in_parts_is_xxh3_of_the_whole(num_cells: int, kernels: CellKernels | None) -> None:
    cells = pool(SMALL, 32, 2)
    rows = cells.rows(0, 2, tuple(random.Random(num_cells).sample(range(32), 32)))[:num_cells]
    mover = CellMover(SMALL.cell_bytes, kernels)
    added, packed = mover.begin(num_cells), mover.begin(num_cells)
    sent = b""
    for part in (rows[: num_cells // 3], rows[num_cells // 3 :]):
        mover.add(added, cells, part)
        sent += b"".join(mover.pack(packed, cells, part))
    assert sent == b"".join(cells.views(rows))
    assert added.value() == packed.value() == xxhash.xxh3_64_intdigest(sent)


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [((0, 4), (1,)), ((-1, 1), (1,)), ((1, 1), (1,)), ((0, 1), (5,)), ((0, 1), (-1, 2)), ((0, 1), ())],
)
def test_cells_that_the_pool_does_not_have_are_refused(layers: tuple[int, int], blocks: tuple[int, ...]) -> None:
    with pytest.raises(HandoffError, match=r"the cache has layers 0\.\.3|the pool has blocks 0\.\.5"):
        pool(SMALL, 5, 0).rows(*layers, blocks)
