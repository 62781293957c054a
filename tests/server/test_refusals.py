"""Bad input: each a clear 4xx in OpenAI's form, naming the field, with the server healthy after."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import RunningServer, Serve
from transload.deploy.spec import Server

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server(serve_module: Serve) -> RunningServer:
    return serve_module(server=Server(port=0, max_body_bytes=100_000, max_waiting=8))


def refused(server: RunningServer, path: str, status: int, **settings: Any) -> dict[str, Any]:
    """The error object of a refused call; the server answers the next call."""
    answer = server.post(path, **settings)
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert answer.headers["x-request-id"]
    assert server.post(COMPLETION, json={"prompt": "x"}).status_code == 200
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.5),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", [1]),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 2),
        ("seed", 2**63),
        ("seed", 10**30),
        ("seed", 1.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e9),
        ("presence_penalty", -2.1),
        ("frequency_penalty", 3),
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("max_tokens", "ten"),
        ("max_tokens", 1.0),
        ("max_tokens", 513),
        ("max_tokens", 10**400),
        ("min_tokens", -1),
        ("min_tokens", 10**6),
        ("n", 0),
        ("n", 129),
        ("n", 9),  # more than may wait
        ("stop", 5),
        ("stop", ""),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stop", "x" * 2000),
        ("stop", [1]),
        ("stop_token_ids", [260]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", list(range(200))),
        ("logit_bias", {"260": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"5": "x"}),
        ("logit_bias", {"five": 1}),
        ("ignore_eos", 1),
        ("stream", "yes"),
        ("skip_special_tokens", "no"),
        ("stream_options", {"include_usage": True}),  # without stream
        ("response_format", {"type": "json_object"}),
        ("metadata", "text"),
        ("user", 7),
        ("model", 7),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_a_wrong_value_is_refused_naming_the_field(server: RunningServer, path: str, field: str, value: object) -> None:
    body: dict[str, object] = {"messages": HELLO} if path == CHAT else {"prompt": "hi"}
    error = refused(server, path, 400, json={**body, field: value})
    assert error["param"].startswith(field), error
    assert field in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [*HELLO, {"role": "wizard", "content": "hi"}]}, "messages[1].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "hi", "colour": 1}]}, "messages[0].colour"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": HELLO, "logprobs": 3}, "logprobs"),
        ({"messages": HELLO, "max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"messages": HELLO, "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"messages": HELLO, "tool_choice": "required"}, "tool_choice"),
        ({"messages": HELLO, "stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ],
)
def test_a_wrong_chat_body_is_refused_naming_the_place(
    server: RunningServer, body: dict[str, object], param: str
) -> None:
    assert refused(server, CHAT, 400, json=body)["param"] == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [""]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [260]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": ["x"] * 9}, "prompt"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "logprobs": True}, "logprobs"),
        ({"prompt": "x", "logprobs": 1, "echo": True}, "logprobs"),
        ({"prompt": "x", "max_completion_tokens": 5}, "max_completion_tokens"),
    ],
)
def test_a_wrong_completion_body_is_refused_naming_the_place(
    server: RunningServer, body: dict[str, object], param: str
) -> None:
    assert refused(server, COMPLETION, 400, json=body)["param"] == param


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"   ",
        b"{",
        b"not json",
        b'{"prompt": "x",}',
        b'{"prompt": "x"} trailing',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "temperature": -Infinity}',
        b'{"prompt": "\xff\xfe"}',
        b"\xff\xfe",
        b'{"prompt": "\xed\xa0\x80"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\udc00 x"}',
        b'{"prompt": "\\ud800\\u0041"}',
        b"[]",
        b"null",
        b'"text"',
        b"7",
        b'{"prompt": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
        b'{"metadata": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_000 + b', "prompt": "x"}',
    ],
)
def test_a_body_that_is_no_json_object_of_valid_text_is_400(server: RunningServer, raw: bytes) -> None:
    for path in (COMPLETION, CHAT, "/tokenize", "/detokenize"):
        error = refused(server, path, 400, content=raw, headers={"content-type": "application/json"})
        assert error["code"] in ("invalid_json", "wrong_type", "unknown_field")


def test_a_lone_surrogate_is_named_in_the_message(server: RunningServer) -> None:
    assert "ud800" in refused(server, COMPLETION, 400, content=b'{"prompt": "\\ud800"}')["message"]


def test_a_number_that_no_float_holds_is_refused_by_name(server: RunningServer) -> None:
    error = refused(server, COMPLETION, 400, content=b'{"prompt": "x", "temperature": 1e999}')
    assert error["param"] == "temperature"


@pytest.mark.parametrize(
    ("field", "hint"),
    [("temprature", "temperature"), ("max_token", "max_tokens"), ("messags", "messages"), ("xyzzy", None)],
)
def test_an_unknown_field_is_refused_with_the_field_it_may_have_meant(
    server: RunningServer, field: str, hint: str | None
) -> None:
    error = refused(server, CHAT, 400, json={"messages": HELLO, field: 1})
    assert error["param"] == field
    assert error["code"] == "unknown_field"
    assert (f"did you mean {hint!r}" in error["message"]) if hint else ("did you mean" not in error["message"])


@pytest.mark.parametrize(
    ("field", "value"), [("best_of", 3), ("guided_json", {}), ("use_beam_search", True), ("audio", {}), ("priority", 1)]
)
def test_a_known_field_that_is_not_offered_is_refused_unless_it_asks_for_nothing(
    server: RunningServer, field: str, value: object
) -> None:
    error = refused(server, COMPLETION, 400, json={"prompt": "x", field: value})
    assert (error["param"], error["code"]) == (field, "unsupported_field")
    assert server.post(COMPLETION, json={"prompt": "x", field: None}).status_code == 200


def test_fields_without_effect_pass(server: RunningServer) -> None:
    body = {
        "messages": [*HELLO, {"role": "assistant", "content": "a", "refusal": None, "audio": None}, *HELLO],
        "user": "u",
        "metadata": {"a": 1},
        "store": True,
        "best_of": 1,
        "use_beam_search": False,
        "parallel_tool_calls": True,
        "service_tier": "auto",
        "safety_identifier": "s",
        "tool_choice": "none",
        "tools": [{"type": "function"}],
        "response_format": {"type": "text"},
        "logit_bias": None,
        "modalities": ["text"],
    }
    answer = server.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text


def test_every_sampling_field_reaches_the_backend(server: RunningServer) -> None:
    body = {
        "prompt": "x",
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "seed": 3,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.3,
        "logit_bias": {"7": 5, "3": -1.5},
        "logprobs": 2,
        "min_tokens": 2,
        "max_tokens": 9,
        "stop_token_ids": [10, 10, 11],
        "ignore_eos": True,
    }
    assert server.post(COMPLETION, json=body).status_code == 200
    request = server.backend.seen[-1].request
    sampling = request.sampling
    assert request.max_tokens == 9
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 5, 0.1)
    assert (sampling.seed, sampling.repetition_penalty, sampling.presence_penalty) == (3, 1.1, 0.2)
    assert (sampling.frequency_penalty, sampling.logit_bias) == (-0.3, ((3, -1.5), (7, 5.0)))
    assert (sampling.logprobs, sampling.min_tokens) == (2, 2)
    assert (sampling.stop_ids, sampling.ignore_eos) == ((10, 11), True)


def test_a_prompt_and_max_tokens_over_the_context_are_refused_with_the_numbers(server: RunningServer) -> None:
    error = refused(server, COMPLETION, 400, json={"prompt": [1] * 500, "max_tokens": 20})
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "max_tokens"
    assert all(number in error["message"] for number in ("512", "500", "20", "12"))
    long = refused(server, CHAT, 400, json={"messages": [{"role": "user", "content": "x" * 3000}]})
    assert (long["code"], long["param"]) == ("context_length_exceeded", "messages")
    assert server.post(COMPLETION, json={"prompt": [1] * 511}).status_code == 200  # what is left is made


def test_an_unknown_model_is_404(server: RunningServer) -> None:
    for path, body in ((CHAT, {"messages": HELLO}), (COMPLETION, {"prompt": "x"}), ("/tokenize", {"prompt": "x"})):
        error = refused(server, path, 404, json={**body, "model": "gpt-4"})
        assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_unknown_paths_and_methods_answer_in_openais_form(server: RunningServer) -> None:
    assert refused(server, "/v1/embeddings", 404, json={})["code"] == "not_found"
    assert refused(server, "/health", 405)["code"] == "method_not_allowed"
    for path in (CHAT, COMPLETION, "/tokenize"):
        answer = server.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
        assert answer.headers["allow"] == "POST"


def test_a_body_over_the_limit_is_413_whether_or_not_it_says_its_size(server: RunningServer) -> None:
    large = b'{"prompt": "' + b"x" * 100_000 + b'"}'
    assert refused(server, COMPLETION, 413, content=large)["code"] == "body_too_large"
    assert refused(server, "/tokenize", 413, content=large)["code"] == "body_too_large"
    chunks = (large[i : i + 10_000] for i in range(0, len(large), 10_000))
    assert refused(server, COMPLETION, 413, content=chunks)["code"] == "body_too_large"


def test_a_body_of_fifty_megabytes_gets_its_answer_and_is_not_kept(server: RunningServer) -> None:
    megabyte = b" " * 2**20
    assert refused(server, CHAT, 413, content=(megabyte for _ in range(50)))["code"] == "body_too_large"
    assert refused(server, CHAT, 413, content=megabyte * 50)["code"] == "body_too_large"


def test_refusals_are_counted_by_code(server: RunningServer) -> None:
    refused(server, COMPLETION, 400, json={"prompt": ""})
    assert 'transload_rejected_total{code="empty_prompt"}' in server.get("/metrics").text
