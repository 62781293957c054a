"""Every claim gets a verdict, and no claimed value can reach a simulation."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import msgspec
import pytest

from transload.errors import DeploymentError
from transload.study.claims import settings
from transload.study.claims.evaluate import evaluate
from transload.study.claims.record import Figure, Record, record, records
from transload.study.claims.settings import SETTINGS
from transload.study.claims.verdict import Finding

CLAIMS = [
    "distserve.opt-13b.sharegpt",
    "distserve.opt-66b.sharegpt",
    "distserve.opt-175b.sharegpt",
    "distserve.kvtransfer",
    "distserve.ablation",
    "distserve.blog_toy",
    "distserve.sim_example",
    "haoai.2_30x",
    "derived.2_30x.splitwise",
    "derived.2_30x.sarathi",
    "derived.2_30x.distserve",
    "sarathi.capacity",
    "sarathi.chunk_overhead",
    "splitwise.headline",
    "splitwise.points",
    "hack.paper",
    "hack.artifact",
    "flowkv",
    "mooncake.fast25",
    "deepseek.profile",
    "3fs",
    "lmsys.96h100",
    "lmsys.gb200.2",
    "vllm.wideep_h200",
    "vllm.afd",
    "dynamo.30x",
    "dynamo.router",
    "h200.1.9x",
    "infx.r1_fp8_8k1k",
    "cerebras.tps",
    "cerebras.1200_4.5x",
    "aws_cerebras",
    "groq.v1",
    "lpx.35x",
    "lpx.hc2026",
    "sambanova.sn50",
    "rubin_cpx",
    "step3",
    "glm52.b300",
]
FOLDER = Path(settings.__file__).parent
CHEAP = ("derived.2_30x.distserve", "sarathi.chunk_overhead", "deepseek.profile")
"""Claims whose settings take milliseconds."""


def test_no_published_claim_is_missing() -> None:
    assert list(records()) == CLAIMS


def test_every_claim_says_what_who_and_in_which_setting() -> None:
    for each in records().values():
        assert each.source
        assert each.setup
        assert "://" not in each.id


def test_a_figure_is_either_simulated_or_says_what_is_missing() -> None:
    for each in records().values():
        for figure in each.figures:
            assert figure.missing or each.id in SETTINGS, f"{each.id}: {figure.key}"


@pytest.mark.parametrize("claim_id", CHEAP)
def test_a_setting_answers_every_figure_that_is_to_be_checked(claim_id: str) -> None:
    answered = set(SETTINGS[claim_id]().values)
    assert answered == {figure.key for figure in record(claim_id).figures if not figure.missing}


def _doubled(each: Record) -> Record:
    return msgspec.structs.replace(each, figures=tuple(_twice(figure) for figure in each.figures))


def _twice(figure: Figure) -> Figure:
    high = None if figure.high is None else figure.high * 2
    return figure if figure.value is None else msgspec.structs.replace(figure, value=figure.value * 2, high=high)


def _simulated(findings: list[Finding]) -> list[float | None]:
    return [f.simulated.value if f.simulated else None for finding in findings for f in finding.figures]


def test_changing_what_is_claimed_changes_no_simulated_value() -> None:
    chosen = [record(claim_id) for claim_id in CHEAP]
    as_claimed, as_doubled = evaluate(chosen), evaluate([_doubled(each) for each in chosen])
    assert _simulated(as_claimed) == _simulated(as_doubled)
    assert [f.error for x in as_claimed for f in x.figures] != [f.error for x in as_doubled for f in x.figures]


def test_no_setting_takes_or_reads_a_claimed_value() -> None:
    """A setting has no parameters, and no file that simulates imports the records."""
    for claim_id, setting in SETTINGS.items():
        assert not inspect.signature(setting).parameters, claim_id
    for file in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            assert "record" not in module, f"{file.name} imports {module}"
            assert "records" not in names, f"{file.name} imports {names}"
        assert "records.yaml" not in file.read_text(encoding="utf-8")


def test_a_setting_that_the_model_refuses_is_not_checkable_and_says_why() -> None:
    def refused() -> None:
        raise DeploymentError("nothing_chip: power is unknown")

    [finding] = evaluate([record("deepseek.profile")], settings={"deepseek.profile": refused})  # type: ignore[dict-item]
    assert finding.verdict == "not checkable"
    assert all("nothing_chip: power is unknown" in figure.reason for figure in finding.figures)


def test_an_unknown_claim_names_the_one_that_was_meant() -> None:
    with pytest.raises(DeploymentError, match=r"did you mean .distserve\.blog_toy"):
        record("distserve.blogtoy")
