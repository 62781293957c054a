"""When splitting attention from feed-forwards pays, by simulation: prints JSON for `docs/afd.md`.

    python benchmarks/afd_study.py > benchmarks/results/afd_study.json
    python benchmarks/afd_study.py --only published      one part of it, to look at

Nothing here is measured but what is quoted from others, in `hardware/afd/published.yaml`. About five minutes of CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec

from transload.errors import DeploymentError
from transload.hardware.afd.events import play
from transload.hardware.afd.pipeline import Pipeline, step_seconds
from transload.hardware.afd.published import (
    Ascend,
    AscendAssumptions,
    ascend_break_even,
    ascend_results,
    fastafd_from_catalog,
    published,
    speedup_from_shares,
    step3_result,
    sweep_from_catalog,
)
from transload.hardware.afd.search import Answer, Question, search
from transload.hardware.afd.stages import SplitWorker, Wire, wire_of
from transload.hardware.catalog import load_chip, load_link, load_model
from transload.hardware.precision import with_weights
from transload.study.expert_load import skewed_step, zipf_loads

ROOT = Path(__file__).parents[1]
MICRO_BATCHES = (1, 2, 3)
CONTEXTS = (2048, 8192, 32768, 131072)
SETUPS: dict[str, tuple[str, str, str, float]] = {
    # name: model, chip, link between the two sides, latency one way (assumed)
    "Qwen3-235B, GB200, NVLink 5": ("qwen3-235b-a22b", "gb200", "nvlink5", 5e-6),
    "DeepSeek-V3, GB200, NVLink 5": ("deepseek-v3", "gb200", "nvlink5", 5e-6),
    "DeepSeek-V3, B200, 400 Gb/s": ("deepseek-v3", "b200_sxm", "eth400", 10e-6),
    "DeepSeek-V3, H200, 400 Gb/s": ("deepseek-v3", "h200_sxm", "eth400", 10e-6),
    "Qwen3-235B, H100, 400 Gb/s": ("qwen3-235b-a22b", "h100_sxm", "eth400", 10e-6),
    "Llama-3.1-70B, H100, 400 Gb/s": ("llama-3.1-70b", "h100_sxm", "eth400", 10e-6),
}
RUBIN_MODELS = {"Qwen3-235B": "qwen3-235b-a22b", "DeepSeek-V3": "deepseek-v3"}
RUBIN_TARGETS_MS = (3, 5, 10, 20, 50)
RUBIN_TARGET = 0.01
SKEW_WORKERS, SKEW_CALLERS, SKEW_ROWS, SKEW_LAYERS = 8, 64, 128, 12
SKEWS = (0.0, 0.5, 1.0, 1.5)
"""The n-th hottest expert is chosen by 1 / n^s: a guess at how uneven traffic is, not a measurement."""
PLACEMENTS: dict[str, dict[str, Any]] = {
    "placed as if all were alike": {"knows_loads": False},
    "placed by how hot they are": {},
    "and 8 copies": {"num_replicas": 8},
    "and 32 copies": {"num_replicas": 32},
}
BRIDGE = (400e9, 2e-6)
"""Assumed: nobody has published the bridge's bandwidth or latency."""


def question(setup: str, **changes: Any) -> Question:
    model, chip, link, latency = SETUPS[setup]
    card = load_model(model)
    asked = Question(
        card=card,
        attention_chip=load_chip(chip),
        ffn_chip=load_chip(chip),
        wire=wire_of(load_link(link), latency=latency),
        context_tokens=8192,
        tpot_seconds=0.05,
        precision=with_weights(card.precision, "fp8"),
        micro_batches=MICRO_BATCHES,
    )
    return msgspec.structs.replace(asked, **changes)


def rubin(model: str, tpot: float, bandwidth: float, latency: float, context: int = 8192) -> Question:
    card = load_model(model)
    return Question(
        card=card,
        attention_chip=load_chip("rubin_r200"),
        ffn_chip=load_chip("groq3_lp30"),
        wire=Wire(latency_seconds=latency, attention_bytes_per_second=bandwidth, ffn_bytes_per_second=bandwidth),
        context_tokens=context,
        tpot_seconds=tpot,
        precision=with_weights(card.precision, "fp8"),
        micro_batches=MICRO_BATCHES,
    )


def describe(answer: Answer) -> dict[str, Any]:
    best = answer.candidates[0] if answer.candidates else None
    other = max(answer.unsplit, key=lambda each: each.per_chip, default=None)
    return {
        "gain": answer.gain,
        "break_even_cost": answer.break_even_cost,
        "unsplit": None
        if other is None
        else {
            "chips": other.parallel.num_chips,
            "batch": other.batch,
            "tpot_ms": other.tpot_seconds * 1e3,
            "per_chip": other.per_chip,
        },
        "split": None
        if best is None
        else {
            "attention_chips": best.attention_chips,
            "ffn_chips": best.ffn_chips,
            "micro_batches": best.micro_batches,
            "batch": best.batch,
            "tpot_ms": best.tpot_seconds * 1e3,
            "per_chip": best.per_chip,
            "per_attention_chip": best.tokens_per_second / best.attention_chips,
            "exposed_share": best.exposed_share,
            "attention_idle": best.attention_bubble,
            "ffn_idle": best.ffn_bubble,
            "waits_for": best.bound,
        },
    }


