"""The worker's machine, fed by hand: steps, batches, preemption, ends. For handoffs see its neighbours."""

from __future__ import annotations

import msgspec
import pytest

from tests.control.feeding import D0, P0, EngineFeed, a_request, outputs, reports
from tests.world import NAMESPACE
from transload.control.messages import (
    CacheChanged,
    Cancel,
    Emitted,
    Load,
    Preempted,
    Request,
    RequestFailed,
    RequestId,
    Reserve,
    Run,
    RunStep,
    Sampled,
    Started,
    StepDone,
    StepFailed,
    ToController,
    Token,
)
from transload.control.prefix import prompt_keys


def run_to_end(feed: EngineFeed) -> list[Token]:
    tokens: list[Token] = []
    while feed.step is not None:
        tokens += outputs(feed.finish_step())
    return tokens


# -- steps ------------------------------------------------------------------------------------------------------------


def test_a_request_is_prefilled_and_decoded_to_its_length() -> None:
    feed, request = EngineFeed(), a_request(1, 6, max_tokens=3)
    commands = feed.give(Run(request, 0))
    assert reports(commands) == [Started(D0, request.id, 0, 0)]
    step = commands[-1]
    assert isinstance(step, RunStep)
    (chunk,) = step.chunks
    assert (chunk.start, chunk.num_tokens, chunk.samples, chunk.num_outputs) == (0, 6, True, 0)
    assert (list(chunk.tokens), list(chunk.blocks), chunk.streams) == (list(request.prompt), [0, 1], False)

    commands = feed.finish_step()
    assert reports(commands) == [Emitted(D0, (Token(request.id, 0, 0, 1000),))]
    assert feed.chunks == [(1, 6, 1, True)]
    commands = feed.finish_step()
    assert reports(commands) == [Emitted(D0, (Token(request.id, 0, 1, 1001),))]
    assert feed.chunks == [(1, 7, 1, True)]
    assert reports(feed.finish_step()) == [Emitted(D0, (Token(request.id, 0, 2, 1002, "length"),))]
    assert feed.step is None
    assert feed.engine.is_idle
    assert (feed.engine.pool.num_cached, feed.engine.pool.num_free) == (2, 14)  # 8 of 9 tokens have keys and values


def test_a_long_prompt_is_prefilled_in_chunks_and_draws_after_the_last() -> None:
    feed = EngineFeed(step_tokens=16)
    feed.give(Run(a_request(1, 42), 0))
    seen = [feed.chunks]
    for _ in range(2):
        assert outputs(feed.finish_step()) == []
        seen.append(feed.chunks)
    assert seen == [[(1, 0, 16, False)], [(1, 16, 16, False)], [(1, 32, 10, True)]]
    assert [token.index for token in outputs(feed.finish_step())] == [0]


def test_a_request_joins_the_batch_while_another_decodes() -> None:
    feed = EngineFeed(step_tokens=16)
    feed.give(Run(a_request(1, 4, max_tokens=9), 0))
    feed.finish_step()
    feed.give(Run(a_request(2, 30), 0))
    assert feed.chunks == [(1, 4, 1, True)]  # the step under way is not touched
    feed.finish_step()
    assert feed.chunks == [(1, 5, 1, True), (2, 0, 12, False)]  # 15 tokens are left, cut at a block border
    feed.finish_step()
    assert feed.chunks == [(1, 6, 1, True), (2, 12, 12, False)]
    feed.finish_step()
    assert feed.chunks == [(1, 7, 1, True), (2, 24, 6, True)]
    feed.finish_step()
    assert feed.chunks == [(1, 8, 1, True), (2, 30, 1, True)]


def test_prompts_share_a_step_first_come_first_served() -> None:
    feed = EngineFeed(step_tokens=16)
    feed.give(Run(a_request(1, 1), 0))
    for number in (2, 3, 4):
        feed.give(Run(a_request(number, 7), 0))
    feed.finish_step()
    assert feed.chunks == [(1, 1, 1, True), (2, 0, 7, True), (3, 0, 7, True)]


def test_the_second_request_with_a_prompt_takes_its_blocks_from_the_cache() -> None:
    feed = EngineFeed()
    feed.give(Run(a_request(1, 11, max_tokens=2, first=50), 0))
    run_to_end(feed)
    commands = feed.give(Run(a_request(2, 12, max_tokens=2, first=50), 0))
    assert reports(commands) == [Started(D0, RequestId(2), 0, 8)]  # its third block was never full
    assert feed.chunks == [(2, 8, 4, True)]
    assert feed.engine.pool.num_referenced == 3
    run_to_end(feed)
    feed.give(Run(a_request(3, 12, max_tokens=2, first=50), 0))
    assert feed.chunks == [(3, 8, 4, True)]  # the last token is always computed: something must be drawn from


