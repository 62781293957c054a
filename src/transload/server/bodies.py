"""From bytes on a connection to a typed body: size and time limits, JSON, field names and types.

Every refusal names the field, what came and what was expected. Never looks at what a field means.
"""

from __future__ import annotations

import asyncio
import difflib
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, NoReturn, TypeVar

import msgspec

from transload.errors import OverCapacity, RequestError
from transload.server.connection import CONNECTION, GuardedConnection
from transload.server.schema import ANY, HARMLESS, Body

Scope = MutableMapping[str, Any]
AsgiMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[AsgiMessage]]
Send = Callable[[AsgiMessage], Awaitable[None]]


class BodyLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller may send, and how long that may take."""

    max_bytes: int
    seconds: float = 30.0
    held_bytes: int = 256 * 2**20
    """Of all bodies that have begun and are not complete."""


T = TypeVar("T", bound=Body)

_AT = re.compile(r" - at (?:`key` in )?`(.*)`$")
_UNKNOWN = re.compile(r"unknown field `(.*?)`")
_MISSING = re.compile(r"missing required field `(.*?)`")
_TYPES = re.compile(r"Expected `(.*)`, got `(.*)`$")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
_STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d+|\.\.\.)\]")


class CallerGone(Exception):
    """The caller closed the connection before the body was complete: there is no one to answer."""


class BodyReader:
    """Reads bodies, and knows how many bytes of unfinished ones are held."""

    def __init__(self, limits: BodyLimits) -> None:
        self._limits = limits
        self._num_held_bytes = 0

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body of a call. Refuses what is too large before reading it, and what comes too slowly.

        Raises `RequestError` (413, 408), `OverCapacity` or `CallerGone`.
        """
        limits = self._limits
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > limits.max_bytes:
                _refuse_size(limits.max_bytes)
        connection: GuardedConnection | None = scope.get(CONNECTION)
        whole = None if connection is None else connection.whole_body()
        if whole is not None:
            if len(whole) > limits.max_bytes:
                _refuse_size(limits.max_bytes)
            return whole
        try:
            async with asyncio.timeout(limits.seconds):
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise CallerGone
                body: bytes = message.get("body", b"")
                if not message.get("more_body", False) and len(body) <= limits.max_bytes:
                    return body
                return await self._read_rest(message, receive)
        except TimeoutError:
            raise RequestError(
                f"the body did not arrive within {limits.seconds:g} seconds; send it faster or send less",
                status=408,
                code="body_timeout",
            ) from None

    async def _read_rest(self, message: AsgiMessage, receive: Receive) -> bytes:
        """Go on after the first message, as long as the size allows it."""
        parts: list[bytes] = []
        num_bytes = 0
        try:
            while True:
                part: bytes = message.get("body", b"")
                parts.append(part)
                num_bytes += len(part)
                self._num_held_bytes += len(part)
                if num_bytes > self._limits.max_bytes:
                    _refuse_size(self._limits.max_bytes)
                if not message.get("more_body", False):
                    return b"".join(parts)
                if self._num_held_bytes > self._limits.held_bytes:
                    raise OverCapacity("too many large bodies are being sent at once", retry_after_seconds=1.0)
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise CallerGone
        finally:
            self._num_held_bytes -= num_bytes


def _refuse_size(max_bytes: int) -> NoReturn:
    raise RequestError(
        f"the body is larger than this server takes ({max_bytes} bytes); send less or raise server.max_body",
        status=413,
        code="body_too_large",
    )


def parse_body(raw: bytes, kind: type[T]) -> T:
    """Decode a body strictly into `kind`.

    Fields this server knows but does not offer pass if they ask for nothing (see `schema.HARMLESS`).
    Raises `RequestError` (400) naming the field.
    """
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if "out of range" in str(error):  # a number like 1e999: decoding it untyped would lose its place
            raise _name_field(str(error), {}) from None
        return _parse_slowly(raw, kind)


