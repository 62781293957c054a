"""What was broken on purpose: fault schedules in virtual time, and real processes."""

from __future__ import annotations

from typing import Any

from benchmark_docs.layout import origin, table

CHECKED = {
    False: "no block in two states or with two writers, no KV read that is not the request's own, every request in one "
    "phase; at the end every request has ended once, with its whole text or a typed error, and nothing is held",
    True: "no row under another call's name or twice, and no call past its deadline",
}


def torture(result: dict[str, Any]) -> str:
    is_afd = "feed-forward" in result["what"]
    heading = "Faults between attention and feed-forward" if is_afd else "Faults"
    runs = [
        f"{run['schedules']:,} from seed {run['first']:,} at {run['commit']}, {run['cpu_seconds'] / 3600:.1f} CPU hours"
        for run in result["runs"]
    ]
    text = (
        f"\n## {heading} (simulated)\n\n`scripts/torture.py{' --afd' if is_afd else ''}`: {result['what']}. "
        f"**{result['schedules']:,} schedules, seeds {result['seeds']}: {result['failed']} failed.** After every event: "
        f"{CHECKED[is_afd]}. Runs: {'; '.join(runs)}.\n\n"
    )
    text += table(["what happened", "count"], [[name, f"{value:,}"] for name, value in result["counts"].items()])
    text += "\nWhat the faults hit:\n\n"
    text += table(["fault", "count"], [[name, f"{value:,}"] for name, value in result["faults"].items()])
    return text + origin(result)
