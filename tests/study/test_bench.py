from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.study.scripted_server import Call, Script, answer_in_full, server_in_thread
from transload.cli import bench, workload_flags
from transload.errors import DeploymentError, TransloadError
from transload.study.workload import Workload

REPOSITORY = Path(__file__).parents[2]


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="transload")
    bench.add_parser(parser.add_subparsers())
    return parser.parse_args(["bench", *words])


def command(*words: str) -> int:
    return bench.run(parse(*words))


def workload(*words: str) -> Workload:
    return workload_flags.workload(parse("u", *words))


def serving(script: Script) -> Script:
    """A server with a model list around what it does with load."""

    async def whole(call: Call) -> None:
        if call.path == "/v1/models":
            await call.json(200, {"data": [{"id": "scripted"}]})
        elif call.path == "/tokenize":
            await call.json(404, {})
        else:
            await script(call)

    return whole


def test_a_run_prints_a_table_and_writes_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    with server_in_thread(serving(answer_in_full)) as url:
        code = command(
            url,
            "--rate",
            "500",
            "--requests",
            "12",
            "--input",
            "30",
            "--output",
            "5",
            "--ttft",
            "30s",
            "--json",
            str(out),
        )
    assert code == 0
    shown = capsys.readouterr().out
    assert "time to first token" in shown
    assert "12 successful, 0 failed" in shown
    assert "attainment 100.0% meets the wanted 95.0%" in shown
    result = json.loads(out.read_text())
    assert result["schema"] == "transload-bench-1"
    assert result["server"]["model"] == "scripted"
    assert result["summary"]["num_successful"] == 12
    assert result["summary"]["num_output_tokens"] == 60
    assert result["summary"]["num_input_tokens"] == 360
    assert result["machine"]["num_cores"] >= 1
    assert result["versions"]["transload"]
    assert result["records"] is None


def test_the_same_seed_asks_for_the_same(tmp_path: Path) -> None:
    bodies: list[list[bytes]] = []

    async def script(call: Call) -> None:
        bodies[-1].append(call.body)
        await answer_in_full(call)

    for seed in ("1", "1", "2"):
        bodies.append([])
        with server_in_thread(serving(script)) as url:
            assert command(url, "--concurrency", "1", "--requests", "5", "--input-cv", "0.5", "--seed", seed) == 0
    assert bodies[0] == bodies[1]
    assert bodies[0] != bodies[2]


