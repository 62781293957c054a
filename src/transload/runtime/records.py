"""A tracked request as a waterfall: where its time went."""

from __future__ import annotations

from itertools import pairwise

from transload.control.tracking import Stage as TrackedStage
from transload.control.tracking import Tracked
from transload.runtime.base import Stage, Waterfall


def waterfall(tracked: Tracked, now: float) -> Waterfall:
    """The stages so far; the running one ends now. Their seconds sum to the total, since each ends where the next
    begins."""
    end = tracked.ended_at if tracked.ended_at is not None else now
    last = TrackedStage("end", None, end)
    stages = tuple(
        Stage(
            name=stage.name,
            worker=stage.worker,
            start_seconds=stage.start - tracked.arrived_at,
            seconds=following.start - stage.start,
            detail=stage.detail,
        )
        for stage, following in pairwise([*tracked.stages, last])
    )
    return Waterfall(
        request=tracked.request.id,
        state=tracked.phase,
        decision=tracked.decision,
        epoch=tracked.epoch,
        num_prompt_tokens=tracked.request.num_prompt_tokens,
        num_cached_tokens=tracked.num_cached or 0,
        num_outputs=len(tracked.outputs),
        total_seconds=end - tracked.arrived_at,
        stages=stages,
    )
