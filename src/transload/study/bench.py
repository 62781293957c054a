"""`transload bench`: a workload against a running server, a table for the reader and a JSON file for the record."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from transload.deploy.spec import Targets
from transload.errors import DeploymentError, TransloadError
from transload.runtime.base import Waterfall
from transload.study.curves import latency_curves
from transload.study.http_client import HttpClient, parse_url
from transload.study.json_file import write_out
from transload.study.loadgen import LoadGenerator
from transload.study.metrics import RequestRecord, Summary, summarize
from transload.study.provenance import MachineFacts, machine_facts, versions
from transload.study.summary_table import show_summary
from transload.study.target import Endpoint, Target, discover
from transload.study.told import fetch_waterfalls
from transload.study.workload import ClosedLoop, Fixed, Synthetic, Workload, synthetic

SCHEMA = "transload-bench-1"
EXIT_ALL_FAILED = 1
EXIT_INTERRUPTED = 130
PROGRESS_SECONDS = 0.25


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What to measure."""

    url: str
    workload: Workload
    targets: Targets
    model: str | None = None
    """None: the first that the server tells of."""
    api_key: str | None = None
    endpoint: Endpoint = "completions"
    prompt_kind: Literal["auto", "ids", "text"] = "auto"
    id_range: tuple[int, int] | None = None
    ignore_eos: bool = True
    temperature: float = 0.0
    more_fields: dict[str, object] | None = None
    timeout_seconds: float = 600.0
    num_warmup: int = 0
    """Requests sent one after another before the run, and not measured."""
    json_path: str | None = None
    """Where the result goes as JSON; "-": stdout, and the table to stderr."""
    with_records: bool = False
    html_path: str | None = None
    csv_path: str | None = None
    """A folder."""
    event_log: Path | None = None
    """Where the server writes its event logs, for the page."""
    command: tuple[str, ...] = ()
    """What was typed, for the record; must hold no secret."""


class Server(msgspec.Struct, frozen=True, kw_only=True):
    url: str
    model: str
    endpoint: str
    prompt_kind: str
    max_context: int | None


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON file."""

    schema: str = SCHEMA
    command: tuple[str, ...]
    started_at: str
    machine: MachineFacts
    versions: dict[str, str]
    server: Server
    workload: str
    seed: int
    was_interrupted: bool
    summary: Summary
    error_details: list[str]
    """Each once."""
    curves: dict[str, tuple[float, ...]] = {}
    """See `study/curves.py`."""
    waterfalls: tuple[Waterfall, ...] = ()
    """Of a few requests, if the server tells: of median and of greatest latencies."""
    clock_seconds: float | None = None
    """When the run began on this machine's monotonic clock, which event logs are written by."""
    records: list[RequestRecord] | None = None


def run_bench(bench: Bench) -> int:
    """Run it, show it, write it. 0; 1 if every request failed; 130 if the user stopped it.

    Raises `DeploymentError` for options that cannot be, `TransloadError` if no server answers.
    """
    check_output_path("--json", bench.json_path)
    check_output_path("--html", bench.html_path)
    if bench.event_log is not None and not bench.event_log.is_dir():
        raise DeploymentError(
            f"--event-log {bench.event_log}: no such folder; start the server with `transload serve --event-log` first"
        )
    _allow_many_connections()
    console = Console(stderr=bench.json_path == "-", highlight=False)
    try:
        result, records = asyncio.run(_measure(bench, console))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    show_summary(result.summary, records, console, title=f"{bench.workload.name} -> {result.server.model}")
    if bench.json_path is not None:
        encoded = msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n"
        write_out("--json", bench.json_path, encoded)
    _report(bench, result, records)
    if result.was_interrupted:
        return EXIT_INTERRUPTED
    return EXIT_ALL_FAILED if result.summary.num_successful == 0 else 0


async def _measure(bench: Bench, console: Console) -> tuple[Result, list[RequestRecord]]:
    headers = {"Authorization": f"Bearer {bench.api_key}"} if bench.api_key else {}
    client = HttpClient(parse_url(bench.url), headers)
    try:
        target = await _target(bench, client)
        if bench.num_warmup:
            await _warm_up(bench, client, target)
        started_at = datetime.now(UTC).isoformat(timespec="seconds")
        before = machine_facts()
        generator = LoadGenerator(client, target, bench.workload, timeout_seconds=bench.timeout_seconds)
        with _stop_on_interrupt(generator) as interruption, _progress(console) as progress:
            shown = asyncio.create_task(_show_progress(progress, generator, bench.workload))
            clock_seconds = time.monotonic()
            try:
                records = await generator.run()
            finally:
                shown.cancel()
        waterfalls = () if interruption.happened else await fetch_waterfalls(client, records)
    finally:
        await client.close()
    result = Result(
        command=bench.command,
        started_at=started_at,
        machine=before,
        versions=versions(),
        server=Server(
            url=client.address.url,
            model=target.model,
            endpoint=target.endpoint,
            prompt_kind=target.prompt_kind,
            max_context=target.max_context,
        ),
        workload=bench.workload.name,
        seed=bench.workload.seed,
        was_interrupted=interruption.happened,
        summary=summarize(records, bench.targets),
        error_details=sorted({f"{r.error}: {r.error_detail}" for r in records if r.error is not None}),
        curves=latency_curves(records),
        waterfalls=waterfalls,
        clock_seconds=clock_seconds,
        records=records if bench.with_records else None,
    )
    return result, records