def ask(asked: Question) -> dict[str, Any]:
    try:
        return describe(search(asked))
    except DeploymentError as error:
        return {"refused": str(error)}


def by_context() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for setup in SETUPS:
        most = load_model(SETUPS[setup][0]).max_context or 131072
        results[setup] = {
            str(context): ask(question(setup, context_tokens=context)) for context in CONTEXTS if context <= most
        }
    return results


def by_latency() -> dict[str, Any]:
    """The gain at one-way latencies, and where it is 1."""
    results: dict[str, Any] = {}
    for setup in SETUPS:
        wire = question(setup).wire

        def gain(latency: float, setup: str = setup, wire: Wire = wire) -> float:
            changed = msgspec.structs.replace(wire, latency_seconds=latency)
            return search(question(setup, wire=changed, micro_batches=(2, 3))).gain or 0.0

        results[setup] = {"break_even_us": _break_even(gain, 1e-6, 1e-3)}
    return results


def _break_even(gain: Callable[[float], float], low: float, high: float) -> float | None:
    """Microseconds at which the gain is 1; None if even the lowest does not pay; the highest if all do."""
    if gain(low) < 1.0:
        return None
    if gain(high) >= 1.0:
        return high * 1e6
    for _ in range(6):
        middle = math.sqrt(low * high)
        if gain(middle) >= 1.0:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high) * 1e6


def on_rubin() -> dict[str, Any]:
    targets = {
        name: {str(target): ask(rubin(model, target * 1e-3, *BRIDGE)) for target in RUBIN_TARGETS_MS}
        for name, model in RUBIN_MODELS.items()
    }
    bridges = {
        f"{bandwidth / 1e9:g}": {
            f"{latency * 1e6:g}": ask(rubin("qwen3-235b-a22b", 0.005, bandwidth, latency))
            for latency in (0.5e-6, 2e-6, 5e-6, 10e-6)
        }
        for bandwidth in (50e9, 200e9, 800e9)
    }
    contexts = {
        name: {
            str(context): ask(rubin(model, RUBIN_TARGET, *BRIDGE, context))
            for context in CONTEXTS
            if context <= (load_model(model).max_context or 131072)
        }
        for name, model in RUBIN_MODELS.items()
    }
    latencies = {}
    for name, model in RUBIN_MODELS.items():

        def gain(latency: float, model: str = model) -> float:
            return search(rubin(model, RUBIN_TARGET, BRIDGE[0], latency)).gain or 0.0

        latencies[name] = _break_even(gain, 0.1e-6, 1e-3)
    return {"bridge": {"gigabytes_per_second": BRIDGE[0] / 1e9, "latency_us": BRIDGE[1] * 1e6}, "targets_ms": targets,
            "bridges": bridges, "target_ms": RUBIN_TARGET * 1e3, "contexts": contexts,
            "break_even_us": latencies}  # fmt: skip


def on_skew() -> dict[str, Any]:
    """Experts that are not chosen evenly, and copies of the hottest, played by the machines that serve."""
    card, chip = load_model("qwen3-235b-a22b"), load_chip("gb200")
    wire = wire_of(load_link("nvlink5"), latency=5e-6)
    num_experts = card.experts.num_experts if card.experts is not None else 0
    worker = SplitWorker(
        card, chip, chip, wire, precision=with_weights(card.precision, "fp8"), split="expert", parts=SKEW_WORKERS
    )
    rows = []
    for exponent in SKEWS:
        loads = zipf_loads(num_experts, exponent)
        for placement, said in PLACEMENTS.items():
            step = skewed_step(worker, SKEW_ROWS, SKEW_ROWS * 2048, attention_workers=SKEW_CALLERS,
                               ffn_workers=SKEW_WORKERS, loads=loads, num_layers=SKEW_LAYERS, **said)  # fmt: skip
            rows.append({"exponent": exponent, "hottest": max(loads) * num_experts, "placement": placement,
                         **msgspec.to_builtins(step)})  # fmt: skip
    return {"workers": SKEW_WORKERS, "callers": SKEW_CALLERS, "rows": SKEW_ROWS, "num_experts": num_experts,
            "steps": rows}  # fmt: skip


