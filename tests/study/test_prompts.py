from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from transload.study.prompts import COMMON_WORDS, Prompts, Vocabulary
from transload.study.workload import ArrivalSpec

VOCABULARY = Vocabulary(tuple(range(1000, 9000)))


def prompts(seed: int = 0, block_size: int = 16, vocabulary: Vocabulary = VOCABULARY) -> Prompts:
    return Prompts(vocabulary, seed=seed, block_size=block_size)


def common(left: list[int], right: list[int]) -> int:
    """Length of the common prefix."""
    return next((n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def test_a_prompt_has_exactly_the_tokens_asked_for_all_from_the_vocabulary() -> None:
    ids = prompts().ids(0, ArrivalSpec(0.0, 1001, 1))
    assert len(ids) == 1001
    assert set(ids) <= set(VOCABULARY.ids)
    assert len(set(ids)) > 900  # drawn from all of it


@given(
    shared=st.integers(0, 5), left=st.integers(1, 5), right=st.integers(1, 5), last=st.integers(1, 16), size=st.just(16)
)
def test_prompts_agree_exactly_as_far_as_their_hashes(shared: int, left: int, right: int, last: int, size: int) -> None:
    def arrival(own: int, base: int) -> ArrivalSpec:
        hashes = (*range(shared), *range(base, base + own))
        return ArrivalSpec(0.0, (len(hashes) - 1) * size + last, 1, hashes)

    first, second = prompts().ids(0, arrival(left, 100)), prompts().ids(1, arrival(right, 900))
    assert common(first, second) == shared * size


def test_a_longer_prompt_with_the_same_hashes_continues_the_shorter_one() -> None:
    short = prompts().ids(0, ArrivalSpec(0.0, 20, 1, (5, 6)))
    longer = prompts().ids(1, ArrivalSpec(0.0, 31, 1, (5, 6)))
    assert longer[:20] == short


def test_prompts_without_hashes_share_nothing_and_another_seed_changes_all() -> None:
    arrival = ArrivalSpec(0.0, 64, 1)
    assert common(prompts().ids(0, arrival), prompts().ids(1, arrival)) < 2
    assert common(prompts(0).ids(0, arrival), prompts(1).ids(0, arrival)) < 2
    assert prompts(3).ids(7, arrival) == prompts(3).ids(7, arrival)


def test_neighbouring_hashes_do_not_give_shifted_copies_of_one_text() -> None:
    ids = np.array(prompts().ids(0, ArrivalSpec(0.0, 32, 1, (1, 2))))
    for shift in range(1, 16):
        assert (ids[shift:16] == ids[16 : 32 - shift]).sum() < 3


def test_hashes_of_any_size_and_sign_are_taken() -> None:
    ids = prompts().ids(0, ArrivalSpec(0.0, 48, 1, (2**80 + 3, -1, 0)))
    assert len(ids) == 48


def test_a_text_leaves_room_for_what_the_server_adds() -> None:
    vocabulary = Vocabulary(VOCABULARY.ids, COMMON_WORDS, num_overhead_tokens=9)
    words = prompts(vocabulary=vocabulary).text(0, ArrivalSpec(0.0, 40, 1)).split(" ")
    assert len(words) == 31
    assert set(words) <= set(COMMON_WORDS)
    assert prompts(vocabulary=vocabulary).text(0, ArrivalSpec(0.0, 3, 1)).count(" ") == 0


def test_texts_share_the_prefixes_that_their_hashes_say() -> None:
    first = prompts().text(0, ArrivalSpec(0.0, 40, 1, (1, 2, 3))).split(" ")
    second = prompts().text(0, ArrivalSpec(0.0, 40, 1, (1, 2, 4))).split(" ")
    assert first[:32] == second[:32]
    assert first[32:] != second[32:]
