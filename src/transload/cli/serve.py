"""`transload serve`: the flags. The serving is `server/launch.py`."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

from transload.cli.deployment_flags import add_deployment_flags, resolve_flags


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand and its flags."""
    parser = subparsers.add_parser(
        "serve",
        help="start the workers and an OpenAI-compatible server",
        description=(
            "Start the workers of a deployment and serve them. "
            "Without FILE and --topology: one prefill and one decode worker on CPU."
        ),
    )
    add_deployment_flags(parser)
    parser.add_argument("--ask", metavar="TEXT", help="answer one question in the terminal first")
    parser.add_argument("--once", action="store_true", help="with --ask: stop after the answer")
    parser.add_argument(
        "--event-log", metavar="FOLDER", type=Path, help="write what every machine is told, as JSON lines"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code: 0 after a clean end; errors are raised."""
    from transload.runtime.forks import worker_processes

    with closing(worker_processes()) as processes:
        processes.begin()  # first of all: it imports torch elsewhere while this process does what follows
        deployment = resolve_flags(args)
        if all(pool.start == "elsewhere" for pool in deployment.pools):
            processes.close()
        from transload.server.launch import serve

        return serve(deployment, processes, ask=args.ask, once=args.once, event_log=args.event_log)
