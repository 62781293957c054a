"""From a body's prompt or conversation to tokens, and the room they leave in the context.

Long texts are tokenized on a small thread pool so that the streams of others go on. Asks nothing of the backend.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec

from transload.control.prefix import prompt_keys
from transload.errors import OverCapacity, RequestError
from transload.runtime.base import ServedModel
from transload.server.parameters import COMPLETION_TOKENS, Parameters, check_vocabulary
from transload.server.schema import ChatBody, ChatMessage, CompletionBody
from transload.server.tokens import Tokenizer

SHORT_CHARACTERS = 2000
"""Texts up to this are tokenized on the spot (well under a millisecond)."""
MAX_OFFLOADED = 64
"""Long texts that may wait for a thread; their bodies are held meanwhile."""
_ROLES = ("system", "user", "assistant", "tool", "developer", "function")
_INSTEAD = {"developer": "system", "function": "tool"}
T = TypeVar("T")


class PromptTokens(msgspec.Struct, frozen=True):
    """A prompt as the control plane takes it. `text` is what an echo begins with ("" if none is wanted)."""

    tokens: tuple[int, ...]
    keys: tuple[bytes, ...]
    max_tokens: int
    text: str = ""


class Prompts:
    """Makes prompts for one served model."""

    def __init__(self, model: ServedModel, tokenizer: Tokenizer) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self.vocab_size = min(model.arch.vocab_size, tokenizer.vocab_size)
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")
        self._num_offloaded = 0

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def of_chat(self, body: ChatBody, parameters: Parameters) -> list[PromptTokens]:
        """Render the conversation with the checkpoint's template. Raises `RequestError`."""
        messages = chat_messages(body.messages)

        def make() -> list[PromptTokens]:
            text = self._tokenizer.render_chat(messages, add_generation_prompt=body.add_generation_prompt is not False)
            tokens = self._tokenizer.encode(text, special=bool(parameters.add_special))
            return [self._prompt("messages", tokens, "", parameters, None)]

        return await self._offload(_num_characters(messages), make)

    async def of_completion(self, body: CompletionBody, parameters: Parameters) -> list[PromptTokens]:
        """One prompt per text or token list. Raises `RequestError`."""
        prompts = split_prompt(body.prompt)

        def make() -> list[PromptTokens]:
            return [self._of_prompt(prompt, bool(body.echo), parameters) for prompt in prompts]

        return await self._offload(sum(len(prompt) for prompt in prompts), make)

    async def tokenize(self, text: str, *, special: bool) -> list[int]:
        return await self._offload(len(text), lambda: self._tokenizer.encode(text, special=special))

    async def detokenize(self, tokens: list[int]) -> str:
        """Raises `RequestError` if a token is not the model's."""
        check_vocabulary("tokens", tokens, self.vocab_size)
        return await self._offload(len(tokens), lambda: self._tokenizer.decode(tokens, skip_special=False))

    async def render(self, messages: list[ChatMessage], *, add_generation_prompt: bool) -> str:
        rendered = chat_messages(messages)

        def make() -> str:
            return self._tokenizer.render_chat(rendered, add_generation_prompt=add_generation_prompt)

        return await self._offload(_num_characters(rendered), make)

    async def _offload(self, num_characters: int, make: Callable[[], T]) -> T:
        if num_characters <= SHORT_CHARACTERS:
            return make()
        if self._num_offloaded >= MAX_OFFLOADED:
            raise OverCapacity("too many long prompts wait to be tokenized", retry_after_seconds=1.0)
        self._num_offloaded += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, make)
        finally:
            self._num_offloaded -= 1

    def _of_prompt(self, prompt: str | list[int], echo: bool, parameters: Parameters) -> PromptTokens:
        if isinstance(prompt, str):
            tokens = self._tokenizer.encode(prompt, special=parameters.add_special is not False)
            return self._prompt("prompt", tokens, prompt if echo else "", parameters, COMPLETION_TOKENS)
        check_vocabulary("prompt", prompt, self.vocab_size)
        text = self._tokenizer.decode(prompt, skip_special=parameters.skip_special) if echo else ""
        return self._prompt("prompt", prompt, text, parameters, COMPLETION_TOKENS)

    def _prompt(
        self, field: str, tokens: Sequence[int], text: str, parameters: Parameters, default: int | None
    ) -> PromptTokens:
        """Check that the prompt and what is asked for fit the context. `default`: tokens if the caller says nothing."""
        context, num_tokens, asked = self._model.max_context, len(tokens), parameters.max_tokens
        if not num_tokens:
            raise RequestError(f"{field} is empty; send at least one token", param=field, code="empty_prompt")
        room = context - num_tokens
        if room < max(1, asked or 1):
            wanted = f" and {parameters.max_tokens_field} asks for {asked}" if asked is not None else ""
            advice = f"ask for at most {room}" if room > 0 else f"shorten it by at least {num_tokens - context + 1}"
            raise RequestError(
                f"the model's context is {context} tokens, but the prompt has {num_tokens}{wanted}; {advice}",
                param=field if room <= 0 else parameters.max_tokens_field,
                code="context_length_exceeded",
            )
        max_tokens = asked if asked is not None else min(room, default or room)
        if parameters.sampling.min_tokens > max_tokens:
            raise RequestError(
                f"min_tokens is {parameters.sampling.min_tokens}, but there is room for {max_tokens} only",
                param="min_tokens",
                code="invalid_value",
            )
        keys = prompt_keys(self._model.layout_digest, tokens, self._model.block_size)
        return PromptTokens(tuple(tokens), keys, max_tokens, text)


