"""`transload split`: the flags, and the one call that they make."""

from __future__ import annotations

import argparse
import sys

PATIENCE_SECONDS = 900.0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand and its flags."""
    parser = subparsers.add_parser(
        "split",
        help="move the feed-forwards of a running server to workers of their own, or back",
        description=(
            "Change the split of a running server: 1p1a1f computes the feed-forwards of a 1p1d server in another "
            "process, 1p1d takes them back. Requests go on meanwhile, and lose nothing."
        ),
    )
    parser.add_argument("url", help="the server, such as http://127.0.0.1:8000")
    parser.add_argument("topology", help="as for serve; the workers that hold requests must be those that run")
    parser.add_argument("--api-key", help="sent as a bearer token")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code: 0; 1 if the server could not do it. Refusals are raised."""
    import httpx

    from transload.errors import TransloadError
    from transload.units import format_bytes

    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    url = f"{args.url.rstrip('/')}/admin/split"
    try:
        answer = httpx.post(url, json={"topology": args.topology}, headers=headers, timeout=PATIENCE_SECONDS)
        told = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL) as problem:
        raise TransloadError(f"no server answers at {args.url}: {problem}") from None
    except ValueError:
        raise TransloadError(f"{args.url} is no Transload server: /admin/split answered {answer.status_code}") from None
    if answer.status_code != 200:
        message = str(told.get("error", {}).get("message", told)) if isinstance(told, dict) else str(told)
        if answer.status_code < 500:
            raise TransloadError(message)
        sys.stderr.write(f"{message}\n")
        return 1
    sys.stdout.write(f"{told['topology']} after {told['seconds']:.1f} s\n")
    for name, num_bytes in told["memory_bytes"].items():
        sys.stdout.write(f"  {name} holds {format_bytes(num_bytes)}\n")
    return 0
