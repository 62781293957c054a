"""`transload simulate`: the flags. The simulation is `study/simulate.py`, many of them are `study/sweep.py`."""

from __future__ import annotations

import argparse
import sys
from copy import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from transload.cli.workload_flags import add_trace, add_workload, duration, share, workload
from transload.errors import DeploymentError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from transload.deploy.spec import Deployment
    from transload.study.result import Result
    from transload.study.sweep import Planned
    from transload.study.timeline import TimelineRecorder

LOADS: dict[str, Callable[[str], float]] = {
    "rate": float,
    "speedup": float,
    "concurrency": int,
    "requests": int,
    "input": int,
    "output": int,
    "turns": int,
    "seed": int,
}
"""Flags of the load that can be swept; anything else is a path in the deployment."""
EXIT_ALL_FAILED = 1
EXIT_INTERRUPTED = 130
_EXAMPLES = """\
examples:
  transload simulate deployments/b200-pd.yaml --trace conversation
  transload simulate FILE --rate 20 --requests 5000 --input 2000 --output 300 --set pools.decode.workers=8
  transload simulate FILE --trace conversation --fault "kill decode-0 at 30s" --json result.json
  transload simulate FILE --rates 1:20:1 --requests 2000 --processes 4       goodput against rate
  transload simulate FILE --trace code --sweep pools.decode.workers=1,2,4
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand and its flags."""
    parser = subparsers.add_parser(
        "simulate",
        help="what a deployment over chips of the catalog would give",
        description=(
            "Play a workload on a deployment in virtual time: the same control plane that serves, over chips that "
            "need not be here. Prints latencies, goodput, utilisation, cost and what limits it."
        ),
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a deployment file whose pools name chips")
    add_workload(parser.add_argument_group("load"))
    add_trace(parser.add_argument_group("load from a trace file"))
    _add_deployment(parser.add_argument_group("deployment"))
    _add_sweep(parser.add_argument_group("many at once"))
    _add_result(parser.add_argument_group("result"))
    parser.set_defaults(run=run)


def _add_deployment(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        dest="changes",
        help="change anything in the deployment, such as pools.decode.workers=2; can be repeated",
    )
    group.add_argument(
        "--assume",
        action="append",
        default=[],
        metavar="ID.QUANTITY=VALUE",
        help='a number that the catalog does not know, such as "efa_trn3.latency=20 us"; can be repeated',
    )
    group.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="WORDS",
        dest="faults",
        help='"kill decode-0 at 30s", "pause decode-0 at 30s for 2s", "link prefill:decode at 10%% from 10s to 20s" '
        "(FFN workers: kill only); can be repeated",
    )
    group.add_argument("--ttft", type=duration, help="target for the time to first token, instead of the file's")
    group.add_argument("--tpot", type=duration, help="target for the time per output token, instead of the file's")
    group.add_argument("--attainment", type=share, help="share that must meet them, instead of the file's")


def _add_sweep(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--rates", metavar="LOW:HIGH:STEP", help="one simulation for each rate")
    group.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="PATH=A,B,...",
        help="one simulation for each value: rate, speedup, concurrency or anything --set can change",
    )
    group.add_argument("--processes", type=int, default=1, metavar="N", help="simulate so many at once (default 1)")


