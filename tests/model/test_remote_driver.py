"""Feed-forwards computed by other workers, in threads of this process: the same bits, whatever the split, the order of
the answers and the faults."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from tests.model.stepping import Running, Stepper, arch_of, tensors_of
from tests.model.tiny_models import tiny_model
from transload.arch import ModelArch
from transload.control.ffn_client import FfnClientConfig
from transload.control.ffn_messages import Fallback, Piece, SessionId, Split
from transload.control.messages import WorkerId
from transload.errors import WorkerLost
from transload.model.build import Tensors, build_feed_forwards, column_part
from transload.model.ffn_pieces import Cutter, PieceFunctions
from transload.model.ffn_side import FfnSide
from transload.model.layer_driver import cut
from transload.model.llama import FeedForwardLayer
from transload.model.remote_driver import RemoteDriver
from transload.runtime.ffn_service import FfnService
from transload.transfer.ffn_link import ArrivedCall, SlotSizes
from transload.transfer.ffn_meeting import FfnWeights, Party

SECRET = b"a secret of a test"
ORACLE = tiny_model("llama-biases")
ARCH = arch_of(ORACLE)
CPU = torch.device("cpu")
MAX_ROWS = 256


def build_part(part: int, num_parts: int, *, deterministic: bool) -> list[FeedForwardLayer]:
    arch: ModelArch = ARCH
    tensors: Tensors = {name: tensor for name, tensor in tensors_of(ORACLE, ARCH).items() if ".mlp." in name}
    if num_parts > 1:
        arch, tensors = column_part(arch, tensors, part, num_parts)
    return build_feed_forwards(arch, tensors, torch.float32, deterministic, CPU)


class SlowSide(FfnSide):
    """Takes a while, and not always the same one."""

    pause_seconds = 0.0
    random = random.Random(0)

    def compute(self, layer: int, calls: Sequence[ArrivedCall], targets: Sequence[memoryview]) -> list[int]:
        if self.pause_seconds:
            time.sleep(self.random.uniform(0.0, self.pause_seconds))
        return super().compute(layer, calls, targets)


class Rig:
    """FFN workers, and a driver that calls them."""

    arch = ARCH

    def __init__(self, num_workers: int = 1, *, split: Split = "replica", deterministic: bool = True) -> None:
        self.split: Split = split
        self.weights = FfnWeights(
            weights="tiny",
            num_layers=self.arch.num_layers,
            hidden_size=self.arch.hidden_size,
            dtype="float32",
            deterministic=deterministic,
        )
        self.num_workers = num_workers
        self.num_parts = num_workers if split == "column" else 1
        self.deterministic = deterministic
        self.loaded: list[Piece] = []
        self.services = [self.start(number) for number in range(num_workers)]
        self.drivers: list[RemoteDriver] = []

    def start(self, number: int, incarnation: int = 1) -> FfnService:
        pieces = self.pieces(number)
        side = SlowSide(self.load(pieces), self.weights, pieces, torch.float32, CPU)
        me = Party(worker=WorkerId(f"ffn-{number}"), incarnation=incarnation, secret=SECRET)
        service = FfnService(me, side, max_wait_seconds=1e-3, max_rows=MAX_ROWS, spin_seconds=1e-4)
        service.start()
        return service

    def pieces(self, number: int) -> frozenset[Piece]:
        """Of a worker."""
        return frozenset({Piece(number if self.split == "column" else 0)})

    def driver(
        self,
        *,
        micro_batches: int = 2,
        transport: str = "shm",
        fallback: Fallback = "error",
        timeout_seconds: float = 5.0,
        deadline_seconds: float = 20.0,
    ) -> RemoteDriver:
        up = threading.Semaphore(0)
        row_bytes = self.arch.hidden_size * 4
        slots = self.arch.experts.per_token if self.arch.experts is not None else 1
        number = len(self.drivers)
        driver = RemoteDriver(
            weights=self.weights,
            dtype=torch.float32,
            device=CPU,
            cutter=Cutter(self.arch, self.split, self.num_parts),
            num_micro_batches=micro_batches,
            sizes=SlotSizes(
                num_slots=micro_batches + 2,
                call_bytes=MAX_ROWS * (row_bytes + 4 * slots),
                answer_bytes=MAX_ROWS * slots * row_bytes,
            ),
            client=FfnClientConfig(
                session=SessionId(number + 1),
                fallback=fallback,
                timeout_seconds=timeout_seconds,
                deadline_seconds=deadline_seconds,
            ),
            me=Party(worker=WorkerId(f"decode-{number}"), incarnation=1, secret=SECRET),
            load_pieces=self._reload,
            report=lambda _worker, _transport, problem: None if problem else up.release(),
            spin_seconds=1e-4,
        )
        self.drivers.append(driver)
        for service in self.services:
            driver.connect(service.address, transport)
        for _ in self.services:
            assert up.acquire(timeout=20)
        return driver

    def load(self, pieces: frozenset[Piece]) -> PieceFunctions:
        return {
            (layer, piece): function
            for piece in pieces
            for layer, function in enumerate(build_part(int(piece), self.num_parts, deterministic=self.deterministic))
        }

    def _reload(self, pieces: frozenset[Piece]) -> PieceFunctions:
        assert any(driver.is_loading for driver in self.drivers)
        self.loaded += sorted(pieces)
        return self.load(pieces)

    def close(self) -> None:
        for driver in self.drivers:
            driver.close()
        for service in self.services:
            service.close()


@pytest.fixture
def rig() -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(*args: int, **options: object) -> Rig:
        rigs.append(Rig(*args, **options))  # type: ignore[arg-type]
        return rigs[-1]

    yield make
    for one in rigs:
        one.close()


@pytest.fixture(autouse=True)
def _no_pause() -> Iterator[None]:
    yield
    SlowSide.pause_seconds = 0.0


def stepper(driver: RemoteDriver | None = None, *, deterministic: bool = True) -> Stepper:
    made = Stepper(ARCH, tensors_of(ORACLE, ARCH), deterministic=deterministic)
    if driver is not None:
        made.executor.use_driver(driver)
    return made


def serve(of: Stepper, num_steps: int = 12) -> list[list[int]]:
    """Ragged prompts, in chunks beside running requests; some steps have fewer requests than micro-batches."""
    source = random.Random(1)
    prompts = [[source.randrange(ARCH.vocab_size) for _ in range(length)] for length in (1, 40, 7, 100, 3)]
    running: list[Running] = []
    for number in range(num_steps):
        if number % 2 == 0 and prompts:
            running.append(of.add(prompts.pop()))
        of.step(*((one, 16) for one in running))
    return [one.outputs for one in running]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return serve(stepper())


@pytest.mark.parametrize(
    ("num_workers", "micro_batches", "transport"),
    [(1, 1, "shm"), (1, 2, "shm"), (2, 3, "shm"), (3, 4, "shm"), (1, 2, "tcp"), (2, 4, "tcp")],
)
def test_the_tokens_are_those_of_a_model_in_one_place(
    rig: Callable[..., Rig], expected: list[list[int]], num_workers: int, micro_batches: int, transport: str
) -> None:
    SlowSide.pause_seconds = 0.002
    there = rig(num_workers)
    driver = there.driver(micro_batches=micro_batches, transport=transport)
    assert serve(stepper(driver)) == expected
    counts = driver.client.counts
    assert counts.calls == counts.requests > 0
    assert counts.computed_here == counts.retries == counts.unknown == 0
    if num_workers > 1 and micro_batches > 1:
        assert all(service.served.requests > 0 for service in there.services)


def test_attention_workers_that_share_an_ffn_worker_get_their_own_answers(
    rig: Callable[..., Rig], expected: list[list[int]]
) -> None:
    there = rig(1)
    steppers = [stepper(there.driver(micro_batches=count)) for count in (1, 2, 4)]
    found: dict[int, list[list[int]]] = {}
    threads = [
        threading.Thread(target=lambda place=place, one=one: found.__setitem__(place, serve(one)))
        for place, one in enumerate(steppers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[place] for place in range(3)] == [expected] * 3


def test_column_parts_add_up_to_the_whole(rig: Callable[..., Rig]) -> None:
    driver = rig(3, split="column", deterministic=False).driver()
    split, whole = stepper(driver, deterministic=False), stepper(deterministic=False)
    for one in (split, whole):
        running = one.add(range(30))
        one.prefill(running)
    torch.testing.assert_close(split.logits, whole.logits, rtol=1e-4, atol=1e-3)
    assert driver.client.counts.requests == 3 * driver.client.counts.calls


def test_a_worker_that_goes_in_the_middle_leaves_its_calls_to_the_other(
    rig: Callable[..., Rig], expected: list[list[int]]
) -> None:
    SlowSide.pause_seconds = 0.01
    there = rig(2)
    driver = there.driver()
    timer = threading.Timer(0.05, there.services[0].close)
    timer.start()
    assert serve(stepper(driver)) == expected
    timer.join()
    assert driver.client.counts.lost_workers >= 1
    assert driver.client.counts.computed_here == 0


def test_without_a_worker_the_weights_are_loaded_and_let_go_when_one_is_back(
    rig: Callable[..., Rig], expected: list[list[int]]
) -> None:
    SlowSide.pause_seconds = 0.01
    there = rig(1)
    driver = there.driver(fallback="local", timeout_seconds=0.2)
    threading.Timer(0.05, there.services[0].close).start()
    threading.Timer(0.06, driver.disconnect, [WorkerId("ffn-0")]).start()
    one = stepper(driver)
    assert serve(one) == expected
    assert there.loaded == [Piece(0)]
    assert driver.holds_weights
    there.services.append(there.start(0, incarnation=2))
    driver.connect(there.services[1].address, "shm")
    deadline = time.monotonic() + 20
    while driver.holds_weights:
        assert time.monotonic() < deadline
        serve(one, num_steps=1)
    assert there.services[1].served.requests > 0


def test_without_a_worker_and_a_fallback_the_step_fails_by_name_and_the_next_one_runs(
    rig: Callable[..., Rig], expected: list[list[int]]
) -> None:
    there = rig(1)
    driver = there.driver(deadline_seconds=0.3, timeout_seconds=0.1)
    there.services[0].close()
    driver.disconnect(WorkerId("ffn-0"))
    with pytest.raises(WorkerLost, match=r"no FFN worker has answered for 0.3 s in layer 0.*no fallback"):
        serve(stepper(driver))
    there.services.append(there.start(0, incarnation=2))
    driver.connect(there.services[1].address, "shm")
    assert serve(stepper(driver)) == expected


def test_a_stalled_worker_is_asked_elsewhere_and_its_late_answers_do_no_harm(
    rig: Callable[..., Rig], expected: list[list[int]]
) -> None:
    there = rig(2)
    stalled = there.services[0]
    held = threading.Event()
    compute = stalled._compute.compute

    def stall(layer: int, calls: Sequence[ArrivedCall], targets: Sequence[memoryview]) -> list[int]:
        if stalled.served.batches == 3:
            held.wait(0.4)
        return compute(layer, calls, targets)

    stalled._compute.compute = stall  # type: ignore[method-assign]
    driver = there.driver(timeout_seconds=0.05)
    assert serve(stepper(driver)) == expected
    assert driver.client.counts.retries >= 1


def test_what_an_ffn_worker_cannot_compute_fails_by_name(rig: Callable[..., Rig]) -> None:
    there = rig(1)

    def fail(*_: object) -> list[int]:
        raise MemoryError("no more")

    there.services[0]._compute.compute = fail  # type: ignore[method-assign,assignment]
    with pytest.raises(WorkerLost, match="no FFN worker could compute layer 0"):
        serve(stepper(there.driver()))


def test_a_step_is_cut_into_parts_of_about_equal_work() -> None:
    one = stepper()
    chunks = [one.chunk(one.add(range(length))) for length in (50, 3, 4, 40, 2)]
    parts = cut(chunks, 2)
    assert sorted(chunk.request.id for part in parts for chunk in part) == [1, 2, 3, 4, 5]
    assert [[chunk.num_tokens for chunk in part] for part in parts] == [[50], [3, 4, 40, 2]]
    assert cut(chunks[:1], 4) == [chunks[:1]]
    assert [len(part) for part in cut(chunks, 9)] == [1] * 5
