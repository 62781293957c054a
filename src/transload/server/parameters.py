"""From a typed body to what the control plane is asked for: ranges, defaults, combinations.

Every refusal names the field, the value and the allowed range. Knows nothing of HTTP or of tokens' text.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from hashlib import blake2b
from typing import NoReturn, TypeVar

import msgspec

from transload.control.messages import Sampling
from transload.errors import RequestError
from transload.server.schema import ChatBody, CompletionBody, GenerationBody

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_STOP_IDS = 128
MAX_LOGPROBS = 20
COMPLETION_TOKENS = 16
"""How long a completion gets if the caller does not say, as in OpenAI's API."""
_SEED_BITS = (1 << 63) - 1
N = TypeVar("N", int, float)


class Parameters(msgspec.Struct, frozen=True, kw_only=True):
    """A call's wishes, checked. `sampling` still lacks the choice's own seed and a clipped `min_tokens`."""

    sampling: Sampling
    seed: int | None
    max_tokens: int | None
    max_tokens_field: str
    num_choices: int
    stops: tuple[str, ...]
    include_stop: bool
    skip_special: bool
    name_tokens_by_id: bool
    add_special: bool | None
    stream: bool
    include_usage: bool


def check_parameters(body: GenerationBody, vocab_size: int, eos_ids: Collection[int]) -> Parameters:
    """Check everything of a body but its prompt. Raises `RequestError` (400) naming the field."""
    _refuse_unsupported(body)
    max_tokens, max_tokens_field = _max_tokens(body)
    if max_tokens is not None:
        _check_range(max_tokens_field, max_tokens, low=1)
    min_tokens = _ranged("min_tokens", body.min_tokens, 0, low=0)
    if max_tokens is not None and min_tokens > max_tokens:
        _refuse("min_tokens", f"min_tokens is {min_tokens}, but {max_tokens_field} only {max_tokens}")
    options = body.stream_options
    if options is not None and not body.stream:
        _refuse("stream_options", "stream_options is only allowed with stream: true")
    if body.seed is not None:
        _check_range("seed", body.seed, low=-(2**63), high=2**63 - 1)
    return Parameters(
        sampling=_sampling(body, min_tokens, vocab_size, eos_ids),
        seed=None if body.seed is None or body.seed == -1 else body.seed & _SEED_BITS,
        max_tokens=max_tokens,
        max_tokens_field=max_tokens_field,
        num_choices=_ranged("n", body.n, 1, low=1, high=MAX_CHOICES),
        stops=_stops(body.stop),
        include_stop=bool(body.include_stop_str_in_output),
        skip_special=body.skip_special_tokens is not False,
        name_tokens_by_id=bool(body.return_tokens_as_token_ids),
        add_special=body.add_special_tokens,
        stream=bool(body.stream),
        include_usage=options is not None and bool(options.include_usage),
    )


def choice_seed(base: int, choice: int) -> int:
    """The seed of one of n choices: the first gets the caller's own, so that n = 1 and n = 4 begin alike."""
    if choice == 0:
        return base
    digest = blake2b(b"transload-choice-%d-%d" % (base, choice), digest_size=8).digest()
    return int.from_bytes(digest, "little") & _SEED_BITS


def call_seed(server_seed: int, serial: int) -> int:
    """The base seed of the `serial`-th call that brings none of its own."""
    digest = blake2b(b"transload-call-%d-%d" % (server_seed, serial), digest_size=8).digest()
    return int.from_bytes(digest, "little") & _SEED_BITS


def _sampling(body: GenerationBody, min_tokens: int, vocab_size: int, eos_ids: Collection[int]) -> Sampling:
    stop_ids = _token_ids("stop_token_ids", body.stop_token_ids or [], vocab_size, MAX_STOP_IDS)
    ignore_eos = bool(body.ignore_eos)
    if not ignore_eos:
        stop_ids = (*eos_ids, *(i for i in stop_ids if i not in eos_ids))
    top_k = _ranged("top_k", body.top_k, 0, low=-1)
    return Sampling(
        temperature=_ranged("temperature", body.temperature, 1.0, low=0, high=2),
        top_p=_ranged("top_p", body.top_p, 1.0, low=0, high=1, above=True),
        top_k=0 if top_k == -1 or top_k >= vocab_size else top_k,
        min_p=_ranged("min_p", body.min_p, 0.0, low=0, high=1),
        repetition_penalty=_ranged("repetition_penalty", body.repetition_penalty, 1.0, low=0, high=10, above=True),
        presence_penalty=_ranged("presence_penalty", body.presence_penalty, 0.0, low=-2, high=2),
        frequency_penalty=_ranged("frequency_penalty", body.frequency_penalty, 0.0, low=-2, high=2),
        logit_bias=_logit_bias(body.logit_bias, vocab_size),
        logprobs=_logprobs(body),
        min_tokens=min_tokens,
        stop_ids=stop_ids,
        ignore_eos=ignore_eos,
    )


