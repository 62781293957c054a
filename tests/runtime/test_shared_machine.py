"""Workers of one machine slow each other for as long as both compute, whichever began first."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import pytest

from tests.world import World
from transload.control.messages import Chunk, KvVerified, WorkerId
from transload.hardware.cost.contention import Work
from transload.runtime.cost import LinearCost
from transload.runtime.shared_machine import Job, SharedMachine

ONE, OTHER = WorkerId("one"), WorkerId("other")


class HalfSpeed:
    """Two that compute at once are half as fast each; the front end, while it has something to do, is one more."""

    def __init__(self, front_end_seconds: float = 0.0) -> None:
        self._seconds = front_end_seconds

    def work(self, _chunks: Sequence[Chunk]) -> Work:
        return Work("decode")

    def paces(self, works: Sequence[Work]) -> list[float]:
        return [1.0 / len(works) for _ in works]

    def front_end_seconds(self, _chunks: Sequence[Chunk]) -> float:
        return self._seconds


class Clock:
    """A heap of what is foretold, played in order."""

    def __init__(self, model: HalfSpeed) -> None:
        self.now = 0.0
        self.seen: list[tuple[float, str]] = []
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = count()
        self.machine = SharedMachine(model, lambda: self.now, self._foretell)

    def _foretell(
        self, at: float, _worker: WorkerId | None, action: Callable[..., None], job: Job, version: int
    ) -> None:
        self.at(at, action, job, version)

    def at(self, at: float, action: Callable[..., None], *arguments: object) -> None:
        heapq.heappush(self._heap, (at, next(self._order), action, arguments))

    def step(self, at: float, worker: WorkerId, *milestones: float) -> None:
        """A step that begins then and is this long alone."""
        marks = [(seconds, self._mark(f"{worker} {seconds:g}")) for seconds in milestones]
        self.at(at, self.machine.begin, worker, (), marks)

    def _mark(self, name: str) -> Callable[[], None]:
        return lambda: self.seen.append((round(self.now, 9), name))

    def run(self) -> list[tuple[float, str]]:
        while self._heap:
            self.now, _, action, arguments = heapq.heappop(self._heap)
            action(*arguments)
        return self.seen


def test_a_step_alone_takes_its_time() -> None:
    clock = Clock(HalfSpeed())
    clock.step(1.0, ONE, 2.0, 4.0)
    assert clock.run() == [(3.0, "one 2"), (5.0, "one 4")]


def test_a_step_is_slowed_by_one_that_begins_later() -> None:
    clock = Clock(HalfSpeed())
    clock.step(0.0, ONE, 4.0)
    clock.step(2.0, OTHER, 1.0)
    # Two seconds alone, two beside the other (which needs two for its one), and what is left alone again.
    assert clock.run() == [(4.0, "other 1"), (5.0, "one 4")]


def test_milestones_move_with_the_pace() -> None:
    clock = Clock(HalfSpeed())
    clock.step(0.0, ONE, 1.0, 3.0, 4.0)
    clock.step(2.0, OTHER, 10.0)
    seen = {name: at for at, name in clock.run()}
    assert seen == {"one 1": 1.0, "one 3": 4.0, "one 4": 6.0, "other 10": 14.0}


def test_a_worker_that_dies_leaves_the_machine_to_the_others() -> None:
    clock = Clock(HalfSpeed())
    clock.step(0.0, ONE, 4.0)
    clock.step(0.0, OTHER, 4.0)
    clock.at(2.0, clock.machine.drop, OTHER)
    assert clock.run() == [(5.0, "one 4")]


def test_the_front_end_works_off_what_tokens_bring() -> None:
    clock = Clock(HalfSpeed(front_end_seconds=0.5))
    clock.step(0.0, ONE, 4.0)
    clock.at(1.0, clock.machine.tell, ())
    clock.at(1.5, clock.machine.tell, ())  # half of the first is left: both take until 3.0
    assert clock.run() == [(5.0, "one 4")]


def played(machine: HalfSpeed | None) -> World:
    cost = LinearCost(step_floor_seconds=0.1, seconds_per_token=0.01, seconds_per_context_token=0.0)
    world = World("p0 d0", cost=cost, machine=machine)
    for number in range(6):
        world.ask(1.0 + 0.2 * number, [number] * 21, 12)
    world.run()
    world.check_complete()
    return world


def test_requests_end_as_they_do_on_machines_of_their_own_only_later() -> None:
    alone, together = played(None), played(HalfSpeed(front_end_seconds=0.01))
    assert alone.tokens == together.tokens
    assert max(at for at, _, _ in together.events) > max(at for at, _, _ in alone.events)
    assert sum(isinstance(event, KvVerified) for _, _, event in together.events)


def test_a_shared_machine_repeats_itself() -> None:
    one, other = played(HalfSpeed(0.003)), played(HalfSpeed(0.003))
    assert one.events == other.events


@pytest.mark.parametrize("at", [1.05, 1.2, 1.37, 1.9])
def test_a_worker_that_is_killed_in_a_step_is_heard_of_no_more(at: float) -> None:
    world = World("p0 d0", machine=HalfSpeed(0.003))
    for number in range(6):
        world.ask(1.0 + 0.1 * number, [number] * 21, 12)
    world.runtime.kill(at, WorkerId("d0"))
    world.run()
    world.check_complete()
