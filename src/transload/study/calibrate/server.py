"""A server of a deployment on this machine, as a child process, and loads played against it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

import msgspec

from transload.deploy.load import to_yaml
from transload.deploy.spec import Deployment
from transload.errors import TransloadError
from transload.runtime.base import Waterfall
from transload.study.http_client import HttpClient, parse_url
from transload.study.loadgen import LoadGenerator
from transload.study.metrics import RequestRecord
from transload.study.target import Target, discover
from transload.study.told import fetch_waterfalls
from transload.study.workload import Workload

START_SECONDS = 360.0
STOP_SECONDS = 30.0
LOOK_SECONDS = 0.1
REQUEST_SECONDS = 600.0


class ServerProcess:
    """`transload serve` of a deployment, with event logs. A context manager."""

    def __init__(self, deployment: Deployment, folder: Path) -> None:
        """`folder`: for its file, its output and its event logs; exists."""
        self.event_log = folder / "events"
        self._output = folder / "output.txt"
        file = folder / "deployment.yaml"
        server = msgspec.structs.replace(deployment.server, port=0, host="127.0.0.1")
        file.write_text(to_yaml(msgspec.structs.replace(deployment, server=server)))
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "transload", "serve", str(file), "--event-log", str(self.event_log)],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.url = ""

    def __enter__(self) -> ServerProcess:
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """In order; by force if that takes too long."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def cpu_seconds(self) -> float:
        """That the front end has used so far; its workers are not counted."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            output = self._output.read_text(errors="replace")
            ready = re.search(r"ready in .* at (http://\S+)", output)
            if ready is not None:
                self.url = ready.group(1)
                return
            if self._process.poll() is not None:
                raise TransloadError(f"the server ended before it was ready:\n{output.strip()}")
            time.sleep(LOOK_SECONDS)
        raise TransloadError(f"the server was not ready within {START_SECONDS:g} s")


class Played(msgspec.Struct, frozen=True, kw_only=True):
    """A load that was played."""

    clock_seconds: float
    """When it began, on the monotonic clock."""
    model: str
    """As the server calls it."""
    records: list[RequestRecord]
    waterfalls: tuple[Waterfall, ...] = ()
    """Of all requests, if the server tells."""


def play(url: str, workload: Workload, *, api_key: str | None = None) -> Played:
    """Raises `TransloadError` if no server answers or a request fails: nothing could be learnt from the rest."""
    return asyncio.run(_play(url, workload, api_key))


async def _play(url: str, workload: Workload, api_key: str | None) -> Played:
    client = HttpClient(parse_url(url), {"Authorization": f"Bearer {api_key}"} if api_key else {})
    try:
        target: Target = await discover(client)
        began = time.monotonic()
        records = await LoadGenerator(client, target, workload, timeout_seconds=REQUEST_SECONDS).run()
        failed = next((record for record in records if record.error is not None), None)
        if failed is not None:
            raise TransloadError(f"{url}: a request failed ({failed.error}: {failed.error_detail})")
        waterfalls = await fetch_waterfalls(client, records, of_all=True)
        return Played(clock_seconds=began, model=target.model, records=records, waterfalls=waterfalls)
    finally:
        await client.close()


def end_in_order_when_told() -> None:
    """SIGTERM as Ctrl-C: servers are stopped, not left behind."""

    def told(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, told)


def new_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="transload-calibrate-")
