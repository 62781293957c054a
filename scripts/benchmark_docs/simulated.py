"""Virtual time: its speed, and how far it is from real runs."""

from __future__ import annotations

from typing import Any

from benchmark_docs.layout import origin, table


def simulation(result: dict[str, Any]) -> str:
    rows = [_speed(figure, "plain") for figure in result["figures"]]
    rows += [_speed(figure, "compiled") for figure in result["compiled"]]
    stepped = result["step_by_step"]
    quarter, whole = (size / 1e6 for size in result["peak_memory_bytes"].values())
    heap = result["heap_events_per_cpu_second"]["median"] / 1e6
    text = (
        f"\n## Simulation\n\n`transload simulate`, {result['what']} (`benchmarks/simulation.yaml`), at the recorded "
        "speed and faster, and a made workload with longer outputs; the median of some runs on one core. *Compiled* is "
        "the copy that `scripts/compile.py` makes: the same modules, ahead of time, with "
        f"{'the same' if result['same_when_compiled'] else 'OTHER'} latencies to the bit. Beside it in the same run: a "
        f"bare loop of the event heap does {heap:.2f} M events a CPU second, going step by step is "
        f"{stepped['times_slower']:.1f} times slower with {'the same' if stepped['same_latencies'] else 'OTHER'} "
        f"latencies to the bit, and peak memory is {quarter:.0f} MB for a quarter of the requests, {whole:.0f} MB for "
        "all.\n\n"
    )
    columns = ["workload", "modules", "requests", "mean decode batch", "CPU seconds", "requests / CPU s"]
    text += table([*columns, "tokens / CPU s", "GPU hours / CPU s"], rows)
    text += "\nOther simulators, on other machines, so that only large ratios mean something:\n\n"
    peers: list[list[object]] = [
        [peer["name"], peer["what"], f"{peer['requests_per_cpu_second']:,g}", *_times(result, peer)]
        for peer in result["peers"]
    ]
    return text + table(["simulator", "of what", "requests / CPU s", "plain", "compiled"], peers) + origin(result)


def _speed(figure: dict[str, Any], modules: str) -> list[object]:
    return [
        figure["workload"],
        modules,
        f"{figure['requests']:,}",
        f"{figure['mean_decode_batch']:.0f}",
        f"{figure['cpu_seconds']['median']:.1f}",
        f"{figure['requests_per_cpu_second']['median']:,.0f}",
        f"{figure['output_tokens_per_cpu_second']['median']:,.0f}",
        f"{figure['gpu_hours_per_cpu_second']['median']:.1f}",
    ]


def _times(result: dict[str, Any], peer: dict[str, Any]) -> list[object]:
    """How many times as many requests the first workload has, plain and compiled."""
    rates = [figures[0]["requests_per_cpu_second"]["median"] if figures else None for figures in
             (result["figures"], result["compiled"])]  # fmt: skip
    times = [None if rate is None else rate / peer["requests_per_cpu_second"] for rate in rates]
    return ["" if each is None else f"{each:.0f}x" if each >= 10 else f"{each:.1f}x" for each in times]


def validation(result: dict[str, Any], title: str = "Real against virtual") -> str:
    rows: list[list[object]] = []
    for comparison in result["comparisons"]:
        for figure in (*comparison["figures"], *comparison["stages"]):
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
        f"\n## {title}\n\n`transload validate`: the same deployments and loads on this machine and in "
        f"virtual time (*simulated*, from what `transload calibrate` measured of it on {chip['date']}: "
        f"{chip['model']}, {chip['dtype']}, {chip['threads']} thread(s)). Wanted: medians and throughput within 10 %, "
        "p90 within 20 %, of each stage that takes a twentieth of a request's time too.\n\n"
    )
    drifts = [
        f"{comparison['deployment']} at {comparison['load']} {drift['prefill']:.2f}x"
        for comparison in result["comparisons"]
        if (drift := comparison.get("drift")) is not None
    ]
    if result.get("simulated_commit", result["commit"]) != result["commit"]:
        text += f"Simulated anew by commit {result['simulated_commit'][:7]} from what had been measured before.\n\n"
    if drifts:
        follows = ", by which the simulation is scaled" if result.get("follows_drift") else ""
        text += f"How many times as long the cores took all through each load as when they were calibrated{follows}: "
        text += "; ".join(dict.fromkeys(drifts)) + ".\n\n"
    columns = ["deployment", "load", "figure", "measured", "simulated", "error", "within"]
    text += table(columns, rows) + "\nMean seconds a request spends in each stage, measured and *simulated*:\n\n"
    text += table(["deployment", "load", "stages"], [_stages(each) for each in result["comparisons"]])
    return text + origin(result)


def _stages(comparison: dict[str, Any]) -> list[object]:
    """Those that take a hundredth of a second or more."""
    told = [
        f"{figure['name']} {figure['measured']:.2f} / {figure['simulated']:.2f}{_off(figure)}"
        for figure in comparison["stages"]
        if figure["within"] is None and max(figure["measured"], figure["simulated"]) >= 0.01
    ]
    return [comparison["deployment"], comparison["load"], "; ".join(told)]


def _off(figure: dict[str, Any]) -> str:
    return f" ({figure['simulated'] / figure['measured'] - 1:+.0%})" if figure["measured"] else ""


def split_validation(result: dict[str, Any]) -> str:
    return validation(result, "Real against virtual: attention here, feed-forward there")
