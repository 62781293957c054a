"""A timeline in the trace event format, which https://ui.perfetto.dev and chrome://tracing open.

Workers are processes, their steps slices, handoffs slices on both sides joined by a flow, requests nested async slices,
what a worker holds counters. The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from transload.errors import DeploymentError
from transload.study.timeline import Timeline, TransferSpan
from transload.units import format_bytes

TraceEvent = dict[str, Any]
REQUESTS_PID = 1
STEPS_TID = 1
FIRST_LANE_TID = 10
_STEP_COLORS = {"prefill": "thread_state_iowait", "decode": "thread_state_running", "mixed": "thread_state_runnable"}


def trace_events(timeline: Timeline, *, simulated: bool, name: str = "") -> dict[str, Any]:
    """The JSON object. Events are in order of time."""
    pids = {worker: pid for pid, worker in enumerate(_workers(timeline), REQUESTS_PID + 1)}
    events = [
        *_steps(timeline, pids),
        *_transfers(timeline, pids),
        *_requests(timeline),
        *_counters(timeline, pids),
        *_marks(timeline, pids),
    ]
    events.sort(key=lambda event: event["ts"])  # stable: what begins or ends together keeps its nesting
    label = "simulated" if simulated else "measured"
    return {
        "displayTimeUnit": "ms",
        "otherData": {"name": name, "kind": label, "steps left out": str(timeline.num_steps_left_out)},
        "traceEvents": [*_names(timeline, pids, label), *events],
    }


def write_trace(timeline: Timeline, path: str | Path, *, simulated: bool, name: str = "") -> int:
    """Write it and return the number of events. Raises `DeploymentError` if the file cannot be written."""
    trace = trace_events(timeline, simulated=simulated, name=name)
    try:
        Path(path).write_bytes(msgspec.json.encode(trace))
    except OSError as problem:
        raise DeploymentError(f"{path}: cannot write the trace: {problem.strerror}") from None
    return len(trace["traceEvents"])


def _workers(timeline: Timeline) -> list[str]:
    seen = dict.fromkeys(timeline.pools)
    seen.update(dict.fromkeys(step.worker for step in timeline.steps))
    for transfer in timeline.transfers:
        seen.update(dict.fromkeys(end for end in (transfer.source, transfer.target) if end is not None))
    seen.update(dict.fromkeys(mark.worker for mark in timeline.marks))
    return list(seen)


def _names(timeline: Timeline, pids: dict[str, int], label: str) -> Iterator[TraceEvent]:
    yield _metadata("process_name", REQUESTS_PID, {"name": f"requests ({label})"})
    yield _metadata("process_sort_index", REQUESTS_PID, {"sort_index": 0})
    for index, (worker, pid) in enumerate(pids.items(), 1):
        pool, role = timeline.pools.get(worker, ("", ""))
        yield _metadata("process_name", pid, {"name": f"{worker} ({label})"})
        yield _metadata("process_labels", pid, {"labels": f"pool {pool}, {role}" if role else ""})
        yield _metadata("process_sort_index", pid, {"sort_index": index})
        yield _metadata("thread_name", pid, {"name": "steps"}, STEPS_TID)


def _metadata(name: str, pid: int, args: dict[str, Any], tid: int = 0) -> TraceEvent:
    return {"name": name, "ph": "M", "ts": 0, "pid": pid, "tid": tid, "args": args}


def _steps(timeline: Timeline, pids: dict[str, int]) -> Iterator[TraceEvent]:
    free_at: dict[str, float] = {}
    for step in timeline.steps:
        # A step's end is when it was heard of; slices of one thread may not overlap by that little.
        start = max(step.start_seconds, free_at.get(step.worker, 0.0))
        end = max(step.end_seconds, start)
        free_at[step.worker] = end
        yield {
            "name": step.kind,
            "cat": "step",
            "ph": "X",
            "ts": _microseconds(start),
            "dur": _microseconds(end) - _microseconds(start),
            "pid": pids[step.worker],
            "tid": STEPS_TID,
            "cname": _STEP_COLORS[step.kind],
            "args": {
                "prefill tokens": step.num_prefill_tokens,
                "decoding requests": step.num_decode,
                "requests": step.num_requests,
                "steps": step.num_steps,
            },
        }


def _transfers(timeline: Timeline, pids: dict[str, int]) -> Iterator[TraceEvent]:
    """Both sides of each handoff. Several at once lie on lanes of their own."""
    lanes: dict[int, list[float]] = {}
    named: set[tuple[int, int]] = set()
    for flow, transfer in enumerate(timeline.transfers, 1):
        start = _microseconds(transfer.start_seconds)
        duration = _microseconds(transfer.end_seconds) - start
        sides = [(transfer.source, "out"), (transfer.target, "in")]
        for worker, side in sides:
            if worker is None:
                continue
            pid = pids[worker]
            tid = FIRST_LANE_TID + _lane(lanes.setdefault(pid, []), transfer)
            if (pid, tid) not in named:
                named.add((pid, tid))
                yield _metadata("thread_name", pid, {"name": f"KV transfers {tid - FIRST_LANE_TID + 1}"}, tid)
            common = {"cat": "transfer", "pid": pid, "tid": tid}
            peer = transfer.target if side == "out" else transfer.source
            yield {
                **common,
                "name": f"KV {side}, request {transfer.request}",
                "ph": "X",
                "ts": start,
                "dur": duration,
                "args": {
                    "peer": peer or "unknown",
                    "size": format_bytes(transfer.num_bytes),
                    "bytes": transfer.num_bytes,
                    "frames": transfer.num_frames,
                    "epoch": transfer.epoch,
                },
            }
            if transfer.source is not None:
                arrow = {**common, "name": "handoff", "id": flow}
                if side == "out":
                    yield {**arrow, "ph": "s", "ts": start}
                else:
                    # Inside the slice it points at, not on its edge.
                    yield {**arrow, "ph": "f", "bp": "e", "ts": round(start + duration / 2, 3)}


def _lane(free_at: list[float], transfer: TransferSpan) -> int:
    """The first lane that is free when this begins; taken until it ends."""
    for lane, free in enumerate(free_at):
        if free <= transfer.start_seconds:
            free_at[lane] = transfer.end_seconds
            return lane
    free_at.append(transfer.end_seconds)
    return len(free_at) - 1


def _requests(timeline: Timeline) -> Iterator[TraceEvent]:
    for request in timeline.requests:
        common = {"cat": "request", "id": request.request, "pid": REQUESTS_PID, "tid": 0}
        outer = {**common, "name": f"request {request.request}"}
        yield {
            **outer,
            "ph": "b",
            "ts": _microseconds(request.start_seconds),
            "args": {
                "prompt tokens": request.num_prompt_tokens,
                "output tokens": request.num_outputs,
                "end": request.end,
            },
        }
        for stage in request.stages:
            inner = {**common, "name": stage.name}
            args = {} if stage.worker is None else {"worker": stage.worker}
            yield {**inner, "ph": "b", "ts": _microseconds(stage.start_seconds), "args": args}
            yield {**inner, "ph": "e", "ts": _microseconds(stage.end_seconds)}
        yield {**outer, "ph": "e", "ts": _microseconds(request.end_seconds)}


def _counters(timeline: Timeline, pids: dict[str, int]) -> Iterable[TraceEvent]:
    for load in timeline.loads:
        if load.worker not in pids:
            continue
        common = {"ph": "C", "ts": _microseconds(load.at_seconds), "pid": pids[load.worker], "tid": 0}
        yield {**common, "name": "requests", "args": {"running": load.num_running, "waiting": load.num_waiting}}
        yield {**common, "name": "KV blocks used, %", "args": {"used": round(100 * load.kv_used_share, 3)}}


def _marks(timeline: Timeline, pids: dict[str, int]) -> Iterator[TraceEvent]:
    for mark in timeline.marks:
        yield {
            "name": mark.name,
            "cat": "event",
            "ph": "i",
            "s": "p",
            "ts": _microseconds(mark.at_seconds),
            "pid": pids[mark.worker],
            "tid": STEPS_TID,
        }


def _microseconds(seconds: float) -> float:
    """Three decimals: a nanosecond. Every time goes through here, so equal times stay equal."""
    return round(seconds * 1e6, 3)
