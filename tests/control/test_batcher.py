"""Which tokens make a step."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.control.feeding import a_request
from transload.control.batcher import plan_chunks
from transload.control.work import Work


def a_work(number: int, num_prompt: int, num_computed: int = 0, num_outputs: int = 0) -> Work:
    work = Work(a_request(number, num_prompt, 99), 0, tuple(range(num_outputs)), "run", number)
    work.num_computed = num_computed
    return work


def plan(decoding: int, prompts: Sequence[tuple[int, int]], step_tokens: int = 16, block_size: int = 4) -> list[int]:
    """Tokens of each prompt (length, computed) in the next step; checks the rest."""
    running = [a_work(number, 4, 4, 1) for number in range(decoding)]
    waiting = [a_work(100 + number, length, computed) for number, (length, computed) in enumerate(prompts)]
    chunks = plan_chunks(running, waiting, step_tokens=step_tokens, block_size=block_size)
    assert chunks[:decoding] == [(work, 1) for work in running]
    assert [work for work, _ in chunks[decoding:]] == waiting[: len(chunks) - decoding]
    return [num_tokens for _, num_tokens in chunks[decoding:]]


@pytest.mark.parametrize(
    ("decoding", "prompts", "expected"),
    [
        (0, [], []),
        (3, [], []),
        (0, [(7, 0)], [7]),
        (0, [(16, 0)], [16]),
        (0, [(40, 0)], [16]),
        (0, [(40, 32)], [8]),
        (0, [(7, 0), (7, 0)], [7, 7]),
        (0, [(7, 0), (30, 0)], [7, 8]),  # nine are left, cut at a block border
        (0, [(7, 0), (7, 0), (7, 0)], [7, 7]),  # two are left: no block
        (2, [(40, 0)], [12]),
        (2, [(14, 0)], [14]),  # a prompt that ends need not end at a border
        (15, [(40, 0)], [4]),  # one is left, but prompts get a block at least
        (50, [(40, 0), (40, 0)], [4]),
        (50, [(3, 0), (1, 0)], [3, 1]),
        (0, [(6, 4), (9, 4)], [2, 5]),
    ],
)
def test_decodes_come_first_and_prompts_share_what_is_left(
    decoding: int, prompts: list[tuple[int, int]], expected: list[int]
) -> None:
    assert plan(decoding, prompts) == expected


@given(
    decoding=st.integers(0, 40),
    prompts=st.lists(st.tuples(st.integers(1, 100), st.integers(0, 24)), max_size=6),
    step_tokens=st.integers(1, 64),
    block_size=st.sampled_from((1, 4, 16)),
)
def test_a_step_keeps_its_budget_and_the_first_prompt_always_gets_on(
    decoding: int, prompts: list[tuple[int, int]], step_tokens: int, block_size: int
) -> None:
    states = [(length, min(blocks * block_size, (length - 1) // block_size * block_size)) for length, blocks in prompts]
    taken = plan(decoding, states, step_tokens, block_size)
    assert sum(taken) <= max(step_tokens - decoding, block_size)
    assert all(num_tokens > 0 for num_tokens in taken)
    assert bool(taken) == bool(prompts)
    for num_tokens, (length, computed) in zip(taken, states, strict=False):
        end = computed + num_tokens
        assert end == length or end % block_size == 0


def test_a_request_decodes_once_only_its_last_token_is_missing() -> None:
    assert not a_work(1, 5, 4).is_decoding  # its prompt is not complete
    assert not a_work(1, 5, 4, 1).is_decoding
    assert a_work(1, 5, 5, 1).is_decoding
    assert a_work(1, 5, 8, 4).is_decoding
