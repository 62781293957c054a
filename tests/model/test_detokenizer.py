"""Text as it comes out token by token, and the stop strings in it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.tiny_tokenizers import byte_level, model_tokenizer, sentencepiece
from transload.errors import RequestError
from transload.model.detokenizer import Detokenizer, StopFinder

RAW = {"byte_level": byte_level(), "sentencepiece": sentencepiece()}
TOKENIZERS = {name: model_tokenizer(raw) for name, raw in RAW.items()}
KINDS = st.sampled_from(sorted(RAW))
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from(["👩‍👩‍👧‍👦", "🎉", "é", "e\u0301", "日本", " ", "\n", "the fox", "<|end|>", "</s>", "12", "🇩🇪"]),
    max_size=20,
).map("".join)


def id_of(kind: str, token: str) -> int:
    found = RAW[kind].token_to_id(token)
    assert found is not None
    return found


def pushed(kind: str, ids: list[int], **how: bool) -> str:
    detokenizer = Detokenizer(TOKENIZERS[kind], **how)
    parts = [detokenizer.push(token) for token in ids]
    return "".join(parts) + detokenizer.flush()


@settings(max_examples=300, deadline=None)
@given(kind=KINDS, text=TEXTS, skip=st.booleans())
def test_the_parts_of_any_text_join_to_what_the_library_decodes(kind: str, text: str, skip: bool) -> None:
    ids = RAW[kind].encode(text, add_special_tokens=True).ids
    wanted = RAW[kind].decode(ids, skip_special_tokens=skip)
    assert pushed(kind, ids, skip_special=skip) == wanted
    assert TOKENIZERS[kind].decode(ids, skip_special=skip) == wanted


@settings(max_examples=300, deadline=None)
@given(kind=KINDS, ids=st.lists(st.integers(0, 700), max_size=60), skip=st.booleans())
def test_the_parts_of_any_tokens_join_to_the_whole(kind: str, ids: list[int], skip: bool) -> None:
    whole = TOKENIZERS[kind].decode(ids, skip_special=skip)
    assert pushed(kind, ids, skip_special=skip) == whole
    if kind == "byte_level" or "\ufffd" not in whole:
        # Of a run of byte tokens that ends badly the library spoils the good part too: it could not be streamed.
        assert whole == RAW[kind].decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(kind=KINDS, text=TEXTS)
def test_no_part_holds_a_broken_character(kind: str, text: str) -> None:
    if "\ufffd" in text:
        return
    detokenizer = Detokenizer(TOKENIZERS[kind], skip_special=False)
    for token in TOKENIZERS[kind].encode(text):
        assert "\ufffd" not in detokenizer.push(token)
    assert detokenizer.flush() == ""


def test_an_emoji_appears_when_its_last_byte_has_come() -> None:
    ids = [id_of("byte_level", character) for character in "ðŁİī"]
    detokenizer = Detokenizer(TOKENIZERS["byte_level"])
    assert [detokenizer.push(token) for token in ids] == ["", "", "", "🎉"]


def test_a_character_that_is_never_completed_ends_as_a_replacement() -> None:
    detokenizer = Detokenizer(TOKENIZERS["byte_level"])
    assert detokenizer.push(id_of("byte_level", "ð")) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_a_text_that_continues_a_prompt_keeps_its_first_space() -> None:
    ids = RAW["sentencepiece"].encode("fox jumps", add_special_tokens=False).ids
    assert pushed("sentencepiece", ids) == "fox jumps"
    assert pushed("sentencepiece", ids, continues=True) == " fox jumps"


def test_single_tokens_have_exact_bytes() -> None:
    tokens = TOKENIZERS["byte_level"]
    half = id_of("byte_level", "ð")
    assert (tokens.token_bytes(half), tokens.token_text(half)) == (b"\xf0", "\ufffd")
    space = id_of("byte_level", "Ġ")
    assert (tokens.token_bytes(space), tokens.token_text(space)) == (b" ", " ")
    added = id_of("byte_level", "plain added 語")
    assert tokens.token_bytes(added) == "plain added 語".encode()
    pieces = TOKENIZERS["sentencepiece"]
    assert pieces.token_bytes(3 + 0x0A) == b"\n"
    piece = next(piece for piece in sorted(RAW["sentencepiece"].get_vocab()) if "▁" in piece[1:-1])
    assert pieces.token_text(id_of("sentencepiece", piece)) == piece.replace("▁", " ")


def test_numbers_that_are_no_tokens_have_no_bytes_and_take_no_memory() -> None:
    table = TOKENIZERS["byte_level"].token_table
    before = len(table._known)
    assert all(table[number] == b"" for number in (-1, 10**6, 2**31, 2**32, 10**30))
    assert len(table._known) == before


# ---------------------------------------------------------------------------------------------------------------------
# Stop strings


def cut(text: str, stops: list[str], include_stop: bool) -> tuple[str, str | None]:
    """The rule, in the plainest way: the first place where a stop string is complete ends the text."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return (text[:end] if include_stop else text[: end - len(stop)]), stop
    return text, None


FEW = st.text("ab🎉", max_size=12)


@settings(max_examples=1000, deadline=None)
@given(
    pieces=st.lists(FEW, max_size=8),
    stops=st.lists(st.text("ab🎉", min_size=1, max_size=5), max_size=4),
    include=st.booleans(),
)
def test_a_stop_string_ends_the_text_wherever_the_tokens_end(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    finder = StopFinder(stops, include_stop=include)
    wanted, stop = cut("".join(pieces), stops, include)
    shown = ""
    for piece in pieces:
        shown += finder.feed(piece)
        assert wanted.startswith(shown)
    assert shown + finder.flush() == wanted
    assert finder.found == stop


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(FEW, max_size=8), stops=st.lists(st.text("ab🎉", min_size=1, max_size=5), min_size=1, max_size=4)
)
def test_no_more_is_held_than_could_begin_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    finder = StopFinder(stops)
    seen = shown = ""
    for piece in pieces:
        seen += piece
        shown += finder.feed(piece)
        if finder.found is not None:
            return
        held = seen.removeprefix(shown)
        assert any(stop.startswith(held) for stop in stops)
        assert all(not stop.startswith(seen[place:]) for place in range(len(shown)) for stop in stops)


def test_nothing_is_shown_after_the_stop_string() -> None:
    finder = StopFinder(["END"])
    assert finder.feed("one EN") == "one "
    assert finder.feed("D two") == ""
    assert finder.found == "END"
    assert finder.feed("END three") == finder.flush() == ""


def test_without_stop_strings_all_text_passes_at_once() -> None:
    finder = StopFinder([])
    assert finder.feed("anything") == "anything"
    assert finder.flush() == ""


def test_a_false_start_is_shown_as_soon_as_it_is_one() -> None:
    finder = StopFinder(["aab"])
    assert [finder.feed(character) for character in "aaac"] == ["", "", "a", "aac"]


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match="empty") as refusal:
        StopFinder(["x", ""])
    assert refusal.value.param == "stop"
