"""Changes to a deployment before it is built: `pools.decode.workers=2`. Their errors name the flag they came from."""

from __future__ import annotations

import re

import msgspec

from transload.deploy.convert import did_you_mean, refusal
from transload.deploy.tree import Items, Leaf, Node, Table, parse
from transload.errors import DeploymentError

_STEP = re.compile(r"[A-Za-z0-9_*-]+")


class Override(msgspec.Struct, frozen=True):
    """Put `node` at `path`. A list is stepped into by an item's name or index, or by `*` for every item."""

    path: tuple[str, ...]
    node: Node
    where: str


def parse_override(text: str, *, where: str | None = None) -> Override:
    """Read the argument of `--set`; `where` if it was another flag's. Raises `DeploymentError`."""
    where = where or f"--set {text}"
    path, equals, value = text.partition("=")
    steps = tuple(path.strip().replace("[", ".").replace("]", "").split("."))
    if not equals or not all(_STEP.fullmatch(step) for step in steps):
        raise DeploymentError(f"{where}: wanted PATH=VALUE, such as --set pools.decode.workers=2")
    return Override(steps, parse(value, where, where=where), where)


def flag_override(path: str, value: str | int | bool, flag: str) -> Override:
    """What a flag such as `--model PATH` changes."""
    return Override(tuple(path.split(".")), Leaf(value, str(value), flag), flag)


def apply(tree: Node, override: Override) -> Node:
    """A tree with the value in place; the one given is not changed. Raises `DeploymentError`."""
    return _put(tree, override.path, override, "")


def _put(node: Node, steps: tuple[str, ...], override: Override, path: str) -> Node:
    if not steps:
        return override.node
    match node:
        case Leaf(value=None):  # a part that the file leaves out
            return _put(Table({}, {}, override.where), steps, override, path)
        case Leaf():
            raise refusal(override.where, path, "a single value: nothing can be set inside it")
        case Table():
            return _put_in_table(node, steps, override, path)
        case Items():
            return _put_in_items(node, steps, override, path)


def _put_in_table(table: Table, steps: tuple[str, ...], override: Override, path: str) -> Table:
    key = steps[0]
    inner = f"{path}.{key}" if path else key
    old = table.entries.get(key, Leaf(None, "", override.where))
    entries = table.entries | {key: _put(old, steps[1:], override, inner)}
    return Table(entries, {key: override.where} | table.key_where, table.where)


def _put_in_items(items: Items, steps: tuple[str, ...], override: Override, path: str) -> Items:
    names = [_name_of(node) for node in items.nodes]
    step = steps[0]
    if step == "*":
        chosen = set(range(len(items.nodes)))
    elif step in names:
        chosen = {index for index, name in enumerate(names) if name == step}
    elif step.isdecimal() and int(step) < len(items.nodes):
        chosen = {int(step)}
    else:
        known = [name for name in names if name is not None]
        there_are = ", ".join([*known, *(str(index) for index in range(len(names)))]) or "none"
        raise refusal(
            override.where, path, f'no such item "{step}"{did_you_mean(step, known) or ";"} there are: {there_are}'
        )
    nodes = [
        _put(node, steps[1:], override, f"{path}[{index}]") if index in chosen else node
        for index, node in enumerate(items.nodes)
    ]
    return Items(nodes, items.where)


def _name_of(node: Node) -> str | None:
    name = node.entries.get("name") if isinstance(node, Table) else None
    return name.text if isinstance(name, Leaf) else None
