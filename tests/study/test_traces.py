from __future__ import annotations

import gzip
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest

from transload.errors import DeploymentError
from transload.study.traces import Window, open_trace
from transload.study.workload import ArrivalSpec

AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:16:50.9951690,879,55
"""
MOONCAKE = """\
{"timestamp": 0, "input_length": 1100, "output_length": 6, "hash_ids": [0, 1, 2]}
{"timestamp": 2500, "input_length": 600, "output_length": 4, "hash_ids": [0, 9]}
"""
BAILIAN = (
    '{"chat_id": 1, "parent_chat_id": -1, "timestamp": 10.5, "input_length": 20, "output_length": 6, "type": "text", '
    '"turn": 1, "hash_ids": [7, 8]}\n'
)
BURSTGPT = """\
Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5,a,1.0,ChatGPT,472,18,490,Conversation log
45.5,b,2.0,GPT-4,1087,0,1087,API log
"""


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    content = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def read(path: Path, **window: float | int) -> list[ArrivalSpec]:
    return list(open_trace(path, "auto", Window(**window)))  # type: ignore[arg-type]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_azure_dates_become_seconds_since_the_first_request(tmp_path: Path, ending: str) -> None:
    arrivals = read(write(tmp_path, f"trace.csv{ending}", AZURE))
    assert [(a.num_input_tokens, a.num_output_tokens) for a in arrivals] == [(374, 44), (396, 109), (879, 55)]
    assert [a.at_seconds for a in arrivals] == pytest.approx([0.0, 4.314579, 64.314579], abs=2e-6)


def test_mooncake_milliseconds_and_hashes_are_kept(tmp_path: Path) -> None:
    trace = open_trace(write(tmp_path, "trace.jsonl", MOONCAKE))
    assert trace.block_size == 512
    assert list(trace) == [ArrivalSpec(0.0, 1100, 6, (0, 1, 2)), ArrivalSpec(2.5, 600, 4, (0, 9))]


def test_bailian_is_told_from_mooncake_by_its_first_line(tmp_path: Path) -> None:
    trace = open_trace(write(tmp_path, "trace.jsonl.gz", BAILIAN))
    assert trace.block_size == 16
    assert list(trace) == [ArrivalSpec(0.0, 20, 6, (7, 8))]


def test_burstgpt_calls_that_gave_no_token_are_played_with_one(tmp_path: Path) -> None:
    assert read(write(tmp_path, "b.csv", BURSTGPT)) == [ArrivalSpec(0.0, 472, 18), ArrivalSpec(40.5, 1087, 1)]


def test_the_window_the_speed_and_the_number_of_requests_cut_the_trace(tmp_path: Path) -> None:
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    lines += [f"2024-01-01 00:00:{second:02d},{second + 1},1" for second in range(30)]
    path = write(tmp_path, "t.csv", "\n".join(lines))
    arrivals = read(path, start_seconds=10, end_seconds=20, speedup=2.0, max_requests=4)
    assert [a.num_input_tokens for a in arrivals] == [11, 12, 13, 14]
    assert [a.at_seconds for a in arrivals] == [0.0, 0.5, 1.0, 1.5]
    assert len(read(path, start_seconds=10, end_seconds=20)) == 10


def test_shrinking_divides_lengths_and_blocks_and_keeps_what_is_shared(tmp_path: Path) -> None:
    trace = open_trace(write(tmp_path, "m.jsonl", MOONCAKE), "mooncake", Window(shrink=16))
    assert trace.block_size == 32
    assert list(trace) == [ArrivalSpec(0.0, 69, 1, (0, 1, 2)), ArrivalSpec(2.5, 38, 1, (0, 9))]
    assert all(-(-a.num_input_tokens // trace.block_size) == len(a.block_hashes) for a in trace)


def test_iterating_twice_reads_the_file_twice(tmp_path: Path) -> None:
    trace = open_trace(write(tmp_path, "m.jsonl", MOONCAKE))
    assert list(trace) == list(trace)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", AZURE + "2023-11-16 18:17:00,abc,5\n", r"a\.csv: line 5: column ContextTokens: got 'abc'"),
        ("a.csv", AZURE + "2023-11-16 18:17:00,-3,5\n", "line 5: column ContextTokens: got '-3'"),
        ("a.csv", AZURE + "2023-11-16 18:17:00,5,1_0\n", "line 5: column GeneratedTokens: got '1_0'"),
        ("a.csv", AZURE + "2023-11-16 18:17:00,5,1e5\n", "line 5: column GeneratedTokens"),
        ("a.csv", AZURE + "yesterday,5,5\n", "line 5: column TIMESTAMP: got 'yesterday'; want a date"),
        ("a.csv", AZURE + "2023-11-16 18:17:00,5\n", "line 5: 2 columns; the header has 3"),
        ("a.csv", AZURE + '2023-11-16 18:17:00,"5,5\n', "line 5: not a line of CSV"),
        ("a.csv", AZURE + "2023-11-16 18:15:00,5,5\n", r"line 5: time goes back by 110\.995 s"),
        ("a.csv", "TIMESTAMP,ContextTokens,Output\n", "line 1: no column GeneratedTokens; found TIMESTAMP, Cont"),
        ("a.csv", AZURE.splitlines()[0], "a.csv: no request in the file"),
        ("b.csv", BURSTGPT + "nan,a,1,m,1,1,2,x\n", "line 4: column Timestamp: got 'nan'"),
        ("b.csv", BURSTGPT.replace("Response", "Responded"), "no column Response tokens"),
        ("m.jsonl", MOONCAKE + "\n{]\n", "m.jsonl: line 4: not a JSON object"),
        ("m.jsonl", MOONCAKE + '{"timestamp": 9000, "input_length": 5}', "line 3: .*output_length"),
        (
            "m.jsonl",
            MOONCAKE + '{"timestamp": 9000, "input_length": "5", "output_length": 1}',
            "line 3: column input_length: Expected `int`, got `str`",
        ),
        (
            "m.jsonl",
            MOONCAKE + '{"timestamp": 9000, "input_length": -5, "output_length": 1}',
            "line 3: column input_length: Expected `int` >= 0",
        ),
        (
            "m.jsonl",
            MOONCAKE + '{"timestamp": 9000, "input_length": 1025, "output_length": 1, "hash_ids": [1, 2]}',
            "line 3: column hash_ids: 2 hashes; input_length 1025 needs 3",
        ),
        ("m.jsonl", MOONCAKE + '{"timestamp": 1, "input_length": 5, "output_length": 1}', "line 3: time goes back"),
        ("m.jsonl", MOONCAKE.encode() + b'{"timestamp": "\xff"}', "line 3: not UTF-8"),
        ("x.csv", "a,b,c\n1,2,3\n", "line 1: not the beginning of a trace"),
        ("x.csv", "", "line 1: not the beginning of a trace"),
        ("x.gz", b"", "no request|not the beginning"),
    ],
)
def test_what_cannot_be_used_is_refused_with_file_line_and_column(
    tmp_path: Path, name: str, text: str | bytes, words: str
) -> None:
    with pytest.raises(DeploymentError, match=words):
        read(write(tmp_path, name, text))


def test_lines_before_a_bad_one_are_still_read(tmp_path: Path) -> None:
    trace = iter(open_trace(write(tmp_path, "a.csv", AZURE + "broken\n")))
    assert [next(trace).num_input_tokens for _ in range(3)] == [374, 396, 879]
    with pytest.raises(DeploymentError, match="line 5"):
        next(trace)


def test_a_file_that_is_missing_or_a_damaged_archive_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match=r"none\.csv: cannot read the trace: No such file"):
        open_trace(tmp_path / "none.csv")
    with pytest.raises(DeploymentError, match="cannot read the trace: Is a directory"):
        open_trace(tmp_path, "azure").arrivals().__next__()
    whole = gzip.compress(AZURE.encode() * 1)
    for number, content in enumerate((whole[:-12], b"no archive at all", whole[:20] + b"\x00\xff" * 20)):
        path = tmp_path / f"{number}.csv.gz"
        path.write_bytes(content)
        with pytest.raises(DeploymentError, match=rf"{number}\.csv\.gz: after line \d: the compressed file is damaged"):
            list(open_trace(path, "azure"))


def test_an_empty_window_and_wrong_windows_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", AZURE)
    with pytest.raises(DeploymentError, match="no request in the chosen window"):
        read(path, start_seconds=1000.0)
    for window, words in (
        ({"speedup": 0.0}, "speedup is 0"),
        ({"shrink": 0}, "shrink is 0"),
        ({"start_seconds": 5.0, "end_seconds": 5.0}, "end is 5"),
        ({"max_requests": 0}, "requests is 0"),
    ):
        with pytest.raises(DeploymentError, match=words):
            read(path, **window)
    with pytest.raises(DeploymentError, match="trace format 'vidur' is not known"):
        open_trace(path, "vidur")  # type: ignore[arg-type]


def test_memory_does_not_grow_with_the_length_of_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    with path.open("w") as file:
        file.write("TIMESTAMP,ContextTokens,GeneratedTokens\n")
        for second in range(60_000):
            file.write(f"2023-11-16 {second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d},100,10\n")
    trace = open_trace(path)
    tracemalloc.start()
    try:
        count = sum(1 for _ in trace)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 60_000
    assert peak < 1_000_000 < path.stat().st_size


def test_a_line_without_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transload.study.traces.MAX_LINE_BYTES", 1000)
    with pytest.raises(DeploymentError, match="line 1: longer than 1000 bytes"):
        read(write(tmp_path, "m.jsonl", "{" + "x" * 5000))


SHIPPED = Path(__file__).parents[2] / "traces"


@pytest.mark.parametrize(
    ("name", "count", "mean_input", "mean_output"),
    [
        ("azure2023_conv.csv.gz", 19_366, 1155, 211),
        ("azure2023_code.csv.gz", 8_819, 2048, 28),
        ("mooncake_synthetic.jsonl.gz", 3_993, 15_326, 149),
    ],
)
def test_the_shipped_traces_are_what_their_readme_says(
    name: str, count: int, mean_input: int, mean_output: int
) -> None:
    arrivals = list(open_trace(SHIPPED / name))
    assert len(arrivals) == count
    assert sum(a.num_input_tokens for a in arrivals) / count == pytest.approx(mean_input, abs=1)
    assert sum(a.num_output_tokens for a in arrivals) / count == pytest.approx(mean_output, abs=1)
    assert all(a.at_seconds <= b.at_seconds for a, b in pairwise(arrivals))


@pytest.mark.parametrize(
    ("name", "num_requests", "seconds", "mean_input", "mean_output"),
    [
        ("azure2023_conv.csv.gz", 19366, 3502, 1155, 211),
        ("azure2023_code.csv.gz", 8819, 3436, 2048, 28),
        ("mooncake_synthetic.jsonl.gz", 3993, 1022, 15325, 149),
    ],
)
def test_the_recorded_traces_are_what_their_page_says(
    name: str, num_requests: int, seconds: int, mean_input: int, mean_output: int
) -> None:
    arrivals = read(Path(__file__).parents[2] / "traces" / name)
    assert len(arrivals) == num_requests
    assert round(arrivals[-1].at_seconds) == seconds
    assert round(sum(arrival.num_input_tokens for arrival in arrivals) / num_requests) == mean_input
    assert round(sum(arrival.num_output_tokens for arrival in arrivals) / num_requests) == mean_output
