"""`transload doctor` as a command."""

from __future__ import annotations

import json

import pytest

from transload.cli import main
from transload.study import doctor
from transload.study.doctor import Check

REPORT = (
    Check(name="cores", status="ok", found="8"),
    Check(name="memory", status="warn", found="little [free]", advice="take [more]"),
)


def examine(*checks: Check) -> object:
    return lambda _host, _port: checks


def test_warnings_do_not_fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "examine", examine(*REPORT))
    assert main(["doctor"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == ["ok cores 8", "warn memory little [free]", "do: take [more]"]


def test_a_failed_check_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failed = Check(name="torch", status="fail", found="not installed", advice="pip install torch")
    monkeypatch.setattr(doctor, "examine", examine(*REPORT, failed))
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[2] == {
        "name": "torch",
        "status": "fail",
        "found": "not installed",
        "advice": "pip install torch",
    }
