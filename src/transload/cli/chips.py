"""`transload chips`: the chips of the catalog, or one of them with every number and its source."""

from __future__ import annotations

import argparse
import sys


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand and its flags."""
    parser = subparsers.add_parser(
        "chips",
        help="list the chips that can be modelled, or explain one",
        description="List all chips, or show one with every number, its class, its source and what is unknown.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME|FILE", help="id, alias, or a chip file of your own")
    parser.add_argument(
        "--assume",
        action="append",
        default=[],
        metavar="ID.QUANTITY=VALUE",
        help='a number of your own, such as "rubin_cpx.dense_flops.fp4=20 PFLOP/s"; may be repeated',
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON, numbers in base units")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code: 0."""
    from transload.hardware.catalog import chip_names, load_chip
    from transload.hardware.slots import with_assumptions

    names = [args.name] if args.name else chip_names()
    chips = with_assumptions((load_chip(name) for name in names), args.assume)
    if args.json:
        import msgspec

        encoded = msgspec.json.encode(chips[0] if args.name else chips)
        sys.stdout.write(msgspec.json.format(encoded, indent=2).decode() + "\n")
        return 0
    from rich.console import Console

    from transload.hardware.show import LEGEND, chips_table, show_described

    console = Console(width=None if sys.stdout.isatty() else 150)
    if args.name:
        show_described(chips[0], console)
    else:
        console.print(chips_table(chips))
        console.print(f"dense peaks, {LEGEND}", style="dim", soft_wrap=True, highlight=False)
    return 0
