"""Calibration and validation end to end, on few points: that it works, not that the errors are small."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from transload.cli import main
from transload.hardware.catalog import load_chip

ROOT = Path(__file__).parents[3]


def benchmark_docs() -> Any:
    path = ROOT / "scripts" / "make_benchmark_docs.py"
    module_spec = importlib.util.spec_from_file_location("make_benchmark_docs", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_machine_is_measured_and_compared_with_its_simulation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chip, result, looked_at = (tmp_path / name for name in ("machine.yaml", "validation.json", "page.html"))
    assert main(["calibrate", "--quick", "-o", str(chip)]) == 0
    measured = load_chip(str(chip)).measured
    assert measured is not None
    assert 0 < measured.message_seconds < 1
    assert 0 < measured.front_end.request_seconds < 5
    assert measured.front_end.token_cpu_seconds > 0
    assert measured.beside.decode.prefill >= 1
    assert measured.links
    load = ["--rate", "1", "--requests", "4", "--input", "32", "--output", "8"]
    code = main(["validate", "1p1d", "--chip", str(chip), *load, "--json", str(result), "--html", str(looked_at)])
    assert code in (0, 1)  # a busy machine does not keep to bounds
    shown = capsys.readouterr().out
    for words in (
        "1p1d, 1 requests/s: 4 requests",
        "TTFT p50",
        "TPOT p90",
        "decode queue",
        "%",
        "given steps",
        "calibrated",
        "decode-0 decode",
    ):
        assert words in shown
    written = json.loads(result.read_text())
    (comparison,) = written["comparisons"]
    assert comparison["drift"]["decode"] > 0
    stages = {figure["name"]: figure["measured"] for figure in comparison["stages"]}
    assert stages["prefill"] > 0
    assert stages["decode"] > 0
    for label in ("1p1d", "1p1d given its steps", "1p1d as calibrated"):
        assert f'"label":"{label}"' in looked_at.read_text()
    page = benchmark_docs().simulated.validation(written)
    assert "given its steps" in page
    assert [speed["kind"] for speed in comparison["speeds"]] == ["decode", "prefill"]
    assert all(0.1 < speed["times"] < 10 for speed in comparison["speeds"])
    assert "TTFT p50, ms" in page
    again = tmp_path / "again.json"
    assert main(["validate", "--again", str(result), "--chip", str(chip), "--json", str(again)]) == code
    repeated = json.loads(again.read_text())
    for half in ("measured", "given_steps", "as_calibrated", "comparisons"):
        assert repeated[half] == written[half]
