"""`transload models`: the models of the catalog, or one of them with what follows from its dimensions."""

from __future__ import annotations

import argparse
import sys


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand and its flags."""
    parser = subparsers.add_parser(
        "models",
        help="list the models that can be modelled, or explain one",
        description="List all models, or show one: parameters, bytes, FLOPs and experts touched, and their sources.",
    )
    parser.add_argument(
        "name", nargs="?", metavar="NAME|FILE", help="id, alias, a config.json, a folder with one, or a card"
    )
    parser.add_argument("--context", type=int, default=4096, help="tokens of context (default 4096)")
    parser.add_argument("--batch", type=int, default=1, help="requests that decode together (default 1)")
    parser.add_argument("--skew", type=float, default=0.0, help="power law of expert popularity (default 0: uniform)")
    parser.add_argument("--weights", metavar="FORMAT", help="number format of the weights (default: as stored)")
    parser.add_argument("--kv", metavar="FORMAT", help="number format of the KV cache (default: as stored)")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code: 0."""
    import msgspec

    from transload.errors import DeploymentError
    from transload.hardware.catalog import load_model, model_names
    from transload.hardware.precision import parse_dtype, with_kv, with_weights
    from transload.hardware.show_models import WorkingPoint, explain_model, models_table, show_model

    for flag, value in (("--context", args.context), ("--batch", args.batch)):
        if not 1 <= value <= 2**31:
            raise DeploymentError(f"{flag} {value}: wanted a whole number from 1 to {2**31}")
    if not 0 <= args.skew <= 10:
        raise DeploymentError(f"--skew {args.skew:g}: wanted a number from 0 to 10")
    point = WorkingPoint(batch=args.batch, context_tokens=args.context, skew=args.skew)
    cards = []
    for name in [args.name] if args.name else model_names():
        card = load_model(name)
        precision = card.precision
        if args.weights:
            precision = with_weights(precision, parse_dtype(args.weights))
        if args.kv:
            precision = with_kv(precision, parse_dtype(args.kv))
        cards.append(msgspec.structs.replace(card, precision=precision))
    if args.json:
        explained = [explain_model(card, point) for card in cards]
        encoded = msgspec.json.encode(explained[0] if args.name else explained)
        sys.stdout.write(msgspec.json.format(encoded, indent=2).decode() + "\n")
        return 0
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 150)
    if args.name:
        show_model(explain_model(cards[0], point), console)
    else:
        console.print(models_table(cards))
    return 0
