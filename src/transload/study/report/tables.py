"""Results as CSV files, for spreadsheets and data frames: one row a run, a request, or a bin of a series.

Times are seconds, sizes bytes, shares 0 to 1. An empty cell: not known.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from transload.errors import DeploymentError
from transload.study.metrics import Distribution, tpot_seconds, ttft_seconds
from transload.study.result import Result

Row = dict[str, object]


def write_csv(results: Sequence[Result], labels: Sequence[str], folder: str | Path) -> list[Path]:
    """`summary.csv`, and `requests.csv`, `pools.csv` and `links.csv` if the results hold such. Returns what it wrote.

    Raises `DeploymentError` if a file cannot be written.
    """
    named = list(zip(labels, results, strict=True))
    tables = {
        "summary": [_summary(label, result) for label, result in named],
        "requests": [row for label, result in named for row in _requests(label, result)],
        "pools": [row for label, result in named for row in _pools(label, result)],
        "links": [row for label, result in named for row in _links(label, result)],
    }
    written: list[Path] = []
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, rows in tables.items():
            if rows:
                path = Path(folder) / f"{name}.csv"
                _write(path, rows)
                written.append(path)
    except OSError as problem:
        raise DeploymentError(f"--csv {folder}: cannot write: {problem.strerror}") from None
    return written


def _write(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def _summary(label: str, result: Result) -> Row:
    summary, cost = result.summary, result.cost
    row: Row = {
        "result": label,
        "kind": "simulated" if result.simulated else "measured",
        "model": result.model,
        "workload": result.workload,
        "seed": result.seed,
        "num_requests": summary.num_requests,
        "num_failed": summary.num_failed,
        "duration_seconds": summary.duration_seconds,
        "offered_requests_per_second": summary.offered_requests_per_second,
        "requests_per_second": summary.requests_per_second,
        "output_tokens_per_second": summary.output_tokens_per_second,
        "goodput_requests_per_second": summary.goodput_requests_per_second,
        "attainment": summary.attainment,
    }
    latencies = {
        "ttft": summary.ttft_seconds,
        "tpot": summary.tpot_seconds,
        "itl": summary.itl_seconds,
        "end_to_end": summary.end_to_end_seconds,
    }
    for name, values in latencies.items():
        row.update({f"{name}_{key}_seconds": value for key, value in _values(values)})
    if cost is not None:
        row["num_chips"] = cost.num_chips
        row["usd_per_million_output_tokens"] = cost.usd_per_million_output_tokens
        row["joules_per_output_token"] = cost.joules_per_output_token
    row["bottleneck"] = result.bottleneck
    return row


def _values(values: Distribution | None) -> Iterable[tuple[str, float | None]]:
    for key in ("mean", "p50", "p90", "p95", "p99", "max"):
        yield key, None if values is None else getattr(values, key)


def _requests(label: str, result: Result) -> Iterable[Row]:
    for record in result.requests or ():
        yield {
            "result": label,
            "index": record.index,
            "due_seconds": record.due_seconds,
            "start_seconds": record.start_seconds,
            "end_seconds": record.end_seconds,
            "ttft_seconds": ttft_seconds(record),
            "tpot_seconds": tpot_seconds(record),
            "num_input_tokens": record.num_input_tokens,
            "num_cached_tokens": record.num_cached_tokens,
            "num_output_tokens": record.num_output_tokens,
            "error": record.error,
        }


def _pools(label: str, result: Result) -> Iterable[Row]:
    for pool in result.pools:
        for sample in pool.series:
            yield {
                "result": label,
                "pool": pool.name,
                "role": pool.role,
                "seconds": sample.seconds,
                "busy_share": sample.busy_share,
                "batch": sample.batch,
                "waiting": sample.waiting,
                "kv_share": sample.kv_share,
            }


def _links(label: str, result: Result) -> Iterable[Row]:
    for link in result.links:
        for sample in link.series:
            yield {
                "result": label,
                "source": link.source,
                "target": link.target,
                "seconds": sample.seconds,
                "bytes_per_second": sample.bytes_per_second,
            }
