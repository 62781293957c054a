"""Seeded schedules of faults: whatever is lost, repeated, late, changed or killed, every request ends once, with the
right text or a typed error, and nothing is left behind."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.pool import Pool

import msgspec
import pytest

from tests.schedules import draw, judge, judge_calm, play, play_calm
from tests.shrink import failure_of, shrink, story
from tests.world import World
from transload.control.messages import Frame, HandoffFailed, KvData, KvDone, KvReady, WorkerId
from transload.runtime.cost import LinearCost

SCHEDULES = 10_000
CALM_SCHEDULES = 200
BATCH = 500


def failures_among(seeds: range) -> list[str]:
    """What goes wrong with these seeds, each as a short story."""
    return [f"{failure}\n{story(shrink(draw(seed)))}" for seed in seeds if (failure := failure_of(draw(seed)))]


@pytest.fixture(scope="module")
def processes() -> Iterator[Pool]:
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        yield pool


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_request_ends_once_and_nothing_is_left_behind(processes: Pool) -> None:
    batches = [range(first, first + BATCH) for first in range(0, SCHEDULES, BATCH)]
    found = [story for stories in processes.imap_unordered(failures_among, batches) for story in stories]
    assert not found, "\n\n".join(found)


@pytest.mark.parametrize("seed", range(100))
def test_the_first_schedules_one_by_one(seed: int) -> None:
    judge(play(seed))


@pytest.mark.parametrize("seed", range(CALM_SCHEDULES))
def test_without_faults_every_request_has_its_text_at_the_first_attempt(seed: int) -> None:
    judge_calm(play_calm(seed))


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
    request = world.ask(1.0, list(range(30)), 200)
    world.run()
    world.check_complete()
    assert "HandoffFailed" in world.names("controller")
    assert world.runtime.controller.ended[request].epoch == 0, "the decode worker had all it needed"


@pytest.mark.parametrize("in_place", [False, True])
def test_a_grant_does_not_outlive_the_link_it_was_made_for(in_place: bool) -> None:
    """The link breaks and is there again while the grant is on its way over the controller: its blocks have been given
    up, and the sender, which writes straight into them, must not take it for one of the new link."""
    world = World("p0 d0", in_place=in_place, cost=LinearCost(control_latency_seconds=0.1))
    request = world.ask(1.0, list(range(30)), 5)
    world.runtime.cut(1.16, WorkerId("p0"), WorkerId("d0"), 0.01)
    world.run()
    world.check_complete()
    assert world.runtime.controller.ended[request].epoch == 1
    failed = [event for _, _, event in world.events if isinstance(event, HandoffFailed)]
    assert {event.worker for event in failed} == {"p0", "d0"}


def test_data_of_an_older_epoch_is_dropped() -> None:
    def age(source: WorkerId, target: WorkerId, frame: Frame) -> list[tuple[float, Frame, int]]:
        aged = msgspec.structs.replace(frame, epoch=frame.epoch - 1)
        return [(0.0, aged if isinstance(frame, KvData | KvDone) else frame, 0)]

    world = World("p0 d0", frame_fault=age)
    world.ask(1.0, list(range(30)), 5)
    world.run()
    world.check_complete()
    assert "KvVerified" not in world.names("controller")
