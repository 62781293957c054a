"""A step cut at its feed-forwards through the kernels: the bits of a whole step, wherever they are computed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.model.stepping import Stepper, arch_of, stepper_of, tensors_of
from tests.model.test_llama import oracle_logits, oracle_of, prompt_of
from tests.model.test_native import needs_compiler
from tests.model.test_remote_driver import Rig, serve
from tests.model.tiny_models import tiny_model
from transload.control.ffn_messages import Piece
from transload.model.build import build_feed_forwards
from transload.model.layer_driver import LocalDriver
from transload.model.llama import FeedForward, FeedForwardLayer, FfnCall
from transload.model.native.feed_forward import NativeFeedForwards
from transload.model.native.packed import fits

pytestmark = needs_compiler
CPU = torch.device("cpu")


class Aside(LocalDriver):
    """Computes feed-forwards in this process, but not with the model's attention side."""

    def __init__(self, feed_forwards: list[FeedForwardLayer], num_micro_batches: int = 1) -> None:
        super().__init__(())
        self.num_micro_batches = num_micro_batches
        functions = {(layer, Piece(0)): one for layer, one in enumerate(feed_forwards)}
        native = NativeFeedForwards.of(functions, threads=2)
        assert native is not None
        self._functions = native.functions()

    def answer(self, call: FfnCall) -> torch.Tensor:
        return self._functions[call.layer, Piece(0)](call.hidden)


def apart(name: str, dtype: torch.dtype, num_micro_batches: int = 1, threads: int = 1) -> Stepper:
    oracle = oracle_of(name, dtype)
    arch = arch_of(oracle)
    made = stepper_of(oracle, dtype=dtype, threads=threads)
    tensors = {key: tensor for key, tensor in tensors_of(oracle, arch).items() if ".mlp." in key}
    made.executor.use_driver(Aside(build_feed_forwards(arch, tensors, dtype, False, CPU), num_micro_batches))
    assert made.executor._attention is not None
    return made


def logits_of(stepper: Stepper) -> torch.Tensor:
    """Of prompts in chunks beside single tokens, then of tokens alone; one step draws for some of its rows only."""
    batch = [stepper.add(prompt_of(length)) for length in (5, 40, 150)]
    found = []
    for work in (
        [(batch[0], None), (batch[1], 30), (batch[2], 100)],
        [(batch[0], 1), (batch[1], None), (batch[2], 20)],
        [(batch[0], 1), (batch[1], 1), (batch[2], None)],
        [(running, 1) for running in batch],
    ):
        stepper.step(*work)
        found.append(stepper.logits.clone())
    return torch.cat(found)


@pytest.mark.parametrize("name", ["smollm2", "qwen3", "mistral-window-of-three", "llama-biases"])
def test_in_float32_a_step_that_is_cut_has_the_bits_of_one_that_is_not(name: str) -> None:
    whole = stepper_of(oracle_of(name, torch.float32))
    assert whole.executor._native is not None
    assert torch.equal(logits_of(apart(name, torch.float32, threads=2)), logits_of(whole))


def test_in_bfloat16_the_logits_are_about_those_of_transformers() -> None:
    oracle = oracle_of("smollm2", torch.bfloat16)
    exact = copy.deepcopy(oracle).float()
    stepper = apart("smollm2", torch.bfloat16)
    ours, theirs = [], []
    for length in (1, 37, 90):
        running = stepper.add(prompt_of(length))
        stepper.generate(running, 3)
        want = oracle_logits(exact, running.tokens[:-1])
        ours.append(stepper.logits[0] - want)
        theirs.append(oracle_logits(oracle, running.tokens[:-1]) - want)
    assert torch.stack(ours).square().mean() <= 2 * torch.stack(theirs).square().mean() + 1e-7


@pytest.mark.parametrize("num_micro_batches", [2, 4])
def test_micro_batches_change_no_token(num_micro_batches: int) -> None:
    def tokens(stepper: Stepper) -> list[list[int]]:
        batch = [stepper.add(prompt_of(length)) for length in (5, 40, 150, 3, 17)]
        for _ in range(8):
            stepper.step(*((running, 32) for running in batch))
        return [running.outputs for running in batch]

    assert tokens(apart("smollm2", torch.float32, num_micro_batches)) == tokens(apart("smollm2", torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_several_callers_have_the_bits_that_they_have_alone(dtype: torch.dtype) -> None:
    oracle = oracle_of("smollm2", dtype)
    arch = arch_of(oracle)
    tensors = {key: tensor for key, tensor in tensors_of(oracle, arch).items() if ".mlp." in key}
    one = build_feed_forwards(arch, tensors, dtype, False, CPU)[0]
    assert isinstance(one, FeedForward)
    native = NativeFeedForwards.of({(0, Piece(0)): one}, threads=2)
    assert native is not None
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randn(count, arch.hidden_size, generator=generator).to(dtype) for count in (1, 7, 60)]
    alone = [native.functions()[0, Piece(0)](part) for part in parts]
    together = [torch.empty_like(part) for part in parts]
    native.compute(
        (0, Piece(0)), [(part.data_ptr(), len(part), out.data_ptr()) for part, out in zip(parts, together, strict=True)]
    )
    for got, want, part in zip(together, alone, parts, strict=True):
        assert torch.equal(got, want)
        by_torch = one(part).float()
        assert (got.float() - by_torch).norm() <= 0.02 * by_torch.norm()


@pytest.fixture
def rig() -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(num_workers: int) -> Rig:
        rigs.append(Rig(num_workers, deterministic=False))
        return rigs[-1]

    yield make
    for made in rigs:
        made.close()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_over_links_too(rig: Callable[..., Rig], transport: str) -> None:
    oracle = tiny_model("llama-biases")
    whole, split = (stepper_of(oracle) for _ in range(2))
    driver = rig(2).driver(micro_batches=2, transport=transport)
    split.executor.use_driver(driver)
    assert split.executor._attention is not None
    assert serve(split) == serve(whole)
    counts = driver.client.counts
    assert counts.calls == counts.requests > 0
    assert driver.counts.rows >= counts.requests
    assert sum(driver.hops.counts) <= counts.requests


def test_a_layer_that_does_not_fit_is_computed_by_torch() -> None:
    assert not fits(torch.zeros(7, 64), 0)
    functions = {(layer, Piece(0)): torch.nn.functional.relu for layer in (0, 1)}
    assert NativeFeedForwards.of(functions, 1) is None
