"""Schedules of faults drawn from a seed: a small cluster, its load, and everything that goes wrong there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from random import Random
from typing import Any, Literal

import msgspec

from tests.world import Check, World, expected_end
from transload.control.controller import ControllerConfig
from transload.control.messages import (
    Chunk,
    Frame,
    HandoffFailed,
    KvData,
    Message,
    PeerFrame,
    Preempted,
    RequestFailed,
    RequestId,
    RunStep,
    TransferId,
    WorkerId,
)
from transload.control.router import LocalPrefill, Policy
from transload.runtime.cluster import faithful
from transload.runtime.flows import Port, Wire

HOUR = 3600.0
PATIENCE = 600.0
"""Deadline of a request that nobody is in a hurry for: reaching it means that something has hung."""
SMALL_SHARE = 0.75
"""Of the schedules: few requests, short ones, in little memory. Most mistakes show there, at a quarter of the price."""
FAULTS = ("drop", "repeat", "delay", "change")


class Struck:
    """How often each fault has hit something, and what. Only looks."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._sequences: dict[tuple[WorkerId, TransferId], int] = {}

    def watch(self, world: World, who: WorkerId, event: Message) -> None:
        """Before an event is handled."""
        if type(event) is PeerFrame and type(event.frame) is KvData:
            name, sequence = (who, event.frame.transfer), event.frame.sequence
            latest = self._sequences.get(name, -1)
            self.counts["frames: came after a later one"] += sequence < latest
            self._sequences[name] = max(sequence, latest)
        elif type(event) is Preempted:
            self.counts["out of blocks: a request gave way"] += 1
        elif (worker := world.runtime.workers.get(who)) is not None and worker.engine._waiting:
            self.counts["out of blocks: events while a request waited for some"] += not worker.engine._is_full

    def worker(self, world: World, event: str, name: WorkerId) -> None:
        """Just before something happens to a worker: what it is at."""
        worker = world.runtime.workers.get(name)
        if worker is None:
            what = "of nobody, it was down"
        elif worker.engine.exchange.num_open:
            what = "with a transfer open"
        elif worker.engine._chunks:
            what = "in a step"
        else:
            what = "idle" if worker.engine.is_idle else "while requests waited"
        self.counts[f"{event}: {what}"] += 1

    def caller(self, world: World, request: RequestId) -> None:
        """Just before a caller goes away: where its request is."""
        tracked = world.runtime.controller.requests.get(request)
        self.counts[f"client gone: {'after the end' if tracked is None else tracked.phase}"] += 1


class FaultyWires:
    """Drops, repeats, delays (so reorders) and changes frames, each at its rate."""

    def __init__(
        self, random: Random, rates: Mapping[str, float], *, one_sided: bool, struck: Struck | None = None
    ) -> None:
        self.random = random
        self.one_sided = one_sided
        self.rates = rates
        self.counts = (struck or Struck()).counts

    def happens(self, fault: str) -> bool:
        if self.random.random() >= self.rates[fault]:
            return False
        self.counts[f"frames: {fault}"] += 1
        return True

    def __call__(self, source: WorkerId, target: WorkerId, frame: Frame) -> list[tuple[float, Frame, int]]:
        if self.happens("drop"):
            return []
        delays = [0.0]
        if self.happens("repeat"):
            delays.append(self.random.random() * 0.1)
        if self.happens("delay"):
            delays = [self.random.random() * 0.2 for _ in delays]
        is_data = isinstance(frame, KvData)
        checksum = frame.checksum if isinstance(frame, KvData) else 0
        changed = is_data and self.happens("change")
        arrivals: list[tuple[float, Frame, int]] = []
        for delay in delays:
            arrivals.append((delay, frame, checksum ^ 1 if changed else checksum))
            if not self.one_sided:  # each copy is on its own; what lies in memory is the same for all
                changed = is_data and self.happens("change")
        return arrivals


