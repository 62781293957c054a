"""`transload validate`: the flags. Playing and comparing is `study/validate`."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from transload.cli.bench import without_secrets
from transload.errors import DeploymentError

if TYPE_CHECKING:
    from transload.deploy.spec import Deployment
    from transload.study.validate.saved import Validation

_EXAMPLES = """\
examples:
  transload calibrate -o machine.yaml
  transload validate --chip machine.yaml                      1agg and 1p1d, light and near saturation
  transload validate 2p1d deployments/1p1d-tcp.yaml --chip machine.yaml --rate 0.5
  transload validate --again validation.json --chip machine.yaml    what was measured then, simulated anew
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand and its flags."""
    parser = subparsers.add_parser(
        "validate",
        help="run for real and in virtual time, and compare",
        description=(
            "Start each deployment on this machine, play a load against it, simulate the same with the chip file of "
            "`transload calibrate`, and print the errors: of a simulation that is given how long the run's own steps "
            "took, and of one that knows what calibration said. The machine should have nothing else to do."
        ),
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "cases", nargs="*", default=["1agg", "1p1d"], metavar="CASE", help="files or shorthands (default 1agg 1p1d)"
    )
    parser.add_argument("--chip", default="machine.yaml", metavar="CHIP.yaml", help="default machine.yaml")
    parser.add_argument("--model", metavar="PATH", help="as for serve; the one that was measured")
    load = parser.add_argument_group("load")
    load.add_argument(
        "--load", action="append", type=float, metavar="SHARE", help="of the simulated capacity (default 0.3 and 0.85)"
    )
    load.add_argument("--rate", action="append", type=float, metavar="R", help="requests a second instead")
    load.add_argument("--trace", metavar="FILE", help="recorded arrivals and lengths instead")
    load.add_argument("--shrink", type=int, default=1, metavar="N", help="with --trace: divide its lengths by N")
    load.add_argument("--speedup", type=float, default=1.0, metavar="X", help="with --trace: play X times as fast")
    load.add_argument("--requests", type=int, default=60, metavar="N", help="default 60")
    load.add_argument(
        "--seconds", type=float, metavar="S", help="as many requests as come in S seconds at each rate, instead"
    )
    load.add_argument("--input", type=int, default=128, metavar="TOKENS", help="median prompt length (default 128)")
    load.add_argument("--output", type=int, default=48, metavar="TOKENS", help="median output length (default 48)")
    load.add_argument("--cv", type=float, default=0.5, help="spread of both lengths (default 0.5)")
    load.add_argument("--seed", type=int, default=1, help="of the load (default 1)")
    load.add_argument(
        "--repeats", type=int, default=1, metavar="N", help="play everything N times, in turn; bounds are of the median"
    )
    parser.add_argument(
        "--again", metavar="FILE", help="simulate anew what a --json file says was measured; starts no server"
    )
    parser.add_argument(
        "--as-calibrated",
        action="store_true",
        help="do not let what is simulated as calibrated follow the drift that is watched",
    )
    parser.add_argument("--json", metavar="FILE", help="write the result; - for stdout")
    parser.add_argument("--html", metavar="FILE", help="write both sides of each comparison as one page to look at")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code: 0 if every bound holds in both simulations, 1 if one does not; errors are raised."""
    from transload.study.calibrate.server import end_in_order_when_told
    from transload.study.report import write_page
    from transload.study.validate.run import Load, validate

    if args.json not in (None, "-") and not Path(args.json).absolute().parent.is_dir():
        raise DeploymentError(f"--json {args.json}: its folder does not exist; make it first")
    if args.again is not None:
        return _again(args)
    if args.repeats < 1:
        raise DeploymentError(f"--repeats {args.repeats}: want 1 or more")
    if args.seconds is not None and (args.seconds <= 0 or args.trace is not None):
        raise DeploymentError(f"--seconds {args.seconds:g}: want more than 0, and no --trace, which has its own length")
    workload = None
    if args.trace is not None:
        from transload.study.traces import Window, find_trace, open_trace

        window = Window(max_requests=args.requests, speedup=args.speedup, shrink=args.shrink)
        workload = open_trace(find_trace(args.trace), "auto", window)
    load = Load(
        shares=tuple(args.load or (() if args.rate else (0.3, 0.85))),
        rates=tuple(args.rate or ()),
        workload=workload,
        num_requests=args.requests,
        load_seconds=args.seconds,
        num_input=args.input,
        num_output=args.output,
        cv=args.cv,
        seed=args.seed,
        repeats=args.repeats,
        follows_drift=not args.as_calibrated,
    )
    cases = [(case, _deployment(case, args.model)) for case in args.cases]
    end_in_order_when_told()
    done, results = validate(cases, str(Path(args.chip).absolute()), load, _say, command=without_secrets(sys.argv))
    if args.html is not None:
        write_page(results, args.html, title="Real against virtual")
    return _shown(done, args.json)


def _again(args: argparse.Namespace) -> int:
    """The measured half from a file."""
    from transload.study.validate.saved import simulate_again

    if args.html is not None:
        raise DeploymentError("--html: with --again only figures of the measured half are known; leave one of them out")
    command = without_secrets(sys.argv)
    chip, follows = str(Path(args.chip).absolute()), not args.as_calibrated
    return _shown(simulate_again(args.again, chip, _say, command=command, follows_drift=follows), args.json)


def _shown(done: Validation, json_path: str | None) -> int:
    """Tables and file; 0 if every bound holds in both simulations."""
    from rich.console import Console

    from transload.study.validate.compare import errors_of
    from transload.study.validate.saved import write_validation
    from transload.study.validate.show import show_comparison, show_errors, show_legend

    console = Console(stderr=json_path == "-", highlight=False)
    for comparison in done.comparisons:
        show_comparison(comparison, console)
        console.print()
    found = errors_of(done.comparisons)
    if len(found) < len(done.comparisons):
        show_errors(done.comparisons, console)
    show_legend(console)
    if json_path is not None:
        write_validation(done, json_path)
    return 0 if all(each.holds and each.holds_as_calibrated for errors in found.values() for each in errors) else 1


def _deployment(case: str, model: str | None) -> Deployment:
    """A file by its path, or a shorthand."""
    from transload.deploy.overrides import flag_override
    from transload.deploy.resolve import resolve

    overrides = [] if model is None else [flag_override("model.path", model, f"--model {model}")]
    if re.search(r"[./]", case):
        return resolve(Path(case), None, overrides)
    return resolve(None, case, overrides)


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
