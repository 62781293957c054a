"""Linear layers: packed and plain give the same sums; deterministic rows do not depend on the batch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from transload.errors import MachineError
from transload.model import linear
from transload.model.linear import Linear, TileProof

SHAPES = [(960, 576), (576, 1536), (100, 64), (48, 40), (7, 3), (1, 1), (320, 64)]
DTYPES = [torch.float32, torch.bfloat16]


def random_layer(
    shape: tuple[int, int], dtype: torch.dtype, *, biased: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator) / shape[1] ** 0.5
    bias = torch.randn(shape[0], generator=generator).to(dtype) if biased else None
    return weight.to(dtype), bias


def random_rows(num_rows: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(num_rows, size, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("deterministic", "native"), [(False, True), (False, False), (True, False)])
def test_a_layer_multiplies(
    shape: tuple[int, int],
    dtype: torch.dtype,
    biased: bool,
    deterministic: bool,
    native: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, bias = random_layer(shape, dtype, biased=biased)
    if not native:
        monkeypatch.setattr(linear, "fits", lambda weight, split, blocks: False)
    layer = Linear(weight, bias, TileProof() if deterministic else None)
    for num_rows in (1, 2, 5, 33, 300):
        x = random_rows(num_rows, shape[1], dtype)
        want = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(layer(x).double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
def test_deterministic_rows_have_the_same_bits_in_every_batch(
    shape: tuple[int, int], dtype: torch.dtype, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packed:
        monkeypatch.setattr(linear, "_packed_kernel", lambda weight, bias: None)
    weight, bias = random_layer(shape, dtype, biased=True)
    layer = Linear(weight, bias, TileProof())
    x = random_rows(520, shape[1], dtype)
    alone = torch.cat([layer(x[row : row + 1]) for row in range(520)])
    for num_rows in (*range(2, 21), 31, 64, 100, 255, 257, 520):
        for start in (0, 520 - num_rows):
            assert torch.equal(layer(x[start : start + num_rows]), alone[start : start + num_rows])


def test_deterministic_rows_do_not_depend_on_the_number_of_threads() -> None:
    weight, _ = random_layer((960, 576), torch.float32, biased=False)
    x = random_rows(37, 576, torch.float32)
    results = []
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            results.append(Linear(weight, None, TileProof())(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_packing_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "fits", lambda weight, split, blocks: False)
    weight, _ = random_layer((64, 32), torch.float32, biased=False)
    wrong = weight.clone()
    wrong[3, 4] += 1.0
    reorder = torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda w, hint: reorder(wrong, hint))
    assert linear._packed_kernel(weight, None) is None
    x = random_rows(3, 32, torch.float32)
    assert torch.equal(Linear(weight, None, None)(x), functional.linear(x, weight))


def test_packing_that_is_missing_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(weight: torch.Tensor, hint: int) -> torch.Tensor:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", missing)
    assert linear._packed_kernel(torch.ones(2, 2), None) is None


def test_a_machine_that_treats_rows_of_a_tile_differently_is_refused() -> None:
    """Equal text cannot be promised there, so deterministic mode does not start."""

    def uneven(x: torch.Tensor) -> torch.Tensor:
        return x * torch.arange(1, len(x) + 1)[:, None]

    with pytest.raises(MachineError, match="equal text cannot be promised here"):
        TileProof().tiles(uneven, torch.ones(8, 8), biased=False)


def test_tiles_that_change_bits_are_left_out() -> None:
    def uneven_above_sixteen(x: torch.Tensor) -> torch.Tensor:
        return x * (2.0 if len(x) > 16 else 1.0)

    assert TileProof().tiles(uneven_above_sixteen, torch.ones(8, 8), biased=False) == (4, 8, 16)
