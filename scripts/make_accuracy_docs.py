"""Writes docs/accuracy.md and the factors of the intervals: `python scripts/make_accuracy_docs.py [--evaluate]`.

Without --evaluate it takes the durations of silicon/evaluated.csv.gz; with it, it computes them anew from the
parameters in silicon/fits.json (minutes) and writes that file first.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "cost"))

import numpy as np
from evaluate import FITS, Evaluated, evaluate, load, save, taken
from fit_cost_model import PACKAGE, first_half
from kernels import CHIPS
from parameters import FITTED_CHIPS
from points import read_points

PAGE = Path(__file__).parents[1] / "docs" / "accuracy.md"
Rows = Sequence[Evaluated]
TARGETS = (
    ("TPOT, dense, median", "tpot", "all", True, "median", 0.10),
    ("TPOT, dense, mean", "tpot", "all", True, "mean", 0.15),
    ("TPOT, mixtures of experts, mean", "tpot", "all", False, "mean", 0.20),
    ("TPOT, chip left out, dense, mean", "tpot", "without", True, "mean", 0.20),
    ("TPOT, chip left out, mixtures, mean", "tpot", "without", False, "mean", 0.20),
    ("TPOT, chip left out, all, mean", "tpot", "without", None, "mean", 0.20),
    ("TTFT, median", "ttft", "all", None, "median", 0.30),
    ("TTFT, aggregated, median", "ttft", "all", "agg", "median", 0.30),
    ("TTFT, disaggregated, median", "ttft", "all", "disagg", "median", 0.30),
)


def ratios(rows: Rows, duration: str, way: str) -> np.ndarray:
    """Simulated / measured of the rows that were evaluated this way."""
    by = f"{duration}_by"
    return np.array([getattr(row, by)[way] / getattr(row, duration) for row in rows if way in getattr(row, by)])


def errors(rows: Rows, duration: str, way: str) -> tuple[int, float, float, float]:
    """(points, bias as a factor, median error, mean error)."""
    found = ratios(rows, duration, way)
    if not len(found):
        return 0, 0.0, 0.0, 0.0
    off = np.abs(found - 1)
    return len(found), float(np.exp(np.median(np.log(found)))), float(np.median(off)), float(np.mean(off))


def cells(rows: Rows, duration: str, way: str) -> str:
    count, bias, median, mean = errors(rows, duration, way)
    return f"{count} | x{bias:.2f} | {median:.1%} | {mean:.1%}" if count else "0 | | | "


def table(title: str, groups: list[tuple[str, Rows]], duration: str, way: str) -> list[str]:
    lines = [f"| {title} | points | bias | median | mean |", "|---|---|---|---|---|"]
    return [*lines, *(f"| {name} | {cells(rows, duration, way)} |" for name, rows in groups), ""]


def grouped(rows: Rows, key: Callable[[Evaluated], str]) -> list[tuple[str, Rows]]:
    return [(name, [row for row in rows if key(row) == name]) for name in sorted({key(row) for row in rows})]


def kind(row: Evaluated) -> str:
    return "dense" if row.dense else "mixture"


def mode(row: Evaluated) -> str:
    return "aggregated" if row.mode == "agg" else "disaggregated"


def target_lines(rows: Rows) -> list[str]:
    plain = [row for row in rows if not row.apart]
    lines = ["| | wanted | points | reached | without suspected speculation |", "|---|---|---|---|---|"]
    for name, duration, way, which, measure, wanted in TARGETS:

        def chosen(of: Rows, which: object = which) -> Rows:
            if which is None:
                return of
            return [row for row in of if (row.mode == which if isinstance(which, str) else row.dense is which)]

        both = []
        for of in (rows, plain):
            count, _, median, mean = errors(chosen(of), duration, way)
            both.append((count, median if measure == "median" else mean))
        verdict = "" if both[0][1] <= wanted else f" (missed by {(both[0][1] - wanted) * 100:.1f} points)"
        lines.append(f"| {name} | {wanted:.0%} | {both[0][0]} | {both[0][1]:.1%}{verdict} | {both[1][1]:.1%} |")
    return [*lines, ""]


def page(rows: Rows, refused: Counter[str]) -> str:
    admitted = [row for row in rows if row.apart != "not admitted"]
    lines = [OPENING, "## Against what was wanted", "", *target_lines(admitted)]
    lines += ["## TPOT", "", *table("all fitted", grouped(admitted, lambda r: f"{kind(r)}, {mode(r)}"), "tpot", "all")]
    lines += table("by chip", grouped(admitted, lambda r: f"{kind(r)}, {mode(r)}, {r.chip}"), "tpot", "all")
    lines += table("by engine", grouped(admitted, lambda r: f"{kind(r)}, {mode(r)}, {r.backend}"), "tpot", "all")
    lines += table("by model and engine", grouped(admitted, lambda r: f"{r.model}, {r.backend}"), "tpot", "all")
    lines += [HALVES, ""]
    lines += table("fitted on the other half", grouped(admitted, kind), "tpot", "half")
    lines += table("the same points, fitted on all", grouped(_halved(admitted), kind), "tpot", "all")
    lines += [LEFT_OUT, ""]
    lines += table("fitted without the chip", grouped(admitted, lambda r: f"{kind(r)}, {r.chip}"), "tpot", "without")
    lines += table("all chips left out in turn", [*grouped(admitted, kind), ("all", admitted)], "tpot", "without")
    lines += ["## TTFT", "", TTFT, ""]
    lines += table(
        "all fitted", [*grouped(admitted, lambda r: f"{kind(r)}, {mode(r)}"), ("all", admitted)], "ttft", "all"
    )
    lines += table("by chip", grouped(admitted, lambda r: f"{mode(r)}, {r.chip}"), "ttft", "all")
    lines += table("by model and engine", grouped(admitted, lambda r: f"{r.model}, {r.backend}"), "ttft", "all")
    lines += table("fitted on the other half", grouped(admitted, kind), "ttft", "half")
    lines += table("fitted without the chip", grouped(admitted, lambda r: r.chip), "ttft", "without")
    lines += apart_lines(rows, refused)
    lines += ["## Single kernels", "", KERNELS.format(chips=", ".join(CHIPS)), "", "```"]
    lines += [*json.loads(FITS.read_text())["kernel_lines"], "```", ""]
    lines += ["## Intervals", "", INTERVALS, "", *interval_lines(), UNMEASURED]
    return "\n".join(lines) + "\n"


def _halved(rows: Rows) -> Rows:
    return [row for row in rows if "half" in row.tpot_by]


def apart_lines(rows: Rows, refused: Counter[str]) -> list[str]:
    lines = ["## What is reported apart, and what is not evaluated", "", APART, ""]
    groups: list[tuple[str, Rows]] = [
        (label, [row for row in rows if row.apart == label]) for label in ("not admitted", "suspected speculation")
    ]
    groups.append(("beyond the speed of light", [row for row in rows if row.light]))
    lines += table("TPOT", groups, "tpot", "all")
    lines += ["| rows of the file that are not evaluated | rows |", "|---|---|"]
    lines += [f"| {why} | {count:,} |" for why, count in refused.most_common()]
    return [*lines, ""]


def intervals(rows: Rows) -> dict[str, object]:
    """Factors that 80 % of measured / simulated lay between."""

    def spread(of: Rows, duration: str, way: str) -> dict[str, float]:
        low, high = np.quantile(1 / ratios(of, duration, way), [0.1, 0.9])
        return {"low": float(f"{min(low, 1.0):.3f}"), "high": float(f"{max(high, 1.0):.3f}")}

    found: dict[str, object] = {}
    for name, dense in (("dense", True), ("experts", False)):
        of = [row for row in rows if row.dense is dense and not row.apart]
        found[name] = {}
        for duration in ("tpot", "ttft"):
            unseen = spread(of, duration, "without")
            twice = {edge: float(f"{factor**2:.3f}") for edge, factor in unseen.items()}
            found[name][duration] = {"fitted": spread(of, duration, "half"), "unseen": unseen, "claimed": twice}  # type: ignore[index]
    current = json.loads((PACKAGE / "intervals.json").read_text())
    found["classes"] = current["classes"]
    return found


def interval_lines() -> list[str]:
    current = json.loads((PACKAGE / "intervals.json").read_text())
    lines = ["| rests on | TPOT | TTFT |", "|---|---|---|"]
    for name, words in (("dense", "dense"), ("experts", "mixture")):
        for basis in ("fitted", "unseen", "claimed"):
            both = [current[name][duration][basis] for duration in ("tpot", "ttft")]
            lines.append(f"| {words}, {basis} | " + " | ".join(f"x{b['low']} to x{b['high']}" for b in both) + " |")
    for name, both in current["classes"].items():
        lines.append(f"| class {name} | x{both['low']} to x{both['high']} | the same |")
    return [*lines, ""]


def refused_rows() -> Counter[str]:
    return Counter(row.why.partition(":")[0] for row in read_points()[1])


def main() -> None:
    if "--evaluate" in sys.argv:
        points = taken()
        save(evaluate([first_half(point) for point in points], points))
    rows = load()
    (PACKAGE / "intervals.json").write_text(json.dumps(intervals(rows), indent=1) + "\n")
    PAGE.write_text(page(rows, refused_rows()))
    print("\n".join(target_lines([row for row in rows if row.apart != "not admitted"])))


OPENING = f"""\
# Accuracy of the cost model

