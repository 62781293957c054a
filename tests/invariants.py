"""What must hold in a virtual cluster after every event, and what must be left when all is done."""

from __future__ import annotations

from collections import defaultdict

from transload.control.exchange import MAX_TOMBSTONES
from transload.control.messages import RequestId, WorkerId
from transload.control.work import Work
from transload.runtime.virtual import CONTROLLER, VirtualRuntime


def check_ownership(runtime: VirtualRuntime) -> None:
    """An attempt at a request is in one phase, cluster-wide: one worker decodes it or will, one prefills it for the
    other, and never do both compute."""
    attempts: dict[tuple[RequestId, int], list[tuple[WorkerId, Work]]] = defaultdict(list)
    for name, worker in runtime.workers.items():
        for work in worker.engine._works.values():
            attempts[work.request.id, work.epoch].append((name, work))
    for (request_id, epoch), held in attempts.items():
        where = {name: (work.kind, work.phase) for name, work in held}
        at_home = [work for _, work in held if work.kind != "send"]
        away = [work for _, work in held if work.kind == "send"]
        assert len(at_home) <= 1, f"request {request_id} is at home twice: {where}"
        assert len(away) <= 1, f"request {request_id} is prefilled twice: {where}"
        if at_home and away and at_home[0].kind == "run":
            assert away[0].phase == "sent", f"request {request_id} is computed twice: {where}"
        tracked = runtime.controller.requests.get(request_id)
        if tracked is not None:
            assert epoch <= tracked.epoch
            if epoch == tracked.epoch:
                assert {name for name, _ in held} <= set(tracked.workers()), f"{where}, not {list(tracked.workers())}"


def check_links(runtime: VirtualRuntime) -> None:
    """No transfer goes on over a link that its worker knows to be lost."""
    for worker in runtime.workers.values():
        exchange = worker.engine.exchange
        for work in exchange._receiving.values():
            assert work.receiver is not None
            assert work.receiver.source in exchange._peers
        for work in exchange._sending.values():
            assert work.sender is not None
            assert work.sender.target in exchange._peers or work.phase == "draining" or work.failed
        assert {source for source, _ in exchange._quarantined.values()} <= set(exchange._peers)


def check_bounds(runtime: VirtualRuntime) -> None:
    """Everything that grows with load has a limit."""
    controller = runtime.controller
    num_recovered = sum(tracked.epoch > 0 for tracked in controller.requests.values())
    assert controller.num_waiting <= controller.config.max_waiting + num_recovered
    assert len(controller.ended) <= controller.config.keep_ended
    for tracked in controller.requests.values():
        assert len(tracked.pending) <= tracked.request.max_tokens
    for view in controller.views.values():
        assert len(view.committed_blocks) <= view.max_batch
        assert sum(view.committed_blocks.values()) <= view.num_blocks or len(view.committed_blocks) == 1
        assert len(view.cached) <= view.num_blocks
    assert {pair for pair in controller.links if not set(pair) <= set(controller.views)} == set(), "a link to nobody"
    deadlines = {key for owner, key in runtime._timers if owner == CONTROLLER}
    wanted = {f"deadline/{request_id}" for request_id in controller.requests}
    assert deadlines <= wanted, "a timer of a request that has ended"
    assert len(wanted - deadlines) <= 1, "a request without a deadline"  # one may be firing just now
    for worker in runtime.workers.values():
        assert len(worker.engine.exchange._tombstones) <= MAX_TOMBSTONES


def check_quiescent(runtime: VirtualRuntime) -> None:
    """Nobody holds anything any more."""
    controller = runtime.controller
    assert not controller.requests
    assert controller.num_waiting == 0
    for view in controller.views.values():
        assert not view.committed_blocks
        assert not view.prefill_tokens
    for name, worker in runtime.workers.items():
        engine = worker.engine
        assert engine.is_idle, f"{name} still holds something"
        assert engine.pool.num_referenced == 0
        assert not engine._waiting
        assert not engine._running
        assert not worker.permissions
        assert worker.backlog is None
        view_of = controller.views.get(name)
        if view_of is not None:
            assert view_of.cached == set(engine.pool._by_key), "the router believes in another cache"
    for link in runtime.links.values():
        assert not link.queue
        assert link.current is None
        assert not link.drains
    assert not runtime._timers
