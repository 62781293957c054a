"""Documents that are made from the code say what the code says, and the README's links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_deployment_reference_is_up_to_date() -> None:
    location = ROOT / "scripts" / "make_deployment_docs.py"
    module_spec = importlib.util.spec_from_file_location("make_deployment_docs", location)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    assert (ROOT / "docs" / "deployment.md").read_text() == module.page(), "run scripts/make_deployment_docs.py"


@pytest.mark.parametrize("name", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "docs/api.md", "docs/log.md"])
def test_links_between_documents_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists() or target.startswith("http"), f"{name}: {target}"


def test_files_named_in_the_documents_exist() -> None:
    for name in ("README.md", "ARCHITECTURE.md"):
        for path in re.findall(r"\b(?:deployments|scripts)/[\w.-]+\w", (ROOT / name).read_text()):
            assert (ROOT / path).exists(), f"{name}: {path}"
