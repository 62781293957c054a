"""The kernels in C: built for other instruction sets, on several threads, with damaged input, and not built at all."""

from __future__ import annotations

import copy
import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.model.stepping import Stepper, stepper_of
from tests.model.test_llama import oracle_logits, oracle_of, prompt_of
from transload.errors import MachineError
from transload.model.gguf_quants import dequantised
from transload.model.native import library
from transload.model.native.library import FLAGS, Library, build, load
from transload.model.native.packed import PackedLinear, first_largest, read_stored
from transload.model.native.structs import TWINS, LinearStruct

COMPILER = next((found for name in library.COMPILERS if (found := shutil.which(name))), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler here")
OTHER_BUILDS = {
    "128-bit vectors": tuple(flag for flag in FLAGS if not flag.startswith("-march")),
    "bfloat16 pairs": (*FLAGS, "-DTRANSLOAD_TEST_PAIRED"),
}


@pytest.fixture(scope="module", params=OTHER_BUILDS)
def other_build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Library:
    target = tmp_path_factory.mktemp("native") / "kernels.so"
    assert COMPILER is not None
    build(COMPILER, tuple(flag.replace("-O3", "-O1") for flag in OTHER_BUILDS[request.param]), target)
    return Library(target)


@pytest.fixture
def _others_used(other_build: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_attempt", lambda: (other_build, ""))


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("_others_used")
@pytest.mark.parametrize("name", ["smollm2", "qwen3", "mistral-window-of-three", "llama-biases"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_instruction_sets_compute_what_transformers_does(name: str, dtype: torch.dtype) -> None:
    oracle = oracle_of(name, dtype)
    stepper = stepper_of(oracle, dtype=dtype, threads=2)
    assert stepper.executor._native is not None
    exact = copy.deepcopy(oracle).float()
    ours, theirs = [], []
    for length, chunk_tokens in ((1, None), (37, 20), (61, None), (90, 64), (150, None)):
        running = stepper.add(prompt_of(length))
        stepper.generate(running, 3, chunk_tokens)
        known = running.tokens[:-1]
        want = oracle_logits(exact, known)
        ours.append(stepper.logits[0] - want)
        theirs.append(oracle_logits(oracle, known) - want)
    assert torch.stack(ours).square().mean() <= 2 * torch.stack(theirs).square().mean() + 1e-7


def logits_of(threads: int, dtype: torch.dtype) -> torch.Tensor:
    """Of prompts in chunks beside single tokens, then of tokens alone."""
    stepper = stepper_of(oracle_of("smollm2", dtype), dtype=dtype, threads=threads)
    batch = [stepper.add(prompt_of(length)) for length in (5, 40, 150)]
    found = []
    stepper.step((batch[0], None), (batch[1], 30), (batch[2], 100))
    found.append(stepper.logits.clone())
    stepper.step((batch[0], 1), (batch[1], None), (batch[2], None))
    found.append(stepper.logits.clone())
    stepper.step(*((running, 1) for running in batch))
    found.append(stepper.logits.clone())
    return torch.cat(found)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    alone = logits_of(1, dtype)
    assert torch.equal(logits_of(2, dtype), alone)
    assert torch.equal(logits_of(3, dtype), alone)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_every_batch(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    layer = PackedLinear(torch.randn(208, 96, generator=generator).to(dtype), None)
    x = torch.randn(230, 96, generator=generator).to(dtype)
    alone = torch.cat([layer(x[row : row + 1]) for row in range(len(x))])
    for num_rows in (*range(2, 15), 97, 230):
        assert torch.equal(layer(x[:num_rows]), alone[:num_rows])


@needs_compiler
def test_stacked_projections_come_out_in_their_order() -> None:
    weight = torch.randn(2 * 80, 64, generator=torch.Generator().manual_seed(1))
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(2))
    got = PackedLinear(weight, None, split=80)(x)
    torch.testing.assert_close(got, functional.linear(x, weight), rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_packed_weight_are_those_of_the_weight(dtype: torch.dtype) -> None:
    weight = torch.randn(208, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer = PackedLinear(weight, None)
    numbers = torch.tensor([0, 207, 15, 16, 15])
    assert torch.equal(layer.rows(numbers), weight[numbers].float())
    for wrong in (-1, 208):
        with pytest.raises(IndexError):
            layer.rows(torch.tensor([wrong]))


@needs_compiler
@pytest.mark.parametrize(("kind", "block_bytes"), [("Q4_1", 20), ("Q8_0", 34)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_blocks_become_the_numbers_that_gguf_makes(kind: str, block_bytes: int, dtype: torch.dtype) -> None:
    stored = np.random.default_rng(1).integers(0, 256, 300 * block_bytes, np.uint8)
    blocks = stored.reshape(300, block_bytes)
    blocks[:, 1] &= 0x7B  # scales and minima that are finite
    blocks[:, 3] &= 0x7B if kind == "Q4_1" else 0xFF
    blocks[0, :2], blocks[1, :2], blocks[2, :2] = (1, 0), (0xFF, 0x83), (0, 0)  # the smallest, a negative tiny one, 0
    want = torch.from_numpy(np.concatenate([piece.copy() for piece in dequantised(stored, kind)])).to(dtype)
    got = torch.empty(300 * 32, dtype=dtype)
    assert read_stored(stored, kind, got)
    assert torch.equal(got, want)


@needs_compiler
def test_a_damaged_cache_does_not_become_text() -> None:
    stepper: Stepper = stepper_of(oracle_of("smollm2"))
    running = stepper.add(prompt_of(20))
    stepper.prefill(running)
    stepper.executor.cache.tensor[running.blocks[0], 1, 0, 0, 3] = float("nan")
    with pytest.raises(ArithmeticError, match="not numbers"):
        stepper.step((running, 1))


@needs_compiler
@pytest.mark.parametrize(
    ("row", "want"),
    [
        ([1.0, 3.0, 2.0], 1),
        ([0.0] * 40, 0),
        ([*range(70), 69.0], 69),
        ([5.0, float("nan"), 9.0] + [0.0] * 20, 1),
        ([float("-inf")] * 33, 0),
    ],
)
def test_the_first_of_the_largest_is_found(row: list[float], want: int) -> None:
    found = first_largest(torch.tensor([row]))
    assert found is not None
    assert found.tolist() == [want]


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[functools._lru_cache_wrapper[object]]:
    """The search for kernels, anew and with an empty cache folder."""
    monkeypatch.setenv("TRANSLOAD_CACHE", str(tmp_path))
    library._attempt.cache_clear()
    yield library._attempt
    library._attempt.cache_clear()


def fake_compiler(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in library.COMPILERS:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.usefixtures("attempt")
def test_without_a_compiler_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert load() is None
    assert "no C compiler" in library.explanation()
    stepper = stepper_of(oracle_of("smollm2"))
    assert stepper.executor._native is None
    assert len(stepper.generate(stepper.add(prompt_of(5)), 3)) == 3


@pytest.mark.usefixtures("attempt")
def test_the_kernels_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.SWITCH, "0")
    assert load() is None
    assert "switched off" in library.explanation()


@pytest.mark.usefixtures("attempt")
def test_a_compiler_that_fails_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = tmp_path / "count"
    fake_compiler(tmp_path, f"echo x >> {count}; echo 'no such header' >&2; exit 1", monkeypatch)
    for _ in range(2):
        library._attempt.cache_clear()
        assert load() is None
        assert "no such header" in library.explanation()
    assert count.read_text() == "x\n"


@pytest.mark.usefixtures("attempt")
def test_a_build_that_cannot_be_loaded_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_compiler(tmp_path, 'while [ "$1" != "-o" ]; do shift; done; echo nonsense > "$2"', monkeypatch)
    assert load() is None


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("attempt")
def test_a_build_that_was_damaged_is_made_once_more(tmp_path: Path) -> None:
    assert load() is not None
    (built,) = (tmp_path / "native").glob("*.so")
    built.unlink()  # the mapped file stays as it is
    built.write_bytes(b"what a failing disk has left")
    library._attempt.cache_clear()
    assert load() is not None


@pytest.mark.usefixtures("attempt")
def test_a_compiler_that_has_failed_is_asked_again_a_day_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = tmp_path / "count"
    fake_compiler(tmp_path, f"echo x >> {count}; echo 'killed' >&2; exit 1", monkeypatch)
    assert load() is None
    (failure,) = (tmp_path / "native").glob("*.failed")
    os.utime(failure, (0, 0))
    library._attempt.cache_clear()
    assert load() is None
    assert count.read_text() == "x\nx\n"


@needs_compiler
def test_what_the_compiler_says_is_passed_on(tmp_path: Path) -> None:
    assert COMPILER is not None
    with pytest.raises(MachineError, match="cannot compile the kernels"):
        build(COMPILER, ("--no-such-flag",), tmp_path / "kernels.so")


@needs_compiler
def test_kernels_that_know_other_structs_than_python_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load() is not None
    monkeypatch.setitem(TWINS, "ring", LinearStruct)
    monkeypatch.setattr(library, "_attempt", library._attempt.__wrapped__)
    assert load() is None
    assert "struct ring" in library.explanation()
