"""One workload on real processes and in virtual time: the same protocol events in the same order.

The order that the protocol promises is that of each channel: from one machine to another. Between two channels it is a
matter of timing, and so are renewals, timers, loads and measurements, which are left out.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from transload.control.controller import ControllerConfig
from transload.control.messages import Finish, Message, Reject, Request, RequestId, Sampling, Stream, WorkerId
from transload.control.prefix import prompt_keys
from transload.deploy.machine import read_machine
from transload.deploy.overrides import parse_override
from transload.deploy.placement import place
from transload.deploy.plan import Placement
from transload.deploy.resolve import resolve
from transload.model.source import locate
from transload.runtime.base import Finished, ServedModel
from transload.runtime.cluster import VirtualWorker
from transload.runtime.cost import LinearCost
from transload.runtime.event_log import read_event_log
from transload.runtime.real import RealRuntime
from transload.runtime.virtual import VirtualRuntime
from transload.runtime.worker import engine_config
from transload.transfer.layout import KvLayout, kv_layout

pytestmark = pytest.mark.slow
OVERRIDES = ("router.local_prefill=fallback", "model.dtype=float32", "pools.prefill.limits.step_tokens=64")
TIMING = {"Load", "CacheChanged", "TimerFired", "LinkMeasured", "PeerUp", "PeerLost", "WorkerJoined", "WorkerGone"}
Labels = dict[tuple[str, str, object], list[str]]


def workload(layout: KvLayout) -> list[Request]:
    """A short prompt, one of several chunks, its repetition (cached), one that ends with its first token."""
    prompts = [list(range(100, 110)), list(range(1000, 1150)), list(range(1000, 1150)), list(range(5, 45))]
    outputs = [8, 20, 5, 1]
    return [
        Request(
            RequestId(number),
            len(prompt),
            num_outputs,
            Sampling(temperature=0.0, ignore_eos=True),
            tuple(prompt),
            prompt_keys(layout.digest, prompt, layout.block_size),
        )
        for number, (prompt, num_outputs) in enumerate(zip(prompts, outputs, strict=True), start=1)
    ]


class Setup:
    """The deployment both runtimes run."""

    def __init__(self, topology: str) -> None:
        overrides = [item for item in OVERRIDES if topology == "1p1d" or "prefill.limits" not in item]
        self.deployment = resolve(None, topology, [parse_override(item) for item in overrides])
        files = locate(self.deployment.model)
        self.placement: Placement = place(self.deployment, read_machine(), files.arch)
        plan = self.placement.workers[0]
        self.layout = kv_layout(files.arch, files.identity, plan.block_size, plan.dtype)
        self.config = ControllerConfig(local_prefill="fallback")
        self.model = ServedModel(
            name="model",
            arch=files.arch,
            dtype=plan.dtype,
            max_context=self.placement.max_context,
            layout_digest=self.layout.digest,
            block_size=plan.block_size,
        )


class Labeller:
    """Collects events as labels, by machine, channel and request."""

    def __init__(self) -> None:
        self.labels: Labels = defaultdict(list)

    def add(self, who: str, name: str, fields: dict[str, Any]) -> None:
        if name in TIMING:
            return
        if name == "PeerFrame":
            frame = fields["frame"]
            kind, transfer_fields = frame[0], frame[3:]
            if kind not in ("KvRenew", "KvCredit"):
                known = [*transfer_fields[:-2], transfer_fields[-1]] if kind == "KvData" else []  # not the checksum
                self.labels[who, f"from {fields['peer']}", None].append(f"{kind} {known}")
            return
        if name in ("StepDone", "LayersReady"):
            self.labels[who, "executor", None].append(f"{name} {fields.get('layer_lo')} {fields.get('layer_hi')}")
            return
        if name == "SendsDrained":
            self.labels[who, "links", None].append(name)
            return
        channel = f"from {fields['worker']}" if "worker" in fields else "assignments"
        for request, detail in self._requests(name, fields):
            self.labels[who, channel, request].append(f"{name} {detail}")

    @staticmethod
    def _requests(name: str, fields: dict[str, Any]) -> list[tuple[object, object]]:
        if name == "Emitted":
            return [(token[1], (token[3], token[5])) for token in fields["tokens"]]  # index, finish
        request = fields["request"]
        number = request[1] if isinstance(request, list) else request
        details = {
            key: fields[key] for key in ("epoch", "num_cached_tokens", "num_bytes", "num_frames") if key in fields
        }
        return [(number, details)]


async def play_real(setup: Setup, folder: Path, *, at_once: bool) -> None:
    runtime = RealRuntime(setup.model, setup.placement, setup.config, event_log=folder)
    try:
        await runtime.start()

        async def ask(request: Request) -> None:
            last: object = None
            async for item in await runtime.submit(request):
                last = item
            assert isinstance(last, Finished)
            assert last.reason == "length"

        if at_once:
            await asyncio.gather(*(ask(request) for request in workload(setup.layout)))
        else:
            for request in workload(setup.layout):
                await ask(request)
        await asyncio.sleep(0.3)  # the last words after the last token
    finally:
        await runtime.close()


def run_real(setup: Setup, folder: Path, *, at_once: bool) -> Labels:
    asyncio.run(play_real(setup, folder, at_once=at_once))
    labeller = Labeller()
    for path in sorted(folder.iterdir()):
        who = path.name.split(".")[0]
        for event in read_event_log(path):
            labeller.add(who, event["event"], event)
    return labeller.labels


class Silent:
    """A sink that only notes the ends."""

    def __init__(self) -> None:
        self.ended: list[RequestId] = []

    def stream(self, command: Stream, times: Sequence[float]) -> None:
        pass

    def finish(self, command: Finish, now: float) -> None:
        self.ended.append(command.request)

    def reject(self, command: Reject, now: float) -> None:
        raise AssertionError(command)


def run_virtual(setup: Setup, *, at_once: bool) -> Labels:
    labeller = Labeller()

    def observe(now: float, who: WorkerId, event: Message) -> None:
        fields = msgspec.json.decode(msgspec.json.encode(msgspec.structs.asdict(event)))
        labeller.add(who, type(event).__name__, fields)

    workers = [
        VirtualWorker(
            engine=engine_config(plan, setup.layout, plan.num_blocks, 1),
            pool=plan.pool,
            role=plan.duty,
            layers_per_frame=plan.layers_per_frame or setup.layout.num_layers,
            in_place="direct" in plan.transports.values(),
        )
        for plan in setup.placement.workers
    ]
    sink = Silent()
    runtime = VirtualRuntime(setup.config, workers, LinearCost(), sink, observe=observe)
    for number, request in enumerate(workload(setup.layout)):
        runtime.submit(5.0 if at_once else 5.0 + 10.0 * number, request)
    runtime.run()
    assert len(sink.ended) == len(workload(setup.layout))
    return labeller.labels


def compare(real: Labels, virtual: Labels, keep: Callable[[tuple[str, str, object]], bool]) -> None:
    assert {key for key in real if keep(key)} == {key for key in virtual if keep(key)}
    for key in filter(keep, real):
        assert real[key] == virtual[key], key


@pytest.mark.parametrize("topology", ["1p1d", "1agg"])
def test_one_request_after_another_gives_the_same_events_everywhere(topology: str, tmp_path: Path) -> None:
    setup = Setup(topology)
    real = run_real(setup, tmp_path, at_once=False)
    compare(real, run_virtual(setup, at_once=False), lambda key: True)


def test_requests_at_once_give_the_same_events_for_each_request(tmp_path: Path) -> None:
    setup = Setup("1p1d")
    real = run_real(setup, tmp_path, at_once=True)
    compare(real, run_virtual(setup, at_once=True), lambda key: key[2] is not None)
