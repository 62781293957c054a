"""`transload chips`, `transload models`, `transload links`: what they print and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from transload.cli import main
from transload.hardware.catalog import chip_names, link_names, model_names

ROOT = Path(__file__).parents[2]


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "names"), [("chips", chip_names()), ("links", link_names()), ("models", model_names())]
)
def test_everything_is_listed(command: str, names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    printed = output(capsys, command)
    assert [name for name in names if f"\n{name} " not in printed] == []
    listed = json.loads(output(capsys, command, "--json"))
    assert [entry.get("id") or entry["card"]["id"] for entry in listed] == names


def test_a_chip_is_explained_with_class_source_conflicts_and_what_is_unknown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    printed = output(capsys, "chips", "lp30")
    assert "memory.sram.bandwidth" in printed
    assert "150 TB/s" in printed
    assert "vendor claim" in printed
    assert "307.2 PFLOP/s" in printed  # the other table
    assert "unknown: power: rack power is not published" in printed
    assert "Hot Chips 2026 slides on LPX" in printed


def test_a_ridge_point_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert "(dense peak / bandwidth): bf16 295, int8 591, fp8 591" in output(capsys, "chips", "h100")


def test_an_assumption_is_printed_with_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    printed = output(capsys, "chips", "cpx", "--assume", "rubin_cpx.dense_flops.fp4=20 PFLOP/s")
    assert "assumed by you: rubin_cpx.dense_flops.fp4 = 20 PFLOP/s" in printed
    assert "1 assumption" in printed
    chip = json.loads(output(capsys, "links", "lpx_nvl_bridge", "--assume", "lpx_nvl_bridge.latency=2 us", "--json"))
    assert (chip["latency"]["value"], chip["latency"]["class"]) == (2e-6, "assumption")


def test_a_file_of_ones_own_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    printed = output(capsys, "chips", str(ROOT / "docs" / "example-chip.yaml"))
    assert "board datasheet, page 3" in printed
    assert "5 datasheet, 3 measured, 1 estimate" in printed


def test_a_model_is_explained_at_a_working_point(capsys: pytest.CaptureFixture[str]) -> None:
    printed = output(capsys, "models", "deepseek-r1", "--batch", "64", "--context", "1000")
    assert "671,026,419,200" in printed
    assert "70,272 B" in printed
    assert "222.4" in printed  # experts touched
    explained = json.loads(output(capsys, "models", "llama-3-8b", "--weights", "fp8", "--kv", "fp8", "--json"))
    assert explained["derived"]["kv_bytes_per_token"] == 65_536
    assert explained["derived"]["precision"]["attention"] == "fp8"
    assert explained["parameters"]["total"] == 8_030_261_248


def test_a_config_is_explained_by_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "model_type": "wonder", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 128, "vocab_size": 100,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    printed = output(capsys, "models", str(tmp_path))
    assert "note: model_type wonder is not known here" in printed


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["chips", "b20"], "transload chips: error: no such chip: b20; did you mean"),
        (["links", "nvlnk5"], 'no such link: nvlnk5; did you mean "nvlink5"?'),
        (["models", "deepsek-v3"], 'no such model: deepsek-v3; did you mean "deepseek-v3"?'),
        (["chips", "--assume", "b200.power.tdp=1 s"], "that is in s; power.tdp is in W"),
        (["models", "llama-3-8b", "--batch", "0"], "--batch 0: wanted a whole number from 1"),
        (["models", "llama-3-8b", "--context", "-1"], "--context -1: wanted"),
        (["models", "llama-3-8b", "--skew", "nan"], "--skew nan: wanted a number from 0 to 10"),
        (["models", "llama-3-8b", "--kv", "fp9"], "no such number format: fp9"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert captured.out == ""


def test_the_page_of_the_documentation_is_up_to_date() -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "catalog_page.py"), "--check"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_the_catalog_is_package_data() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '"**/*.yaml"' in project
