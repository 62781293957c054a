"""`transload bench`: the flags, and what of them makes a workload. The measuring is `study/bench.py`."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transload.errors import DeploymentError
from transload.units import parse_seconds

if TYPE_CHECKING:
    from transload.study.workload import Arrivals, Lengths, Workload

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_REQUESTS = 100
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
    _add_workload(parser.add_argument_group("load"))
    _add_trace(parser.add_argument_group("load from a trace file"))
    _add_server(parser.add_argument_group("server"))
    _add_result(parser.add_argument_group("targets and result"))
    parser.set_defaults(run=run)


def _add_workload(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--rate", type=_number, help="requests a second; of sessions with --turns (default 2)")
    group.add_argument("--requests", type=int, metavar="N", help=f"how many (default {DEFAULT_REQUESTS})")
    group.add_argument("--duration", type=duration, help="start none after this, such as 60 or 2min")
    group.add_argument("--input", type=int, metavar="TOKENS", help="prompt length (default 256)")
    group.add_argument("--output", type=int, metavar="TOKENS", help="output length (default 64)")
    group.add_argument("--input-cv", type=_number, metavar="CV", help="spread the prompt lengths (lognormal)")
    group.add_argument("--output-cv", type=_number, metavar="CV", help="spread the output lengths (lognormal)")
    group.add_argument("--arrivals", choices=("poisson", "constant", "gamma", "ramp"), help="default poisson")
    group.add_argument("--cv", type=_number, help="burstiness of gamma arrivals (1: poisson; default 3)")
    group.add_argument("--ramp-to", type=_number, metavar="RATE", help="rate at the end of a ramp")
    group.add_argument("--concurrency", type=int, metavar="N", help="closed loop: always N at once, instead of a rate")
    group.add_argument("--turns", type=int, metavar="N", help="conversations of N turns that share their prefix")
    group.add_argument("--think", type=duration, metavar="SECONDS", help="mean pause between turns (default 1)")
    group.add_argument("--shared-prefix", type=int, metavar="TOKENS", help="tokens all conversations begin with")
    group.add_argument("--seed", type=int, default=0, help="same seed, same load (default 0)")
    group.add_argument("--warmup", type=int, default=0, metavar="N", help="requests before, not measured (default 0)")


def _add_trace(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--trace", metavar="FILE", help="play recorded arrivals and lengths")
    group.add_argument(
        "--trace-format",
        choices=("auto", "azure", "burstgpt", "mooncake", "bailian"),
        help="default auto: by the file's first line",
    )
    group.add_argument("--speedup", type=_number, metavar="X", help="play X times as fast (default 1)")
    group.add_argument("--shrink", type=int, metavar="N", help="divide all lengths by N (default 1)")
    group.add_argument("--start", type=duration, help="begin so long after the trace's first request")
    group.add_argument("--end", type=duration, help="end so long after the trace's first request")


def _add_server(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", help="name in the API (default: the first the server tells of)")
    group.add_argument("--api-key", help="sent as a bearer token; never written down")
    group.add_argument("--endpoint", choices=("completions", "chat"), default="completions", help="default completions")
    group.add_argument("--prompt", choices=("auto", "ids", "text"), default="auto", help="prompts as token ids or text")
    group.add_argument("--ids", type=_id_range, metavar="LOW:HIGH", help="token ids to make prompts of")
    group.add_argument("--no-ignore-eos", action="store_true", help="let the model end its answers")
    group.add_argument("--temperature", type=_number, default=0.0, help="default 0")
    group.add_argument("--body", type=_json_object, metavar="JSON", help="more fields for each request's body")
    group.add_argument("--timeout", type=duration, default=600.0, help="deadline of each request (default 600)")


def _add_result(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--ttft", type=duration, help="target for the time to first token, such as 500ms")
    group.add_argument("--tpot", type=duration, help="target for the time per output token, such as 50ms")
    group.add_argument("--attainment", type=_share, default=0.95, help="share that must meet them (default 0.95)")
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


def workload(args: argparse.Namespace) -> Workload:
    """The workload that the flags describe. Raises `DeploymentError` for flags that do not go together."""
    if args.trace is not None:
        return _from_trace(args)
    _refuse(args, "without --trace", "trace_format", "speedup", "shrink", "start", "end")
    from transload.study.workload import Sessions, Synthetic, synthetic

    sessions = None
    if args.turns is not None:
        think = 1.0 if args.think is None else args.think
        sessions = Sessions(args.turns, think, args.shared_prefix or 0)
    else:
        _refuse(args, "without --turns", "think", "shared_prefix")
    num_requests = args.requests
    if num_requests is None and args.duration is None:
        num_requests = DEFAULT_REQUESTS
    return synthetic(
        Synthetic(
            arrivals=_arrivals(args),
            input=_lengths(256 if args.input is None else args.input, args.input_cv),
            output=_lengths(64 if args.output is None else args.output, args.output_cv),
            sessions=sessions,
            num_requests=num_requests,
            duration_seconds=args.duration,
            seed=args.seed,
        )
    )


def _from_trace(args: argparse.Namespace) -> Workload:
    from dataclasses import replace

    from transload.study.traces import Window, open_trace

    own = ("rate", "input", "output", "input_cv", "output_cv", "arrivals", "cv", "ramp_to", "concurrency")
    _refuse(args, "with --trace, which brings its own arrivals and lengths", *own, "turns", "think", "shared_prefix")
    window = Window(
        start_seconds=0.0 if args.start is None else args.start,
        end_seconds=args.end,
        max_requests=args.requests,
        speedup=1.0 if args.speedup is None else args.speedup,
        shrink=1 if args.shrink is None else args.shrink,
    )
    trace = open_trace(args.trace, args.trace_format or "auto", window)
    return replace(trace, seed=args.seed, duration_seconds=args.duration, num_requests=args.requests)


def _arrivals(args: argparse.Namespace) -> Arrivals:
    from transload.study.workload import ClosedLoop, Constant, Gamma, Poisson, Ramp

    if args.concurrency is not None:
        _refuse(args, "with --concurrency: a closed loop has no rate of its own", "rate", "arrivals", "cv", "ramp_to")
        return ClosedLoop(args.concurrency)
    rate = 2.0 if args.rate is None else args.rate
    if args.arrivals != "gamma":
        _refuse(args, "without --arrivals gamma", "cv")
    if args.arrivals != "ramp":
        _refuse(args, "without --arrivals ramp", "ramp_to")
    match args.arrivals:
        case "constant":
            return Constant(rate)
        case "gamma":
            return Gamma(rate, 3.0 if args.cv is None else args.cv)
        case "ramp":
            if args.ramp_to is None or args.duration is None:
                raise DeploymentError("--arrivals ramp: give the rate at its end, --ramp-to, and its --duration")
            return Ramp(rate, args.ramp_to, args.duration)
        case _:
            return Poisson(rate)


def _lengths(num_tokens: int, cv: float | None) -> Lengths:
    from transload.study.workload import Fixed, LogNormal

    return Fixed(num_tokens) if cv is None else LogNormal(float(num_tokens), cv)


def _refuse(args: argparse.Namespace, why: str, *names: str) -> None:
    for name in names:
        if getattr(args, name) is not None:
            raise DeploymentError(f"--{name.replace('_', '-')} means nothing {why}; leave it out")


def without_secrets(command: list[str]) -> tuple[str, ...]:
    """The command as typed, for the record, without the key."""
    shown: list[str] = []
    for word in command:
        name, equals, _ = word.partition("=")
        # argparse takes abbreviations of a flag: --api-k is --api-key.
        if name.startswith("--api") and equals:
            word = f"{name}=***"
        elif shown and shown[-1].startswith("--api") and "=" not in shown[-1]:
            word = "***"
        shown.append(word)
    return tuple(shown)


# ---------------------------------------------------------------------------------------------------------------------
# Values of flags. What they raise is shown by argparse, with the flag's name.


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise argparse.ArgumentTypeError(f"got {text!r}; want a number, 0 or more")
    return number


def duration(text: str) -> float:
    """Seconds: `500ms`, `0.5`, `2 s`, `1min`."""
    try:
        return parse_seconds(text)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(f"{text!r} {problem}") from None


def _share(text: str) -> float:
    percent = text.endswith("%")
    share = _number(text.rstrip("%")) / (100 if percent else 1)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; want a share above 0 and up to 1, such as 0.95 or 95%")
    return share


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