class UnevenCost:
    """Links, steps and messages that are fast or slow by turns, so that anything may overtake anything it may."""

    def __init__(self, random: Random, schedule: Schedule) -> None:
        self.random = random
        self.step_floor_seconds = schedule.step_floor_seconds
        self.link_bytes_per_second = schedule.link_bytes_per_second
        self.longest_message_seconds = schedule.longest_message_seconds

    def step_seconds(self, _worker: WorkerId, chunks: Sequence[Chunk]) -> float:
        return self.step_floor_seconds + 0.0007 * sum(chunk.num_tokens for chunk in chunks)

    def decode_line(self, _worker: WorkerId, _num_decode: int) -> tuple[float, float] | None:
        return None

    def wire(self, _source: WorkerId, _target: WorkerId) -> Wire:
        return Wire([Port(self.link_bytes_per_second)], 1e-4)

    def message_seconds(self) -> float:
        return self.random.random() * self.longest_message_seconds

    def start_seconds(self, _worker: WorkerId) -> float:
        return 0.5


class FaultySteps:
    """Steps that fail, at a rate."""

    def __init__(self, random: Random, rate: float, struck: Struck) -> None:
        self.random = random
        self.rate = rate
        self.counts = struck.counts

    def __call__(self, worker: WorkerId, step: RunStep) -> str | None:
        if self.random.random() >= self.rate:
            return None
        self.counts["steps: fail"] += 1
        return "out of memory"


Event = Literal["kill", "pause", "hang", "lose", "clock", "cut"]


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """A request, and when its caller goes away if it does."""

    at_seconds: float
    prompt: tuple[int, ...]
    max_tokens: int
    deadline_seconds: float = PATIENCE
    stops_at: int | None = None
    min_tokens: int = 0
    cancel_after_seconds: float | None = None