def test_two_running_requests_share_the_blocks_of_a_prefix() -> None:
    feed = EngineFeed()
    feed.give(Run(a_request(1, 9, max_tokens=9, first=50), 0))
    feed.finish_step()
    feed.give(Run(a_request(2, 10, max_tokens=9, first=50), 0))
    feed.finish_step()
    assert feed.chunks == [(1, 10, 1, True), (2, 8, 2, True)]
    assert feed.engine.pool.num_referenced == 4  # two shared, one each
    feed.give(Cancel(RequestId(1), 0))
    feed.finish_step()
    assert feed.chunks == [(2, 10, 1, True)]
    assert feed.engine.pool.num_referenced == 3


def test_a_request_that_has_made_tokens_elsewhere_goes_on_after_them() -> None:
    feed, request = EngineFeed(), a_request(1, 5, max_tokens=4)
    feed.give(Run(request, 2, outputs=(1000, 1001)))
    assert feed.step is not None
    assert list(feed.step.chunks[0].tokens) == [*request.prompt, 1000, 1001]
    assert feed.chunks == [(1, 0, 7, True)]
    assert run_to_end(feed) == [Token(request.id, 2, 2, 1002), Token(request.id, 2, 3, 1003, "length")]


def test_requests_without_tokens_are_counted() -> None:
    feed = EngineFeed()
    keys = prompt_keys(NAMESPACE, range(12), 4)
    feed.give(Run(Request(RequestId(1), 12, 3, block_keys=keys), 0))
    assert [token.finish for token in run_to_end(feed)] == [None, None, "length"]
    feed.give(Run(Request(RequestId(2), 12, 2, block_keys=keys), 0))
    assert feed.chunks == [(2, 8, 4, True)]


# -- the end of a text ------------------------------------------------------------------------------------------------


def sampled_as(request: Request, **changes: object) -> Request:
    return msgspec.structs.replace(request, sampling=msgspec.structs.replace(request.sampling, **changes))


def test_a_stop_id_ends_the_text_and_is_its_last_token() -> None:
    feed, request = EngineFeed(), sampled_as(a_request(1, 5, max_tokens=9), stop_ids=(77, 78))
    feed.give(Run(request, 0))
    feed.finish_step({1: 5})
    assert outputs(feed.finish_step({1: 78})) == [Token(request.id, 0, 1, 78, "stop")]
    assert feed.engine.is_idle


@pytest.mark.parametrize("min_tokens", [0, 1, 2, 3])
def test_a_stop_id_counts_from_the_least_number_of_tokens_on(min_tokens: int) -> None:
    feed, request = EngineFeed(), sampled_as(a_request(1, 5, max_tokens=9), stop_ids=(77,), min_tokens=min_tokens)
    feed.give(Run(request, 0))
    tokens: list[Token] = []
    while feed.step is not None:
        tokens += outputs(feed.finish_step({1: 77}))
    assert len(tokens) == max(1, min_tokens)
    assert tokens[-1].finish == "stop"


def test_tokens_made_before_a_recovery_count_towards_the_least_number() -> None:
    feed, request = EngineFeed(), sampled_as(a_request(1, 5, max_tokens=9), stop_ids=(77,), min_tokens=3)
    feed.give(Run(request, 1, outputs=(77, 77)))
    assert [token.finish for token in outputs(feed.finish_step({1: 77}))] == ["stop"]


def test_a_stop_id_at_the_longest_length_is_a_stop() -> None:
    feed, request = EngineFeed(), sampled_as(a_request(1, 5, max_tokens=1), stop_ids=(77,))
    feed.give(Run(request, 0))
    assert outputs(feed.finish_step({1: 77})) == [Token(request.id, 0, 0, 77, "stop")]


def test_a_token_that_is_no_stop_id_goes_on() -> None:
    feed, request = EngineFeed(), sampled_as(a_request(1, 5, max_tokens=2), stop_ids=(), ignore_eos=True)
    feed.give(Run(request, 0))
    assert [token.finish for token in run_to_end(feed)] == [None, "length"]


# -- too little room --------------------------------------------------------------------------------------------------


def test_a_full_pool_makes_the_youngest_wait_and_it_loses_nothing() -> None:
    feed = EngineFeed(num_blocks=6)
    old, young = a_request(1, 8, max_tokens=14), a_request(2, 8, max_tokens=10)
    feed.give(Run(old, 0))
    feed.give(Run(young, 0))
    assert feed.chunks == [(1, 0, 8, True)]
    tokens, preempted = [], 0
    while feed.step is not None:
        commands = feed.finish_step()
        preempted += sum(event == Preempted(D0, young.id, 0) for event in reports(commands))
        tokens += outputs(commands)
    assert preempted >= 1
    for request in (old, young):
        made = [(token.index, token.token) for token in tokens if token.request == request.id]
        assert made == [(index, 1000 + index) for index in range(request.max_tokens)]
    assert feed.engine.is_idle


