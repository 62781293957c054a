"""The fault schedules can fail: each of these mistakes, made on purpose, is found by one of the first of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from tests.schedules import build, draw, judge, judge_calm, play, play_calm
from tests.world import Check
from transload.control.blocks import BlockPool
from transload.control.engine import Engine
from transload.control.exchange import Exchange
from transload.control.handoff import KvReceiver, KvSender, Lease
from transload.control.messages import KvAbort, KvData, SendFrame, Token
from transload.control.tracking import Tracked
from transload.control.work import Work

MOST_SCHEDULES = 250
NUM_COMPARED = 25
Break = Callable[[pytest.MonkeyPatch], None]
MISTAKES: dict[str, Break] = {}


def mistake(make: Break) -> Break:
    MISTAKES[make.__name__] = make
    return make


def wrap(patch: pytest.MonkeyPatch, owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    """Have `wrapper(original, self, ...)` run in place of a method."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda self, *args, **named: wrapper(original, self, *args, **named))


@mistake
def checksums_are_not_compared(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch,
        KvReceiver,
        "take_frame",
        lambda original, self, frame, _, now: original(self, frame, frame.checksum, now),
    )


@mistake
def a_request_runs_before_all_has_come(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KvReceiver, "verified", property(lambda self: self.outputs is not None))


@mistake
def nothing_is_put_aside(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch,
        Exchange,
        "_close_receive",
        lambda original, self, work, *, may_be_written: original(self, work, may_be_written=False),
    )


@mistake
def blocks_are_free_before_their_sends_have_ended(patch: pytest.MonkeyPatch) -> None:
    def abort_send(original: Callable[..., None], self: Exchange, work: Work) -> None:
        original(self, work)
        self._pool.release(work.blocks)
        work.blocks = []

    wrap(patch, Exchange, "abort_send", abort_send)


@mistake
def a_cancelled_request_keeps_its_blocks(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, Engine, "_cancel", lambda original, self, event, now: self._works.pop(event.request, None))


@mistake
def blocks_are_free_while_a_step_uses_them(patch: pytest.MonkeyPatch) -> None:
    def drop(original: Callable[..., None], self: Engine, work: Work, reason: str) -> None:
        original(self, work, reason)
        if work.in_step and work.sender is None:
            self.pool.release(work.blocks)
            work.blocks = []

    wrap(patch, Engine, "_drop", drop)


@mistake
def an_abort_is_not_answered(patch: pytest.MonkeyPatch) -> None:
    def take_stray(original: Callable[..., None], self: Exchange, peer: str, frame: object) -> None:
        if not isinstance(frame, KvAbort):
            original(self, peer, frame)

    wrap(patch, Exchange, "_take_stray", take_stray)


@mistake
def leases_never_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lease, "is_expired", property(lambda self: False))


@mistake
def senders_do_not_renew(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, Exchange, "_tick_senders", lambda original, self, passed: [])


@mistake
def a_frame_is_copied_from_the_wrong_blocks(patch: pytest.MonkeyPatch) -> None:
    def layers_ready(original: Callable[..., None], self: Exchange, work: Work, *args: int) -> None:
        original(self, work, *args)
        last = self._out[-1] if self._out else None
        if isinstance(last, SendFrame) and isinstance(last.frame, KvData):
            self._out[-1] = msgspec.structs.replace(last, source_blocks=last.source_blocks[::-1])

    wrap(patch, Exchange, "layers_ready", layers_ready)


@mistake
def the_last_block_is_not_sent(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, KvSender, "frame", lambda original, self, lo, hi, end, size: original(self, lo, hi, end - 1, size))


@mistake
def blocks_can_be_found_before_they_are_full(patch: pytest.MonkeyPatch) -> None:
    def register(original: Callable[..., None], self: Engine, work: Work) -> None:
        original(self, work)
        following = work.num_registered
        if following < min(len(work.known_keys), len(work.blocks)):
            self.pool.register(work.blocks[following], work.known_keys[following])

    wrap(patch, Engine, "_register_blocks", register)


@mistake
def an_evicted_block_can_still_be_found(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockPool, "_forget_key", lambda self, block: None)


@mistake
def a_preempted_request_forgets_a_token(patch: pytest.MonkeyPatch) -> None:
    def restart(original: Callable[..., None], self: Work) -> None:
        original(self)
        if self.num_outputs:
            self.tokens.pop()
            self.num_outputs -= 1
            self.num_known -= 1

    wrap(patch, Work, "restart", restart)


@mistake
def tokens_of_an_earlier_attempt_count(patch: pytest.MonkeyPatch) -> None:
    def take_token(original: Callable[..., list[Token]], self: Tracked, token: Token) -> list[Token]:
        epoch, self.epoch = self.epoch, token.epoch
        ready = original(self, token)
        self.epoch = epoch
        return ready

    wrap(patch, Tracked, "take_token", take_token)


def found_at(seed: int, check: Check) -> tuple[str, int] | None:
    """What kind of failure a schedule ends in, and after how many events."""
    world = build(draw(seed), check)
    try:
        world.run()
        judge(world)
    except (AssertionError, LookupError) as error:
        return type(error).__name__, len(world.events)
    return None


def is_found(seed: int) -> bool:
    try:
        judge(play(seed))
        if seed % 4 == 0:
            judge_calm(play_calm(seed))
    except (AssertionError, LookupError):
        return True
    return False


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_made_on_purpose_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MISTAKES[name](monkeypatch)
    assert any(is_found(seed) for seed in range(MOST_SCHEDULES))


@pytest.mark.parametrize("name", MISTAKES)
def test_looking_at_what_has_changed_finds_a_mistake_at_the_event_at_which_looking_at_everything_does(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    MISTAKES[name](monkeypatch)
    for seed in range(NUM_COMPARED):
        assert found_at(seed, "changed") == found_at(seed, "everything")
