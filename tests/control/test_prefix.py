"""Keys of prefix blocks: equal tokens and namespace, equal keys; anything else, other keys."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.control.feeding import a_request
from transload.control.prefix import KEY_BYTES, block_key, prompt_keys, root_key
from transload.control.work import Work

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def test_the_keys_of_a_prompt_are_fixed() -> None:
    """Workers of different versions must not take one key for different things: change the tag if these change."""
    keys = prompt_keys(b"namespace", range(9), 4)
    assert [key.hex() for key in keys] == ["356df35a4717e054e506d1b12a02f5aa", "a528042af50c1594417a5c1070d53ed7"]


def test_only_full_blocks_have_keys() -> None:
    assert [len(prompt_keys(b"n", range(length), 4)) for length in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]
    assert all(len(key) == KEY_BYTES for key in prompt_keys(b"n", range(8), 4))


@given(TOKENS, TOKENS)
def test_prompts_share_exactly_the_keys_of_their_common_blocks(first: list[int], second: list[int]) -> None:
    ours, theirs = prompt_keys(b"n", first, 4), prompt_keys(b"n", second, 4)
    common = 0
    while 4 * (common + 1) <= min(len(first), len(second)) and first[: 4 * common + 4] == second[: 4 * common + 4]:
        common += 1
    assert ours[:common] == theirs[:common]
    assert not set(ours[common:]) & set(theirs[common:])


def test_the_same_tokens_in_another_namespace_or_place_have_other_keys() -> None:
    here, there = prompt_keys(b"one", [1] * 12, 4), prompt_keys(b"two", [1] * 12, 4)
    assert len({*here, *there}) == 6


def test_large_tokens_are_not_mixed_up() -> None:
    assert block_key(root_key(b"n"), [2**32 - 1, 0]) != block_key(root_key(b"n"), [2**32 - 2, 1])


def test_keys_of_output_blocks_go_on_where_the_prompt_ends() -> None:
    request = a_request(1, 6, 9)
    work = Work(request, 0, (7, 8, 9, 10, 11), "run", 1)
    whole = prompt_keys(b"n", [*request.prompt, 7, 8, 9, 10, 11], 4)
    work.known_keys = list(prompt_keys(b"n", request.prompt, 4))
    assert tuple(work.keys(2, 4, root_key(b"n"))) == whole[:2]
    assert tuple(work.keys(1, 4, root_key(b"n"))) == whole[:1]
