"""Recorded traffic as workloads: reads trace files line by line, so a file of any length needs little memory.

Nothing is guessed and nothing is dropped in silence: a line that cannot be used is refused with its file, line and
column. Formats (`.gz` of each too):

    azure      CSV    TIMESTAMP, ContextTokens, GeneratedTokens                    Azure/AzurePublicDataset
    burstgpt   CSV    Timestamp (s), Request tokens, Response tokens               HPMLL/BurstGPT
    mooncake   JSONL  timestamp (ms), input_length, output_length, hash_ids (512)  kvcache-ai/Mooncake
    bailian    JSONL  timestamp (s), input_length, output_length, hash_ids (16)    alibaba-edu/qwen-bailian-usagetraces
"""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Annotated, Literal, NamedTuple, cast, get_args

import msgspec

from transload.errors import DeploymentError
from transload.hardware.nearest import did_you_mean
from transload.study.workload import ArrivalSpec, Workload

TraceFormat = Literal["azure", "burstgpt", "mooncake", "bailian"]
MAX_LINE_BYTES = 16 * 2**20
MOONCAKE_BLOCK_SIZE = 512
BAILIAN_BLOCK_SIZE = 16


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """Which part of a trace to play, and how it is changed."""

    start_seconds: float = 0.0
    """Since the trace's first request, at recorded speed."""
    end_seconds: float | None = None
    max_requests: int | None = None
    speedup: float = 1.0
    """2: gaps are half as long, twice the rate."""
    shrink: int = 1
    """Lengths and shared blocks divided by this (rounded up), so that a small machine can play a large one's trace."""


class _Row(NamedTuple):
    seconds: float
    num_input_tokens: int
    num_output_tokens: int
    block_hashes: tuple[int, ...] = ()


class _BadLine(Exception):
    """What is wrong with a line, and in which column; the reader adds file and line."""


