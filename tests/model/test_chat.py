"""Chat templates: what transformers renders is what we render, and a template's complaint becomes a request error."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.model.tiny_tokenizers import byte_level, model_tokenizer
from transload.errors import CheckpointError, RequestError
from transload.model.chat import ChatTemplate
from transload.model.tokenizer import ModelTokenizer

# As in the metadata of SmolLM2-135M-Instruct.Q4_1.gguf (HuggingFaceTB, Apache-2.0).
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Written here; it uses what the templates of Llama 3 and Qwen use.
RICH = """{{- bos_token }}
{%- set state = namespace(count=0) %}
{%- for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('roles must alternate, got ' + message.role) }}
    {%- endif %}
    {%- set state.count = state.count + 1 %}
    {%- generation %}
    {{- '<' ~ message.role ~ ' ' ~ state.count ~ '>' ~ (message.content | trim) }}
    {%- endgeneration %}
    {%- for call in message.tool_calls or [] %}
        {{- call.function.name ~ call.function.arguments | tojson }}
    {%- endfor %}
{%- endfor %}
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{%- if documents %}{{ documents[0].text }}{% endif %}
{%- if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""
TEMPLATES = {"smollm2": SMOLLM2, "rich": RICH}

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": 'Be <brief> & "kind".\n'}, {"role": "user", "content": " ünï 🎉 "}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "{{ messages }}{% raw %}"},
        {"role": "user", "content": "<|im_end|>"},
    ],
]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def rendering(template: str | None, **named: str) -> ModelTokenizer:
    templates = {"default": template} if template is not None else {}
    return model_tokenizer(byte_level(), templates=templates | named, special_tokens={"bos_token": "<|begin|>"})


@pytest.mark.parametrize("extra", [{}, {"tools": [TOOL]}, {"enable_thinking": False}, {"documents": [{"text": "x"}]}])
@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["one", "system", "three"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_rendered_as_transformers_renders_it(
    name: str, messages: list[dict[str, Any]], prompted: bool, extra: dict[str, Any]
) -> None:
    make: Any = PreTrainedTokenizerFast
    oracle = make(tokenizer_object=byte_level(), bos_token="<|begin|>")
    wanted = oracle.apply_chat_template(
        messages, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=prompted, **extra
    )
    got = rendering(TEMPLATES[name]).render_chat(messages, add_generation_prompt=prompted, **extra)
    assert got == wanted


def test_text_parts_become_one_text() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert rendering(RICH).render_chat([{"role": "user", "content": parts}], add_generation_prompt=False) == (
        "<|begin|><user 1>one\ntwo"
    )


def test_other_parts_are_refused_by_place_and_type() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(RequestError, match=r"messages\[1\]\.content\[1\].*'image_url'"):
        rendering(RICH).render_chat([{"role": "user", "content": "a"}, {"role": "user", "content": parts}])


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [('{"city": "Köln"}', '{"city": "Köln"}'), ({"city": "x"}, '{"city": "x"}'), ("no json", '"no json"')],
)
def test_a_calls_arguments_are_shown_as_an_object(arguments: Any, shown: str) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    assert rendering(RICH).render_chat(messages, add_generation_prompt=False).endswith("weather" + shown)


def test_the_callers_messages_are_left_as_they_were() -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "one"}]}]
    rendering(SMOLLM2).render_chat(messages)
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "one"}]}]


HELLO: list[dict[str, Any]] = [{"role": "user", "content": "x"}]
LOOPS = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in 'xyz' %}{% endfor %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "messages", "says"),
    [
        (RICH, [{"role": "robot", "content": "x"}], "roles must alternate, got robot"),
        (SMOLLM2, [{"role": "user"}], "content"),
        (SMOLLM2, [{"role": "user", "content": None}], "NoneType"),
        (SMOLLM2, [], "messages is empty"),
        (None, [{"role": "user", "content": "x"}], "no chat template"),
        ("{{ messages[5].content.x.y }}", [{"role": "user", "content": "x"}], "refused"),
        ("{{ 1 / 0 }}", [{"role": "user", "content": "x"}], "division"),
        ("{{ range(999999999) | list }}", [{"role": "user", "content": "x"}], "[Rr]ange"),
        ("{{ messages.append(1) }}", [{"role": "user", "content": "x"}], "refused"),
        ("{{ ''.__class__.__mro__ }}", [{"role": "user", "content": "x"}], "unsafe"),
        ("{% set n = namespace(__class__=1) %}", [{"role": "user", "content": "x"}], "__class__"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", [{"role": "user", "content": "x"}], "too deeply"),
        (LOOPS, HELLO, "steps"),
        ("{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}", HELLO, "steps"),
        ("{{ 'a' * 10 ** 10 }}", HELLO, "repeat"),
        ("{{ 10 ** (10 ** 10) }}", HELLO, "numbers of that size"),
    ],
)
def test_what_a_template_does_not_accept_is_a_request_error(
    template: str | None, messages: list[dict[str, Any]], says: str
) -> None:
    with pytest.raises(RequestError, match=says) as refusal:
        rendering(template).render_chat(messages)
    assert (refusal.value.status, refusal.value.param) == (400, "messages")


def test_a_template_for_tools_is_used_when_there_are_tools() -> None:
    tokenizer = rendering("plain", tool_use="with tools")
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.render_chat(messages) == "plain"
    assert tokenizer.render_chat(messages, tools=[TOOL]) == "with tools"
    assert tokenizer.chat_template == "plain"


def test_the_date_is_there_for_templates_that_show_it() -> None:
    assert rendering("{{ strftime_now('%Y') }}").render_chat([{"role": "user", "content": "x"}]) in (
        str(datetime.now().year),
        str(datetime.now().year - 1),
    )


@pytest.mark.parametrize(
    "template", ["{{ " + "[" * 9000 + "]" * 9000 + " }}", "{% if x %}" * 3000 + "{% endif %}" * 3000]
)
def test_a_template_nested_beyond_reason_is_refused(template: str) -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        rendering(template)


def test_a_loop_still_knows_its_place_and_length() -> None:
    template = (
        "{% for m in messages if m.role == 'user' %}{{ loop.index }}/{{ loop.length }}{{ loop.last }} {% endfor %}"
    )
    messages = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    assert rendering(template).render_chat(messages) == "1/2False 2/2True "


def test_a_broken_template_is_refused_when_the_model_is_loaded() -> None:
    with pytest.raises(CheckpointError, match=r"chat template 'default' is not valid jinja2"):
        ChatTemplate({"default": "{% for %}"}, {})