def _add_result(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--json", metavar="FILE", help="write the result; - for stdout")
    group.add_argument("--html", metavar="FILE", help="write the result as one page to look at")
    group.add_argument("--csv", metavar="FOLDER", help="write summary, series and requests as CSV files")
    group.add_argument("--records", action="store_true", help="with every request and its tokens' times in the JSON")
    group.add_argument("--perfetto", metavar="FILE", help="write a trace for ui.perfetto.dev")


def run(args: argparse.Namespace) -> int:
    """Exit code: 0; 1 if every request failed; 2 for what cannot be simulated; 130 after Ctrl-C."""
    from rich.console import Console

    from transload.study.bench import check_output_path

    check_output_path("--json", args.json)
    console = Console(stderr=args.json == "-", highlight=False, width=None if sys.stdout.isatty() else 130)
    if args.rates is not None or args.sweep:
        return _run_sweep(args, console)
    from transload.study.simulate import simulate
    from transload.study.simulated_table import progress_bar, show_simulated

    load = workload(args)
    timeline = None
    if args.perfetto is not None:
        from transload.study.timeline import TimelineRecorder

        timeline = TimelineRecorder()
    with progress_bar(load) as progress:
        result = simulate(
            deployment_of(args),
            load,
            name=str(args.file),
            assume=args.assume,
            faults=args.faults,
            with_records=args.records,
            timeline=timeline,
            progress=progress,
        )
    show_simulated(result, console)
    _write(args, [result])
    if timeline is not None:
        _write_trace(timeline, args)
    if result.was_interrupted:
        return EXIT_INTERRUPTED
    return EXIT_ALL_FAILED if result.summary.num_successful == 0 else 0


def deployment_of(args: argparse.Namespace, more: tuple[str, ...] = ()) -> Deployment:
    """The file with the flags in place. Raises `DeploymentError`."""
    import msgspec

    from transload.deploy.overrides import parse_override
    from transload.deploy.resolve import resolve

    deployment = resolve(args.file, None, [parse_override(change) for change in (*args.changes, *more)])
    targets = {
        name: value
        for name, value in (("ttft_seconds", args.ttft), ("tpot_seconds", args.tpot), ("attainment", args.attainment))
        if value is not None
    }
    return msgspec.structs.replace(deployment, targets=msgspec.structs.replace(deployment.targets, **targets))


def _run_sweep(args: argparse.Namespace, console: Console) -> int:
    from transload.study.json_file import write_out
    from transload.study.sweep import combinations, encode_sweep, parse_rates, parse_variation, run_sweep, show_sweep

    if args.processes < 1:
        raise DeploymentError(f"--processes {args.processes}: want 1 or more")
    if args.perfetto is not None:
        raise DeploymentError("--perfetto is of one simulation; leave --rates and --sweep out")
    variations = [parse_variation(text) for text in args.sweep]
    if args.rates is not None:
        variations.insert(0, parse_rates(args.rates))
    points = run_sweep([_planned(args, values) for values in combinations(variations)], args.processes)
    show_sweep(points, console)
    if args.json is not None:
        write_out("--json", args.json, encode_sweep(points))
    _write(args, [point.result for point in points], json=False)
    return EXIT_ALL_FAILED if not any(point.result.summary.num_successful for point in points) else 0


def _planned(args: argparse.Namespace, values: dict[str, str]) -> Planned:
    """The command line with these values in it: flags of the load, and changes of the deployment."""
    from transload.study.sweep import Planned

    changed = copy(args)
    paths: list[str] = []
    for path, value in values.items():
        if path not in LOADS:
            paths.append(f"{path}={value}")
            continue
        try:
            setattr(changed, path, LOADS[path](value))
        except ValueError:
            raise DeploymentError(f"--sweep {path}={value}: wanted a number") from None
    workload(changed)  # refused here rather than in the middle
    return Planned(
        values=values,
        name=str(args.file),
        deployment=deployment_of(changed, tuple(paths)),
        workload=partial(workload, changed),
        assume=tuple(args.assume),
        faults=tuple(args.faults),
        with_records=args.records,
    )


def _write(args: argparse.Namespace, results: list[Result], *, json: bool = True) -> None:
    from transload.study.json_file import write_out
    from transload.study.report import result_labels, show, tables, write_page
    from transload.study.result import encode_result

    if json and args.json is not None:
        write_out("--json", args.json, encode_result(results[0]))
    if args.html is not None:
        write_page(results, args.html, title=str(args.file))
        show.wrote(args.html)
    if args.csv is not None:
        for path in tables.write_csv(results, result_labels(results), args.csv):
            show.wrote(path)


def _write_trace(timeline: TimelineRecorder, args: argparse.Namespace) -> None:
    from transload.study.report import show
    from transload.study.trace_events import write_trace

    write_trace(timeline.timeline(), args.perfetto, simulated=True, name=str(args.file))
    show.wrote(args.perfetto)
