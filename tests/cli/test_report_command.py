"""`transload report`: files in, pages, tables and traces out; what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import msgspec
import pytest

from tests.study.sample_results import sample_records, sample_result
from tests.study.test_timeline import played
from tests.study.test_trace_events import check_format
from transload.cli import main
from transload.deploy.spec import Targets
from transload.runtime.event_log import EventLog
from transload.study import bench
from transload.study.metrics import summarize
from transload.study.provenance import machine_facts
from transload.study.result import Step, encode_result


@pytest.fixture
def simulated(tmp_path: Path) -> Path:
    path = tmp_path / "simulated.json"
    path.write_bytes(encode_result(sample_result(with_requests=True)))
    return path


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    records = list(sample_records(4.0, 50))
    result = bench.Result(
        command=("transload", "bench"),
        started_at="2026-11-26T11:00:00+00:00",
        machine=machine_facts(),
        versions={"transload": "0"},
        server=bench.Server(url="http://x", model="m", endpoint="completions", prompt_kind="ids", max_context=None),
        workload="Poisson 4/s",
        seed=0,
        was_interrupted=False,
        summary=summarize(records, Targets()),
        error_details=[],
        records=records,
    )
    path = tmp_path / "measured.json"
    path.write_bytes(msgspec.json.encode(result))
    return path


@pytest.fixture
def event_logs(tmp_path: Path) -> Path:
    world, _ = played("p0 d0")
    folder = tmp_path / "logs"
    logs = {who: EventLog(folder, who) for who in {who for _, who, _ in world.events}}
    for now, who, event in world.events:
        logs[who].write(now, event)
    for log in logs.values():
        log.close()
    return folder


def test_simulated_and_measured_results_share_a_page(simulated: Path, measured: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["report", str(simulated), str(measured), "-o", str(page)]) == 0
    assert '"label":"b200-pd"' in page.read_text()
    assert '"label":"measured"' in page.read_text()


def test_without_a_file_to_write_the_results_are_shown(
    simulated: Path, measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(simulated), str(measured)]) == 0
    shown = capsys.readouterr().out
    for words in ("simulated", "measured", "TTFT p50", "TPOT p90", "$ per M output tokens", "1.270"):
        assert words in shown


def test_tables_have_a_row_a_request_and_a_row_a_bin(simulated: Path, measured: Path, tmp_path: Path) -> None:
    assert main(["report", str(simulated), str(measured), "--csv", str(tmp_path / "tables")]) == 0

    def rows(name: str) -> list[dict[str, str]]:
        with (tmp_path / "tables" / f"{name}.csv").open() as file:
            return list(csv.DictReader(file))

    assert [row["kind"] for row in rows("summary")] == ["simulated", "measured"]
    requests = rows("requests")
    assert len(requests) == 300 + 50
    assert float(requests[0]["ttft_seconds"]) > 0
    assert {row["pool"] for row in rows("pools")} == {"prefill", "decode"}
    assert len(rows("links")) == 200


def test_event_logs_bring_pools_and_links_to_a_measured_result(
    measured: Path, event_logs: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    assert main(["report", str(measured), "--event-log", str(event_logs), "-o", str(page)]) == 0
    assert '"source":"p"' in page.read_text() or '"source":"prefill"' in page.read_text()


def test_event_logs_become_a_trace(event_logs: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    assert main(["report", "--event-log", str(event_logs), "--perfetto", str(trace)]) == 0
    read = json.loads(trace.read_text())
    check_format(read)
    assert read["otherData"]["kind"] == "measured"


def test_the_steps_of_a_result_become_a_trace(tmp_path: Path) -> None:
    steps = tuple(
        Step(
            worker="decode-0",
            start_seconds=k * 0.01,
            end_seconds=k * 0.01 + 0.009,
            num_steps=1,
            num_prefill_tokens=0,
            num_decode=3,
        )
        for k in range(20)
    )
    path, trace = tmp_path / "result.json", tmp_path / "trace.json"
    path.write_bytes(encode_result(msgspec.structs.replace(sample_result(), steps=steps)))
    assert main(["report", str(path), "--perfetto", str(trace)]) == 0
    read = json.loads(trace.read_text())
    check_format(read)
    assert read["otherData"]["kind"] == "simulated"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to show"),
        (["missing.json"], "missing.json: cannot read: No such file"),
        (["{simulated}", "--perfetto", "{folder}/t.json"], "holds no steps to draw"),
        (["{simulated}", "{simulated}", "--perfetto", "{folder}/t.json"], "about one run"),
        (["--event-log", "{folder}", "--perfetto", "t.json"], "no event log of a controller"),
        (["--event-log", "{folder}", "-o", "page.html"], "a page wants a RESULT.json"),
        (["{folder}/other.json"], "schema transload-other: want a file"),
        (["{folder}/text.json"], "not a result"),
    ],
)
def test_what_cannot_be_shown_is_refused_by_name(
    words: list[str], message: str, simulated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.json").write_text('{"schema": "transload-other"}')
    (tmp_path / "text.json").write_text("no JSON")
    assert main(["report", *(word.format(simulated=simulated, folder=tmp_path) for word in words)]) == 2
    assert message in capsys.readouterr().err
