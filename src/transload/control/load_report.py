"""A worker's word on how it is: after steps, and when something has changed while it was idle. Never twice the same."""

from __future__ import annotations

from collections import deque

from transload.control.blocks import BlockPool
from transload.control.messages import Load, WorkerId
from transload.control.work import Work

NO_STEP = (0, 0, 0)


class LoadReport:
    """Makes the `Load` messages of one worker."""

    def __init__(self, worker: WorkerId, pool: BlockPool) -> None:
        self._worker = worker
        self._pool = pool
        self._last: tuple[int, ...] = ()

    def make(
        self,
        num_running: int,
        waiting: deque[Work],
        *,
        holds_nothing: bool,
        step_seconds: float = 0.0,
        shape: tuple[int, int, int] = NO_STEP,
        num_steps: int = 1,
    ) -> Load | None:
        """None: no step to tell of, and nothing has changed. `shape`: requests, prefill and decode tokens of a step."""
        pool = self._pool
        waiting_tokens = sum([work.num_known - work.num_computed for work in waiting]) if waiting else 0
        free, cached, quarantined, total = pool.num_free, pool.num_cached, pool.num_quarantined, pool.num_blocks
        referenced = total - free - cached - quarantined
        leaked = referenced if holds_nothing else 0
        state = (num_running, len(waiting), waiting_tokens, free, referenced, cached, quarantined, total, leaked)
        if not step_seconds and state == self._last:
            return None
        self._last = state
        return Load(self._worker, *state, step_seconds, *shape, num_steps)
