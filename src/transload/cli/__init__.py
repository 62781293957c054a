"""The `transload` command: one file a subcommand, each with `add_parser(subparsers)` and `run(args) -> int`.

Exit codes: 0 done, 1 the work failed, 2 what was asked for cannot be done as asked, 130 Ctrl-C. Nothing heavy is
imported before it is known what to do: `transload --help` must be instant.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from transload import __version__
from transload.cli import (
    afd,
    bench,
    calibrate,
    chat,
    chips,
    claims,
    compare,
    doctor,
    explain,
    links,
    models,
    report,
    serve,
    simulate,
    split,
    validate,
    worker,
)
from transload.errors import TransloadError

COMMANDS = (
    serve,
    chat,
    split,
    bench,
    simulate,
    explain,
    doctor,
    worker,
    chips,
    models,
    links,
    report,
    calibrate,
    validate,
    afd,
    claims,
    compare,
)
EXAMPLES = """\
examples:
  transload serve                                one prefill and one decode worker on this machine
  transload serve deployments/2p1d.yaml          what the file says
  transload serve --topology 1agg --port 9000    shorthand
  transload chat                                 talk to it
  transload explain deployments/2p1d.yaml        what would run where, and whether it fits
  transload simulate FILE --trace conversation   a deployment over chips of the catalog, in virtual time
  transload report bench.json -o page.html       a result as a page to look at
  transload doctor                               what this machine can do
  transload chips b200                           what is known of a chip, and where it is from
  transload models deepseek-v3 --batch 64        parameters, bytes and FLOPs of a model
"""


class _Parser(argparse.ArgumentParser):
    """Complains in one form, and about unknown subcommands and flags with the one that was meant."""

    def refuse_unknown(self, words: Sequence[str], command: str) -> NoReturn:
        """Exit with what was not understood on the command line of a subcommand."""
        (subparsers,) = (action for action in self._actions if isinstance(action, argparse._SubParsersAction))
        chosen: argparse.ArgumentParser = subparsers.choices[command]
        flags = [word.partition("=")[0] for word in words if word.startswith("-")]
        known = [name for action in chosen._actions for name in action.option_strings]
        close = difflib.get_close_matches(flags[0], known, n=1) if flags else []
        chosen.error(f"unrecognized arguments: {' '.join(words)}" + (f"; did you mean {close[0]}?" if close else ""))

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if unknown is not None:
            close = difflib.get_close_matches(unknown[1], re.findall(r"[a-z_0-9-]+", unknown[2]), n=1)
            message += f"; did you mean {close[0]}?" if close else ""
        self.exit(2, f"{self.prog}: error: {message}\nTry: {self.prog} --help\n")


def build_parser() -> _Parser:
    """All subcommands and flags."""
    parser = _Parser(
        prog="transload",
        description="Disaggregated LLM inference: prefill here, decode there.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"transload {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="command")
    for command in COMMANDS:
        command.add_parser(subparsers)
    for each in (parser, *subparsers.choices.values()):
        each.allow_abbrev = False  # a flag that is added later must not change what an old command line means
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code. Errors meant for people go to stderr without a traceback."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.refuse_unknown(unknown, args.command)
    try:
        code = int(args.run(args))
        sys.stdout.flush()
    except TransloadError as error:
        sys.stderr.write(f"transload {args.command}: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has left, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains once more when it exits
        return 1
    return code
