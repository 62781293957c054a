"""`transload chips`: the chips of the catalog, or one of them with every number and its source."""

from __future__ import annotations

import argparse

from transload.cli.catalog_listing import add_listing_parser, show_listing


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand and its flags."""
    add_listing_parser(
        subparsers,
        "chips",
        things="chips",
        name_help="id, alias, or a chip file of your own",
        example="rubin_cpx.dense_flops.fp4=20 PFLOP/s",
        run=run,
    )


def run(args: argparse.Namespace) -> int:
    """Exit code: 0."""
    from transload.hardware.catalog import chip_names, load_chip
    from transload.hardware.show import LEGEND, chips_table

    return show_listing(args, names=chip_names, load=load_chip, table=chips_table, legend=f"dense peaks, {LEGEND}")