class Disturbance(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happens to a worker. `seconds`: how long it lasts, or how far its clock jumps. `other`: from whom
    it is cut."""

    event: Event
    at_seconds: float
    worker: str
    seconds: float = 0.0
    other: str = ""


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """All of a run as data, so that it replays exactly and parts can be left out of it."""

    seed: int
    """Of what happens to single frames, steps and messages."""
    workers: str
    one_sided: bool
    staged: bool
    in_place: bool = False
    most_windows: int | None = None
    max_batch: int
    num_blocks: int
    step_tokens: int
    layers_per_frame: int
    local_prefill: LocalPrefill
    policy: Policy
    max_waiting: int
    expected_outputs: float
    step_floor_seconds: float
    link_bytes_per_second: float
    longest_message_seconds: float
    frame_rates: dict[str, float]
    step_failure_rate: float
    asks: tuple[Ask, ...]
    disturbances: tuple[Disturbance, ...] = ()


def draw_rates(random: Random) -> dict[str, float]:
    """How often each fault befalls a frame."""
    return {name: random.choice((0.0, 0.0, 0.02, 0.2)) for name in FAULTS}


def draw(seed: int) -> Schedule:
    """The schedule of this seed."""
    random = Random(seed)
    is_small = random.random() < SMALL_SHARE
    cluster = _draw_cluster(random)
    if cluster["in_place"]:
        cluster["most_windows"] = Random(f"{seed} windows").choice((None, 1, 1, 2))
    if is_small:
        cluster["num_blocks"] = random.choice((7, 12, 40))
    rates = draw_rates(random)
    step_failure_rate = random.choice((0.0, 0.0, 0.0, 0.01, 0.05))
    asks = _draw_asks(random, is_small=is_small)
    disturbances = tuple(_draw_disturbance(random, cluster["workers"]) for _ in range(random.choice((0, 1, 1, 3))))
    return Schedule(
        seed=seed,
        **cluster,
        frame_rates=rates,
        step_failure_rate=step_failure_rate,
        asks=asks,
        disturbances=disturbances,
    )


def draw_calm(seed: int) -> Schedule:
    """The same clusters and as much load, and nothing goes wrong."""
    random = Random(seed)
    cluster = _draw_cluster(random)
    asks = tuple(
        Ask(
            at_seconds=1 + number * random.choice((0.0, 0.01)),
            prompt=(random.randint(0, 3), *range(random.randint(0, 28))),
            max_tokens=random.randint(1, 12),
            deadline_seconds=10 * PATIENCE,
        )
        for number in range(random.randint(1, 30))
    )
    return Schedule(
        seed=seed, **cluster, frame_rates=dict.fromkeys(FAULTS, 0.0), step_failure_rate=0.0, asks=asks
    )  # fmt: skip


def _draw_cluster(random: Random) -> dict[str, Any]:
    cluster: dict[str, Any] = {
        "workers": random.choice(("p0 d0", "p0 p1 d0", "p0 d0 d1", "p0 p1 d0 d1", "a0 p0 d0", "a0 a1")),
        "one_sided": random.random() < 0.7,
        "staged": random.random() < 0.4,
        "max_batch": random.choice((2, 8)),
        "num_blocks": random.choice((12, 20, 40, 200)),
        "step_tokens": random.choice((4, 16, 64)),
        "layers_per_frame": random.choice((1, 2, 4)),
        "local_prefill": random.choice(("auto", "fallback", "always", "fallback")),
        "policy": random.choice(("estimate", "round_robin", "least_loaded")),
        "max_waiting": random.choice((2, 100)),
        # little expected lets more in than there is room for, so that some are preempted
        "expected_outputs": random.choice((128.0, 1.0)),
        "step_floor_seconds": random.choice((0.008, 0.008, 0.1, 0.4)),
        "link_bytes_per_second": random.choice((5e9, 1e6, 2e5)),
        "longest_message_seconds": random.choice((1e-4, 0.01, 0.1)),
    }
    cluster["in_place"] = cluster["one_sided"] and not cluster["staged"] and random.random() < 0.6
    return cluster


def _draw_asks(random: Random, *, is_small: bool) -> tuple[Ask, ...]:
    """Requests that share prefixes, alone or in a burst; some stop early, are in a hurry, or go away."""
    window = random.choice((0.0, 0.2, 2.0))
    longest_prompt, longest_text = random.choice(((40, 20), (40, 20), (10, 30)))
    most = 14
    if is_small:
        longest_prompt, longest_text, most = 14, random.choice((3, 9)), 3
    asks = []
    for _ in range(random.randint(1, most)):
        max_tokens = random.randint(1, longest_text)
        asks.append(
            Ask(
                at_seconds=1 + random.random() * window,
                prompt=(random.randint(0, 3), *range(random.randint(0, longest_prompt))),
                max_tokens=max_tokens,
                deadline_seconds=random.choice((3.0, PATIENCE)),
                stops_at=random.randrange(max_tokens) if random.random() < 0.3 else None,
                min_tokens=random.choice((0, 0, 5)),
                cancel_after_seconds=(
                    random.random() * random.choice((0.1, 0.5, 2.0)) if random.random() < 0.2 else None
                ),
            )
        )
    return tuple(asks)


def _draw_disturbance(random: Random, workers: str) -> Disturbance:
    event: Event = random.choice(("kill", "kill", "pause", "hang", "lose", "clock", "cut"))
    seconds = {
        "kill": (0.0,),
        "pause": (0.05, 0.5, 2.0),
        "hang": (HOUR,),
        "lose": (0.0, 0.01, 0.3, 1.0),
        "clock": (-HOUR, HOUR),
        "cut": (0.0, 0.02, 0.5, 3.0),
    }[event]
    return Disturbance(
        event=event,
        at_seconds=1 + random.random() * random.choice((0.1, 0.5, 2.0)),
        worker=random.choice(workers.split()),
        seconds=random.choice(seconds),
        other=random.choice(workers.split()) if event == "cut" else "",
    )


def build(schedule: Schedule, check: Check = "changed") -> World:
    """The cluster of a schedule, its load and what will happen to it."""
    disturbed = any(schedule.frame_rates.values())
    random, struck = Random(f"{schedule.seed} frames"), Struck()
    wires = FaultyWires(random, schedule.frame_rates, one_sided=schedule.one_sided, struck=struck)
    world = World(
        schedule.workers,
        num_blocks=schedule.num_blocks,
        step_tokens=schedule.step_tokens,
        layers_per_frame=schedule.layers_per_frame,
        max_batch=schedule.max_batch,
        one_sided=schedule.one_sided,
        staged=schedule.staged,
        in_place=schedule.in_place,
        most_windows=schedule.most_windows,
        cost=UnevenCost(Random(f"{schedule.seed} messages"), schedule),
        frame_fault=wires if disturbed else faithful,
        step_fault=FaultySteps(Random(f"{schedule.seed} steps"), schedule.step_failure_rate, struck),
        controller=ControllerConfig(
            local_prefill=schedule.local_prefill, policy=schedule.policy, max_waiting=schedule.max_waiting
        ),
        check=check,
        watch=lambda _now, who, event: struck.watch(world, who, event),
    )
    world.struck = struck.counts
    world.runtime.controller._admission.expected_outputs = schedule.expected_outputs
    for ask in schedule.asks:
        request = world.ask(
            ask.at_seconds,
            list(ask.prompt),
            ask.max_tokens,
            ask.deadline_seconds,
            stops_at=ask.stops_at,
            min_tokens=ask.min_tokens,
        )
        if ask.cancel_after_seconds is not None:
            gone_at = ask.at_seconds + ask.cancel_after_seconds
            world.runtime.call(gone_at, partial(struck.caller, world, request))
            world.runtime.cancel(gone_at, request)
    for disturbance in schedule.disturbances:
        worker = WorkerId(disturbance.worker)
        world.runtime.call(disturbance.at_seconds, partial(struck.worker, world, disturbance.event, worker))
        _disturb(world, disturbance)
    return world


def _disturb(world: World, disturbance: Disturbance) -> None:
    """Workers die, stand still, lose their connection or the time."""
    runtime, at_seconds, worker = world.runtime, disturbance.at_seconds, WorkerId(disturbance.worker)
    match disturbance.event:
        case "kill":
            runtime.kill(at_seconds, worker)
        case "pause":
            runtime.pause(at_seconds, worker, disturbance.seconds)
        case "hang":
            runtime.pause(at_seconds, worker, disturbance.seconds)
            runtime.kill(at_seconds + 1.5, worker)
        case "lose":
            runtime.lose(at_seconds, worker, disturbance.seconds)
        case "clock":
            runtime.shift_clock(at_seconds, worker, disturbance.seconds)
        case "cut":
            runtime.cut(at_seconds, worker, WorkerId(disturbance.other), disturbance.seconds)


def run(schedule: Schedule, check: Check = "changed") -> World:
    """Play a schedule to its end; the world asserts on the way."""
    world = build(schedule, check)
    world.run()
    return world


def play(seed: int) -> World:
    """The schedule of this seed."""
    return run(draw(seed))


def play_calm(seed: int) -> World:
    """The calm schedule of this seed."""
    return run(draw_calm(seed))


def judge_calm(world: World) -> None:
    """Who was let in has the whole text, at the first attempt."""
    world.check_quiescent()
    for request in world.requests.values():
        if request.id in world.finished:
            finish = world.finished[request.id]
            assert (finish.reason, finish.num_outputs) == expected_end(request), finish
            assert world.runtime.controller.ended[request.id].epoch == 0
    failures = [event for _, _, event in world.events if isinstance(event, HandoffFailed | RequestFailed)]
    assert not failures


def judge(world: World) -> None:
    """Every request has ended once: with its whole text, or as its caller wished, or with an error that says why."""
    world.check_quiescent()
    for request in world.requests.values():
        finish = world.finished.get(request.id)
        if finish is None:
            assert request.id in world.rejected
            continue
        assert finish.num_prompt_tokens == request.num_prompt_tokens
        assert finish.num_cached_tokens <= request.num_prompt_tokens
        assert (finish.error is not None) == (finish.error_code is not None) == (finish.reason == "error")
        if finish.reason in ("stop", "length"):
            assert (finish.reason, finish.num_outputs) == expected_end(request)
        elif finish.error_code == "deadline_exceeded":
            assert request.deadline_seconds < PATIENCE, f"request {request.id} hung: {finish.error}"
