"""`transload chat`: the flags. The talking is `study/chat.py`."""

from __future__ import annotations

import argparse

DEFAULT_URL = "http://127.0.0.1:8000"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand and its flags."""
    parser = subparsers.add_parser(
        "chat",
        help="talk to a running server",
        description="Chat in the terminal. With stdin from a pipe, each line is a turn.",
    )
    parser.add_argument("url", nargs="?", default=DEFAULT_URL, help=f"the server (default {DEFAULT_URL})")
    parser.add_argument("--ask", metavar="TEXT", help="one question, then leave")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--model", help="name in the API (default: the first the server tells of)")
    parser.add_argument("--api-key", help="sent as a bearer token")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer")
    parser.add_argument("--temperature", type=float, metavar="T", help="0: always the likeliest token")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code: 0; 1 if a question failed; 130 after Ctrl-C."""
    from transload.study import chat

    return chat.run(
        args.url,
        model=args.model,
        api_key=args.api_key,
        ask=args.ask,
        system=args.system,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
    )
