"""What a served stream or request meets: interference, front end, start."""

from __future__ import annotations

from typing import Any

from benchmark_docs.layout import origin, table


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


def front_end(result: dict[str, Any]) -> str:
    rows = [[name, value["median"], value["min"], value["max"]] for name, value in result["microseconds"].items()]
    text = (
        "\n## Front end\n\nCPU microseconds of the server process, with a backend that answers at once; a token is one "
        f"event of one of {result['streams']} streams.\n\n"
    )
    return text + table(["what", "median", "min", "max"], rows) + origin(result)


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
