"""The shipped machines in virtual time: the split works, loses nothing, and repeats exactly."""

from __future__ import annotations

from random import Random

import pytest

from tests.control.feeding import A0, D0, P0
from tests.world import World
from transload.control.controller import ControllerConfig
from transload.control.messages import KvVerified, Prefill, Reserve, Run
from transload.runtime.cost import LinearCost


@pytest.mark.parametrize("one_sided", [True, False])
def test_a_request_is_prefilled_on_one_worker_and_decoded_on_another(one_sided: bool) -> None:
    world = World("p0 d0", one_sided=one_sided)
    request = world.ask(1.0, list(range(10, 51)), 12)
    world.run()
    world.check_complete()
    assert len(world.tokens[request]) == 12
    assert [name for name in world.names("p0") if name in ("Prefill", "Run")] == ["Prefill"]
    assert [name for name in world.names("d0") if name in ("Reserve", "Run")] == ["Reserve"]
    verified = [event for _, _, event in world.events if isinstance(event, KvVerified)]
    assert [event.num_bytes for event in verified] == [11 * 4 * 1024]  # 41 tokens: 11 blocks of 4 layers


@pytest.mark.parametrize("workers", ["a0", "a0 a1", "p0 d0", "p0 p1 d0", "p0 d0 d1", "a0 p0 d0"])
@pytest.mark.parametrize("num_blocks", [24, 200])
def test_many_requests_complete_on_any_topology_with_little_and_much_memory(workers: str, num_blocks: int) -> None:
    world = World(workers, num_blocks=num_blocks)
    for number in range(40):
        world.ask(1.0 + number * 0.01, [number % 7, *range(number % 23 + 1)], 1 + number % 17)
    world.run()
    world.check_complete()


def test_two_runs_are_identical() -> None:
    def play() -> list[tuple[float, str, object]]:
        world = World("p0 p1 d0 d1", num_blocks=30)
        for number in range(25):
            world.ask(1.0 + number * 0.02, [number] * (number + 1), 9)
        world.run()
        return list(world.events)

    assert play() == play()


def test_a_prompt_that_was_seen_before_is_taken_from_the_cache() -> None:
    world = World("p0 d0")
    prompt = list(range(100, 140))
    world.ask(1.0, prompt, 4)
    second = world.ask(2.0, prompt, 4)
    world.run()
    world.check_complete()
    assert world.finished[second].num_cached_tokens == 36  # all full blocks but the one with the last token
    verified = [event for _, _, event in world.events if isinstance(event, KvVerified)]
    assert verified[1].num_bytes == 0  # the decode worker has all ten blocks already


def test_a_lost_prefill_pool_makes_decode_workers_prefill() -> None:
    world = World("p0 d0", controller=ControllerConfig(local_prefill="fallback", first_restart_seconds=1000.0))
    world.runtime.kill(1.5, "p0")  # type: ignore[arg-type]
    world.ask(2.0, list(range(30)), 5)
    world.run(until=100)
    world.check_complete()
    assert "Run" in world.names("d0")


@pytest.mark.parametrize("victim", ["p0", "d0"])
@pytest.mark.parametrize("milliseconds", range(0, 160, 3))
def test_a_worker_killed_at_any_moment_costs_no_token(victim: str, milliseconds: int) -> None:
    world = World("p0 d0")
    world.ask(1.0, list(range(40)), 10)
    world.ask(1.02, list(range(5, 30)), 10)
    world.runtime.kill(1.0 + milliseconds / 1000, victim)  # type: ignore[arg-type]
    world.run()
    world.check_complete()


def test_cancelling_frees_both_sides_at_any_moment() -> None:
    for milliseconds in range(0, 200, 2):
        world = World("p0 d0")
        request = world.ask(1.0, list(range(40)), 10)
        world.runtime.cancel(1.0 + milliseconds / 1000, request)
        world.run()
        world.check_quiescent()


def test_assignments_name_the_workers_that_the_router_chose() -> None:
    world = World("p0 d0 d1")
    for number in range(6):
        world.ask(1.0 + 0.001 * number, [number] * 9, 30)
    world.run()
    world.check_complete()
    assigned = [(who, type(event)) for _, who, event in world.events if isinstance(event, Reserve | Prefill | Run)]
    assert {who for who, kind in assigned if kind is Reserve} == {"d0", "d1"}
    assert {who for who, kind in assigned if kind is Prefill} == {"p0"}


def test_messages_keep_their_order_however_long_each_takes() -> None:
    class Uneven(LinearCost, frozen=True, kw_only=True):
        def message_seconds(self) -> float:
            return random.random()

    random = Random(1)
    world = World("a0 a1", cost=Uneven(load_seconds=0.5))
    for number in range(20):
        world.ask(1.0 + number * 0.001, [number] * 5, 3)
    world.run()
    world.check_complete()
    for worker in ("a0", "a1"):
        runs = [event.request.id for _, who, event in world.events if who == worker and isinstance(event, Run)]
        assert runs == sorted(runs)


def test_a_paused_worker_takes_up_in_order_what_came_meanwhile() -> None:
    world = World("a0")
    for number in range(3):
        world.ask(1.0 + number * 0.1, [number] * 5, 3)
    world.runtime.pause(0.9, A0, 5.0)
    world.run()
    world.check_complete()
    runs = [(at, event.request.id) for at, who, event in world.events if isinstance(event, Run)]
    assert [number for _, number in runs] == [1, 2, 3]
    assert {at for at, _ in runs} == {5.9}


def test_a_worker_that_is_declared_gone_and_lives_on_changes_nothing_any_more() -> None:
    world = World("p0 d0")
    request = world.ask(1.0, list(range(30)), 40)
    world.runtime.lose(1.2, D0, lingers_seconds=0.3)
    world.run()
    world.check_complete()
    assert world.runtime.controller.ended[request].epoch == 1
    handled = [at for at, who, _ in world.events if who == "d0"]
    assert any(1.2 < at < 1.5 for at in handled), "it goes on computing"
    assert "WorkerGone" in world.names("controller")
    assert world.names("controller").count("WorkerGone") == 1
    assert world.names("controller").count("WorkerJoined") == 3


@pytest.mark.parametrize("seconds", [-3600.0, 3600.0])
def test_a_clock_that_jumps_costs_no_attempt(seconds: float) -> None:
    world = World("p0 d0")
    requests = [world.ask(1.0 + number * 0.05, [number] * 40, 10) for number in range(6)]
    for worker in (P0, D0):
        world.runtime.shift_clock(1.1, worker, seconds)
    world.run()
    world.check_complete()
    assert {world.runtime.controller.ended[request].epoch for request in requests} == {0}


def test_workers_whose_leases_differ_hand_over_all_the_same() -> None:
    slow = LinearCost(load_seconds=0.5, step_floor_seconds=0.5)
    world = World("p0 d0", cost=slow, lease_seconds={"p0": 60.0, "d0": 1.0})
    requests = [world.ask(1.0, [number] * 60, 2) for number in range(4)]
    world.run()
    world.check_complete()
    assert {world.runtime.controller.ended[request].epoch for request in requests} == {0}
