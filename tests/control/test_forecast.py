"""When a request that comes now would have its first token."""

from __future__ import annotations

import pytest

from transload.control.forecast import first_token_seconds
from transload.control.messages import Load, Request, RequestId, Role, WorkerId, WorkerJoined
from transload.control.views import WorkerView


def view(name: str, role: Role, assigned: int = 0) -> WorkerView:
    """A worker that prefills 1,000 tokens a second and has so many to do."""
    made = WorkerView(WorkerJoined(WorkerId(name), 1, role, role, 1000, 16, 1, 64))
    for _ in range(200):
        for tokens in (100, 400):
            made.take_load(Load(made.worker, 1, 0, 0, 1000, 0, 0, 0, 1000, 0, tokens / 1000, 1, tokens, 0, 1))
    if assigned:
        made.commit(Request(RequestId(1), assigned, 10), assigned + 10, assigned)
    return made


def test_idle_workers_take_its_own_prefill() -> None:
    both = [view("p", "prefill"), view("d", "decode")]
    assert first_token_seconds(500, [], both, 9.0) == pytest.approx(0.5, rel=0.05)


def test_what_is_ahead_is_dealt_out_to_all_who_prefill() -> None:
    one = first_token_seconds(500, [1000, 1000], [view("p", "prefill", 1000)], 0.0)
    two = first_token_seconds(500, [1000, 1000], [view("p", "prefill", 1000), view("q", "prefill")], 0.0)
    assert one == pytest.approx(3.5, rel=0.05)
    assert two == pytest.approx(2.0, rel=0.05)


def test_where_places_to_decode_are_short_the_pace_of_service_counts() -> None:
    assert first_token_seconds(100, [10, 10], [view("a", "aggregated")], 2.0) == pytest.approx(6.1, rel=0.05)


def test_nobody_there_is_no_estimate() -> None:
    assert first_token_seconds(100, [], [], 2.0) == 0.0
