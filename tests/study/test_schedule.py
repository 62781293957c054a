from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from transload.study.schedule import Due, Schedule
from transload.study.workload import ArrivalSpec, Workload


def schedule_of(arrivals: Sequence[ArrivalSpec], **fields: object) -> Schedule:
    return Schedule(Workload(name="test", arrivals=lambda: iter(arrivals), **fields))  # type: ignore[arg-type]


def turn(at: float, session: int, number: int, think: float | None = None) -> ArrivalSpec:
    return ArrivalSpec(at, 10, 1, (), session, number, think)


def plain(at: float) -> ArrivalSpec:
    return ArrivalSpec(at, 10, 1)


def take_all(schedule: Schedule, now: float) -> list[Due]:
    taken = []
    while (due := schedule.take(now)) is not None:
        taken.append(due)
    return taken


def test_in_open_loop_nothing_waits_for_what_is_in_flight() -> None:
    schedule = schedule_of([plain(0.0), plain(1.0), plain(1.0), plain(5.0)])
    assert [due.number for due in take_all(schedule, 0.0)] == [0]
    assert schedule.next_seconds() == 1.0
    assert [(due.number, due.due_seconds) for due in take_all(schedule, 3.0)] == [(1, 1.0), (2, 1.0)]
    assert schedule.num_in_flight == 3
    assert schedule.next_seconds() == 5.0


def test_it_is_over_when_all_has_started_and_all_has_ended() -> None:
    arrival = plain(0.0)
    schedule = schedule_of([arrival])
    assert not schedule.is_over
    assert len(take_all(schedule, 0.0)) == 1
    assert not schedule.is_over
    schedule.ended(arrival, 1.0)
    assert schedule.is_over
    assert schedule.next_seconds() is None


def test_a_closed_loop_keeps_so_many_in_flight_and_starts_the_next_as_one_ends() -> None:
    arrivals = [plain(0.0) for _ in range(4)]
    schedule = schedule_of(arrivals, concurrency=2)
    assert [due.number for due in take_all(schedule, 0.0)] == [0, 1]
    assert schedule.next_seconds() is None
    schedule.ended(arrivals[0], 2.5)
    assert take_all(schedule, 2.5) == [Due(2.5, 2, arrivals[2])]
    schedule.ended(arrivals[1], 3.0)
    schedule.ended(arrivals[2], 3.0)
    assert [due.number for due in take_all(schedule, 3.0)] == [3]
    schedule.ended(arrivals[3], 4.0)
    assert schedule.is_over


def test_a_closed_loop_ends_with_its_duration() -> None:
    arrivals = [plain(0.0) for _ in range(100)]
    schedule = schedule_of(arrivals, concurrency=1, duration_seconds=2.0)
    now, started = 0.0, 0
    while not schedule.is_over:
        for due in take_all(schedule, now):
            started += 1
            now += 0.75
            schedule.ended(due.arrival, now)
    assert started == 3


def test_an_open_loop_starts_nothing_that_is_due_after_its_duration() -> None:
    schedule = schedule_of([plain(0.0), plain(1.9), plain(2.0)], duration_seconds=2.0)
    assert [due.number for due in take_all(schedule, 10.0)] == [0, 1]
    assert schedule.next_seconds() is None


def test_a_turn_waits_for_the_end_of_the_turn_before_it_and_the_pause() -> None:
    turns = [turn(0.0, 1, 0), turn(0.0, 1, 1, think=2.0), turn(0.0, 1, 2, think=3.0), plain(0.5)]
    schedule = schedule_of(turns)
    assert [due.number for due in take_all(schedule, 1.0)] == [0, 3]
    assert schedule.next_seconds() is None
    schedule.ended(turns[0], 4.0)
    assert schedule.next_seconds() == 6.0
    assert take_all(schedule, 5.9) == []
    assert take_all(schedule, 6.1) == [Due(6.0, 1, turns[1])]
    assert schedule.next_seconds() is None
    schedule.ended(turns[1], 7.0)
    assert take_all(schedule, 10.0) == [Due(10.0, 2, turns[2])]


def test_a_turn_does_not_come_before_its_own_time() -> None:
    turns = [turn(0.0, 1, 0), turn(9.0, 1, 1, think=1.0)]
    schedule = schedule_of(turns)
    take_all(schedule, 0.0)
    schedule.ended(turns[0], 1.0)
    assert schedule.next_seconds() == 9.0


def test_a_session_whose_beginning_is_missing_starts_at_the_time_written() -> None:
    schedule = schedule_of([turn(3.0, 1, 4, think=1.0), turn(3.0, 1, 5, think=1.0)])
    assert schedule.next_seconds() == 3.0
    assert [due.number for due in take_all(schedule, 3.0)] == [0]


def test_a_turn_read_after_the_turn_before_it_has_ended_still_gets_its_pause() -> None:
    turns = [turn(0.0, 1, 0), turn(0.0, 1, 1, think=2.0)]
    schedule = schedule_of(turns, concurrency=1)
    take_all(schedule, 0.0)  # no room, so the second turn is not looked at yet
    schedule.ended(turns[0], 1.0)
    assert schedule.next_seconds() == 3.0


@given(
    ends=st.lists(st.floats(0.0, 3.0), min_size=24, max_size=24),
    concurrency=st.none() | st.integers(1, 3),
    thinks=st.lists(st.floats(0.0, 2.0), min_size=24, max_size=24),
)
def test_every_arrival_starts_once_and_the_turns_of_a_session_never_overlap(
    ends: list[float], concurrency: int | None, thinks: list[float]
) -> None:
    arrivals = [
        turn(float(session), session, number, thinks[session * 4 + number] if number else None)
        for session in range(6)
        for number in range(4)
    ]
    schedule = schedule_of(arrivals, concurrency=concurrency)
    now, running, ended_at = 0.0, dict[int, tuple[float, ArrivalSpec]](), dict[tuple[int, int], float]()
    started: list[int] = []
    while not schedule.is_over:
        for due in take_all(schedule, now):
            assert due.due_seconds <= now
            session, number = due.arrival.session, due.arrival.turn
            assert session is not None
            assert all(other.session != session for _, other in running.values())
            if number:
                assert due.arrival.think_seconds is not None
                assert now >= ended_at[session, number - 1] + due.arrival.think_seconds
            started.append(due.number)
            running[due.number] = (now + ends[due.number], due.arrival)
        assert concurrency is None or len(running) <= concurrency
        times = [end for end, _ in running.values()]
        upcoming = schedule.next_seconds()
        now = max(now, min(times + ([upcoming] if upcoming is not None else [])))
        for key, (end, arrival) in list(running.items()):
            if end <= now:
                del running[key]
                assert arrival.session is not None
                ended_at[arrival.session, arrival.turn] = now
                schedule.ended(arrival, now)
    assert sorted(started) == list(range(24))
