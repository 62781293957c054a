"""A step that never returns: its worker says so and goes, and its requests are computed by the next."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable
from typing import Any, cast

import msgspec
import pytest

from transload.control.controller import ControllerConfig
from transload.control.messages import Request, RequestId, RunStep, Sampled, Sampling, StepDone
from transload.control.step_watch import StepWatch
from transload.deploy.machine import read_machine
from transload.deploy.placement import place
from transload.deploy.plan import WorkerPlan
from transload.deploy.resolve import resolve
from transload.model.source import locate
from transload.runtime import worker as worker_module
from transload.runtime.base import Finished, ServedModel
from transload.runtime.processes import JOIN_TOKEN
from transload.runtime.real import RealRuntime
from transload.runtime.remote import RemoteWorker
from transload.runtime.worker import WorkerProcess
from transload.transfer.layout import KvLayout
from transload.transfer.memory import KvMemory

LAYOUT = KvLayout(model="none", num_layers=2, num_kv_heads=1, head_dim=8, block_size=16, dtype="float32")
NUM_BLOCKS = 8
TOKEN = "a token of this test"
WAIT_SECONDS = 60.0  # only to end a test that has failed


class Counting:
    """An executor whose n-th token is n, and that may stop for good in the middle of a step."""

    layout = LAYOUT
    num_blocks = NUM_BLOCKS

    def __init__(self, hangs_at: int | None, end: threading.Event) -> None:
        self._hangs_at = hangs_at
        self._end = end

    def run_step(self, step: RunStep, _layers_ready: Callable[[int, int], None]) -> StepDone:
        if step.step == self._hangs_at:
            self._end.wait(WAIT_SECONDS)
        drawn = [Sampled(chunk.request.id, chunk.num_outputs) for chunk in step.chunks if chunk.samples]
        return StepDone(step.step, tuple(drawn), 0.001)


class NoFeedForwards:
    """Nobody is called. `is_loading`: whether the step that hangs does so because weights do not come."""

    def __init__(self, is_loading: bool) -> None:
        self.is_loading = is_loading

    def counts(self) -> dict[str, float]:
        return {}

    def hops(self) -> tuple[()]:
        return ()

    def loads(self) -> tuple[()]:
        return ()


async def play(
    monkeypatch: pytest.MonkeyPatch, *, is_loading: bool = False, num_restarts: int = 1
) -> tuple[str, list[int], Finished]:
    """Why the first worker ended, and what the caller got. `num_restarts`: when the second one comes."""
    end = threading.Event()
    deployment = resolve(None, "1agg", [])
    arch = locate(deployment.model).arch
    placement = place(deployment, read_machine(), arch)
    plans = tuple(msgspec.structs.replace(plan, starts_here=False, cores=()) for plan in placement.workers)
    model = ServedModel(
        name="none", arch=arch, dtype="float32", max_context=100, layout_digest=LAYOUT.digest, block_size=16
    )
    monkeypatch.setenv(JOIN_TOKEN, TOKEN)
    monkeypatch.setattr(worker_module, "ALIVE_SECONDS", 0.05)
    monkeypatch.setattr(worker_module, "StepWatch", lambda: StepWatch(least_limit_seconds=0.5, first_limit_seconds=0.5))
    config = ControllerConfig(first_restart_seconds=1000.0)  # but who starts a worker by hand need not wait
    runtime = RealRuntime(model, msgspec.structs.replace(placement, workers=plans), config)

    def worker(hangs_at: int | None) -> asyncio.Task[str]:
        def build(_plan: WorkerPlan) -> Any:
            hangs = hangs_at is not None
            return Counting(hangs_at, end), KvMemory(LAYOUT, NUM_BLOCKS), NoFeedForwards(hangs and is_loading)

        host, port = runtime.join_address
        process = WorkerProcess(f"{host}:{port}", plans[0].name, TOKEN, build, cast(Any, None))
        return asyncio.create_task(process.run())

    workers: list[asyncio.Task[str]] = []
    try:
        await runtime.start(listening=lambda: workers.append(worker(hangs_at=4)))
        stream = await runtime.submit(
            Request(RequestId(1), 3, 10, Sampling(temperature=0.0, ignore_eos=True), (1, 2, 3))
        )
        reason = await workers[0]
        while runtime.num_restarts < num_restarts:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        workers.append(worker(hangs_at=None))
        tokens: list[int] = []
        async for came in stream:
            if isinstance(came, Finished):
                return reason, tokens, came
            tokens += [number for token in came for number in (token.token, *token.more)]
        raise AssertionError("the stream has no end")
    finally:
        end.set()
        await runtime.close()
        await asyncio.gather(*workers, return_exceptions=True)


@pytest.mark.parametrize(("is_loading", "what"), [(False, "has not returned"), (True, "has been loading weights")])
def test_a_worker_whose_step_hangs_is_replaced_and_the_text_goes_on(
    is_loading: bool, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def limited() -> tuple[str, list[int], Finished]:
        async with asyncio.timeout(WAIT_SECONDS):
            return await play(monkeypatch, is_loading=is_loading)

    reason, tokens, finished = asyncio.run(limited())
    assert f"step 4 of 1 requests {what}" in reason
    assert tokens == list(range(10))
    assert (finished.reason, finished.num_prompt_tokens, finished.num_outputs) == ("length", 3, 10)


def test_a_process_that_cannot_be_started_now_is_started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    start, refusals = RemoteWorker.start, [OSError(errno.ENOMEM, "no memory for a process")] * 2

    async def refused_at_first(self: RemoteWorker, join: tuple[str, int]) -> None:
        if self.incarnation > 1 and refusals:
            raise refusals.pop()
        await start(self, join)

    async def limited() -> tuple[str, list[int], Finished]:
        async with asyncio.timeout(WAIT_SECONDS):
            return await play(monkeypatch, num_restarts=3)

    monkeypatch.setattr(RemoteWorker, "start", refused_at_first)
    _, tokens, _ = asyncio.run(limited())
    assert tokens == list(range(10))