def test_a_preempted_request_finds_its_own_full_blocks_again() -> None:
    feed = EngineFeed(num_blocks=7)
    feed.give(Run(a_request(1, 8, max_tokens=12), 0))
    feed.give(Run(a_request(2, 8, max_tokens=8), 0))
    while not any(isinstance(event, Preempted) for event in reports(feed.finish_step())):
        pass
    work = feed.engine._works[RequestId(2)]
    assert (work.phase, work.blocks, work.num_computed) == ("waiting", [], 0)
    known = work.num_known
    starts: list[tuple[int, int]] = []
    while feed.step is not None:
        starts += [(start, num_tokens) for request, start, num_tokens, _ in feed.chunks if request == 2]
        feed.finish_step()
    assert starts[0][0] >= 8, "its prompt was still in the cache"
    assert sum(starts[0]) >= known
    assert feed.engine.is_idle


def test_the_older_request_is_never_preempted_for_the_younger() -> None:
    feed = EngineFeed(num_blocks=6)
    feed.give(Run(a_request(1, 8, max_tokens=14), 0))
    feed.give(Run(a_request(2, 8, max_tokens=14), 0))
    victims = set()
    while feed.step is not None:
        victims |= {event.request for event in reports(feed.finish_step()) if isinstance(event, Preempted)}
    assert victims == {2}


def test_nobody_is_let_into_the_room_that_running_requests_need_to_grow() -> None:
    """Blocks of its own cached prefix are no room for others: with them counted it would be thrown out again."""
    feed = EngineFeed(num_blocks=5)
    feed.give(Run(a_request(1, 8, max_tokens=1, first=50), 0))
    run_to_end(feed)  # leaves two cached blocks
    feed.give(Run(a_request(2, 5, max_tokens=8), 0))  # takes two, will need a third
    feed.give(Run(a_request(3, 9, max_tokens=8, first=50), 0))  # finds two, needs a third
    events: list[tuple[str, int]] = []
    while feed.step is not None:
        for event in reports(feed.finish_step()):
            if isinstance(event, Started | Preempted):
                events.append((type(event).__name__, event.request))
    assert events == [("Started", 3)]


def test_nobody_overtakes_the_head_of_the_queue() -> None:
    feed = EngineFeed(num_blocks=9)
    feed.give(Run(a_request(1, 12, max_tokens=4), 0))
    feed.give(Run(a_request(2, 24, max_tokens=4), 0))
    feed.give(Run(a_request(3, 4, max_tokens=4), 0))
    begun: list[int] = []
    while feed.step is not None:
        begun += [event.request for event in reports(feed.finish_step()) if isinstance(event, Started)]
    assert begun == [2, 3]


def test_a_full_batch_makes_the_next_request_wait() -> None:
    feed = EngineFeed(max_batch=2)
    for number in (1, 2, 3):
        feed.give(Run(a_request(number, 4, max_tokens=3), 0))
    feed.finish_step()
    assert [chunk[0] for chunk in feed.chunks] == [1, 2]
    feed.finish_step()
    feed.finish_step()
    assert [chunk[0] for chunk in feed.chunks] == [2, 3]


def test_a_request_that_can_never_fit_is_refused_by_name() -> None:
    feed = EngineFeed(num_blocks=4)
    commands = feed.give(Run(a_request(1, 10, max_tokens=8), 0))
    reason = "needs 17 tokens of KV cache, d0 holds 16"
    assert commands == [ToController(RequestFailed(D0, RequestId(1), 0, reason))]
    assert feed.engine.is_idle
    feed.give(Run(a_request(2, 10, max_tokens=7), 0))  # the last token drawn needs no place
    assert len(run_to_end(feed)) == 7


# -- failures and cancels ---------------------------------------------------------------------------------------------


def test_a_failed_step_fails_the_requests_in_it_and_no_other() -> None:
    feed = EngineFeed(step_tokens=4)
    for number in (1, 2):
        feed.give(Run(a_request(number, 4), 0))
    assert feed.step is not None
    number, feed.step = feed.step.step, None
    commands = feed.give(StepFailed(number, "out of memory"))
    assert reports(commands) == [RequestFailed(D0, RequestId(1), 0, "out of memory"), Started(D0, RequestId(2), 0, 0)]
    assert feed.chunks == [(2, 0, 4, True)]


def test_a_request_cancelled_in_a_failing_step_is_not_reported() -> None:
    feed = EngineFeed()
    feed.give(Run(a_request(1, 4), 0))
    feed.give(Cancel(RequestId(1), 0))
    assert feed.step is not None
    number, feed.step = feed.step.step, None
    assert feed.give(StepFailed(number, "out of memory")) == []
    assert feed.engine.is_idle


