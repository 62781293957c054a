"""What must hold in a virtual cluster after every event, and what must be left when all is done."""

from __future__ import annotations

from functools import cache

from transload.control.exchange import MAX_TOMBSTONES
from transload.control.messages import RequestId, WorkerId
from transload.control.work import Work
from transload.runtime.virtual import CONTROLLER, VirtualRuntime


def check_ownership(runtime: VirtualRuntime, changed: WorkerId | None = None) -> None:
    """An attempt at a request is in one phase, cluster-wide: one worker decodes it or will, one prefills it for the
    other, and never do both compute. `changed`: the only machine whose insides may have changed since all of it held;
    then what does not hang on them is left out."""
    for name, worker in runtime.workers.items():
        if changed is None or changed in (CONTROLLER, name):
            for work in worker.engine._works.values():
                _check_known(runtime, name, work)
                if changed != CONTROLLER:
                    _check_alone(runtime, name, work)


def _check_known(runtime: VirtualRuntime, holder: WorkerId, work: Work) -> None:
    """The controller knows of it, unless it has given the attempt up."""
    tracked = runtime.controller.requests.get(work.request.id)
    if tracked is not None:
        assert work.epoch <= tracked.epoch
        if work.epoch == tracked.epoch:
            assert holder in (tracked.decode, tracked.prefill), f"{holder}, not {list(tracked.workers())}"


def _check_alone(runtime: VirtualRuntime, holder: WorkerId, work: Work) -> None:
    """Nobody else holds of the same attempt what only one may hold."""
    request_id = work.request.id
    for name, worker in runtime.workers.items():
        other = worker.engine._works.get(request_id)
        if other is None or other is work or other.epoch != work.epoch:
            continue
        where = {holder: (work.kind, work.phase), name: (other.kind, other.phase)}
        assert "send" in (work.kind, other.kind), f"request {request_id} is at home twice: {where}"
        assert (work.kind, other.kind) != ("send", "send"), f"request {request_id} is prefilled twice: {where}"
        home, away = (other, work) if work.kind == "send" else (work, other)
        if home.kind == "run":
            assert away.phase == "sent", f"request {request_id} is computed twice: {where}"


def check_links(runtime: VirtualRuntime, changed: WorkerId | None = None) -> None:
    """No transfer goes on over a link that its worker knows to be lost. Of all workers, or of one."""
    for name, worker in runtime.workers.items():
        if changed is not None and name != changed:
            continue
        exchange = worker.engine.exchange
        for work in exchange._receiving.values():
            assert work.receiver is not None
            assert work.receiver.source in exchange._peers
        for work in exchange._sending.values():
            assert work.sender is not None
            assert work.sender.target in exchange._peers or work.phase == "draining" or work.failed
        for source, _ in exchange._quarantined.values():
            assert source in exchange._peers
        assert len(exchange._tombstones) <= MAX_TOMBSTONES


def check_bounds(runtime: VirtualRuntime) -> None:
    """Everything of the controller's that grows with load has a limit."""
    controller = runtime.controller
    num_recovered = sum([tracked.epoch > 0 for tracked in controller.requests.values()])
    assert controller.num_waiting <= controller.config.max_waiting + num_recovered
    assert len(controller.ended) <= controller.config.keep_ended
    for tracked in controller.requests.values():
        assert len(tracked.pending) <= tracked.request.max_tokens
    views = controller.views
    for view in views.values():
        committed = view.committed_blocks
        assert len(committed) <= view.max_batch
        assert len(committed) <= 1 or sum(committed.values()) <= view.num_blocks
        assert len(view.cached) <= view.num_blocks
    for source, target in controller.links:
        assert source in views, "a link from nobody"
        assert target in views, "a link to nobody"
    num_deadlines = 0
    for owner, key in runtime._timers:
        if owner == CONTROLLER:
            num_deadlines += 1
            assert _request_of(key) in controller.requests, "a timer of a request that has ended"
    assert len(controller.requests) - num_deadlines <= 1, "a request without a deadline"  # one may be firing just now


@cache
def _request_of(key: str) -> RequestId:
    """Of the timer of a request's deadline."""
    return RequestId(int(key.removeprefix("deadline/")))


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
