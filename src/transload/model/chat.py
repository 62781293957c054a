"""Renders a conversation with the chat template that a checkpoint brings, as `transformers` does.

Templates are code by strangers: they run in jinja2's immutable sandbox, see plain values only, and have so many steps.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from transload.errors import CheckpointError, RequestError

MOST_STEPS = 1_000_000
"""Turns of loops and calls of one rendering, and the length of what a template may make by repeating."""
_spent = threading.local()
Messages = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """The chat templates of one model, compiled. Most have one; some have another for requests with tools."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """`sources` by name (`default`, `tool_use`); `special_tokens` as the template names them (`bos_token`, ...)."""
        self.sources = dict(sources)
        self._special_tokens = dict(special_tokens)
        environment = _environment()
        self._compiled: dict[str, jinja2.Template] = {}
        for name, source in sources.items():
            try:
                self._compiled[name] = environment.from_string(source)
            except (
                jinja2.TemplateError,
                ArithmeticError,
                MemoryError,
                RecursionError,
                SyntaxError,
                ValueError,
            ) as error:
                raise CheckpointError(f"the model's chat template {name!r} is not valid jinja2: {error}") from error

    @property
    def source(self) -> str | None:
        """The text of the template that is used without tools; None if the model has none."""
        return self.sources.get("default") or next(iter(self.sources.values()), None)

    def render(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> str:
        """The conversation as the model's text. `extra` are the template's own switches, such as `enable_thinking`.

        Raises `RequestError` naming `messages` if there is no template, or if it does not accept the messages.
        """
        if not self._compiled:
            raise RequestError(
                "this model has no chat template; send the text to /v1/completions instead",
                param="messages",
                code="no_chat_template",
            )
        if not messages:
            raise RequestError("messages is empty, wanted at least one", param="messages")
        name = "tool_use" if tools and "tool_use" in self._compiled else "default"
        template = self._compiled.get(name) or next(iter(self._compiled.values()))
        values = {
            **self._special_tokens,
            **extra,
            "messages": [_plain(message, place) for place, message in enumerate(messages)],
            "tools": list(tools) if tools else None,
            "documents": extra.get("documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        _spent.steps = 0
        try:
            return template.render(values)
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise _refused(str(error) or type(error).__name__) from error
        except RecursionError as error:
            raise _refused("they are nested too deeply") from error


def _refused(why: str) -> RequestError:
    return RequestError(
        f"the model's chat template refused these messages: {why[:500]}", param="messages", code="chat_template_error"
    )


def _plain(message: Mapping[str, Any], place: int) -> dict[str, Any]:
    """A message as templates expect it: its text as one string, its tool calls' arguments as objects."""
    plain = dict(message)
    if isinstance(content := plain.get("content"), list):
        plain["content"] = "\n".join(
            _text_of(part, f"messages[{place}].content[{i}]") for i, part in enumerate(content)
        )
    if isinstance(calls := plain.get("tool_calls"), list):
        plain["tool_calls"] = [_with_arguments(call) for call in calls]
    return plain


def _text_of(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind != "text" or not isinstance(text, str):
        raise RequestError(
            f"{where}: a part of type {kind!r}; this model reads parts of type 'text' only", param="messages"
        )
    return text


def _with_arguments(call: Any) -> Any:
    """OpenAI's clients send a call's arguments as a JSON string; templates print them as an object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call  # the model once wrote something that is no JSON: it is shown as it was
    return {**call, "function": {**function, "arguments": arguments}}


class _Environment(ImmutableSandboxedEnvironment):
    """A sandbox that a template cannot stay in for ever, nor fill: its loops and calls are counted, its products
    measured."""

    intercepted_binops = frozenset({"*", "**"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(jinja2.nodes.For)):
            loop.iter = jinja2.nodes.Filter(loop.iter, "_counted", [], [], None, None, lineno=loop.lineno)
        tree.set_environment(self)
        return tree

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # named as jinja2 names them
        _step()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, Sized) and isinstance(times, int) and len(many) * times > MOST_STEPS:
                    raise jinja2.exceptions.SecurityError(f"a chat template may not repeat something {times} times")
        elif isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MOST_STEPS:
            raise jinja2.exceptions.SecurityError("a chat template may not compute numbers of that size")
        return super().call_binop(context, operator, left, right)


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _step()
        yield item


def _step() -> None:
    _spent.steps += 1
    if _spent.steps > MOST_STEPS:
        raise jinja2.exceptions.SecurityError(f"a chat template may not take more than {MOST_STEPS} steps")


def _environment() -> ImmutableSandboxedEnvironment:
    """What templates written for `transformers` expect to find (its utils/chat_template_utils.py)."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.filters["_counted"] = _counted
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _TemplateNamespace
    return environment


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; here it just shows what it encloses."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 reads it from the class)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_shown"), [], [], body).set_lineno(line)

    def _shown(self, caller: Callable[[], str]) -> str:
        return caller()


class _TemplateNamespace(Namespace):
    """jinja2's namespace without underscored names, through which a template could reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # `self` is not named, so that a template may write namespace(self=...).
        self, *rest = args
        names = dict(*rest, **kwargs)
        for name in names:
            _refuse_underscore(name)
        Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template may not store the attribute {name!r}")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)