def test_a_run_becomes_a_page_and_tables(tmp_path: Path) -> None:
    page, tables = tmp_path / "page.html", tmp_path / "tables"
    with server_in_thread(serving(answer_in_full)) as url:
        words = (url, "--rate", "500", "--requests", "9", "--output", "4")
        assert command(*words, "--html", str(page), "--csv", str(tables)) == 0
    text = page.read_text()
    assert '"simulated":false' in text
    assert '"num_successful":9' in text
    assert len((tables / "requests.csv").read_text().splitlines()) == 1 + 9
    assert len((tables / "summary.csv").read_text().splitlines()) == 1 + 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--html", "nowhere/page.html"), "--html nowhere/page.html: the folder .* does not exist"),
        (("--html", "page.html", "--event-log", "nowhere"), "--event-log nowhere: no such folder"),
    ],
)
def test_what_could_not_be_shown_after_the_run_is_refused_before_it(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(DeploymentError, match=message):
        command("http://127.0.0.1:9", *words)


def test_json_on_stdout_is_nothing_but_json_and_the_table_goes_to_stderr(
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    with server_in_thread(serving(answer_in_full)) as url:
        assert command(url, "--rate", "500", "--requests", "3", "--output", "2", "--json", "-", "--records") == 0
    out, err = capfdbinary.readouterr()
    records = json.loads(out)["records"]
    assert [record["index"] for record in records] == [0, 1, 2]
    assert all(len(record["token_seconds"]) == 2 for record in records)
    assert b"throughput" in err


def test_if_every_request_failed_the_exit_code_is_1_and_the_reasons_are_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def refuse(call: Call) -> None:
        await call.json(400, {"error": {"message": "prompt too long"}})

    with server_in_thread(serving(refuse)) as url:
        assert command(url, "--rate", "500", "--requests", "4", "--tpot", "1s") == 1
    shown = capsys.readouterr().out
    assert "4 x http_status: 400: prompt too long" in shown
    assert "attainment 0.0% misses" in shown


def test_if_only_some_failed_the_exit_code_is_0() -> None:
    count = iter(range(100))

    async def every_other(call: Call) -> None:
        if next(count) % 2:
            await answer_in_full(call)
        else:
            await call.json(500, {})

    with server_in_thread(serving(every_other)) as url:
        assert command(url, "--concurrency", "1", "--requests", "4") == 0


def test_warmup_requests_are_sent_before_and_not_measured(tmp_path: Path) -> None:
    seen: list[Any] = []

    async def script(call: Call) -> None:
        seen.append(call.fields["prompt"])
        await answer_in_full(call)

    out = tmp_path / "r.json"
    with server_in_thread(serving(script)) as url:
        assert command(url, "--rate", "500", "--requests", "4", "--warmup", "3", "--json", str(out)) == 0
    assert len(seen) == 7
    assert json.loads(out.read_text())["summary"]["num_requests"] == 4
    assert not any(prompt in seen[3:] for prompt in seen[:3])

    async def refuse(call: Call) -> None:
        await call.json(500, {"error": "no"})

    with server_in_thread(serving(refuse)) as url, pytest.raises(TransloadError, match="nothing was measured"):
        command(url, "--requests", "4", "--warmup", "1")


def test_a_trace_is_played(tmp_path: Path) -> None:
    lengths: list[tuple[int, int]] = []

    async def script(call: Call) -> None:
        lengths.append((len(call.fields["prompt"]), call.fields["max_tokens"]))
        await answer_in_full(call)

    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-01-01 00:00:00,5,6\n2024-01-01 00:01:00,7,8\n")
    with server_in_thread(serving(script)) as url:
        assert command(url, "--trace", str(trace), "--speedup", "6000") == 0
    assert lengths == [(5, 6), (7, 8)]


def test_the_key_is_sent_and_never_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: set[str | None] = set()

    async def script(call: Call) -> None:
        keys.add(call.headers.get("authorization"))
        await answer_in_full(call)

    out = tmp_path / "r.json"
    with server_in_thread(serving(script)) as url:
        words = [url, "--requests", "2", "--rate", "500", "--api-key", "sk-secret", "--json", str(out)]
        monkeypatch.setattr(sys, "argv", ["transload", "bench", *words])
        assert command(*words) == 0
    assert keys == {"Bearer sk-secret"}
    assert "sk-secret" not in out.read_text()
    assert json.loads(out.read_text())["command"][:2] == ["transload", "bench"]


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        (["--api-key", "s", "--rate", "1"], ("--api-key", "***", "--rate", "1")),
        (["--api-key=s"], ("--api-key=***",)),
        (["--api", "s", "x"], ("--api", "***", "x")),
    ],
)
def test_keys_are_blanked_however_they_are_typed(typed: list[str], shown: tuple[str, ...]) -> None:
    assert bench.without_secrets(typed) == shown


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "Poisson 2/s, 256 tokens in, 64 out"),
        (["--arrivals", "constant", "--rate", "5"], "constant 5/s, 256 tokens in, 64 out"),
        (["--arrivals", "gamma", "--cv", "2"], "gamma 2/s cv 2, 256 tokens in, 64 out"),
        (
            ["--arrivals", "ramp", "--ramp-to", "9", "--duration", "1min", "--input-cv", "1"],
            "ramp 2/s to 9/s in 60 s, ~256 (cv 1) tokens in, 64 out",
        ),
        (["--concurrency", "4", "--turns", "3"], "closed loop of 4, 256 tokens in, 64 out, 3 turns a session"),
    ],
)
def test_flags_describe_the_workload(words: list[str], name: str) -> None:
    assert workload(*words).name == name


