"""What events say of a run is put together the same, whether they come from virtual time or from a server's logs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from tests.world import World
from transload.control.messages import KvVerified, StepDone
from transload.errors import DeploymentError
from transload.runtime.event_log import EventLog
from transload.study.timeline import Timeline, TimelineRecorder, read_timeline


def played(workers: str = "p0 d0", num_requests: int = 12, *, kill: str | None = None) -> tuple[World, Timeline]:
    world = World(workers)
    for number in range(num_requests):
        world.ask(1.0 + number * 0.02, [number] * (8 + number), 6)
    if kill is not None:
        world.runtime.kill(1.1, kill)  # type: ignore[arg-type]
    world.run()
    return world, recorded(world)


def recorded(world: World, max_steps: int = 1000) -> Timeline:
    recorder = TimelineRecorder(max_steps)
    for now, who, event in world.events:
        recorder.observe(now, who, event)
    return recorder.timeline()


def test_every_step_is_there_with_its_worker_length_and_shape() -> None:
    world, timeline = played()
    computed = [(who, event.seconds) for _, who, event in world.events if isinstance(event, StepDone)]
    assert sorted((step.worker, round(step.end_seconds - step.start_seconds, 9)) for step in timeline.steps) == sorted(
        (who, round(seconds, 9)) for who, seconds in computed
    )
    prompts = sum(8 + number for number in range(12))
    assert sum(step.num_prefill_tokens for step in timeline.steps) == prompts
    assert sum(step.num_decode for step in timeline.steps) == 12 * 5  # the first token comes with the prompt
    assert {step.kind for step in timeline.steps if step.worker == "p0"} == {"prefill"}


def test_steps_of_a_worker_do_not_overlap() -> None:
    _, timeline = played("a0 a1", 30)
    for worker in ("a0", "a1"):
        steps = [step for step in timeline.steps if step.worker == worker]
        for before, after in pairwise(steps):
            assert before.end_seconds <= after.start_seconds + 1e-9


def test_a_handoff_is_a_transfer_from_its_source_to_its_target() -> None:
    world, timeline = played()
    verified = {int(event.request): event for _, _, event in world.events if isinstance(event, KvVerified)}
    assert len(timeline.transfers) == len(verified) == 12
    for transfer in timeline.transfers:
        assert (transfer.source, transfer.target) == ("p0", "d0")
        assert transfer.num_bytes == verified[transfer.request].num_bytes
        assert transfer.end_seconds - transfer.start_seconds == pytest.approx(verified[transfer.request].wire_seconds)


def test_the_stages_of_a_request_follow_each_other_from_arrival_to_end() -> None:
    _, timeline = played()
    for request in timeline.requests:
        assert request.end == "length"
        assert request.num_outputs == 6
        names = [stage.name for stage in request.stages]
        assert names[0] == "queue"
        assert names[-1] == "decode"
        assert "prefill" in names
        for before, after in pairwise(request.stages):
            assert before.end_seconds == after.start_seconds


def test_a_lost_worker_leaves_a_mark_and_its_requests_go_on() -> None:
    _, timeline = played("a0 a1", kill="a0")
    assert any(mark.worker == "a0" and mark.name.startswith("lost") for mark in timeline.marks)
    assert {request.end for request in timeline.requests} == {"length"}
    assert {request.num_outputs for request in timeline.requests} == {6}


def test_steps_beyond_what_is_kept_are_counted() -> None:
    world, timeline = played()
    short = recorded(world, max_steps=10)
    assert len(short.steps) == 10
    assert short.num_steps_left_out == len(timeline.steps) - 10


@pytest.mark.parametrize("workers", ["p0 d0", "a0 a1"])
def test_event_logs_of_a_run_give_the_timeline_of_the_run(workers: str, tmp_path: Path) -> None:
    world, timeline = played(workers)
    logs = {who: EventLog(tmp_path, who) for who in {who for _, who, _ in world.events}}
    for now, who, event in world.events:
        logs[who].write(now, event)
    for log in logs.values():
        log.close()
    read = read_timeline(tmp_path)
    assert read.pools == timeline.pools
    assert len(read.steps) == len(timeline.steps)
    assert [(t.request, t.source, t.target, t.num_bytes) for t in read.transfers] == [
        (t.request, t.source, t.target, t.num_bytes) for t in timeline.transfers
    ]
    for told, played_back in zip(timeline.requests, read.requests, strict=True):
        assert [stage.name for stage in told.stages] == [stage.name for stage in played_back.stages]
        assert played_back.end_seconds == pytest.approx(told.end_seconds, abs=1e-5)


def test_a_folder_without_event_logs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="no event log of a controller"):
        read_timeline(tmp_path)


def test_a_file_that_is_no_event_log_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "controller.1.jsonl").write_text('{"at": 1.0, "event": "Nonsense", "x": 3}\n')
    with pytest.raises(DeploymentError, match=r"controller\.1\.jsonl: not an event log"):
        read_timeline(tmp_path)
