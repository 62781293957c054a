"""Real workers killed and stopped at random for minutes, under load: `python benchmarks/real_faults.py --minutes 10`.

Several streams at once, each compared with the same prompt's undisturbed answer, text and usage; every few seconds a
worker gets SIGKILL, or SIGSTOP and later SIGCONT, at a moment drawn from the seed. Then bits are changed between two
workers over TCP. A stream that has not ended two minutes after it began has hung, whatever becomes of it. Writes
benchmarks/results/real_faults.json. Nothing is timed: other load on the machine only makes fewer streams.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from surroundings import surroundings  # noqa: E402
from tests.e2e.disturbing import PROMPTS, Load, all_ready, disturb, holdings, undisturbed  # noqa: E402
from tests.e2e.live import LiveServer, eventually  # noqa: E402

TARGET = ROOT / "benchmarks" / "results" / "real_faults.json"
EXACT = ("--dtype", "float32", "--deterministic", "--set", "router.local_prefill=fallback")
TCP = str(ROOT / "deployments" / "1p1d-tcp.yaml")
PEERS = {
    "Dynamo 1.6.1, as it comes": "kill -9 of a decode worker loses the stream",
    "Dynamo 1.6.1, --migration-limit 3": "streams go on; usage says 352 prompt tokens for 18",
    "xPyD (xpyd-proxy and xpyd-sim of 2026-11)": "kill -9 of a decode worker: HTTP 200, the stream ends with no error, "
    "no finish_reason, no [DONE]",
}
"""The same test on such a machine; `pip install ai-dynamo==1.6.1`, `pip install xpyd-proxy xpyd-sim`."""


def setup(name: str, server: LiveServer, args: argparse.Namespace, minutes: float) -> dict[str, Any]:
    """One server under load and disturbance; the server is to be whole again afterwards."""
    random, done = Random(f"{args.seed}/{name}"), Counter[str]()
    eventually(lambda: all_ready(server))
    before = holdings(server)
    right = undisturbed(server, PROMPTS, args.max_tokens)
    load = Load(server, right, num_callers=args.streams, max_tokens=args.max_tokens)
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        time.sleep(2 * args.pause_seconds * random.random())
        disturb(server, random, done)
        sys.stderr.write(f"{name}: {dict(load.ends)} after {sum(done.values())} disturbances\n")
    load.stop()
    left = ""
    try:
        eventually(lambda: all_ready(server))
        server.check_idle()
        eventually(lambda: holdings(server) == before)
    except AssertionError as error:
        left = str(error)
    after = holdings(server)
    return {
        "minutes": round(minutes, 2),
        "streams_at_once": args.streams,
        "streams": dict(sorted(load.ends.items())),
        "wrong": sum(load.ends[end] for end in load.wrong),
        "hung": load.num_hung,
        "recovered": load.num_recovered,
        "slowest_seconds": round(load.slowest_seconds, 1),
        "disturbances": dict(sorted(done.items())),
        "restarts": server.get("/health")["restarts"],
        "before": before,
        "after": after,
        "is_whole_again": not left,
        **({"left": left} if left else {}),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of disturbance in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=60)
    parser.add_argument("--pause-seconds", type=float, default=4.0, help="between disturbances, on average")
    parser.add_argument("--output", type=Path, default=TARGET)
    args = parser.parse_args()
    results: dict[str, Any] = {}
    shapes = {
        "1p1d": ((*EXACT,), "transload"),
        "1p1d over TCP, bits changed": ((TCP, *EXACT), "tests.e2e.proxied"),
    }
    for name, (arguments, module) in shapes.items():
        with LiveServer(*arguments, module=module) as server:
            results[name] = setup(name, server, args, args.minutes / len(shapes))
            results[name]["bits_changed"] = server.output().count("changed bits")
    result = {
        "what": "real workers killed and stopped at random moments, and bits changed between two, under load",
        "command": f"benchmarks/real_faults.py --minutes {args.minutes:g} --seed {args.seed}",
        **surroundings(),
        "setups": results,
        "peers": PEERS,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps({name: setup["streams"] for name, setup in results.items()}, indent=1) + "\n")
    failed = any(one["wrong"] or one["hung"] or not one["is_whole_again"] for one in results.values())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