def split_prompt(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """One prompt or many, as texts or as token ids: always a list of prompts. Raises `RequestError`."""
    if isinstance(prompt, str):
        prompts: list[str | list[int]] = [prompt]
    elif prompt and all(type(part) is int for part in prompt):
        prompts = [prompt]  # type: ignore[list-item]
    elif all(isinstance(part, str) for part in prompt) or all(isinstance(part, list) for part in prompt):
        prompts = list(prompt)  # type: ignore[arg-type]
    else:
        raise RequestError(
            "prompt mixes texts, token ids and lists; send a text, a list of texts, a list of token ids, or a list of"
            " lists of token ids",
            param="prompt",
            code="wrong_type",
        )
    if not prompts or not all(prompts):
        raise RequestError("prompt is empty; send at least one token", param="prompt", code="empty_prompt")
    return prompts


def chat_messages(messages: Sequence[ChatMessage]) -> list[dict[str, object]]:
    """Messages as a chat template wants them: text content, known roles. Raises `RequestError`."""
    if not messages:
        raise RequestError("messages is empty; send at least one message", param="messages", code="empty_prompt")
    return [_chat_message(index, message) for index, message in enumerate(messages)]


def _chat_message(index: int, message: ChatMessage) -> dict[str, object]:
    at = f"messages[{index}]"
    if message.role not in _ROLES:
        raise RequestError(
            f"{at}.role must be one of {', '.join(_ROLES)}, got {message.role[:40]!r}",
            param=f"{at}.role",
            code="invalid_value",
        )
    content = message.content
    if content is None:
        if message.role != "assistant":
            raise RequestError(f"{at}.content is required", param=f"{at}.content", code="missing_field")
        content = ""
    elif not isinstance(content, str):
        for number, part in enumerate(content):
            if part.type not in ("text", "input_text", "output_text") or part.text is None:
                raise RequestError(
                    f"{at}.content[{number}] is of type {part.type[:40]!r}; this model takes parts of type 'text' only",
                    param=f"{at}.content[{number}]",
                    code="unsupported_content",
                )
        content = "\n".join(part.text or "" for part in content)
    shown: dict[str, object] = {"role": _INSTEAD.get(message.role, message.role), "content": content}
    if message.name is not None:
        shown["name"] = message.name
    if message.tool_calls:
        shown["tool_calls"] = message.tool_calls
    if message.tool_call_id is not None:
        shown["tool_call_id"] = message.tool_call_id
    return shown


def _num_characters(messages: Sequence[dict[str, object]]) -> int:
    return sum(len(content) for message in messages if isinstance(content := message["content"], str))
