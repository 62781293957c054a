"""Tokens to text for one choice: whatever the steps, the text is the same and nothing follows a stop string."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.server.fakes import EOS, VOCAB, ByteTokenizer
from transload.control.messages import FinishReason, RequestId, Token, TokenLogprobs
from transload.runtime.base import Finished
from transload.server.choice import Choice
from transload.server.parameters import Parameters, check_parameters
from transload.server.replies import TokenEntry
from transload.server.schema import CompletionBody

LETTERS = st.text(alphabet="abé🌍", max_size=30)


def parameters(**fields: object) -> Parameters:
    return check_parameters(CompletionBody(prompt="x", **fields), VOCAB, (EOS,))  # type: ignore[arg-type]


def choice(**fields: object) -> Choice:
    return Choice(0, ByteTokenizer(), parameters(**fields), counts_prompt=True, continues=True)


def tokens_of(raw: bytes, *, logprobs: bool = False) -> list[Token]:
    shown = TokenLogprobs(-1.0) if logprobs else None
    return [Token(RequestId(1), 0, index, byte, None, shown) for index, byte in enumerate(raw)]


def ended(reason: FinishReason) -> Finished:
    return Finished(reason=reason, num_prompt_tokens=1, num_outputs=0, num_cached_tokens=0)


def run(one: Choice, tokens: list[Token], sizes: list[int]) -> tuple[str, list[TokenEntry]]:
    """Feed the tokens in steps of these sizes, taking what may leave after each."""
    text, entries = "", []
    place = 0
    for size in [*sizes, len(tokens)]:
        if one.stopped or place >= len(tokens):
            break
        one.push(tokens[place : place + size])
        place += size
        part, ready = one.take()
        text += part
        entries += ready
    one.end(ended("length"))
    part, ready = one.take()
    return text + part, entries + ready


@given(LETTERS, st.lists(st.integers(1, 5), max_size=20))
def test_the_text_does_not_depend_on_the_steps(text: str, sizes: list[int]) -> None:
    got, _entries = run(choice(), tokens_of(text.encode()), sizes)
    assert got == text


@given(LETTERS, st.lists(st.text("abé", min_size=1, max_size=3), min_size=1, max_size=3), st.lists(st.integers(1, 5)))
def test_the_text_ends_before_the_first_complete_stop_string(text: str, stops: list[str], sizes: list[int]) -> None:
    one = choice(stop=stops)
    got, _entries = run(one, tokens_of(text.encode()), sizes)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert (got, one.reason) == (text, "length")
        return
    longest = max((stop for stop in stops if stop in text and text.find(stop) + len(stop) == min(ends)), key=len)
    assert got == text[: min(ends) - len(longest)]
    assert one.reason == "stop"
    assert one.num_tokens == len(text[: min(ends)].encode())


@given(LETTERS, st.text("abé", min_size=1, max_size=2), st.lists(st.integers(1, 5)))
def test_log_probabilities_cover_the_text_that_left_and_no_more(text: str, stop: str, sizes: list[int]) -> None:
    one = choice(stop=stop, logprobs=1)
    got, entries = run(one, tokens_of(text.encode(), logprobs=True), sizes)
    assert bytes(entry.token for entry in entries) == got.encode()


def test_log_probabilities_wait_for_text_that_may_be_a_stop_string() -> None:
    one = choice(stop="abc", logprobs=1)
    one.push(tokens_of(b"xab", logprobs=True))
    text, entries = one.take()
    assert text == "x"
    assert [entry.token for entry in entries] == [ord("x")]
    assert not one.has_news()
    one.push(tokens_of(b"d", logprobs=True))
    text, entries = one.take()
    assert text == "abd"
    assert [entry.start for entry in entries] == [1, 2, 3]


def test_the_end_of_sequence_token_counts_but_has_no_text() -> None:
    one = choice(skip_special_tokens=False, logprobs=1)
    one.push([*tokens_of(b"a", logprobs=True), Token(RequestId(1), 0, 1, EOS, "stop", TokenLogprobs(-1.0))])
    one.end(ended("stop"))
    text, entries = one.take()
    assert (text, len(entries), one.num_tokens, one.reason) == ("a", 1, 2, "stop")


def test_the_stop_token_is_shown_if_asked_for() -> None:
    one = choice(skip_special_tokens=False, include_stop_str_in_output=True)
    one.push([*tokens_of(b"a"), Token(RequestId(1), 0, 1, EOS, "stop")])
    one.end(ended("stop"))
    assert one.take()[0] == "a<|256|>"


def test_no_stop_string_is_looked_for_in_the_first_min_tokens() -> None:
    one = choice(stop="a", min_tokens=2, max_tokens=9)
    assert run(one, tokens_of(b"aabxa"), [1] * 5)[0] == "aabx"


def test_an_unfinished_character_at_the_end_is_shown_as_a_replacement() -> None:
    got, _entries = run(choice(), tokens_of("aé".encode()[:2]), [1, 1])
    assert got == "a\ufffd"


def test_a_stop_string_completed_by_that_replacement_still_stops() -> None:
    one = choice(stop="\ufffd")
    got, _entries = run(one, tokens_of("aé".encode()[:2]), [1, 1])
    assert (got, one.reason) == ("a", "stop")


def test_an_error_after_the_text_was_complete_is_no_error() -> None:
    one = choice(stop="b")
    one.push(tokens_of(b"ab"))
    one.end(ended("error"))
    assert (one.take()[0], one.reason) == ("a", "stop")