def open_trace(
    path: str | Path, format: TraceFormat | Literal["auto"] = "auto", window: Window | None = None
) -> Workload:
    """The workload that a trace file records.

    A request without output tokens (BurstGPT lists calls that failed so) is played with one: its prefill was real.
    Raises `DeploymentError` here for a file that cannot be opened or is of no known format, and while iterating for a
    line that cannot be used.
    """
    path, window = Path(path), window or Window()
    _check(window)
    kind = _detect(path) if format == "auto" else format
    if kind not in get_args(TraceFormat):
        raise DeploymentError(
            f"trace format {kind!r} is not known; use one of {', '.join(get_args(TraceFormat))}, auto"
        )
    block_size = BAILIAN_BLOCK_SIZE if kind == "bailian" else MOONCAKE_BLOCK_SIZE
    return Workload(
        name=f"{path.name} ({kind}{_described(window)})",
        arrivals=lambda: _arrivals(path, kind, window),
        block_size=-(-block_size // window.shrink),
    )


SHIPPED = {
    "conversation": "azure2023_conv.csv.gz",
    "code": "azure2023_code.csv.gz",
    "mooncake-synthetic": "mooncake_synthetic.jsonl.gz",
}
"""Traces that come with the source, by short name; `traces/README.md` says what they are."""


def find_trace(name_or_path: str | Path) -> Path:
    """The file that a path or the short name of a shipped trace means. Raises `DeploymentError`."""
    path = Path(name_or_path)
    file = SHIPPED.get(str(name_or_path))
    if file is None or path.is_file():
        if not path.exists() and path.suffix == "" and path.parent == Path():
            guess = did_you_mean(str(name_or_path), SHIPPED)
            raise DeploymentError(
                f"no trace {path}{guess or ';'} there are: {', '.join(SHIPPED)}, or a file by its path"
            )
        return path
    for folder in (Path("traces"), Path(__file__).parents[3] / "traces"):
        if (folder / file).is_file():
            return folder / file
    raise DeploymentError(f"trace {name_or_path}: {file} is not here; it is in the folder traces/ of the source")


def _check(window: Window) -> None:
    for name, got, is_good, wanted in (
        ("speedup", window.speedup, 0 < window.speedup < math.inf, "a number above 0"),
        ("shrink", window.shrink, window.shrink >= 1, "a whole number, 1 or more"),
        ("start", window.start_seconds, 0 <= window.start_seconds < math.inf, "0 or more seconds"),
        ("end", window.end_seconds, window.end_seconds is None or window.end_seconds > window.start_seconds, "> start"),
        ("requests", window.max_requests, window.max_requests is None or window.max_requests >= 1, "1 or more"),
    ):
        if not is_good:
            raise DeploymentError(f"trace: {name} is {got}; give {wanted}")


def _described(window: Window) -> str:
    parts = [f", {window.speedup:g}x speed"] if window.speedup != 1 else []
    if window.shrink != 1:
        parts.append(f", lengths / {window.shrink}")
    if window.start_seconds or window.end_seconds is not None:
        end = "end" if window.end_seconds is None else f"{window.end_seconds:g} s"
        parts.append(f", {window.start_seconds:g} s to {end}")
    return "".join(parts)


def _arrivals(path: Path, kind: TraceFormat, window: Window) -> Iterator[ArrivalSpec]:
    first: float | None = None
    latest = -math.inf
    num_taken = 0
    for number, row in _rows(path, kind):
        first = row.seconds if first is None else first
        if row.seconds < latest:
            raise DeploymentError(
                f"{path}: line {number}: time goes back by {latest - row.seconds:.3f} s; sort the file by time"
            )
        latest = row.seconds
        since = row.seconds - first
        if since < window.start_seconds:
            continue
        if window.end_seconds is not None and since >= window.end_seconds:
            return
        yield _arrival(row, (since - window.start_seconds) / window.speedup, window.shrink)
        num_taken += 1
        if num_taken == window.max_requests:
            return
    if num_taken == 0:
        raise DeploymentError(f"{path}: no request {'in the chosen window' if first is not None else 'in the file'}")


def _arrival(row: _Row, at_seconds: float, shrink: int) -> ArrivalSpec:
    num_input_tokens = max(1, -(-row.num_input_tokens // shrink))
    return ArrivalSpec(at_seconds, num_input_tokens, max(1, -(-row.num_output_tokens // shrink)), row.block_hashes)


# ---------------------------------------------------------------------------------------------------------------------
# Lines


def _rows(path: Path, kind: TraceFormat) -> Iterator[tuple[int, _Row]]:
    lines = _lines(path)
    parse: Callable[[str], _Row]
    match kind:
        case "azure" | "burstgpt":
            number, header = next(lines, (1, ""))
            parse = _csv_parser(path, number, header, kind)
        case "mooncake":
            parse = _parse_mooncake
        case "bailian":
            parse = _parse_bailian
    for number, line in lines:
        try:
            yield number, parse(line)
        except _BadLine as problem:
            raise DeploymentError(f"{path}: line {number}: {problem}") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their number from 1 on."""
    number = 0
    try:
        with _open(path) as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise DeploymentError(
                        f"{path}: line {number}: longer than {MAX_LINE_BYTES} bytes; is this a trace?"
                    )
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield number, text
    except UnicodeDecodeError as problem:
        raise DeploymentError(f"{path}: line {number}: not UTF-8 text ({problem.reason}); is this a trace?") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as problem:
        raise DeploymentError(
            f"{path}: after line {number}: the compressed file is damaged or cut off: {problem}"
        ) from None
    except OSError as problem:
        raise DeploymentError(f"{path}: cannot read the trace: {problem.strerror or problem}") from None


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _detect(path: Path) -> TraceFormat:
    _, line = next(_lines(path), (0, ""))
    if line.startswith("{"):
        return "bailian" if '"chat_id"' in line else "mooncake"
    columns = [cell.strip() for cell in line.split(",")]
    if "ContextTokens" in columns:
        return "azure"
    if "Request tokens" in columns:
        return "burstgpt"
    raise DeploymentError(
        f"{path}: line 1: not the beginning of a trace this project knows ({', '.join(get_args(TraceFormat))}): "
        f"{line[:80]!r}; name the format if the file has another header"
    )


# ---------------------------------------------------------------------------------------------------------------------
# CSV


def _split(line: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line], strict=True), [])]
    except csv.Error as problem:
        raise _BadLine(f"not a line of CSV: {problem}") from None


def _csv_parser(path: Path, number: int, header: str, kind: Literal["azure", "burstgpt"]) -> Callable[[str], _Row]:
    names: tuple[str, str, str]
    if kind == "azure":
        names, seconds_of = ("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _date
    else:
        names, seconds_of = ("Timestamp", "Request tokens", "Response tokens"), _seconds
    columns = _split(header)
    missing = [name for name in names if name not in columns]
    if missing:
        found = ", ".join(columns) or "nothing"
        raise DeploymentError(
            f"{path}: line {number}: no column {missing[0]}; found {found[:200]}; want {', '.join(names)}"
        )
    places = [columns.index(name) for name in names]

    def parse(line: str) -> _Row:
        cells = _split(line)
        if len(cells) != len(columns):
            raise _BadLine(f"{len(cells)} columns; the header has {len(columns)}")
        when, num_input, num_output = (cells[place] for place in places)
        return _Row(seconds_of(names[0], when), _count(names[1], num_input), _count(names[2], num_output))

    return parse


def _date(column: str, cell: str) -> float:
    try:
        date = datetime.fromisoformat(cell)
    except ValueError:
        raise _BadLine(f"column {column}: got {cell!r}; want a date such as 2023-11-16 18:15:46.6805900") from None
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


def _seconds(column: str, cell: str) -> float:
    try:
        seconds = float(cell)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise _BadLine(f"column {column}: got {cell!r}; want seconds as a number")
    return seconds


def _count(column: str, cell: str) -> int:
    # int() would also take "1_000" and Arabic digits; float() "1e400". A count is plain digits, or "12.0".
    digits = cell.removesuffix(".0")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 10):
        raise _BadLine(f"column {column}: got {cell!r}; want a whole number of tokens, 0 or more")
    return int(digits)


# ---------------------------------------------------------------------------------------------------------------------
# JSONL

_Count = Annotated[int, msgspec.Meta(ge=0, lt=10**9)]


class _JsonRow(msgspec.Struct):
    timestamp: float
    input_length: _Count
    output_length: _Count
    hash_ids: tuple[int, ...] = ()


_decode = msgspec.json.Decoder(_JsonRow).decode


def _parse_json(line: str, seconds_per_unit: float, block_size: int) -> _Row:
    try:
        row = _decode(line)
    except msgspec.ValidationError as problem:
        what, _, where = str(problem).partition(" - at `$.")
        raise _BadLine(f"column {where.rstrip('`')}: {what}" if where else what) from None
    except (msgspec.DecodeError, RecursionError) as problem:
        raise _BadLine(f"not a JSON object: {problem}") from None
    num_blocks = -(-row.input_length // block_size)
    if row.hash_ids and len(row.hash_ids) < num_blocks:
        raise _BadLine(
            f"column hash_ids: {len(row.hash_ids)} hashes; input_length {row.input_length} needs {num_blocks} of "
            f"{block_size} tokens"
        )
    return _Row(row.timestamp * seconds_per_unit, row.input_length, row.output_length, row.hash_ids[:num_blocks])


def _parse_mooncake(line: str) -> _Row:
    return _parse_json(line, 0.001, MOONCAKE_BLOCK_SIZE)


def _parse_bailian(line: str) -> _Row:
    return _parse_json(line, 1.0, BAILIAN_BLOCK_SIZE)
