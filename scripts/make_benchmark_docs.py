"""Writes docs/benchmarks.md from benchmarks/results/*.json, so that no figure in it is typed. A test compares them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TARGET = ROOT / "docs" / "benchmarks.md"
HEAD = """# Benchmarks

Made by `scripts/make_benchmark_docs.py` from `benchmarks/results/`; each result was printed by a committed script, with
the machine, versions and commit it ran on. Every ratio is to a baseline of the same run. A machine of two virtual cores
is noisy: treat differences under a fifth as equal.
"""


def table(columns: list[str], rows: list[list[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def origin(result: dict[str, Any]) -> str:
    machine = result["machine"]
    cores = machine.get("num_cores", machine.get("cores"))
    name = machine.get("cpu", machine.get("processor"))
    load = machine.get("load_average", result.get("load_average"))
    if isinstance(load, list):
        load = round(load[0], 2)
    busy = f", load average {load}" if load is not None else ""
    return f"\n{name}, {cores} cores{busy}; commit {result['commit'][:7]}.\n"


def interference(result: dict[str, Any]) -> str:
    rows: list[list[object]] = []
    for name, figures in result["results"].items():
        alone, disturbed = figures["alone_itl_ms"], figures["disturbed_itl_ms"]
        rows.append(
            [
                name,
                alone["p50"],
                f"{disturbed['p50']} / {disturbed['p99']} / {disturbed['max']}",
                f"{figures['worst_gap_ratio']}x",
                figures["prompt_ttft_seconds"]["median"],
            ]
        )
    text = (
        "\n## Interference\n\nWhat running streams feel while prompts of "
        f"{result['prompt_tokens']:,} tokens arrive one by one ({result['streams']} streams; all setups on the same "
        "two cores). Inter-token latency in milliseconds; the worst gap over the median gap of the same streams "
        "alone.\n\n"
    )
    columns = ["setup", "alone p50", "disturbed p50 / p99 / max", "worst gap", "prompt's TTFT, s"]
    return text + table(columns, rows) + origin(result)


def handoff(result: dict[str, Any]) -> str:
    rows = [
        [
            f"{figure['cell_bytes'] // 1024} KiB",
            round(figure["num_bytes"] / 1e6),
            figure["transport"],
            f"{figure['median']:.2f}",
            f"{figure['in_process']:.2f}",
            f"{figure['share_of_in_process']:.0%}",
        ]
        for figure in result["figures"]
    ]
    text = (
        "\n## Handoff\n\nKV cells of random blocks from one worker process to another on one host, checksums on both "
        "sides included, against a plain numpy copy of the same cells inside one process in the same run. GB are 10^9 "
        "bytes; medians.\n\n"
    )
    return text + table(["cell", "MB", "over", "GB/s", "copy in process, GB/s", "share"], rows) + origin(result)


def front_end(result: dict[str, Any]) -> str:
    rows = [[name, value["median"], value["min"], value["max"]] for name, value in result["microseconds"].items()]
    text = (
        "\n## Front end\n\nCPU microseconds of the server process, with a backend that answers at once; a token is one "
        f"event of one of {result['streams']} streams.\n\n"
    )
    return text + table(["what", "median", "min", "max"], rows) + origin(result)


def engine(result: dict[str, Any]) -> str:
    names = list(
        dict.fromkeys(name for run in result["runs"] for row in run["rows"] for name in row["tokens_per_second"])
    )
    rows: list[list[object]] = []
    left_out: dict[str, str] = {}
    for run in result["runs"]:
        left_out |= run["left_out"]
        for row in run["rows"]:
            rates = row["tokens_per_second"]
            times = f"{row['times_best_peer']:.2f}x {row['best_peer']}" if "best_peer" in row else ""
            share = f"{row['share_of_limit']:.0%}" if "share_of_limit" in row else ""
            cells = [f"{rates[name]:,.0f}" if name in rates else "" for name in names]
            rows.append([run["threads"], row["case"], *cells, times, share])
    text = (
        "\n## Engine\n\nTokens/s in process, SmolLM2-135M in bfloat16: a prompt of so many tokens, or a batch that "
        f"decodes at a context of 256. Best of {result['rounds']} rounds in which all took turns on the same cores. "
        f"Our kernels: {result['kernels']}. The limit of a prefill is the rate of a product of two 2048 x 2048 "
        "matrices, the faster of bfloat16 and float32.\n\n"
    )
    missing = "".join(f"\n{name} is left out: {problem}\n" for name, problem in left_out.items())
    columns = ["threads", "case", *names, "times the best peer", "of the limit"]
    return text + table(columns, rows) + missing + origin(result)


def start(result: dict[str, Any]) -> str:
    rows: list[list[object]] = []
    for row in result["rows"]:
        seconds = row["seconds"]
        memory = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in row["memory_bytes"].items())
        spread = f"{seconds['median']:.1f} ({seconds['min']:.1f} to {seconds['max']:.1f})"
        rows.append([row["topology"], spread, f"{row['cpu_seconds']:.1f}", memory])
    install, build = result["install_bytes"], result["kernel_build_seconds"]
    text = (
        f"\n## Start\n\nFrom the command to the first streamed token of the default model on {result['cores']} cores, "
        "with everything fetched and built before. Memory is the proportional set size then, caches of the default "
        f"size included. Installed, the dependencies take {install['all'] / 1e6:,.0f} MB, of which torch "
        f"{install['torch'] / 1e6:,.0f}; building the kernels, once a machine, takes {build} s.\n\n"
    )
    return text + table(["topology", "seconds, median", "CPU seconds", "MB by process"], rows) + origin(result)


def afd(result: dict[str, Any]) -> str:
    hops = [
        [hop["transport"], hop["waiting"], f"{hop['p50']:.1f}", f"{hop['p99']:.1f}", f"{hop['best']:.1f}"]
        for hop in result["hops"]
    ]
    steps = [
        [
            figure["setup"],
            figure["micro_batches"],
            figure["batch"],
            f"{figure['step_ms']:.1f}",
            f"{figure['tokens_per_second']:.0f}",
            f"{figure['against_two_cores']:.2f}x",
            *(
                "" if figure[name] is None else f"{figure[name]:.0%}"
                for name in ("attention_bubble", "ffn_bubble", "exposed_hops")
            ),
        ]
        for figure in result["steps"]
    ]
    text = (
        "\n## Attention here, feed-forward there\n\n8 KiB there and back between two processes on two cores, in "
        "microseconds, copies included:\n\n"
    )
    text += table(["over", "waiting", "p50", "p99", "best"], hops)
    text += (
        f"\nDecode steps at {result['options']['context']} tokens of context: one worker that computes all of it, "
        "against an attention worker on one core and an FFN worker on the other. A bubble is the share of a step in "
        "which a side computes nothing; exposed hops are what attention waits beyond what the FFN worker's longer work "
        "explains.\n\n"
    )
    columns = ["setup", "micro-batches", "batch", "step, ms", "tokens/s", "of two cores"]
    text += table([*columns, "attention bubble", "FFN bubble", "exposed hops"], steps)
    return text + origin(result)


def gpu(result: dict[str, Any]) -> str:
    rows: list[list[object]] = []
    for row in result["rows"]:
        what = f"decode, batch {row['num_decode']}" if row["num_decode"] else "prefill"
        times = f"{row['times_transformers']:.2f}x" if "times_transformers" in row else ""
        rate = f"{row['tokens_per_second']:,.0f}"
        rows.append([what, row["tokens"], rate, f"{1e3 * row['seconds']:.2f}", f"{row['share_of_limit']:.0%}", times])
    limits = result["limits"]
    copy, product = limits["copy_bytes_per_second"] / 1e12, limits["gemm_flops_per_second"] / 1e12
    peer = result["versions"].get("transformers", "version not recorded")
    text = (
        f"\n## One GPU: {result['device']}, {result['shape']} shape\n\nWhole steps of the engine in bfloat16 with "
        "random weights, sampling included. The limit is the larger of reading weights and keys once at the rate of a "
        f"large copy ({copy:.2f} TB/s) and the layers' FLOPs at that of a large product ({product:.0f} TFLOP/s), "
        f"both measured in the same run; beside it transformers ({peer}) doing the same steps.\n\n"
    )
    columns = ["step", "tokens of context", "tokens/s", "ms a step", "of the limit", "times transformers"]
    return text + table(columns, rows) + origin(result)


def torture(result: dict[str, Any]) -> str:
    rows: list[list[object]] = [[name, f"{value:,}"] for name, value in result["counts"].items()]
    text = (
        f"\n## Faults (simulated)\n\n`make torture`, seeds {result['seeds']}: {result['what']}. "
        f"Failed: {result['failed']}. After every event: no block in two states or with two writers, no KV read that "
        "is not the request's own, every request in one phase; at the end every request has ended once and nothing "
        "is held.\n\n"
    )
    return text + table(["what", "count"], rows) + origin(result)


def validation(result: dict[str, Any]) -> str:
    rows: list[list[object]] = []
    for comparison in result["comparisons"]:
        for figure in comparison["figures"]:
            if not figure["within"]:
                continue
            error = figure["simulated"] / figure["measured"] - 1
            unit = 1e3 if figure["unit"] == "s" else 1
            name = f"{figure['name']}, ms" if figure["unit"] == "s" else figure["name"]
            rows.append(
                [
                    comparison["deployment"],
                    f"{comparison['load']} ({comparison['requests_per_second']:.2f}/s)",
                    name,
                    f"{figure['measured'] * unit:.4g}",
                    f"{figure['simulated'] * unit:.4g}",
                    f"{error:+.1%}",
                    "yes" if abs(error) <= figure["within"] else "no",
                ]
            )
    chip = result["chip"]
    text = (
        "\n## Real against virtual\n\n`transload validate`: the same deployments and loads on this machine and in "
        f"virtual time (*simulated*, from what `transload calibrate` measured of it on {chip['date']}: "
        f"{chip['model']}, {chip['dtype']}, {chip['threads']} thread(s)). Wanted: medians and throughput within 10 %, "
        "p90 within 20 %.\n\n"
    )
    drifts = [
        f"{comparison['deployment']} {drift['prefill']:.2f}x prefill, {drift['decode']:.2f}x decode"
        for comparison in result["comparisons"]
        if (drift := comparison.get("drift")) is not None
    ]
    if drifts:
        text += "Steps just before, over those of the calibration: " + "; ".join(dict.fromkeys(drifts)) + ".\n\n"
    columns = ["deployment", "load", "figure", "measured", "simulated", "error", "within"]
    return text + table(columns, rows) + origin(result)


def simulation(result: dict[str, Any]) -> str:
    rows: list[list[object]] = []
    for figure in result["figures"]:
        rows.append(
            [
                f"{figure['speedup']:g}x",
                f"{figure['requests']:,}",
                f"{figure['mean_decode_batch']:.0f}",
                f"{figure['cpu_seconds']['median']:.1f}",
                f"{figure['requests_per_cpu_second']['median']:,.0f}",
                f"{figure['output_tokens_per_cpu_second']['median']:,.0f}",
                f"{figure['gpu_hours_per_cpu_second']['median']:.1f}",
            ]
        )
    stepped = result["step_by_step"]
    quarter, whole = (size / 1e6 for size in result["peak_memory_bytes"].values())
    heap = result["heap_events_per_cpu_second"]["median"] / 1e6
    text = (
        f"\n## Simulation\n\n`transload simulate`, {result['what']} (`benchmarks/simulation.yaml`), at the recorded "
        "speed and faster; the median of some runs on one core. Beside it in the same run: a bare loop of the event "
        f"heap does {heap:.2f} M events a CPU second, going step by step is {stepped['times_slower']:.1f} times slower "
        f"with the same latencies to the bit, and peak memory is {quarter:.0f} MB for a quarter of "
        f"the requests, {whole:.0f} MB for all.\n\n"
    )
    columns = ["speed", "requests", "mean decode batch", "CPU seconds", "requests / CPU s", "tokens / CPU s"]
    return text + table([*columns, "GPU hours / CPU s"], rows) + origin(result)


SECTIONS = {
    "validation.json": validation,
    "engine.json": engine,
    "start.json": start,
    "interference.json": interference,
    "handoff.json": handoff,
    "afd.json": afd,
    "front_end.json": front_end,
    "gpu-llama-1b-h100.json": gpu,
    "gpu-llama-8b-h100.json": gpu,
    "simulation.json": simulation,
    "torture.json": torture,
}


def page() -> str:
    """The whole page: a section for each result that is there."""
    parts = [HEAD]
    for name, section in SECTIONS.items():
        path = RESULTS / name
        if path.exists():
            parts.append(section(json.loads(path.read_text())))
    return "".join(parts)


if __name__ == "__main__":
    TARGET.write_text(page())
    sys.stdout.write(f"wrote {TARGET}\n")