def test_without_a_number_or_a_duration_there_are_100_requests() -> None:
    assert workload().num_requests == 100
    assert workload("--duration", "3").num_requests is None
    assert len(list(workload())) == 100


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--concurrency", "4", "--rate", "2"], "--rate means nothing with --concurrency"),
        (["--cv", "2"], "--cv means nothing without --arrivals gamma"),
        (["--ramp-to", "2"], "--ramp-to means nothing without --arrivals ramp"),
        (["--arrivals", "ramp"], "give the rate at its end"),
        (["--think", "2"], "--think means nothing without --turns"),
        (["--speedup", "2"], "--speedup means nothing without --trace"),
        (["--trace", "x.csv", "--rate", "2"], "--rate means nothing with --trace"),
        (["--trace", "x.csv", "--shared-prefix", "2"], "--shared-prefix means nothing with --trace"),
        (["--trace", "/nonexistent/x.csv"], "cannot read the trace"),
        (["--rate", "0"], "rate is 0"),
        (["--requests", "-1"], "requests is -1"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_by_name(words: list[str], problem: str) -> None:
    with pytest.raises(DeploymentError, match=problem):
        workload(*words)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--rate", "-1"], "--rate: got '-1'"),
        (["--rate", "nan"], "--rate: got 'nan'"),
        (["--ttft", "5 parsecs"], "--ttft: '5 parsecs' has no unit known here"),
        (["--attainment", "0"], "--attainment: got '0'"),
        (["--ids", "9:3"], "--ids: got '9:3'"),
        (["--body", "[1]"], "--body: want a JSON object"),
        (["--arrivals", "often"], "invalid choice: 'often'"),
    ],
)
def test_values_that_are_none_are_refused_with_the_flags_name(
    words: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ending:
        parse(*words)
    assert ending.value.code == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "seconds"), [("500ms", 0.5), ("0.5", 0.5), ("2 s", 2.0), ("1.5min", 90.0), ("1h", 3600.0)]
)
def test_durations_are_read_as_people_write_them(text: str, seconds: float) -> None:
    assert workload_flags.duration(text) == seconds


def test_a_share_may_be_in_percent() -> None:
    assert parse("--attainment", "90%").attainment == 0.9


def test_a_json_file_that_cannot_be_written_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="this is a folder"):
        command("http://127.0.0.1:1", "--json", str(tmp_path))
    with pytest.raises(DeploymentError, match="does not exist; make it first"):
        command("http://127.0.0.1:1", "--json", str(tmp_path / "none" / "r.json"))


def test_no_server_is_said_with_what_to_do() -> None:
    with pytest.raises(TransloadError, match=r"no server at http://127\.0\.0\.1:1: .*transload serve"):
        command("http://127.0.0.1:1")


@pytest.mark.slow
def test_ctrl_c_ends_the_run_and_shows_what_was_measured(tmp_path: Path) -> None:
    third_waits = threading.Event()
    count = iter(range(100))

    async def script(call: Call) -> None:
        if next(count) < 2:
            await answer_in_full(call)
        else:
            await call.stream()
            third_waits.set()
            await call.text("a")
            await asyncio.sleep(3600)

    out = tmp_path / "r.json"
    with server_in_thread(serving(script)) as url:
        process = subprocess.Popen(
            [sys.executable, "-c", _MAIN, "bench", url, "--concurrency", "1", "--json", str(out)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"COLUMNS": "120"},
        )
        try:
            assert third_waits.wait(60)
            process.send_signal(signal.SIGINT)
            shown, complaints = process.communicate(timeout=60)
        finally:
            process.kill()
            process.communicate()
    assert process.returncode == 130, complaints
    assert "Traceback" not in complaints
    assert re.search(r"2 successful, 0 failed, 1 cut off by you", shown)
    result = json.loads(out.read_text())
    assert result["was_interrupted"] is True
    assert result["summary"]["num_successful"] == 2


_MAIN = """
import argparse, sys
from transload.cli import bench
parser = argparse.ArgumentParser()
bench.add_parser(parser.add_subparsers())
args = parser.parse_args()
sys.exit(args.run(args))
"""
