"""Seeded schedules of faults: whatever is lost, repeated, late, changed or killed, every request ends once, with the
right text or a typed error, and nothing is left behind."""

from __future__ import annotations

import msgspec
import pytest

from tests.schedules import judge, judge_calm, play, play_calm
from tests.world import World
from transload.control.messages import Frame, KvData, KvDone, KvReady, WorkerId

SCHEDULES = 400
CALM_SCHEDULES = 60


@pytest.mark.parametrize("seed", range(SCHEDULES))
def test_every_request_ends_once_and_nothing_is_left_behind(seed: int) -> None:
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


def test_data_of_an_older_epoch_is_dropped() -> None:
    def age(source: WorkerId, target: WorkerId, frame: Frame) -> list[tuple[float, Frame, int]]:
        aged = msgspec.structs.replace(frame, epoch=frame.epoch - 1)
        return [(0.0, aged if isinstance(frame, KvData | KvDone) else frame, 0)]

    world = World("p0 d0", frame_fault=age)
    world.ask(1.0, list(range(30)), 5)
    world.run()
    world.check_complete()
    assert "KvVerified" not in world.names("controller")
