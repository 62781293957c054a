"""The rules that keep the tree readable: who may import whom, what stays pure, how large a file may grow.

units, errors, arch <- deploy, control, hardware <- runtime, transfer, model <- study, server <- cli
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "transload"
FILES = sorted(SOURCE.rglob("*.py"))
LEVELS = (
    ("units", "errors", "arch"),
    ("deploy", "control", "hardware"),
    ("runtime", "transfer", "model"),
    ("study", "server"),
    ("cli", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
CONTROL_MAY_IMPORT = {
    "__future__",
    "bisect",
    "collections",
    "dataclasses",
    "enum",
    "functools",
    "hashlib",
    "heapq",
    "itertools",
    "math",
    "msgspec",
    "operator",
    "struct",
    "transload",
    "typing",
}
"""The pure parts of the standard library. `random` only for `Random`, a generator that is handed in."""
TORCH_FREE_FILES = {
    "cli",
    "control",
    "deploy",
    "errors",
    "arch",
    "units",
    "hardware",
    "runtime",
    "server",
    "study",
    "transfer",
}
IMPORTED_AS = {"pyyaml": "yaml"}
"""Distributions whose module is called otherwise."""
MAX_LINES = 500
MAX_FUNCTION_LINES = 60
LONG_FILES = {"control/messages.py"}
"""A list of declarations: nothing in it is read as a whole."""


def name_of(file: Path) -> str:
    return file.relative_to(SOURCE).as_posix()


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def imports_of(file: Path) -> Iterator[tuple[str, int]]:
    """Full names of what a file imports, inside functions too, with their lines."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)}:{node.lineno}: a relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def part_of(file: Path) -> str:
    """The package or top-level module that a file belongs to."""
    return name_of(file).partition("/")[0].removesuffix(".py")


def imported_parts(file: Path) -> Iterator[tuple[str, int]]:
    for name, line in imports_of(file):
        words = name.split(".")
        if words[0] == "transload" and len(words) > 1 and words[1] in LEVEL:
            yield words[1], line


def test_every_part_has_a_level() -> None:
    assert {part_of(file) for file in FILES} - {"__init__"} <= set(LEVEL)


def test_nothing_imports_from_a_level_above_its_own() -> None:
    wrong = [
        f"{name_of(file)}:{line} imports {part}"
        for file in FILES
        if part_of(file) in LEVEL
        for part, line in imported_parts(file)
        if LEVEL[part] > LEVEL[part_of(file)]
    ]
    assert wrong == []


def test_no_two_parts_import_each_other() -> None:
    uses: dict[str, set[str]] = {part: set() for part in LEVEL}
    for file in FILES:
        if part_of(file) in LEVEL:
            uses[part_of(file)] |= {part for part, _ in imported_parts(file)} - {part_of(file)}
    while uses:
        ends = {part for part, used in uses.items() if not used & set(uses)}
        assert ends, f"these import each other in a circle: {uses}"
        for part in ends:
            del uses[part]


def test_the_machines_are_pure() -> None:
    wrong: list[str] = []
    for file in sorted((SOURCE / "control").glob("*.py")):
        for name, line in imports_of(file):
            allowed = name == "random.Random" or name.partition(".")[0] in CONTROL_MAY_IMPORT
            inside = not name.startswith("transload") or name.split(".")[1] in ("control", "units", "errors", "arch")
            if not (allowed and inside):
                wrong.append(f"{name_of(file)}:{line} imports {name}")
    assert wrong == []


@pytest.mark.parametrize("name", ["print", "open", "input", "exec", "eval", "__import__"])
def test_the_machines_call_nothing_that_does_io(name: str) -> None:
    calls = [
        f"{name_of(file)}:{node.lineno}"
        for file in sorted((SOURCE / "control").glob("*.py"))
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    ]
    assert calls == []


def test_only_the_model_package_imports_torch() -> None:
    wrong = [
        f"{name_of(file)}:{line}"
        for file in FILES
        if part_of(file) in TORCH_FREE_FILES
        for name, line in imports_of(file)
        if name.partition(".")[0] == "torch"
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "module",
    [
        "transload",
        "transload.cli",
        "transload.server.app",
        "transload.server.launch",
        "transload.runtime.real",
        "transload.runtime.virtual",
        "transload.runtime.worker",
        "transload.model.source",
        "transload.model.tokenizer",
        "transload.study.bench",
        "transload.study.doctor",
    ],
)
def test_importing_it_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr or f"{module} imports torch"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_every_file_says_what_it_owns(file: Path) -> None:
    assert ast.get_docstring(tree_of(file))


def test_no_file_is_too_long_to_be_read_at_a_sitting() -> None:
    lengths = {name_of(file): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES and name not in LONG_FILES} == {}


def test_no_function_is_too_long_to_be_seen_at_a_glance() -> None:
    long = [
        f"{name_of(file)}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for file in FILES
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
        if node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert long == []


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    project = tomllib.loads((SOURCE.parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [re.split(r"[<>=~! \[]", requirement)[0].lower() for requirement in project["dependencies"]]
    declared = {IMPORTED_AS.get(name, name.replace("-", "_")) for name in names}
    imported = {name.partition(".")[0] for file in FILES for name, _ in imports_of(file)}
    assert imported - set(sys.stdlib_module_names) - {"transload"} == declared


def test_no_file_is_called_after_nothing() -> None:
    empty_words = {"utils", "util", "helpers", "helper", "common", "misc", "core", "manager"}
    assert [name_of(file) for file in FILES if file.stem in empty_words] == []
