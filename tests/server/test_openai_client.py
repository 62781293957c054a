"""What the real `openai` client sees."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.server.conftest import Serve
from tests.server.fakes import EOS, Script
from transload.control.messages import Request
from transload.errors import OverCapacity

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


def test_a_chat_completion_returns_text_usage_and_finish_reason(serve: Serve) -> None:
    server = serve(Script(text="Grüße, Welt", num_cached_tokens=16))
    answer = server.client().chat.completions.create(model="default", messages=HELLO)
    assert answer.object == "chat.completion"
    assert answer.model == "tiny/bytes"
    assert answer.choices[0].message.content == "Grüße, Welt"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    prompt = "user: hi\nassistant: "
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len("Grüße, Welt".encode()) + 1  # and the end-of-sequence token
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 16
    request = server.backend.seen[0].request
    assert request.prompt == tuple(prompt.encode())
    assert request.max_tokens == 512 - len(prompt)
    assert len(request.block_keys) == len(prompt) // 16
    assert request.sampling.stop_ids == (EOS,)


@pytest.mark.parametrize("step_tokens", [1, 3, 100])
def test_a_streamed_chat_has_the_same_text_and_ends_with_usage(serve: Serve, step_tokens: int) -> None:
    server = serve(Script(text="Grüße, 🌍!", step_tokens=step_tokens))
    chunks = list(
        server.client().chat.completions.create(
            model="default",
            messages=HELLO,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Grüße, 🌍!"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len("Grüße, 🌍!".encode()) + 1
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_a_stream_without_stream_options_has_no_usage(serve: Serve) -> None:
    client = serve(Script(text="abc")).client()
    chunks = list(client.chat.completions.create(model="default", messages=HELLO, stream=True))
    assert all(c.usage is None and c.choices for c in chunks)


def test_the_async_client_runs_many_streams_at_once(serve: Serve) -> None:
    server = serve(lambda request: Script(text="x" * (request.num_prompt_tokens - 10), step_seconds=0.001))

    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        stream = await client.completions.create(
            model="default", prompt="p" * (20 + number), max_tokens=100, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, number) for number in range(30)))

    texts = asyncio.run(main())
    assert [len(text) for text in texts] == [11 + number for number in range(30)]  # one token is the BOS


def test_a_completion_stops_at_max_tokens_with_reason_length(serve: Serve) -> None:
    server = serve(Script(text="abcdefghijklmnopqrstuvwxyz"))
    client = server.client()
    answer = client.completions.create(model="default", prompt="go", max_tokens=5)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("abcde", "length")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    default = client.completions.create(model="default", prompt="go")
    assert default.choices[0].text == "abcdefghijklmnop"  # 16 tokens, as in OpenAI's API


def test_a_list_of_prompts_and_n_give_choices_in_order_with_seeds_of_their_own(serve: Serve) -> None:
    server = serve(lambda request: Script(text=chr(request.prompt[-1]), num_cached_tokens=2))
    answer = server.client().completions.create(model="default", prompt=["xa", "xb"], n=2, seed=11)
    assert [choice.text for choice in answer.choices] == ["a", "a", "b", "b"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    seeds = [seen.request.sampling.seed for seen in server.backend.seen]
    assert seeds[0] == seeds[2] == 11
    assert seeds[1] == seeds[3] != 11
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 6  # each prompt once: BOS and two bytes
    assert answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 4


def test_n_choices_stream_side_by_side_and_share_one_usage(serve: Serve) -> None:
    server = serve(Script(text="abc", step_seconds=0.001))
    chunks = list(
        server.client().chat.completions.create(
            model="default",
            messages=HELLO,
            n=3,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    for index in range(3):
        own = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in own) == "abc"
        assert own[-1].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12


def test_prompts_as_token_ids_reach_the_backend_unchanged(serve: Serve) -> None:
    server = serve()
    client = server.client()
    client.completions.create(model="default", prompt=[104, 105])
    client.completions.create(model="default", prompt=[[104], [105, 106]])
    assert [seen.request.prompt for seen in server.backend.seen] == [(104, 105), (104,), (105, 106)]


def test_echo_begins_the_text_with_the_prompt_in_both_forms(serve: Serve) -> None:
    client = serve(Script(text=" there")).client()
    whole = client.completions.create(model="default", prompt="hi", echo=True)
    assert whole.choices[0].text == "hi there"
    chunks = client.completions.create(model="default", prompt=[104, 105], echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "hi there"


def test_chat_logprobs_have_openais_shape_and_join_to_the_text(serve: Serve) -> None:
    client = serve(Script(text="hé")).client()
    answer = client.chat.completions.create(
        model="default",
        messages=HELLO,
        logprobs=True,
        top_logprobs=2,
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert b"".join(bytes(entry.bytes or []) for entry in content).decode() == "hé"
    assert [entry.logprob for entry in content] == [-0.5, -0.5, -0.5]
    assert [[top.logprob for top in entry.top_logprobs] for entry in content] == [[-0.5, -1.5]] * 3
    assert content[0].top_logprobs[0].token == "h"


def test_streamed_logprobs_are_those_of_the_whole_answer(serve: Serve) -> None:
    client = serve(Script(text="héllo", step_tokens=2)).client()
    whole = client.completions.create(model="default", prompt="x", logprobs=1)
    chunks = list(client.completions.create(model="default", prompt="x", logprobs=1, stream=True))
    assert whole.choices[0].logprobs is not None
    tokens = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.tokens or []]
    offsets = [o for c in chunks if c.choices[0].logprobs for o in c.choices[0].logprobs.text_offset or []]
    assert tokens == whole.choices[0].logprobs.tokens
    assert offsets == whole.choices[0].logprobs.text_offset == [0, 1, 1, 2, 3, 4]
    assert whole.choices[0].logprobs.top_logprobs is not None
    assert whole.choices[0].logprobs.top_logprobs[0] == {"h": -0.5}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("step_tokens", [1, 2, 5])
def test_a_stop_string_ends_the_text_before_it_and_frees_the_request(
    serve: Serve, stream: bool, step_tokens: int
) -> None:
    server = serve(Script(text="one END two", step_tokens=step_tokens, hold_after=9))
    client = server.client()
    if stream:
        chunks = list(
            client.completions.create(
                model="default",
                prompt="x",
                stop=["nothing", "END"],
                stream=True,
                max_tokens=50,
                stream_options={"include_usage": True},
            )
        )
        text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
        reason, usage = chunks[-2].choices[0].finish_reason, chunks[-1].usage
    else:
        answer = client.completions.create(model="default", prompt="x", stop="END", max_tokens=50)
        text, reason, usage = answer.choices[0].text, answer.choices[0].finish_reason, answer.usage
    assert (text, reason) == ("one ", "stop")
    assert usage is not None
    assert usage.completion_tokens == len("one END")
    assert server.backend.seen[0].stopped
    assert not server.backend.seen[0].cancelled


def test_text_that_only_began_like_a_stop_string_is_sent_in_the_end(serve: Serve) -> None:
    client = serve(Script(text="one EN")).client()
    chunks = client.completions.create(model="default", prompt="x", stop="END", stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "one EN"


def test_the_stop_string_is_kept_if_asked_for(serve: Serve) -> None:
    client = serve(Script(text="one END two")).client()
    answer = client.completions.create(
        model="default", prompt="x", stop="END", extra_body={"include_stop_str_in_output": True}
    )
    assert answer.choices[0].text == "one END"


def test_logprobs_never_show_tokens_behind_a_stop_string(serve: Serve) -> None:
    client = serve(Script(text="ab--secret", step_tokens=4)).client()
    answer = client.completions.create(model="default", prompt="x", stop="--", logprobs=0, max_tokens=50)
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens == ["a", "b"]


def test_an_error_before_the_first_token_is_a_status_in_either_form(serve: Serve) -> None:
    script = Script(text="", ends="error", error="lost decode-0: killed", error_code="worker_lost")
    client = serve(script).client()
    with pytest.raises(openai.InternalServerError, match="lost decode-0") as whole:
        client.completions.create(model="default", prompt="x")
    assert (whole.value.status_code, whole.value.code) == (503, "worker_lost")
    with pytest.raises(openai.InternalServerError, match="lost decode-0"):
        list(client.completions.create(model="default", prompt="x", stream=True))


def test_an_error_in_mid_stream_is_an_error_event_and_no_done(serve: Serve) -> None:
    script = Script(text="abc", ends="error", error="lost decode-0: killed", error_code="worker_lost")
    server = serve(script)
    seen: list[str] = []
    stream = server.client().completions.create(model="default", prompt="x", stream=True, max_tokens=50)
    with pytest.raises(openai.APIError, match="lost decode-0") as error:
        seen.extend(chunk.choices[0].text for chunk in stream)
    assert "".join(seen) == "abc"
    assert error.value.code == "worker_lost"
    raw = server.post("/v1/completions", json={"prompt": "x", "stream": True, "max_tokens": 50})
    assert "[DONE]" not in raw.text
    assert raw.text.rstrip().splitlines()[-1].startswith('data: {"error":')


def test_one_choices_error_ends_the_call_and_frees_the_others(serve: Serve) -> None:
    def script(request: Request) -> Script:
        if request.id == 2:
            return Script(text="ab", ends="error", error="boom", error_code="worker_failed")
        return Script(text="abcdef", hold_after=3)

    server = serve(script)
    stream = server.client().completions.create(model="default", prompt="x", n=3, stream=True, max_tokens=50)
    with pytest.raises(openai.APIError, match="boom"):
        list(stream)
    assert [seen.cancelled for seen in server.backend.seen if seen.request.id != 2] == [True, True]


def test_a_bug_in_the_backend_is_an_error_the_caller_sees(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    client = serve(Script(text="ab", crash=RuntimeError("secret detail"))).client()
    with pytest.raises(openai.InternalServerError) as whole:
        client.completions.create(model="default", prompt="x", extra_headers={"x-request-id": "findme"})
    assert "findme" in str(whole.value)
    assert "secret detail" not in str(whole.value)
    with pytest.raises(openai.APIError):
        list(client.completions.create(model="default", prompt="x", stream=True, max_tokens=2))
    assert "secret detail" in caplog.text


def test_over_capacity_is_429_with_whole_seconds_to_wait(serve: Serve) -> None:
    server = serve(Script(refuse=OverCapacity("256 requests wait already", retry_after_seconds=2.2)))
    with pytest.raises(openai.RateLimitError, match="256 requests") as error:
        server.client().completions.create(model="default", prompt="x")
    assert error.value.response.headers["retry-after"] == "3"
    assert error.value.code == "over_capacity"
    assert 'transload_rejected_total{code="over_capacity"} 1.0' in server.get("/metrics").text


def test_a_call_refused_half_way_frees_the_choices_that_were_admitted(serve: Serve) -> None:
    def script(request: Request) -> Script:
        full = OverCapacity("full", retry_after_seconds=1)
        return Script(refuse=full) if request.id == 3 else Script(text="abc", hold_after=0)

    server = serve(script)
    with pytest.raises(openai.RateLimitError):
        server.client().completions.create(model="default", prompt="x", n=3)
    assert [seen.cancelled for seen in server.backend.seen] == [True, True]


def test_client_errors_have_openais_classes(serve: Serve) -> None:
    client = serve().client()
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="default", messages=HELLO, temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert missing.value.code == "model_not_found"
    assert "tiny/bytes" in missing.value.message


def test_models_are_listed_and_default_names_the_served_one(serve: Serve) -> None:
    client = serve().client()
    assert [model.id for model in client.models.list()] == ["tiny/bytes"]
    assert client.models.retrieve("default").id == "tiny/bytes"
    assert client.models.retrieve("tiny/bytes").id == "tiny/bytes"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_events_on_the_wire_are_server_sent_events_ending_in_done(serve: Serve) -> None:
    server = serve(Script(text='a"\\\n\u2028b', step_tokens=20))
    answer = server.post("/v1/completions", json={"prompt": "x", "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: ") and "\n" not in line for line in lines[:-1])
    assert json.loads(lines[0].removeprefix("data: "))["choices"][0]["text"] == 'a"\\\n\u2028b'
