"""A mixture's experts on several workers, in threads of this process: the bits of a model in one place, whoever has
which expert, whoever is lost."""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.model.stepping import Running, Stepper, arch_of, tensors_of
from tests.model.test_remote_driver import CPU, Rig, SlowSide
from tests.model.tiny_models import tiny_model
from transload.control.ffn_messages import CallKey, FfnRequest, Piece, SessionId, Split
from transload.control.messages import WorkerId
from transload.deploy.plan import FfnShare
from transload.errors import WorkerLost
from transload.model.ffn_pieces import PieceFunctions, build_pieces, pieces_of
from transload.model.ffn_side import FfnSide
from transload.model.inventory import is_feed_forward
from transload.model.remote_driver import RemoteDriver
from transload.transfer.ffn_link import ArrivedCall, CallFrame
from transload.transfer.ffn_meeting import FfnWeights

FAMILIES = ["qwen3_moe", "qwen3_moe-partly", "mixtral", "gpt_oss"]


@functools.cache
def oracle_of(name: str) -> Any:
    oracle = tiny_model(name)
    for parameter in oracle.parameters():
        parameter.data *= 0.3
    return oracle


class ExpertRig(Rig):
    """FFN workers that share a mixture's experts."""

    def __init__(
        self, name: str, num_workers: int, *, split: Split = "expert", num_replicas: int = 0, deterministic: bool = True
    ) -> None:
        self.oracle = oracle_of(name)
        self.arch = arch_of(self.oracle)
        assert self.arch.experts is not None
        copies = self.arch.experts.num_experts * (num_workers - 1)
        self.num_replicas = copies if split == "replica" else num_replicas
        super().__init__(num_workers, split=split, deterministic=deterministic)

    def pieces(self, number: int) -> frozenset[Piece]:
        share = FfnShare(
            split=self.split,
            part=number,
            num_parts=self.num_workers,
            num_replicas=self.num_replicas,
            max_wait_seconds=0.0,
            max_rows=1,
        )
        return pieces_of(share, self.arch)

    def load(self, pieces: frozenset[Piece]) -> PieceFunctions:
        tensors = {name: t for name, t in tensors_of(self.oracle, self.arch).items() if is_feed_forward(name)}
        return build_pieces(self.arch, tensors, torch.float32, self.deterministic, CPU, pieces)

    def stepper(self, driver: RemoteDriver | None = None) -> Stepper:
        made = Stepper(self.arch, tensors_of(self.oracle, self.arch), deterministic=self.deterministic)
        if driver is not None:
            made.executor.use_driver(driver)
        return made


