"""Seeds, defaults and the tokenizer's fit: what no answer shows directly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.server.fakes import EOS, VOCAB
from transload.errors import RequestError
from transload.server.parameters import call_seed, check_parameters, choice_seed
from transload.server.schema import ChatBody, ChatMessage, CompletionBody

if TYPE_CHECKING:
    from transload.model.tokenizer import ModelTokenizer
    from transload.server.tokens import Tokenizer

    def the_real_tokenizer_fits(tokenizer: ModelTokenizer) -> Tokenizer:
        return tokenizer


def test_the_defaults_are_openais() -> None:
    checked = check_parameters(CompletionBody(prompt="x"), VOCAB, (EOS,))
    sampling = checked.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 1.0, 0, 0.0)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.0, 0.0, 0.0)
    assert (checked.num_choices, checked.max_tokens, checked.stream, sampling.logprobs) == (1, None, False, None)
    assert sampling.stop_ids == (EOS,)


def test_choice_seeds_differ_and_the_first_is_the_callers() -> None:
    seeds = [choice_seed(5, index) for index in range(100)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [choice_seed(5, index) for index in range(100)]


def test_calls_without_a_seed_get_others_each_time_and_the_same_each_run() -> None:
    assert [call_seed(1, serial) for serial in range(3)] == [call_seed(1, serial) for serial in range(3)]
    assert len({call_seed(server, serial) for server in range(10) for serial in range(10)}) == 100


@pytest.mark.parametrize(("given", "kept"), [(0, 0), (-1, None), (2**63 - 1, 2**63 - 1), (-2, 2**63 - 2)])
def test_seeds_are_taken_as_63_bits_and_minus_one_means_none(given: int, kept: int | None) -> None:
    assert check_parameters(CompletionBody(prompt="x", seed=given), VOCAB, (EOS,)).seed == kept


@pytest.mark.parametrize(("given", "kept"), [(-1, 0), (0, 0), (1, 1), (VOCAB, 0), (10**30, 0)])
def test_top_k_of_minus_one_or_of_the_vocabulary_means_all(given: int, kept: int) -> None:
    assert check_parameters(CompletionBody(prompt="x", top_k=given), VOCAB, (EOS,)).sampling.top_k == kept


def test_ignoring_the_end_leaves_only_the_callers_stop_tokens() -> None:
    body = CompletionBody(prompt="x", ignore_eos=True, stop_token_ids=[EOS, 5])
    assert check_parameters(body, VOCAB, (EOS,)).sampling.stop_ids == (EOS, 5)
    body = CompletionBody(prompt="x", stop_token_ids=[5, EOS])
    assert check_parameters(body, VOCAB, (EOS,)).sampling.stop_ids == (EOS, 5)


def test_max_completion_tokens_is_the_newer_name_of_max_tokens() -> None:
    hello = [ChatMessage(role="user", content="x")]
    checked = check_parameters(ChatBody(messages=hello, max_completion_tokens=5), VOCAB, (EOS,))
    assert (checked.max_tokens, checked.max_tokens_field) == (5, "max_completion_tokens")
    checked = check_parameters(ChatBody(messages=hello, max_completion_tokens=5, max_tokens=5), VOCAB, (EOS,))
    assert checked.max_tokens == 5


def test_numbers_that_are_no_numbers_are_refused() -> None:
    for wrong in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(RequestError, match="temperature"):
            check_parameters(CompletionBody(prompt="x", temperature=wrong), VOCAB, (EOS,))
        with pytest.raises(RequestError, match="logit_bias"):
            check_parameters(CompletionBody(prompt="x", logit_bias={1: wrong}), VOCAB, (EOS,))
