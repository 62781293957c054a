"""`transload calibrate`: the flags. The measuring is `study/calibrate`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from transload.cli.bench import without_secrets
from transload.cli.deployment_flags import add_deployment_flags, resolve_flags
from transload.errors import DeploymentError

_EXAMPLES = """\
examples:
  transload calibrate -o machine.yaml                   this machine, with the default model and one worker of each kind
  transload calibrate deployments/2p1d.yaml -o machine.yaml
  transload calibrate --url http://host:8000 -o there.yaml     whatever answers there, from outside
Then: `chip: machine.yaml` in a pool of a deployment to simulate, or
  transload validate --chip machine.yaml --rate 0.5
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand and its flags."""
    parser = subparsers.add_parser(
        "calibrate",
        help="measure this machine, for simulating it",
        description=(
            "Measure steps, transfers, messages and the front end of this machine and write them as a chip file. "
            "Takes a few minutes, in which the machine should do nothing else."
        ),
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_deployment_flags(parser)
    group = parser.add_argument_group("calibration")
    group.add_argument("-o", "--output", metavar="CHIP.yaml", default="machine.yaml", help="default machine.yaml")
    group.add_argument("--url", help="measure the OpenAI-compatible server there instead, from outside")
    group.add_argument("--api-key", help="sent to it as a bearer token; never written down")
    group.add_argument("--quick", action="store_true", help="few points: to see that it works, not to believe it")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code: 0; errors are raised."""
    if not Path(args.output).absolute().parent.is_dir():
        raise DeploymentError(f"-o {args.output}: its folder does not exist; make it first")
    from transload.study.calibrate.chip_file import write_chip_file
    from transload.study.calibrate.effort import Effort
    from transload.study.calibrate.machine import calibrate_machine
    from transload.study.calibrate.server import end_in_order_when_told

    effort = Effort(quick=args.quick)
    command = " ".join(["transload", *without_secrets(sys.argv)[1:]])
    is_gpu = False
    end_in_order_when_told()
    if args.url is not None:
        from transload.study.calibrate.endpoint import calibrate_endpoint

        measured = calibrate_endpoint(args.url, effort, _say, command=command, api_key=args.api_key)
    else:
        deployment = resolve_flags(args)
        is_gpu = any(pool.device.startswith("cuda") for pool in deployment.pools)
        measured = calibrate_machine(deployment, effort, _say, command=command)
    write_chip_file(measured, args.output, is_gpu=is_gpu)
    _say(f"wrote {args.output}")
    return 0


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
