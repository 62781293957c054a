"""Schedules of faults drawn from a seed: a small cluster, its load, and everything that goes wrong there."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from tests.world import World, expected_end
from transload.control.controller import ControllerConfig
from transload.control.messages import Chunk, Frame, HandoffFailed, KvData, RequestFailed, RunStep, WorkerId
from transload.runtime.cluster import faithful, never_fails
from transload.runtime.flows import Port, Wire

HOUR = 3600.0
PATIENCE = 600.0
"""Deadline of a request that nobody is in a hurry for: reaching it means that something has hung."""


class FaultyWires:
    """Drops, repeats, delays (so reorders) and changes frames, at rates drawn from the seed."""

    def __init__(self, random: Random, *, one_sided: bool) -> None:
        self.random = random
        self.one_sided = one_sided
        self.rates = {name: random.choice((0.0, 0.0, 0.02, 0.2)) for name in ("drop", "repeat", "delay", "change")}

    def happens(self, fault: str) -> bool:
        return self.random.random() < self.rates[fault]

    def __call__(self, source: WorkerId, target: WorkerId, frame: Frame) -> list[tuple[float, Frame, int]]:
        if self.happens("drop"):
            return []
        delays = [0.0]
        if self.happens("repeat"):
            delays.append(self.random.random() * 0.1)
        if self.happens("delay"):
            delays = [self.random.random() * 0.2 for _ in delays]
        checksum = frame.checksum if isinstance(frame, KvData) else 0
        changed = isinstance(frame, KvData) and self.happens("change")
        arrivals: list[tuple[float, Frame, int]] = []
        for delay in delays:
            arrivals.append((delay, frame, checksum ^ 1 if changed else checksum))
            if not self.one_sided:  # each copy is on its own; what lies in memory is the same for all
                changed = isinstance(frame, KvData) and self.happens("change")
        return arrivals


class UnevenCost:
    """Links, steps and messages that are fast or slow by turns, so that anything may overtake anything it may."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.step_floor_seconds = random.choice((0.008, 0.008, 0.1, 0.4))
        self.link_bytes_per_second = random.choice((5e9, 1e6, 2e5))
        self.longest_message_seconds = random.choice((1e-4, 0.01, 0.1))

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
    """Steps that fail, at a rate drawn from the seed."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.rate = random.choice((0.0, 0.0, 0.0, 0.01, 0.05))

    def __call__(self, worker: WorkerId, step: RunStep) -> str | None:
        return "out of memory" if self.random.random() < self.rate else None


def build(random: Random, *, faults: bool = True) -> tuple[World, list[WorkerId]]:
    """A cluster drawn from the seed, and the names of its workers."""
    workers = random.choice(("p0 d0", "p0 p1 d0", "p0 d0 d1", "p0 p1 d0 d1", "a0 p0 d0", "a0 a1"))
    one_sided = random.random() < 0.7
    max_batch = random.choice((2, 8))
    world = World(
        workers,
        num_blocks=random.choice((12, 20, 40, 200)),
        step_tokens=random.choice((4, 16, 64)),
        layers_per_frame=random.choice((1, 2, 4)),
        max_batch=max_batch,
        one_sided=one_sided,
        staged=random.random() < 0.4,
        cost=UnevenCost(random),
        frame_fault=FaultyWires(random, one_sided=one_sided) if faults else faithful,
        step_fault=FaultySteps(random) if faults else never_fails,
        controller=ControllerConfig(
            local_prefill=random.choice(("auto", "fallback", "always", "fallback")),
            policy=random.choice(("estimate", "round_robin", "least_loaded")),
            max_waiting=random.choice((2, 100)),
        ),
    )
    # little expected lets more in than there is room for, so that some are preempted
    world.runtime.controller._admission.expected_outputs = random.choice((128.0, 1.0))
    return world, [WorkerId(name) for name in workers.split()]


def load(world: World, random: Random) -> None:
    """Requests that share prefixes, alone or in a burst; some stop early, are in a hurry, or go away."""
    window = random.choice((0.0, 0.2, 2.0))
    longest_prompt, longest_text = random.choice(((40, 20), (40, 20), (10, 30)))
    for _ in range(random.randint(1, 14)):
        prompt = [random.randint(0, 3), *range(random.randint(0, longest_prompt))]
        max_tokens = random.randint(1, longest_text)
        stops_at = random.randrange(max_tokens) if random.random() < 0.3 else None
        at_seconds = 1 + random.random() * window
        request = world.ask(
            at_seconds,
            prompt,
            max_tokens,
            random.choice((3.0, PATIENCE)),
            stops_at=stops_at,
            min_tokens=random.choice((0, 0, 5)),
        )
        if random.random() < 0.2:
            world.runtime.cancel(at_seconds + random.random() * random.choice((0.1, 0.5, 2.0)), request)


def disturb(world: World, workers: list[WorkerId], random: Random) -> None:
    """Workers die, stand still, lose their connection or the time."""
    for _ in range(random.choice((0, 0, 1, 3))):
        at_seconds, worker = 1 + random.random() * 2, random.choice(workers)
        match random.choice(("kill", "kill", "pause", "hang", "lose", "clock")):
            case "kill":
                world.runtime.kill(at_seconds, worker)
            case "pause":
                world.runtime.pause(at_seconds, worker, random.choice((0.05, 0.5, 2.0)))
            case "hang":
                world.runtime.pause(at_seconds, worker, HOUR)
                world.runtime.kill(at_seconds + 1.5, worker)
            case "lose":
                world.runtime.lose(at_seconds, worker, random.choice((0.0, 0.01, 0.3, 1.0)))
            case "clock":
                world.runtime.shift_clock(at_seconds, worker, random.choice((-HOUR, HOUR)))


def play(seed: int) -> World:
    """Run the schedule of this seed to its end; the world asserts on the way."""
    random = Random(seed)
    world, workers = build(random)
    load(world, random)
    disturb(world, workers, random)
    world.run()
    return world


def play_calm(seed: int) -> World:
    """The same clusters and as much load, and nothing goes wrong."""
    random = Random(seed)
    world, _ = build(random, faults=False)
    for number in range(random.randint(1, 30)):
        prompt = [random.randint(0, 3), *range(random.randint(0, 28))]
        world.ask(1 + number * random.choice((0.0, 0.01)), prompt, random.randint(1, 12), 10 * PATIENCE)
    world.run()
    return world


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
