"""Seeded schedules of faults: whatever is lost, repeated, late, changed or killed, every request ends once, with the
right text or a typed error, and nothing is left behind."""

from __future__ import annotations

from random import Random

import msgspec
import pytest

from tests.world import World
from transload.control.controller import ControllerConfig
from transload.control.messages import Frame, KvData, KvDone, KvReady, WorkerId

SCHEDULES = 400


class FaultyWires:
    """Drops, repeats, delays (so reorders) and changes frames, at rates drawn from the seed."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.rates = {name: random.choice((0.0, 0.0, 0.02, 0.2)) for name in ("drop", "repeat", "delay", "change")}

    def __call__(self, source: WorkerId, target: WorkerId, frame: Frame) -> list[tuple[float, Frame, int]]:
        checksum = frame.checksum if isinstance(frame, KvData) else 0
        if self.random.random() < self.rates["drop"]:
            return []
        arrivals = [(0.0, frame, checksum)]
        if self.random.random() < self.rates["repeat"]:
            arrivals.append((self.random.random() * 0.1, frame, checksum))
        if self.random.random() < self.rates["delay"]:
            arrivals = [(self.random.random() * 0.2, frame, checksum) for _, frame, checksum in arrivals]
        if isinstance(frame, KvData) and self.random.random() < self.rates["change"]:
            arrivals = [(delay, frame, checksum ^ 1) for delay, frame, _ in arrivals]
        return arrivals


def play(seed: int) -> World:
    random = Random(seed)
    workers = random.choice(("p0 d0", "p0 p1 d0", "p0 d0 d1", "p0 p1 d0 d1", "a0 p0 d0"))
    world = World(
        workers,
        num_blocks=random.choice((20, 40, 200)),
        step_tokens=random.choice((4, 16, 64)),
        layers_per_frame=random.choice((1, 2, 4)),
        max_batch=random.choice((2, 8)),
        one_sided=random.random() < 0.7,
        frame_fault=FaultyWires(random),
        controller=ControllerConfig(
            max_batch=8,
            local_prefill=random.choice(("auto", "fallback")),
            policy=random.choice(("estimate", "round_robin", "least_loaded")),
            max_waiting=random.choice((2, 100)),
        ),
    )
    for _ in range(random.randint(1, 12)):
        prompt = [random.randint(0, 3), *range(random.randint(0, 40))]
        request = world.ask(1 + random.random() * 2, prompt, random.randint(1, 20), random.choice((3.0, 600.0)))
        if random.random() < 0.2:
            world.runtime.cancel(1 + random.random() * 3, request)
    for _ in range(random.choice((0, 0, 1, 3))):
        world.runtime.kill(1 + random.random() * 2, WorkerId(random.choice(workers.split())))
    world.run()
    return world


@pytest.mark.parametrize("seed", range(SCHEDULES))
def test_every_request_ends_once_and_nothing_is_left_behind(seed: int) -> None:
    world = play(seed)
    world.check_quiescent()
    for request in world.requests.values():
        finish = world.finished.get(request.id)
        if finish is None:
            assert request.id in world.rejected
        elif finish.reason == "length":
            assert len(world.tokens[request.id]) == request.max_tokens
        else:
            assert finish.reason in ("cancelled", "error")
            assert (finish.error is not None) == (finish.reason == "error")


def test_a_changed_byte_never_reaches_a_running_request() -> None:
    def change(source: WorkerId, target: WorkerId, frame: Frame) -> list[tuple[float, Frame, int]]:
        return [(0.0, frame, 12345 if isinstance(frame, KvData) else 0)]

    world = World("p0 d0", frame_fault=change)
    request = world.ask(1.0, list(range(30)), 5)
    world.run()
    world.check_complete()  # after two failed transfers the decode worker prefills itself
    assert world.runtime.controller.ended[request].num_failed_handoffs == 2
    assert "KvVerified" not in world.names("controller")


def test_a_lost_ready_frees_the_sender_when_its_lease_ends() -> None:
    def lose_ready(source: WorkerId, target: WorkerId, frame: Frame) -> list[tuple[float, Frame, int]]:
        return [] if isinstance(frame, KvReady) else [(0.0, frame, 0)]

    world = World("p0 d0", frame_fault=lose_ready)
    world.ask(1.0, list(range(30)), 60)
    world.run()
    world.check_complete()


def test_data_of_an_older_epoch_is_dropped() -> None:
    def age(source: WorkerId, target: WorkerId, frame: Frame) -> list[tuple[float, Frame, int]]:
        aged = msgspec.structs.replace(frame, epoch=frame.epoch - 1)
        return [(0.0, aged if isinstance(frame, KvData | KvDone) else frame, 0)]

    world = World("p0 d0", frame_fault=age)
    world.ask(1.0, list(range(30)), 5)
    world.run()
    world.check_complete()
    assert "KvVerified" not in world.names("controller")
