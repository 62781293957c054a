"""What the controller believes of a worker: its room, its speed, its cache."""

from __future__ import annotations

import pytest

from tests.control.feeding import D0, a_request
from transload.control.messages import CacheChanged, Load, RequestId, WorkerJoined
from transload.control.views import WorkerView


def make_view(num_blocks: int = 10, max_batch: int = 3) -> WorkerView:
    return WorkerView(WorkerJoined(D0, 1, "decode", "decode", num_blocks, 4, 1024, max_batch))


def a_load(seconds: float, num_prefill: int, num_decode: int) -> Load:
    return Load(D0, 1, 0, 0, 5, 5, 0, 0, 10, 0, seconds, 1, num_prefill, num_decode)


def test_room_is_counted_in_whole_blocks_and_places_in_the_batch() -> None:
    view = make_view()
    view.commit(a_request(1, 6), 9, 6)
    assert view.committed_blocks == {1: 3}
    assert view.has_room(28)
    assert not view.has_room(29)
    view.commit(a_request(2, 6), 4, 6)
    assert view.has_room(4)
    view.commit(a_request(3, 6), 4, 6)
    assert not view.has_room(4)  # the batch is full
    view.release(RequestId(1))
    assert view.has_room(32)
    assert not view.has_room(33)


def test_an_empty_worker_takes_anything_it_can_hold() -> None:
    view = make_view()
    assert view.has_room(1000)  # an estimate: what the request may really need is asked with `holds`
    assert view.holds(40)
    assert not view.holds(41)


def test_a_request_that_is_committed_again_is_counted_once() -> None:
    view = make_view()
    view.commit(a_request(1, 6), 20, 0)
    view.commit(a_request(1, 6), 8, 0)
    assert view.has_room(32)
    view.release(RequestId(1))
    view.release(RequestId(1))
    assert view.has_room(40)
    assert not view.committed_blocks


def test_prompts_that_wait_make_the_queue_long() -> None:
    view = make_view()
    assert view.queue_seconds() == 0
    view.commit(a_request(1, 6), 9, 6)
    view.commit(a_request(2, 6), 9, 4)
    assert view.queue_seconds() == pytest.approx(10 * view.prefill_rate.seconds_per_unit)
    view.release(RequestId(1))
    assert view.queue_seconds() == pytest.approx(4 * view.prefill_rate.seconds_per_unit)


def test_the_cache_is_followed_change_by_change() -> None:
    view = make_view()
    view.take_cache_change(CacheChanged(D0, 1, (b"a", b"b", b"c"), ()))
    view.take_cache_change(CacheChanged(D0, 2, (b"d",), (b"b",)))
    assert view.cached == {b"a", b"c", b"d"}
    assert view.num_cached_tokens((b"a", b"b", b"c")) == 4  # what comes after a gap is of no use
    assert view.num_cached_tokens((b"a", b"c", b"d")) == 12


def test_after_a_lost_change_only_what_is_told_anew_is_believed() -> None:
    view = make_view()
    view.take_cache_change(CacheChanged(D0, 1, (b"a", b"b"), ()))
    view.take_cache_change(CacheChanged(D0, 3, (b"c",), (b"b",)))
    assert view.cached == {b"c"}
    view.take_cache_change(CacheChanged(D0, 4, (b"a",), ()))
    assert view.cached == {b"a", b"c"}


def test_steps_teach_the_rate_of_what_they_were_made_of() -> None:
    view = make_view()
    before = view.prefill_rate.seconds(200), view.decode_rate.seconds(2)
    view.take_load(a_load(0.0, 100, 0))  # nothing was computed: no step
    view.take_load(a_load(9.0, 1, 1))  # half and half says nothing about either
    assert (view.prefill_rate.seconds(200), view.decode_rate.seconds(2)) == before
    for _ in range(50):
        view.take_load(a_load(0.5, 0, 2))
    assert view.decode_rate.seconds(2) == pytest.approx(0.5, rel=0.05)
    assert view.prefill_rate.seconds(200) == before[0]
    for _ in range(50):
        view.take_load(a_load(3.0, 199, 1))
    assert view.prefill_rate.seconds(199) == pytest.approx(3.0, rel=0.05)
