"""What attention and FFN workers say of feed-forward calls, counted: from their totals to `/metrics`.

A worker reports totals since it began, once a second; a new process begins anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transload.control.messages import WorkerId
from transload.server.metrics import Metrics


class FfnFeed:
    """Call it with every report of a worker."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._totals: dict[WorkerId, Mapping[str, float]] = {}
        self._hops: dict[WorkerId, Sequence[int]] = {}

    def __call__(self, worker: WorkerId, totals: Mapping[str, float], hops: Sequence[int]) -> None:
        before, hops_before = self._totals.get(worker, {}), self._hops.get(worker, ())
        if any(totals.get(name, 0.0) < before.get(name, 0.0) for name in ("calls", "steps", "up_seconds")):
            before, hops_before = {}, ()
        self._totals[worker], self._hops[worker] = totals, tuple(hops)
        more = {name: value - before.get(name, 0.0) for name, value in totals.items()}
        if "up_seconds" in totals:
            self._computed(worker, more)
        else:
            self._called(worker, more)
            known = [*hops_before, *[0] * (len(hops) - len(hops_before))]
            new = [now - then for now, then in zip(hops, known, strict=True)]
            self._metrics.ffn_hops.add_counts(new, more.get("hop_seconds", 0.0))

    def _called(self, worker: WorkerId, more: Mapping[str, float]) -> None:
        metrics = self._metrics
        metrics.ffn_calls.add(more.get("calls", 0.0), worker)
        metrics.ffn_rows.add(more.get("rows", 0.0), worker)
        metrics.ffn_retries.add(more.get("retries", 0.0), worker)
        metrics.ffn_fallbacks.add(more.get("computed_here", 0.0), worker)
        metrics.ffn_exposed.add(more.get("exposed_seconds", 0.0), worker)
        metrics.ffn_steps.add(more.get("step_seconds", 0.0), worker)

    def _computed(self, worker: WorkerId, more: Mapping[str, float]) -> None:
        metrics = self._metrics
        metrics.ffn_computed_rows.add(more.get("rows", 0.0), worker)
        metrics.ffn_busy.add(more.get("busy_seconds", 0.0), worker)
        if more["up_seconds"] > 0:
            metrics.ffn_busy_share.set(min(1.0, more.get("busy_seconds", 0.0) / more["up_seconds"]), worker)