def test_blocks_stay_while_the_step_that_uses_them_runs() -> None:
    feed = EngineFeed()
    feed.give(Run(a_request(1, 6), 0))
    assert feed.give(Cancel(RequestId(1), 0)) == []
    assert feed.engine.pool.num_referenced == 2
    assert not feed.engine.is_idle
    assert feed.finish_step() == []  # no token of a cancelled request comes out
    assert feed.engine.is_idle
    assert feed.engine.pool.num_referenced == 0


def test_a_cancelled_request_that_waits_leaves_the_queue() -> None:
    feed = EngineFeed(max_batch=1)
    for number in (1, 2, 3):
        feed.give(Run(a_request(number, 4, max_tokens=1), 0))
    feed.give(Cancel(RequestId(2), 0))
    assert [token.request for token in run_to_end(feed)] == [1, 3]


def test_a_cancel_reaches_no_later_attempt_and_may_come_twice() -> None:
    feed = EngineFeed()
    feed.give(Run(a_request(1, 4), 3))
    feed.give(Cancel(RequestId(1), 2))
    assert RequestId(1) in feed.engine._works
    for _ in range(2):
        feed.give(Cancel(RequestId(1), 3))
        assert RequestId(1) not in feed.engine._works
    feed.give(Cancel(RequestId(99), 0))


def test_a_newer_attempt_takes_the_place_of_an_older_one_in_the_same_step() -> None:
    feed = EngineFeed()
    feed.give(Run(a_request(1, 4, max_tokens=2), 0))
    feed.give(Run(a_request(1, 4, max_tokens=2), 1))
    assert outputs(feed.finish_step()) == []
    assert [(token.epoch, token.index) for token in run_to_end(feed)] == [(1, 0), (1, 1)]
    assert feed.engine.is_idle


def test_a_newer_reservation_keeps_its_source() -> None:
    feed = EngineFeed(max_batch=1)
    feed.link(P0)
    feed.give(Run(a_request(1, 4, max_tokens=2), 0))
    feed.give(Reserve(a_request(2, 4), 0, D0))
    feed.give(Reserve(a_request(2, 4), 1, P0))
    run_to_end(feed)
    assert feed.engine._works[RequestId(2)].phase == "receiving"


# -- reports ----------------------------------------------------------------------------------------------------------


def test_the_load_is_told_after_a_step_and_when_it_changes_at_rest() -> None:
    feed = EngineFeed(num_blocks=16)
    feed.give(Run(a_request(1, 6, max_tokens=2), 0))
    feed.finish_step()
    first = feed.load
    assert first is not None
    assert (first.num_running, first.blocks_referenced, first.blocks_free) == (1, 2, 14)
    assert (first.step_requests, first.step_prefill_tokens, first.step_decode_tokens) == (1, 6, 0)
    feed.finish_step()
    last = feed.load
    assert last is not None
    assert (last.num_running, last.blocks_referenced, last.blocks_cached, last.blocks_leaked) == (0, 0, 1, 0)
    assert (last.step_prefill_tokens, last.step_decode_tokens) == (0, 1)
    feed.load = None
    feed.give(Cancel(RequestId(9), 0))
    assert feed.load is None  # nothing is new


def test_blocks_that_nobody_holds_are_reported_as_leaked() -> None:
    feed = EngineFeed()
    feed.engine.pool.acquire((), 3)
    (load,) = [command.event for command in feed.engine.handle(Cancel(RequestId(1), 0), 0.0)]  # type: ignore[union-attr]
    assert isinstance(load, Load)
    assert load.blocks_leaked == 3


def test_changes_of_the_cache_are_numbered() -> None:
    engine, request = EngineFeed(num_blocks=3).engine, a_request(1, 8, max_tokens=2)
    changes: list[CacheChanged] = []

    def give(event: object) -> None:
        for command in engine.handle(event, 0.0):  # type: ignore[arg-type]
            if isinstance(command, ToController) and isinstance(command.event, CacheChanged):
                changes.append(command.event)

    give(Run(request, 0))
    give(StepDone(1, (Sampled(request.id, 5),), 0.01))
    give(StepDone(2, (Sampled(request.id, 6),), 0.01))
    other = a_request(2, 9, max_tokens=1)
    give(Run(other, 0))
    give(StepDone(3, (Sampled(other.id, 5),), 0.01))
    assert changes == [
        CacheChanged(D0, 1, request.block_keys, ()),
        CacheChanged(D0, 2, (), request.block_keys[::-1]),
        CacheChanged(D0, 3, other.block_keys, ()),
    ]
