"""Documents that are made from the code say what the code says, and the README's links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["deployment", "benchmark", pytest.param("claims", marks=pytest.mark.slow)])
def test_a_page_made_from_code_or_results_is_up_to_date(name: str) -> None:
    script = f"make_{name}_docs"
    module_spec = importlib.util.spec_from_file_location(script, ROOT / "scripts" / f"{script}.py")
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    assert module.TARGET.read_text() == module.page(), f"run scripts/{script}.py"
    for figure, content in getattr(module, "figures", dict)().items():
        assert (module.TARGET.parent / figure).read_text() == content, f"run scripts/{script}.py"


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "docs/api.md",
        "docs/log.md",
        "docs/claims.md",
        "docs/article.md",
    ],
)
def test_links_between_documents_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists() or target.startswith("http"), f"{name}: {target}"


def test_files_named_in_the_documents_exist() -> None:
    for name in ("README.md", "ARCHITECTURE.md"):
        for path in re.findall(r"\b(?:deployments|scripts)/[\w.-]+\w", (ROOT / name).read_text()):
            assert (ROOT / path).exists(), f"{name}: {path}"
