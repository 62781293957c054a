"""The routes that make no tokens, API keys and request ids."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import RunningServer, Serve
from tests.server.fakes import ByteTokenizer, Script
from transload.deploy.spec import Server
from transload.server.generation import REMEMBERED_CALLS, Ledger
from transload.server.prompts import SHORT_CHARACTERS


@pytest.fixture(scope="module")
def server(serve_module: Serve) -> RunningServer:
    return serve_module(Script(text="abc", num_cached_tokens=2))


def test_tokenize_and_detokenize_are_each_others_reverse(server: RunningServer) -> None:
    made = server.post("/tokenize", json={"model": "default", "prompt": "hé", "return_token_strs": True}).json()
    assert made == {
        "count": 4,
        "max_model_len": 512,
        "tokens": [257, 104, 195, 169],
        "token_strs": ["<|257|>", "h", "\ufffd", "\ufffd"],
    }
    plain = server.post("/tokenize", json={"prompt": "hé", "add_special_tokens": False}).json()
    assert plain["tokens"] == [104, 195, 169]
    assert plain["token_strs"] is None
    assert server.post("/detokenize", json={"tokens": plain["tokens"]}).json() == {"prompt": "hé"}
    assert server.post("/tokenize", json={"prompt": ""}).json()["count"] == 1


def test_tokenize_renders_conversations_as_the_chat_route_does(server: RunningServer) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    made = server.post("/tokenize", json={"messages": messages}).json()
    assert bytes(made["tokens"]) == b"user: a\nb\nassistant: "
    server.post("/v1/chat/completions", json={"messages": messages})
    assert server.backend.seen[-1].request.prompt == tuple(made["tokens"])
    without = server.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()
    assert bytes(without["tokens"]) == b"user: a\nb\n"


@pytest.mark.parametrize("body", [{}, {"prompt": "x", "messages": []}, {"tokens": [1]}])
def test_tokenize_wants_a_prompt_or_messages(server: RunningServer, body: dict[str, object]) -> None:
    assert server.post("/tokenize", json=body).status_code == 400


@pytest.mark.parametrize("tokens", [[-1], [10**9], ["a"], None])
def test_detokenize_refuses_what_is_no_token(server: RunningServer, tokens: object) -> None:
    answer = server.post("/detokenize", json={"tokens": tokens})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("tokens")


def test_health_shows_the_workers_and_ready_follows_the_backend(server: RunningServer) -> None:
    assert server.get("/health").json() == {"status": "ok", "workers": {"decode-0": "up"}}
    assert server.get("/ready").status_code == 200
    server.backend.ready = False
    try:
        answer = server.get("/ready")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
        assert server.get("/health").status_code == 200
    finally:
        server.backend.ready = True


def test_a_calls_waterfall_is_found_by_either_of_its_ids_with_all_choices(server: RunningServer) -> None:
    answer = server.post("/v1/completions", json={"prompt": "x", "n": 2}, headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.json()["id"] == "cmpl-mine-1"
    for name in ("mine-1", "cmpl-mine-1"):
        found = server.get(f"/requests/{name}").json()
        assert found["id"] == name
        assert len(found["choices"]) == 2
        stages = found["choices"][0]["stages"]
        assert sum(stage["seconds"] for stage in stages) == pytest.approx(found["choices"][0]["total_seconds"])
    missing = server.get("/requests/other")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "request_not_found")


@pytest.mark.parametrize("given", ["", "x" * 129, "with space", "caf\xe9"])
def test_a_request_id_that_is_not_short_and_printable_is_replaced(server: RunningServer, given: str) -> None:
    answer = server.get("/health", headers={"x-request-id": given.encode("latin-1")})
    assert answer.headers["x-request-id"] != given
    assert len(answer.headers["x-request-id"]) == 32


def test_the_ledger_forgets_the_oldest_calls(server: RunningServer) -> None:
    ledger = Ledger()
    for number in range(REMEMBERED_CALLS + 1):
        ledger.note(str(number), ())
    assert ledger.look_up("0") is None
    assert ledger.look_up("1") == ()


def test_metrics_parse_and_count_what_happened(serve: Serve) -> None:
    server = serve(Script(text="abc", num_cached_tokens=2))
    server.post("/v1/completions", json={"prompt": "hello", "stream": True})
    server.post("/v1/completions", json={"prompt": ""})
    answer = server.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    route = ("route", "/v1/completions")
    assert samples["transload_requests_total", ("outcome", "stop"), route] == 1
    assert samples["transload_requests_total", ("outcome", "rejected"), route] == 1
    assert samples["transload_rejected_total", ("code", "empty_prompt")] == 1
    assert samples[("transload_prompt_tokens_total",)] == 6
    assert samples[("transload_output_tokens_total",)] == 4
    assert samples[("transload_prefix_cache_hit_tokens_total",)] == 2
    assert samples[("transload_ttft_seconds_count",)] == 1
    assert samples[("transload_itl_seconds_count",)] == 3
    assert samples[("transload_tpot_seconds_count",)] == 1
    assert samples[("transload_end_to_end_seconds_count",)] == 1
    assert samples[("transload_calls_open",)] == 0
    openmetrics = server.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert openmetrics.text.endswith("# EOF\n")


def test_with_api_keys_every_route_but_health_and_ready_wants_one(serve: Serve) -> None:
    server = serve(server=Server(port=0, api_keys=("first", "sécond")))
    body = {"prompt": "x"}
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "first"},
        {"authorization": "Basic first"},
    ):
        answer = server.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/models", "/metrics", "/requests/x", "/nowhere"):
        assert server.get(path).status_code == 401
    assert not server.backend.seen
    for key in ("first", "sécond"):
        answer = server.post("/v1/completions", json=body, headers={b"authorization": b"bearer " + key.encode()})
        assert answer.status_code == 200
    assert server.get("/ready").status_code == 200
    assert server.get("/health").json() == {"status": "ok"}  # what is inside is for those with a key
    assert "workers" in server.get("/health", headers={"authorization": "Bearer first"}).json()


def test_without_api_keys_any_key_will_do(server: RunningServer) -> None:
    assert server.get("/v1/models", headers={"authorization": "Bearer whatever"}).status_code == 200


def test_long_texts_are_tokenized_off_the_event_loop_and_short_ones_on_it(serve: Serve) -> None:
    server = serve()
    assert isinstance(server.tokenizer, ByteTokenizer)
    server.post("/tokenize", json={"prompt": "x" * SHORT_CHARACTERS})
    on_loop = set(server.tokenizer.threads)
    server.post("/tokenize", json={"prompt": "x" * (SHORT_CHARACTERS + 1)})
    assert len(on_loop) == 1
    assert all(name.startswith("tokenize") for name in server.tokenizer.threads - on_loop)
    assert len(server.tokenizer.threads) == 2


def _broken_status() -> dict[str, object]:
    raise RuntimeError("secret")


def test_a_bug_on_a_slow_path_is_a_500_in_openais_form(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server = serve()
    server.backend.status = _broken_status  # type: ignore[method-assign]
    answer = server.get("/health", headers={"x-request-id": "findme"})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "findme" in answer.json()["error"]["message"]
    assert "secret" not in answer.text
    assert "secret" in caplog.text
    assert server.get("/ready").status_code == 200


def test_strange_paths_are_just_not_found(server: RunningServer) -> None:
    for path in ("/%ff%00", "//", "/v1/models/%2e%2e/x", "/requests/", "/" + "x" * 5000):
        assert server.get(path).status_code == 404


def test_the_split_can_be_changed(server: RunningServer) -> None:
    answer = server.post("/admin/split", json={"topology": "1p1a1f"})
    assert answer.status_code == 200
    assert answer.json()["topology"] == "1p1a1f"
    refused = server.post("/admin/split", json={"topology": "9p9d"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_split")
    assert server.post("/admin/split", json={"topo": "1p1d"}).status_code == 400
