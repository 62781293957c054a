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
        f"**{result['schedules']:,} schedules, seeds {result['seeds']}: {result['failed']} failed.** After every "
        f"event: {CHECKED[is_afd]}. Runs: {'; '.join(runs)}.\n\n"
    )
    text += table(["what happened", "count"], [[name, f"{value:,}"] for name, value in result["counts"].items()])
    text += "\nWhat the faults hit:\n\n"
    text += table(["fault", "count"], [[name, f"{value:,}"] for name, value in result["faults"].items()])
    return text + origin(result)


def real_faults(result: dict[str, Any]) -> str:
    rows: list[list[object]] = []
    for name, setup in result["setups"].items():
        killed = sum(count for what, count in setup["disturbances"].items() if what.startswith("kill"))
        stopped = sum(count for what, count in setup["disturbances"].items() if what.startswith("stop"))
        errors = sum(count for end, count in setup["streams"].items() if end.startswith("typed"))
        rows.append(
            [
                name,
                f"{setup['minutes']:g}",
                killed,
                stopped,
                setup["bits_changed"],
                sum(setup["streams"].values()),
                setup["streams"].get("whole", 0),
                setup["recovered"],
                errors,
                setup["wrong"],
                setup["hung"],
                "yes" if setup["is_whole_again"] else "no",
            ]
        )
    text = (
        f"\n## Faults (real)\n\n`{result['command']}`: {result['what']}. A stream is whole if its text is that of the "
        "same prompt undisturbed and its usage counts every token once, also where it was begun anew by another "
        "worker. At the end: as many processes, open files and blocks as before, no request, no block held.\n\n"
    )
    columns = [
        "setup",
        "minutes",
        "kill -9",
        "SIGSTOP",
        "bits changed",
        "streams",
        "whole",
        "of them begun anew",
        "typed error",
    ]
    text += table([*columns, "wrong", "hung", "whole again"], rows)
    others = "; ".join(f"{name}: {how}" for name, how in result["peers"].items())
    text += f"\nThe same test on others: {others}.\n"
    return text + origin(result)
