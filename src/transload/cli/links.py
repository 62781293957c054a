"""`transload links`: the kinds of link of the catalog, or one of them with every number and its source."""

from __future__ import annotations

import argparse
import sys


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand and its flags."""
    parser = subparsers.add_parser(
        "links",
        help="list the kinds of link that can be modelled, or explain one",
        description="List all kinds of link, or show one with every number, its class, its source and what is unknown.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME|FILE", help="id, alias, or a link file of your own")
    parser.add_argument(
        "--assume",
        action="append",
        default=[],
        metavar="ID.QUANTITY=VALUE",
        help='a number of your own, such as "lpx_nvl_bridge.bandwidth=400 GB/s"; may be repeated',
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON, numbers in base units")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code: 0."""
    from transload.hardware.catalog import link_names, load_link
    from transload.hardware.slots import with_assumptions

    names = [args.name] if args.name else link_names()
    links = with_assumptions((load_link(name) for name in names), args.assume)
    if args.json:
        import msgspec

        encoded = msgspec.json.encode(links[0] if args.name else links)
        sys.stdout.write(msgspec.json.format(encoded, indent=2).decode() + "\n")
        return 0
    from rich.console import Console

    from transload.hardware.show import LEGEND, links_table, show_described

    console = Console(width=None if sys.stdout.isatty() else 150)
    if args.name:
        show_described(links[0], console)
    else:
        console.print(links_table(links))
        console.print(LEGEND, style="dim", soft_wrap=True, highlight=False)
    return 0