def _max_tokens(body: GenerationBody) -> tuple[int | None, str]:
    """The wished length and the name of the field that says it."""
    newer = body.max_completion_tokens if isinstance(body, ChatBody) else None
    if newer is None:
        return body.max_tokens, "max_tokens"
    if body.max_tokens is not None and body.max_tokens != newer:
        _refuse("max_tokens", f"max_tokens is {body.max_tokens} and max_completion_tokens {newer}; send one of them")
    return newer, "max_completion_tokens"


def _logprobs(body: GenerationBody) -> int | None:
    if isinstance(body, ChatBody):
        if body.top_logprobs is not None:
            _check_range("top_logprobs", body.top_logprobs, low=0, high=MAX_LOGPROBS)
            if body.top_logprobs and not body.logprobs:
                _refuse("top_logprobs", "top_logprobs needs logprobs: true")
        return (body.top_logprobs or 0) if body.logprobs else None
    assert isinstance(body, CompletionBody)
    if body.logprobs is None:
        return None
    _check_range("logprobs", body.logprobs, low=0, high=MAX_LOGPROBS)
    if body.echo:
        _refuse("logprobs", "logprobs of an echoed prompt are not supported; leave out echo or logprobs")
    return body.logprobs


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS:
        _refuse("stop", f"stop holds {len(stops)} texts; at most {MAX_STOPS} are allowed")
    for text in stops:
        if not text:
            _refuse("stop", "stop must not hold an empty text")
        if len(text) > MAX_STOP_CHARACTERS:
            _refuse("stop", f"a stop text has {len(text)} characters; at most {MAX_STOP_CHARACTERS} are allowed")
    return stops


def _logit_bias(bias: dict[int, float] | None, vocab_size: int) -> tuple[tuple[int, float], ...]:
    if not bias:
        return ()
    for token, value in bias.items():
        if not 0 <= token < vocab_size:
            _refuse("logit_bias", f"logit_bias names token {token}; the model's tokens are 0 to {vocab_size - 1}")
        if not -100 <= value <= 100:
            _refuse("logit_bias", f"logit_bias of token {token} must be between -100 and 100, got {value:g}")
    return tuple(sorted(bias.items()))


def _token_ids(field: str, ids: list[int], vocab_size: int, most: int) -> tuple[int, ...]:
    if len(ids) > most:
        _refuse(field, f"{field} holds {len(ids)} tokens; at most {most} are allowed")
    check_vocabulary(field, ids, vocab_size)
    return tuple(dict.fromkeys(ids))


def check_vocabulary(field: str, ids: list[int], vocab_size: int) -> None:
    """Refuse token ids that the model does not have."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        _refuse(field, f"{field} holds token {wrong}; the model's tokens are 0 to {vocab_size - 1}")


def _refuse_unsupported(body: GenerationBody) -> None:
    if body.response_format is not None and body.response_format.type != "text":
        _refuse(
            "response_format",
            f"response_format.type {body.response_format.type!r} is not supported; only 'text' is",
            code="unsupported_field",
        )
    if body.stream_options is not None and body.stream_options.continuous_usage_stats:
        _refuse(
            "stream_options.continuous_usage_stats",
            "stream_options.continuous_usage_stats is not supported; include_usage sends usage at the end",
            code="unsupported_field",
        )
    if isinstance(body, ChatBody) and body.tools and body.tool_choice != "none":
        _refuse(
            "tools", "tools are not supported; leave them out or send tool_choice: 'none'", code="unsupported_field"
        )
    if isinstance(body, ChatBody) and body.tool_choice not in (None, "none", "auto"):
        _refuse("tool_choice", "tool_choice is not supported; leave it out or send 'none'", code="unsupported_field")
    if isinstance(body, CompletionBody) and body.suffix:
        _refuse("suffix", "suffix is not supported; the model only continues a text", code="unsupported_field")


def _ranged(field: str, value: N | None, default: N, *, low: float, high: float = math.inf, above: bool = False) -> N:
    if value is None:
        return default
    _check_range(field, value, low=low, high=high, above=above)
    return value


def _check_range(field: str, value: float, *, low: float, high: float = math.inf, above: bool = False) -> None:
    """`above`: `low` itself is out of range."""
    if (low < value if above else low <= value) and value <= high:  # NaN fails both
        return
    if high == math.inf:
        wanted = f"at least {low:g}"
    elif above:
        wanted = f"above {low:g} and at most {high:g}"
    else:
        wanted = f"between {low} and {high}"
    text = str(value) if len(str(value)) <= 40 else str(value)[:37] + "..."
    _refuse(field, f"{field} must be {wanted}, got {text}")


def _refuse(field: str, message: str, code: str = "invalid_value") -> NoReturn:
    raise RequestError(message, param=field, code=code)