def _parse_slowly(raw: bytes, kind: type[T]) -> T:
    """Find what is wrong with a body, or that nothing is once the fields without effect are left out."""
    fields = _decode_json(raw)
    if not isinstance(fields, dict):
        raise RequestError(f"the body must be a JSON object, got {_describe(fields)}", code="invalid_json")
    known = {field.encode_name for field in msgspec.structs.fields(kind)}
    kept: dict[str, object] = {}
    for name, value in fields.items():
        if name in known:
            kept[name] = value
        else:
            _check_without_effect(name, value, known)
    try:
        return msgspec.convert(kept, kind, strict=True)
    except msgspec.ValidationError as error:
        raise _name_field(str(error), kept) from None


def _decode_json(raw: bytes) -> object:
    try:
        return msgspec.json.decode(raw)
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8 ({error.reason}); encode it as UTF-8", code="invalid_json") from None
    except RecursionError:
        raise RequestError("the body is nested too deeply", code="invalid_json") from None
    except msgspec.DecodeError as error:
        reason = str(error).partition(" - at ")[0]
        if not raw.strip():
            reason = "it is empty"
        elif _SURROGATE.search(raw):
            reason += "; it holds a \\ud800-\\udfff escape that is no half of a pair"
        raise RequestError(f"the body is not valid JSON: {reason}", code="invalid_json") from None


def _check_without_effect(name: str, value: object, known: set[str]) -> None:
    """Pass a field that this server does not offer if it asks for nothing."""
    if name not in HARMLESS:
        close = difflib.get_close_matches(name, [*known, *HARMLESS], 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RequestError(f"unknown field {_shorten(name)!r}{hint}", param=_shorten(name), code="unknown_field")
    allowed = HARMLESS[name]
    if value is None or ANY in allowed or any(type(value) is type(a) and value == a for a in allowed):
        return
    raise RequestError(f"{name} is not supported by this server; leave it out", param=name, code="unsupported_field")


def _name_field(message: str, fields: dict[str, object]) -> RequestError:
    """Turn msgspec's message into one that names the field, what came and what was expected."""
    at = _AT.search(message)
    path = at.group(1).removeprefix("$").removeprefix(".") if at else ""
    what = message[: at.start()] if at else message
    missing, unknown, types = _MISSING.search(what), _UNKNOWN.search(what), _TYPES.search(what)
    if missing or unknown:
        found = missing or unknown
        assert found is not None
        param = f"{path}.{found.group(1)}" if path else found.group(1)
        text = f"{param} is required" if missing else f"unknown field {param!r}"
        return RequestError(text, param=param, code="missing_field" if missing else "unknown_field")
    if types:
        got = _describe(_lookup(fields, path))
        wanted = types.group(1).replace(" | null", "").replace(" | ", " or ")
        if "`key` in" in message:
            return RequestError(f"{path}: keys must be of type {wanted}", param=path, code="wrong_type")
        return RequestError(f"{path} must be of type {wanted}, got {got}", param=path, code="wrong_type")
    return RequestError(f"{path}: {what}" if path else what, param=path or None, code="invalid_value")


def _lookup(value: object, path: str) -> object:
    for step in _STEP.finditer(path):
        name, index = step.groups()
        try:
            if name is not None:
                assert isinstance(value, dict)
                value = value[name]
            elif isinstance(value, dict):  # msgspec does not say which key: the first that is no number
                value = next((v for v in value.values() if isinstance(v, bool) or not isinstance(v, int | float)), None)
            else:
                assert isinstance(value, list)
                value = value[int(index)]
        except (KeyError, IndexError, AssertionError, ValueError):
            return value
    return value


def _describe(value: object) -> str:
    """A JSON value in a few words."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"the number {_shorten(str(value))}"
        case str():
            return f"the text {_shorten(value)!r}"
        case list():
            return "a list"
        case _:
            return "an object"


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
