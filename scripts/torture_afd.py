"""Seeded fault schedules for feed-forwards elsewhere: `python scripts/torture_afd.py --schedules 20000`; prints JSON.

Each seed is a few attention and FFN workers in virtual time (`tests/afd_world.py`): messages lost, repeated, late and
out of order, workers killed and stalled, batches that fail. A seed that fails is printed with its story and replays
exactly: `python scripts/torture_afd.py --first SEED --schedules 1`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.afd_world import World  # noqa: E402 - the tests are found from here only

from transload.study.provenance import machine_facts, versions  # noqa: E402

COUNTED = ("calls", "requests", "retries", "late", "dropped", "unknown", "busy", "errors", "lost_workers",
           "computed_here", "failed")  # fmt: skip


def play(seed: int, counts: Counter[str]) -> str | None:
    """Play one schedule; what failed, if anything did."""
    counts["schedules"] += 1
    try:
        world = World(seed).run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    counts["events"] += world.num_events
    for attention in world.attention:
        for name in COUNTED:
            counts[name.replace("_", " ")] += getattr(attention.client.counts, name)
        counts["attention workers killed"] += attention.lives - 1
        counts["steps failed and done again"] += attention.num_failures
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--schedules", type=int, default=1000, help="how many")
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    failures: list[str] = []
    began = time.perf_counter()
    for seed in range(args.first, args.first + args.schedules):
        problem = play(seed, counts)
        if problem is not None:
            failures.append(problem)
            sys.stderr.write(problem + "\n")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    result = {
        "what": "fault schedules of the attention/FFN protocol, in virtual time",
        "command": f"scripts/torture_afd.py --first {args.first} --schedules {args.schedules}",
        "seeds": f"{args.first} to {args.first + args.schedules - 1}",
        "commit": commit.stdout.strip(),
        "machine": machine_facts(),
        "versions": versions(),
        "seconds": round(time.perf_counter() - began, 1),
        "num_failures": len(failures),
        "failures": failures[:10],
        "counts": dict(counts),
    }
    sys.stdout.write(json.dumps(result, indent=1, default=str) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
