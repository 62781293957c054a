"""Seeded schedules of faults until stopped: `make torture`, or `python scripts/torture.py --schedules 100000`.

Each seed is a small cluster in virtual time with its own load, kills, pauses, lost, repeated, late and changed frames,
clock jumps and failed steps; every invariant is checked after every event. A seed that fails is shrunk to a short
story and printed, and replays exactly: `python scripts/torture.py --first SEED --schedules 1`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.pool import Pool
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import msgspec  # noqa: E402 - the tests are found from here only
from rich.progress import Progress, TextColumn, TimeElapsedColumn  # noqa: E402
from tests.schedules import draw, judge, play  # noqa: E402
from tests.shrink import shrink, story  # noqa: E402

from transload.study.provenance import machine_facts, versions  # noqa: E402

BATCH = 50
ROUND = 40


def run_batch(seeds: tuple[int, int]) -> tuple[Counter[str], list[str]]:
    """Play the seeds from the first up to the second; how their requests ended, and what failed."""
    counts: Counter[str] = Counter()
    failures: list[str] = []
    for seed in range(*seeds):
        counts["schedules"] += 1
        try:
            world = play(seed)
            judge(world)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}\n{story(shrink(draw(seed)))}")
            continue
        counts["events"] += len(world.events)
        counts["requests"] += len(world.requests)
        counts["requests refused"] += len(world.rejected)
        for finish in world.finished.values():
            counts[f"requests ended: {finish.error_code or finish.reason}"] += 1
            counts["requests started anew"] += world.runtime.controller.ended[finish.request].epoch > 0
    return counts, failures


def results(pool: Pool, first: int, schedules: int | None) -> Iterator[tuple[Counter[str], list[str]]]:
    """In rounds, so that an endless run does not queue up endlessly."""
    begin = first
    while schedules is None or begin < first + schedules:
        end = begin + ROUND * BATCH
        if schedules is not None:
            end = min(end, first + schedules)
        yield from pool.imap_unordered(run_batch, [(seed, min(seed + BATCH, end)) for seed in range(begin, end, BATCH)])
        begin = end


def stop(_number: int, _frame: object) -> None:
    """Also where Ctrl-C is ignored, as in the background of a script."""
    raise KeyboardInterrupt


def leave_signals_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def report(counts: Counter[str], failures: list[str], first: int, seconds: float) -> dict[str, object]:
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "what": "seeded fault schedules in virtual time over the shipped machines (simulated)",
        "commit": commit.stdout.strip(),
        "machine": msgspec.to_builtins(machine_facts()),
        "versions": versions(),
        "seeds": f"{first} to {first + counts['schedules'] - 1}",
        "seconds": round(seconds),
        "failed": len(failures),
        "failures": failures,
        "counts": dict(sorted(counts.items())),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    parser.add_argument("--schedules", type=int, help="how many; without it until Ctrl-C")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--report", type=Path, help="write what was found as JSON")
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    counts: Counter[str] = Counter()
    failures: list[str] = []
    began = time.monotonic()
    columns = (TextColumn("{task.description}"), *Progress.get_default_columns()[1:], TimeElapsedColumn())
    with (
        multiprocessing.Pool(args.processes, initializer=leave_signals_to_the_parent) as pool,
        Progress(*columns) as progress,
    ):
        task = progress.add_task("schedules", total=args.schedules)
        try:
            for some, failed in results(pool, args.first, args.schedules):
                counts += some
                failures += failed
                said = f"{counts['schedules']:,} schedules, {counts['events']:,} events, {len(failures)} failed"
                progress.update(task, completed=counts["schedules"], description=said)
                for text in failed:
                    progress.console.print(text, highlight=False)
        except KeyboardInterrupt:
            pool.terminate()
    found = report(counts, failures, args.first, time.monotonic() - began)
    if args.report is not None:
        args.report.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({name: found[name] for name in ("seeds", "seconds", "failed", "counts")}, indent=1))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
