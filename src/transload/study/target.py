"""What a load generator must know of the server it is pointed at: is it there, what does it serve, how does it count.

Asks `/v1/models` and, where there is one, `/tokenize` (vLLM's and SGLang's form). Sends no load, but for one token to
see whether a model's name that is not listed is known.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Literal

import msgspec

from transload.errors import TransloadError
from transload.hardware.nearest import did_you_mean
from transload.study.answers import NOT_JSON, describe_error
from transload.study.http_client import ConnectFailed, ConnectionBroke, HttpClient, NotHttp, WholeAnswer
from transload.study.prompts import COMMON_WORDS, Vocabulary

Endpoint = Literal["completions", "chat"]
FALLBACK_IDS = (1000, 20_000)
"""Token ids that are ordinary text in nearly every vocabulary, for servers that cannot be asked."""
DISCOVERY_SECONDS = 15.0
CALIBRATION_WORDS = 64


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """What to send where."""

    model: str
    endpoint: Endpoint = "completions"
    prompt_kind: Literal["ids", "text"] = "ids"
    vocabulary: Vocabulary
    max_context: int | None = None
    """As the server tells it, if it does."""
    ignore_eos: bool = True
    """Ask for outputs of exact length; a field that vLLM, SGLang, llama.cpp and Transload know."""
    temperature: float = 0.0
    more_fields: dict[str, object] = {}
    """Added to each body as they are."""


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class _Tokens(msgspec.Struct):
    tokens: list[int]
    max_model_len: int | None = None


async def discover(
    client: HttpClient,
    *,
    model: str | None = None,
    endpoint: Endpoint = "completions",
    prompt_kind: Literal["auto", "ids", "text"] = "auto",
    id_range: tuple[int, int] | None = None,
) -> Target:
    """Find out what `Target` needs. `id_range`: use these token ids (first, one past the last) instead of asking.

    Raises `TransloadError` if no server answers or it refuses.
    """
    models = await _models(client)
    if model is None:
        if not models:
            raise TransloadError(f"{client.address.url} does not tell which models it serves; name one with --model")
        model = models[0].id
    elif models and model not in {entry.id for entry in models}:
        await _refuse_unknown_model(client, model, [entry.id for entry in models], endpoint)
    kind: Literal["ids", "text"] = "text" if endpoint == "chat" or prompt_kind == "text" else "ids"
    max_context = next((entry.max_model_len for entry in models if entry.id == model), None)
    vocabulary, told_context = await _vocabulary(client, model, endpoint)
    if id_range is not None:
        vocabulary = msgspec.structs.replace(vocabulary, ids=tuple(range(*id_range)))
    return Target(
        model=model,
        endpoint=endpoint,
        prompt_kind=kind,
        vocabulary=vocabulary,
        max_context=max_context or told_context,
    )


async def _models(client: HttpClient) -> list[_Model]:
    url = client.address.url
    try:
        status, content = await _fetch(client, "GET", "/v1/models", b"")
    except TimeoutError:
        raise TransloadError(f"{url} took the connection but did not answer in {DISCOVERY_SECONDS:g} s") from None
    except ConnectFailed as problem:
        raise TransloadError(
            f"no server at {url}: {problem}; start one with `transload serve`, or give the address of one"
        ) from None
    except (ConnectionBroke, NotHttp) as problem:
        raise TransloadError(f"{url} does not speak HTTP like a model server: {problem}") from None
    if status in (401, 403):
        raise TransloadError(
            f"{url} refuses us: {describe_error(content)} (HTTP {status}); give the key with --api-key"
        )
    if status != 200:
        return []
    try:
        return msgspec.json.decode(content, type=_Models).data
    except NOT_JSON:
        return []


async def _refuse_unknown_model(client: HttpClient, model: str, listed: Sequence[str], endpoint: Endpoint) -> None:
    """A server may know more names than it lists, so it is asked; every request of a load would be answered alike."""
    path: str = "/v1/completions"
    prompt: dict[str, object] = {"prompt": _LEAD}
    if endpoint == "chat":
        path, prompt = "/v1/chat/completions", {"messages": [{"role": "user", "content": _LEAD}]}
    body = msgspec.json.encode({"model": model, "max_tokens": 1, **prompt})
    try:
        status, _ = await _fetch(client, "POST", path, body)
    except (TimeoutError, ConnectFailed, ConnectionBroke, NotHttp):
        return  # the load itself will show what is wrong
    if status == 404:
        meant = did_you_mean(model, listed)
        raise TransloadError(f'{client.address.url} serves no model "{model}"{meant}; it lists: {", ".join(listed)}')


async def _vocabulary(client: HttpClient, model: str, endpoint: Endpoint) -> tuple[Vocabulary, int | None]:
    """Words that are one token each, their ids, and the longest context the server tells; a guess if it cannot say."""
    fallback = Vocabulary(tuple(range(*FALLBACK_IDS)))
    whole = await _tokenize(client, {"model": model, "prompt": _sentence(COMMON_WORDS), "add_special_tokens": False})
    if whole is None:
        return fallback, None
    single = await _single_token_words(client, model, COMMON_WORDS)
    if len(single) < CALIBRATION_WORDS:
        return fallback, whole.max_model_len
    words = list(single)
    text = " ".join(words[:CALIBRATION_WORDS])
    around: dict[str, object] = {"model": model}
    if endpoint == "chat":
        around["messages"] = [{"role": "user", "content": text}]
    else:
        around["prompt"] = text
    framed = await _tokenize(client, around)
    overhead = 0 if framed is None else max(0, len(framed.tokens) - CALIBRATION_WORDS)
    return Vocabulary(tuple(sorted(set(single.values()))), tuple(words), overhead), whole.max_model_len


async def _single_token_words(client: HttpClient, model: str, words: Sequence[str]) -> dict[str, int]:
    """Those words that are one token each in running text, found by halving: a few questions, not one a word."""
    found = await _tokenize(client, {"model": model, "prompt": _sentence(words), "add_special_tokens": False})
    if found is None:
        return {}
    num_lead = len(_LEAD.split())  # the lead is of common words too; if they are not one token each, nothing is
    if len(found.tokens) == num_lead + len(words):
        return dict(zip(words, found.tokens[num_lead:], strict=True))
    if len(words) == 1:
        return {}
    middle = len(words) // 2
    return {
        **await _single_token_words(client, model, words[:middle]),
        **await _single_token_words(client, model, words[middle:]),
    }


_LEAD = "the"


def _sentence(words: Sequence[str]) -> str:
    """Words in running text: the lead takes the first place, where tokenizers treat a word differently."""
    return " ".join((_LEAD, *words))


async def _tokenize(client: HttpClient, body: dict[str, object]) -> _Tokens | None:
    try:
        status, content = await _fetch(client, "POST", "/tokenize", msgspec.json.encode(body))
        return msgspec.json.decode(content, type=_Tokens) if status == 200 else None
    except (TimeoutError, ConnectFailed, ConnectionBroke, NotHttp, *NOT_JSON):
        return None  # an optional convenience: without it prompts are made by the fallback


async def _fetch(client: HttpClient, method: str, path: str, body: bytes) -> tuple[int, bytes]:
    answer = WholeAnswer()
    async with asyncio.timeout(DISCOVERY_SECONDS):
        await client.exchange(method, path, body, answer)
    return answer.status, answer.content
