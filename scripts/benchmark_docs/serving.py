"""What a served stream or request meets: interference, front end, start."""

from __future__ import annotations

from typing import Any

from benchmark_docs.chart import chart
from benchmark_docs.layout import origin, table


def interference(result: dict[str, Any]) -> str:
    rows: list[list[object]] = []
    for name, figures in result["results"].items():
        before, after, disturbed = (figures[f"{phase}_itl_ms"] for phase in ("alone", "alone_after", "disturbed"))
        rows.append(
            [
                name,
                f"{before['p50']} / {after['p50']}",
                f"{disturbed['p50']} / {disturbed['p99']} / {disturbed['max']}",
                f"{figures['worst_gap_ratio']}x",
                f"{figures['tpot_ratio']}x",
                figures["prompt_ttft_seconds"]["median"],
            ]
        )
    text = (
        "\n## Interference\n\nWhat running streams feel while prompts of "
        f"{result['prompt_tokens']:,} tokens arrive one by one ({result['streams']} streams; all setups on the same "
        "two cores). Inter-token latency in milliseconds; alone: before the prompts and after them, when the streams' "
        "contexts are longer. The worst gap and the mean one are over what the same streams take alone at that "
        "context.\n\n"
    )
    columns = ["setup", "alone p50", "disturbed p50 / p99 / max", "worst gap", "mean gap", "TTFT of prompts, s"]
    return text + table(columns, rows) + origin(result)


def front_end(result: dict[str, Any]) -> str:
    text = (
        "\n## Front end\n\nCPU microseconds of the server process, with a backend that answers at once; a token is one "
        f"event of one of {result['streams']} streams. `bare` is an application of twenty lines on uvicorn with the "
        "same parser that sends as many chunks of the same size, in the same run. The load generator on the other core "
        "never sleeps, so that nothing is spent on waking it.\n\n"
    )
    text += table(["what", "median", "min", "max", "times bare"], _times_bare(result["microseconds"]))
    text += (
        "\nWhat callers on the same machine see: requests of one token, which is there at once, and milliseconds from "
        "when a token was made to when it was with its caller, with a step every 10 ms that gives all streams their "
        "tokens at the same moment.\n\n"
    )
    text += table(["what", "median", "min", "max", "times bare"], _times_bare(result["seen"]))
    return text + origin(result)


def _times_bare(found: dict[str, Any]) -> list[list[object]]:
    """Names are WHAT/APPLICATION or WHAT/APPLICATION/HOW."""
    rows: list[list[object]] = []
    for name, value in found.items():
        what, app, *how = name.split("/") if "requests/s" not in name else (*name.rsplit("/", 1),)
        bare = found["/".join((what, "bare", *how))]["median"]
        against = f"{value['median'] / bare:.2f}" if app != "bare" else "1"
        rows.append([name, *(f"{value[key]:,.4g}" for key in ("median", "min", "max")), against])
    return rows


def start(result: dict[str, Any]) -> str:
    rows: list[list[object]] = []
    for row in result["rows"]:
        seconds = row["seconds"]
        spread = f"{seconds['median']:.1f} ({seconds['min']:.1f} to {seconds['max']:.1f})"
        cpu = ", ".join(f"{name} {spent:.1f}" for name, spent in row["cpu_seconds_by_process"].items())
        memory = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in row["memory_bytes"].items())
        all_memory = f"{sum(row['memory_bytes'].values()) / 1e6:,.0f}"
        rows.append([row["topology"], spread, f"{row['cpu_seconds']:.1f}: {cpu}", f"{all_memory}: {memory}"])
    install, build = result["install_bytes"], result["kernel_build_seconds"]
    text = (
        f"\n## Start\n\nFrom the command to the first streamed token of the default model on {result['cores']} cores, "
        "with everything fetched and built before. CPU seconds in all are those until the server has ended, by process "
        "those up to the token; memory is the proportional set size then, caches of the default size included. Workers "
        f"are forked from the fork server, which imports what they need. Installed, the dependencies take "
        f"{install['all'] / 1e6:,.0f} MB, of which torch {install['torch'] / 1e6:,.0f}; building the kernels, once a "
        f"machine, takes {build} s.\n\n"
    )
    return text + table(["topology", "seconds, median", "CPU seconds", "MB"], rows) + origin(result)


