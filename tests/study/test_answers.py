from __future__ import annotations

import re
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transload.study.answers import EventLines, StreamedAnswer, describe_error

STREAM = {"content-type": "text/event-stream; charset=utf-8"}


def event(**fields: object) -> bytes:
    return b"data: " + msgspec.json.encode(fields) + b"\n\n"


def text(words: str, **more: object) -> bytes:
    return event(choices=[{"index": 0, "text": words, **more}])


def delta(**fields: object) -> bytes:
    return event(choices=[{"index": 0, "delta": fields}])


DONE = b"data: [DONE]\n\n"


def read(*parts: bytes, status: int = 200, headers: dict[str, str] | None = None) -> StreamedAnswer:
    answer = StreamedAnswer(keep_text=True)
    answer.head(status, STREAM if headers is None else headers)
    for number, part in enumerate(parts):
        answer.body(part, float(number))
    answer.finish()
    return answer


def test_each_event_with_text_is_a_token_at_its_time() -> None:
    answer = read(text("a"), text("b"), text(""), text("c"), DONE)
    assert answer.token_seconds == [0.0, 1.0, 3.0]
    assert "".join(answer.text) == "abc"
    assert answer.error is None


def test_the_opening_of_a_chat_is_not_a_token_and_its_reasoning_is() -> None:
    answer = read(
        delta(role="assistant", content=""), delta(reasoning_content="hm"), delta(content="yes"), delta(), DONE
    )
    assert answer.token_seconds == [1.0, 2.0]
    assert "".join(answer.text) == "hmyes"


def test_usage_and_cached_tokens_are_kept() -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
    answer = read(text("a"), text("b"), event(choices=[], usage=usage), DONE)
    assert (answer.num_input_tokens, answer.num_output_tokens, answer.num_cached_tokens) == (7, 2, 4)
    assert answer.token_seconds == [0.0, 1.0]


def test_usage_on_the_way_counts_the_tokens_of_events_that_carry_several_or_no_text() -> None:
    def counted(words: str, count: int) -> bytes:
        return event(choices=[{"index": 0, "text": words}], usage={"prompt_tokens": 7, "completion_tokens": count})

    answer = read(counted("ab", 2), counted("", 3), counted("c", 4), DONE)
    assert answer.token_seconds == [0.0, 0.0, 1.0, 2.0]


def test_usage_in_the_last_event_alone_does_not_hide_a_wrong_count() -> None:
    last = event(choices=[{"text": "", "finish_reason": "length"}], usage={"completion_tokens": 5})
    answer = read(text("a"), text("b"), last, DONE)
    assert answer.token_seconds == [0.0, 1.0]
    assert answer.num_output_tokens == 5


def test_token_ids_count_where_the_server_gives_them() -> None:
    assert read(text("ab", token_ids=[1, 2]), text("", token_ids=[3]), DONE).token_seconds == [0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("parts", "kind", "words"),
    [
        ([text("a")], "truncated", r"without \[DONE\]"),
        ([DONE], "empty", "no token"),
        (
            [text("a"), event(error={"message": "worker lost", "type": "server_error"}), DONE],
            "error_event",
            "worker lost",
        ),
        ([b'data: {"error": "just words"}\n\n', DONE], "error_event", "just words"),
        ([b"data: {]\n\n", DONE], "malformed", "JSON is malformed"),
        ([event(choices=[{"text": 5}]), DONE], "malformed", "Expected"),
        ([b"data: \xff\n\n", DONE], "malformed", "malformed"),
        ([b'data: {"id": "\xff"}\n\n', DONE], "malformed", "utf-8"),
        ([b"data: " + b"[" * 10_000 + b"\n\n", DONE], "malformed", "."),
    ],
)
def test_what_is_wrong_with_a_stream_becomes_its_kind_of_error(parts: list[bytes], kind: str, words: str) -> None:
    answer = read(*parts)
    assert answer.error == kind
    assert re.search(words, answer.error_detail)


def test_an_error_of_null_is_none() -> None:
    assert read(b'data: {"choices": [{"text": "a"}], "error": null}\n\n', DONE).error is None


def test_a_refusal_is_told_by_its_status_and_message() -> None:
    body = b'{"error": {"message": "over capacity", "code": "over_capacity"}}'
    answer = read(body, status=429, headers={"content-type": "application/json"})
    assert (answer.error, answer.error_detail) == ("http_status", "429: over capacity")


def test_an_answer_that_is_not_a_stream_is_malformed() -> None:
    answer = read(b'{"choices": []}', headers={"content-type": "application/json"})
    assert answer.error == "malformed"
    assert '{"choices": []}' in answer.error_detail


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"error": {"message": "a"}}', "a"),
        (b'{"error": "b"}', "b"),
        (b'{"message": "c", "object": "error"}', "c"),
        (b'{"detail": "d"}', "d"),
        (b'{"detail": [{"loc": ["body"]}]}', '[{"loc":["body"]}]'),
        (b"<html>e</html>", "<html>e</html>"),
        (b"", "(no message)"),
        (b"[1]", "[1]"),
    ],
)
def test_error_bodies_of_all_forms_are_put_into_words(body: bytes, words: str) -> None:
    assert describe_error(body) == words


def test_an_event_without_end_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transload.study.answers.MAX_LINE_BYTES", 1000)
    answer = read(*[b"x" * 300] * 10)
    assert answer.error == "malformed"
    assert "more than 1000 bytes" in answer.error_detail


WHOLE = b": hello\r\nevent: x\r\ndata: one\r\n\r\ndata:two\n\n\n\ndata: three\ndata: more\n\nid: 5\n\ndata: [DONE]\n\n"


@given(st.lists(st.integers(0, len(WHOLE)), max_size=30))
def test_events_are_the_same_wherever_the_network_cuts_them(cuts: list[int]) -> None:
    lines = EventLines()
    places = [0, *sorted(cuts), len(WHOLE)]
    got = [p for start, end in pairwise(places) for p in lines.feed(WHOLE[start:end])]
    assert got == [b"one", b"two", b"three\nmore", b"[DONE]"]
    assert lines.num_pending_bytes == 0


@given(st.lists(st.binary(max_size=60), max_size=20), st.sampled_from([200, 400, 500]))
def test_no_bytes_whatever_make_it_raise(parts: list[bytes], status: int) -> None:
    answer = read(*parts, status=status)
    assert answer.error is not None or b"[DONE]" in b"".join(parts)
