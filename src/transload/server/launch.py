"""`transload serve`: from a deployment to a running server, and back to nothing.

Order: find the model, place the workers, start them, open the port; on Ctrl-C or SIGTERM the reverse. Whatever stage a
signal or an error comes in, every process, socket and piece of shared memory is gone afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from transload.control.controller import ControllerConfig
from transload.deploy.machine import read_machine
from transload.deploy.placement import place
from transload.deploy.plan import Placement
from transload.deploy.spec import Deployment
from transload.model.source import ModelFiles, locate
from transload.model.tokenizer import load_tokenizer
from transload.runtime.base import ServedModel
from transload.runtime.real import RealRuntime
from transload.server.app import create_app
from transload.server.feed import MetricsFeed
from transload.server.metrics import Metrics
from transload.server.serve import serve_http
from transload.transfer.layout import kv_layout

GRACE_SECONDS = 10.0
"""How long running requests may go on after the first signal; a second signal ends them."""


def serve(deployment: Deployment, *, ask: str | None = None, event_log: Path | None = None) -> int:
    """Serve until a signal comes. `ask` sends one chat request as soon as the server is ready. Returns the exit
    code. Raises `TransloadError` if it cannot be started."""
    console = Console(stderr=True)
    return asyncio.run(_serve(deployment, console, ask, event_log))


async def _serve(deployment: Deployment, console: Console, ask: str | None, event_log: Path | None) -> int:
    started = time.monotonic()
    files = await asyncio.to_thread(locate, deployment.model)
    placement = place(deployment, read_machine(), files.arch)
    for warning in placement.warnings:
        console.print(f"[yellow]note:[/] {warning}", highlight=False)
    tokenizer = load_tokenizer(files)
    model = served_model(deployment, placement, files)
    metrics = Metrics()
    stop = asyncio.Event()
    with _signals(stop, console):
        runtime = RealRuntime(model, placement, controller_config(deployment), event_log=event_log)
        runtime.observe = MetricsFeed(metrics, runtime.controller)
        names = ", ".join(plan.name for plan in placement.workers)
        with console.status(f"starting {names}: loading {model.name} ({model.dtype})"):
            if not await _enter(runtime, stop):
                return 130
        try:
            app = create_app(runtime, tokenizer, deployment.server, deployment.seed, metrics=metrics)
            await serve_http(
                app,
                deployment.server,
                started=lambda host, port: _started(console, model, host, port, started, ask),
                stop=stop,
                grace_seconds=GRACE_SECONDS,
            )
        finally:
            await runtime.close()
            console.print("stopped: every worker is gone", highlight=False)
    return 0


async def _enter(runtime: RealRuntime, stop: asyncio.Event) -> bool:
    """Start the workers. False: a signal came first, and nothing is left."""
    starting = asyncio.create_task(runtime.start())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if starting.done():
        await starting
        return True
    starting.cancel()
    await asyncio.wait({starting})
    await runtime.close()
    return False


@contextlib.contextmanager
def _signals(stop: asyncio.Event, console: Console) -> Iterator[None]:
    """The first SIGINT or SIGTERM stops in order; a second one is left to Python."""
    loop = asyncio.get_running_loop()

    def first(name: str) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        console.print(
            f"{name}: finishing what runs, at most {GRACE_SECONDS:g} s; again to end at once", highlight=False
        )
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, first, number.name)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _started(console: Console, model: ServedModel, host: str, port: int, began: float, ask: str | None) -> None:
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{port}"
    console.print(f"[green]ready[/] in {time.monotonic() - began:.1f} s: {model.name} at {url}", highlight=False)
    body = '{"model": "default", "messages": [{"role": "user", "content": "Hello!"}]}'
    console.print(
        f"  try:  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'", highlight=False
    )
    console.print(f"  or:   transload chat {url}", highlight=False)
    if ask is not None:
        task = asyncio.get_running_loop().create_task(asyncio.to_thread(_ask, url, ask))
        _ASKED.add(task)
        task.add_done_callback(_ASKED.discard)


_ASKED: set[asyncio.Task[None]] = set()


def _ask(url: str, text: str) -> None:
    from transload.study.ask import ask_once

    console = Console()
    console.print(f"\n[bold]{text}[/]", highlight=False)
    ask_once(url, text, console)


def controller_config(deployment: Deployment) -> ControllerConfig:
    """What the deployment says to the controller."""
    return ControllerConfig(
        policy=deployment.router.policy,
        local_prefill=deployment.router.local_prefill,
        max_attempts=deployment.router.max_attempts,
        max_waiting=deployment.server.max_waiting,
        max_batch=max(pool.limits.max_batch for pool in deployment.pools),
    )


def served_model(deployment: Deployment, placement: Placement, files: ModelFiles) -> ServedModel:
    """What the front end must know of the model."""
    plan = placement.workers[0]
    return ServedModel(
        name=deployment.model.served_name or files.name,
        arch=files.arch,
        dtype=plan.dtype,
        max_context=placement.max_context,
        layout_digest=kv_layout(files.arch, files.identity, plan.block_size, plan.dtype).digest,
        block_size=plan.block_size,
    )
