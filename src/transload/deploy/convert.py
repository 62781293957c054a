"""A tree of values to the structs of `spec.py`, field by field, refusing by name whatever does not belong.

Knows types, not meanings: what several fields must agree on is in `check.py`. Allowed keys, values and ranges are read
off the structs, so that there is one place that says them.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeVar

import msgspec
from msgspec import inspect

from transload.deploy.tree import Items, Leaf, Node, Table
from transload.errors import DeploymentError
from transload.units import format_bytes, format_rate, parse_bytes, parse_rate, parse_seconds

Kind = TypeVar("Kind", bound=msgspec.Struct)
PARSERS: dict[str, Callable[[str], float]] = {
    "bytes": parse_bytes,
    "seconds": parse_seconds,
    "bytes per second": parse_rate,
}
"""Readers of what is written with a unit."""
SHOWN = 60
"""Characters of a wrong value that a message repeats."""


def convert(node: Node, kind: type[Kind]) -> Kind:
    """Build a struct. Raises `DeploymentError` naming place, path, value, what is allowed and what was meant."""
    made = _convert(node, _type_of(kind), "")
    assert isinstance(made, kind)
    return made


def refusal(where: str, path: str, problem: str, *, value: str | None = None) -> DeploymentError:
    """The one form of error: `where: path = value: problem`."""
    subject = f"{path} = {value}" if value is not None else path
    return DeploymentError(f"{where}: {subject}: {problem}")


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """`; did you mean "x"?` if a known word is close, else nothing."""
    close = difflib.get_close_matches(word.lower(), [name.lower() for name in known], n=1, cutoff=0.55)
    if not close:
        return ""
    name = next(name for name in known if name.lower() == close[0])
    return f'; did you mean "{name}"?'


def show(node: Node) -> str:
    """A value as a message repeats it, cut to a line."""
    match node:
        case Leaf(value=str()):
            text = msgspec.json.encode(node.text).decode()
        case Leaf():
            text = node.text or "null"
        case Items():
            text = "[" + ", ".join(show(item) for item in node.nodes[:SHOWN]) + "]"
        case Table():
            text = "{" + ", ".join(f"{key}: ..." for key in list(node.entries)[:SHOWN]) + "}"
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


@cache
def _type_of(kind: type[msgspec.Struct]) -> inspect.Type:
    return inspect.type_info(kind)


def _convert(node: Node, kind: inspect.Type, path: str) -> object:
    match kind:
        case inspect.StructType():
            return _struct(node, kind, path)
        case inspect.UnionType():
            return _union(node, kind, path)
        case inspect.VarTupleType():
            return _list(node, kind, path)
        case inspect.TupleType():
            if not isinstance(node, Items) or len(node.nodes) != len(kind.item_types):
                raise _wrong(node, kind, path)
            pairs = zip(node.nodes, kind.item_types, strict=True)
            return tuple(_convert(item, sub, f"{path}[{i}]") for i, (item, sub) in enumerate(pairs))
        case inspect.LiteralType():
            return _literal(node, kind, path)
        case inspect.Metadata(extra={"unit": unit}):
            return _quantity(node, kind.type, str(unit), path)
        case inspect.Metadata(type=inspect.StrType()):
            return _text(node, kind, path)
        case inspect.StrType():
            return _text(node, kind, path)
        case inspect.BoolType():
            if isinstance(node, Leaf) and isinstance(node.value, bool):
                return node.value
            raise _wrong(node, kind, path)
        case inspect.IntType() | inspect.FloatType():
            return _number(node, kind, path)
        case _:
            raise AssertionError(f"{path}: a deployment file has no {kind}")


def _struct(node: Node, kind: inspect.StructType, path: str) -> object:
    fields = {field.encode_name: field for field in kind.fields}
    if isinstance(node, Leaf) and node.value is None:
        raise refusal(node.where, path or "the file", f"empty; keys that can stand here: {', '.join(fields)}")
    if not isinstance(node, Table):
        raise _wrong(node, kind, path)
    values: dict[str, object] = {}
    for key, entry in node.entries.items():
        inner = f"{path}.{key}" if path else key
        field = fields.get(key)
        if field is None:
            guess = did_you_mean(key, list(fields))
            raise refusal(node.key_where[key], inner, f"no such key{guess or ';'} allowed: {', '.join(fields)}")
        values[field.name] = _convert(entry, field.type, inner)
    for field in kind.fields:
        if field.required and field.name not in values:
            raise refusal(
                node.where, path or "the file", f'the key "{field.encode_name}" is missing: {_wanted(field.type)}'
            )
    return kind.cls(**values)


def _list(node: Node, kind: inspect.VarTupleType, path: str) -> object:
    if not isinstance(node, Items):
        raise _wrong(node, kind, path)
    if kind.min_length is not None and len(node.nodes) < kind.min_length:
        raise refusal(node.where, path, f"an empty list; at least {kind.min_length} needed")
    if kind.max_length is not None and len(node.nodes) > kind.max_length:
        raise refusal(node.where, path, f"a list of {len(node.nodes)}; at most {kind.max_length} are possible")
    return tuple(_convert(item, kind.item_type, f"{path}[{index}]") for index, item in enumerate(node.nodes))


def _union(node: Node, kind: inspect.UnionType, path: str) -> object:
    """Null if that is allowed, a list if it is one, else the remaining kind."""
    kinds = [sub for sub in kind.types if not isinstance(sub, inspect.NoneType)]
    if isinstance(node, Leaf) and node.value is None and len(kinds) < len(kind.types):
        return None
    lists = [sub for sub in kinds if isinstance(sub, inspect.VarTupleType)]
    others = [sub for sub in kinds if not isinstance(sub, inspect.VarTupleType)]
    fitting = lists if isinstance(node, Items) and lists else others
    if lists and not isinstance(node, Items):
        value = node.value if isinstance(node, Leaf) else None
        if not any(isinstance(sub, inspect.LiteralType) and value in sub.values for sub in others):
            raise _wrong(node, kind, path)
    assert len(fitting) == 1, kind
    return _convert(node, fitting[0], path)


def _literal(node: Node, kind: inspect.LiteralType, path: str) -> object:
    values = [str(value) for value in kind.values]
    if not isinstance(node, Leaf) or node.value is None:
        raise _wrong(node, kind, path)
    if node.text in values:
        return kind.values[values.index(node.text)]
    noun = re.sub(r"\[[0-9]+\]", "", path).rpartition(".")[2]
    guess = did_you_mean(node.text, values)
    raise refusal(node.where, path, f"no such {noun}{guess or ';'} allowed: {', '.join(values)}", value=show(node))


def _text(node: Node, kind: inspect.Type, path: str) -> str:
    bare = kind.type if isinstance(kind, inspect.Metadata) else kind
    assert isinstance(bare, inspect.StrType)
    if not isinstance(node, Leaf) or node.value is None or isinstance(node.value, bool):
        quoted = isinstance(node, Leaf) and isinstance(node.value, bool)
        raise _wrong(node, kind, path, more="; put it in quotes if it is meant as text" if quoted else "")
    if bare.min_length is not None and len(node.text) < bare.min_length:
        raise refusal(node.where, path, "empty text; leave the key out to get the default", value='""')
    if bare.max_length is not None and len(node.text) > bare.max_length:
        raise refusal(node.where, path, f"longer than {bare.max_length} characters", value=show(node))
    if bare.pattern is not None and not re.search(bare.pattern, node.text):
        raise _wrong(node, kind, path)
    return node.text


def _quantity(node: Node, kind: inspect.Type, unit: str, path: str) -> object:
    """Text with a unit becomes a plain number; then the range is checked as for any number."""
    if isinstance(node, Leaf) and isinstance(node.value, str):
        try:
            number = PARSERS[unit](node.text)
        except ValueError as error:
            problem = f"{error}; wanted {_wanted(kind, unit)}"
            raise refusal(node.where, path, problem, value=show(node)) from None
        return _number(Leaf(number, node.text, node.where), kind, path, unit)
    return _number(node, kind, path, unit)


def _number(node: Node, kind: inspect.Type, path: str, unit: str | None = None) -> int | float:
    assert isinstance(kind, inspect.IntType | inspect.FloatType)
    value = node.value if isinstance(node, Leaf) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _wrong(node, kind, path, unit=unit)
    if isinstance(kind, inspect.IntType) and value != int(value):
        raise _wrong(node, kind, path, unit=unit)
    number = int(value) if isinstance(kind, inspect.IntType) else float(value)
    low_enough = (kind.le is None or number <= kind.le) and (kind.lt is None or number < kind.lt)
    high_enough = (kind.ge is None or number >= kind.ge) and (kind.gt is None or number > kind.gt)
    if not (low_enough and high_enough):
        raise _wrong(node, kind, path, unit=unit)
    return number


def _wrong(node: Node, kind: inspect.Type, path: str, *, unit: str | None = None, more: str = "") -> DeploymentError:
    if isinstance(node, Leaf) and node.value is None and not more:
        return refusal(node.where, path or "the file", f"no value; wanted {_wanted(kind, unit)}, or leave the key out")
    return refusal(node.where, path or "the file", f"wanted {_wanted(kind, unit)}{more}", value=show(node))


def _wanted(kind: inspect.Type, unit: str | None = None) -> str:
    """What a type accepts, in words."""
    match kind:
        case inspect.Metadata(extra={"unit": name}):
            return _wanted(kind.type, str(name))
        case inspect.Metadata(extra_json_schema={"description": words}):
            return str(words)
        case inspect.IntType() | inspect.FloatType():
            return _wanted_number(kind, unit)
        case inspect.BoolType():
            return "true or false"
        case inspect.StrType():
            return "text"
        case inspect.LiteralType():
            return "one of " + ", ".join(str(value) for value in kind.values)
        case inspect.VarTupleType():
            return f"a list, each item {_wanted(kind.item_type)}"
        case inspect.TupleType():
            return f"a list of {len(kind.item_types)}, each item {_wanted(kind.item_types[0])}"
        case inspect.UnionType():
            return ", or ".join(_wanted(sub) for sub in kind.types if not isinstance(sub, inspect.NoneType))
        case inspect.StructType():
            return f"a mapping with keys of {', '.join(field.encode_name for field in kind.fields)}"
        case _:
            raise AssertionError(kind)


def _wanted_number(kind: inspect.IntType | inspect.FloatType, unit: str | None) -> str:
    if unit == "bytes":
        return f'a size such as "4 GiB" or a number of bytes, at most {format_bytes(float(kind.le or 0))}'
    if unit == "seconds":
        return f'a duration such as "200 ms" or a number of seconds, from {kind.ge:g} to {kind.le:g}'
    if unit == "bytes per second":
        return f'a rate such as "50 GB/s" or a number of bytes a second, at most {format_rate(float(kind.le or 0))}'
    noun = "a whole number" if isinstance(kind, inspect.IntType) else "a number"
    if kind.gt is not None:
        return f"{noun} above {kind.gt:g} and at most {kind.le:g}"
    return f"{noun} from {kind.ge} to {kind.le}"
