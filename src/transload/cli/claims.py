"""`transload claims`: published claims beside what the model says."""

from __future__ import annotations

import argparse
import sys


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand and its flags."""
    parser = subparsers.add_parser(
        "claims",
        help="published claims beside what the model says of the same setting",
        description="Simulate the settings of published claims and say which are reproduced, which do not follow and "
        "from which assumption, and which cannot be checked and why.",
    )
    parser.add_argument("ids", nargs="*", metavar="ID", help="one or several, such as distserve.blog_toy (default all)")
    parser.add_argument("--list", action="store_true", help="only list what has been claimed, simulate nothing")
    parser.add_argument("--json", action="store_true", help="print them as JSON, with everything they rest on")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code: 0, whatever the verdicts are."""
    from rich.console import Console

    from transload.study.claims.evaluate import evaluate
    from transload.study.claims.record import record, records
    from transload.study.claims.show import LEGEND, findings_table, show_finding

    chosen = [record(claim_id) for claim_id in args.ids] or list(records().values())
    console = Console(width=None if sys.stdout.isatty() else 170)
    if args.list:
        for each in chosen:
            console.print(f"{each.id:<26} {each.title}; {each.kind}", highlight=False, soft_wrap=True)
        return 0
    progress = Console(stderr=True)
    with progress.status("simulating") as status:
        findings = evaluate(chosen, report=lambda claim_id: status.update(f"simulating {claim_id}"))
    if args.json:
        import msgspec

        encoded = msgspec.json.encode(findings)
        sys.stdout.write(msgspec.json.format(encoded, indent=2).decode() + "\n")
    elif args.ids:
        for index, finding in enumerate(findings):
            if index:
                console.print()
            show_finding(finding, console)
    else:
        console.print(findings_table(findings))
        console.print(LEGEND, style="dim", soft_wrap=True, highlight=False)
    return 0
