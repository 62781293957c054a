"""The flags that describe a workload, for every command that plays one, and the workload they make together."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from transload.errors import DeploymentError
from transload.units import parse_seconds

if TYPE_CHECKING:
    from transload.study.workload import Arrivals, Lengths, Workload

DEFAULT_REQUESTS = 100


def add_workload(group: argparse._ArgumentGroup) -> None:
    """Add the flags of a made-up workload."""
    group.add_argument("--rate", type=number, help="requests a second; of sessions with --turns (default 2)")
    group.add_argument("--requests", type=int, metavar="N", help=f"how many (default {DEFAULT_REQUESTS})")
    group.add_argument("--duration", type=duration, help="start none after this, such as 60 or 2min")
    group.add_argument("--input", type=int, metavar="TOKENS", help="prompt length (default 256)")
    group.add_argument("--output", type=int, metavar="TOKENS", help="output length (default 64)")
    group.add_argument("--input-cv", type=number, metavar="CV", help="spread the prompt lengths (lognormal)")
    group.add_argument("--output-cv", type=number, metavar="CV", help="spread the output lengths (lognormal)")
    group.add_argument("--arrivals", choices=("poisson", "constant", "gamma", "ramp"), help="default poisson")
    group.add_argument("--cv", type=number, help="burstiness of gamma arrivals (1: poisson; default 3)")
    group.add_argument("--ramp-to", type=number, metavar="RATE", help="rate at the end of a ramp")
    group.add_argument("--concurrency", type=int, metavar="N", help="closed loop: always N at once, instead of a rate")
    group.add_argument("--turns", type=int, metavar="N", help="conversations of N turns that share their prefix")
    group.add_argument("--think", type=duration, metavar="SECONDS", help="mean pause between turns (default 1)")
    group.add_argument("--shared-prefix", type=int, metavar="TOKENS", help="tokens all conversations begin with")
    group.add_argument("--seed", type=int, default=0, help="same seed, same load (default 0)")


def add_trace(group: argparse._ArgumentGroup) -> None:
    """Add the flags of a recorded one."""
    group.add_argument(
        "--trace", metavar="FILE", help="play recorded arrivals and lengths: a file, or conversation or code"
    )
    group.add_argument(
        "--trace-format",
        choices=("auto", "azure", "burstgpt", "mooncake", "bailian"),
        help="default auto: by the file's first line",
    )
    group.add_argument("--speedup", type=number, metavar="X", help="play X times as fast (default 1)")
    group.add_argument("--shrink", type=int, metavar="N", help="divide all lengths by N (default 1)")
    group.add_argument("--start", type=duration, help="begin so long after the trace's first request")
    group.add_argument("--end", type=duration, help="end so long after the trace's first request")


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

    from transload.study.traces import Window, find_trace, open_trace

    own = ("rate", "input", "output", "input_cv", "output_cv", "arrivals", "cv", "ramp_to", "concurrency")
    _refuse(args, "with --trace, which brings its own arrivals and lengths", *own, "turns", "think", "shared_prefix")
    window = Window(
        start_seconds=0.0 if args.start is None else args.start,
        end_seconds=args.end,
        max_requests=args.requests,
        speedup=1.0 if args.speedup is None else args.speedup,
        shrink=1 if args.shrink is None else args.shrink,
    )
    trace = open_trace(find_trace(args.trace), args.trace_format or "auto", window)
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


# ---------------------------------------------------------------------------------------------------------------------
# Values of flags. What they raise is shown by argparse, with the flag's name.


def number(text: str) -> float:
    """0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"got {text!r}; want a number, 0 or more")
    return value


def duration(text: str) -> float:
    """Seconds: `500ms`, `0.5`, `2 s`, `1min`."""
    try:
        return parse_seconds(text)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(f"{text!r} {problem}") from None


def share(text: str) -> float:
    """`0.95` or `95%`."""
    percent = text.endswith("%")
    value = number(text.rstrip("%")) / (100 if percent else 1)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; want a share above 0 and up to 1, such as 0.95 or 95%")
    return value
