"""`transload serve`: from a deployment to a running server, and back to nothing.

Order: take the port, find the model, place the workers, start them, listen; on Ctrl-C or SIGTERM the reverse. Whatever
stage a signal or an error comes in, every process, socket and piece of shared memory is gone afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from transload.control.controller import ControllerConfig
from transload.deploy.check import check_can_be_served
from transload.deploy.machine import read_machine
from transload.deploy.placement import place
from transload.deploy.plan import Placement
from transload.deploy.spec import Deployment, Targets
from transload.errors import MachineError
from transload.model.native.library import load
from transload.model.source import ModelFiles, locate
from transload.model.tokenizer import ModelTokenizer, load_tokenizer
from transload.runtime.base import ServedModel
from transload.runtime.last_words import lenient_stderr
from transload.runtime.processes import Processes
from transload.runtime.real import RealRuntime
from transload.server.app import create_app
from transload.server.feed import MetricsFeed
from transload.server.ffn_feed import FfnFeed
from transload.server.metrics import Metrics
from transload.server.serve import reserve_address, serve_http
from transload.transfer.layout import kv_layout

GRACE_SECONDS = 10.0
"""How long running requests may go on after the first signal; a second signal ends them in an error they see."""


def serve(
    deployment: Deployment,
    processes: Processes,
    *,
    ask: str | None = None,
    once: bool = False,
    event_log: Path | None = None,
) -> int:
    """Serve until a signal comes, with workers out of `processes`.

    `ask` sends one chat request as soon as the server is ready; with `once` the server stops after it. Returns the exit
    code. Raises `TransloadError` if it cannot be started.
    """
    check_can_be_served(deployment)
    _check_event_log(event_log)
    console = Console(stderr=True)
    with lenient_stderr(), reserve_address(deployment.server) as listener:
        files, tokenizer = _find_model(deployment)
        serving = _Serving(deployment, processes, files, tokenizer, console, ask, once=once, event_log=event_log)
        return asyncio.run(serving.run(listener))


def _check_event_log(folder: Path | None) -> None:
    """While it runs, a log that cannot be written is given up; one that never could be is refused."""
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        raise MachineError(
            f"--event-log {folder}: cannot be written ({error.strerror}); name a folder you may write"
        ) from error


def _find_model(deployment: Deployment) -> tuple[ModelFiles, ModelTokenizer]:
    """Before there is an event loop, in this thread: so that Ctrl-C and SIGTERM end a download, with its process."""

    def stop(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        files = locate(deployment.model)
        return files, load_tokenizer(files)
    finally:
        signal.signal(signal.SIGTERM, before)


class _Serving:
    """One run of `transload serve`."""

    def __init__(
        self,
        deployment: Deployment,
        processes: Processes,
        files: ModelFiles,
        tokenizer: ModelTokenizer,
        console: Console,
        ask: str | None,
        *,
        once: bool,
        event_log: Path | None,
    ) -> None:
        self._deployment = deployment
        self._processes = processes
        self._files = files
        self._tokenizer = tokenizer
        self._console = console
        self._ask = ask
        self._once = once
        self._event_log = event_log
        self._began = time.monotonic()
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._is_serving = False
        self._asking: asyncio.Task[int] | None = None

    async def run(self, listener: socket.socket) -> int:
        deployment, files = self._deployment, self._files
        placement = place(deployment, read_machine(has_kernels=load() is not None), files.arch)
        for warning in placement.warnings:
            self._say(f"[yellow]note:[/] {warning}")
        model = served_model(deployment, placement, files)
        metrics = Metrics()
        with self._signals():
            join = deployment.server.join_host, deployment.server.join_port
            config = controller_config(deployment)
            runtime = RealRuntime(
                model, placement, config, processes=self._processes, join=join, event_log=self._event_log
            )
            runtime.observe = MetricsFeed(metrics, runtime.controller)
            runtime.observe_ffn = FfnFeed(metrics)
            if not await self._start(runtime, placement):
                return 130
            try:
                app = create_app(runtime, self._tokenizer, deployment.server, deployment.seed, metrics=metrics)
                await serve_http(
                    app,
                    deployment.server,
                    started=self._started,
                    stop=self._stop,
                    hurry=self._hurry,
                    listener=listener,
                    grace_seconds=GRACE_SECONDS,
                )
            finally:
                await runtime.close()
                self._say("stopped: every worker is gone")
        return self._asking.result() if self._asking is not None and self._asking.done() else 0

    async def _start(self, runtime: RealRuntime, placement: Placement) -> bool:
        """Start the workers. False: a signal came first, and nothing is left."""
        names = ", ".join(plan.name for plan in placement.workers)
        starting = asyncio.create_task(runtime.start(listening=lambda: self._show_joins(runtime)))
        stopping = asyncio.create_task(self._stop.wait())
        with self._console.status(f"starting {names}: loading {runtime.model.name} ({runtime.model.dtype})"):
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if starting.done():
            await starting
            return True
        starting.cancel()
        await asyncio.wait({starting})
        await runtime.close()
        return False

    def _show_joins(self, runtime: RealRuntime) -> None:
        for command in runtime.join_commands():
            self._say(f"waiting for a worker; start it with:\n  {command}")

    def _started(self, host: str, port: int) -> None:
        self._is_serving = True
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{port}"
        self._say(f"[green]ready[/] in {time.monotonic() - self._began:.1f} s at {url}")
        body = '{"messages": [{"role": "user", "content": "Hello!"}], "temperature": 0, "max_tokens": 50}'
        self._say(f"  try:  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'")
        self._say(f"  or:   transload chat {url}")
        if self._ask is not None:
            self._asking = asyncio.create_task(self._answer(url, self._ask))

    async def _answer(self, url: str, text: str) -> int:
        """The first question, asked over HTTP like any other."""
        from transload.study.ask import ask_once  # brings an HTTP client, which few starts need

        console = Console()
        console.print(f"\n[bold]{text}[/]", highlight=False)
        api_keys = self._deployment.server.api_keys
        try:
            return await asyncio.to_thread(ask_once, url, text, console, api_key=api_keys[0] if api_keys else None)
        finally:
            if self._once:
                self._stop.set()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM stops in order; a second one ends running requests at once, in an error."""
        loop = asyncio.get_running_loop()

        def received(name: str) -> None:
            if self._stop.is_set():
                if not self._hurry.is_set():
                    self._say(f"{name}: ending what runs")
                self._hurry.set()
            elif self._is_serving:
                self._say(f"{name}: finishing what runs, at most {GRACE_SECONDS:g} s; again to end at once")
            else:
                self._say(f"{name}: stopping the workers that were starting")
            self._stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, received, number.name)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


def controller_config(deployment: Deployment) -> ControllerConfig:
    """What the deployment says to the controller."""
    targets = deployment.targets if deployment.server.admission == "targets" else Targets()
    return ControllerConfig(
        policy=deployment.router.policy,
        local_prefill=deployment.router.local_prefill,
        max_attempts=deployment.router.max_attempts,
        max_waiting=deployment.server.max_waiting,
        ttft_seconds=targets.ttft_seconds,
        tpot_seconds=targets.tpot_seconds,
    )


def served_model(deployment: Deployment, placement: Placement, files: ModelFiles) -> ServedModel:
    """What the front end must know of the model."""
    plan = next(plan for plan in placement.workers if plan.role != "ffn")
    return ServedModel(
        name=deployment.model.served_name or files.name,
        arch=files.arch,
        dtype=plan.dtype,
        max_context=placement.max_context,
        layout_digest=kv_layout(files.arch, files.identity, plan.block_size, plan.dtype).digest,
        block_size=plan.block_size,
    )