async def _target(bench: Bench, client: HttpClient) -> Target:
    target = await discover(
        client,
        model=bench.model,
        endpoint=bench.endpoint,
        prompt_kind=bench.prompt_kind,
        id_range=bench.id_range,
    )
    return msgspec.structs.replace(
        target, ignore_eos=bench.ignore_eos, temperature=bench.temperature, more_fields=bench.more_fields or {}
    )


async def _warm_up(bench: Bench, client: HttpClient, target: Target) -> None:
    """Prompts of a seed of their own, so that none is in a prefix cache when the run begins."""
    first = next(iter(bench.workload))
    workload = synthetic(
        Synthetic(
            arrivals=ClosedLoop(1),
            input=Fixed(first.num_input_tokens),
            output=Fixed(first.num_output_tokens),
            num_requests=bench.num_warmup,
            seed=bench.workload.seed + 2**32,
        )
    )
    records = await LoadGenerator(client, target, workload, timeout_seconds=bench.timeout_seconds).run()
    failed = next((record for record in records if record.error is not None), None)
    if failed is not None:
        raise TransloadError(
            f"{client.address.url}: a warm-up request failed, so nothing was measured ({failed.error}: "
            f"{failed.error_detail})"
        )


# ---------------------------------------------------------------------------------------------------------------------
# While it runs


class _Interruption:
    happened = False


@contextlib.contextmanager
def _stop_on_interrupt(generator: LoadGenerator) -> Iterator[_Interruption]:
    """The first Ctrl-C ends the run and keeps what was measured; the second ends the program."""
    loop = asyncio.get_running_loop()
    interruption = _Interruption()

    def interrupt() -> None:
        interruption.happened = True
        generator.stop()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        yield interruption
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def _progress(console: Console) -> Progress:
    shown_on = console if console.is_terminal else Console(stderr=True)
    return Progress(
        SpinnerColumn(),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[counts]}"),
        TimeElapsedColumn(),
        console=shown_on,
        transient=True,
        disable=not shown_on.is_terminal,
    )


async def _show_progress(progress: Progress, generator: LoadGenerator, workload: Workload) -> None:
    bar: TaskID = progress.add_task("", total=workload.num_requests or workload.duration_seconds, counts="")
    loop = asyncio.get_running_loop()
    began = loop.time()
    while True:
        now, elapsed = generator.progress, loop.time() - began
        rate = now.num_ended / elapsed if elapsed > 0 else 0.0
        of = "" if workload.num_requests is None else f"/{workload.num_requests}"
        counts = f"{now.num_ended}{of} done, {rate:.1f}/s, {now.num_in_flight} in flight, {now.num_failed} failed"
        progress.update(bar, completed=now.num_ended if workload.num_requests else elapsed, counts=counts)
        await asyncio.sleep(PROGRESS_SECONDS)


# ---------------------------------------------------------------------------------------------------------------------
# Before and after


def _allow_many_connections() -> None:
    """An open loop against a slow server holds a connection for each request in flight."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # not allowed here: then the soft limit stays
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def check_output_path(flag: str, path: str | None) -> None:
    """Refuse before the run what would be lost after it."""
    if path is None or path == "-":
        return
    if Path(path).is_dir():
        raise DeploymentError(f"{flag} {path}: this is a folder; name a file in it")
    if not Path(path).absolute().parent.is_dir():
        raise DeploymentError(f"{flag} {path}: the folder {Path(path).absolute().parent} does not exist; make it first")


def _report(bench: Bench, result: Result, records: list[RequestRecord]) -> None:
    if bench.html_path is None and bench.csv_path is None:
        return
    from transload.study.report import sources, tables, write_page
    from transload.study.timeline import read_timeline

    timeline = None if bench.event_log is None else read_timeline(bench.event_log)
    shown = sources.measured_result(result, records, name=result.server.model, timeline=timeline)
    if bench.html_path is not None:
        write_page([shown], bench.html_path)
    if bench.csv_path is not None:
        tables.write_csv([shown], [shown.name], bench.csv_path)
