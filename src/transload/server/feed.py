"""What passes through the controller, counted: the bridge from the machines' messages to `/metrics`."""

from __future__ import annotations

from transload.control.controller import Controller
from transload.control.messages import (
    ControllerCommand,
    ControllerEvent,
    HandoffFailed,
    KvVerified,
    Load,
    Preempted,
    RequestId,
    RestartWorker,
    WorkerGone,
    WorkerId,
    WorkerJoined,
)
from transload.server.metrics import Metrics


class MetricsFeed:
    """Call it with every event before, and every command after, the controller handles it.

    Requests and their tokens are counted by `call.py`, which knows what the caller got.
    """

    def __init__(self, metrics: Metrics, controller: Controller) -> None:
        self._metrics = metrics
        self._controller = controller
        self._pools: dict[str, set[WorkerId]] = {}

    def __call__(self, message: ControllerEvent | ControllerCommand, now: float) -> None:
        match message:
            case Load():
                self._load(message)
            case KvVerified():
                self._verified(message, now)
            case HandoffFailed(worker, request):
                self._metrics.transfer_done(self._transport(request, worker), 0, 0.0, 0.0, "failed")
            case Preempted(worker):
                self._metrics.request_preempted(worker)
            case WorkerJoined():
                self._joined(message)
            case WorkerGone():
                self._gone(message)
            case RestartWorker(worker):
                self._metrics.worker_restarted(worker)
            case _:
                pass

    def _joined(self, joined: WorkerJoined) -> None:
        """Its blocks are free. It says nothing of them itself before something has happened to it."""
        self._pools.setdefault(joined.pool, set()).add(joined.worker)
        self._count_workers()
        held = {"free": joined.num_blocks, "referenced": 0, "cached": 0, "quarantined": 0}
        self._metrics.set_blocks(joined.worker, held)
        self._metrics.set_leaked_blocks(joined.worker, 0)
        self._metrics.set_running(joined.worker, 0)

    def _gone(self, gone: WorkerGone) -> None:
        """What a process held has gone with it; unless another one has taken its place already."""
        view = self._controller.views.get(gone.worker)
        if view is not None and view.incarnation > gone.incarnation:
            return
        for workers in self._pools.values():
            workers.discard(gone.worker)
        self._count_workers()
        self._metrics.forget_worker(gone.worker)

    def _load(self, load: Load) -> None:
        metrics = self._metrics
        metrics.set_blocks(
            load.worker,
            {
                "free": load.blocks_free,
                "referenced": load.blocks_referenced,
                "cached": load.blocks_cached,
                "quarantined": load.blocks_quarantined,
            },
        )
        metrics.set_leaked_blocks(load.worker, load.blocks_leaked)
        metrics.set_running(load.worker, load.num_running)
        metrics.set_queue_length(self._controller.num_waiting)
        if load.step_seconds > 0:
            metrics.step_done(load.step_requests)

    def _verified(self, verified: KvVerified, now: float) -> None:
        tracked = self._controller.requests.get(verified.request)
        exposed = 0.0
        if tracked is not None and tracked.phase == "transferring":
            exposed = now - tracked.stages[-1].start
        transport = self._transport(verified.request, verified.worker)
        self._metrics.transfer_done(transport, verified.num_bytes, verified.wire_seconds, exposed)

    def _transport(self, request: RequestId, worker: WorkerId) -> str:
        controller = self._controller
        # a request whose first token was its last has ended before its KV cache has arrived
        tracked = controller.requests.get(request) or controller.ended.get(request)
        source = tracked.prefill if tracked is not None else None
        link = controller.links.get((source, worker)) if source is not None else None
        return link.transport if link is not None else "unknown"

    def _count_workers(self) -> None:
        for pool, workers in self._pools.items():
            self._metrics.set_workers_up(pool, len(workers))
