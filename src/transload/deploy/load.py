"""Deployment files: YAML to `Deployment` and back. Every complaint names file, line and path."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import msgspec
import yaml

from transload.deploy.check import check
from transload.deploy.convert import convert
from transload.deploy.spec import Deployment
from transload.deploy.tree import FLOAT, INT, Items, Node, Table, parse
from transload.errors import DeploymentError
from transload.units import exact_bytes, exact_rate, exact_seconds


def load(path: Path) -> Deployment:
    """Read a deployment file. Raises `DeploymentError`."""
    return build(read(path))


def loads(text: str, name: str = "deployment") -> Deployment:
    """Read a deployment from text; `name` stands for the file in messages. Raises `DeploymentError`."""
    return build(parse(text, name))


def read(path: Path) -> Node:
    """The file as a tree whose values know their lines. Raises `DeploymentError`."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DeploymentError(f"{path}: no such file{_near(path)}") from None
    except OSError as error:
        raise DeploymentError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DeploymentError(f"{path}: not UTF-8 text at byte {error.start}; save it as UTF-8") from error
    return parse(text, str(path))


def build(tree: Node) -> Deployment:
    """The deployment that a tree describes. Raises `DeploymentError`."""
    deployment = convert(tree, Deployment)
    check(deployment, lambda path: _place(tree, path))
    return deployment


def to_yaml(deployment: Deployment) -> str:
    """A file that loads as an equal deployment. Fields at their defaults are left out."""
    return yaml.dump(to_plain(deployment), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def to_plain(part: msgspec.Struct) -> dict[str, Any]:
    """A part as a file says it: mappings, lists, text and numbers, without what is at its default."""
    plain: dict[str, Any] = {}
    for field in msgspec.structs.fields(part):
        value = getattr(part, field.name)
        if field.required or value != field.default:
            plain[field.encode_name] = _plain(value, field.name)
    return plain


def _plain(value: object, field_name: str) -> object:
    match value:
        case msgspec.Struct():
            return to_plain(value)
        case tuple():
            return [_plain(item, field_name) for item in value]
        case int() if field_name.endswith("_bytes"):
            return exact_bytes(value)
        case float() if field_name.endswith("_per_second"):
            return exact_rate(value)
        case float() if field_name.endswith("_seconds"):
            return exact_seconds(value)
        case _:
            return value


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or our reader (1.2) would take for something else."""

    def represent_line_breaks(self, text: str) -> yaml.Node:
        """Text with characters that a reader folds or refuses goes into double quotes, where they are escaped."""
        style = None if text.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    def ignore_aliases(self, _data: object) -> bool:
        return True


_Dumper.add_representer(str, _Dumper.represent_line_breaks)
_Dumper.add_implicit_resolver("transload:number", re.compile(rf"(?:{INT.pattern}|{FLOAT.pattern})\Z"), None)


def _place(tree: Node, path: str) -> str:
    """Where the value of `path` stands, or else the nearest thing around it."""
    node = tree
    where = tree.where
    for step in path.replace("[", ".[").split("."):
        if step.startswith("[") and isinstance(node, Items):
            node = node.nodes[int(step[1:-1])]
        elif isinstance(node, Table) and step in node.entries:
            node = node.entries[step]
        else:
            break
        where = node.where
    return where


def _near(path: Path) -> str:
    """A file of nearly that name in the same folder or in `deployments`, to ask whether that was meant."""
    try:
        known = [str(found) for folder in (path.parent, Path("deployments")) for found in folder.glob("*.yaml")]
    except OSError:
        return ""
    for name in (str(path), f"{path}.yaml", f"deployments/{path.name}", f"deployments/{path.name}.yaml"):
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        if close:
            return f"; did you mean {close[0]}?"
    return ""
