"""`transload bench`: the flags. The measuring is `study/bench.py`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from transload.cli.workload_flags import add_trace, add_workload, duration, number, share, workload
from transload.errors import DeploymentError

DEFAULT_URL = "http://127.0.0.1:8000"
_EXAMPLES = """\
examples:
  transload bench                                              100 requests, 2 a second, at the local server
  transload bench URL --rate 4 --ttft 500ms --tpot 50ms        goodput under latency targets
  transload bench URL --arrivals gamma --cv 3 --duration 60    bursts, for a minute
  transload bench URL --concurrency 8 --requests 200           closed loop
  transload bench URL --trace traces/azure2023_conv.csv.gz --speedup 0.5 --duration 120
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand and its flags."""
    parser = subparsers.add_parser(
        "bench",
        help="measure a running server under load",
        description="Open-loop (or closed-loop) load against any OpenAI-compatible server; latencies, goodput, errors.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url", nargs="?", default=DEFAULT_URL, help=f"the server (default {DEFAULT_URL})")
    add_workload(parser.add_argument_group("load"))
    add_trace(parser.add_argument_group("load from a trace file"))
    _add_server(parser.add_argument_group("server"))
    _add_result(parser.add_argument_group("targets and result"))
    parser.set_defaults(run=run)


def _add_server(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", help="name in the API (default: the first the server tells of)")
    group.add_argument("--api-key", help="sent as a bearer token; never written down")
    group.add_argument("--endpoint", choices=("completions", "chat"), default="completions", help="default completions")
    group.add_argument("--prompt", choices=("auto", "ids", "text"), default="auto", help="prompts as token ids or text")
    group.add_argument("--ids", type=_id_range, metavar="LOW:HIGH", help="token ids to make prompts of")
    group.add_argument("--no-ignore-eos", action="store_true", help="let the model end its answers")
    group.add_argument("--temperature", type=number, default=0.0, help="default 0")
    group.add_argument("--body", type=_json_object, metavar="JSON", help="more fields for each request's body")
    group.add_argument("--warmup", type=int, default=0, metavar="N", help="requests before, not measured (default 0)")
    group.add_argument("--timeout", type=duration, default=600.0, help="deadline of each request (default 600)")


def _add_result(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--ttft", type=duration, help="target for the time to first token, such as 500ms")
    group.add_argument("--tpot", type=duration, help="target for the time per output token, such as 50ms")
    group.add_argument("--attainment", type=share, default=0.95, help="share that must meet them (default 0.95)")
    group.add_argument("--json", metavar="FILE", help="write the result; - for stdout")
    group.add_argument("--html", metavar="FILE", help="write the result as one page to look at")
    group.add_argument("--csv", metavar="FOLDER", help="write requests and series as CSV files")
    group.add_argument(
        "--event-log", metavar="FOLDER", type=Path, help="of the server, on this host: pools and links on the page"
    )
    group.add_argument("--records", action="store_true", help="with the times of every token in the JSON")


def run(args: argparse.Namespace) -> int:
    """Exit code: 0; 1 if every request failed; 2 for flags that do not fit; 130 after Ctrl-C."""
    from transload.deploy.spec import Targets
    from transload.study.bench import Bench, run_bench

    if args.timeout <= 0:
        raise DeploymentError("--timeout 0: a request needs some time; give a number of seconds above 0")
    return run_bench(
        Bench(
            url=args.url,
            workload=workload(args),
            targets=Targets(ttft_seconds=args.ttft, tpot_seconds=args.tpot, attainment=args.attainment),
            model=args.model,
            api_key=args.api_key,
            endpoint=args.endpoint,
            prompt_kind=args.prompt,
            id_range=args.ids,
            ignore_eos=not args.no_ignore_eos,
            temperature=args.temperature,
            more_fields=args.body,
            timeout_seconds=args.timeout,
            num_warmup=args.warmup,
            json_path=args.json,
            with_records=args.records,
            html_path=args.html,
            csv_path=args.csv,
            event_log=args.event_log,
            command=without_secrets(sys.argv),
        )
    )


def without_secrets(command: list[str]) -> tuple[str, ...]:
    """The command as typed, for the record, without the key."""
    shown: list[str] = []
    for word in command:
        name, equals, _ = word.partition("=")
        if name.startswith("--api") and equals:
            word = f"{name}=***"
        elif shown and shown[-1].startswith("--api") and "=" not in shown[-1]:
            word = "***"
        shown.append(word)
    return tuple(shown)


# ---------------------------------------------------------------------------------------------------------------------
# Values of flags. What they raise is shown by argparse, with the flag's name.


def _id_range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    if not (low.isdecimal() and high.isdecimal() and int(low) < int(high)):
        raise argparse.ArgumentTypeError(f"got {text!r}; want two token ids such as 1000:20000")
    return int(low), int(high)


def _json_object(text: str) -> dict[str, Any]:
    import json

    try:
        fields = json.loads(text)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(f"not JSON: {problem}") from None
    if not isinstance(fields, dict):
        raise argparse.ArgumentTypeError("want a JSON object, such as '{\"top_p\": 0.9}'")
    return fields
