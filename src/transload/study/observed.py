"""What pools and links did in a real run, from its timeline: the same numbers and series that a simulation records.

Owns the binning of what was observed. A worker counts as there from the first to the last second of the window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import msgspec

from transload.control.messages import Role
from transload.study.result import NUM_BINS, LinkResult, LinkSample, PoolResult, PoolSample
from transload.study.timeline import LoadPoint, Step, Timeline, TransferSpan


class Window(msgspec.Struct, frozen=True):
    """The part of a timeline that a run took, in seconds since the timeline began."""

    start_seconds: float
    end_seconds: float

    @property
    def seconds(self) -> float:
        return max(1e-9, self.end_seconds - self.start_seconds)

    @property
    def bin_seconds(self) -> float:
        return self.seconds / NUM_BINS

    def clip(self, start: float, end: float) -> tuple[float, float] | None:
        """In seconds since the window began; None if nothing of it is inside."""
        low, high = max(start, self.start_seconds), min(end, self.end_seconds)
        return (low - self.start_seconds, high - self.start_seconds) if high > low else None

    def spread(self, start: float, end: float) -> Iterator[tuple[int, float]]:
        """The bins that this stretch touches, and for how many seconds."""
        inside = self.clip(start, end)
        if inside is None:
            return
        low, high = inside
        wide = self.bin_seconds
        first, last = int(low / wide), min(NUM_BINS - 1, int(high / wide))
        for index in range(first, last + 1):
            overlap = min(high, (index + 1) * wide) - max(low, index * wide)
            if overlap > 0:
                yield index, overlap


def request_window(timeline: Timeline) -> Window:
    """From the first request that came to the last that ended."""
    if not timeline.requests:
        return Window(0.0, timeline.duration_seconds)
    return Window(
        min(request.start_seconds for request in timeline.requests),
        max(request.end_seconds for request in timeline.requests),
    )


def pool_results(timeline: Timeline, window: Window, chip: str) -> tuple[PoolResult, ...]:
    """One for each pool, by name. `chip`: what the machine calls itself."""
    pools: dict[str, list[str]] = {}
    for worker, (pool, _) in timeline.pools.items():
        pools.setdefault(pool, []).append(worker)
    return tuple(_pool(timeline, window, chip, pool, workers) for pool, workers in sorted(pools.items()))


def _pool(timeline: Timeline, window: Window, chip: str, pool: str, workers: list[str]) -> PoolResult:
    role: Role = timeline.pools[workers[0]][1]  # type: ignore[assignment]  # the controller was told it
    names = set(workers)
    steps = [
        step
        for step in timeline.steps
        if step.worker in names and window.clip(step.start_seconds, step.end_seconds) is not None
    ]
    scale = 1.0 / (window.bin_seconds * len(workers))
    busy, batch = [0.0] * NUM_BINS, [0.0] * NUM_BINS
    for step in steps:
        for index, seconds in window.spread(step.start_seconds, step.end_seconds):
            busy[index] += seconds * scale
            batch[index] += seconds * scale * step.num_requests
    loads = {worker: [point for point in timeline.loads if point.worker == worker] for worker in workers}
    waiting = _means(window, loads.values(), lambda point: float(point.num_waiting))
    kv_share = _means(window, loads.values(), lambda point: point.kv_used_share)
    step_seconds = sum(step.end_seconds - step.start_seconds for step in steps)
    return PoolResult(
        name=pool,
        role=role,
        chip=chip,
        num_workers=len(workers),
        num_chips=len(workers),
        busy_share=sum(busy) / NUM_BINS,
        mean_batch=_weighted(steps) / step_seconds if step_seconds else 0.0,
        num_steps=sum(step.num_steps for step in steps),
        num_prefill_tokens=sum(step.num_prefill_tokens for step in steps),
        num_decode_tokens=sum(step.num_decode * step.num_steps for step in steps),
        num_preemptions=sum(mark.worker in names and mark.name.endswith("preempted") for mark in timeline.marks),
        kv_tokens=sum(timeline.kv_tokens.get(worker, 0) for worker in workers),
        kv_share=sum(kv_share) / NUM_BINS,
        peak_kv_share=max((point.kv_used_share for points in loads.values() for point in points), default=0.0),
        series=tuple(
            PoolSample(
                seconds=index * window.bin_seconds,
                busy_share=min(1.0, busy[index]),
                batch=batch[index],
                waiting=waiting[index],
                kv_share=kv_share[index],
            )
            for index in range(NUM_BINS)
        ),
    )


def _weighted(steps: Iterable[Step]) -> float:
    return sum(step.num_requests * (step.end_seconds - step.start_seconds) for step in steps)


def _means(window: Window, workers: Iterable[list[LoadPoint]], value: Callable[[LoadPoint], float]) -> list[float]:
    """Bin by bin, the mean over time and workers of what holds from one point to the next."""
    bins = [0.0] * NUM_BINS
    histories = list(workers)
    scale = 1.0 / (window.bin_seconds * max(1, len(histories)))
    for points in histories:
        for point, until in zip(points, [*(later.at_seconds for later in points[1:]), window.end_seconds], strict=True):
            for index, seconds in window.spread(point.at_seconds, until):
                bins[index] += seconds * scale * value(point)
    return bins


def link_results(timeline: Timeline, window: Window) -> tuple[LinkResult, ...]:
    """One for each pair of pools that handed KV over. The bytes of a transfer count as evenly spread over its time."""
    pairs: dict[tuple[str, str], list[TransferSpan]] = {}
    for transfer in timeline.transfers:
        if transfer.source is None or window.clip(transfer.start_seconds, transfer.end_seconds) is None:
            continue
        source, target = timeline.pools.get(transfer.source), timeline.pools.get(transfer.target)
        if source is not None and target is not None:
            pairs.setdefault((source[0], target[0]), []).append(transfer)
    exposed = _exposed_seconds(timeline)
    return tuple(
        _link(window, source, target, transfers, exposed, ", ".join(sorted(timeline.transports)) or "unknown")
        for (source, target), transfers in sorted(pairs.items())
    )


def _link(
    window: Window,
    source: str,
    target: str,
    transfers: list[TransferSpan],
    exposed: dict[int, float],
    kind: str,
) -> LinkResult:
    bins = [0.0] * NUM_BINS
    for transfer in transfers:
        length = transfer.end_seconds - transfer.start_seconds
        for index, seconds in window.spread(transfer.start_seconds, transfer.end_seconds):
            bins[index] += transfer.num_bytes * seconds / length / window.bin_seconds
    return LinkResult(
        source=source,
        target=target,
        kind=kind,
        crosses="kv",
        num_transfers=len(transfers),
        num_bytes=sum(transfer.num_bytes for transfer in transfers),
        bytes_per_second_limit=None,
        busy_seconds=_union_seconds((transfer.start_seconds, transfer.end_seconds) for transfer in transfers),
        exposed_seconds=sum(exposed.get(transfer.request, 0.0) for transfer in transfers),
        wire_seconds=sum(transfer.end_seconds - transfer.start_seconds for transfer in transfers),
        series=tuple(
            LinkSample(seconds=index * window.bin_seconds, bytes_per_second=rate) for index, rate in enumerate(bins)
        ),
    )


def _exposed_seconds(timeline: Timeline) -> dict[int, float]:
    """By request: how long its decode worker waited for KV after the prompt was computed."""
    return {
        request.request: sum(
            stage.end_seconds - stage.start_seconds for stage in request.stages if stage.name == "transfer"
        )
        for request in timeline.requests
    }


def _union_seconds(spans: Iterable[tuple[float, float]]) -> float:
    total = 0.0
    until = float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
