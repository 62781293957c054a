"""A file of the catalog, or a user's own, to a struct. Complaints name file, line and field.

Stricter than YAML: a key comes once, tags and anchors are refused, size is bounded. Plain words follow YAML 1.2, so
`1e15` is a number and `no` is text.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from transload.errors import DeploymentError
from transload.hardware.nearest import did_you_mean

MAX_BYTES = 256 * 1024
MAX_DEPTH = 12
Kind = TypeVar("Kind", bound=msgspec.Struct)
_PLACE = re.compile(r"^(?P<problem>.*?)(?: - at `(?:key in )?\$(?P<path>[^`]*)`)?$", re.DOTALL)
_WRONG_CHOICE = re.compile(r"Invalid enum value '(?P<value>.*)'")
_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(?P<field>[^`]*)`")


class _Loader(yaml.SafeLoader):
    """Plain words by the rules of YAML 1.2."""


_Loader.yaml_implicit_resolvers = {}
_NUMBER = list("-+.0123456789")
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), _NUMBER)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$"), _NUMBER
)


def read_text(path: Path) -> str:
    """The file as text. Raises `DeploymentError`."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DeploymentError(f"{path}: larger than {MAX_BYTES // 1024} KiB; this is no file of the catalog")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DeploymentError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DeploymentError(f"{path}: not UTF-8 text at byte {error.start}; save it as UTF-8") from error


def read_struct(text: str, name: str, kind: type[Kind]) -> Kind:
    """YAML or JSON text as a struct; `name` begins every complaint. Raises `DeploymentError`."""
    places: dict[str, int] = {"": 1}
    tree = _parse(text, name, places)
    if not isinstance(tree, dict):
        raise DeploymentError(f"{name}: wanted a mapping with keys such as id and name, got {type(tree).__name__}")
    try:
        return msgspec.convert(tree, kind)
    except msgspec.ValidationError as error:
        raise _located(str(error), name, places, kind) from None


def _parse(text: str, name: str, places: dict[str, int]) -> object:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _Tree(loader, name, places).plain(node, "", 0)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise DeploymentError(f"{name}{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise DeploymentError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from error
    finally:
        loader.dispose()


class _Tree:
    """Turns nodes into plain values and notes the line of each path."""

    def __init__(self, loader: _Loader, name: str, places: dict[str, int]) -> None:
        self._loader = loader
        self._name = name
        self._places = places
        self._seen: set[int] = set()

    def plain(self, node: yaml.Node, path: str, depth: int) -> object:
        if depth > MAX_DEPTH:
            raise self._refusal(node, f"nested more than {MAX_DEPTH} deep")
        if id(node) in self._seen:  # how an alias shows: the node of its anchor once more
            raise self._refusal(node, "anchors and aliases are not allowed; write the value out")
        self._seen.add(id(node))
        self._places.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, depth)
        value: object = self._loader.construct_object(node)
        return value

    def _mapping(self, node: yaml.MappingNode, path: str, depth: int) -> dict[str, object]:
        entries: dict[str, object] = {}
        for key_node, value_node in node.value:
            key = self._loader.construct_object(key_node)
            if not isinstance(key, str):
                raise self._refusal(key_node, f"the key {key!r} is not a word")
            if key in entries:
                raise self._refusal(key_node, f'the key "{key}" stands here twice; remove one')
            self._places[f"{path}.{key}"] = key_node.start_mark.line + 1
            entries[key] = self.plain(value_node, f"{path}.{key}", depth + 1)
        return entries

    def _refusal(self, node: yaml.Node, problem: str) -> DeploymentError:
        return DeploymentError(f"{self._name}:{node.start_mark.line + 1}: {problem}")


def _located(message: str, name: str, places: dict[str, int], kind: type[msgspec.Struct]) -> DeploymentError:
    """msgspec's complaint with the line it is about and, for a misspelt key, the one that was meant."""
    match = _PLACE.match(message)
    assert match is not None
    problem, path = match["problem"], match["path"] or ""
    unknown = _UNKNOWN_FIELD.search(problem)
    if unknown is not None:
        field = unknown["field"]
        problem = f"no such key{did_you_mean(field, _field_names(kind))}"
        path = f"{path}.{field}"
    wrong_choice = _WRONG_CHOICE.fullmatch(problem)
    if wrong_choice is not None:
        choices = _choices(kind).get(path.rpartition(".")[2], ())
        problem = f'no such choice "{wrong_choice["value"]}"{did_you_mean(wrong_choice["value"], choices)}'
        problem += f"; allowed: {', '.join(choices)}" if choices else ""
    nearest = path
    while nearest not in places:
        nearest = nearest[: max(nearest.rfind("."), nearest.rfind("["), 0)]
    where = f"{name}:{places[nearest]}"
    return DeploymentError(f"{where}: {path.lstrip('.') or 'the file'}: {problem}")


@cache
def _properties(kind: type[msgspec.Struct]) -> tuple[tuple[str, dict[str, Any]], ...]:
    """Every key that may stand anywhere in a file of this kind, with what the schema says of its value."""
    definitions = msgspec.json.schema(kind).get("$defs", {})
    return tuple(entry for definition in definitions.values() for entry in definition.get("properties", {}).items())


def _field_names(kind: type[msgspec.Struct]) -> list[str]:
    return [name for name, _ in _properties(kind)]


def _choices(kind: type[msgspec.Struct]) -> dict[str, list[str]]:
    return {name: [str(choice) for choice in value["enum"]] for name, value in _properties(kind) if "enum" in value}
