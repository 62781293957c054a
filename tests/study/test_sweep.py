"""Sweeps: what is varied is read and refused, and every combination is simulated once, in order."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from transload.cli import main
from transload.errors import DeploymentError
from transload.study.sweep import Variation, combinations, parse_rates, parse_variation

FILE = """\
model: {path: llama-3.1-8b}
pools:
  - {name: all, role: aggregated, workers: 1, chip: h100_sxm}
targets: {ttft: 500 ms, tpot: 20 ms}
"""


def test_rates_are_read_with_both_ends() -> None:
    assert parse_rates("1:2:0.5") == Variation("rate", ("1", "1.5", "2"))
    assert parse_rates("3:3:1").values == ("3",)


@pytest.mark.parametrize("text", ["1:2", "2:1:1", "0:2:1", "1:2:0", "a:b:c", "1:1e9:0.001"])
def test_rates_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(DeploymentError, match="LOW"):
        parse_rates(text)


def test_every_combination_is_taken_once() -> None:
    variations = [parse_variation("rate=1,2"), parse_variation("pools.all.workers=1, 2")]
    made = combinations(variations)
    assert made[0] == {"rate": "1", "pools.all.workers": "1"}
    assert len({tuple(each.items()) for each in made}) == len(made) == 4
    with pytest.raises(DeploymentError, match="wanted PATH=A,B"):
        parse_variation("pools.all.workers")


def test_a_sweep_says_where_goodput_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, result = tmp_path / "all.yaml", tmp_path / "sweep.json"
    file.write_text(FILE)
    flags = ["--requests", "60", "--input", "500", "--output", "40", "--sweep", "rate=5,500", "--json", str(result)]
    assert main(["simulate", str(file), *flags]) == 0
    points = json.loads(result.read_text())["points"]
    assert [point["values"] for point in points] == [{"rate": "5"}, {"rate": "500"}]
    slow, fast = (point["result"]["summary"] for point in points)
    assert slow["meets_targets"] is True
    assert slow["attainment"] > fast["attainment"]
    assert "most good requests with the targets met: rate 5" in capsys.readouterr().out


@pytest.mark.slow
def test_a_sweep_over_processes_gives_what_one_process_gives(tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    file.write_text(FILE)
    flags = ["--requests", "20", "--input", "500", "--output", "20", "--sweep", "rate=5,500"]
    points = []
    for processes in ("1", "2"):
        result = tmp_path / f"{processes}.json"
        command = [sys.executable, "-m", "transload", "simulate", str(file), *flags, "--processes", processes]
        subprocess.run([*command, "--json", str(result)], check=True, timeout=200, stdout=subprocess.DEVNULL)
        points.append(json.loads(result.read_text())["points"])
    assert [point["values"] for point in points[1]] == [{"rate": "5"}, {"rate": "500"}]
    for one, other in zip(*points, strict=True):
        for name in ("summary", "pools", "waterfalls"):
            assert one["result"][name] == other["result"][name]


def test_a_sweep_of_something_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "all.yaml"
    file.write_text(FILE)
    assert main(["simulate", str(file), "--requests", "1", "--sweep", "pools.al.workers=1,2"]) == 2
    assert 'did you mean "all"' in capsys.readouterr().err
