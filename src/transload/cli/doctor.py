"""`transload doctor`: the flags. The checks are `study/doctor.py`."""

from __future__ import annotations

import argparse
import sys

STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand and its flags."""
    parser = subparsers.add_parser(
        "doctor",
        help="check this machine and say what to do",
        description="Check cores, memory, shared memory, limits, GPU, optional parts. Builds the CPU kernels if nobody "
        "has yet; changes nothing else.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address that serve would use (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port that serve would use (default 8000)")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code: 0; 1 if something must be put right before a deployment can run here."""
    import msgspec

    from transload.study.doctor import examine

    checks = examine(args.host, args.port)
    if args.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(checks), indent=2).decode() + "\n")
    else:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        for check in checks:
            advice = f"\n[bold]do:[/] {escape(check.advice)}" if check.advice else ""
            table.add_row(f"[{STYLES[check.status]}]{check.status}[/]", check.name, escape(check.found) + advice)
        Console(width=None if sys.stdout.isatty() else 130).print(table)
    return int(any(check.status == "fail" for check in checks))
