"""Writes docs/afd.md and its figures from benchmarks/results/afd_study.json, so that no number in it is typed.

A test compares them.
"""

from __future__ import annotations

import json
import math
import sys
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from benchmark_docs.chart import chart  # noqa: E402
from benchmark_docs.layout import table  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "afd_study.json"
TARGET = ROOT / "docs" / "afd.md"


def wrapped(text: str) -> str:
    """Paragraphs in lines of 120."""
    paragraphs = text.strip().split("\n\n")
    return "\n" + "\n\n".join(textwrap.fill(" ".join(each.split()), 120) for each in paragraphs) + "\n\n"


def percent(share: float) -> str:
    return f"{share:+.1%}".replace("%", " %")


def tokens(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else f"{count:,}"


def gain(answer: dict[str, Any]) -> str:
    if "refused" in answer:
        return "does not fit"
    if answer["gain"] is not None:
        return f"{answer['gain']:.2f}"
    if answer["split"] is None:
        return "neither" if answer["unsplit"] is None else "no split"
    return "split only"


def split_of(answer: dict[str, Any]) -> str:
    best = answer.get("split")
    if not best:
        return "-"
    return f"{best['attention_chips']}:{best['ffn_chips']}, m = {best['micro_batches']}, batch {best['batch']}"


HEAD = """# Attention here, feed-forward there: when it pays

In every layer of every decode step the attention worker sends its activations to an FFN worker and takes the result
back (*AFD*). The FFN's weights leave the attention side, so that it holds more requests; FFN workers merge the rows of
many attention workers, so that they read their weights for more tokens. In return something crosses twice a layer.

**Everything on this page is simulated** but what is marked measured, which others published. Made by
`scripts/make_afd_docs.py` from `benchmarks/results/afd_study.json`, which `benchmarks/afd_study.py` prints (commit
{commit}). Durations come from the cost model, which [accuracy](accuracy.md) compares with silicon. For a case of your
own:

    transload afd qwen3-235b --attention gb200 --link nvlink5 --latency 5us --context 16384 --weights fp8
    transload simulate deployments/rubin-lpx.yaml --trace conversation

## The pipeline

m micro-batches of an attention worker take turns: while the FFN of one is away, the attention of another runs. With
t_a and t_f the seconds of one micro-batch on either side, and round the seconds of one micro-batch through a layer and
back when nothing else is on its way, a step of L layers takes

    first layer + (the other micro-batches behind the first) + (L - 1) x max(round, m t_a, m t_f, m x each port)

A port carries the bytes of all attention workers that its FFN worker serves. Results leave an FFN worker one after the
other, so the next calls do not queue at its port a second time: of the two directions only one is paid in full.
`hardware/afd/events.py` plays the same pipeline event by event and is the authority: over {pipelines} random pipelines
(serial, m = 2 to 4, M:N, replicas, column and expert splits, unequal sides, slow and fast links) the two differ by
{largest:.1e} at most (relative). A property test holds them within 2 %.
"""

FASTAFD = """
FastAFD, GB200 NVL72, tokens per second and GPU over vLLM with DP4/EP4. *From shares*: the pipeline with the shares of
an unsplit step that FastAFD measured (attention / dense / experts), its batch expansion of 1.5 and its ratio; the FFN
hidden. *From catalog*: chips and model alone, nothing measured.
"""
SWEEP = """
The ratio sweep of a contributor to FastAFD (GB200, Qwen3-235B FP8, one FFN tray of four GPUs): ms a token, measured /
simulated from the catalog. The simulated step is off by {error} in the median. Best number of attention trays to one
FFN tray, measured and simulated: {best}.
"""
ASCEND = """
vLLM's afd-plugin on Ascend 910C, DeepSeek-V3.2 in 8 bits, tokens per second and die against EP64. Derived, not fitted,
from what its recipe says: {before} requests a die unsplit and {after} split (at {contexts} of context), and rows that
are sent to 4 of the 16 experts of an FFN die only, so that 16 FFN dies stand for 64 and read a quarter of their weights
(an EP64 die has 4 experts anyway). An unsplit step is batch / published rate; its two contexts hold the same context in
all, so their difference is what a request costs. Weights, FFN calls, hops and bubbles are the cost model's; one way of
a hop is assumed at 10 us.
"""
ASCEND_SO = """
So at 16K both signs follow, and at 32K that of 64A16F; 48A16F at 32K comes out the wrong way by a few percent. The four
experts decide: were all 16 of an FFN die read, both ratios would lose at 32K, as they did on this page before the
recipe was known. What is left is how long a step takes. In ms:

{steps}

All four signs follow if one way of a hop takes between {low:.0f} and {high:.0f} us instead of 10: at 32K, with half the
rows, attention is then too short to hide two hops. Not published for this run; on the same chips xDeepServe (arXiv
2508.02520) gives 172 us out and 193 us home for 96 requests a die, and its dispatch 20 us for 4. Time that an attention
die itself spends on each call would do it at 32K between {call_low:.0f} and {call_high:.0f} us, but at 16K 64A16F stays
ahead only below {call_most:.0f} us. And no value of anything makes both measured steps: with the same batch a die and
fewer rows an FFN die, 48A16F was measured {slower} slower a step than 64A16F (16K and 32K). In a pipeline fewer callers
are never slower; something else differed between the two runs.
"""
STEP3 = """
Step-3's stage budget (3 stages, 3 micro-batches, 61 layers, 272 us a stage, 91 us out and 182 us home): the pipeline
takes {step:.1f} ms a step where the report says 50, and {hops:.0f} us is the longest round trip that still hides
(StepMesh's budget: 273). With the attention times of the report's table 9, {attention:.0f} us a layer, it gives
{rate:,.0f} tokens per second and GPU (measured: {mean:,.0f} mean, {peak:,.0f} peak).
"""
CLUSTERS = """
Tokens per second and chip of the best split over those of the best unsplit deployment (any tensor split to 16 chips or
expert split to 64) on the same chips, FP8 weights, at most 50 ms a token. Latency one way is assumed: 5 us over NVLink,
10 us over Ethernet or InfiniBand. A split pays (by more than 2 %) at {pays} of {points} points. These gains are mostly
smaller than the cost model's own error for mixtures of experts, so read them as signs and orders, not as promises.
"""
WHY = """
So it pays with long contexts and fast links: attention must be long enough to hide an FFN and two hops behind it. Below
the break-even latency two or three micro-batches do that; above it the hops show in every layer. Where the two sides
reach each other over the network between boxes only, and experts are many and thin (DeepSeek-V3), wide expert
parallelism without a split is as good up to tens of thousands of tokens of context; arXiv 2602.09721 calls this the
dead zone. Dense models gain little anywhere: merged rows soon make their FFN wait for arithmetic.
"""
RUBIN = """
Attention on Rubin R200, FFN on Groq LP30: the article's fifth system. The bridge between the two is not published;
**{bandwidth:g} GB/s a port and {latency:g} us one way are assumed** and swept below. Context 8K, FP8. The FFN side
takes 512 LPUs for Qwen3-235B and 1,536 for DeepSeek-V3 (500 MB each), in {stages}. Neither price nor power of an LPU is
published, so beside the gain with all chips counted alike stands what an LPU may cost (or draw) at most, in Rubin GPUs,
for the split to be worth as much as Rubin alone. *split only*: Rubin alone keeps the target with no batch; *neither*:
nor does a split.
"""
BRIDGES = """
Qwen3-235B at 5 ms a token, by the bridge's bandwidth a port and its latency one way: tokens per second and Rubin GPU
of the best split.
"""
RUBIN_CONTEXTS = """
At {target:g} ms a token, by context: the gain with chips alike, and the latency one way up to which there is one.
"""
SKEW = """
Qwen3-235B on GB200, its {experts} experts split over {workers} FFN workers of one GPU; {callers} attention workers of
{rows} requests. A step, played event by event by the machines that serve: the placement of `control/expert_map.py`, and
`control/ffn_client.py` choosing among the owners of a copied expert. The n-th hottest expert is chosen by 1 / n^s, a
guess at how uneven traffic is. The step over that of evenly chosen experts, and in brackets the rows of the busiest FFN
worker over the mean.
"""
LOSSES = """
## When an FFN worker dies

    transload simulate deployments/rubin-lpx.yaml --set pools.lpx.workers=2 --fault "kill lpx-0 at 20s"

A simulation takes the closed form while everybody is up. A step in which an FFN worker goes, or that begins with a part
of the feed-forwards at nobody, is played instead by the machines that serve (`FfnClient` and `FfnServer`, driven by
`runtime/ffn_step.py`); without losses the two agree within 2 %, which a test holds (where the FFN side is the busiest,
the machines also merge micro-batches that wait there together, and are up to a quarter faster). A replica takes over
within the step; with the last one gone attention workers load the weights and compute both halves, if they hold them
beside their caches, or the requests wait for the deadline and fail, as the deployment's `fallback` says. The result
says how many steps felt it, by how much the longest, and how many calls were asked again, computed here, or failed.
"""
SO = """
So it pays for fast answers: where GPUs must run nearly empty to keep the target, an FFN in SRAM gives them back their
batch. At a relaxed target Rubin alone fills its batch and the LPUs stand idle. The bridge's latency decides, because it
is paid twice in each layer and one micro-batch cannot hide it; its bandwidth hardly matters.
"""


def published(result: dict[str, Any]) -> str:
    part = result["published"]
    rows: list[list[object]] = []
    for row in part["fastafd"]:
        rows.append(
            [
                row["model"], tokens(row["context"]), row["ratio"], f"{row['measured']:.2f}",
                f"{row['from_shares']:.2f} ({percent(row['from_shares'] / row['measured'] - 1)})",
                f"{row['from_catalog']:.2f}", f"{row['expansion']:.2f}",
                " / ".join(f"{share:.0%}" for share in row["measured_shares"]),
                " / ".join(f"{share:.0%}" for share in row["catalog_shares"]),
            ]
        )  # fmt: skip
    text = "\n## What others measured\n" + wrapped(FASTAFD)
    columns = ["model", "context", "A:F", "measured", "from shares", "from catalog", "expansion from memory",
               "shares measured", "shares simulated"]  # fmt: skip
    text += table(columns, rows)
    return text + sweep(part) + ascend(part) + step3(part["step3"])


def sweep(part: dict[str, Any]) -> str:
    contexts = sorted({row["context"] for row in part["sweep"]})
    by = {(row["context"], row["trays"]): row for row in part["sweep"]}
    trays = [count for count in sorted({row["trays"] for row in part["sweep"]}) if (contexts[0], count) in by]
    rows: list[list[object]] = []
    for context in contexts:
        cells: list[object] = [tokens(context)]
        for count in trays:
            row = by.get((context, count))
            cells.append("-" if row is None else f"{row['measured_ms']:.1f} / {row['simulated_ms']:.1f}")
        rows.append(cells)
    best = []
    for context in contexts:
        mine = [row for row in part["sweep"] if row["context"] == context]
        measured = max(mine, key=lambda row: row["measured_per_chip"])["trays"]
        simulated = max(mine, key=lambda row: row["simulated_per_chip"])["trays"]
        best.append(f"{tokens(context)} {measured} and {simulated}")
    text = SWEEP.format(error=percent(part["sweep_median_error"]), best="; ".join(best))
    return wrapped(text) + table(["context", *(f"{count}:1" for count in trays)], rows)


def ascend(part: dict[str, Any]) -> str:
    said = part["ascend"]
    measured, contexts = said["measured"], [tokens(point["context_tokens"]) for point in said["measured"]]
    columns = ["", *(f"{context}: {', '.join(said['ratios'])}" for context in contexts), "pays from"]
    rows: list[list[object]] = [["measured", *(_gains(point["gains"]) for point in measured), ""]]
    for name, results in said["rows"].items():
        ratios = " and ".join(
            "never" if result["break_even_ratio"] is None else f"{result['break_even_ratio']:.1f}:1"
            for result in results
        )
        gains = [_gains([split["gain"] for split in result["splits"]]) for result in results]
        rows.append([f"simulated, {name}", *gains, ratios])
    before, after = ([str(point["batches"][side]) for point in measured] for side in (0, 1))
    intro = ASCEND.format(before=" and ".join(before), after=" and ".join(after), contexts=" and ".join(contexts))
    return wrapped(intro) + table(columns, rows) + _ascend_steps(said, contexts)


def _ascend_steps(said: dict[str, Any], contexts: list[str]) -> str:
    published = said["rows"]["as published"]
    rows: list[list[object]] = []
    for context, result in zip(contexts, published, strict=True):
        for name, split in zip(said["ratios"], result["splits"], strict=True):
            milliseconds = [f"{split[key] * 1e3:.1f}" for key in
                            ("step_seconds", "break_even_step_seconds", "measured_step_seconds")]  # fmt: skip
            rows.append([f"{name}, {context}", *milliseconds])
    slower = [
        result["splits"][0]["measured_step_seconds"] / result["splits"][-1]["measured_step_seconds"] - 1
        for result in published
    ]
    hops, calls = said["pays_up_to"]["latency_seconds"], said["pays_up_to"]["call_seconds"]
    text = ASCEND_SO.format(
        steps="STEPS",
        low=max(point[0] for point in hops) * 1e6,
        high=min(point[1] for point in hops) * 1e6,
        call_low=calls[1][0] * 1e6,
        call_high=calls[1][1] * 1e6,
        call_most=calls[0][1] * 1e6,
        slower=" and ".join(f"{each:.0%}" for each in slower),
    )
    columns = ["", "simulated", "as good as EP64", "measured"]
    return wrapped(text).replace("STEPS", table(columns, rows).rstrip())


def _gains(gains: list[float]) -> str:
    return ", ".join(percent(value) for value in gains)


def step3(part: dict[str, Any]) -> str:
    return wrapped(
        STEP3.format(
            step=part["budget_step_seconds"] * 1e3,
            hops=part["longest_hops_seconds"] * 1e6,
            attention=part["attention_seconds"] * 1e6,
            rate=part["per_chip"],
            mean=part["mean_per_chip"],
            peak=part["peak_per_chip"],
        )
    )


def clusters(result: dict[str, Any]) -> str:
    contexts = sorted({int(context) for answers in result["by_context"].values() for context in answers})
    rows: list[list[object]] = []
    points = pays = 0
    for setup, answers in result["by_context"].items():
        cells: list[object] = [setup]
        for context in contexts:
            answer = answers.get(str(context))
            cells.append("-" if answer is None else gain(answer))
            if answer is not None and answer.get("gain") is not None:
                points += 1
                pays += answer["gain"] > 1.02
        latency = result["by_latency"][setup]["break_even_us"]
        cells.append("never" if latency is None else "over 1 ms" if latency >= 999 else f"{latency:.0f} us")
        cells.append(split_of(answers["8192"]))
        cells.append(break_even_context(answers))
        rows.append(cells)
    columns = ["setup", *(tokens(context) for context in contexts), "break-even latency at 8K", "best split at 8K",
               "pays from"]  # fmt: skip
    text = "\n## On GPU clusters\n" + wrapped(CLUSTERS.format(pays=pays, points=points)) + table(columns, rows)
    return text + "\n![gain against context](afd-context.svg)\n" + wrapped(WHY)


def break_even_context(answers: dict[str, Any]) -> str:
    """Between the contexts that were looked at, on a straight line in the logarithm."""
    known = [(int(context), answer["gain"]) for context, answer in answers.items() if answer.get("gain") is not None]
    if all(value >= 1.0 for _, value in known):
        return "everywhere"
    for (low, before), (high, after) in pairwise(known):
        if before < 1.0 <= after:
            share = (1.0 - before) / (after - before)
            return f"about {tokens(round(math.exp(math.log(low) + share * math.log(high / low)) / 1024) * 1024)}"
    return "nowhere"


def per_rubin(answer: dict[str, Any]) -> str:
    best = answer.get("split")
    return f"{best['per_attention_chip']:,.0f}" if best else "no split keeps it"


def rubin(result: dict[str, Any]) -> str:
    part = result["rubin"]
    targets = list(next(iter(part["targets_ms"].values())))
    rows: list[list[object]] = []
    for model, answers in part["targets_ms"].items():
        for target in targets:
            answer = answers[target]
            best, cost = answer.get("split"), answer.get("break_even_cost")
            rows.append(
                [
                    model, f"{target} ms", gain(answer), "-" if cost is None else f"{cost:.2f}", split_of(answer),
                    "-" if not best else f"{best['per_attention_chip']:,.0f}",
                    "-" if not answer.get("unsplit") else f"{answer['unsplit']['per_chip']:,.0f}",
                    "-" if not best else f"{best['exposed_share']:.0%}", "-" if not best else f"{best['ffn_idle']:.0%}",
                ]
            )  # fmt: skip
    bridge = part["bridge"]
    text = "\n## On Rubin and LP30\n" + wrapped(
        RUBIN.format(
            bandwidth=bridge["gigabytes_per_second"],
            latency=bridge["latency_us"],
            stages="pipeline stages of 256, each of which works for another part of the attention workers",
        )
    )
    columns = ["model", "target a token", "gain, chips alike", "an LPU may cost", "best split", "tok/s per Rubin",
               "unsplit", "exposed", "LPUs idle"]  # fmt: skip
    text += table(columns, rows) + "\n![Rubin and LP30](afd-rubin.svg)\n\n"
    latencies = list(next(iter(part["bridges"].values())))
    rows = [
        [f"{bandwidth} GB/s", *(per_rubin(answers[latency]) for latency in latencies)]
        for bandwidth, answers in part["bridges"].items()
    ]
    sweep_table = table(["bridge", *(f"{latency} us" for latency in latencies)], rows)
    return text + wrapped(BRIDGES) + sweep_table + rubin_contexts(part) + wrapped(SO)


def rubin_contexts(part: dict[str, Any]) -> str:
    contexts = sorted({int(context) for answers in part["contexts"].values() for context in answers})
    rows: list[list[object]] = []
    for model, answers in part["contexts"].items():
        cells: list[object] = [model]
        cells += [gain(answers[str(context)]) if str(context) in answers else "-" for context in contexts]
        latency = part["break_even_us"][model]
        rows.append([*cells, "never" if latency is None else f"{latency:.1f} us"])
    columns = ["model", *(tokens(context) for context in contexts), "break-even latency at 8K"]
    return wrapped(RUBIN_CONTEXTS.format(target=part["target_ms"])) + table(columns, rows)


def skew(result: dict[str, Any]) -> str:
    part = result["skew"]
    placements = list(dict.fromkeys(step["placement"] for step in part["steps"]))
    by = {(step["exponent"], step["placement"]): step for step in part["steps"]}
    even = by[0.0, placements[0]]["seconds"]
    rows: list[list[object]] = []
    for exponent in sorted({step["exponent"] for step in part["steps"]}):
        steps = [by[exponent, placement] for placement in placements]
        cells = [f"{step['seconds'] / even:.2f} ({step['busiest']:.2f})" for step in steps]
        rows.append([f"{exponent:g}", f"{steps[0]['hottest']:.1f} times the mean", *cells])
    rows.append(["", "experts held at most", *(by[0.0, placement]["experts_held"] for placement in placements)])
    text = SKEW.format(workers=part["workers"], callers=part["callers"], rows=part["rows"], experts=part["num_experts"])
    return (
        "\n## Experts that are not chosen evenly\n" + wrapped(text) + table(["s", "hottest expert", *placements], rows)
    )


def figures(result: dict[str, Any]) -> dict[str, str]:
    by_context = {
        setup: [(float(context), a["gain"]) for context, a in answers.items() if a.get("gain") is not None]
        for setup, answers in result["by_context"].items()
    }
    contexts = sorted({x for points in by_context.values() for x, _ in points})
    by_target = {
        model: [(float(target), a["gain"]) for target, a in answers.items() if a.get("gain") is not None]
        for model, answers in result["rubin"]["targets_ms"].items()
    }
    targets = sorted({x for points in by_target.values() for x, _ in points})
    return {
        "afd-context.svg": chart(
            "tokens/s and chip, split over unsplit (simulated)",
            "tokens of context",
            {name: points for name, points in by_context.items() if points},
            {context: tokens(int(context)) for context in contexts},
        ),
        "afd-rubin.svg": chart(
            "Rubin + LP30 over Rubin alone, all chips counted alike (simulated)",
            "most milliseconds a token",
            {name: points for name, points in by_target.items() if points},
            {target: f"{target:g}" for target in targets},
        ),
    }


def page(result: dict[str, Any]) -> str:
    agreement = result["agreement"]
    head = HEAD.format(commit=result["commit"][:7], pipelines=agreement["pipelines"], largest=agreement["largest"])
    parts = head + published(result) + clusters(result) + rubin(result) + skew(result) + LOSSES
    return parts.replace("\n\n\n", "\n\n").rstrip() + "\n"


def main() -> int:
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    TARGET.write_text(page(result), encoding="utf-8")
    for name, figure in figures(result).items():
        (TARGET.parent / name).write_text(figure, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
