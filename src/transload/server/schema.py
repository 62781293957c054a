"""What callers may send: the bodies of the API, field by field, and the fields that are known but not offered.

Only shapes are said here; `parameters.py` checks ranges and meaning. Field names are OpenAI's, then vLLM's.
"""

from __future__ import annotations

import msgspec

Prompt = str | list[str | int | list[int]]


class Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Base of every body: unknown fields are refused, null means not given."""

    model: str | None = None


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis: we never pad
    continuous_usage_stats: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    type: str


class GenerationBody(Body, kw_only=True):
    """What a chat completion and a completion have in common."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    logit_bias: dict[int, float] | None = None
    n: int | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    add_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    metadata: dict[str, object] | None = None
    store: bool | None = None


class ContentPart(msgspec.Struct, kw_only=True):
    """Part of a message. Only text parts are taken; the others keep their fields to themselves."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A message as callers write it, or as they send back what they got from us (hence the answers' fields)."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, object]] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    annotations: list[object] | None = None
    audio: dict[str, object] | None = None
    function_call: dict[str, object] | None = None


class ChatBody(GenerationBody, kw_only=True):
    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    tools: list[dict[str, object]] | None = None
    tool_choice: str | dict[str, object] | None = None


class CompletionBody(GenerationBody, kw_only=True):
    prompt: Prompt
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | None = None


class TokenizeBody(Body, kw_only=True):
    """vLLM's form: either a prompt or a conversation."""

    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class SplitBody(Body, kw_only=True):
    """Where feed-forwards are to be computed, as `serve --topology` takes it."""

    topology: str


class DetokenizeBody(Body, kw_only=True):
    tokens: list[int]


ANY = object()
"""Stands for every value: the field has no effect here, whatever it says."""

HARMLESS: dict[str, tuple[object, ...]] = {
    # OpenAI's
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_key": (ANY,),
    "prompt_cache_retention": (ANY,),
    "reasoning_effort": ("none",),
    "safety_identifier": (ANY,),
    "service_tier": ("auto", "default"),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM's
    "allowed_token_ids": (),
    "bad_words": ([],),
    "best_of": (1,),
    "cache_salt": (),
    "chat_template": (),
    "chat_template_content_format": ("auto", "string"),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "detokenize": (True,),
    "documents": ([],),
    "echo": (False,),
    "early_stopping": (False,),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "include_reasoning": (True, False),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "media_io_kwargs": (),
    "mm_processor_kwargs": (),
    "priority": (0,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "request_id": (),
    "return_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "structural_tag": (),
    "thinking_token_budget": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "tools": ([],),
}
"""Known fields that do nothing here, and the values (besides null) at which doing nothing is right."""
