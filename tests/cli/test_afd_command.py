"""`transload afd`: what it prints, what it refuses, and that its JSON says what the table says."""

from __future__ import annotations

import json

import pytest

from transload.cli import main

SMALL = ["afd", "llama-3.1-70b", "--attention", "h100", "--link", "eth400", "--latency", "5us", "--context", "4096",
         "--weights", "fp8", "--micro-batches", "2"]  # fmt: skip


def test_the_table_says_the_verdict_and_what_it_rests_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--top", "3"]) == 0
    printed = capsys.readouterr().out
    assert "a token crosses with 8,192 B out and 16,384 B home in each of 80 layers" in printed
    assert "simulated: " in printed
    assert "assumed: eth400.latency = 5 us" in printed
    assert "played event by event" in printed
    assert "unsplit: " in printed


def test_json_is_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["simulated"] is True
    assert said["question"]["model"] == "llama-3.1-70b"
    best = said["answer"]["candidates"][0]
    assert best["tpot_seconds"] <= 0.05
    assert best["micro_batches"] == 2


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--micro-batches", "5"], "--micro-batches 5: wanted numbers from 1 to 4"),
        (["--context", "0"], "--context 0: wanted"),
        (["--tpot", "soon"], "--tpot soon:"),
        (["--tpot", "0"], "wanted more than 0"),
        (["--link", "eth401"], "did you mean"),
        (["--ffn", "h101"], "did you mean"),
        (["--top", "0"], "--top 0"),
        (["--best-by", "usd", "--ffn", "sn40l"], "tokens per USD: sn40l: price.per_hour is unknown"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(flags: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *flags]) == 2
    assert why in capsys.readouterr().err


def test_a_target_that_no_split_keeps_is_exit_code_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--tpot", "1ms"]) == 1
    assert "a split is impossible here" in capsys.readouterr().out
