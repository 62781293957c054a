"""`transload afd`: searches how to split a model between attention chips and FFN chips, and says whether it pays."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transload.hardware.afd.search import Question

EXAMPLES = """\
examples:
  transload afd qwen3-235b --attention gb200 --link nvlink5 --latency 5us --context 16384 --weights fp8
  transload afd deepseek-v3 --attention h200 --link eth400 --latency 10us --context 8192 --tpot 50ms
  transload afd qwen3-235b --attention r200 --ffn lp30 --link lpx_nvl_bridge --weights fp8 \\
      --bandwidth "400 GB/s" --latency 2us
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand and its flags."""
    parser = subparsers.add_parser(
        "afd",
        help="search how to split a model into attention and FFN workers, and whether that pays",
        description="Search the ratio of attention to FFN workers, the micro-batches and the batch for the most tokens "
        "a second and chip within a time per token, against the best unsplit deployment on the same chips. Simulated.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="id, alias, a config.json, a folder with one, or a card")
    parser.add_argument("--attention", required=True, metavar="CHIP", help="chip of the attention side, by id or file")
    parser.add_argument("--ffn", metavar="CHIP", help="chip of the FFN side (default: the same)")
    parser.add_argument("--link", required=True, metavar="KIND", help="kind of link between the two sides, id or file")
    parser.add_argument("--bandwidth", metavar="RATE", help="of one chip's port, one way, instead of the link's own")
    parser.add_argument("--latency", metavar="TIME", help="one way, instead of the link's own, such as 5us")
    parser.add_argument("--context", type=int, default=8192, help="tokens of context of a request (default 8192)")
    parser.add_argument("--tpot", default="50ms", metavar="TIME", help="most time per output token (default 50ms)")
    parser.add_argument("--weights", metavar="FORMAT", help="number format of the weights (default: as stored)")
    parser.add_argument("--kv", metavar="FORMAT", help="number format of the KV cache (default: as stored)")
    parser.add_argument("--micro-batches", metavar="LIST", default="1,2,3,4", help="which to try (default 1,2,3,4)")
    parser.add_argument("--best-by", choices=("chip", "usd", "watt"), default="chip", help="tokens per what")
    parser.add_argument("--engine", default="generic", help="whose overhead to count (default generic)")
    parser.add_argument("--top", type=int, default=8, help="ratios to print (default 8)")
    parser.add_argument(
        "--assume",
        action="append",
        default=[],
        metavar="ID.QUANTITY=VALUE",
        help="a number of your own for a chip or the link; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON, numbers in base units")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code: 0; 1 if no split keeps the target."""
    from transload.hardware.afd.search import search

    question = _question(args)
    answer = search(question)
    if args.json:
        import msgspec

        from transload.hardware.afd.show import as_json

        sys.stdout.write(msgspec.json.format(as_json(question, answer), indent=2).decode() + "\n")
    else:
        from rich.console import Console

        from transload.hardware.afd.show import show_answer

        show_answer(question, answer, args.top, Console(width=None if sys.stdout.isatty() else 150))
    return 0 if answer.candidates else 1


def _question(args: argparse.Namespace) -> Question:
    from transload.errors import DeploymentError
    from transload.hardware.afd.search import Question
    from transload.hardware.afd.stages import wire_of
    from transload.hardware.catalog import load_chip, load_link, load_model
    from transload.hardware.chip import Chip
    from transload.hardware.link import LinkKind
    from transload.hardware.precision import parse_dtype, with_kv, with_weights
    from transload.hardware.quantity import Assumption
    from transload.hardware.slots import Described, with_assumptions
    from transload.units import parse_rate, parse_seconds

    card = load_model(args.model)
    things: list[Described] = [load_chip(args.attention), load_link(args.link), load_chip(args.ffn or args.attention)]
    attention, link, ffn = with_assumptions(things, args.assume)
    assert isinstance(attention, Chip)
    assert isinstance(ffn, Chip)
    assert isinstance(link, LinkKind)
    precision = card.precision
    if args.weights:
        precision = with_weights(precision, parse_dtype(args.weights))
    if args.kv:
        precision = with_kv(precision, parse_dtype(args.kv))
    if not 1 <= args.context <= 2**31:
        raise DeploymentError(f"--context {args.context}: wanted a whole number from 1 to {2**31}")
    if args.top < 1:
        raise DeploymentError(f"--top {args.top}: wanted at least 1")
    numbers = {}
    for flag, parse, text in (
        ("--bandwidth", parse_rate, args.bandwidth),
        ("--latency", parse_seconds, args.latency),
        ("--tpot", parse_seconds, args.tpot),
    ):
        try:
            numbers[flag] = None if text is None else parse(text)
        except ValueError as error:
            raise DeploymentError(f"{flag} {text}: {error}") from None
    tpot = numbers["--tpot"]
    if not tpot or numbers["--bandwidth"] == 0:
        raise DeploymentError("--tpot and --bandwidth: wanted more than 0")
    own = [
        Assumption(subject=link.id, quantity=quantity, value=value, unit=unit)
        for quantity, unit in (("bandwidth", "B/s"), ("latency", "s"))
        if (value := numbers[f"--{quantity}"]) is not None
    ]
    link = link.assuming(own)
    return Question(
        card=card,
        attention_chip=attention,
        ffn_chip=ffn,
        wire=wire_of(link),
        link=link,
        context_tokens=args.context,
        tpot_seconds=tpot,
        precision=precision,
        engine=args.engine,
        micro_batches=_micro_batches(args.micro_batches),
        objective=args.best_by,
    )


def _micro_batches(text: str) -> tuple[int, ...]:
    from transload.errors import DeploymentError

    words = [word.strip() for word in text.split(",")]
    if not all(word in ("1", "2", "3", "4") for word in words):
        raise DeploymentError(f"--micro-batches {text}: wanted numbers from 1 to 4, such as 1,2")
    return tuple(sorted({int(word) for word in words}))
