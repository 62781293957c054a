"""What a server does under more load than it can serve, and over a long time."""

from __future__ import annotations

from typing import Any

from benchmark_docs.layout import origin, table

OVERLOAD = """
## Overload

`benchmarks/overload.py`: one prefill and one decode worker with `server.admission: targets` ({ttft:g} s to the first
token, {tpot:g} ms a token); {times:g} times what they serve ({capacity:.2f} requests/s, {input} tokens in, {output}
out) for {minutes:g} minutes; {back:.0%} of the refused come back when they were told to.

"""
SOAK = """
## Soak

`benchmarks/soak.py`: {minutes:g} minutes of mixed load on {topology} from {callers} callers: short and long prompts,
streams and not, one choice and two, and callers who leave at a random moment.

"""


def overload(result: dict[str, Any]) -> str:
    targets = result["targets"]
    text = OVERLOAD.format(
        ttft=targets["ttft"],
        tpot=targets["tpot"] * 1e3,
        times=result["times"],
        capacity=result["capacity_requests_per_second"],
        input=result["input_tokens"],
        output=result["output_tokens"],
        minutes=result["minutes"],
        back=result["share_back"],
    )
    ttft, tpot, recovery = result["ttft_seconds"], result["tpot_seconds"], result["recovery_seconds"]
    rows: list[list[object]] = [
        ["callers, served, errors", f"{result['callers']}, {result['served']}, {result['num_errors']}"],
        ["served a second", f"{result['served_per_second']:.2f}"],
        ["refused with 429", f"{result['share_429']:.0%}; {result['without_retry_after']} without Retry-After"],
        ["came back when told, let in", f"{result['came_back']}, {result['came_back_and_were_let_in']}"],
        ["TTFT p50 / p95 / p99, s", " / ".join(f"{ttft[name]:.2f}" for name in ("p50", "p95", "p99"))],
        ["TPOT p50 / p95 / p99, ms", " / ".join(f"{tpot[name] * 1e3:.0f}" for name in ("p50", "p95", "p99"))],
        ["within the targets", f"TTFT {result['ttft_attainment']:.0%}, TPOT {result['tpot_attainment']:.0%}"],
        ["recovered after", "not within a minute" if recovery is None else f"{recovery:.1f} s"],
        *_memory(result),
    ]
    return text + table(["", ""], rows) + origin(result)


def soak(result: dict[str, Any]) -> str:
    text = SOAK.format(minutes=result["minutes"], topology=result["topology"], callers=result["callers"])
    counts, after = result["counts"], result["afterwards"]
    failed = {name: count for name, count in counts.items() if name.startswith("failed") or "errors" in name}
    segments = result["shared_segments"]
    rows: list[list[object]] = [
        ["answered, left by their callers", f"{counts.get('answered', 0):,}, {counts.get('left', 0):,}"],
        ["tokens", f"{counts.get('tokens', 0):,}"],
        ["failed", ", ".join(f"{count} {name}" for name, count in failed.items()) or "none"],
        ["afterwards: requests, waiting", f"{after['requests']}, {after['waiting']}"],
        [
            "afterwards: blocks referenced, in quarantine, leaked",
            ", ".join(f"{after['blocks'].get(state, 0):g}" for state in ("referenced", "quarantined", "leaked")),
        ],
        ["segments of shared memory, before and after", f"{segments['first']}, {segments['last']}"],
        *_memory(result),
        ["the same, at the begin and the end of the last third, MB", _last_third(result["samples"])],
        ["file descriptors, first and last third", _from_to(result["fds"], 1.0, "")],
    ]
    return text + table(["", ""], rows) + origin(result)


def _memory(result: dict[str, Any]) -> list[list[object]]:
    """Resident memory, which counts what processes share in each of them."""
    return [["resident memory, mean of the first and of the last third, MB", _from_to(result["memory"], 1e6, ",.0f")]]


def _last_third(samples: list[dict[str, Any]]) -> str:
    """Of processes that lived through it."""
    begin, end = (samples[place]["memory_bytes"] for place in (-len(samples) // 3, -1))
    return "; ".join(f"{name} {begin[name] / 1e6:.1f} to {end[name] / 1e6:.1f}" for name in begin if name in end)


def _from_to(processes: dict[str, dict[str, float]], unit: float, form: str) -> str:
    form = form or ".1f"
    return "; ".join(
        f"{name} {each['first'] / unit:{form}} to {each['last'] / unit:{form}} ({each['growth']:+.1%})"
        for name, each in processes.items()
    )
