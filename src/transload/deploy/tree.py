"""YAML text to a tree in which every value knows where it stands. Knows nothing of what a deployment may say.

Stricter than YAML: keys are words and come once, tags are refused, size, depth and number of values are bounded.
Plain words follow YAML 1.2, so `no` and `on` are text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TypeAlias

import yaml

from transload.errors import DeploymentError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 12
MAX_VALUES = 20_000
MAX_NUMBER = 40
"""Characters; anything longer is text."""

Scalar: TypeAlias = str | int | float | bool | None

INT = re.compile(r"[-+]?[0-9]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
CONSTANTS: dict[str, Scalar] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


class Leaf:
    """One value. `text` is how it was written, so that `revision: 0123` stays what it is."""

    def __init__(self, value: Scalar, text: str, where: str) -> None:
        self.value = value
        self.text = text
        self.where = where


class Items:
    """A list."""

    def __init__(self, nodes: list[Node], where: str) -> None:
        self.nodes = nodes
        self.where = where


class Table:
    """A mapping. `key_where` says where each key stands; the value may begin on a later line."""

    def __init__(self, entries: dict[str, Node], key_where: dict[str, str], where: str) -> None:
        self.entries = entries
        self.key_where = key_where
        self.where = where


Node: TypeAlias = Leaf | Items | Table


def parse(text: str, name: str, *, where: str | None = None) -> Node:
    """Read YAML. `name` begins every complaint; `where`, if given, stands in for file and line.

    Raises `DeploymentError`.
    """
    if len(text) > MAX_BYTES:
        raise DeploymentError(f"{name}: larger than {MAX_BYTES // 1024} KiB; this is no deployment file")
    try:
        return _Reader(yaml.parse(text, Loader=yaml.SafeLoader), name, where).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = where or (f"{name}:{mark.line + 1}" if mark else name)
        raise DeploymentError(f"{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise DeploymentError(f"{where or name}: not valid YAML: {str(error).splitlines()[0]}") from error


def plant(value: object, where: str) -> Node:
    """A tree of plain values, all of which stand at `where`."""
    match value:
        case dict():
            entries = {str(key): plant(entry, where) for key, entry in value.items()}
            return Table(entries, dict.fromkeys(entries, where), where)
        case list() | tuple():
            return Items([plant(item, where) for item in value], where)
        case None | bool() | int() | float() | str():
            return Leaf(value, "" if value is None else str(value), where)
        case _:
            raise AssertionError(f"no YAML for {value!r}")


class _Reader:
    """Builds the tree from YAML events, which come without recursion however deep the text is nested."""

    def __init__(self, events: Iterator[yaml.Event], name: str, where: str | None) -> None:
        self._events = events
        self._ahead: yaml.Event | None = None
        self._name = name
        self._where = where
        self._anchors: dict[str, Node] = {}
        self._num_values = 0

    def document(self) -> Node:
        assert isinstance(self._next(), yaml.StreamStartEvent)
        if isinstance(self._next(), yaml.StreamEndEvent):
            return Leaf(None, "", self._where or f"{self._name}:1")
        node = self._node(0)
        assert isinstance(self._next(), yaml.DocumentEndEvent)
        if not isinstance(self._peek(), yaml.StreamEndEvent):
            raise self._refuse(self._next(), "a second document (---) begins here; only one is read")
        return node

    def _next(self) -> yaml.Event:
        event, self._ahead = self._peek(), None
        return event

    def _peek(self) -> yaml.Event:
        if self._ahead is None:
            self._ahead = next(self._events)
        return self._ahead

    def _place(self, event: yaml.Event) -> str:
        mark = event.start_mark
        return self._where or (f"{self._name}:{mark.line + 1}" if mark else self._name)

    def _refuse(self, event: yaml.Event, reason: str) -> DeploymentError:
        return DeploymentError(f"{self._place(event)}: {reason}")

    def _node(self, depth: int) -> Node:
        event = self._next()
        self._num_values += 1
        if depth > MAX_DEPTH:
            raise self._refuse(event, f"nested more than {MAX_DEPTH} deep")
        if self._num_values > MAX_VALUES:
            raise self._refuse(event, f"more than {MAX_VALUES} values")
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        assert isinstance(event, yaml.ScalarEvent | yaml.SequenceStartEvent | yaml.MappingStartEvent)
        if event.tag is not None and event.tag != "!":
            raise self._refuse(event, f"the tag {event.tag} is not allowed")
        node: Node
        if isinstance(event, yaml.ScalarEvent):
            node = self._scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self._items(event, depth)
        else:
            node = self._table(event, depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _alias(self, event: yaml.AliasEvent) -> Node:
        """An anchor is known once its value is complete, so nothing can contain itself."""
        node = self._anchors.get(event.anchor or "")
        if node is None:
            raise self._refuse(event, f"*{event.anchor} refers to nothing above it")
        self._num_values += sum(1 for _ in _walk(node, MAX_VALUES))
        if self._num_values > MAX_VALUES:
            raise self._refuse(event, f"more than {MAX_VALUES} values once *{event.anchor} is filled in")
        return node

    def _scalar(self, event: yaml.ScalarEvent) -> Leaf:
        plain = event.style is None and event.tag is None
        return Leaf(_plain_value(event.value) if plain else event.value, event.value, self._place(event))

    def _items(self, event: yaml.Event, depth: int) -> Items:
        nodes: list[Node] = []
        while not isinstance(self._peek(), yaml.SequenceEndEvent):
            nodes.append(self._node(depth + 1))
        self._next()
        return Items(nodes, self._place(event))

    def _table(self, event: yaml.Event, depth: int) -> Table:
        table = Table({}, {}, self._place(event))
        while not isinstance(self._peek(), yaml.MappingEndEvent):
            key_event = self._peek()
            key = self._node(depth + 1)
            if not isinstance(key, Leaf) or key.value is None:
                raise self._refuse(key_event, "a key must be a word")
            if key.text in table.entries:
                first = table.key_where[key.text]
                raise self._refuse(key_event, f'the key "{key.text}" is given twice, first at {first}; remove one')
            table.key_where[key.text] = self._place(key_event)
            table.entries[key.text] = self._node(depth + 1)
        self._next()
        return table


def _walk(node: Node, limit: int) -> Iterator[Node]:
    """The node and all below it, `limit` + 1 of them at most."""
    waiting = [node]
    for _ in range(limit + 1):
        if not waiting:
            return
        found = waiting.pop()
        yield found
        if isinstance(found, Items):
            waiting.extend(found.nodes)
        elif isinstance(found, Table):
            waiting.extend(found.entries.values())


def _plain_value(text: str) -> Scalar:
    if text in CONSTANTS:
        return CONSTANTS[text]
    if len(text) > MAX_NUMBER:
        return text
    if INT.fullmatch(text):
        return int(text)
    if FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text
