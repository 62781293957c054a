"""What `transload chips` and `transload links` share: list a part of the catalog, or explain one thing of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.table import Table

    from transload.hardware.chip import Chip
    from transload.hardware.link import LinkKind

Thing = TypeVar("Thing", "Chip", "LinkKind")


def add_listing_parser(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
    command: str,
    *,
    things: str,
    name_help: str,
    example: str,
    run: Callable[[argparse.Namespace], int],
) -> None:
    """Add a subcommand that lists `things`; `example` is one assumption as `--assume` takes it."""
    parser = subparsers.add_parser(
        command,
        help=f"list the {things} that can be modelled, or explain one",
        description=f"List all {things}, or show one with every number, its class, its source and what is unknown.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME|FILE", help=name_help)
    parser.add_argument(
        "--assume",
        action="append",
        default=[],
        metavar="ID.QUANTITY=VALUE",
        help=f'a number of your own, such as "{example}"; may be repeated',
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON, numbers in base units")
    parser.set_defaults(run=run)


def show_listing(
    args: argparse.Namespace,
    *,
    names: Callable[[], list[str]],
    load: Callable[[str], Thing],
    table: Callable[[list[Thing]], Table],
    legend: str,
) -> int:
    """Print what was asked for. Exit code: 0."""
    from transload.hardware.slots import with_assumptions

    found = with_assumptions((load(name) for name in ([args.name] if args.name else names())), args.assume)
    if args.json:
        import msgspec

        encoded = msgspec.json.encode(found[0] if args.name else found)
        sys.stdout.write(msgspec.json.format(encoded, indent=2).decode() + "\n")
        return 0
    from rich.console import Console

    from transload.hardware.show import show_described

    console = Console(width=None if sys.stdout.isatty() else 150)
    if args.name:
        show_described(found[0], console)
    else:
        console.print(table(found))
        console.print(legend, style="dim", soft_wrap=True, highlight=False)
    return 0
