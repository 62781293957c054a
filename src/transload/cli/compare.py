"""`transload compare`: several deployments under one workload, side by side, and which of them it pays to split."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from transload.cli.workload_flags import add_trace, add_workload, duration, share, workload
from transload.errors import DeploymentError

if TYPE_CHECKING:
    from transload.deploy.spec import Deployment
    from transload.study.compare import Comparison
    from transload.study.result import Result

_EXAMPLES = """\
examples:
  transload compare deployments/b200-aggregated.yaml deployments/b200-pd.yaml --trace conversation
  transload compare deployments/{b200-aggregated,b200-pd,cpx-r200,trainium-cs3,gpu-sn50,rubin-lpx}.yaml \\
      --trace conversation --requests 2000 --saturate
  transload compare A.yaml B.yaml --rate 20 --input 4000 --output 500 --csv table.csv
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand and its flags."""
    parser = subparsers.add_parser(
        "compare",
        help="simulate several deployments and lay them side by side",
        description="Simulate deployments under one workload: what crosses, latencies, goodput, money, energy.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="deployment files (YAML)")
    add_workload(parser.add_argument_group("load"))
    add_trace(parser.add_argument_group("load from a trace file"))
    group = parser.add_argument_group("simulation and result")
    group.add_argument(
        "--assume", action="append", default=[], metavar="ID.QUANTITY=VALUE", help="a number of your own"
    )
    group.add_argument("--ttft", type=duration, help="target for the time to first token, instead of the files'")
    group.add_argument("--tpot", type=duration, help="target for the time per output token, instead of the files'")
    group.add_argument("--attainment", type=share, help="share that must meet them, instead of the files'")
    group.add_argument(
        "--saturate",
        action="store_true",
        help="compare each at the highest load at which it keeps its targets: about ten runs each",
    )
    group.add_argument("--json", metavar="FILE", help="write the comparison; - for stdout")
    group.add_argument("--csv", metavar="FILE", help="write a line for each deployment; - for stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code: 0."""
    import msgspec
    from rich.console import Console

    from transload.deploy.load import load
    from transload.study.json_file import write_out
    from transload.study.show_compare import show_comparison, to_csv

    if args.json == "-" and args.csv == "-":
        raise DeploymentError("--json - --csv -: both would go to stdout; name a file for one of them")
    deployments = [(file, _with_targets(load(file), args)) for file in args.files]
    comparison = _simulated(args, deployments)
    if args.json:
        encoded = msgspec.json.format(msgspec.json.encode(comparison), indent=2).decode() + "\n"
        write_out("--json", args.json, encoded.encode())
    if args.csv:
        write_out("--csv", args.csv, to_csv(comparison).encode())
    if "-" not in (args.json, args.csv):
        show_comparison(comparison, Console(width=None if sys.stdout.isatty() else 200))
    return 0


def _simulated(args: argparse.Namespace, deployments: list[tuple[Path, Deployment]]) -> Comparison:
    from functools import partial

    from rich.console import Console

    from transload.study.compare import compare
    from transload.study.saturation import saturate
    from transload.study.simulate import simulate
    from transload.study.workload import Workload

    load = workload(args)
    pairs: list[tuple[Deployment, Result]] = []
    factors: list[float] = []
    with Console(stderr=True).status("simulating") as status:
        for file, deployment in deployments:
            status.update(f"simulating {file}")

            def play(asked: Workload, deployment: Deployment, file: Path) -> Result:
                return simulate(deployment, asked, name=file.stem, assume=_about(args.assume, deployment))

            once = partial(play, deployment=deployment, file=file)
            if args.saturate:
                found = saturate(load, once)
                factors.append(found.factor)
                pairs.append((deployment, found.result or once(load)))
            else:
                pairs.append((deployment, once(load)))
    return compare(pairs, workload=load.name, factors=factors or None)


def _with_targets(deployment: Deployment, args: argparse.Namespace) -> Deployment:
    """The targets of the flags in place of the file's, so that all are judged alike."""
    import msgspec

    given = {"ttft_seconds": args.ttft, "tpot_seconds": args.tpot, "attainment": args.attainment}
    targets = msgspec.structs.replace(
        deployment.targets, **{name: value for name, value in given.items() if value is not None}
    )
    return msgspec.structs.replace(deployment, targets=targets)


def _about(assume: list[str], deployment: Deployment) -> list[str]:
    """Those of the assumptions that are about this deployment: others may have chips that it has not."""
    from transload.hardware.slots import parse_assumption
    from transload.study.fleet import fleet_of

    fleet = fleet_of(deployment)
    known = {name for thing in (*fleet.chips.values(), *fleet.links.values()) for name in (thing.id, *thing.aliases)}
    return [text for text in assume if parse_assumption(text).subject in known]
