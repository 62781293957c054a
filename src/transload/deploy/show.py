"""Prints an `Explanation` for people. Decides nothing and computes nothing beyond rounding."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from transload.deploy.explain import PROMPT_TOKENS, Explanation, LinkLine, WorkerLine
from transload.units import format_bytes, format_seconds


def show(explanation: Explanation, console: Console) -> None:
    """Print all of it."""
    _show_head(explanation, console)
    console.print(_worker_table(explanation.workers))
    console.print("[dim]estimates: weights once loaded, other (the process and a step's intermediate results)[/]\n")
    _show_links(explanation, console)
    _show_hops(explanation, console)
    _show_rules(explanation, console)
    for warning in explanation.warnings:
        console.print(f"[yellow]note[/]  {escape(warning)}")
    for problem in explanation.problems:
        console.print(f"[red]does not fit[/]  {escape(problem)}")
    if explanation.fits:
        console.print("[green]fits this machine[/]")


def _show_head(explanation: Explanation, console: Console) -> None:
    model, machine = explanation.model, explanation.machine
    stored = "not fetched yet"
    if model.stored_dtype is not None and model.stored_bytes is not None:
        stored = f"stored as {model.stored_dtype}, {format_bytes(model.stored_bytes)}"
    exact = ", deterministic" if model.deterministic else ""
    active = ""
    if model.num_experts is not None:
        active = (
            f" ({model.num_active_parameters / 1e6:,.0f} M for a token: {model.experts_per_token} of "
            f"{model.num_experts} experts)"
        )
    console.print(f"[bold]{escape(explanation.source)}[/]")
    console.print(
        f"model    {escape(model.name)}: {model.num_parameters / 1e6:,.0f} M weights{active} in {model.num_layers} "
        f"layers, {stored}; computes in {model.dtype}{exact}",
        highlight=False,
    )
    console.print(
        f"         context up to {model.max_context:,} tokens; "
        f"{format_bytes(model.kv_bytes_per_token)} of KV cache a token",
        highlight=False,
    )
    quota = f" (limited to {machine.core_quota:g} cores' worth of time)" if machine.core_quota is not None else ""
    gpus = ", ".join(machine.gpus) or "no GPU"
    console.print(
        f"machine  {len(machine.cores)} cores{quota}, {format_bytes(machine.free_bytes)} of "
        f"{format_bytes(machine.memory_bytes)} free, {escape(gpus)}\n",
        highlight=False,
    )


def _worker_table(workers: tuple[WorkerLine, ...]) -> Table:
    table = Table("worker", "role", "runs on", title="what runs where", title_justify="left", title_style="bold")
    for column in ("weights", "KV cache", "other", "in all", "holds"):
        table.add_column(column, justify="right")
    for worker in workers:
        total = worker.weights_bytes + worker.kv_bytes + worker.other_bytes
        table.add_row(
            worker.name,
            worker.role,
            _runs_on(worker),
            format_bytes(worker.weights_bytes),
            format_bytes(worker.kv_bytes),
            format_bytes(worker.other_bytes),
            format_bytes(total),
            "no requests"
            if worker.role == "ffn"
            else f"{worker.num_blocks:,} blocks of {worker.block_size}\n{worker.kv_tokens:,} tokens\n"
            f"{worker.full_contexts:.1f} full contexts",
        )
    return table


def _runs_on(worker: WorkerLine) -> str:
    where = "" if worker.starts_here else "elsewhere: "
    threads = f"{worker.threads} thread{'s' if worker.threads > 1 else ''}"
    if not worker.cores:
        return f"{where}{worker.device}, {threads}, not pinned"
    cores = ", ".join(str(core) for core in worker.cores)
    return f"{where}{worker.device}, {threads} on core{'s' if len(worker.cores) > 1 else ''} {cores}"


def _show_links(explanation: Explanation, console: Console) -> None:
    if not explanation.links:
        if not explanation.hops:
            console.print("nothing crosses between workers: each prefills and decodes its own requests\n")
        return
    table = Table("from", "to", "over", title="what crosses", title_justify="left", title_style="bold")
    for column in ("a prompt token", f"a {PROMPT_TOKENS:,}-token prompt", "time for it (estimate)"):
        table.add_column(column, justify="right")
    for link in explanation.links:
        table.add_row(
            link.source,
            link.target,
            link.transport,
            format_bytes(link.bytes_per_token),
            f"{format_bytes(link.bytes_per_prompt)}\nin {_frames(link.frames_per_prompt)}",
            _times(link),
        )
    console.print(table)
    console.print(f"[dim]{explanation.links[0].crosses}; tokens that the target has cached do not cross[/]\n")


def _show_hops(explanation: Explanation, console: Console) -> None:
    if not explanation.hops:
        return
    table = Table("attention", "FFN", "over", "split", title="feed-forwards", title_justify="left", title_style="bold")
    for column in ("a token and layer", "a token", "calls a step", "without FFN workers"):
        table.add_column(column, justify="right")
    for hop in explanation.hops:
        table.add_row(
            hop.source,
            hop.target,
            hop.transport,
            hop.split,
            format_bytes(hop.bytes_per_row),
            format_bytes(hop.bytes_per_token),
            f"{hop.calls_per_step} ({hop.micro_batches} micro-batch{'es' if hop.micro_batches > 1 else ''})",
            "computes here" if hop.fallback == "local" else "requests fail",
        )
    console.print(table)
    console.print("[dim]activations there and back, for every token that is computed[/]\n")


def _frames(count: int) -> str:
    return "1 frame" if count == 1 else f"{count} frames"


def _times(link: LinkLine) -> str:
    """The transport in use first."""
    times = {"shm": link.shm_seconds, "tcp": link.tcp_seconds}
    names = sorted(times, key=lambda name: name != link.transport)
    lines = [f"{format_seconds(times[name])} over {name}" for name in names]
    return "\n".join(["none over direct", *lines] if link.transport == "direct" else lines)


def _show_rules(explanation: Explanation, console: Console) -> None:
    targets = explanation.targets
    wanted = [
        f"{name} within {format_seconds(seconds)}"
        for name, seconds in (("TTFT", targets.ttft_seconds), ("TPOT", targets.tpot_seconds))
        if seconds is not None
    ]
    if wanted:
        console.print(f"targets  {', '.join(wanted)} for {targets.attainment:.0%} of requests", highlight=False)
    router = explanation.router
    console.print(
        f"router   {router.policy}; local prefill: {router.local_prefill}; {router.max_attempts} attempts a request",
        highlight=False,
    )
    console.print(f"serves   {escape(explanation.address)}\n", highlight=False)
