"""docs/afd.md and its figures say what the committed study says."""

from __future__ import annotations

import json
import re
import runpy
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "make_afd_docs.py"))
RESULT = json.loads((ROOT / "benchmarks" / "results" / "afd_study.json").read_text(encoding="utf-8"))


def test_the_page_is_what_the_script_writes() -> None:
    assert (ROOT / "docs" / "afd.md").read_text(encoding="utf-8") == SCRIPT["page"](RESULT)


def test_the_figures_are_what_the_script_writes_and_can_be_read() -> None:
    figures = SCRIPT["figures"](RESULT)
    assert set(figures) == set(re.findall(r"\((afd-[a-z]+\.svg)\)", SCRIPT["page"](RESULT)))
    for name, figure in figures.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == figure
        assert "simulated" in figure
        assert ElementTree.fromstring(figure).tag.endswith("svg")


def test_everything_on_the_page_says_that_it_is_simulated() -> None:
    assert RESULT["simulated"] is True
    assert "**Everything on this page is simulated**" in SCRIPT["page"](RESULT)


def test_the_study_has_every_part() -> None:
    study = runpy.run_path(str(ROOT / "benchmarks" / "afd_study.py"))
    assert set(study["PARTS"]) <= set(RESULT)
    assert RESULT["agreement"]["largest"] < 0.02