def serve(of: Stepper, num_steps: int = 10) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Ragged prompts in chunks beside running requests: outputs, and the logits of every step."""
    source = random.Random(1)
    prompts = [[source.randrange(320) for _ in range(length)] for length in (1, 40, 7, 70, 3)]
    running: list[Running] = []
    logits = []
    for number in range(num_steps):
        if number % 2 == 0 and prompts:
            running.append(of.add(prompts.pop()))
        of.step(*((one, 16) for one in running))
        logits.append(of.logits)
    return [one.outputs for one in running], logits


@functools.cache
def expected(name: str) -> tuple[list[list[int]], list[torch.Tensor]]:
    oracle = oracle_of(name)
    arch = arch_of(oracle)
    return serve(Stepper(arch, tensors_of(oracle, arch), deterministic=True))


def assert_as_in_one_place(name: str, got: tuple[list[list[int]], list[torch.Tensor]]) -> None:
    outputs, logits = expected(name)
    assert got[0] == outputs
    for ours, whole in zip(got[1], logits, strict=True):  # micro-batches change the order of rows, not their bits
        assert sorted(ours.tolist()) == sorted(whole.tolist())


@pytest.fixture
def rig() -> Iterator[Callable[..., ExpertRig]]:
    rigs: list[ExpertRig] = []

    def make(*args: Any, **options: Any) -> ExpertRig:
        rigs.append(ExpertRig(*args, **options))
        return rigs[-1]

    yield make
    SlowSide.pause_seconds = 0.0
    for one in rigs:
        one.close()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("num_workers", "how", "transport"),
    [
        (1, {}, "shm"),
        (2, {}, "shm"),
        (2, {"num_replicas": 1}, "tcp"),
        (3, {"split": "replica"}, "shm"),
    ],
)
def test_every_bit_is_that_of_a_model_in_one_place(
    rig: Callable[..., ExpertRig], name: str, num_workers: int, how: dict[str, Any], transport: str
) -> None:
    SlowSide.pause_seconds = 0.001
    there = rig(name, num_workers, **how)
    driver = there.driver(transport=transport)
    assert_as_in_one_place(name, serve(there.stepper(driver)))
    counts = driver.client.counts
    assert counts.computed_here == counts.retries == counts.unknown == 0
    assert all(service.served.rows > 0 for service in there.services)


def test_attention_workers_share_experts(rig: Callable[..., ExpertRig]) -> None:
    there = rig("qwen3_moe", 2)
    steppers = [there.stepper(there.driver(micro_batches=count)) for count in (1, 3)]
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda place=place, one=one: found.__setitem__(place, serve(one)))
        for place, one in enumerate(steppers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place in range(2):
        assert found[place][0] == expected("qwen3_moe")[0]


def test_an_expert_on_two_workers_is_computed_by_both(rig: Callable[..., ExpertRig]) -> None:
    there = rig("mixtral", 2, num_replicas=4)  # everything twice
    driver = there.driver(micro_batches=2)
    assert_as_in_one_place("mixtral", serve(there.stepper(driver)))
    shares = [service.served.rows for service in there.services]
    assert min(shares) > sum(shares) / 4


def test_when_the_owner_of_an_expert_dies_its_copy_takes_over(rig: Callable[..., ExpertRig]) -> None:
    SlowSide.pause_seconds = 0.01
    there = rig("qwen3_moe", 2, split="replica")
    driver = there.driver()
    threading.Timer(0.05, there.services[0].close).start()
    assert_as_in_one_place("qwen3_moe", serve(there.stepper(driver)))
    assert driver.client.counts.lost_workers == 1
    assert driver.client.counts.computed_here == 0


@pytest.mark.parametrize("num_replicas", [0, 2])
def test_without_a_copy_the_lost_experts_alone_are_loaded_until_their_worker_is_back(
    rig: Callable[..., ExpertRig], num_replicas: int
) -> None:
    SlowSide.pause_seconds = 0.01
    there = rig("qwen3_moe-partly", 2, num_replicas=num_replicas)
    driver = there.driver(fallback="local", timeout_seconds=0.2)
    threading.Timer(0.05, there.services[0].close).start()
    threading.Timer(0.06, driver.disconnect, [WorkerId("ffn-0")]).start()
    one = there.stepper(driver)
    assert_as_in_one_place("qwen3_moe-partly", serve(one))
    assert set(there.loaded) == there.pieces(0) - there.pieces(1)
    assert len(there.loaded) == len(set(there.loaded)) == 3 - num_replicas // 2  # six experts in its one mixture
    assert driver.holds_weights
    there.services.append(there.start(0, incarnation=2))
    driver.connect(there.services[-1].address, "shm")
    deadline = time.monotonic() + 20
    while driver.holds_weights:
        assert time.monotonic() < deadline
        serve(one, num_steps=1)


def test_without_a_fallback_a_lost_expert_fails_the_step_by_name(rig: Callable[..., ExpertRig]) -> None:
    there = rig("mixtral", 2)
    driver = there.driver(deadline_seconds=0.4, timeout_seconds=0.1)
    there.services[0].close()
    driver.disconnect(WorkerId("ffn-0"))
    with pytest.raises(WorkerLost, match="no fallback"):
        serve(there.stepper(driver))


# ---------------------------------------------------------------------------------------------------------------------
# What an FFN worker is sent


def side() -> FfnSide:
    rig = ExpertRig.__new__(ExpertRig)
    rig.oracle = oracle_of("mixtral")
    rig.arch, rig.deterministic = arch_of(rig.oracle), False
    rig.split, rig.num_workers, rig.num_replicas = "expert", 2, 0
    pieces = rig.pieces(0)
    weights = FfnWeights(weights="w", num_layers=2, hidden_size=64, dtype="float32", deterministic=False)
    return FfnSide(rig.load(pieces), weights, pieces, torch.float32, CPU)


def call(pieces: tuple[tuple[int, int], ...], num_rows: int, index: list[int], layer: int = 0) -> ArrivedCall:
    request = FfnRequest(CallKey(SessionId(1), 1, layer, 0, 1), tuple((Piece(piece), count) for piece, count in pieces))
    raw = torch.randn(num_rows, 64).numpy().tobytes() + torch.tensor(index, dtype=torch.int32).numpy().tobytes()
    return ArrivedCall(0, CallFrame(request, num_rows), memoryview(bytearray(raw)))


def test_calls_that_do_not_fit_are_answered_with_the_reason() -> None:
    here = side()
    mine = min(here.pieces)
    theirs = next(piece for piece in range(4) if piece not in here.pieces)
    good = call(((mine, 3),), 2, [0, 1, 0])
    assert here.problem(good, 3 * 256) is None
    assert "room for 767" in str(here.problem(good, 767))
    assert "not here" in str(here.problem(call(((theirs, 1),), 1, [0]), 1 << 20))
    assert "not here" in str(here.problem(call(((mine, 1),), 1, [0], layer=1), 1 << 20))  # that layer's is another
    assert "among the 2" in str(here.problem(call(((mine, 2),), 2, [0, 2]), 1 << 20))
    assert "among the 2" in str(here.problem(call(((mine, 2),), 2, [0, -1]), 1 << 20))
    assert "bytes for 3 of 2 rows" in str(here.problem(call(((mine, 3),), 2, [0, 1]), 1 << 20))
