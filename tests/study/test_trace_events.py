"""Traces follow the trace event format: what a viewer relies on is checked here, event by event."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.study.test_timeline import played
from transload.errors import DeploymentError
from transload.study.trace_events import trace_events, write_trace

REQUIRED = {
    "M": {"name", "pid", "args"},
    "X": {"name", "ts", "dur", "pid", "tid"},
    "b": {"name", "cat", "id", "ts", "pid"},
    "e": {"name", "cat", "id", "ts", "pid"},
    "s": {"name", "cat", "id", "ts", "pid", "tid"},
    "f": {"name", "cat", "id", "ts", "pid", "tid", "bp"},
    "C": {"name", "ts", "pid", "args"},
    "i": {"name", "ts", "pid", "tid", "s"},
}


def check_format(trace: dict[str, Any]) -> None:
    """Raises if a viewer would complain, or show something else than is meant."""
    events = trace["traceEvents"]
    for event in events:
        assert event["ph"] in REQUIRED, event
        assert REQUIRED[event["ph"]] <= event.keys(), event
        assert event.get("dur", 0) >= 0, event
    times = [event["ts"] for event in events if event["ph"] != "M"]
    assert times == sorted(times)
    assert min(times) >= 0
    named = {event["pid"] for event in events if event["name"] == "process_name"}
    assert {event["pid"] for event in events} <= named
    check_slices(events)
    check_flows(events)
    check_nesting(events)


def check_slices(events: list[dict[str, Any]]) -> None:
    busy_until: dict[tuple[int, int], float] = defaultdict(float)
    for event in events:
        if event["ph"] == "X":
            thread = event["pid"], event["tid"]
            assert event["ts"] >= busy_until[thread] - 1e-3, f"overlaps on {thread}: {event}"
            busy_until[thread] = event["ts"] + event["dur"]


def check_flows(events: list[dict[str, Any]]) -> None:
    """Each start has one end, not earlier, and both lie in a slice of their thread."""
    starts = {event["id"]: event for event in events if event["ph"] == "s"}
    ends = {event["id"]: event for event in events if event["ph"] == "f"}
    assert len(starts) == sum(event["ph"] == "s" for event in events)
    assert starts.keys() == ends.keys()
    slices = [event for event in events if event["ph"] == "X"]
    for flow, start in starts.items():
        end = ends[flow]
        assert start["ts"] <= end["ts"]
        for tip in (start, end):
            assert any(
                (part["pid"], part["tid"]) == (tip["pid"], tip["tid"])
                and part["ts"] <= tip["ts"] <= part["ts"] + part["dur"]
                for part in slices
            ), tip


def check_nesting(events: list[dict[str, Any]]) -> None:
    open_slices: dict[tuple[str, int], list[str]] = defaultdict(list)
    for event in events:
        stack = open_slices[event.get("cat", ""), event.get("id", 0)]
        if event["ph"] == "b":
            stack.append(event["name"])
        elif event["ph"] == "e":
            assert stack.pop() == event["name"]
    assert not any(open_slices.values())


@pytest.mark.parametrize("workers", ["p0 d0", "a0 a1", "p0 p1 d0 d1"])
def test_a_trace_follows_the_format(workers: str) -> None:
    _, timeline = played(workers, 25)
    trace = trace_events(timeline, simulated=True)
    check_format(trace)
    phases = {event["ph"] for event in trace["traceEvents"]}
    assert {"M", "X", "b", "e", "C"} <= phases
    assert ("s" in phases) == ("d0" in workers)


def test_a_trace_with_a_lost_worker_follows_the_format() -> None:
    _, timeline = played("p0 d0 d1", 25, kill="d0")
    trace = trace_events(timeline, simulated=True)
    check_format(trace)
    assert any(event["ph"] == "i" for event in trace["traceEvents"])


def test_the_trace_says_whether_it_was_simulated() -> None:
    _, timeline = played()
    for simulated, word in ((True, "simulated"), (False, "measured")):
        trace = trace_events(timeline, simulated=simulated)
        names = [event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"]
        assert names == [f"requests ({word})", f"d0 ({word})", f"p0 ({word})"]
        assert trace["otherData"]["kind"] == word


def test_a_written_trace_is_the_same_json(tmp_path: Path) -> None:
    _, timeline = played()
    count = write_trace(timeline, tmp_path / "trace.json", simulated=True)
    read = json.loads((tmp_path / "trace.json").read_text())
    assert len(read["traceEvents"]) == count
    assert read == json.loads(json.dumps(trace_events(timeline, simulated=True)))


def test_a_trace_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    _, timeline = played()
    with pytest.raises(DeploymentError, match="cannot write the trace"):
        write_trace(timeline, tmp_path / "nowhere" / "trace.json", simulated=True)
