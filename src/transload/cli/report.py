"""`transload report`: the flags. Pages and tables are `study/report`, traces `study/trace_events.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

from transload.errors import DeploymentError

_EXAMPLES = """\
examples:
  transload report a.json b.json -o page.html             results side by side, in one page that needs no network
  transload report bench.json --event-log logs -o page.html     with what the server's event logs say
  transload report --event-log logs --perfetto trace.json       a trace for https://ui.perfetto.dev
  transload report a.json --csv tables                    requests and series as CSV
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand and its flags."""
    parser = subparsers.add_parser(
        "report",
        help="results as one HTML page, CSV or a trace",
        description="Show results of `transload simulate --json` and `transload bench --json`, alone or side by side.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="*", metavar="RESULT.json", help="what to show")
    parser.add_argument("-o", "--html", metavar="FILE", help="write the page here")
    parser.add_argument("--title", default="Transload report", help="of the page, for several results")
    parser.add_argument("--csv", metavar="FOLDER", help="write CSV files here")
    parser.add_argument("--perfetto", metavar="FILE", help="write a trace for ui.perfetto.dev or chrome://tracing here")
    parser.add_argument(
        "--event-log", metavar="FOLDER", type=Path, help="what `transload serve --event-log` wrote during the run"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code: 0; errors are raised."""
    _check(args)
    from transload.study.report import result_labels, show, sources, tables, write_page
    from transload.study.timeline import read_timeline
    from transload.study.trace_events import write_trace

    timeline = None if args.event_log is None else read_timeline(args.event_log)
    results = [sources.read_result(path, timeline) for path in args.results]
    if args.html is not None:
        write_page(results, args.html, title=args.title)
        show.wrote(args.html)
    if args.csv is not None:
        for path in tables.write_csv(results, result_labels(results), args.csv):
            show.wrote(path)
    if args.perfetto is not None:
        shown = timeline or sources.timeline_of(results[0])
        name = str(args.event_log or results[0].name)
        write_trace(shown, args.perfetto, simulated=timeline is None and results[0].simulated, name=name)
        show.wrote(args.perfetto)
    if args.html is None and args.csv is None and args.perfetto is None:
        show.show_results(results, result_labels(results))
    return 0


def _check(args: argparse.Namespace) -> None:
    if not args.results and args.event_log is None:
        raise DeploymentError("nothing to show: name a RESULT.json, or a folder with --event-log")
    if not args.results and (args.html is not None or args.csv is not None or args.perfetto is None):
        raise DeploymentError("--event-log alone gives a trace (--perfetto FILE); a page wants a RESULT.json too")
    if len(args.results) > 1 and (args.event_log is not None or args.perfetto is not None):
        raise DeploymentError("--event-log and --perfetto are about one run: name one RESULT.json with them")
