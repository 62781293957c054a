"""`transload links`: the kinds of link of the catalog, or one of them with every number and its source."""

from __future__ import annotations

import argparse

from transload.cli.catalog_listing import add_listing_parser, show_listing


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand and its flags."""
    add_listing_parser(
        subparsers,
        "links",
        things="kinds of link",
        name_help="id, alias, or a link file of your own",
        example="lpx_nvl_bridge.bandwidth=400 GB/s",
        run=run,
    )


def run(args: argparse.Namespace) -> int:
    """Exit code: 0."""
    from transload.hardware.catalog import link_names, load_link
    from transload.hardware.show import LEGEND, links_table

    return show_listing(args, names=link_names, load=load_link, table=links_table, legend=LEGEND)