Written by `scripts/make_accuracy_docs.py`; do not edit. Errors are of durations that are *simulated* with
the cost model, against measurements of vLLM, SGLang and TensorRT-LLM on {", ".join(FITTED_CHIPS)}
(`silicon/README.md`). The fit is `scripts/fit_cost_model.py`. *Bias* is the median of simulated / measured,
*median* and *mean* are of |simulated / measured - 1|. Equal measurements that the file lists more than once
count once.

How a point is simulated: its worker's steps come from the cost model; its client is replayed as it measured,
so many requests in flight in a closed loop, ten times as many in all, lengths drawn evenly from 80 to 100 %
of the nominal ones (InferenceX), on an engine that is two facts: whether prefills ride with decodes in one
step, and how many tokens a step holds (`scripts/cost/served.py`, `scripts/cost/replay.py`). A disaggregated
point's client is replayed against both pools: prompts wait for a free prefill worker, which takes as many
as a step holds.
"""
HALVES = """\
Runs (configuration, build and date) were dealt into two halves by a checksum; the fit saw one, this is
the other:"""
LEFT_OUT = """\
The figure to expect for a chip that nobody measured: all its points are left out of the fit, and only
its peaks, bandwidths and links are the chip's own:"""
TTFT = """\
In a closed loop a tenth of the requests come all at once, and the rest as others end; the wait that
follows is the replay's, not a factor. What a front end adds (HTTP, tokenising, streams in flight) is
fitted by engine."""
APART = """\
*Not admitted*: by the measurement itself requests waited for most of their life although their KV would
fit. The server had a limit on its batch that the file does not state, so the batch is unknown; these
points are in no table above and not in the fit. *Suspected speculation*: the file does not label
multi-token prediction. A run counts as suspected where it beats other builds of the same engine on the
same chip, model, split and load by 1.3 in the median of five loads or more. It stays in the tables (and
in the fit, whose loss is robust); the table of targets has a column without it. *Beyond the speed of
light*: faster than peak bandwidth and arithmetic allow one token a step. Only points whose batch is
unknown are, so this test alone finds no speculation."""
KERNELS = """\
The efficiency curves that the fit starts from, over {chips} at once: one set of numbers a kind,
whatever the chip."""
INTERVALS = """\
`WorkerCost.interval` and `.ttft_interval`: a simulated duration times these factors holds 80 % of the
measured ones of its kind. *Fitted*: the other half's points. *Unseen*: points of the chips left out.
*Claimed*: a chip of the class whose own peaks are claims, estimates or assumptions; the square of
unseen."""
UNMEASURED = """\
The classes below are not measured; their efficiencies are estimates that say so with each result, and
their intervals were set by hand from the published rates at hand: LPU from three rates of Groq v1 (300,
750 and 480 tokens/s for Llama-2-70B, Llama-2-7B, Mixtral-8x7B), which need about 41 us a layer, several
times what its link latency and bandwidth explain; wafer from Cerebras' 1,800 (8B) and 450 tokens/s
(70B) against WaferLLM's measurements on the WSE-2.
"""

if __name__ == "__main__":
    main()
