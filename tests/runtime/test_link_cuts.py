"""Links that break while both their workers live on, in virtual time: no text changes, and nothing stays behind."""

from __future__ import annotations

from random import Random

import pytest

from tests.world import World
from transload.control.controller import ControllerConfig
from transload.control.messages import KvData, LinkMeasured, PeerFrame, PeerLost, PeerUp, WorkerId
from transload.runtime.cost import LinearCost

SLOW_WIRE = LinearCost(load_seconds=0.5, link_bytes_per_second=1e6)
P0, D0 = WorkerId("p0"), WorkerId("d0")
modes = pytest.mark.parametrize(
    ("one_sided", "in_place"), [(False, False), (True, False), (True, True)], ids=["tcp", "shm", "direct"]
)


@modes
@pytest.mark.parametrize("seed", range(12))
def test_every_request_has_its_whole_text_whenever_links_are_cut(seed: int, one_sided: bool, in_place: bool) -> None:
    random = Random(seed)
    workers = random.choice(("p0 d0", "p0 p1 d0", "p0 d0 d1"))
    world = World(workers, one_sided=one_sided, in_place=in_place, cost=SLOW_WIRE, num_blocks=40)
    for _ in range(8):
        world.ask(1 + random.random() * 0.5, [random.randint(0, 2), *range(random.randint(0, 40))], 12)
    names = workers.split()
    for _ in range(3):
        source, target = (random.choice([name for name in names if name[0] == role]) for role in "pd")
        at_seconds = 1 + random.random() * 0.8
        world.runtime.cut(at_seconds, WorkerId(source), WorkerId(target), random.choice((0.001, 0.05, 0.5)))
    world.run()
    world.check_complete()
    assert any(isinstance(event, PeerLost) for _, _, event in world.events)


@modes
def test_without_a_link_the_decode_worker_prefills_and_over_the_next_one_it_does_not(
    one_sided: bool, in_place: bool
) -> None:
    world = World("p0 d0", one_sided=one_sided, in_place=in_place)
    world.runtime.cut(1.0, P0, D0, 5.0)
    during, after = world.ask(2.0, list(range(20)), 3), world.ask(8.0, list(range(50, 70)), 3)
    world.run()
    world.check_complete()
    ended = world.runtime.controller.ended
    assert (ended[during].prefill, ended[after].prefill) == (None, P0)
    assert ended[during].epoch == ended[after].epoch == 0
    rates = [event.bytes_per_second for _, _, event in world.events if isinstance(event, LinkMeasured)]
    assert [rate > 0 for rate in rates] == [True, False, True]
    ups = [event for _, who, event in world.events if who == P0 and isinstance(event, PeerUp)]
    assert [up.link for up in ups] == [0, 1]
    if in_place:
        assert ups[0].window != ups[1].window, "whoever still knows the old numbers must not reach the new blocks"


def test_cells_are_copied_where_one_side_has_no_window_into_the_other() -> None:
    """The decode worker has addresses for the pool of one prefill worker, each of those for its pool."""
    controller = ControllerConfig(local_prefill="fallback", policy="round_robin")
    world = World("p0 p1 d0", in_place=True, most_windows=1, controller=controller)
    requests = [world.ask(1.0 + number, [number, *range(30)], 3) for number in range(4)]
    world.run()
    world.check_complete()
    assert {world.runtime.controller.ended[request].prefill for request in requests} == {P0, WorkerId("p1")}
    assert "HandoffFailed" not in world.names("controller")
    copied = [event for _, who, event in world.events if who == D0 and isinstance(event, PeerFrame)]
    in_place = {event.peer: event.frame.in_place for event in copied if isinstance(event.frame, KvData)}
    assert in_place == {P0: True, WorkerId("p1"): False}
    assert world.contents.num_landings > 0


def test_in_place_no_bytes_cross_and_both_caches_are_one() -> None:
    world = World("p0 d0", in_place=True)
    first = world.ask(1.0, list(range(40)), 3)
    second = world.ask(3.0, [*range(40), 90, 91], 3)
    world.run()
    world.check_complete()
    assert world.contents.num_landings == 0
    assert world.runtime.workers[P0].engine.pool.num_cached == 0
    ended = world.runtime.controller.ended
    assert (ended[first].num_cached, ended[second].num_cached) == (0, 40)
