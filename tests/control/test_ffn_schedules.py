"""Feed-forwards elsewhere under seeded faults: messages lost, late, twice and out of order, workers killed and stalled.

`tests/afd_world.py` plays a schedule and says what must always hold. Here: many seeds, that they see what they should,
and that mistakes made on purpose are found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest

from tests.afd_world import Ffn, Rows, World, draw_plan
from transload.control.ffn_client import FfnClient, FfnClientConfig
from transload.control.ffn_messages import (
    BatchDone,
    CallKey,
    FfnAnswer,
    FfnReply,
    FfnRequest,
    Piece,
    RequestCame,
    RunBatch,
    SessionId,
    SessionUp,
    TakeReply,
    TimeCame,
)
from transload.control.ffn_server import FfnServer, FfnServerConfig

NUM_SCHEDULES = 320
NUM_GROUPS = 8


def play(seeds: Iterable[int], **machines: Any) -> None:
    """Play schedules; `machines` are `World`'s."""
    for seed in seeds:
        World(seed, **machines).run()


@pytest.mark.parametrize("group", range(NUM_GROUPS))
def test_every_schedule_ends_with_the_right_rows_and_in_time(group: int) -> None:
    play(range(group, NUM_SCHEDULES, NUM_GROUPS))


def test_a_schedule_is_the_same_every_time() -> None:
    first, second = (World(17).run() for _ in range(2))
    assert (first.log, first.now, first.num_events) == (second.log, second.now, second.num_events)


def test_the_schedules_do_what_they_are_for() -> None:
    """Retries, late answers, busy and failing workers, losses, local computing and failed steps all occur."""
    seen: Counter[str] = Counter()
    for seed in range(80):
        world = World(seed).run()
        for attention in world.attention:
            for name in ("retries", "late", "dropped", "unknown", "busy", "errors", "lost_workers", "computed_here"):
                seen[name] += getattr(attention.client.counts, name)
            seen["failed steps"] += attention.num_failures
            seen["restarts"] += attention.lives - 1
        for ffn in world.ffn:
            seen["revivals"] += ffn.lives - 1
            seen["superseded"] += ffn.server.num_superseded
            seen["merged"] += ffn.server.num_requests > ffn.server.num_batches
    assert min(seen.values()) > 0, seen
    assert len(seen) == 13


def test_plans_differ_in_every_dimension() -> None:
    plans = [draw_plan(seed) for seed in range(200)]
    for name in ("attention_workers", "ffn_workers", "num_layers", "micro_batches", "pieces", "fallback", "credit"):
        assert len({getattr(plan, name) for plan in plans}) > 1, name


class _TakesTwice(FfnClient):
    """Takes an answer's rows whether or not they are there already."""

    def _take(self, attempt, *, is_open):  # type: ignore[no-untyped-def]
        super()._take(attempt, is_open=is_open)
        if is_open:
            self._out.append(TakeReply(attempt.request, tuple(piece for piece, _ in attempt.request.pieces)))


class _NeverGivesUp(FfnClient):
    """Has no deadline."""

    def __init__(self, config: FfnClientConfig) -> None:
        super().__init__(msgspec.structs.replace(config, deadline_seconds=1e6))


class _NeverAsksAgain(FfnClient):
    """Keeps a call of a worker that is gone for itself."""

    def _ask_again(self, call, attempt):  # type: ignore[no-untyped-def]
        pass


class _WaitsForever(FfnServer):
    """Waits for whom it expects, however long that takes."""

    def __init__(self, config: FfnServerConfig) -> None:
        super().__init__(msgspec.structs.replace(config, max_wait_seconds=1e3))


class _MergesLayers(FfnServer):
    """Runs whatever waits in one batch."""

    def _run(self, layer, group):  # type: ignore[no-untyped-def]
        super()._run(layer, list(self._waiting.values()))


@pytest.mark.parametrize("client", [_TakesTwice, _NeverGivesUp, _NeverAsksAgain])
def test_a_mistake_of_the_attention_side_is_found(client: type[FfnClient]) -> None:
    with pytest.raises(AssertionError, match="seed"):
        play(range(200), make_client=client)


@pytest.mark.parametrize("server", [_WaitsForever, _MergesLayers])
def test_a_mistake_of_the_ffn_side_is_found(server: type[FfnServer]) -> None:
    with pytest.raises(AssertionError, match="seed"):
        play(range(200), make_server=server)


def test_rows_under_another_key_are_found() -> None:
    """The driver looks rows up by key, so here they are swapped as they would be by one that does not."""

    class Swapping(World):
        def send_answer(self, ffn: Ffn, answer: FfnAnswer, rows: Rows | None) -> None:
            if isinstance(answer, FfnReply) and rows is not None:
                rows = {piece: tuple(value + 1 for value in values) for piece, values in rows.items()}
            super().send_answer(ffn, answer, rows)

    with pytest.raises(AssertionError, match="rows of another call"):
        [Swapping(seed).run() for seed in range(20)]


def test_a_timer_that_comes_at_the_very_time_is_enough() -> None:
    """The time it asks for and the time it looks at must be one number, or a driver that keeps time exactly spins."""
    for number in range(200):
        server = FfnServer(FfnServerConfig(num_layers=1, pieces=frozenset({Piece(0)})))
        now = 0.0137 * number
        for session in (1, 2):
            server.handle(SessionUp(SessionId(session)), now)
        server.handle(RequestCame(FfnRequest(CallKey(SessionId(1), 1, 0, 0, 1), ((Piece(0), 1),))), now)
        server.handle(BatchDone(1), now)
        waits = server.handle(RequestCame(FfnRequest(CallKey(SessionId(2), 1, 0, 0, 1), ((Piece(0), 1),))), now)
        assert waits == []
        due = server.due_at
        assert due is not None
        assert [type(command) for command in server.handle(TimeCame(), due)] == [RunBatch]