SPLIT_FIGURES = ("prefill", "decode 1", "decode 8", "start", "memory")


def split_peer(result: dict[str, Any]) -> str:
    rows: list[list[object]] = [
        [
            run["system"],
            *(f"{run[what]:,.0f}" for what in ("prefill", "decode 1", "decode 8")),
            f"{run['start']:.1f}",
            f"{run['memory'] / 1e6:,.0f}",
        ]
        for run in result["runs"]
    ]
    before = "compiled" if result["peer_compiled_before"] else "built (vLLM had yet to compile)"
    text = (
        f"\n## Beside the peer that splits\n\n`{result['command']}`: prefill on one core, decode on another, over HTTP "
        "with one load generator and the same weights; the systems one after the other on the same two cores, "
        f"Transload before and after each. A prompt of {result['prompt_tokens']} tokens in tokens/s until the first "
        "comes, decode in tokens/s of 1 and of 8 streams from a context of "
        f"{result['context_tokens']} on; the best of {result['rounds']} rounds. From the commands to the first token, "
        f"with everything fetched and {before} before. Memory is the proportional set size of all processes after the "
        f"load; each worker's KV cache has room for {result['kv_tokens']:,} tokens. vLLM computes in "
        f"{result['peer_dtype']}, Transload in bfloat16 with kernels ({result['kernels']}). vLLM 1P1D is two "
        "servers with the NixlConnector and a core each; *as it comes*: not compiled; *tuned*: compiled, NIXL without "
        "polling threads, each worker back on its own core, where the connector binds all to the last.\n\n"
    )
    text += table(["system", "prefill", "decode, batch 1", "batch 8", "start, s", "memory, MB"], rows)
    rows = [[pair, *(f"{times[what]:.2f}x" for what in SPLIT_FIGURES)] for pair, times in result["ratios"].items()]
    rows.append(["wanted of the tuned one", *(f"{result['wanted'][what]:g}x" for what in SPLIT_FIGURES)])
    text += "\nHow many times as fast, as soon there, and as small:\n\n"
    text += table(["", "prefill", "decode, batch 1", "batch 8", "start", "memory"], rows)
    text += "".join(f"\n{name} is left out: {problem}.\n" for name, problem in result["left_out"].items())
    return text + origin(result)


def poisson(result: dict[str, Any]) -> str:
    rows: list[list[object]] = []
    for row in result["rows"]:
        ttft, tpot, itl = row["ttft_ms"], row["tpot_ms"], row["itl_ms"]
        rows.append(
            [
                row["setup"],
                f"{row['rate']:g}",
                f"{ttft['p50']:,.0f} / {ttft['p95']:,.0f}",
                f"{tpot['p50']:.0f} / {tpot['p95']:.0f}",
                f"{itl['p99']:.0f}",
                f"{row['goodput_requests_per_second']:.2f}",
                f"{row['attainment']:.0%}",
            ]
        )
    targets = result["targets"]
    text = (
        f"\n## Poisson arrivals\n\n{result['input_tokens']} tokens in, {result['output_tokens']} out, the same "
        f"requests for each way of using two cores; {result['seconds']:.0f} seconds of arrivals at each rate. "
        f"Milliseconds, p50 / p95. Goodput counts the requests with a TTFT within {targets['ttft']} and a TPOT within "
        f"{targets['tpot']}.\n\n"
    )
    columns = ["setup", "requests/s", "TTFT", "TPOT", "gap p99", "goodput, requests/s", "within targets"]
    return text + table(columns, rows) + "\n![goodput against rate](benchmarks-goodput.svg)\n" + origin(result)


def goodput_figure(result: dict[str, Any]) -> str:
    """Goodput against the offered rate, a line for each setup."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in result["rows"]:
        lines.setdefault(row["setup"], []).append((row["rate"], row["goodput_requests_per_second"]))
    rates = sorted({row["rate"] for row in result["rows"]})
    return chart(
        "requests a second within targets",
        "requests a second that arrive",
        lines,
        {rate: f"{rate:g}" for rate in rates},
        y_ticks=(0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0),
        from_zero=True,
    )