def from_others() -> dict[str, Any]:
    said = published()
    fastafd = []
    for workload in said.fastafd.workloads:
        catalog = fastafd_from_catalog(workload, said.fastafd.micro_batches)
        fastafd.append(
            {
                "model": workload.model,
                "context": workload.context_tokens,
                "ratio": f"{workload.attention_workers}:{workload.ffn_workers}",
                "measured": workload.speedup,
                "from_shares": speedup_from_shares(workload, said.fastafd.batch_expansion, said.fastafd.micro_batches),
                "from_catalog": catalog.speedup,
                "catalog_shares": [catalog.attention, catalog.dense, catalog.experts],
                "measured_shares": [workload.attention, workload.dense, workload.experts],
                "expansion": catalog.expansion,
            }
        )
    sweep = [
        {
            "context": point.context_tokens,
            "trays": point.trays,
            "measured_ms": point.tpot_ms,
            "simulated_ms": seconds * 1e3,
            "measured_per_chip": point.per_chip,
            "simulated_per_chip": point.batch * point.trays / (point.trays + 1) / seconds,
        }
        for point, seconds in sweep_from_catalog(said.fastafd_sweep)
    ]
    step3 = msgspec.to_builtins(step3_result(said.step3))
    return {
        "fastafd": fastafd,
        "sweep": sweep,
        "sweep_median_error": statistics.median(row["simulated_ms"] / row["measured_ms"] - 1 for row in sweep),
        "ascend": on_ascend(said.ascend),
        "step3": {**step3, "peak_per_chip": said.step3.peak_per_chip, "mean_per_chip": said.step3.mean_per_chip},
    }


ASCEND: dict[str, AscendAssumptions] = {
    "as published": AscendAssumptions(),
    "experts read at 65% of the bandwidth": AscendAssumptions(ffn_memory_share=0.65),
    "experts read at 95% of the bandwidth": AscendAssumptions(ffn_memory_share=0.95),
    "one way takes 50 us": AscendAssumptions(latency_seconds=50e-6),
    "were all 16 experts of a die read": AscendAssumptions(experts_per_die=16),
}


def on_ascend(ascend: Ascend) -> dict[str, Any]:
    """The published ratios as published and under other assumptions, and from which values their signs would follow."""
    rows = {
        name: [
            {
                **msgspec.to_builtins(result),
                "break_even_ratio": result.break_even_ratio if result.break_even_ratio < 1e9 else None,
            }
            for result in ascend_results(ascend, assumed)
        ]
        for name, assumed in ASCEND.items()
    }
    names = [f"{split.attention_workers}A{split.ffn_workers}F" for split in ascend.points[0].splits]
    limits: tuple[tuple[Literal["latency_seconds", "call_seconds"], float], ...] = (
        ("call_seconds", 1e-3),
        ("latency_seconds", 1e-2),
    )
    return {
        "rows": rows,
        "ratios": names,
        "measured": [
            {
                "context_tokens": point.context_tokens,
                "batches": [point.batch_unsplit, point.batch_split],
                "gains": [split.per_chip / point.unsplit - 1 for split in point.splits],
            }
            for point in ascend.points
        ],
        "pays_up_to": {
            name: [
                [ascend_break_even(ascend, point, split, name, most) for split in range(len(names))]
                for point in range(len(ascend.points))
            ]
            for name, most in limits
        },
    }


def agreement() -> dict[str, Any]:
    """Closed form against events, over pipelines drawn from a seed."""
    from random import Random

    from transload.hardware.afd.pipeline import Hop, LayerTimes

    random = Random(7)
    errors = []
    for _ in range(200):

        def hop() -> Hop:
            some = random.choice((0.0, 1.0))
            return Hop(
                latency_seconds=some * random.random(),
                attention_port_seconds=some * random.random() / 2,
                ffn_port_seconds=some * random.random() / 4,
            )

        layer = LayerTimes(
            attention_seconds=0.05 + random.random(),
            ffn_seconds=0.05 + random.random(),
            out=hop(),
            back=hop(),
            count=30,
        )
        pipeline = Pipeline(
            layers=(layer,),
            micro_batches=random.randint(1, 4),
            attention_workers=random.randint(1, 7),
            ffn_workers=random.randint(1, 4),
            split=random.choice(("replica", "column", "expert")),
        )
        errors.append(abs(step_seconds(pipeline) / play(pipeline).step_seconds - 1))
    return {"pipelines": len(errors), "median": statistics.median(errors), "largest": max(errors)}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "agreement": agreement,
    "published": from_others,
    "by_context": by_context,
    "by_latency": by_latency,
    "rubin": on_rubin,
    "skew": on_skew,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one part")
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    result: dict[str, Any] = {"simulated": True, "commit": commit.stdout.strip(), "command": " ".join(sys.argv)}
    for name, part in PARTS.items():
        if args.only in (None, name):
            began = time.perf_counter()
            result[name] = part()
            sys.stderr.write(f"{name}: {time.perf_counter() - began:.0f} s\n")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
