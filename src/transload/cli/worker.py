"""`transload worker`: the flags. The worker is `runtime/worker.py`."""

from __future__ import annotations

import argparse
import os
import re


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand and its flags."""
    parser = subparsers.add_parser(
        "worker",
        help="join a server as one of its workers (serve starts its own)",
        description="One worker process. It is told everything else by the server that it joins.",
    )
    parser.add_argument(
        "--join", required=True, metavar="HOST:PORT", type=_address, help="where the server listens for workers"
    )
    parser.add_argument("--name", required=True, help="which of the deployment's workers this is, such as decode-0")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code of the worker."""
    from transload.runtime.processes import JOIN_TOKEN
    from transload.runtime.worker import main

    return main(args.join, args.name, os.environ.pop(JOIN_TOKEN, ""))


def _address(text: str) -> str:
    """HOST:PORT, as `transload serve` prints it."""
    found = re.fullmatch(r".+:(\d{1,5})", text)
    if found is None or not 0 < int(found[1]) < 65536:
        raise argparse.ArgumentTypeError(f"got {text!r}; want HOST:PORT, as `transload serve` prints it")
    return text
