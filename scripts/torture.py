"""Seeded schedules of faults until stopped: `make torture`, or `python scripts/torture.py --schedules 100000`.

Each seed is a small cluster in virtual time with its own load, kills, pauses, lost, repeated, late and changed frames,
clock jumps, failed steps, callers that go away and too few blocks; every invariant is checked after every event. With
`--afd` it is attention and FFN workers and what goes wrong between them. A seed that fails is shrunk to a short story
and printed, and replays exactly: `python scripts/torture.py --first SEED --schedules 1`.

With `--report FILE` the counts are written after every round, with the commit they were made with; a run that finds
the file goes on behind its last seed, with the same or another commit.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # behind a compiled copy, if one is on the path

import msgspec  # noqa: E402 - the tests are found from here only
from tests import afd_world  # noqa: E402
from tests.schedules import build, draw, judge  # noqa: E402
from tests.shrink import shrink, story  # noqa: E402

from transload.study.provenance import machine_facts, versions  # noqa: E402

BATCH = 50
ROUND = 40
WHAT = {
    False: "seeded fault schedules in virtual time over the shipped machines",
    True: "seeded fault schedules of attention here, feed-forward there, in virtual time over the shipped machines",
}
CLIENT_COUNTS = ("calls", "requests", "retries", "late", "dropped", "unknown", "busy", "errors", "lost_workers",
                 "computed_here", "failed")  # fmt: skip


class Found(msgspec.Struct):
    """What a batch of schedules came to."""

    counts: Counter[str]
    faults: Counter[str]
    """How often each fault has hit what."""
    failures: list[str]
    cpu_seconds: float = 0.0


def play_serving(seed: int, found: Found) -> None:
    """A schedule of prefill, decode and aggregated workers; raises for whatever must not be."""
    counts = found.counts
    world = build(draw(seed))
    world.run()
    judge(world)
    counts["events"] += len(world.events)
    counts["requests"] += len(world.requests)
    counts["requests refused"] += len(world.rejected)
    for finish in world.finished.values():
        counts[f"requests ended: {finish.error_code or finish.reason}"] += 1
        counts["requests started anew"] += world.runtime.controller.ended[finish.request].epoch > 0
    found.faults.update(world.struck)


def play_afd(seed: int, found: Found) -> None:
    """A schedule of attention and FFN workers."""
    counts = found.counts
    world = afd_world.World(seed).run()
    counts["events"] += world.num_events
    for attention in world.attention:
        for name in CLIENT_COUNTS:
            counts[name.replace("_", " ")] += getattr(attention.client.counts, name)
        counts["steps failed and done again"] += attention.num_failures
    found.faults.update(world.struck)


def tell_serving(seed: int) -> str:
    return story(shrink(draw(seed)))


def run_batch(work: tuple[bool, int, int]) -> Found:
    """Play the seeds from the first up to the second."""
    is_afd, first, end = work
    play: Callable[[int, Found], None] = play_afd if is_afd else play_serving
    found, began = Found(Counter(), Counter(), []), time.process_time()
    for seed in range(first, end):
        found.counts["schedules"] += 1
        try:
            play(seed, found)
        except Exception as error:
            tale = "" if is_afd else f"\n{tell_serving(seed)}"
            found.failures.append(f"seed {seed}: {type(error).__name__}: {error}{tale}")
    gc.collect()
    found.cpu_seconds = time.process_time() - began
    return found


def prepare(*, ignores_signals: bool = True) -> None:
    """Worlds are rings of objects: collected once a batch, not while one is played."""
    gc.collect()
    gc.freeze()
    gc.disable()
    if ignores_signals:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def rounds(first: int, schedules: int | None, *, is_afd: bool) -> Iterator[list[tuple[bool, int, int]]]:
    """Batches, some at a time, so that an endless run does not queue up endlessly."""
    begin = first
    while schedules is None or begin < first + schedules:
        end = begin + ROUND * BATCH
        if schedules is not None:
            end = min(end, first + schedules)
        yield [(is_afd, seed, min(seed + BATCH, end)) for seed in range(begin, end, BATCH)]
        begin = end


def stop(_number: int, _frame: object) -> None:
    """Also where Ctrl-C is ignored, as in the background of a script."""
    raise KeyboardInterrupt


def commit() -> str:
    """Of the code that is running, as of now: asked before anything else may change it."""
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "src", "tests", "scripts"], capture_output=True, text=True, check=False
    )
    return name.stdout.strip() + (" and changes" if changed.stdout.strip() else "")


class Report:
    """What all rounds have come to, this run's and those of the runs before it that are in the file."""

    def __init__(self, path: Path | None, first: int, *, is_afd: bool) -> None:
        self.path = path
        self.content: dict[str, Any] = {"what": WHAT[is_afd], "first": first, "schedules": 0, "failed": 0, "runs": []}
        self.counts: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.failures: list[str] = []
        if path is not None and path.exists():
            self.content = json.loads(path.read_text())
            assert self.content["what"] == WHAT[is_afd], f"{path}: is of something else"
            self.counts.update(self.content["counts"])
            self.faults.update(self.content["faults"])
            self.failures = self.content["failures"]
        self.run: dict[str, Any] = {"commit": commit(), "first": self.next_seed, "schedules": 0, "cpu_seconds": 0.0}

    @property
    def next_seed(self) -> int:
        return int(self.content["first"]) + int(self.content["schedules"])

    def add(self, some: list[Found]) -> None:
        """A whole round: the seeds in the report have no gap."""
        if not self.run["schedules"]:
            self.content["runs"].append(self.run)
        for found in some:
            self.counts.update(found.counts)
            self.faults.update(found.faults)
            self.failures += found.failures
            self.run["schedules"] += found.counts["schedules"]
            self.run["cpu_seconds"] = round(self.run["cpu_seconds"] + found.cpu_seconds, 1)
        self._write()

    def _write(self) -> None:
        self.content |= {
            "commit": self.run["commit"],
            "machine": msgspec.to_builtins(machine_facts()),
            "versions": versions(),
            "schedules": self.counts["schedules"],
            "cpu_seconds": round(sum(run["cpu_seconds"] for run in self.content["runs"]), 1),
            "failed": len(self.failures),
            "failures": self.failures,
            "counts": dict(sorted(self.counts.items())),
            "faults": dict(sorted(self.faults.items())),
        }
        self.content["seeds"] = f"{self.content['first']} to {self.next_seed - 1}"
        if self.path is not None:
            beside = self.path.with_suffix(".part")
            beside.write_text(json.dumps(self.content, indent=1) + "\n")
            beside.replace(self.path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--afd", action="store_true", help="attention and FFN workers")
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    parser.add_argument("--schedules", type=int, help="how many, the report's included; without it until Ctrl-C")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--report", type=Path, help="write what was found as JSON; go on where it ends")
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    report = Report(args.report, args.first, is_afd=args.afd)
    left = None if args.schedules is None else max(0, args.schedules - report.content["schedules"])
    alone = args.processes == 1
    if alone:
        prepare(ignores_signals=False)
    with nullcontext() if alone else multiprocessing.Pool(args.processes, initializer=prepare) as pool:
        try:
            for batches in rounds(report.next_seed, left, is_afd=args.afd):
                found = [*map(run_batch, batches)] if pool is None else pool.map(run_batch, batches, chunksize=1)
                report.add(found)
                for text in (text for batch in found for text in batch.failures):
                    print(text, flush=True)
                said = f"{report.content['schedules']:,} schedules, {report.counts['events']:,} events"
                print(f"{said}, {report.content['failed']} failed", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            if pool is not None:
                pool.terminate()
    print(json.dumps({name: value for name, value in report.content.items() if name != "failures"}, indent=1))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
