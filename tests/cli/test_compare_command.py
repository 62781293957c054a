"""`transload compare` and `transload claims` from their flags to what they print."""

from __future__ import annotations

import csv
from pathlib import Path

import msgspec
import pytest

from transload.cli import main
from transload.study.claims.verdict import Finding
from transload.study.compare import Comparison

TOGETHER = """
model: {path: qwen3-8b}
pools: [{name: both, role: aggregated, chip: h100_sxm, workers: 2}]
targets: {ttft: 200 ms, tpot: 20 ms}
"""
APART = """
model: {path: qwen3-8b}
pools:
  - {name: prefill, role: prefill, chip: h100_sxm}
  - {name: decode, role: decode, chip: h100_sxm}
links: [{between: [prefill, decode], kind: nvlink4}]
targets: {ttft: 200 ms, tpot: 20 ms}
"""
SHORT = ("--rate", "10", "--requests", "30", "--input", "500", "--output", "20")


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "together.yaml").write_text(TOGETHER)
    (tmp_path / "apart.yaml").write_text(APART)
    return [str(tmp_path / "together.yaml"), str(tmp_path / "apart.yaml")]


def test_two_deployments_side_by_side(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *files, *SHORT]) == 0
    shown = capsys.readouterr().out
    assert "together" in shown
    assert "prefill/decode" in shown
    assert "once a request" in shown
    assert "for a dollar" in shown


def test_the_same_as_json_and_csv(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "table.csv"
    assert main(["compare", *files, *SHORT, "--json", "-", "--csv", str(table)]) == 0
    comparison = msgspec.json.decode(capsys.readouterr().out, type=Comparison)
    assert [row.name for row in comparison.rows] == ["together", "apart"]
    assert (
        comparison.rows[1].bytes_per_request == 500 * 147_456 // 16 * 16 or comparison.rows[1].bytes_per_request > 7e7
    )
    assert [line["name"] for line in csv.DictReader(table.read_text().splitlines())] == ["together", "apart"]


def test_each_at_its_own_limit(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    few = [word if word != "30" else "8" for word in SHORT]
    assert main(["compare", *files, *few, "--saturate", "--json", "-"]) == 0
    rows = msgspec.json.decode(capsys.readouterr().out, type=Comparison).rows
    for row in rows:
        assert row.load_factor is not None
        assert row.load_factor > 1
        assert row.meets_targets


def test_targets_of_the_flags_judge_all_alike(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *files, *SHORT, "--tpot", "1ms"]) == 0
    assert "targets missed by together (0%), apart (0%)" in capsys.readouterr().out


def test_both_outputs_to_stdout_are_refused(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *files, *SHORT, "--json", "-", "--csv", "-"]) == 2
    assert "both would go to stdout" in capsys.readouterr().err


def test_claims_are_listed_shown_and_encoded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", "--list"]) == 0
    assert "lpx.35x" in capsys.readouterr().out
    assert main(["claims", "derived.2_30x.distserve"]) == 0
    shown = capsys.readouterr().out
    assert "512-token prompt" in shown
    assert "verdict:" in shown
    assert main(["claims", "derived.2_30x.distserve", "3fs", "--json"]) == 0
    findings = msgspec.json.decode(capsys.readouterr().out, type=list[Finding])
    assert [finding.record.id for finding in findings] == ["derived.2_30x.distserve", "3fs"]
    assert main(["claims", "lpx.36x"]) == 2
    assert "did you mean" in capsys.readouterr().err
